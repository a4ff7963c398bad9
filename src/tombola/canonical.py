"""Values that have exactly one way to be written, and what they are called: the fingerprint of their canonical JSON."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from tombola.errors import StoreError

JSON: TypeAlias = bool | int | float | str | Sequence[Any] | Mapping[str, Any] | None


def fingerprint(value: JSON) -> str:
    """128 bits of the sha256 of `value` as canonical JSON, in 32 hex characters; the key of a cell.

    The order of keys does not matter and tuples equal lists; 1, 1.0 and True all differ.
    Raises: StoreError naming each part that has no exact JSON (NaN, infinities, keys that are no strings, objects).
    """
    return hashlib.sha256(exact_json(value).encode("ascii")).hexdigest()[:32]


def exact_json(value: JSON, indent: int | None = None) -> str:
    """`value` as JSON that is read back as the same value: sorted keys, no NaN. Raises: as `fingerprint`."""
    faults = list(_faults(value, "value"))
    if faults:
        expected = "None, bool, int, str, finite float; lists, tuples and string-keyed mappings of these"
        next = "write such a value as a string, or leave it out"
        raise StoreError("this has no exact JSON", got="; ".join(faults), expected=expected, next=next)
    separators = (",", ":" if indent is None else ": ")
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=separators, indent=indent, default=dict)


def _faults(value: object, where: str) -> Iterator[str]:
    match value:
        case None | bool() | int() | str():
            return
        case float():
            if not math.isfinite(value):
                yield f"{where} is {value}"
        case list() | tuple():
            for place, item in enumerate(value):
                yield from _faults(item, f"{where}[{place}]")
        case Mapping():
            for name, item in value.items():
                if not isinstance(name, str):  # json would write 1 as "1", so that two settings become one
                    yield f"{where} has the key {name!r}"
                yield from _faults(item, f"{where}.{name}")
        case _:
            yield f"{where} is a {type(value).__name__}"
