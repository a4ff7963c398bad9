"""Chains over several tasks with one body as cells (X1 of Chen et al. 2020): what each round is.

    dense      of each task the model trained on it alone: what is compared with
    snapshot   body and heads trained together up to the rewind step; none where that is the base itself
    levels     one cell a round: trains the mask of the level before on all tasks, and holds the ticket of its own level
    last       trains and scores the last level

A step adds the losses of one batch of each task. A run is as long as the longest that any of the tasks has alone; the rows of the
others come again. Only the body is pruned: its mask is one for all tasks. What tasks do not have in common is of the first:
learning rate, weight decay, clipping.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tombola.anatomy import read_anatomy
from tombola.errors import SettingsError, TombolaError
from tombola.joint import Joint
from tombola.objective import load_weights
from tombola.scope import scope_parameters
from tombola.search.imp import Round, rounds, settings_for, sparsities
from tombola.study.cells import Cell, Lab
from tombola.study.chains import NO_PART, at_sparsity, cuts_of, plan_chains, reported, train_rows
from tombola.study.data import base_folder, layout_of, task_of
from tombola.study.settings import Settings
from tombola.tasks import Task, bare_name


@dataclass(frozen=True, slots=True)
class JointChain:
    """The cells of one seed of a chain over several tasks; the ticket of level k is that of `levels[k - 1]`."""

    seed: int
    alone: tuple[Cell, ...]  # the dense model of each task
    snapshot: Cell | None
    levels: tuple[Cell, ...]
    last: Cell
    sparsities: tuple[float, ...]  # asked for, of levels 1, 2, …
    plan: tuple[Round, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (*self.alone, *([] if self.snapshot is None else [self.snapshot]), *self.levels, self.last)

    def at(self, sparsity: float) -> Cell:
        """The cell with the ticket of a sparsity. Raises: SettingsError when the chain has no such level."""
        return self.levels[at_sparsity(self.sparsities, sparsity)]


def plan_joint(lab: Lab, model: str, tasks: Sequence[tuple[str | Task, Settings]], run_seeds: Sequence[int]) -> list[JointChain]:
    """The cells of a chain over these tasks for each run seed; the settings of each task are those it has alone.

    Reads the data and, unless all is in the store, the models; computes nothing.
    Raises: as `plan_chains`; SettingsError for fewer than two tasks, one that is named twice, options of the chain that are not
    the same for all, losses other than cross-entropy, and a scope that reaches beyond the body; TombolaError as `Joint`.
    """
    from tombola.study.runs import step_cell

    chains = [plan_chains(lab, model, task, settings, run_seeds) for task, settings in tasks]
    names = [str(of[0].dense.settings["data"]["task"]) for of in chains]
    _check_tasks(names, [settings for _, settings in tasks])
    first = tasks[0][1]
    options = settings_for(first.search, mlm=False)  # faults of the script that prunes on MLM alone
    lengths = [_length(lab, of[0].dense, settings) for of, (_, settings) in zip(chains, tasks, strict=True)]
    longest = max(range(len(tasks)), key=lambda i: lengths[i][1])
    own = tasks[longest][1].train
    plan = rounds(options, rows=lengths[longest][0], batch_size=own.batch_size, epochs=own.epochs, steps=own.steps)
    at, rewind_step = (0.0, *sparsities(options)), plan[0].schedule_from
    said = {name: value for name, value in asdict(options).items() if name not in NO_PART}
    train = {name: value for name, value in first.train.plain().items() if name not in ("epochs", "steps", "batch_size")}
    found = []
    for j, run in enumerate(run_seeds):
        dense = [of[j].dense for of in chains]
        shared: dict[str, Any] = {name: dense[0].settings[name] for name in ("model", "machine", "seeds")} | {"train": train}
        shared["tasks"] = [
            {"data": one.settings["data"], "batch_size": settings.train.batch_size}
            for one, (_, settings) in zip(dense, tasks, strict=True)
        ]
        alone = {f"dense-{i}": one for i, one in enumerate(dense)}
        snapshot = None
        if rewind_step:
            stretch = {"steps": rewind_step, "schedule_steps": plan[0].schedule_steps, "rows_from": 0, "schedule_from": 0}
            snapshot = step_cell("joint_snapshot", shared | {"stretch": stretch}, **alone)
        given = alone if snapshot is None else alone | {"snapshot": snapshot}
        levels: list[Cell] = []
        for one, after in zip(plan, [*plan[1:], None], strict=True):
            described = reported(first) | {"method": "imp", "preset": first.preset} | cuts_of(one, after, at, said)
            inputs = given | ({"ticket": levels[-1]} if levels else {})
            levels.append(step_cell("joint_round", shared | described, **inputs))
        *of_levels, last = levels
        found.append(JointChain(run, tuple(dense), snapshot, tuple(of_levels), last, at[1:], plan))
    if any(lab.store.load(chain.levels[-1].key) is None for chain in found):
        _check_body(lab, found[0], first.search.scope)
    return found


def _check_tasks(names: Sequence[str], settings: Sequence[Settings]) -> None:
    problems = []
    if len(names) < 2 or len({*map(bare_name, names)}) < len(names):
        problems.append(TombolaError("one body is shared by two different tasks or more", got=", ".join(names)))
    said = [
        {name: value for name, value in asdict(one.search).items() if name not in NO_PART} | reported(one) for one in settings
    ]
    differing = sorted({name for one in said for name in {**one, **said[0]} if one.get(name) != said[0].get(name)})
    if differing or len({one.preset for one in settings}) > 1:
        problems.append(
            TombolaError(
                "tasks with one body have one chain, and its options",
                got=f"differing between them: {', '.join(differing) or 'preset'}",
                next="set these for the whole study, not for one task",
            )
        )
    if other := [one.loss.loss for one in settings if one.loss.loss != "ce"]:
        problems.append(TombolaError("tasks with one body are trained by their own losses", got=", ".join(other), expected="ce"))
    if problems:
        raise SettingsError(problems)


def _length(lab: Lab, dense: Cell, settings: Settings) -> tuple[int, int]:
    """(rows or blocks or windows of an epoch, optimizer steps of a full run) of a task alone."""
    data = dense.settings["data"]
    rows = train_rows(lab, dense.settings, task_of(lab, data["task"], data.get("source")).objective)
    return rows, settings.train.steps_of(rows)


def _check_body(lab: Lab, chain: JointChain, scope: str) -> None:
    """Raises: TombolaError where these models have no body in common; SettingsError for a scope that reaches beyond it."""
    model: Mapping[str, Any] = chain.last.settings["model"]
    data = [one.settings["data"] for one in chain.alone]
    known = ("joint", model["fingerprint"], *(one["task"] for one in data), scope)
    if known in lab.cache:
        return
    asked = {one["task"]: task_of(lab, one["task"], one.get("source")).objective for one in data}
    joint = Joint({name: load_weights(base_folder(lab, model), of, head_seed=0) for name, of in asked.items()})
    anatomy = read_anatomy(next(iter(joint.models.values())), layout_of(model))
    beyond = [name for name in scope_parameters(joint, anatomy, scope) if not name.startswith(f"{joint.base_model_prefix}.")]
    if beyond:
        problem = TombolaError(
            "the mask of several tasks is of the body they share", got=f"{scope}: {', '.join(beyond[:4])}", expected="no head"
        )
        raise SettingsError([problem])
    lab.cache[known] = True
