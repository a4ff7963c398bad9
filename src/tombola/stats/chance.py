"""What masks of given sizes do by chance: the laws that `masks` and `survivors` hold what they find against.

Everything here counts: how many components are kept by 0, 1, … of the seeds. Nothing depends on how many components there are,
so that ten million values take no longer than 144 heads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Num

from tombola.errors import DataError

Masks = Sequence[Any]  # each a flat sequence, array or tensor of bool over the same components; True = kept
Groups = Sequence[int]  # of each component its type, or its layer: sizes are held within each


def flat_masks(masks: Masks) -> list[Bool[np.ndarray, " component"]]:
    """The masks as flat arrays. Raises: DataError if they differ in length."""
    arrays = [np.asarray(mask, dtype=bool).reshape(-1) for mask in masks]
    if len(lengths := {len(mask) for mask in arrays}) > 1:
        raise DataError(
            "masks over different components cannot be rated together",
            got=f"lengths {sorted(lengths)}",
            expected="one length",
            next="compare tickets of one model only",
        )
    return arrays


def votes(masks: Sequence[Bool[np.ndarray, " component"]]) -> Int[np.ndarray, " component"]:
    """How many of the masks keep each component."""
    kept = np.zeros(len(masks[0]), dtype=np.int32)
    for mask in masks:
        kept += mask
    return kept


def grouped(masks: Sequence[Bool[np.ndarray, " component"]], groups: Groups | None) -> list[tuple[int, list[int]]]:
    """Of each group how many components it has, and how many of them each mask keeps. Without groups: one of all.

    Raises: DataError if there is not a group for each component.
    """
    n = len(masks[0])
    if groups is None:
        return [(n, [int(mask.sum()) for mask in masks])]
    of = np.asarray(groups)
    if of.shape != (n,):
        raise DataError("each component needs a group", got=f"{of.size} groups", expected=f"{n}, one a component")
    return [(int((of == one).sum()), [int(mask[of == one].sum()) for mask in masks]) for one in np.unique(of)]


def chance_counts(n: int, sizes: Sequence[int], draws: int, draw: np.random.Generator) -> Int[np.ndarray, "draw count"]:
    """How many of n components 0, 1, … of the masks keep, when each keeps its size at random, apart from the others.

    A mask after the other: of the components that j masks keep so far it takes a hypergeometric share.
    """
    counts = np.zeros((draws, len(sizes) + 1), dtype=np.int64)
    counts[:, 0] = n
    for done, size in enumerate(sizes):
        to_take, left = np.full(draws, size), np.full(draws, n)
        before = counts.copy()
        for j in range(done, -1, -1):
            left = left - before[:, j]
            taken = draw.hypergeometric(before[:, j], left, to_take) if j else to_take
            to_take = to_take - taken
            counts[:, j] -= taken
            counts[:, j + 1] += taken
    return counts


def chance_totals(counts: Int[np.ndarray, " count"], draws: int, draw: np.random.Generator) -> Int[np.ndarray, "draw seed"]:
    """How much each seed keeps, when every component is kept as often as it is, by seeds drawn at random.

    counts: how many components 0, 1, … of the seeds keep. A seed after the other: a component with j keeps left to give to r
    seeds gives one to this seed with chance j / r.
    """
    seeds = len(counts) - 1
    left, totals = np.repeat(counts[None].astype(np.int64), draws, axis=0), np.zeros((draws, seeds), dtype=np.int64)
    for seed in range(seeds):
        given = draw.binomial(left, np.minimum(1.0, np.arange(seeds + 1) / (seeds - seed)))
        totals[:, seed] = given.sum(1)
        left = left - given
        left[:, :-1] += given[:, 1:]
    return totals


def p_of(drawn: Num[np.ndarray, " draw"], observed: float) -> tuple[float, float]:
    """Chance of this much or more, and of this much or less; the observed counts as one of the draws, so that neither is 0.

    Values that differ by rounding are the same value.
    """
    slack = 1e-9 * max(1.0, abs(observed))
    many = len(drawn) + 1
    return (1 + int((drawn >= observed - slack).sum())) / many, (1 + int((drawn <= observed + slack).sum())) / many
