"""What a set of masks depends on, when every combination of several factors was run once: variance split among the factors."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float

from tombola.errors import DataError
from tombola.stats.estimate import require_pairs


@dataclass(frozen=True, slots=True)
class Split:
    """Variance of what was run, split among factors and what they do together.

    A mask is taken as a mean plus one random effect for each set of factors; `variance` has each effect's, in units of squared
    difference a component (of masks of 0 and 1: a pair of runs that share no level differ in 2 · total of the components).
    """

    factors: tuple[str, ...]
    levels: tuple[int, ...]
    total: float  # half the mean difference of runs that share no level
    variance: dict[tuple[str, ...], float]  # set of factors → variance; unbiased, and so at times below 0
    share: dict[tuple[str, ...], float | None]  # the same over the total; they add up to 1
    # factor → mean difference of runs that differ in it alone, over that of runs that differ in all: of all it has a part in
    alone: dict[str, float | None]
    difference: dict[tuple[str, ...], float]  # factors shared → mean difference of such pairs of runs, a component
    note: str = ""


def split_variance(
    factors: Sequence[str], runs: Sequence[Sequence[Hashable]], differences: Float[np.ndarray, "run run"]
) -> Split:
    """Splits what masks differ in among the factors of a crossed design without repeats.

    runs           the levels of each run, a level a factor; every combination exactly once
    differences    mean squared difference a component of each pair of runs; of masks the share of components that differ

    Method of moments: half the mean difference of pairs that share exactly the factors S estimates the variances of all effects
    that are not within S; the variances follow by inclusion and exclusion. In a balanced design these are the estimates of the
    analysis of variance. Unbiased where levels are a random sample, as seeds are. Limits: with L levels a factor's own variance
    rests on L − 1 degrees of freedom, so that two levels show an order of magnitude and no more; there is no repeat, so that the
    effect of all factors together holds whatever else differs between runs; and there is no interval.
    Raises: DataError when a combination is missing or there twice, a factor has one level, or the sizes do not fit.
    Source: Searle, Casella and McCulloch 1992, chapter 4.
    """
    require_pairs("runs", len(runs), len(differences))
    n_factors, seen = len(factors), [tuple(run) for run in runs]
    levels = [list(dict.fromkeys(run[f] for run in seen)) for f in range(n_factors)]
    expected = int(np.prod([len(one) for one in levels])) if seen else 0
    if not seen or len(set(seen)) != len(seen) or len(seen) != expected or any(len(one) < 2 for one in levels):
        raise DataError(
            "the runs are no crossed design",
            got=f"{len(seen)} runs, {len(set(seen))} different, of {' × '.join(str(len(one)) for one in levels)} levels",
            expected="every combination of two levels or more of each factor, once",
        )
    every = [of for size in range(n_factors + 1) for of in combinations(range(n_factors), size)]
    sums, counts = dict.fromkeys(every, 0.0), dict.fromkeys(every, 0)
    for i, j in combinations(range(len(seen)), 2):
        shared = tuple(f for f in range(n_factors) if seen[i][f] == seen[j][f])
        sums[shared] += float(differences[i, j])
        counts[shared] += 1
    mean = {shared: sums[shared] / counts[shared] for shared in every if counts[shared]}
    total = mean[()] / 2
    within = {of: total - mean[of] / 2 if of in mean else total for of in every}  # variances of effects within these factors
    variance = {
        of: sum((-1) ** (len(of) - size) * within[part] for size in range(len(of) + 1) for part in combinations(of, size))
        for of in every
        if of
    }

    def named(of: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(factors[f] for f in of)

    rest = {f: tuple(g for g in range(n_factors) if g != f) for f in range(n_factors)}
    few = min(map(len, levels))
    note = f"{few} levels of a factor: no interval" + ("" if total else "; all runs that share no level are the same")
    return Split(
        tuple(factors),
        tuple(map(len, levels)),
        total,
        {named(of): value for of, value in variance.items()},
        {named(of): value / total if total else None for of, value in variance.items()},
        {factors[f]: mean[rest[f]] / mean[()] if total else None for f in range(n_factors)},
        {named(of): value for of, value in mean.items()},
        note,
    )
