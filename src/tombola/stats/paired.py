"""Two models on the same seeds or the same rows: how much the first is ahead, with an interval, and the p that it is not.

Always first minus second, two-sided. Which one to take: `paired_over_seeds` where another run is the question (it treats the
rows as given), `mcnemar` and `paired_over_rows` where other rows are (one trained model each), `two_level` for both at once.
`correct` then holds a family of such tests to one error rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from tombola.errors import DataError
from tombola.stats.estimate import ALPHA, DRAWS, LEVEL, Estimate, over_seeds, require_count, require_pairs, t_quantile, undefined
from tombola.stats.power import smallest_two_sided_p

RESAMPLES = 999  # exchanges of answers: each calls the metric twice, and Matthews takes milliseconds
EXACT_UP_TO = 16  # paired seeds of which all sign patterns are tried

Metric = Callable[[Sequence[Any], Sequence[Any]], float]  # (labels, answers) → a score


@dataclass(frozen=True, slots=True)
class Paired:
    """First minus second over the same n seeds or rows."""

    difference: Estimate
    p: float | None  # two-sided; None where there is no test, and then `note` says why
    n: int  # pairs
    over: Literal["seeds", "rows", "seeds and rows"]
    test: str  # its name, as in "exact sign-flip test"
    smallest_p: float | None = None  # that this test can give with n such pairs, whatever the numbers; None: as small as you like
    note: str = ""

    @property
    def can_reach(self) -> bool:
        """Whether these pairs could give p < .05 at all."""
        return self.p is not None and (self.smallest_p is None or self.smallest_p < ALPHA)

    @property
    def text(self) -> str:
        """As in "0.021 (0.004 to 0.038), p = 0.031 (exact sign-flip test, 6 seeds)"."""
        if self.difference.value is None:
            return self.difference.text
        p = "no p" if self.p is None else "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        return f"{self.difference.text}, {p} ({self.test}, {self.n} {self.over})" + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True, slots=True)
class Corrected:
    """A family of p-values, held to one error rate together."""

    family: str  # what was tested how often, as in "good against random, retrained: 9 tasks"
    method: str
    p: Mapping[str, float | None]  # name → corrected p; None where the test itself has none
    n: int  # tests in the family: those that have a p
    note: str = ""

    @property
    def shown(self) -> tuple[str, ...]:
        """The names whose corrected p is below .05."""
        return tuple(name for name, p in self.p.items() if p is not None and p < ALPHA)


# --------------------------------------------------------------------------------------------------------------- seeds


def paired_over_seeds(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Paired:
    """Mean of a − b within seeds with its t interval, and the sign-flip p that its mean is 0.

    a, b: one value for each seed, in the same order; draws of a control averaged within their seed before. The test is exact up
    to 16 seeds (all 2**n patterns of signs, as likely as each other if the two can be exchanged within a seed), drawn beyond.
    Few seeds cannot reach α whatever the values: 5 give .0625 at best, and `note` says so. The t interval then still has its
    95 %, at the price of normal differences: it may leave out 0 where the test cannot.
    Raises: DataError if a and b are not equally long.
    """
    require_pairs("seeds", len(a), len(b))
    n, name = len(a), "exact sign-flip test"
    difference = over_seeds([x - y for x, y in zip(a, b, strict=True)])
    if difference.value is None:
        return Paired(difference, None, n, "seeds", name, note=difference.note)
    smallest = smallest_two_sided_p(n)
    note = "" if smallest < ALPHA else f"n = {n} cannot give p < {ALPHA}: the smallest two-sided p is {smallest:.3g}"
    if n == 1:  # two patterns of signs, both as extreme: scipy refuses to count them
        return Paired(difference, 1.0, 1, "seeds", name, smallest, note)
    from scipy.stats import permutation_test

    if n > EXACT_UP_TO:
        name = f"sign-flip test, {DRAWS:,} draws"
    found = permutation_test(
        (np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if n <= EXACT_UP_TO else DRAWS,
        random_state=np.random.default_rng(seed),
    )
    return Paired(difference, min(1.0, float(found.pvalue)), n, "seeds", name, smallest, note)


# ---------------------------------------------------------------------------------------------------------------- rows


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> Paired:
    """Difference in shares of right answers of two models on the same rows, and the exact McNemar p that it is 0.

    right_a, right_b: for each row whether the model is right.
    Raises: DataError if they are not equally long.
    """
    require_pairs("rows", len(right_a), len(right_b))
    only_a = sum(bool(x) and not y for x, y in zip(right_a, right_b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(right_a, right_b, strict=True))
    return mcnemar_of_counts(only_a, only_b, len(right_a))


def mcnemar_of_counts(only_a: int, only_b: int, n: int) -> Paired:
    """`mcnemar` from its counts: rows only the first gets right, rows only the second does, all rows.

    p is 1 when there are no such rows. The interval is that of Bonett and Price (2012, eq. 7): Wald with one row added to each
    of the two counts, which keeps its 95 % where few rows disagree; within [−1, 1].
    Raises: DataError if the counts are negative or more than the rows.
    """
    require_count("rows only one model gets right", min(only_a, only_b), only_a + only_b)
    require_count("rows only one model gets right", only_a + only_b, n)
    name = "exact McNemar test"
    if n == 0:
        return Paired(undefined("no rows", 1), None, 0, "rows", name, note="no rows")
    from statsmodels.stats.contingency_tables import mcnemar as test

    disagree = only_a + only_b
    p = min(1.0, float(test([[0, only_a], [only_b, 0]], exact=True).pvalue))
    up, down = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = _z() * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    low, high = max(-1.0, up - down - half), min(1.0, up - down + half)
    difference = Estimate((only_a - only_b) / n, low, high, None, 1, f"Bonett-Price interval over {n} rows of one seed")
    smallest = smallest_two_sided_p(disagree) if disagree else 1.0
    few = "" if smallest < ALPHA else f"the models disagree on {disagree} rows only, too few for p < {ALPHA}"
    return Paired(difference, p, n, "rows", name, min(1.0, smallest), few)


def paired_over_rows(
    metric: Metric, labels: Sequence[Any], a: Sequence[Any], b: Sequence[Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> Paired:
    """metric(labels, a) − metric(labels, b) for any metric of rows, with a jackknife interval and a permutation p.

    a, b: the answers of two models to the same rows, in the order of `labels`. The interval is the jackknife over rows with t,
    for smooth metrics (shares, F1, correlations): of 100 rows it covers 94–95 % of differences of F1, a BCa bootstrap 93–94
    with 999 resamples, ten times the calls. The p is that of exchanging the two models' answers row by row, whose null is that
    it does not matter which model an answer came from (Noreen 1989); it needs no law of the metric.
    Undefined, and said so, where the metric is; without an interval where it is undefined without one of the rows.
    Raises: DataError if labels, a and b are not equally long.
    """
    require_pairs("rows", len(labels), len(a))
    require_pairs("rows", len(labels), len(b))
    n, name = len(labels), f"permutation of answers within rows, {resamples:,} draws"
    if n < 2:
        why = "no rows" if n == 0 else "one row"
        return Paired(undefined(why, 1), None, n, "rows", name, note=why)
    values = metric(labels, a), metric(labels, b)
    if not all(map(math.isfinite, values)):
        why = f"the metric of {'both models' if not any(map(math.isfinite, values)) else 'one model'} is no finite number"
        return Paired(undefined(why, 1), None, n, "rows", name, note=why)
    if list(a) == list(b):
        same = "the two models give the same answers to all rows"
        return Paired(Estimate(0.0, 0.0, 0.0, None, 1, same), 1.0, n, "rows", name, note=same)
    value, left = values[0] - values[1], np.asarray(_without_each(metric, labels, a, b))
    if np.isfinite(left).all():
        half = t_quantile(float(n - 1)) * math.sqrt((n - 1) / n * float(np.sum((left - left.mean()) ** 2)))
        difference = Estimate(value, value - half, value + half, None, 1, f"jackknife over {n} rows of one seed")
    else:
        difference = Estimate(value, None, None, None, 1, "no interval: the metric is undefined when a row is left out")
    from scipy.stats import permutation_test

    found = permutation_test(
        (np.arange(n), np.arange(n, 2 * n)),  # which answer, not its value: labels may be of any kind
        lambda x, y: metric(labels, _taken(x, a, b)) - metric(labels, _taken(y, a, b)),
        permutation_type="samples",
        vectorized=False,
        n_resamples=resamples,
        random_state=np.random.default_rng(seed),
    )
    if not np.isfinite(found.null_distribution).all():  # scipy would count NaN as less extreme
        why = "the metric is undefined for some exchanges of answers"
        return Paired(difference, None, n, "rows", name, note=why)
    smallest = 2 / (1 + min(resamples, 2**n - 1))  # scipy doubles the smaller tail, and tries all where these are fewer
    return Paired(difference, min(1.0, float(found.pvalue)), n, "rows", name, smallest)


def _taken(which: Int[np.ndarray, " row"], a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    n = len(a)
    return [a[i] if i < n else b[i - n] for i in which.tolist()]


def _without_each(metric: Metric, labels: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> list[float]:
    """The difference of the metric with each row left out once."""
    found = []
    for out in range(len(labels)):
        y, x, z = ([*column[:out], *column[out + 1 :]] for column in (labels, a, b))
        found.append(metric(y, x) - metric(y, z))
    return found


# ------------------------------------------------------------------------------------------------------ seeds and rows


def two_level(
    a: Sequence[Sequence[float]],
    b: Sequence[Sequence[float]],
    *,
    method: Literal["anova", "bootstrap"] = "anova",
    resamples: int = DRAWS,
    seed: int = 0,
) -> Paired:
    """Mean of a − b over seeds and rows, for other seeds and other rows at once.

    a, b: [seed][row], a value of each row (1 or 0 for right or wrong), the same seeds and rows on both sides; its mean over rows
    is the score, so accuracy, but not Matthews.
    anova (default): seeds and rows as two crossed random factors; variance (MS_seed + MS_row − MS_rest) / (seeds · rows),
    never below that of one factor alone; p is that of its t, whose degrees of freedom are Satterthwaite's without the credit
    for adding two factors. From three seeds on. Too wide (98 %) where neither seeds nor rows differ by themselves.
    bootstrap: percentiles of means over resampled seeds × resampled rows, without a p. With 5 seeds it falls short of 95 %
    wherever seeds matter, as any bootstrap of 5 values does: offered for comparison.
    Undefined with fewer than two seeds or rows.
    Raises: DataError if a and b are not of one shape.
    """
    require_pairs("seeds", len(a), len(b))
    shapes = {len(row) for row in (*a, *b)}
    if len(shapes) > 1:
        raise DataError(
            "a two-level comparison needs the same rows in all seeds",
            got=f"{sorted(shapes)} rows",
            expected="one number of rows, in the same order",
            next="compare over the rows that all seeds have",
        )
    seeds, rows, name = len(a), next(iter(shapes), 0), f"two-level {method}"
    if seeds < 2 or rows < 2:
        why = f"it needs two seeds and two rows, not {seeds} and {rows}"
        return Paired(undefined(why, seeds), None, seeds * rows, "seeds and rows", name, note=why)
    values = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if not np.isfinite(values).all():
        why = f"{int((~np.isfinite(values)).sum())} values are no finite numbers"
        return Paired(undefined(why, seeds), None, values.size, "seeds and rows", name, note=why)
    mean, of_seeds = float(values.mean()), values.mean(1)
    std = float(of_seeds.std(ddof=1))
    if np.ptp(values) == 0:
        same = "all rows of all seeds differ by the same: the interval has no width"
        found = Estimate(mean, mean, mean, 0.0, seeds, same)
        return Paired(found, None if mean else 1.0, values.size, "seeds and rows", name, note=same)
    if method == "bootstrap":
        draw = np.random.default_rng(seed)
        by_seed = draw.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
        by_row = draw.multinomial(rows, np.full(rows, 1 / rows), resamples) / rows
        means = np.sum(by_seed @ values * by_row, axis=1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Paired(Estimate(mean, float(low), float(high), std, seeds), None, values.size, "seeds and rows", name)
    if seeds == 2:  # no degrees of freedom hold: up to 11 % false positives
        why = "two seeds: no interval and no test over seeds and rows"
        return Paired(Estimate(mean, None, None, std, 2, why), None, values.size, "seeds and rows", name, note=why)
    error, df = _crossed(values)
    from scipy.stats import t

    half, p = t_quantile(df) * error, 2 * float(t.sf(abs(mean) / error, df))
    return Paired(Estimate(mean, mean - half, mean + half, std, seeds), p, values.size, "seeds and rows", name)


def _crossed(values: Float[np.ndarray, "seed row"]) -> tuple[float, float]:
    """Standard error of the mean of [seed, row], and its degrees of freedom."""
    seeds, rows = values.shape
    mean, of_seeds, of_rows = values.mean(), values.mean(1), values.mean(0)
    ms_seed = rows * of_seeds.var(ddof=1)
    ms_row = seeds * of_rows.var(ddof=1)
    rest = values - of_seeds[:, None] - of_rows[None, :] + mean
    ms_rest = float((rest**2).sum()) / ((seeds - 1) * (rows - 1))
    # Never less than one factor alone: luck in the other may not make the error vanish.
    variance = max(ms_seed + ms_row - ms_rest, ms_seed, ms_row)
    spread = ms_seed**2 / (seeds - 1) + ms_row**2 / (rows - 1)
    # Satterthwaite has `variance` for the larger of the two: with few seeds that promises too much (6 % false positives with 3).
    df = max(ms_seed, ms_row) ** 2 / spread
    return math.sqrt(variance / (seeds * rows)), max(df, 1.0)


# ------------------------------------------------------------------------------------------------------------- families


def correct(p_values: Mapping[str, float | None], *, family: str, method: Literal["holm", "fdr_bh"] = "holm") -> Corrected:
    """The p-values of one family, corrected for their number; an undefined one stays None and does not count.

    family: what they share, in words ("good against random, retrained"); holm keeps the chance of any false positive below α,
    fdr_bh the expected share of them among those found. A family is what one sentence is drawn from: all tasks of a page.
    Raises: DataError for a p outside [0, 1].
    Source: Holm 1979; Benjamini and Hochberg 1995.
    """
    if wrong := {name: p for name, p in p_values.items() if p is not None and not 0 <= p <= 1}:
        raise DataError("p-values lie in [0, 1]", got=wrong, expected="a probability, or None where there is no test")
    known = {name: p for name, p in p_values.items() if p is not None}
    without = [name for name, p in p_values.items() if p is None]
    note = f"without a p: {', '.join(without)}" if without else ""
    if not known:
        return Corrected(family, method, dict(p_values), 0, note or "no tests")
    # Own code: statsmodels' collects all garbage at every call, half a second beside the rows of a whole study.
    holm, n, found = method == "holm", len(known), dict[str, float]()
    last = 0.0 if holm else 1.0
    for i, name in enumerate(sorted(known, key=lambda name: known[name], reverse=not holm)):
        last = max(last, min(1.0, known[name] * (n - i))) if holm else min(last, known[name] * n / (n - i))
        found[name] = last
    return Corrected(family, method, {name: found.get(name) for name in p_values}, len(known), note)


def _z() -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + LEVEL) / 2))
