"""What survives over seeds: components that seeds do not agree on, and whether survivors go with a kind of attention map.

The survivors of all seeds and their controls are masks, and made in `tombola.search.supers`.

Source: Prasanna et al. 2020, sec. 4.2 and App. E.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from tombola.errors import DataError
from tombola.stats.chance import Groups, Masks, chance_counts, flat_masks, grouped, p_of, votes
from tombola.stats.estimate import DRAWS, LEVEL, Estimate, over_rows, undefined

BAND = (0.45, 0.55)  # of the std of survival: with five seeds, kept by two or three of them


@dataclass(frozen=True, slots=True)
class Undecided:
    """Components whose survival differs most over seeds, beside how many masks of these sizes would have by chance.

    With half of the components kept by five seeds, chance alone gives 62.5 %: a large share is no finding by itself.
    """

    share: Estimate  # Wilson interval, components taken as independent
    counts: tuple[int, ...]  # kept by this many seeds: then the std is within the band
    expected: float | None  # mean share of random masks of these sizes
    p_at_least: float | None  # chance of such a share or a larger one
    p_at_most: float | None
    n: int  # components
    n_seeds: int
    note: str = ""


def undecided(
    masks: Masks, *, band: tuple[float, float] = BAND, groups: Groups | None = None, draws: int = DRAWS, seed: int = 0
) -> Undecided:
    """Share of components whose survival over seeds has a sample std (n − 1) within the band.

    `groups` as in `stability`. Undefined where no count of so many seeds has such a std (2 and 3 seeds: a split has .71 or .58),
    and with a note where an even split is outside the band (4 seeds).
    Raises: DataError if the masks differ in length, or for groups that are not one a component.
    """
    arrays = flat_masks(masks)
    seeds, n = len(arrays), len(arrays[0]) if arrays else 0
    spread = [math.sqrt(k * (seeds - k) / (seeds * (seeds - 1))) if seeds > 1 else 0.0 for k in range(seeds + 1)]
    counts = tuple(k for k, std in enumerate(spread) if band[0] <= std <= band[1])
    if not counts or not n:
        why = f"no split of {seeds} seeds has a std of {band[0]:g} to {band[1]:g}" if n or not seeds else "no components"
        return Undecided(undefined(why, seeds), counts, None, None, None, n, seeds, why)
    found = int(np.isin(votes(arrays), counts).sum())
    share = over_rows(found, n)
    share = Estimate(share.value, share.low, share.high, None, seeds, f"Wilson interval over {n} components")
    draw = np.random.default_rng(seed)
    drawn = np.sum([chance_counts(of, sizes, draws, draw)[:, list(counts)] for of, sizes in grouped(arrays, groups)], axis=(0, 2))
    at_least, at_most = p_of(drawn, float(found))
    note = "" if seeds // 2 in counts else f"with {seeds} seeds an even split has a std outside the band"
    return Undecided(share, counts, float(np.mean(drawn)) / n, at_least, at_most, n, seeds, note)


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
    found = r(_cluster_draws(len(numbers), seed) @ of_cluster)
    found = found[np.isfinite(found)]
    low, high = (float(q) for q in np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    lost = f"; {10_000 - len(found)} of 10,000 draws had no r" if len(found) < 10_000 else ""
    return Estimate(value, low, high, None, 1, f"{n} pairs of {len(numbers)} heads, drawn by head{lost}")


@lru_cache(maxsize=2)
def _cluster_draws(n: int, seed: int) -> Float[np.ndarray, "draw cluster"]:
    """How often each of n clusters comes in 10,000 draws of n: a page asks for the same ones for every model of a size."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=10_000).astype(np.float64)
