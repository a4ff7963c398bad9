"""The cells of a frontier, and the measuring of what they found: tickets of several procedures, to floors or sparsities, shrunk
and timed, with random controls.

What is searched, trained, scored and drawn are cells of the store, like any find; what is timed is measured anew each time, here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from tombola.anatomy import read_anatomy
from tombola.cut import prove_same, shrink
from tombola.errors import MaskError, SettingsError, TombolaError
from tombola.evaluate import over_rows
from tombola.objective import load_weights
from tombola.stats import Estimate
from tombola.study.cells import Cell, Lab
from tombola.study.data import layout_of
from tombola.study.frontier import Frontier, Point, keep_frontier, mark_dominated
from tombola.study.runs import Found, Tested, implied, plan_controls, plan_find, plan_retrain, plan_tuned
from tombola.study.settings import resolve
from tombola.study.steps.shared import read_predictions, ticket_of
from tombola.study.verdicts import score_of
from tombola.tasks import Task
from tombola.timing import bench_models, runner_of

PROCEDURES = ("joint", "heads+neurons", "layers")
FLOORS = (0.95, 0.9, 0.8, 0.6)


@dataclass(frozen=True, slots=True)
class Goal:
    """How far a search goes: to a floor of the score, or down to a sparsity."""

    procedure: str
    floor: float | None = None
    sparsity: float | None = None

    def __str__(self) -> str:
        """As in "joint, floor 0.9" and "neurons, to 50 %"."""
        to = f"floor {self.floor:g}" if self.sparsity is None else f"to {100 * self.sparsity:.3g} %"
        return f"{self.procedure}, {to}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the frontier sets."""
        return {"procedure": self.procedure} | ({"floor": self.floor} if self.sparsity is None else {"sparsity": self.sparsity})


@dataclass(frozen=True, slots=True)
class Planned:
    """The cells of one ticket of a frontier: the search, its random controls, and the cells whose scores count."""

    goal: Goal
    found: Found
    scored: Cell
    controls: tuple[Tested, ...]
    random: tuple[Cell, ...]  # what is scored of each control

    @property
    def cells(self) -> list[Cell]:
        controls = [cell for one in self.controls for cell in one.cells]
        return [*self.found.cells, self.scored, *controls, *self.random]


def plan_frontier(
    lab: Lab,
    model: str,
    task: str | Task,
    values: dict[str, Any],
    seeds: Sequence[int] = (0,),
    procedures: Sequence[str] = PROCEDURES,
    floors: Sequence[float] = FLOORS,
    sparsities: Sequence[float] = (),
    draws: int = 2,
    retrain: bool = False,
    tune: bool = False,
    own_seeds: Mapping[str, int] | None = None,
) -> list[Planned]:
    """The cells of every procedure to every floor and sparsity, for each run seed on one dense model; goal by goal.

    retrain: tickets and controls are trained again from the base, as `tombola retrain TICKET` does, and that score counts.
    tune: what they keep is scaled instead (`tombola.tuned`), and that score counts.
    Raises: SettingsError, as `resolve`; nothing runs.
    """
    goals = [Goal(one, floor=floor) for one in procedures for floor in floors]
    goals += [Goal(one, sparsity=share) for one in procedures for share in sparsities]
    wrong = [] if goals else [TombolaError("nothing is asked for", got=f"{len(procedures)} × {len(floors) + len(sparsities)}")]
    wrong += [TombolaError("asked for twice", got=list(x)) for x in (procedures, floors, sparsities) if len(set(x)) < len(x)]
    if retrain and tune:
        wrong.append(TombolaError("what is trained again is not tuned", got="both", expected="one of the two"))
    wrong += [
        TombolaError(f"{name} is set by the frontier itself", got=values[name], next=f"use --{several}")
        for name, several in (("procedure", "procedures"), ("floor", "floors"), ("sparsity", "sparsities"))
        if name in values
    ]
    if wrong:
        raise SettingsError(wrong)
    planned = []
    for goal in goals:
        settings = resolve({**implied(task, "s-prune"), **values, **goal.settings}, seeds, own_seeds, method="s-prune")
        for found in plan_find(lab, model, task, settings, seeds):
            drawn = plan_controls(found.search, found.dense, ("random",), draws, settings, retrain=retrain) if draws else []
            if retrain:
                scored = plan_retrain(found.search, found.dense, settings.retrain, keep_weights=True)
                random = tuple(one.retrained for one in drawn if one.retrained is not None)
            elif tune:
                scored = plan_tuned(found.search, found.dense)
                random = tuple(plan_tuned(one.ticket, found.dense) for one in drawn)
            else:
                scored, random = found.pruned, tuple(one.pruned for one in drawn)
            planned.append(Planned(goal, found, scored, tuple(drawn), random))
    return planned


