"""Which runs are of one kind: every setting of a cell, flat, and the names of runs of one task that differ in some of them.

Two runs are averaged where they share all settings but seeds, draws and kinds; else they are variants, each with its own name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tombola.study.derived import RULES
from tombola.study.kinds import CONTROL_KINDS
from tombola.study.presets import preset_values
from tombola.tasks import bare_name

if TYPE_CHECKING:
    from tombola.study.cells import Cell


@dataclass(frozen=True, slots=True)
class Variant:
    """Runs of one task with the same settings: what stands behind the name that their rows have as `task`."""

    task: str  # its short name, without settings
    settings: Mapping[str, Any]  # every one, flat: `method`, `procedure`, `epochs`, … and `mask`, the family of its tickets
    differing: Mapping[str, str]  # those in which the variants of this task differ, as they stand in the name


def variants_of(cells: "Mapping[str, Cell]") -> dict[str, dict[str, Variant]]:
    """For each cell the variants of its task that it belongs to, by the text to add to the task's name; "" where there is one.

    Runs with different settings must never be averaged. Tickets of one task that differ in a setting (other than seeds) are
    variants, named by what differs; a dense model, which knows no search, belongs to each variant it has all settings of.
    """
    settings = {key: flat_settings(cell) for key, cell in cells.items()}
    distinct = {repr(sorted(said.items())): said for said in settings.values()}
    named: dict[str, dict[str, Variant]] = {}
    for known, one in distinct.items():
        peers = [said for said in distinct.values() if said["task"] == one["task"]]
        # Those that no other adds to: what a dense model or a search is part of, with all settings that anything below has.
        whole = [said for said in peers if not any(said.items() < other.items() for other in peers)]
        methods = {said.get("method") for said in whole}
        # Within a method: what another method is set to tells nothing that its name does not.
        varying = {
            name
            for method in methods
            for name in {name for said in whole for name in said}
            if len({str(said[name]) for said in whole if said.get("method") == method and name in said}) > 1
        }
        differing = sorted(varying | ({"method"} if len(methods) > 1 else set()))
        mine = [said for said in whole if one.items() <= said.items()] or [one]
        named[known] = {}
        for said in mine:
            # a search to a floor has no sparsity that it could be named by, and what a preset says is said by its name
            by_name = {"sparsity": None} | (
                preset_values(str(said["preset"])) if "preset" in differing and "preset" in said else {}
            )
            own = {
                name: str(said[name])
                for name in differing
                if name in said and (name not in by_name or by_name[name] != said[name])
            }
            text = ", ".join(f"{name}={value}" for name, value in own.items())
            named[known].setdefault(f" ({text})" if text else "", Variant(str(said["task"]), said, own))
    return {key: named[repr(sorted(said.items()))] for key, said in settings.items()}


def flat_settings(cell: "Cell") -> dict[str, Any]:
    """Every setting of a cell and of those it stands on, but seeds, draws and kinds: what two runs must share to be averaged."""
    flat: dict[str, Any] = {}
    for one in cell.needed():
        flat |= _unsaid(one) | bias_of(one)
        for name in ("data", "train", "search", "retrain", "machine"):
            flat |= one.settings.get(name, {})
        if "control" in one.settings:  # what a kind of control sets itself is no variant of it
            own = CONTROL_KINDS[one.settings["kind"]].changes
            flat |= {name: value for name, value in one.settings["control"].items() if name not in own}
        flat |= {name: one.settings[name] for name in ("method", "preset") if name in one.settings}
        if one.step in ("search", "round"):  # said of every mask, so that no derived one is taken for the ticket it comes from
            flat["mask"] = "as found"
        if one.step in ("search", "round", "base_mask"):  # so that a transferred one is not taken for the target's own
            flat["mask_of"] = bare_name(str(flat["task"]))
        if one.step == "base_mask":
            flat["mask"] = "of the base"
        if one.step == "derive":
            flat |= {name: value for name, value in one.settings["options"].items() if name != "draw"}
            flat["mask"] = RULES[one.settings["rule"]].family
        if one.step in ("evaluate", "retrain", "tune"):  # said of all, so that what is scaled is not averaged with what is not
            flat["mask_tuning"] = one.step == "tune"
        if one.step == "fine_tune":  # said of all, likewise
            flat["loss"] = one.settings.get("loss", {}).get("loss", "ce")
            flat["trained_steps"] = one.settings.get("stretch", {}).get("steps", "all")
        if one.step in ("fine_tune", "retrain", "round"):
            flat["report_checkpoint"] = one.settings.get("report_checkpoint", "last")
        if one.step == "search":
            own, learned_on = flat["task"], one.settings.get("learned_on", flat)["task"]
            # not the name of its own task: tasks are compared
            flat["learned_on"] = "its task" if learned_on == own else bare_name(str(learned_on))
        if one.step == "retrain":
            flat["retrain_loss"] = one.settings.get("loss", {}).get("loss", "ce")
            flat["start"] = "base"  # said of all, so that what starts elsewhere is not taken for it
        if "start" in one.settings:
            start = one.inputs["start"]
            flat["start"] = f"{getattr(start, 'step', '')} {start.key[:6]}, {one.settings['start']}"
        if "model" in one.settings:
            flat["model"] = one.settings["model"]["name"] + " " + one.settings["model"]["fingerprint"][:6]
    if elsewhere := _found_elsewhere(cell):
        flat["mask"] = elsewhere
    return {name: value for name, value in flat.items() if name not in ("rows", "counts", "source")}


def bias_of(cell: "Cell") -> dict[str, Any]:
    """What a cell says of a bias-only model and of the loss that uses it, by the names of settings; {} of most."""
    said = {name if name == "bias_model" else f"bias_{name}": value for name, value in cell.settings.get("bias", {}).items()}
    return said | {name: value for name, value in cell.settings.get("loss", {}).items() if name != "loss"}


def _unsaid(cell: "Cell") -> dict[str, Any]:
    """Settings that came later, and that a cell which has their default does not say: a run with another value is a variant."""
    from tombola.search import SEARCHES

    said: dict[str, Any] = {"report_rows": None} if "data" in cell.settings else {}
    if cell.step == "search":
        later = (one for one in fields(SEARCHES[cell.settings["method"]][1]) if one.metadata.get("unsaid"))
        said |= {one.name: one.default for one in later}
    return said


def _found_elsewhere(cell: "Cell") -> str:
    """ "found on TASK" for a cell that tests a ticket on another task than that, of whose tickets it is no seed; else ""."""
    own = cell.settings.get("data", {}).get("task")
    below = [one.settings["data"]["task"] for one in cell.needed() if one.step == "fine_tune" and "ticket" in cell.inputs]
    others = [bare_name(task) for task in below if own is not None and task != own]
    return f"found on {others[-1]}" if others else ""


def how_found(cell: "Cell") -> dict[str, Any]:
    """The fields `search`, `family` and `preset` of the rows of a cell; empty where there is no ticket below it."""
    below = list(cell.needed())
    if cell.step not in ("search", "control", "derive") and "ticket" not in cell.inputs:
        return {"search": "", "family": "", "preset": ""}
    searches = [one for one in below if one.step == "search"]
    families = [RULES[one.settings["rule"]].family for one in below if one.step == "derive"]
    names = dict.fromkeys(_search_name(one.settings) for one in searches)
    presets = dict.fromkeys(str(one.settings["preset"]) for one in searches)
    family = _found_elsewhere(cell) or (families or ["as found"])[-1]
    return {"search": " + ".join(names), "family": family, "preset": " + ".join(presets)}


def _search_name(said: Mapping[str, Any]) -> str:
    """The name an experiment has for a search: "s-prune-heads" for the method s-prune by the procedure heads."""
    procedure = said["search"].get("procedure", "joint")
    return str(said["method"]) if procedure == "joint" else f"{said['method']}-{procedure}"


def epochs_of(cell: "Cell") -> int | None:
    """Of the last training below a cell, itself included."""
    trained = [one.settings["train"]["epochs"] for one in cell.needed() if "train" in one.settings]
    return trained[-1] if trained else None


def short_names(tasks: Iterable[str]) -> dict[str, str]:
    """Each task by its bare name, where no two of these have the same; else all as they are."""
    tasks = set(tasks)
    bare = {task: bare_name(task) for task in tasks}
    return bare if len(set(bare.values())) == len(tasks) else {task: task for task in tasks}
