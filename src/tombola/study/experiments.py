"""What a study can ask for: one function (context, options) → cells, and one row of `EXPERIMENTS` each.

An experiment only describes. Whatever two of them need in common is one cell, since equal descriptions have equal keys:
one dense fine-tune of a task and seed serves them all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import StrictBool, StrictInt

from tombola.study import chen2020, liu2022, prasanna2020
from tombola.study.cells import Cell
from tombola.study.context import SEARCHED, SEED_NAMES, Context, Experiment, Nothing, found, methods_of, only
from tombola.study.presets import Rung, ladder, preset_values
from tombola.study.runs import plan_controls, plan_ladder, plan_test
from tombola.study.settings import options_of


class ControlsOptions(Nothing):
    """Which tickets are tested against which controls."""

    of: tuple[str, ...] = ("s-prune",)  # searches of SEARCHED
    kinds: tuple[str, ...] = ("random", "bad")  # of `tombola.study.kinds.CONTROL_KINDS`
    draws: Annotated[StrictInt, Ge(1)] = 1
    retrain: StrictBool = True  # also train tickets and controls from the base


class LadderOptions(Nothing):
    """A ladder between two presets, whatever preset the study has otherwise."""

    presets: str = "released:corrected"
    of: tuple[str, ...] = ("s-prune",)
    kinds: tuple[str, ...] = ()
    draws: Annotated[StrictInt, Ge(1)] = 1
    retrain: StrictBool = False


def _search(name: str) -> Callable[[Context, Any], Sequence[Cell]]:
    return lambda context, options: [cell for _, one in found(name, context) for cell in one.cells]


def controls(context: Context, options: ControlsOptions) -> list[Cell]:
    """Every good ticket and its controls, pruned and, when asked for, retrained."""
    tested = []
    for name in options.of:
        for settings, one in found(name, context):
            tested.append(plan_test(one.search, one.dense, settings.retrain, retrain=options.retrain))
            tested += plan_controls(one.search, one.dense, options.kinds, options.draws, settings, retrain=options.retrain)
    return [cell for one in tested for cell in one.cells]


def ladders(context: Context, options: LadderOptions) -> list[Cell]:
    """Every rung of a ladder between two presets."""
    cells = []
    seeds = {SEED_NAMES[name]: value for name, value in context.values.items() if name in SEED_NAMES}
    for name in options.of:
        method, own = SEARCHED[name]
        known = options_of(method)
        values = {**{n: v for n, v in context.values.items() if n in known}, **own}
        rungs = plan_ladder(
            context.lab, context.model, context.task, options.presets, values, context.seeds, seeds,
            method=method, kinds=options.kinds, draws=options.draws, retrain=options.retrain,
        )  # fmt: skip
        cells += [cell for rung in rungs for cell in rung.cells]
    return cells


# name → experiment. What is a paper's own is written in its file, and has its row here.
EXPERIMENTS: Mapping[str, Experiment] = {
    "m-prune": Experiment("single values, to the floor", _search("m-prune"), only("m-prune"), rows=("E1",)),
    "s-prune": Experiment("heads and MLPs, to the floor", _search("s-prune"), only("s-prune"), rows=("E2",)),
    "s-prune-heads": Experiment("heads only, to the floor", _search("s-prune-heads"), only("s-prune"), rows=("E3",)),
    "s-prune-mlps": Experiment("MLPs only, to the floor", _search("s-prune-mlps"), only("s-prune"), rows=("E4",)),
    "controls": Experiment("tickets against controls, pruned and retrained", controls, methods_of, ControlsOptions, ("E5",)),
    **prasanna2020.EXPERIMENTS,
    **chen2020.EXPERIMENTS,
    **liu2022.EXPERIMENTS,
    "ladder": Experiment("what each option costs between two presets", ladders, methods_of, LadderOptions),
}


def rungs_of(preset: str, text: str | None) -> tuple[Rung, ...]:
    """The presets a study runs under: one, or the rungs of the ladder "A:B". Raises: SettingsError for unknown ones."""
    if text is not None:
        return tuple(ladder(text))
    preset_values(preset, set())
    return (Rung(preset, preset, {}),)
