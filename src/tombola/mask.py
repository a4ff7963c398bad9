"""A mask: which parts of a model are kept. `True` = kept, everywhere.

A mask has up to four kinds of part: attention heads, MLPs, neurons of MLPs, and single values of named parameters. It
is a value: frozen, with an algebra (`&`, `|`, `~`), exact counts, and a packed form of one bit per entry. What an entry
weighs in parameters is the anatomy's knowledge, not the mask's.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tombola.errors import MaskError
from tombola.stats import Overlap, overlap_of_counts

UNITS = ("heads", "mlps", "neurons")  # the structured parts, in the order in which they are listed everywhere


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """Kept entries, by part. A part that is None (or a parameter that is absent) is not masked at all.

    heads    [layer, head]; a row per owner of parameters, in forward order
    mlps     [layer]
    neurons  [layer, d_ffn]
    values   parameter name -> mask of the parameter's own shape

    Raises: MaskError when a part is not a boolean tensor of the right rank.
    """

    heads: Bool[Tensor, "attention head"] | None = None
    mlps: Bool[Tensor, " layer"] | None = None
    neurons: Bool[Tensor, "layer d_ffn"] | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.parts())
        if taken := self.values.keys() & set(UNITS):
            raise MaskError("a parameter has the name of a part", got=sorted(taken), expected=f"names other than {UNITS}")
        # A private copy: a mask may not change because the tensor it was made from does.
        for name in UNITS:
            part = getattr(self, name)
            if part is not None:
                object.__setattr__(self, name, part.detach().clone())
        copies = {name: part.detach().clone() for name, part in sorted(self.values.items())}
        object.__setattr__(self, "values", MappingProxyType(copies))

    def parts(self) -> dict[str, Tensor]:
        """Every part that is present: "heads", "mlps", "neurons", then parameters by name."""
        units = {name: getattr(self, name) for name in UNITS if getattr(self, name) is not None}
        return units | dict(self.values)

    def structured(self) -> "Mask":
        """Its heads, MLPs and neurons, without single values."""
        return Mask(heads=self.heads, mlps=self.mlps, neurons=self.neurons)

    def counts(self) -> dict[str, tuple[int, int]]:
        """(kept, all) entries of each part."""
        return {name: (int(part.sum()), part.numel()) for name, part in self.parts().items()}

    @property
    def removes_nothing(self) -> bool:
        return all(bool(part.all()) for part in self.parts().values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all is kept."""
        return bool(self.parts()) and not any(bool(part.any()) for part in self.parts().values())

    def __and__(self, other: "Mask") -> "Mask":
        """Kept by both. A part only one of them has is taken as it is: the other keeps all of it."""
        return self._combine(other, torch.logical_and)

    def __or__(self, other: "Mask") -> "Mask":
        """Kept by either. A part only one of them has is dropped: the other keeps all of it."""
        joined = self._combine(other, torch.logical_or)
        common = self.parts().keys() & other.parts().keys()
        return _from_parts({name: part for name, part in joined.parts().items() if name in common})

    def __invert__(self) -> "Mask":
        """Kept becomes removed and the other way round, in the parts that are present."""
        return _from_parts({name: ~part for name, part in self.parts().items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        a, b = self.parts(), other.parts()
        return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)

    def __hash__(self) -> int:
        return hash(tuple((name, part.numpy(force=True).tobytes()) for name, part in self.parts().items()))

    def __reduce__(self) -> tuple[Callable[..., "Mask"], tuple[dict[str, Tensor]]]:
        """How to copy it (`copy.deepcopy` of a model that holds it): a view of a mapping, as `values` is, has no copy."""
        return _from_parts, (self.parts(),)

    def overlap(self, other: "Mask") -> dict[str, Overlap]:
        """What both keep, for every part that both have, beside what masks of these sizes share by chance.

        Raises: MaskError when shapes differ.
        """
        a, b = self.parts(), other.parts()
        common = [name for name in a if name in b]
        _same_shapes(a, b, common)
        return {
            name: overlap_of_counts(a[name].numel(), int(a[name].sum()), int(b[name].sum()), int((a[name] & b[name]).sum()))
            for name in common
        }

    def overlap_by_type(self, other: "Mask") -> dict[str, Overlap]:
        """`overlap` with all single values taken together, as "values": what is said of tickets in one line."""
        by_part = self.overlap(other)
        values = [by_part.pop(name) for name in list(by_part) if name not in UNITS]
        if values:
            n, a, b, shared = (sum(getattr(one, of) for one in values) for of in ("n", "size_a", "size_b", "shared"))
            by_part["values"] = overlap_of_counts(n, a, b, shared)
        return by_part

    def counts_by_type(self) -> dict[str, tuple[int, int]]:
        """`counts` with all single values taken together, as "values"."""
        by_part = self.counts()
        values = [by_part.pop(name) for name in list(by_part) if name not in UNITS]
        return by_part | ({"values": (sum(k for k, _ in values), sum(n for _, n in values))} if values else {})

    def flat(self, part: str) -> Bool[Tensor, " entry"]:
        """All entries of one part in a row; "values" are those of all parameters, in the order of their names.

        Raises: MaskError for a part that the mask does not have.
        """
        rows = [one.flatten() for name, one in self.parts().items() if name == part or (part == "values" and name not in UNITS)]
        if not rows:
            raise MaskError(f"the mask has no {part}", got=list(self.parts())[:6], expected="a part that is present")
        return torch.cat(rows)

    def pack(self) -> dict[str, Tensor]:
        """One bit per entry: part name -> bytes, first entry in the lowest bit, the last byte filled with zeros."""
        return {
            name: torch.from_numpy(np.packbits(part.numpy(force=True).reshape(-1), bitorder="little"))
            for name, part in self.parts().items()
        }

    def digest(self) -> str:
        """SHA-256 (64 hex characters) of what it keeps, with names and shapes: equal masks, equal digests, in any process."""
        digest = hashlib.sha256()
        for name, bits in self.pack().items():
            digest.update(f"{name}|{tuple(self.parts()[name].shape)}|".encode())
            digest.update(bits.numpy().data)
        return digest.hexdigest()

    @staticmethod
    def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> "Mask":
        """The mask that `pack` was called on. Raises: MaskError when bytes and shapes do not belong together."""
        if packed.keys() != shapes.keys():
            raise MaskError("mask bytes and mask shapes name different parts", got=sorted(packed), expected=sorted(shapes))
        parts = {}
        for name, shape in shapes.items():
            n, bits = math.prod(shape), packed[name].numpy(force=True)
            if bits.dtype != np.uint8 or bits.size != -(-n // 8):
                raise MaskError(
                    f"mask part {name} has the wrong number of bytes",
                    got=f"{bits.size} × {bits.dtype}",
                    expected=f"{-(-n // 8)} bytes for shape {tuple(shape)}",
                )
            flat = np.unpackbits(bits, count=n, bitorder="little").view(bool)
            parts[name] = torch.from_numpy(flat).reshape(tuple(shape))
        _check(parts)
        return _from_parts(parts)

    def _combine(self, other: "Mask", rule: Callable[[Tensor, Tensor], Tensor]) -> "Mask":
        a, b = self.parts(), other.parts()
        common = [name for name in a if name in b]
        _same_shapes(a, b, common)
        return _from_parts(a | b | {name: rule(a[name], b[name]) for name in common})


def _from_parts(parts: Mapping[str, Tensor]) -> Mask:
    """The mask of these parts, which nobody else may write to: they are taken as they are, a byte an entry being much."""
    mask = object.__new__(Mask)
    for name in UNITS:
        object.__setattr__(mask, name, parts.get(name))
    values = {name: part for name, part in sorted(parts.items()) if name not in UNITS}
    object.__setattr__(mask, "values", MappingProxyType(values))
    return mask


def _check(parts: Mapping[str, Tensor]) -> None:
    ranks = {"heads": 2, "mlps": 1, "neurons": 2}
    wrong = {name: part for name, part in parts.items() if part.dtype != torch.bool or part.ndim != ranks.get(name, part.ndim)}
    if wrong:
        raise MaskError(
            f"mask parts are not boolean tensors of the right rank: {', '.join(wrong)}",
            got="; ".join(f"{name}: {part.dtype} of shape {tuple(part.shape)}" for name, part in wrong.items()),
            expected="torch.bool, True = kept; heads [layer, head], mlps [layer], neurons [layer, d_ffn], values any shape",
            next="compare scores with a threshold, or use .bool()",
        )


def _same_shapes(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: list[str]) -> None:
    wrong = [name for name in names if a[name].shape != b[name].shape]
    if wrong:
        raise MaskError(
            "the two masks are of different shape",
            got="; ".join(f"{name}: {tuple(a[name].shape)} and {tuple(b[name].shape)}" for name in wrong),
            expected="masks of the same architecture",
            next="compare tickets of one base only",
        )
