"""Score against latency and size: tickets of several procedures and floors, shrunk and timed, with random controls beside.

What is searched, scored and drawn are cells of the store, like any find; what is timed is measured anew each time, here.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

from tombola.anatomy import read_anatomy
from tombola.cut import prove_same, shrink
from tombola.errors import MaskError, SettingsError, TombolaError
from tombola.objective import load_weights
from tombola.study.cells import Cell, Lab, read_rows
from tombola.study.data import layout_of
from tombola.study.jobs import found_ticket
from tombola.study.runs import Found, Tested, implied, plan_controls, plan_find, plan_retrain
from tombola.study.settings import resolve
from tombola.tasks import Task
from tombola.timing import Band, bench_models, runner_of

PROCEDURES = ("joint", "neurons", "layers")
FLOORS = (0.95, 0.9, 0.8, 0.6)


@dataclass(frozen=True, slots=True)
class Point:
    """One ticket, shrunk; the dense model is the point of procedure "dense"."""

    procedure: str
    floor: float
    cell: str  # of the search
    sparsity: float
    score: float
    n: int
    random: float | None  # mean score of its random controls, of the same size
    parameters: int
    flops: int
    seconds: Band  # of a forward pass
    against_dense: Band
    noise: float
    dominated: bool = False  # another one scores as much, is as fast and as small, and better in one of them


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points of one model and task, the dense model first."""

    model: str
    task: str
    metric: str
    batch: int
    length: int
    points: tuple[Point, ...]

    def pick(self, target: str) -> Point:
        """The point for a target: "50 ms" (the best score within it) or "1 point" (the fastest that loses no more).

        Raises: TombolaError for another target, or when no point meets it, naming the nearest.
        """
        said = re.fullmatch(r"(?:≤|<=|<)?\s*(\d+(?:\.\d+)?)\s*(ms|points?)(?: lost)?", target.strip())
        if said is None:
            raise TombolaError(
                "this is no target", got=target, expected='"50 ms" or "1 point", as in "≤ 50 ms", "≤ 1 point lost"'
            )
        limit, dense = float(said[1]), self.points[0]
        if said[2] == "ms":
            met = [one for one in self.points if 1e3 * one.seconds.median <= limit]
            nearest = min(self.points, key=lambda one: one.seconds.median)
            best = max(met, key=lambda one: (one.score, -one.seconds.median), default=None)
        else:
            met = [one for one in self.points[1:] if 100 * (dense.score - one.score) <= limit + 1e-9]
            nearest = max(self.points[1:], key=lambda one: one.score)
            best = min(met, key=lambda one: (one.seconds.median, -one.score), default=None)
        if best is None:
            raise TombolaError(
                f"no ticket meets {target}",
                got=f"nearest: {nearest.procedure} at floor {nearest.floor:g}, {1e3 * nearest.seconds.median:.1f} ms, "
                f"{100 * (dense.score - nearest.score):.1f} points lost",
                next="search at other floors (--floors), or take another target",
            )
        return best

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


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
    """The cells of one ticket of a frontier: the search with its scores, the training again, and its random controls."""

    goal: Goal
    found: Found
    retrained: Cell | None
    controls: tuple[Tested, ...]

    @property
    def scored(self) -> Cell:
        """The cell whose score counts: trained again, where that was asked for."""
        return self.retrained or self.found.pruned

    @property
    def cells(self) -> list[Cell]:
        again = [] if self.retrained is None else [self.retrained]
        return [*self.found.cells, *again, *(cell for one in self.controls for cell in one.cells)]


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
) -> list[Planned]:
    """The cells of every procedure to every floor and sparsity, for each run seed on one dense model; goal by goal.

    retrain: tickets and controls are trained again from the base, as `tombola retrain TICKET` does, and that score counts.
    Raises: SettingsError, as `resolve`; nothing runs.
    """
    goals = [Goal(one, floor=floor) for one in procedures for floor in floors]
    goals += [Goal(one, sparsity=share) for one in procedures for share in sparsities]
    wrong = [] if goals else [TombolaError("nothing is asked for", got=f"{len(procedures)} × {len(floors) + len(sparsities)}")]
    wrong += [TombolaError("asked for twice", got=list(x)) for x in (procedures, floors, sparsities) if len(set(x)) < len(x)]
    wrong += [
        TombolaError(f"{name} is set by the frontier itself", got=values[name], next=f"use --{several}")
        for name, several in (("procedure", "procedures"), ("floor", "floors"), ("sparsity", "sparsities"))
        if name in values
    ]
    if wrong:
        raise SettingsError(wrong)
    planned = []
    for goal in goals:
        settings = resolve({**implied(task, "s-prune"), **values, **goal.settings}, seeds, method="s-prune")
        for found in plan_find(lab, model, task, settings, seeds):
            again = plan_retrain(found.search, found.dense, settings.retrain, keep_weights=True) if retrain else None
            drawn = plan_controls(found.search, found.dense, ("random",), draws, settings, retrain=retrain) if draws else []
            planned.append(Planned(goal, found, again, tuple(drawn)))
    return planned


