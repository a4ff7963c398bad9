"""Score against latency and size: what was measured of a model and task, which ticket a target picks, and where it is kept.

The last measurement of the same cells stands in <store>/frontiers/<fingerprint>.json, for the page; `frontier_cells` makes it.
"""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tombola.canonical import fingerprint
from tombola.errors import TombolaError
from tombola.stats import Band, Estimate
from tombola.store import Store
from tombola.study.cells import read_json

FOLDER, FORMAT = "frontiers", 1


@dataclass(frozen=True, slots=True)
class Point:
    """The tickets of one goal, one a seed; the dense model is the point of goal "dense".

    Size and time are those of the first seed's ticket. Scores are on the rows that are reported, means over seeds (and draws)
    with an interval over rows.
    """

    goal: str  # as in "joint, floor 0.9"
    cells: tuple[str, ...]  # of the searches, seed by seed; of the dense models
    sparsity: float
    score: Estimate
    n: int  # rows
    random: Estimate | None  # the same of random controls, each of the size of its ticket
    parameters: int
    flops: int  # of a forward pass
    seconds: Band  # of the same
    against_dense: Band
    noise: float
    dominated: bool = False  # another one scores as much, is as fast and as small, and better in one of them

    @property
    def value(self) -> float:
        """The score, a number for every point: see `measure_frontier`."""
        assert self.score.value is not None
        return self.score.value


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points of one model and task, the dense model first."""

    model: str
    task: str
    metric: str
    seeds: tuple[int, ...]
    stage: str  # of the tickets that are scored: "pruned", "tuned" or "retrained"
    batch: int
    length: int
    threads: int
    points: tuple[Point, ...]

    def pick(self, target: str) -> Point:
        """The point for a target: "50 ms" (the best score within it) or "1 point" (the fastest that loses no more).

        Raises: TombolaError for another target, or when no point meets it, naming the nearest.
        """
        (limit, unit), dense = read_target(target), self.points[0]
        if unit == "ms":
            met = [one for one in self.points if 1e3 * one.seconds.median <= limit]
            nearest = min(self.points, key=lambda one: one.seconds.median)
            best = max(met, key=lambda one: (one.value, -one.seconds.median), default=None)
        else:
            met = [one for one in self.points[1:] if 100 * (dense.value - one.value) <= limit + 1e-9]
            nearest = max(self.points[1:], key=lambda one: one.value)
            best = min(met, key=lambda one: (one.seconds.median, -one.value), default=None)
        if best is None:
            raise TombolaError(
                f"no ticket meets {target}",
                got=f"nearest: {nearest.goal}, {1e3 * nearest.seconds.median:.1f} ms, "
                f"{100 * (dense.value - nearest.value):.1f} points lost",
                next="search at other floors or sparsities (--floors, --sparsities), or take another target",
            )
        return best

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> "Frontier":
        """What `as_json` was called on."""

        def point(one: Mapping[str, Any]) -> Point:
            random = None if one["random"] is None else Estimate(**one["random"])
            bands = {name: Band(**one[name]) for name in ("seconds", "against_dense")}
            return Point(**{**one, **bands, "cells": tuple(one["cells"]), "score": Estimate(**one["score"]), "random": random})

        return Frontier(**{**said, "seeds": tuple(said["seeds"]), "points": tuple(map(point, said["points"]))})


def read_target(text: str) -> tuple[float, str]:
    """What a target asks for: a number, and "ms" or "points". Raises: TombolaError for what is no target."""
    said = re.fullmatch(r"(?:≤|<=|<)?\s*(\d+(?:\.\d+)?)\s*(?:(ms)|points?(?: lost)?)", text.strip())
    if said is None:
        raise TombolaError("this is no target", got=text, expected='"50 ms" or "1 point", as in "≤ 50 ms", "≤ 1 point lost"')
    return float(said[1]), "ms" if said[2] else "points"


def mark_dominated(points: Sequence[Point]) -> list[Point]:
    """The points, those that another one beats in score, time or size, and is at least as good in the rest, marked."""

    def beats(a: Point, b: Point) -> bool:
        better = (a.value - b.value, b.seconds.median - a.seconds.median, b.parameters - a.parameters)
        return min(better) >= 0 and max(better) > 0

    return [replace(one, dominated=any(beats(other, one) for other in points)) for one in points]


# -------------------------------------------------------------------------------------------------------------- on disk


def keep_frontier(store: Store, found: Frontier) -> None:
    """Writes a measured frontier, in place of an earlier measurement of the same cells at the same shape."""
    of = [[one.cells for one in found.points], found.stage, found.batch, found.length, found.threads]
    file = store.root / FOLDER / f"{fingerprint(of)}.json"
    file.parent.mkdir(exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(json.dumps({"format": FORMAT} | found.as_json(), indent=1) + "\n", encoding="utf-8")
    draft.replace(file)


def read_frontiers(store: Store, keys: Collection[str] | None = None) -> list[Frontier]:
    """The frontiers that were measured on a store, in the order of their names; `keys`: those of these cells alone."""
    found = []
    for file in sorted((store.root / FOLDER).glob("*.json")):
        said = read_json(file)
        if said.pop("format") == FORMAT:
            one = Frontier.from_json(said)
            if keys is None or all(set(point.cells) <= set(keys) for point in one.points):
                found.append(one)
    return sorted(found, key=lambda one: (one.task, one.model, one.batch, one.length))
