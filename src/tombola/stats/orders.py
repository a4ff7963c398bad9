"""Whether two importances put the same parts first: rank correlation, and overlap that weighs the top more.

For heads by two reductions of the same gradients, by two criteria, or of two seeds. Higher score = more important = first.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tombola.errors import DataError
from tombola.stats.chance import p_of
from tombola.stats.estimate import DRAWS, LEVEL, Estimate, require_pairs, undefined

PERSISTENCE = 0.9  # of rank-biased overlap: the first ten ranks have 86 % of the weight


@dataclass(frozen=True, slots=True)
class Orders:
    """Two orders of the same n parts."""

    n: int
    spearman: Estimate  # in [-1, 1]
    p_spearman: float | None  # two-sided, that the orders have nothing to do with each other
    rbo: float | None  # in (0, 1]: 1 = the same order
    expected_rbo: float | None  # of two random orders
    p_rbo: float | None  # chance of overlapping this much or more
    note: str = ""


def compare_orders(
    a: Sequence[float], b: Sequence[float], *, persistence: float = PERSISTENCE, draws: int = DRAWS, seed: int = 0
) -> Orders:
    """Both measures of two importances of the same parts, each beside chance: random orders, drawn with `seed`.

    Undefined, and said so, where an importance is the same for all parts or no finite number: it gives no order.
    Raises: DataError if a and b are not equally long, or for a persistence outside (0, 1).
    """
    x, y = _scores(a, b, persistence)
    n, rho = len(x), spearman(a, b)
    if rho.value is None:
        return Orders(n, rho, None, None, None, None, rho.note)
    weights, rest = _weights(n, persistence)
    drawn = np.random.default_rng(seed)
    ranks_x, ranks_y = _ranks(x), _ranks(y)
    from scipy.stats import rankdata

    mean_x, mean_y = rankdata(x), rankdata(y)
    rbo_drawn, rho_drawn = np.empty(draws), np.empty(draws)
    for i in range(draws):
        order = drawn.permutation(n)
        rbo_drawn[i] = weights[np.maximum(ranks_x, ranks_y[order])].sum()
        rho_drawn[i] = mean_x @ mean_y[order]
    product, centre = float(mean_x @ mean_y), n * ((n + 1) / 2) ** 2
    p_rho, _ = p_of(np.abs(rho_drawn - centre), abs(product - centre))
    rbo = float(weights[np.maximum(ranks_x, ranks_y)].sum())
    expected = (1 - persistence) * sum(persistence ** (d - 1) * d / n for d in range(1, n + 1))
    return Orders(n, rho, p_rho, rbo + rest, expected + rest, p_of(rbo_drawn, rbo)[0], rho.note)


def spearman(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Spearman's rank correlation with the interval of Bonett and Wright (2000), over parts; ties get their mean rank.

    The interval is for parts as a sample of parts, one seed: `n_seeds` is 1. It is Fisher's z with variance
    (1 + rho² / 2) / (n − 3); None for fewer than four parts. Undefined where a or b is constant or not finite.
    Raises: DataError if a and b are not equally long.
    """
    x, y = _scores(a, b, PERSISTENCE)
    n = len(x)
    if n < 2:
        return undefined("no parts" if n == 0 else "one part has no order", 1)
    for scores in (x, y):
        if not np.isfinite(scores).all():
            return undefined("an importance is no finite number", 1)
        if np.ptp(scores) == 0:
            return undefined("an importance is the same for all parts: it gives no order", 1)
    from scipy.stats import norm, spearmanr

    rho = max(-1.0, min(1.0, float(spearmanr(x, y).statistic)))
    if n < 4:
        return Estimate(rho, None, None, None, 1, f"no interval over {n} parts")
    if abs(rho) > 1 - 1e-12:
        return Estimate(rho, None, None, None, 1, "the orders are the same or opposite: no interval")
    half = float(norm.ppf((1 + LEVEL) / 2)) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(rho) + way * half) for way in (-1, 1))
    return Estimate(rho, low, high, None, 1, f"Bonett-Wright interval over {n} parts")


def rank_biased_overlap(a: Sequence[float], b: Sequence[float], *, persistence: float = PERSISTENCE) -> float | None:
    """Rank-biased overlap of the orders that two importances give, in (0, 1]: 1 = the same; None for no parts.

    Mean over depths d = 1, 2, … of the share that both have among their first d, with weights (1 − p) p^(d−1): a reader who
    goes on to the next rank with chance p. Beyond the last part all is shared. Ties are broken by position, as masks do.
    Raises: DataError if a and b are not equally long, or for a persistence outside (0, 1).
    Source: Webber, Moffat and Zobel 2010, of two complete orders of the same items.
    """
    x, y = _scores(a, b, persistence)
    if not len(x):
        return None
    weights, rest = _weights(len(x), persistence)
    return float(weights[np.maximum(_ranks(x), _ranks(y))].sum()) + rest


def _scores(a: Sequence[float], b: Sequence[float], persistence: float) -> tuple[Float[np.ndarray, " part"], ...]:
    require_pairs("parts", len(a), len(b))
    if not 0 < persistence < 1:
        raise DataError("rank-biased overlap needs a persistence", got=persistence, expected="a number in (0, 1)")
    return np.asarray(a, dtype=np.float64).reshape(-1), np.asarray(b, dtype=np.float64).reshape(-1)


def _ranks(scores: Float[np.ndarray, " part"]) -> Int[np.ndarray, " part"]:
    """0 for the highest; of equal scores the first in position is first."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(len(scores))
    return ranks


def _weights(n: int, p: float) -> tuple[Float[np.ndarray, " rank"], float]:
    """What a part adds that both orders have within rank r at the latest, for each r; and the weight of depths beyond n."""
    depths = np.arange(1, n + 1)
    return np.cumsum(((1 - p) * p ** (depths - 1.0) / depths)[::-1])[::-1], p**n
