"""What masks share: two of them, those of several seeds, those of two tasks; each beside what their sizes alone would give.

Components are heads, MLPs, neurons or values; all masks of one call are over the same components, of one type. True = kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from tombola.errors import DataError
from tombola.stats.chance import Groups, Masks, chance_counts, chance_totals, flat_masks, grouped, p_of, votes
from tombola.stats.estimate import ALPHA, DRAWS, Estimate, over_seeds, require_pairs, t_quantile, undefined
from tombola.stats.paired import correct, mcnemar_of_counts
from tombola.stats.survivors import Undecided, undecided

TABLE = 2000  # components up to which a table of all pairs of them is kept in memory


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two masks over the same n components share, beside what two random masks of these sizes would share."""

    n: int
    size_a: int
    size_b: int
    shared: int
    jaccard: float | None
    expected_shared: float | None  # size_a * size_b / n
    expected_jaccard: float | None  # exact mean under the hypergeometric, not the ratio of means
    ratio: float | None  # shared / expected_shared: above 1 = more than chance
    p_at_least: float | None  # chance of sharing this much or more
    p_at_most: float | None  # chance of sharing this much or less
    note: str = ""


@dataclass(frozen=True, slots=True)
class CochranQ:
    """Whether seeds keep the same share of components. Says nothing of whether they keep the same ones.

    Equal sizes without a single component in common give Q = 0 and p = 1.
    """

    q: float | None
    df: int  # seeds − 1
    p: float | None  # conditional on how often each component is kept; of a pair it is the exact McNemar p
    p_chi2: float | None  # of the chi-squared limit that the paper reads; too small where few components vary
    varying: int  # components that some but not all seeds keep
    p_corrected: float | None = None  # Holm, over all pairs of seeds; of a pair only
    note: str = ""

    @property
    def text(self) -> str:
        """The one thing that may be said of it."""
        p = self.p if self.p_corrected is None else self.p_corrected
        if p is None:
            return f"undefined, because {self.note}"
        return "survival rates differ" if p < ALPHA else "survival rates are not shown to differ"


@dataclass(frozen=True, slots=True)
class Stability:
    """How far the masks of several seeds agree, beside masks of these sizes drawn at random."""

    n: int
    sizes: tuple[int, ...]  # kept by each seed
    kappa: Estimate  # Fleiss
    alpha: Estimate  # Krippendorff, nominal
    jaccard: Estimate  # mean over pairs of seeds
    expected_kappa: float | None  # below 0: sizes that differ are disagreement
    expected_jaccard: float | None
    p_at_least: float | None  # chance of agreeing this much or more, given the size of each mask
    p_at_most: float | None
    cochran: CochranQ
    undecided: Undecided
    note: str = ""


@dataclass(frozen=True, slots=True)
class TaskOverlap:
    """What the masks of two tasks share at matched seeds, beside masks of these sizes drawn at random."""

    n: int
    shared: Estimate  # over seeds
    expected_shared: float | None  # mean over seeds of size_a * size_b / n
    ratio: float | None  # all that is shared / all that is expected: above 1 = more than chance
    p_at_least: float | None  # chance of sharing this much or more when components of one task are renamed at random
    p_at_most: float | None
    note: str = ""


# ----------------------------------------------------------------------------------------------------------- two masks


def overlap(a: Sequence[bool], b: Sequence[bool]) -> Overlap:
    """What two masks share (True = kept), against masks of the same sizes drawn at random.

    `p_at_least` and `p_at_most` are the two hypergeometric tails. They are None when a mask is empty or complete, as
    the sizes then force the shared count.
    Raises: DataError if the masks differ in length.
    """
    if len(a) != len(b):
        raise DataError(
            "two masks over different components cannot be compared",
            got=f"{len(a)} and {len(b)} components",
            expected="the same components in the same order",
            next="compare tickets of one model only",
        )
    return overlap_of_counts(len(a), sum(a), sum(b), sum(x and y for x, y in zip(a, b, strict=True)))


