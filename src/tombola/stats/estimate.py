"""One number with its spread, and the two simplest: a mean over seeds, a share of rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

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
