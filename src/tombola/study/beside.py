"""What Prasanna et al. 2020 measure beside tickets and their scores: attention, and what else their claims lean on.

One function (context, options) → cells and one row of `EXPERIMENTS` each, as in `tombola.study.prasanna2020`.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len
from pydantic import StrictInt

from tombola.study.cells import Cell
from tombola.study.context import Context, Experiment, Nothing, only
from tombola.study.jobs import shared_settings, step_cell
from tombola.study.presets import Rung, preset_values
from tombola.study.steps.attention import (
    AttentionSettings,
    MapInputs,
    MapPreprocess,
    NormMapWeight,
    PatternSplit,
)

# ------------------------------------------------------------------------------------------------------------ attention


class AttentionOptions(Nothing):
    """Which models and maps; an option that is not given is the preset's."""

    weights: Annotated[tuple[Literal["fine_tuned", "pretrained"], ...], Len(1)] = ("fine_tuned", "pretrained")
    map_rows: Annotated[StrictInt, Ge(1)] = 100
    min_tokens: Annotated[StrictInt, Ge(4)] = 16
    norm_map_weight: NormMapWeight | None = None
    map_inputs: MapInputs | None = None
    map_preprocess: MapPreprocess | None = None
    pattern_split: PatternSplit | None = None


def attention(context: Context, options: AttentionOptions) -> list[Cell]:
    """E11, E12, X13: the maps of every head, fine-tuned for each seed and once as pre-trained, and the tickets of those seeds."""
    names = {one.name for one in fields(AttentionSettings)}
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    cells: list[Cell] = []
    for rung, settings in context.on_rungs("s-prune", {"procedure": "joint"}, names - given.keys()):
        asked = AttentionSettings(**own_options(rung, names, given))
        for one in context.find(settings):
            cells += [one.dense, one.search]
            cells += [plan_attention(one.dense, asked, pretrained=which == "pretrained") for which in options.weights]
    return cells


def plan_attention(dense: Cell, asked: AttentionSettings, *, pretrained: bool) -> Cell:
    """The cell of the maps of a dense model, or of the base it comes from: one for all seeds that share rows and base.

    Asks for a classifier of its own only where the one that comes with tombola is not meant.
    """
    settings = shared_settings(dense) | {"attention": asdict(asked)}
    trained = {"map_preprocess": asked.map_preprocess, "pattern_split": asked.pattern_split, "seed": 0}
    taken = {} if asked.as_shipped else {"patterns": step_cell("patterns", {"patterns": trained})}
    if pretrained:
        return step_cell("attention", {name: value for name, value in settings.items() if name != "seeds"}, **taken)
    return step_cell("attention", settings, weights=dense, **taken)


def own_options(rung: Rung, names: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are no settings of a search: as given, else as the rung changes them, else the preset's."""
    changed = {option: value for option, value in rung.values.items() if option in names}
    return preset_values(rung.preset, set(names)) | changed | dict(given)


EXPERIMENTS: Mapping[str, Experiment] = {
    "attention": Experiment(
        "E11, E12: maps of heads classified, raw and norm-weighted, fine-tuned and pre-trained",
        attention, only("s-prune"), AttentionOptions, ("E11", "E12"),
    ),
}  # fmt: skip