def overlap_of_counts(n: int, size_a: int, size_b: int, shared: int) -> Overlap:
    """`overlap` from its counts: components, kept by each mask, kept by both."""
    union = size_a + size_b - shared
    if n == 0 or union == 0:
        why = "both masks are empty" if n else "no components"
        expected = 0.0 if n else None
        return Overlap(n, size_a, size_b, shared, None, expected, None, None, None, None, why)
    expected = size_a * size_b / n
    if forced := [size for size in (size_a, size_b) if size in (0, n)]:
        jaccard = shared / union
        ratio = shared / expected if expected else None
        why = f"a mask keeps {'none' if 0 in forced else 'all'} of {n}: its size alone decides what is shared"
        return Overlap(n, size_a, size_b, shared, jaccard, expected, jaccard, ratio, None, None, why)
    import numpy as np
    from scipy.stats import hypergeom

    chance = hypergeom(n, size_a, size_b)
    counts = np.arange(int(chance.ppf(1e-15)), int(chance.isf(1e-15)) + 1)  # masks of 10**7 values: not all that could be
    expected_jaccard = float(np.sum(chance.pmf(counts) * counts / (size_a + size_b - counts)))
    at_least, at_most = float(chance.sf(shared - 1)), float(chance.cdf(shared))
    return Overlap(n, size_a, size_b, shared, shared / union, expected, expected_jaccard, shared / expected, at_least, at_most)


# ------------------------------------------------------------------------------------------------------- several seeds


def fleiss_kappa(masks: Masks) -> Estimate:
    """Agreement of several masks over the same components beyond chance: 1 = identical, 0 = chance, below 0 = less.

    Subjects are components, raters are masks (seeds; each a flat sequence or array of bool), categories are kept and
    removed. Undefined, and said so, for fewer than two masks or when no mask varies (all kept, or all removed, everywhere).
    The interval is for other seeds of the same components: jackknife over masks, t with n − 1 degrees of freedom, from three
    masks on. Not a bootstrap: resampled seeds agree with themselves, and components are no sample.
    Raises: DataError if the masks differ in length.
    Source: Fleiss 1971. Own code, from counts: statsmodels' wants a row a component, for every mask that is left out once.
    """
    return _over_masks(masks, kappa_of_votes, "kappa", -1.0)


