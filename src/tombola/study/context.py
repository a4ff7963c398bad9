"""What every experiment is asked for, and the searches by the names that experiments have."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from tombola.study.cells import Cell, Lab
from tombola.study.presets import Rung, preset_values
from tombola.study.runs import Found, implied, plan_find
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
    # all tasks of the study by the names it has for them: the task, and the settings that hold for it; of transfer
    tasks: Mapping[str, tuple[str | Task, Mapping[str, Any]]] = field(default_factory=dict)

    def settings(self, method: str, own: Mapping[str, Any] | None = None) -> list[Settings]:
        """The settings of a method, one for each preset or rung that concerns it; `own` are the experiment's, and win.

        Raises: SettingsError with all wrong settings.
        """
        return [settings for _, settings in self.on_rungs(method, own)]

    def on_rungs(
        self, method: str, own: Mapping[str, Any] | None = None, extra: Collection[str] = ()
    ) -> list[tuple[Rung, Settings]]:
        """The same with their rungs. A rung of an option in `extra`, the experiment's own, concerns it too, and is no setting."""
        known, found = options_of(method), []
        asked = {**{n: v for n, v in self.values.items() if n in known}, **(own or {})}
        seeds = {SEED_NAMES[name]: value for name, value in self.values.items() if name in SEED_NAMES}
        for rung in self.presets:
            values = {**implied(self.task, method, {**rung.values, **asked}, rung.preset), **asked}
            single = len(rung.values) == 1
            if single and not (set(rung.values) <= (known - values.keys()) | set(extra)):
                continue  # an option of another method, or one that is set: no rung of its own
            changed = {name: value for name, value in rung.values.items() if name in known}
            found.append((rung, resolve({**changed, **values}, self.seeds, seeds, method=method, preset=rung.preset)))
        return found

    def find(self, settings: Settings, design: str | None = None) -> list[Found]:
        """The cells of a find, one `Found` for each seed; `design` as of `plan_find`."""
        return plan_find(self.lab, self.model, self.task, settings, self.seeds, design=design)


def own_options(rung: Rung, names: Collection[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are no settings of a search: as given, else as the rung changes them, else the preset's."""
    changed = {option: value for option, value in rung.values.items() if option in names}
    return preset_values(rung.preset, set(names)) | changed | dict(given)


class Nothing(BaseModel):
    """An experiment without options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Experiment:
    """One row of `EXPERIMENTS`. `methods(options)` names the methods of search whose settings it takes.

    Of its options `of` are names of `SEARCHED`, `kinds` of `CONTROL_KINDS`: a study checks them.
    """

    about: str
    cells: Callable[[Context, Any], Sequence[Cell]]
    methods: Callable[[Any], Sequence[str]]
    options: type[BaseModel] = Nothing
    rows: tuple[str, ...] = field(default=())  # what papers call it
    fixed: tuple[str, ...] = field(default=())  # settings that its own options set, so that a study may not


# Searches by the names experiments have: method, and the settings that make it this one.
SEARCHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "m-prune": ("m-prune", {}),
    "s-prune": ("s-prune", {"procedure": "joint"}),
    "s-prune-heads": ("s-prune", {"procedure": "heads"}),
    "s-prune-mlps": ("s-prune", {"procedure": "mlps"}),
    "imp": ("imp", {}),
}


def found(name: str, context: Context) -> list[tuple[Settings, Found]]:
    """The finds of a search of `SEARCHED`, of every preset or rung and every seed, with their settings."""
    method, own = SEARCHED[name]
    return [(settings, found) for settings in context.settings(method, own) for found in context.find(settings)]


def methods_of(options: Any) -> list[str]:
    """The methods of an experiment whose option `of` names searches."""
    return [SEARCHED[name][0] for name in options.of if name in SEARCHED]


def only(method: str) -> Callable[[Any], Sequence[str]]:
    """The methods of an experiment that has one, whatever its options."""
    return lambda options: (method,)