def measure_frontier(lab: Lab, planned: Sequence[Planned], batch: int = 8, length: int = 128, rounds: int = 9) -> Frontier:
    """Shrinks and times the tickets of finished cells, in turns, and keeps what was found in the store for its page.

    Raises: TombolaError when the task's score is no share, or its model cannot be shrunk.
    """
    by_goal = [list(of) for _, of in groupby(planned, key=lambda one: one.goal)]
    dense = [one.found.dense for one in by_goal[0]]
    first = score_of(lab, dense[0])
    if first.metric == "perplexity":
        raise TombolaError(
            "a frontier is of scores in points",
            got="perplexity",
            expected="a task with classes or values",
            next="take another task",
        )
    runners, sparsities = _runners(lab, [of[0] for of in by_goal])
    timed = {one.model: one for one in bench_models(runners, ((batch, length),), rounds).timings}

    def point(key: str, cells: Sequence[Cell], score: Estimate, random: Estimate | None) -> Point:
        t = timed[key]
        sizes = sparsities[key], score, first.n, random, runners[key].parameters
        return Point(key, tuple(cell.key for cell in cells), *sizes, t.flops, t.seconds, t.against_dense, t.noise)

    points = [point("dense", dense, _reported(lab, dense, first.metric), None)]
    for of in by_goal:
        drawn = [each for one in of for each in one.random]
        random = _reported(lab, drawn, first.metric) if drawn else None
        scored = _reported(lab, [one.scored for one in of], first.metric)
        points.append(point(str(of[0].goal), [one.found.search for one in of], scored, random))
    settings = dense[0].settings
    found = Frontier(
        model=str(settings["model"]["name"]),
        task=str(settings["data"]["task"]),
        metric=first.metric,
        seeds=tuple(one.found.seed for one in by_goal[0]),
        stage={"retrain": "retrained", "tune": "tuned"}.get(planned[0].scored.step, "pruned"),
        batch=batch,
        length=length,
        threads=torch.get_num_threads(),
        points=tuple(mark_dominated(points)),
    )
    keep_frontier(lab.store, found)
    return found


def _runners(lab: Lab, planned: Sequence[Planned]) -> tuple[dict[str, Any], dict[str, float]]:
    """By goal what is timed, the dense model first, and the sparsity of its ticket.

    Raises: TombolaError when it cannot be cut.
    """
    dense, tickets = planned[0].found.dense, [ticket_of(lab, one.found.search) for one in planned]
    model = load_weights(lab.folder(dense) / "weights", tickets[0].objective, head_seed=0)
    anatomy = read_anatomy(model, layout_of(dense.settings["model"]))
    runners, sparsities = {"dense": runner_of("dense", model)}, {"dense": 0.0}
    for one, ticket in zip(planned, tickets, strict=True):
        try:
            small = shrink(model, ticket.mask, anatomy, groups="fill", share=True)
            prove_same(model, anatomy, ticket.mask, small)
        except MaskError as error:
            name = dense.settings["model"]["name"]
            raise TombolaError(
                f"the tickets of {name} cannot be shrunk, so that there is nothing to time", got=error.what
            ) from error
        runners[str(one.goal)], sparsities[str(one.goal)] = runner_of(str(one.goal), small), ticket.sparsity
    return runners, sparsities


def _reported(lab: Lab, cells: Sequence[Cell], metric: str) -> Estimate:
    return over_rows([read_predictions(lab.folder(cell))["report"] for cell in cells], metric)
