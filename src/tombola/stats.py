"""Statistics of few seeds and small splits: numbers in, estimates out, and a reason wherever there is no number.

Read `Estimate` first: every interval leaves here as one. What has no answer (one seed, an empty mask, raters who never
vary) is None with a `note` that says why, never NaN; what is no question at all (more right answers than rows) raises.
A leaf: it knows no models, no tickets, no files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from tombola.errors import DataError

LEVEL = 0.95  # of every interval
ALPHA = 0.05  # of every two-sided test
POWER = 0.80  # asked for by `smallest_detectable_difference`


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its spread; None where there is none, and then `note` says why."""

    value: float | None
    low: float | None  # 95 % interval
    high: float | None
    std: float | None  # over seeds, sample standard deviation (n - 1)
    n_seeds: int
    note: str = ""


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


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds with sample std (n - 1) and the two-sided 95 % t interval, in the unit of `values`.

    The interval is not clipped to the range of the metric: two seeds say little, and it shows.
    """
    n = len(values)
    broken = sum(not math.isfinite(value) for value in values)
    if n == 0 or broken:
        why = f"{broken} of {n} seeds gave no finite number" if n else "no seeds"
        return Estimate(None, None, None, None, n, why)
    mean = fmean(values)
    if n == 1:
        return Estimate(mean, None, None, None, 1, "one seed: no std, no interval")
    from scipy.stats import t

    std = stdev(values) if max(values) - min(values) > 1e-12 else 0.0  # means of equal draws may differ in the last bit
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
    note = "all seeds gave the same number: the interval has no width" if std == 0 else ""
    return Estimate(mean, mean - half, mean + half, std, n, note)


def over_rows(correct: int, n: int) -> Estimate:
    """Share of right answers in [0, 1] with its 95 % Wilson interval: the spread over rows, for one seed.

    Raises: DataError if `correct` is no count out of `n`.
    """
    _require_count("right answers", correct, n)
    if n == 0:
        return Estimate(None, None, None, None, 1, "no rows")
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(correct, n, alpha=1 - LEVEL, method="wilson")
    return Estimate(correct / n, float(low), float(high), None, 1, f"Wilson interval over {n} rows of one seed")


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


def fleiss_kappa(masks: Sequence[Any]) -> Estimate:
    """Agreement of several masks over the same components beyond chance: 1 = identical, 0 = chance, below 0 = less.

    Subjects are components, raters are masks (seeds; each a flat sequence or array of bool), categories are kept and
    removed. Undefined, and said so, for fewer than two masks or when no mask varies (all kept, or all removed, everywhere).
    Raises: DataError if the masks differ in length.
    Source: Fleiss 1971; statsmodels.stats.inter_rater.
    """
    n = len(masks)
    lengths = {len(mask) for mask in masks}
    if len(lengths) > 1:
        raise DataError(
            "masks over different components cannot be rated together",
            got=f"lengths {sorted(lengths)}",
            expected="one length",
            next="compare tickets of one model only",
        )
    if n < 2:
        return Estimate(None, None, None, None, n, "kappa needs at least two masks")
    if lengths == {0}:
        return Estimate(None, None, None, None, n, "no components")
    import numpy as np

    kept = np.sum([np.asarray(mask, dtype=bool) for mask in masks], axis=0)
    if int(kept.sum()) in (0, n * len(kept)):
        what = "remove" if int(kept.sum()) == 0 else "keep"
        return Estimate(None, None, None, None, n, f"all masks {what} everything: chance agreement is already complete")
    from statsmodels.stats.inter_rater import fleiss_kappa as kappa

    return Estimate(float(kappa(np.stack([kept, n - kept], axis=1))), None, None, None, n)


def smallest_two_sided_p(n: int) -> float:
    """Smallest two-sided p in (0, 1] that a sign-flip or Wilcoxon signed-rank test over n paired seeds can give.

    All n differences have one sign: 2 of the 2**n equally likely patterns are that extreme. Below .05 from n = 6 on.
    Raises: DataError if n is not positive.
    """
    if n < 1:
        raise DataError("a paired test needs seeds", got=f"n = {n}", expected="n >= 1", next="run more seeds")
    return 2.0 / 2.0**n


def smallest_detectable_difference(p: float, n: int) -> float | None:
    """Smallest difference between a score p and another, both shares of right answers in n rows, that n rows can show.

    "Show" is a two-sided 5 % test with power 80 %, on the scale 2*asin(sqrt(p)), where the standard error is 1/sqrt(n)
    at any p; the larger of the steps up and down. The two sets of answers are taken as independent: for models that
    agree on most rows a paired test (`mcnemar`) can show less. None if no difference is large enough.
    Raises: DataError if p is outside [0, 1] or n is not positive.
    Source: Cohen 1988, ch. 6 (effect size h).
    """
    if not 0 <= p <= 1 or n < 1:
        raise DataError(
            "no detectable difference can be given",
            got=f"p = {p}, n = {n}",
            expected="a share of right answers in [0, 1] and n >= 1 rows",
            next="ask for it only where the metric is such a share, as accuracy is",
        )
    from scipy.stats import norm

    step = float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)) * math.sqrt(2 / n) / 2  # h / 2
    angle = math.asin(math.sqrt(p))
    others = [math.sin(other) ** 2 for other in (angle - step, angle + step) if 0 <= other <= math.pi / 2]
    return max((abs(p - other) for other in others), default=None)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p in (0, 1] that two models on the same rows are right equally often.

    b: rows only the first gets right; c: rows only the second does. 1 when there are no such rows.
    Raises: DataError if a count is negative.
    """
    _require_count("rows only one model gets right", min(b, c), b + c)
    from statsmodels.stats.contingency_tables import mcnemar as test

    return min(1.0, float(test([[0, b], [c, 0]], exact=True).pvalue))