def krippendorff_alpha(masks: Masks) -> Estimate:
    """Krippendorff's alpha for nominal ratings without gaps, kept or removed; undefined and with an interval as `fleiss_kappa`.

    It differs from kappa in that chance is drawn without replacement: by (1 − kappa) / (masks · components).
    Raises: DataError if the masks differ in length.
    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    return _over_masks(masks, _alpha, "alpha", -1.0)


def mean_jaccard(masks: Masks) -> Estimate:
    """Mean over all pairs of masks of size(A ∩ B) / size(A ∪ B), in [0, 1]; interval as in `fleiss_kappa`.

    Pairs of two empty masks have none: they are left out, and said.
    Raises: DataError if the masks differ in length.
    """
    arrays = flat_masks(masks)
    n = len(arrays)
    if n < 2:
        return undefined("Jaccard needs at least two masks", n)
    of = np.full((n, n), np.nan)
    for i, j in combinations(range(n), 2):
        if either := int((arrays[i] | arrays[j]).sum()):
            of[i, j] = of[j, i] = int((arrays[i] & arrays[j]).sum()) / either
    pairs, lost = n * (n - 1) // 2, int(np.isnan(of[np.triu_indices(n, 1)]).sum())
    if lost == pairs:
        return undefined("all masks are empty", n)

    def mean(kept: list[int]) -> float | None:
        values = [of[i, j] for i, j in combinations(kept, 2) if not np.isnan(of[i, j])]
        return float(np.mean(values)) if values else None

    found = _jackknife(mean(list(range(n))), [mean([i for i in range(n) if i != out]) for out in range(n)], n, 0.0)
    return replace(found, note=f"{lost} of {pairs} pairs are both empty: left out") if lost else found


def cochran_q(masks: Masks, *, draws: int = DRAWS, seed: int = 0) -> CochranQ:
    """Cochran's Q: whether the masks of several seeds keep the same share. Components are blocks, seeds are treatments.

    p is that of drawing, for every component, which of the seeds keep it, as many as do: no limit law, so it holds for 12 MLPs.
    Undefined where no component varies over seeds.
    Raises: DataError if the masks differ in length.
    Source: Cochran 1950; statsmodels.stats.contingency_tables.
    """
    arrays = flat_masks(masks)
    n = len(arrays)
    if n < 2:
        return CochranQ(None, 0, None, None, 0, note="Cochran's Q needs at least two masks")
    kept = votes(arrays)
    some = (kept > 0) & (kept < n)
    if not (varying := int(some.sum())):
        return CochranQ(None, n - 1, None, None, 0, note="every component is kept by all seeds or by none")
    from statsmodels.stats.contingency_tables import cochrans_q

    found = cochrans_q(np.stack([mask[some] for mask in arrays], axis=1).astype(np.int64))
    only = [int(mask[some].sum()) for mask in arrays]
    if n == 2:
        p = mcnemar_of_counts(only[0], only[1], varying).p
    else:  # given how often each component is kept, Q grows with the sum of squared sizes alone: whole numbers, compared exactly
        totals = chance_totals(np.bincount(kept[some], minlength=n + 1), draws, np.random.default_rng(seed))
        p, _ = p_of((totals**2).sum(1), float(sum(size**2 for size in only)))
    return CochranQ(float(found.statistic), n - 1, p, float(found.pvalue), varying)


def cochran_pairs(masks: Masks) -> dict[tuple[int, int], CochranQ]:
    """Cochran's Q of every pair of masks, by their positions; `p_corrected` is Holm's over all pairs that have a p.

    Raises: DataError if the masks differ in length.
    """
    arrays = flat_masks(masks)
    found = {(i, j): cochran_q([arrays[i], arrays[j]]) for i, j in combinations(range(len(arrays)), 2)}
    corrected = correct({f"{i},{j}": one.p for (i, j), one in found.items()}, family="pairs of seeds").p
    return {(i, j): replace(one, p_corrected=corrected[f"{i},{j}"]) for (i, j), one in found.items()}


def stability(masks: Masks, *, groups: Groups | None = None, draws: int = DRAWS, seed: int = 0) -> Stability:
    """Everything that is said of the masks of several seeds of one task, and the permutation test of their agreement.

    The test: each mask keeps as many components as it does, drawn apart from the others; kappa given all sizes grows with what
    pairs of masks share, so that it decides. `groups`, one for each component, holds sizes within each: types, when heads and
    MLPs are tested together; layers, to ask whether seeds agree on more than how much each layer keeps.
    Raises: DataError if the masks differ in length, or for groups that are not one a component.
    """
    arrays = flat_masks(masks)
    kappa, seeds = fleiss_kappa(masks), len(arrays)
    n = len(arrays[0]) if arrays else 0
    rest = krippendorff_alpha(masks), mean_jaccard(masks)
    cochran = cochran_q(masks, draws=draws, seed=seed)
    split = undecided(masks, groups=groups, draws=draws, seed=seed)
    sizes = tuple(int(mask.sum()) for mask in arrays)
    if kappa.value is None:
        return Stability(n, sizes, kappa, *rest, None, None, None, None, cochran, split, kappa.note)
    of = grouped(arrays, groups)
    draw = np.random.default_rng(seed)
    drawn = np.sum([chance_counts(size, kept, draws, draw) for size, kept in of], axis=0)
    together = np.arange(seeds + 1) * (np.arange(seeds + 1) - 1) // 2  # pairs of masks that share a component kept by k
    observed = int(np.bincount(votes(arrays), minlength=seeds + 1) @ together)
    shared = drawn @ together
    expected = _chance_kappa(of, n), _chance_jaccard(of, seeds)
    if all(sum(size not in (0, one) for size in kept) < 2 for one, kept in of):
        why = "but for one the masks keep all or nothing: their sizes alone decide how they agree"
        return Stability(n, sizes, kappa, *rest, *expected, None, None, cochran, split, why)
    at_least, at_most = p_of(shared, float(observed))
    return Stability(n, sizes, kappa, *rest, *expected, at_least, at_most, cochran, split)


def kappa_of_votes(counts: Int[np.ndarray, " count"]) -> float | None:
    """Fleiss' kappa from how many components 0, 1, … of the masks keep; None where no mask varies, and of one mask."""
    seeds, n = len(counts) - 1, float(counts.sum())
    k = np.arange(seeds + 1)
    share = float(counts @ k) / (n * seeds) if n else 0.0
    if share in (0.0, 1.0) or seeds < 2:
        return None
    differing = float(counts @ (k * (seeds - k))) * 2 / (n * seeds * (seeds - 1))  # pairs of votes
    return 1.0 - differing / (2 * share * (1 - share))


