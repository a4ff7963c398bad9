"""What n seeds and n rows can show at all: the smallest p, and the smallest difference found four times out of five.

Each is a limit of the sample, known before anything is measured. A difference below it that was not found is no evidence of
equality.
"""

import math

import numpy as np

from tombola.errors import DataError
from tombola.stats.estimate import ALPHA, POWER


def smallest_two_sided_p(n: int) -> float:
    """Smallest two-sided p in (0, 1] that a sign-flip or Wilcoxon signed-rank test over n paired seeds can give.

    All n differences have one sign: 2 of the 2**n equally likely patterns are that extreme. Below .05 from n = 6 on.
    Raises: DataError if n is not positive.
    """
    if n < 1:
        raise DataError("a paired test needs seeds", got=f"n = {n}", expected="n >= 1", next="run more seeds")
    return 2.0 / 2.0**n


def smallest_detectable_difference(p: float, n: int, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest difference between a score p and another, both shares of right answers in n rows, that n rows can show.

    "Show" is a two-sided test at `alpha` with this power, on the scale 2*asin(sqrt(p)), where the standard error is 1/sqrt(n)
    at any p; the larger of the steps up and down. The two sets of answers are taken as independent: for models that
    agree on most rows a paired test can show less, see `smallest_paired_difference`. None if no difference is large enough.
    Raises: DataError if p is outside [0, 1] or n is not positive; for alpha or power outside (0, 1).
    Source: Cohen 1988, ch. 6 (effect size h).
    """
    _require_rates(alpha, power)
    if not 0 <= p <= 1 or n < 1:
        raise DataError(
            "no detectable difference can be given",
            got=f"p = {p}, n = {n}",
            expected="a share of right answers in [0, 1] and n >= 1 rows",
            next="ask for it only where the metric is such a share, as accuracy is",
        )
    from scipy.stats import norm

    step = float(norm.ppf(1 - alpha / 2) + norm.ppf(power)) * math.sqrt(2 / n) / 2  # h / 2
    angle = math.asin(math.sqrt(p))
    others = [math.sin(other) ** 2 for other in (angle - step, angle + step) if 0 <= other <= math.pi / 2]
    return max((abs(p - other) for other in others), default=None)


def smallest_paired_difference(n: int, disagreement: float, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest difference in shares of right answers that the exact McNemar test over n rows can show.

    disagreement: share of rows that only one of the two models gets right, in [0, 1]; the difference cannot be larger. None if
    not even that, all such rows won by one model, would be shown.
    The power is that of the exact test, summed over how many rows disagree: no approximation.
    Raises: DataError if disagreement is outside [0, 1] or n is not positive; for alpha or power outside (0, 1).
    """
    _require_rates(alpha, power)
    if not 0 <= disagreement <= 1 or n < 1:
        raise DataError(
            "no detectable difference can be given",
            got=f"disagreement = {disagreement}, n = {n}",
            expected="a share of rows in [0, 1] and n >= 1 rows",
            next="take the share of rows that exactly one of the two models gets right",
        )
    from scipy.stats import binom

    counts = np.arange(int(binom.ppf(1e-9, n, disagreement)), int(binom.isf(1e-9, n, disagreement)) + 1)
    likely = binom.pmf(counts, n, disagreement)
    # The largest count of wins of the weaker model at which the exact two-sided test still says "different"; −1 for none.
    weaker = binom.ppf(alpha / 2, counts, 0.5).astype(int)
    weaker = np.where(2 * binom.cdf(weaker, counts, 0.5) <= alpha, weaker, weaker - 1)

    def found(difference: float) -> float:
        share = (disagreement - difference) / (2 * disagreement)  # of the disagreeing rows that the weaker model wins
        shown = binom.cdf(weaker, counts, share) + binom.sf(counts - weaker - 1, counts, share)
        return float(np.sum(likely * np.where(weaker >= 0, shown, 0.0)))

    if disagreement == 0 or found(disagreement) < power:
        return None
    from scipy.optimize import brentq

    return float(brentq(lambda difference: found(difference) - power, 0.0, disagreement, xtol=1e-6))


def smallest_difference_over_seeds(n: int, std: float, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Smallest mean difference that a paired t test over n seeds can show, in the unit of `std`.

    std: of the differences within a seed (n − 1). None with one seed. With n = 5 it takes 1.7 std, with n = 10 one.
    Raises: DataError if n is not positive, std is negative or no number; for alpha or power outside (0, 1).
    """
    _require_rates(alpha, power)
    if n < 1 or not 0 <= std < math.inf:
        raise DataError(
            "no detectable difference can be given",
            got=f"n = {n}, std = {std}",
            expected="n >= 1 seeds and a standard deviation",
            next="take the std of the differences within a seed, from two seeds on",
        )
    if n == 1:
        return None
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    limit = float(t.ppf(1 - alpha / 2, n - 1))
    # The other tail adds nothing that counts where the power is asked for; leaving it out errs to the careful side.
    shift = brentq(lambda shift: float(nct.sf(limit, n - 1, shift)) - power, 0.0, 20 * limit + 20, xtol=1e-9)
    return float(shift) / math.sqrt(n) * std


def _require_rates(alpha: float, power: float) -> None:
    if not (0 < alpha < 1 and alpha < power < 1):
        raise DataError(
            "no test has these rates",
            got=f"alpha = {alpha}, power = {power}",
            expected="0 < alpha < power < 1",
            next="usual are alpha = .05 and power = .8",
        )
