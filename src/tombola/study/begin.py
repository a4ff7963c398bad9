"""When mask training can begin: how much two points of fine-tuning agree on a mask, a rule on that, and what the rule would cost.

The idea: once the mask that the largest values give hardly changes from one point of fine-tuning to the next, the rest of
fine-tuning tells a mask nothing new. `Curve` is a finished start-point experiment of one task; `leave_one_out` asks of each task
what a threshold, fitted on all others, would have lost and saved there. Source: ours, after an open question of Liu et al. 2022;
of its probes only the first (overlap of masks) is here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from tombola.errors import DataError
from tombola.prune import prune

MOST_REGRET = 0.005  # of the score: what a threshold may lose on the tasks it is fitted on
FIXED = (0.0, 0.55, 1.0)  # shares of fine-tuning that need no rule


def mask_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor], sparsity: float) -> float:
    """Jaccard, in [0, 1], of what two sets of weights keep when the smallest values of each matrix are removed.

    Raises: DataError when they have no parameters, or others; MaskError as `prune`.
    """
    if not a or a.keys() != b.keys():
        raise DataError("two points of fine-tuning have other parameters", got=f"{len(a)} and {len(b)}", expected="the same")
    kept = [prune({name: x.abs() for name, x in one.items()}, sparsity, granularity="per_matrix") for one in (a, b)]
    both = sum(int(torch.count_nonzero(kept[0][name] & kept[1][name])) for name in a)
    either = sum(int(torch.count_nonzero(kept[0][name] | kept[1][name])) for name in a)
    return both / either


def overlaps_along(folders: Sequence[Path], names: Sequence[str], sparsity: float) -> tuple[float, ...]:
    """The overlap of each point of fine-tuning with the one before, of folders of weights in order; the first has none."""
    from safetensors.torch import load_file

    points = [{name: load_file(folder / "model.safetensors")[name] for name in names} for folder in folders]
    return tuple(mask_overlap(before, after, sparsity) for before, after in pairwise(points))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Masks of one task that began after rising shares of fine-tuning, the last one 1."""

    task: str
    shares: tuple[float, ...]
    scores: tuple[float, ...]  # on challenge rows, higher is better
    steps: tuple[int, ...]  # of the optimizer, fine-tuning and mask together
    overlaps: tuple[float, ...]  # of each point but the first with the one before it

    def __post_init__(self) -> None:
        lengths = {len(self.shares), len(self.scores), len(self.steps), len(self.overlaps) + 1}
        if len(lengths) > 1 or list(self.shares) != sorted(set(self.shares)) or self.shares[-1] != 1.0:
            raise DataError(
                "a curve of start points does not fit together", got=f"shares {self.shares}", expected="rising, up to 1"
            )


def begins_at(curve: Curve, threshold: float, times: int = 1) -> float:
    """The first share of fine-tuning at which so many overlaps in a row have reached the threshold; 1 where none does."""
    row = 0
    for share, overlap in zip(curve.shares[1:], curve.overlaps, strict=True):
        row = row + 1 if overlap >= threshold else 0
        if row == times:
            return share
    return 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What beginning at a share has lost and saved, beside beginning at the end."""

    share: float  # that was measured, the nearest
    regret: float  # score of a mask begun at the end − score of this one; below 0 it is better
    saved: float  # share of all steps


def cost_of(curve: Curve, share: float) -> Cost:
    """The cost of the measured start point nearest to `share`; of two as near the later."""
    at = min(range(len(curve.shares)), key=lambda i: (abs(curve.shares[i] - share), -curve.shares[i]))
    return Cost(curve.shares[at], curve.scores[-1] - curve.scores[at], 1 - curve.steps[at] / curve.steps[-1])


@dataclass(frozen=True, slots=True)
class Held:
    """A task that a threshold was not fitted on."""

    task: str
    threshold: float
    rule: Cost
    fixed: Mapping[float, Cost]  # share → what always beginning there costs on this task


def fitted(curves: Sequence[Curve], thresholds: Sequence[float], times: int = 1) -> float:
    """The threshold that saves most among those that lose at most `MOST_REGRET` on average; where none does, the one that loses
    least.

    Of equals the highest, which begins latest. Raises: DataError without curves or thresholds.
    """
    if not curves or not thresholds:
        raise DataError("there is nothing to fit a threshold on", got=f"{len(curves)} curves, {len(thresholds)} thresholds")
    found = []
    for threshold in sorted(thresholds, reverse=True):
        costs = [cost_of(curve, begins_at(curve, threshold, times)) for curve in curves]
        found.append((threshold, fmean(one.regret for one in costs), fmean(one.saved for one in costs)))
    allowed = [one for one in found if one[1] <= MOST_REGRET]
    return max(allowed, key=lambda one: one[2])[0] if allowed else min(found, key=lambda one: one[1])[0]


def leave_one_out(curves: Sequence[Curve], thresholds: Sequence[float], times: int = 1) -> list[Held]:
    """Each task by the threshold of all others. Raises: DataError with fewer than two tasks."""
    if len({curve.task for curve in curves}) < 2:
        raise DataError("leaving a task out takes two tasks", got=f"{len({curve.task for curve in curves})}")
    found = []
    for curve in curves:
        threshold = fitted([one for one in curves if one.task != curve.task], thresholds, times)
        rule = cost_of(curve, begins_at(curve, threshold, times))
        found.append(Held(curve.task, threshold, rule, {share: cost_of(curve, share) for share in FIXED}))
    return found