def survivor_correlation(
    is_survivor: Sequence[bool], is_heterogeneous: Sequence[bool], clusters: Sequence[Any] | None = None, *, seed: int = 0
) -> Estimate:
    """Pearson r in [-1, 1] of two yes-or-no questions over pooled (row, head) pairs, with a 95 % interval.

    The pairs of one head are not independent: a head either survived or it did not, and its maps resemble each other. With
    `clusters` (the head of each pair) the interval is the percentile interval of 10,000 draws of whole clusters; without, the
    published way, it is Fisher's, as if every pair were a draw of its own, and too narrow. r itself is the same.
    None, with a note, where one of the two is the same for all pairs.
    Raises: DataError if the sequences differ in length.
    Source: Prasanna et al. 2020, sec. 6; deviation: the interval.
    """
    import numpy as np

    lengths = {len(is_survivor), len(is_heterogeneous), len(is_survivor if clusters is None else clusters)}
    if len(lengths) > 1:
        raise DataError("the pairs to correlate do not fit together", got=f"lengths {sorted(lengths)}", expected="one length")
    x, y = (np.asarray(some, dtype=np.float64) for some in (is_survivor, is_heterogeneous))
    n = len(x)
    if n == 0 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(None, None, None, None, 1, "all pairs are alike in one of the two" if n else "no pairs")

    def r(counts: Any) -> Any:
        """From [draw, 4]: pairs, survivors, heterogeneous ones, both."""
        pairs, a, b, both = (counts[..., i] for i in range(4))
        spread = a * (pairs - a) * b * (pairs - b)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(spread > 0, (pairs * both - a * b) / np.sqrt(spread), np.nan)

    one = np.stack([np.ones(n), x, y, x * y], axis=1)
    value = float(r(one.sum(0)))
    if clusters is None:
        from scipy.stats import norm

        if n < 4 or abs(value) == 1:
            return Estimate(value, None, None, None, 1, f"no interval: {n} pairs, r = {value:g}")
        half = float(norm.ppf((1 + LEVEL) / 2)) / math.sqrt(n - 3)
        low, high = (math.tanh(math.atanh(value) + side * half) for side in (-1, 1))
        return Estimate(value, low, high, None, 1, f"{n} pairs taken as independent, which those of one head are not")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if len(numbers) < 2:
        return Estimate(value, None, None, None, 1, "one head: no interval")
    of_cluster = np.zeros((len(numbers), 4))
    np.add.at(of_cluster, [numbers[name] for name in clusters], one)
    drawn = np.random.default_rng(seed).multinomial(len(numbers), np.full(len(numbers), 1 / len(numbers)), size=10_000)
    found = r(drawn @ of_cluster)
    found = found[np.isfinite(found)]
    low, high = (float(q) for q in np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    lost = f"; {10_000 - len(found)} of 10,000 draws had no r" if len(found) < 10_000 else ""
    return Estimate(value, low, high, None, 1, f"{n} pairs of {len(numbers)} heads, drawn by head{lost}")


def _require_count(what: str, count: int, n: int) -> None:
    if not 0 <= count <= n:
        raise DataError(
            f"{what} must be a count",
            got=f"{count} of {n}",
            expected="0 <= count <= rows",
            next="check that scores and rows come from the same split",
        )