def _alpha(counts: Int[np.ndarray, " count"]) -> float | None:
    """Krippendorff's alpha likewise: observed disagreement over that of two votes drawn from all without replacement."""
    seeds = len(counts) - 1
    k = np.arange(seeds + 1)
    kept, cast = float(counts @ k), float(counts.sum()) * seeds
    if kept in (0.0, cast):
        return None
    observed = float(counts @ (k * (seeds - k))) * 2 / (seeds - 1) / cast
    return 1.0 - observed * cast * (cast - 1) / (2 * kept * (cast - kept))


def _over_masks(masks: Masks, of: Any, what: str, lowest: float) -> Estimate:
    arrays = flat_masks(masks)
    n = len(arrays)
    if n < 2:
        return undefined(f"{what} needs at least two masks", n)
    if not len(arrays[0]):
        return undefined("no components", n)
    kept = votes(arrays)
    value = of(np.bincount(kept, minlength=n + 1))
    if value is None:
        does = "remove" if not kept.any() else "keep"
        return undefined(f"all masks {does} everything: chance agreement is already complete", n)
    without = [of(np.bincount(kept - mask, minlength=n)) for mask in arrays] if n > 2 else []
    return _jackknife(value, without, n, lowest)


def _jackknife(value: float | None, without: Sequence[float | None], n: int, lowest: float) -> Estimate:
    """The value with its interval from those that leave one mask out each, cut to [lowest, 1]."""
    if n == 2:
        return Estimate(value, None, None, None, 2, "two masks: no interval")
    if value is None or any(one is None for one in without):
        return Estimate(value, None, None, None, n, "no interval: it is undefined when one of the masks is left out")
    left = np.asarray(without, dtype=np.float64)
    error = float(np.sqrt((n - 1) / n * np.sum((left - left.mean()) ** 2)))
    if error < 1e-12:
        return Estimate(value, value, value, None, n, "no mask stands out: the interval has no width")
    half = t_quantile(float(n - 1)) * error
    return Estimate(value, max(lowest, value - half), min(1.0, value + half), None, n)


def _chance_kappa(groups: Sequence[tuple[int, Sequence[int]]], n: int) -> float:
    """Mean kappa that the sizes of masks within groups alone would give, exactly: their share fixes chance agreement."""
    pairs = [(size, a, b) for size, kept in groups for a, b in combinations(kept, 2)]
    seeds = len(groups[0][1])
    share = sum(sum(kept) for _, kept in groups) / (n * seeds)
    differing = sum(a + b - 2 * a * b / size for size, a, b in pairs) / (n * seeds * (seeds - 1) / 2)
    return 1.0 - differing / (2 * share * (1 - share))


