"""When mask training can begin: what can be seen at a point of fine-tuning, a rule on that, and what the rule would cost.

A probe looks at a point of fine-tuning without training a mask to its end. `Curve` is a finished start-point experiment of one
task and seed, with the probes of all its points; `leave_one_out` asks of each task what a rule, fitted on all others, would have
lost and saved there. Source: ours, after an open question of Liu et al. 2022; of its probes the barrier on the way to a short
continuation is not here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tombola.canonical import fingerprint
from tombola.errors import DataError
from tombola.prune import prune
from tombola.study.cells import Cell, read_json
from tombola.study.robust_rows import RobustRow

MOST_REGRET = 0.005  # of the score: what a rule may lose on the tasks it is fitted on
FIXED = (0.0, 0.55, 1.0)  # shares of fine-tuning that need no rule
PILOT = 0.15  # share of the steps of a mask after which its loss is read

# probe → what it says of a point of fine-tuning; those of two points are of a point and the one before it
PROBES: Mapping[str, str] = {
    "mask_overlap": "Jaccard of the masks that two points would start from",
    "update_overlap": "share of scores that the first step of mask training moves the same way at two points",
    "dev_slope": "fall of the loss on selection rows since the point before, per whole fine-tuning",
    "bias_gap": "loss on train rows that the bias gets wrong minus loss on those it gets right",
    "pilot": f"loss of the mask after {PILOT:.0%} of its own training",
}


def mask_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor], sparsity: float) -> float:
    """Jaccard, in [0, 1], of what two sets of weights keep when the smallest values of each matrix are removed.

    Raises: as `jaccard` and `prune`.
    """
    return jaccard(*(prune({name: x.abs() for name, x in one.items()}, sparsity, granularity="per_matrix") for one in (a, b)))


def jaccard(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Jaccard, in [0, 1], of what two masks keep. Raises: DataError when they are of no parameters, or of others."""
    if not a or a.keys() != b.keys():
        raise DataError("two points of fine-tuning have other parameters", got=f"{len(a)} and {len(b)}", expected="the same")
    both = sum(int(torch.count_nonzero(a[name] & b[name])) for name in a)
    either = sum(int(torch.count_nonzero(a[name] | b[name])) for name in a)
    return both / either


