"""Settings by name: every option of data, training and search in one flat space, checked together.

A setting is a field of one of the frozen dataclasses in `GROUPS`; its name is the same on the command line, in Python, in
a stored cell and on the page.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from tombola.errors import MaskError, SettingsError, TombolaError
from tombola.search.structured import SPruneSettings
from tombola.train import RunSeeds, TrainSettings

PRESET = "corrected"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which rows: for training, for choosing the mask, for the report."""

    train_rows: Annotated[int, Ge(2)] | None = None  # cap on the rows trained on; None = all
    selection_rows: Annotated[int, Ge(2)] | None = None  # cap on the rows the mask is chosen on
    selection_split: Literal["held_out_from_train", "dev"] = "held_out_from_train"
    split_seed: Annotated[int, Ge(0)] = 0  # which train rows are held out; the same rows for every run seed
    max_length: Annotated[int, Ge(8), Le(8192)] = 128  # tokens; what is longer is cut


GROUPS: dict[str, type[Any]] = {"data": DataSettings, "train": TrainSettings, "search": SPruneSettings}


@dataclass(frozen=True, slots=True)
class Settings:
    """All resolved settings of a find, and its run seeds."""

    data: DataSettings
    train: TrainSettings
    search: SPruneSettings
    seeds: tuple[RunSeeds, ...]

    def plain(self) -> dict[str, dict[str, Any]]:
        """Group → name → value, as JSON; without seeds."""
        return {group: asdict(getattr(self, group)) for group in GROUPS}


def resolve(values: Mapping[str, Any], seeds: Sequence[int] = (0,), own_seeds: Mapping[str, int] | None = None) -> Settings:
    """The settings with these values, defaults elsewhere. `own_seeds` sets head, data, dropout or mask alone.

    Raises: SettingsError with every problem at once: unknown names (the nearest is offered), values out of range, seeds
    that repeat; MaskError for `head_mask`, which nothing here takes.
    """
    if values.get("head_mask") is not None:
        raise MaskError(
            "head_mask= is not taken: transformers 5 ignores it in silence, and a search makes its own mask",
            next="use tombola.ablate(model, layer, head) to remove a head by hand",
        )
    names = {field.name: group for group, kind in GROUPS.items() for field in fields(kind)}
    problems: list[TombolaError] = []
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in values.items():
        if name in names:
            groups[names[name]][name] = value
        elif name != "head_mask":
            near = difflib.get_close_matches(name, names, n=1)
            problems.append(
                TombolaError(
                    f"there is no setting {name!r}",
                    expected=", ".join(names),
                    next=f"did you mean {near[0]!r}?" if near else None,
                )
            )
    resolved: dict[str, Any] = {}
    for group, kind in GROUPS.items():
        resolved[group], wrong = _checked(kind, groups[group])
        problems += wrong
    run_seeds, wrong = _seeds(seeds, own_seeds or {})
    problems += wrong
    if problems:
        raise SettingsError(problems)
    return Settings(seeds=run_seeds, **resolved)


def _checked(kind: type[Any], values: Mapping[str, Any]) -> tuple[Any, list[TombolaError]]:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values), []
    except ValidationError as error:
        return None, [
            TombolaError(
                f"{one['loc'][0]} is not valid", got=repr(one["input"]), expected=one["msg"].removeprefix("Input should be ")
            )
            for one in error.errors()
        ]


def _seeds(seeds: Sequence[int], own: Mapping[str, int]) -> tuple[tuple[RunSeeds, ...], list[TombolaError]]:
    problems = []
    if not seeds or any(not isinstance(seed, int) or not 0 <= seed < 2**32 for seed in seeds):
        problems.append(
            TombolaError("seeds are not valid", got=list(seeds), expected="one or more whole numbers from 0 to 2^32 − 1")
        )
    elif len(set(seeds)) < len(seeds):
        problems.append(
            TombolaError(
                "a seed is given twice",
                got=", ".join(map(str, seeds)),
                expected="different seeds: a repeated run is no new evidence",
            )
        )
    four = ("head", "data", "dropout", "mask")
    for name, seed in own.items():
        if name not in four:
            problems.append(TombolaError(f"there is no seed {name!r}", expected=", ".join(four)))
        elif type(seed) is not int or not 0 <= seed < 2**32:
            problems.append(TombolaError(f"the {name} seed is not valid", got=seed, expected="a whole number from 0 to 2^32 − 1"))
    if problems:
        return (), problems
    return tuple(RunSeeds(**{name: own.get(name, seed) for name in four}) for seed in seeds), []
