"""What a study can ask for: one function (context, options) → cells, and one row of `EXPERIMENTS` each.

An experiment only describes. Whatever two of them need in common is one cell, since equal descriptions have equal keys:
one dense fine-tune of a task and seed serves them all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt

from tombola.study.cells import Cell, Lab
from tombola.study.jobs import Found, implied, plan_controls, plan_find, plan_ladder, plan_test
from tombola.study.presets import Rung, ladder, preset_values
from tombola.study.settings import Settings, options_of, resolve
from tombola.tasks import Task

SEED_NAMES = {f"{name}_seed": name for name in ("head", "data", "dropout", "mask")}  # set one of the four seeds of a run alone


@dataclass(frozen=True, slots=True)
class Context:
    """What an experiment is asked for: one model, one task, the seeds, presets and settings of the study."""

    lab: Lab
    model: str
    task: str | Task
    seeds: tuple[int, ...]
    presets: tuple[Rung, ...]  # one, or the rungs of a ladder
    values: Mapping[str, Any]  # settings by name, of every method of the study; those of the task included

    def settings(self, method: str, own: Mapping[str, Any] | None = None) -> list[Settings]:
        """The settings of a method, one for each preset or rung that concerns it; `own` are the experiment's, and win.

        Raises: SettingsError with all wrong settings.
        """
        known, found = options_of(method), []
        values = {**implied(self.task, method), **{n: v for n, v in self.values.items() if n in known}, **(own or {})}
        seeds = {SEED_NAMES[name]: value for name, value in self.values.items() if name in SEED_NAMES}
        for rung in self.presets:
            single = len(rung.values) == 1
            if single and not (set(rung.values) <= known - values.keys()):
                continue  # an option of another method, or one that is set: no rung of its own
            found.append(resolve({**rung.values, **values}, self.seeds, seeds, method=method, preset=rung.preset))
        return found

    def find(self, settings: Settings) -> list[Found]:
        """The cells of a find, one `Found` for each seed."""
        return plan_find(self.lab, self.model, self.task, settings, self.seeds)


class Nothing(BaseModel):
    """An experiment without options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


@dataclass(frozen=True, slots=True)
class Experiment:
    """One row of `EXPERIMENTS`. `methods(options)` names the methods of search whose settings it takes."""

    about: str
    cells: Callable[[Context, Any], Sequence[Cell]]
    methods: Callable[[Any], Sequence[str]]
    options: type[BaseModel] = Nothing
    rows: tuple[str, ...] = field(default=())  # what papers call it


# Searches by the names experiments have: method, and the settings that make it this one.
SEARCHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "m-prune": ("m-prune", {}),
    "s-prune": ("s-prune", {"procedure": "joint"}),
    "s-prune-heads": ("s-prune", {"procedure": "heads"}),
    "s-prune-mlps": ("s-prune", {"procedure": "mlps"}),
}


def _found(name: str, context: Context) -> list[tuple[Settings, Found]]:
    method, own = SEARCHED[name]
    return [(settings, found) for settings in context.settings(method, own) for found in context.find(settings)]


def _search(name: str) -> Callable[[Context, Any], Sequence[Cell]]:
    return lambda context, options: [cell for _, found in _found(name, context) for cell in found.cells]


def controls(context: Context, options: ControlsOptions) -> list[Cell]:
    """Every good ticket and its controls, pruned and, when asked for, retrained."""
    tested = []
    for name in options.of:
        for settings, found in _found(name, context):
            tested.append(plan_test(found.search, found.dense, settings.retrain, retrain=options.retrain))
            tested += plan_controls(found.search, found.dense, options.kinds, options.draws, settings, retrain=options.retrain)
    return [cell for one in tested for cell in one.cells]


def ladders(context: Context, options: LadderOptions) -> list[Cell]:
    """Every rung of a ladder between two presets."""
    cells = []
    seeds = {SEED_NAMES[name]: value for name, value in context.values.items() if name in SEED_NAMES}
    for name in options.of:
        method, own = SEARCHED[name]
        known = options_of(method)
        values = {**implied(context.task, method), **{n: v for n, v in context.values.items() if n in known}, **own}
        rungs = plan_ladder(
            context.lab, context.model, context.task, options.presets, values, context.seeds, seeds,
            method=method, kinds=options.kinds, draws=options.draws, retrain=options.retrain,
        )  # fmt: skip
        cells += [cell for rung in rungs for cell in rung.cells]
    return cells


def _methods_of(options: Any) -> list[str]:
    return [SEARCHED[name][0] for name in options.of if name in SEARCHED]


def _only(method: str) -> Callable[[Any], Sequence[str]]:
    return lambda options: (method,)


# name → experiment. A paper's own are added by its file, as rows of this table.
EXPERIMENTS: Mapping[str, Experiment] = {
    "m-prune": Experiment("single values, to the floor", _search("m-prune"), _only("m-prune"), rows=("E1",)),
    "s-prune": Experiment("heads and MLPs, to the floor", _search("s-prune"), _only("s-prune"), rows=("E2",)),
    "s-prune-heads": Experiment("heads only, to the floor", _search("s-prune-heads"), _only("s-prune"), rows=("E3",)),
    "s-prune-mlps": Experiment("MLPs only, to the floor", _search("s-prune-mlps"), _only("s-prune"), rows=("E4",)),
    "controls": Experiment("tickets against controls, pruned and retrained", controls, _methods_of, ControlsOptions, ("E5",)),
    "ladder": Experiment("what each option costs between two presets", ladders, _methods_of, LadderOptions),
}


def rungs_of(preset: str, text: str | None) -> tuple[Rung, ...]:
    """The presets a study runs under: one, or the rungs of the ladder "A:B". Raises: SettingsError for unknown ones."""
    if text is not None:
        return tuple(ladder(text))
    preset_values(preset, set())
    return (Rung(preset, preset, {}),)
