"""Whether two similarities of the same things go together, tested by renaming the things."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from tombola.errors import DataError
from tombola.stats.chance import p_of
from tombola.stats.estimate import DRAWS

EXACT = 8  # things of which all orders are tried: 40,320


@dataclass(frozen=True, slots=True)
class Mantel:
    """Correlation of two similarity tables over the pairs of n things."""

    n: int
    r: float | None  # Pearson, over pairs
    p: float | None  # two-sided
    smallest_p: float | None  # that so many things can give
    note: str = ""


def mantel(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *, draws: int = DRAWS, seed: int = 0) -> Mantel:
    """Pearson's r of two symmetric tables over all pairs, and the chance of one as far from 0 when the things are renamed.

    The pairs of few things are not independent, so that the test of a correlation would not hold; renaming keeps what they owe to
    each other. All orders of up to 8 things, `draws` orders of more. Undefined for fewer than three things and constant tables.
    Raises: DataError when the tables are no symmetric tables of one size.
    Source: Mantel 1967.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape or x.shape[0] != x.shape[1] or not (np.allclose(x, x.T) and np.allclose(y, y.T)):
        got = f"tables of {' by '.join(map(str, x.shape))} and {' by '.join(map(str, y.shape))}"
        raise DataError("two tables of similarity do not fit together", got=got, expected="symmetric ones of the same things")
    n = len(x)
    above = np.triu_indices(n, 1)
    if n < 3:
        return Mantel(n, None, None, None, "fewer than three: one pair has no correlation")
    if np.ptp(x[above]) < 1e-12 or np.ptp(y[above]) < 1e-12:
        return Mantel(n, None, None, None, "all pairs are alike in one of the two")
    centred = x[above] - x[above].mean()

    def product(order: Sequence[int]) -> float:
        return float(centred @ y[np.ix_(order, order)][above])

    observed = product(range(n))
    r = observed / float(np.linalg.norm(centred) * np.linalg.norm(y[above] - y[above].mean()))
    if n <= EXACT:
        found = np.abs([product(order) for order in permutations(range(n))])
        slack = 1e-9 * max(1.0, abs(observed))
        p = float((found >= abs(observed) - slack).mean())
        return Mantel(n, r, p, 1 / math.factorial(n), "")
    drawn = np.random.default_rng(seed)
    found = np.abs([product(drawn.permutation(n).tolist()) for _ in range(draws)])
    return Mantel(n, r, p_of(found, abs(observed))[0], 1 / (draws + 1))
