"""One number with its spread, and the simplest: means over seeds, shares of rows, metrics of rows, medians."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, median, stdev
from typing import Any

from tombola.errors import DataError

LEVEL = 0.95  # of every interval
ALPHA = 0.05  # of every two-sided test
POWER = 0.80  # asked for of what n rows or seeds can show
DRAWS = 9_999  # of every permutation test: the observed one makes 10,000, so that p is a multiple of .0001


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its spread; None where there is none, and then `note` says why."""

    value: float | None
    low: float | None  # 95 % interval
    high: float | None
    std: float | None  # over seeds, sample standard deviation (n - 1)
    n_seeds: int
    note: str = ""

    @property
    def text(self) -> str:
        """As in "0.312 (0.201 to 0.423)", "0.312", or "undefined, because no seeds"."""
        if self.value is None:
            return f"undefined, because {self.note}"
        ends = "" if self.low is None or self.high is None else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{ends}".replace("-", "−")


@dataclass(frozen=True, slots=True)
class Band:
    """A median, and an interval that holds the true one in at least 95 of 100 cases (in fewer below 6 values)."""

    median: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """As in "0.56 (0.54 to 0.58)"."""
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean over seeds with sample std (n - 1) and the two-sided 95 % t interval, in the unit of `values`.

    The interval is not clipped to the range of the metric: two seeds say little, and it shows. It holds for normal values at
    any n. A bootstrap over seeds does not: resamples of 5 have a std that is too small, and it covers 83 %, not 95.
    """
    n = len(values)
    broken = sum(not math.isfinite(value) for value in values)
    if n == 0 or broken:
        why = f"{broken} of {n} seeds gave no finite number" if n else "no seeds"
        return Estimate(None, None, None, None, n, why)
    mean = fmean(values)
    if n == 1:
        return Estimate(mean, None, None, None, 1, "one seed: no std, no interval")
    std = stdev(values) if max(values) - min(values) > 1e-12 else 0.0  # means of equal draws may differ in the last bit
    half = t_quantile(float(n - 1)) * std / math.sqrt(n)
    note = "all seeds gave the same number: the interval has no width" if std == 0 else ""
    return Estimate(mean, mean - half, mean + half, std, n, note)


def over_rows(correct: int, n: int) -> Estimate:
    """Share of right answers in [0, 1] with its 95 % Wilson interval: the spread over rows, for one seed.

    Raises: DataError if `correct` is no count out of `n`.
    """
    require_count("right answers", correct, n)
    return share_over_rows(correct / n, n) if n else undefined("no rows", 1)


def share_over_rows(share: float, n: int) -> Estimate:
    """A share of right answers among n rows, which may be a mean over seeds, with its 95 % Wilson interval over rows."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(share * n, n, alpha=1 - LEVEL, method="wilson")
    return Estimate(share, float(low), float(high), None, 1, f"Wilson interval over {n} rows")


def difference_over_rows(a: float, b: float, n: int) -> Estimate:
    """a − b, two shares of right answers in [0, 1] on n rows, with its 95 % interval over rows (Newcombe 1998, method 10).

    The two sets of answers are taken as independent: wider than need be where both models are right on the same rows. Shares
    may be means over seeds; their rows are the same, so that seeds make the interval no narrower.
    Raises: DataError for shares outside [0, 1].
    """
    if not (0 <= a <= 1 and 0 <= b <= 1):
        raise DataError("no interval can be given", got=f"shares {a} and {b}", expected="shares of right answers in [0, 1]")
    if n < 1:
        return undefined("no rows", 1)
    first, second = share_over_rows(a, n), share_over_rows(b, n)
    assert first.low is not None and first.high is not None and second.low is not None and second.high is not None
    low = a - b - math.hypot(a - first.low, second.high - b)
    high = a - b + math.hypot(first.high - a, b - second.low)
    return Estimate(a - b, low, high, None, 1, f"interval over {n} rows, answers taken as independent")


def metric_over_rows(
    metric: Callable[[Sequence[Any], Sequence[Any]], float], labels: Sequence[Any], answers: Sequence[Sequence[Any]]
) -> Estimate:
    """Mean over models of metric(labels, answers) on the same rows, with its 95 % jackknife interval over rows, by t.

    answers: [model][row], of one seed each, say. The interval is for other rows and these very models: what another seed would
    give is not in it. `std` is that over models. The metric must not depend on the order of rows. For smooth metrics (shares, F1,
    correlations), as in `paired_over_rows`.
    Undefined, and said so, where the metric is; without an interval where it is undefined without one of the rows.
    Raises: DataError if a model has not as many answers as there are labels.
    """
    for one in answers:
        require_pairs("rows", len(labels), len(one))
    n, models = len(labels), len(answers)
    if n < 2 or not models:
        return undefined("no models" if not models else f"{n} rows", models)
    values = [metric(labels, one) for one in answers]
    if not all(map(math.isfinite, values)):
        return undefined("the metric is no finite number", models)
    value, std = fmean(values), stdev(values) if models > 1 else None
    without: dict[tuple[Any, ...], float] = {}  # rows with the same label and the same answers leave the same score behind
    rows = list(zip(labels, *answers, strict=True))
    for i, row in enumerate(rows):
        if row not in without:
            label, *rest = ([*column[:i], *column[i + 1 :]] for column in (labels, *answers))
            without[row] = fmean(metric(label, one) for one in rest)
    left = [without[row] for row in rows]
    if not all(map(math.isfinite, left)):
        return Estimate(value, None, None, std, models, "no interval: the metric is undefined when a row is left out")
    middle = fmean(left)
    half = t_quantile(float(n - 1)) * math.sqrt((n - 1) / n * math.fsum((one - middle) ** 2 for one in left))
    seeds = "one seed" if models == 1 else f"these {models} seeds"
    return Estimate(value, value - half, value + half, std, models, f"jackknife over {n} rows of {seeds}")


def band(values: Sequence[float]) -> Band:
    """The median of these values, and the interval of it between the k-th from below and the k-th from above.

    k is the largest for which as many throws of a fair coin as there are values show fewer than k heads in at most 2.5 of 100
    cases, which asks nothing of how the values are spread; 1 where there is none.
    """
    ordered, n = sorted(values), len(values)
    k, below = 0, 0.5**n
    while below <= 0.025:
        k += 1
        below += math.comb(n, k) * 0.5**n
    k = max(k, 1)
    return Band(median(ordered), ordered[k - 1], ordered[n - k])


def undefined(why: str, n: int) -> Estimate:
    """No number, and why."""
    return Estimate(None, None, None, None, n, why)


@lru_cache(maxsize=1024)
def t_quantile(df: float) -> float:
    """How many standard errors a two-sided 95 % interval reaches to each side."""
    from scipy.stats import t

    return float(t.ppf((1 + LEVEL) / 2, df))


def require_count(what: str, count: int, n: int) -> None:
    """Raises: DataError if `count` is no count out of `n`."""
    if not 0 <= count <= n:
        raise DataError(
            f"{what} must be a count",
            got=f"{count} of {n}",
            expected="0 <= count <= rows",
            next="check that scores and rows come from the same split",
        )


def require_pairs(what: str, a: int, b: int) -> None:
    """Raises: DataError if the two sides of a paired comparison are not equally many."""
    if a != b:
        raise DataError(
            f"a paired comparison needs the same {what} on both sides",
            got=f"{a} and {b} {what}",
            expected="as many, in the same order",
            next=f"compare over the {what} that both have",
        )