def _chance_jaccard(groups: Sequence[tuple[int, Sequence[int]]], seeds: int) -> float | None:
    """Mean over pairs of masks of the Jaccard index that their sizes within groups alone would give, exactly."""
    from scipy.stats import hypergeom

    found = []
    for i, j in combinations(range(seeds), 2):
        law, low = np.ones(1), 0
        for n, kept in groups:
            centre = kept[i] * kept[j] / n
            reach = 9 * math.sqrt(centre * (1 - kept[i] / n)) + 30  # all that is likely, as masks may have 10**7 components
            first, last = max(0, kept[i] + kept[j] - n, int(centre - reach)), min(kept[i], kept[j], int(centre + reach))
            law, low = np.convolve(law, hypergeom.pmf(np.arange(first, last + 1), n, kept[i], kept[j])), low + first
        both = low + np.arange(len(law))
        either = sum(kept[i] + kept[j] for _, kept in groups) - both
        if either.min() > 0:
            found.append(float(np.sum(law * both / either)))
    return float(np.mean(found)) if found else None


# ----------------------------------------------------------------------------------------------------------- two tasks


def overlap_of_tasks(a: Masks, b: Masks, *, groups: Groups | None = None, draws: int = DRAWS, seed: int = 0) -> TaskOverlap:
    """What the masks of two tasks share, seed by seed, against chance given every size.

    a, b: a mask for each seed, the same seeds in the same order. The test renames the components of the second task at random,
    in the same way for all of its seeds. So it keeps how far seeds of one task agree among themselves; drawing each seed's mask
    apart would not, and would take that agreement for overlap: at kappa .55 in 12 % of pairs of unrelated tasks. `groups` renames
    within each: types or layers.
    None, and said so, where every mask of a task keeps all or nothing.
    Raises: DataError if the masks differ in length or number, or for groups that are not one a component.
    """
    require_pairs("seeds", len(a), len(b))
    arrays = flat_masks([*a, *b])
    seeds = len(a)
    if not seeds or not len(arrays[0]):
        why = "no components" if seeds else "no seeds"
        return TaskOverlap(0, undefined(why, seeds), None, None, None, None, why)
    first, second = np.stack(arrays[:seeds]), np.stack(arrays[seeds:])
    n = first.shape[1]
    shared = over_seeds([float(one) for one in (first & second).sum(1)])
    of = grouped(arrays, groups)
    expected = sum(kept[s] * kept[seeds + s] / size for size, kept in of for s in range(seeds)) / seeds
    ratio = shared.value / expected if expected and shared.value is not None else None
    if any(all(size in (0, one) for one, kept in of for size in kept[side]) for side in (slice(seeds), slice(seeds, None))):
        why = "all masks of a task keep all or nothing: their sizes alone decide what is shared"
        return TaskOverlap(n, shared, expected, ratio, None, None, why)
    drawn = _renamed(first, second, groups, draws, np.random.default_rng(seed))
    at_least, at_most = p_of(drawn, float((first & second).sum()))
    return TaskOverlap(n, shared, expected, ratio, at_least, at_most)


def _renamed(
    first: Bool[np.ndarray, "seed component"],
    second: Bool[np.ndarray, "seed component"],
    groups: Groups | None,
    draws: int,
    draw: np.random.Generator,
) -> Float[np.ndarray, " draw"]:
    """What is shared, over all seeds, when the components of the second are permuted within groups."""
    of = np.zeros(first.shape[1], dtype=np.int64) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    home = np.argsort(of, kind="stable")
    first, second, of = first[:, home], second[:, home], of[home]
    found = np.empty(draws)
    if len(of) <= TABLE:  # what a part of the first shares with each of the second, over all seeds: a draw is one sum
        table, rows = first.T.astype(np.int64) @ second, np.arange(len(of))
        for start in range(0, draws, 1000):
            orders = np.argsort(of + draw.random((min(1000, draws - start), len(of))), axis=1)
            found[start : start + len(orders)] = table[rows, orders].sum(1)
        return found
    for i in range(draws):
        order = draw.permutation(len(of)) if groups is None else np.lexsort((draw.random(len(of)), of))
        found[i] = np.count_nonzero(first & second[:, order])
    return found