def update_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Share, in [0, 1], of scores that a first step of descent moves to the same side, of two sets of their gradients W · g.

    A gradient of 0 moves to neither, and agrees with another 0 alone. Raises: DataError when they have no scores, or others.
    """
    if not a or a.keys() != b.keys():
        raise DataError("two points of fine-tuning have other scores", got=f"{len(a)} and {len(b)}", expected="the same")
    same = sum(int((a[name].sign() == b[name].sign()).sum()) for name in a)
    return same / sum(one.numel() for one in a.values())


def slope(shares: Sequence[float], losses: Sequence[float]) -> tuple[float | None, ...]:
    """How fast a loss falls from each point to the next, per whole fine-tuning; of the first point nothing."""
    pairs = zip(zip(shares, losses, strict=True), list(zip(shares, losses, strict=True))[1:], strict=False)
    return (None, *((before - after) / (at - was) for (was, before), (at, after) in pairs))


def pilot_loss(losses: Sequence[tuple[int, float]], share: float = PILOT) -> float | None:
    """The mean loss that a run has logged last before this share of its steps, or first after it; None of a run without a log."""
    early = [loss for step, loss in losses if step <= share * losses[-1][0]]
    return early[-1] if early else losses[0][1] if losses else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Masks of one task and seed that began after rising shares of fine-tuning, the last one 1."""

    task: str
    shares: tuple[float, ...]
    scores: tuple[float, ...]  # on challenge rows, higher is better
    steps: tuple[int, ...]  # of the optimizer, fine-tuning and mask together
    probes: Mapping[str, tuple[float | None, ...]]  # of PROBES → its value at each point; None where it has none
    seed: int = 0

    def __post_init__(self) -> None:
        lengths = {len(self.shares), len(self.scores), len(self.steps), *map(len, self.probes.values())}
        if len(lengths) > 1 or list(self.shares) != sorted(set(self.shares)) or self.shares[-1] != 1.0:
            raise DataError(
                "a curve of start points does not fit together", got=f"shares {self.shares}", expected="rising, up to 1"
            )

    @property
    def best(self) -> float:
        """The earliest share that loses no more than `MOST_REGRET` against the end."""
        return next(
            share for share, score in zip(self.shares, self.scores, strict=True) if score >= self.scores[-1] - MOST_REGRET
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """Begin at the first point at which a probe has been on one side of a threshold so many times in a row."""

    probe: str
    threshold: float
    above: bool  # whether at or above it, or at or below
    times: int = 1


def begins_at(curve: Curve, rule: Rule) -> float:
    """The share of fine-tuning at which the rule begins; 1 where it never does. A point without a value ends a row of them."""
    row = 0
    for share, value in zip(curve.shares, curve.probes[rule.probe], strict=True):
        met = value is not None and (value >= rule.threshold if rule.above else value <= rule.threshold)
        row = row + 1 if met else 0
        if row == rule.times:
            return share
    return 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What beginning at a share has lost and saved, beside beginning at the end."""

    share: float  # that was measured, the nearest
    regret: float  # score of a mask begun at the end − score of this one; below 0 it is better
    saved: float  # share of all steps; those that probes take are not counted


def cost_of(curve: Curve, share: float) -> Cost:
    """The cost of the measured start point nearest to `share`; of two as near the later."""
    at = min(range(len(curve.shares)), key=lambda i: (abs(curve.shares[i] - share), -curve.shares[i]))
    return Cost(curve.shares[at], curve.scores[-1] - curve.scores[at], 1 - curve.steps[at] / curve.steps[-1])


def mean_cost(costs: Sequence[Cost]) -> Cost:
    """The means of several costs; of all points of one curve: what beginning at a point that was drawn would cost."""
    return Cost(fmean(one.share for one in costs), fmean(one.regret for one in costs), fmean(one.saved for one in costs))


@dataclass(frozen=True, slots=True)
class Held:
    """A curve of a task that a rule was not fitted on."""

    task: str
    seed: int
    rule: Rule
    predicted: float  # share at which the rule begins
    best: float  # `Curve.best`
    cost: Cost
    fixed: Mapping[float, Cost]  # share → what always beginning there costs on this curve
    random: Cost  # of a point that is drawn


def fitted(curves: Sequence[Curve], probe: str, times: int = 1) -> Rule:
    """The rule on a probe that saves most among those that lose at most `MOST_REGRET` on average; where none does, the one that
    loses least.

    Thresholds are values that the probe has on these curves, either side of each. Of equals the one that begins latest.
    Raises: DataError without curves, or where the probe has no value on any.
    """
    values = sorted({value for curve in curves for value in curve.probes.get(probe, ()) if value is not None})
    if not values:
        raise DataError("there is nothing to fit a rule on", got=f"{len(curves)} curves, no value of {probe}")
    found = []
    for rule in (Rule(probe, threshold, above, times) for threshold in values for above in (True, False)):
        starts = [begins_at(curve, rule) for curve in curves]
        costs = mean_cost([cost_of(curve, start) for curve, start in zip(curves, starts, strict=True)])
        found.append((rule, costs.regret, costs.saved, fmean(starts)))
    allowed = [one for one in found if one[1] <= MOST_REGRET]
    if allowed:
        return max(allowed, key=lambda one: (one[2], one[3]))[0]
    return min(found, key=lambda one: (one[1], -one[3]))[0]


def leave_one_out(curves: Sequence[Curve], probe: str, times: int = 1) -> list[Held]:
    """Each curve by the rule of all other tasks. Raises: DataError with fewer than two tasks."""
    if len({curve.task for curve in curves}) < 2:
        raise DataError("leaving a task out takes two tasks", got=f"{len({curve.task for curve in curves})}")
    found = []
    for curve in curves:
        rule = fitted([one for one in curves if one.task != curve.task], probe, times)
        start = begins_at(curve, rule)
        fixed = {share: cost_of(curve, share) for share in FIXED}
        drawn = mean_cost([cost_of(curve, share) for share in curve.shares])
        found.append(Held(curve.task, curve.seed, rule, start, curve.best, cost_of(curve, start), fixed, drawn))
    return found


def rank_correlation(held: Sequence[Held]) -> float | None:
    """Spearman's ρ of predicted and true best start over curves; None where either is the same for all."""
    from scipy.stats import spearmanr

    predicted, best = [one.predicted for one in held], [one.best for one in held]
    return float(spearmanr(predicted, best).statistic) if len(set(predicted)) > 1 < len(set(best)) else None


# ---------------------------------------------------------------------------------------------------------------- reading


def curves_of(cells: Mapping[str, Cell], folders: Mapping[str, Path], rows: Sequence[RobustRow]) -> tuple[Curve, ...]:
    """The curves of finished start-point experiments with probes, of three points or more; `rows` as `robust_rows` has them."""
    scored: dict[tuple[str, str], tuple[Cell, RobustRow]] = {}
    for row in rows:
        search = cells[row.cell].inputs.get("ticket") if row.cell in cells else None
        if cells[row.cell].step == "evaluate" and isinstance(search, Cell) and search.step == "search":
            scored[_known(search)] = (search, row)
    groups: dict[tuple[Any, ...], dict[float, tuple[RobustRow, dict[str, Any]]]] = {}
    for key, cell in cells.items():
        if cell.step == "probe" and _known(cell) in scored:
            search, row = scored[_known(cell)]
            logged = (read_json(folders[search.key] / "result.json").get("train") or {}).get("losses", [])
            said = read_json(folders[key] / "result.json") | {"pilot": pilot_loss([(int(step), loss) for step, loss in logged])}
            group = (row.arm.model, row.arm.task, row.arm.run, _known(cell)[1], row.seed)
            groups.setdefault(group, {})[row.arm.begun_at] = (row, said)
    found = [_curve(points) for _, points in sorted(groups.items()) if len(points) > 2 and 1.0 in points]
    return tuple(found)


def _known(cell: Cell) -> tuple[str, str]:
    """The model that a search or a probe starts from, and how its mask is learned."""
    return cell.inputs["model"].key, fingerprint([cell.settings["search"], cell.settings.get("loss")])


def _curve(points: Mapping[float, tuple[RobustRow, Mapping[str, Any]]]) -> Curve:
    shares = tuple(sorted(points))
    rows, said = [points[share][0] for share in shares], [points[share][1] for share in shares]
    probes: dict[str, tuple[float | None, ...]] = {
        name: tuple(one[name] for one in said) for name in ("mask_overlap", "update_overlap", "bias_gap", "pilot")
    }
    probes["dev_slope"] = slope(shares, [one["dev_loss"] for one in said])
    return Curve(
        task=rows[0].arm.task,
        seed=rows[0].seed,
        shares=shares,
        scores=tuple(next(iter(row.scores["challenge"].values())) for row in rows),
        steps=tuple(row.steps for row in rows),
        probes={name: values for name, values in probes.items() if any(value is not None for value in values)},
    )
