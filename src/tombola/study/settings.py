"""Settings by name: every option of data, training and search in one flat space, checked together.

A setting is a field of one of the frozen dataclasses in `GROUPS`; its name is the same on the command line, in Python, in
a stored cell and on the page.
"""

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from tombola.errors import MaskError, SettingsError, TombolaError
from tombola.search import SEARCHES
from tombola.search.controls import ControlSettings
from tombola.study.presets import DEFAULT, preset_values
from tombola.train import RunSeeds, TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which rows: for training, for choosing the mask, for the report."""

    train_rows: Annotated[int, Ge(2)] | None = None  # cap on the rows trained on; None = all
    selection_rows: Annotated[int, Ge(2)] | None = None  # cap on the rows the mask is chosen on
    report_rows: Annotated[int, Ge(2)] | None = None  # cap on the report and challenge rows, drawn by split_seed
    # validation: the rows a task has for this itself, apart from those it reports on (`files` with --test)
    # train: rows the model is trained on
    selection_split: Literal["held_out_from_train", "dev", "validation", "train"] = "held_out_from_train"
    split_seed: Annotated[int, Ge(0)] = 0  # which train rows are held out; the same rows for every run seed
    max_length: Annotated[int, Ge(8), Le(8192)] = 128  # tokens; what is longer is cut
    padding: Literal["bucketed", "max_length"] = "bucketed"  # max_length: rows in shuffled order, each padded to max_length


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainSettings:
    """From where a ticket is trained again. The defaults are the `corrected` column."""

    # keep_tuned_embeddings: the embeddings are those of the model the ticket was found on, all else is the base
    retrain_start: Literal["pretrained_all", "pretrained_keep_tuned_embeddings"] = "pretrained_all"
    # mask_keeps_shrink_drops: a layer that lost all its heads is trained without the bias of o, as physical removal does it
    empty_layer_bias: Literal["keep", "mask_keeps_shrink_drops"] = "keep"


# What every find has; its search adds the settings of the method, see `SEARCHES`.
GROUPS: dict[str, type[Any]] = {
    "data": DataSettings,
    "train": TrainSettings,
    "control": ControlSettings,
    "retrain": RetrainSettings,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """All resolved settings of a find, and its run seeds."""

    method: str
    preset: str
    data: DataSettings
    train: TrainSettings
    search: Any  # the settings class of the method
    control: ControlSettings
    retrain: RetrainSettings
    seeds: tuple[RunSeeds, ...]

    def plain(self) -> dict[str, dict[str, Any]]:
        """Group → name → value, as JSON; without seeds."""
        return {group: asdict(getattr(self, group)) for group in groups_of(self.method)}

    @property
    def search_in_use(self) -> dict[str, Any]:
        """The settings of the search as its cell names them: without those that only other procedures read, and without those
        that came later and have their default.

        Which these are, a field's metadata says. So a new setting renames no stored search.
        """
        values, procedure = asdict(self.search), getattr(self.search, "procedure", None)
        for one in fields(self.search):
            unsaid = one.metadata.get("unsaid", False) and values[one.name] == one.default
            if unsaid or procedure not in one.metadata.get("procedures", (procedure,)):
                del values[one.name]
        return values


def groups_of(method: str) -> dict[str, type[Any]]:
    """Group → settings class, for one method of search. Raises: SettingsError for an unknown method."""
    if method not in SEARCHES:
        near = difflib.get_close_matches(method, SEARCHES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise SettingsError([TombolaError(f"unknown method {method!r}", expected=", ".join(SEARCHES), next=hint)])
    return GROUPS | {"search": SEARCHES[method][1]}


def options_of(method: str) -> set[str]:
    """The names of all settings of one method."""
    return {field.name for kind in groups_of(method).values() for field in fields(kind)}


def resolve(
    values: Mapping[str, Any],
    seeds: Sequence[int] = (0,),
    own_seeds: Mapping[str, int] | None = None,
    *,
    method: str = "s-prune",
    preset: str = DEFAULT,
) -> Settings:
    """The settings of a preset with these values set otherwise. `own_seeds` sets head, data, dropout or mask alone.

    Raises: SettingsError with every problem at once: unknown names (the nearest is offered), values out of range, seeds
    that repeat, an unknown method or preset; MaskError for `head_mask`, which nothing here takes.
    """
    if values.get("head_mask") is not None:
        raise MaskError(
            "head_mask= is not taken: transformers 5 ignores it in silence, and a search makes its own mask",
            next="use tombola.ablate(model, layer, head) to remove a head by hand",
        )
    kinds = groups_of(method)
    names = {field.name: group for group, kind in kinds.items() for field in fields(kind)}
    problems: list[TombolaError] = []
    groups: dict[str, dict[str, Any]] = {group: {} for group in kinds}
    for name, value in (preset_values(preset, set(names)) | dict(values)).items():
        if name in names:
            groups[names[name]][name] = value
        elif name != "head_mask":
            near = difflib.get_close_matches(name, names, n=1)
            problems.append(
                TombolaError(
                    f"there is no setting {name!r} of {method}",
                    expected=", ".join(names),
                    next=f"did you mean {near[0]!r}?" if near else None,
                )
            )
    resolved: dict[str, Any] = {}
    for group, kind in kinds.items():
        resolved[group], wrong = _checked(kind, groups[group])
        problems += wrong
    run_seeds, wrong = _seeds(seeds, own_seeds or {})
    problems += wrong
    if problems:
        raise SettingsError(problems)
    return Settings(method=method, preset=preset, seeds=run_seeds, **resolved)


@functools.cache
def _adapter(kind: type[Any]) -> Any:
    """What checks a class of settings: made once, since a study of many tasks resolves the same ones hundreds of times."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _checked(kind: type[Any], values: Mapping[str, Any]) -> tuple[Any, list[TombolaError]]:
    from pydantic import ValidationError

    try:
        checked = _adapter(kind).validate_python(values)  # type: ignore[arg-type]  # a class is hashable
    except ValidationError as error:
        return None, [
            TombolaError(
                f"{one['loc'][0]} is not valid", got=repr(one["input"]), expected=one["msg"].removeprefix("Input should be ")
            )
            for one in error.errors()
        ]
    # pydantic reads True as 1, and 1.0 as 1, which of heads is one and not all of them; only of 1 as 1.0 nothing is lost.
    adjusted = {
        name: (value, getattr(checked, name))
        for name, value in values.items()
        if isinstance(value, int | float)
        and type(value) is not type(getattr(checked, name))
        and (type(value), type(getattr(checked, name))) != (int, float)
    }
    return checked, [
        TombolaError(f"{name} is not valid", got=repr(value), expected=f"a {type(read).__name__}, such as {read!r}")
        for name, (value, read) in adjusted.items()
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