def measure_frontier(lab: Lab, planned: Sequence[Planned], batch: int = 8, length: int = 128, rounds: int = 9) -> Frontier:
    """Shrinks and times the tickets of finished cells, in turns. Raises: DataError when the task's score is no share."""
    dense_cell = planned[0].found.dense
    name, first = str(dense_cell.settings["model"]["name"]), _reported(lab, dense_cell)
    if first["metric"] == "perplexity":
        raise TombolaError(
            "a frontier is of scores in points",
            got="perplexity",
            expected="a task with classes or values",
            next="take another task",
        )
    runners, sizes = {}, {}
    model: Any = None
    for i, one in enumerate(planned):
        ticket = found_ticket(lab, one.found)
        if model is None:
            model = load_weights(lab.folder(dense_cell) / "weights", ticket.objective, head_seed=0)
            anatomy = read_anatomy(model, layout_of(dense_cell.settings["model"]))
            runners["dense"] = runner_of("dense", model)
        try:
            small = shrink(model, ticket.mask, anatomy, groups="fill", share=True)
            prove_same(model, anatomy, ticket.mask, small)
        except MaskError as error:
            raise TombolaError(
                f"the tickets of {name} cannot be shrunk, so that there is nothing to time", got=error.what
            ) from error
        runners[str(i)] = runner_of(str(i), small)
        sizes[str(i)] = ticket.sparsity
    timed = {one.model: one for one in bench_models(runners, ((batch, length),), rounds).timings}
    points = [_point("dense", 1.0, dense_cell, 0.0, first, None, runners["dense"].parameters, timed["dense"])]
    for i, one in enumerate(planned):
        of_random = [_reported(lab, each.pruned)["value"] for each in one.controls if isinstance(each.pruned, Cell)]
        scored, found = _reported(lab, one.found.pruned), one.found.search
        random = mean(of_random) if of_random else None
        key = str(i)
        points.append(_point(one.procedure, one.floor, found, sizes[key], scored, random, runners[key].parameters, timed[key]))
    said = str(dense_cell.settings["data"]["task"])
    return Frontier(name, said, str(first["metric"]), batch, length, tuple(mark_dominated(points)))


def _point(procedure: str, floor: float, cell: Cell, sparsity: float, scored: Any, random: float | None, n: int, t: Any) -> Point:
    return Point(
        procedure, floor, cell.key, sparsity, float(scored["value"]), int(scored["n"]), random, n, t.flops, t.seconds,
        t.against_dense, t.noise,
    )  # fmt: skip


def mark_dominated(points: Sequence[Point]) -> list[Point]:
    """The points, those that another one beats in score, time or size, and is at least as good in the rest, marked."""

    def beats(a: Point, b: Point) -> bool:
        better = (a.score - b.score, b.seconds.median - a.seconds.median, b.parameters - a.parameters)
        return min(better) >= 0 and max(better) > 0

    return [replace(one, dominated=any(beats(other, one) for other in points)) for one in points]


def _reported(lab: Lab, cell: Cell) -> dict[str, Any]:
    """The first score of a cell on the rows that are reported."""
    rows = read_rows(lab.folder(cell) / "scores.jsonl")
    return next(row for row in rows if row["role"] == "report")
