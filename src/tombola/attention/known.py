"""A generator of attention maps whose class is known, because each is drawn as that class.

A map is a sum of parts (bands, columns, blocks, pieces) over an uneven background, with its rows brought to sum 1 and, half of
the time, its columns scaled as norms would scale them. Which parts a class has follows the guide in docs/attention-patterns.md:
a `mix` has a whole band and whole columns; in `other` there may be pieces of both, never a whole one.

Order of reading: `CLASSES`, `known_map`, the table `_DRAW`, the parts.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tombola.errors import DataError

CLASSES = ("diagonal", "vertical", "mix", "block", "other")
SMALLEST, LARGEST = 8, 64  # tokens of a generated map

Rng = np.random.Generator
Grid = NDArray[np.float64]


def known_maps(n: int, seed: int, size: int | None = None) -> tuple[list[Tensor], list[int]]:
    """n maps and their classes, in turn one of each; of `size` tokens, or of sizes drawn between SMALLEST and LARGEST.

    The same seed gives the same maps, the first k of n being those of n = k.
    Raises: DataError for a size below SMALLEST, in which a block and a column are the same thing.
    """
    if size is not None and size < SMALLEST:
        raise DataError("a map of so few tokens has no class to be seen", got=size, expected=f"{SMALLEST} tokens or more")
    rng = np.random.default_rng(seed)
    labels = [i % len(CLASSES) for i in range(n)]
    return [known_map(label, some_size(rng) if size is None else size, rng) for label in labels], labels


def known_map(label: int, size: int, rng: Rng) -> Float[Tensor, "query key"]:
    """One map of a class, as a position in CLASSES."""
    strength = 10 ** rng.uniform(-0.3, 0.7)
    shape = rng.uniform(1.2, 20)  # of the grain in what is drawn: from hardly to very uneven
    grain = rng.gamma(shape, 1 / shape, (size, size))
    drawn = strength * grain * _DRAW[CLASSES[label]](size, rng) + _background(size, rng)
    if CLASSES[label] != "block" and rng.random() < 0.1:  # a decoder sees no later token
        drawn = np.tril(drawn) + 1e-6 * np.eye(size)
    rows = drawn / drawn.sum(1, keepdims=True)
    if rng.random() < 0.5:
        rows = rows * np.exp(rng.normal(0, 0.25, size))
    if rng.random() < 0.5:  # what is given to [CLS] by the first token itself
        rows[0] *= rng.uniform(0.3, 1)
    return torch.from_numpy(rows).float()


def some_size(rng: Rng, largest: int = LARGEST) -> int:
    """Tokens of a map: small and large ones equally often, by their logarithm."""
    return round(float(np.exp(rng.uniform(np.log(SMALLEST), np.log(largest)))))


# ---------------------------------------------------------------------------------------------------------------- parts


def _background(n: int, rng: Rng) -> Grid:
    """Grey with grain: even, or different from column to column and from row to row."""
    grain = rng.gamma(rng.uniform(0.3, 4), size=(n, n))
    columns = np.exp(rng.normal(0, rng.choice([0, 0.2, 0.4]), n))
    rows = np.exp(rng.normal(0, rng.choice([0, 0.3]), (n, 1)))
    faint: Grid = grain / grain.mean() * columns * rows * rng.uniform(0.2, 1.2) / n
    return faint


def _band(n: int, rng: Rng) -> Grid:
    """A whole band: narrow or broad, with rows of uneven strength and at most a few gaps."""
    offset, width = rng.integers(-2, 3), rng.uniform(0.25, max(0.3, 0.06 * n))
    distance = np.arange(n)[None, :] - np.arange(n)[:, None] - offset
    if rng.random() < 0.3:  # on one side only
        distance = np.where(distance * rng.choice([-1, 1]) > 0, 3 * distance, distance)
    band = np.exp(-0.5 * (distance / width) ** 2)
    return band * _uneven(n, rng) * _jitter(n, rng)


def _columns(n: int, rng: Rng) -> Grid:
    """One to five columns from top to bottom; often the first or the last, [CLS] and [SEP]."""
    k = int(rng.choice([1, 1, 2, 2, 3, 4, 5]))
    chosen = set(rng.choice(n, min(k, n // 3), replace=False).tolist())
    if rng.random() < 0.5:
        chosen = (chosen if k > 1 else set[int]()) | {int(rng.choice([0, 0, n - 1]))}
    weights = np.zeros(n)
    weights[list(chosen)] = rng.uniform(0.35, 1, len(chosen))
    if rng.random() < 0.3:  # one leads, the others are grey
        weights[rng.choice(list(chosen))] = rng.uniform(1, 3)
    return weights[None, :] * _uneven(n, rng) * _jitter(n, rng)


def _blocks(n: int, rng: Rng) -> Grid:
    """Two texts: each attends to itself, or to the other one, or one does more than the other; never evenly to both."""
    cut, grid = round(n * rng.uniform(0.3, 0.7)), np.zeros((n, n))
    levels = [rng.uniform(0.6, 1), rng.uniform(0.3, 1)]
    corners = [(slice(0, cut), slice(0, cut)), (slice(cut, n), slice(cut, n))]
    if rng.random() < 0.25:
        corners = [(slice(0, cut), slice(cut, n)), (slice(cut, n), slice(0, cut))]
    for corner, level in zip(corners, levels, strict=True):
        grid[corner] = level
    grain = rng.gamma(rng.uniform(3, 12), size=(n, n))
    columns = np.exp(rng.normal(0, rng.choice([0.1, 0.3, 0.5]), n))
    block: Grid = grid * grain / grain.mean() * columns * 4 / n
    if rng.random() < 0.4:  # [CLS] beside it
        block[:, 0] += rng.uniform(0.1, 0.4) * _uneven(n, rng)[:, 0] * block.max()
    return block


def _pieces(n: int, rng: Rng) -> Grid:
    """Nothing whole: single cells, short columns, short pieces of a band, rows with targets of their own, one soft cloud."""
    grid = np.zeros((n, n))
    kinds = rng.random(5) < (0.6, 0.5, 0.35, 0.3, 0.35)
    if kinds[0]:
        grid += rng.random((n, n)) ** rng.uniform(6, 25)
    if kinds[1]:
        for _ in range(rng.integers(1, 5)):
            length = int(rng.integers(2, max(3, int(0.4 * n))))
            start = rng.integers(0, n - length + 1)
            grid[start : start + length, rng.integers(n)] += rng.uniform(0.3, 1) * _jitter(length, rng)[:, 0]
    if kinds[2]:
        for _ in range(rng.integers(1, 3)):
            at = rng.integers(0, n) + np.arange(int(rng.integers(2, max(3, n // 4))))
            there, to = at[at < n], (at + rng.integers(-n // 2, n // 2))[at < n]
            inside = (to >= 0) & (to < n)
            grid[there[inside], to[inside]] += rng.uniform(0.3, 1)
    if kinds[3]:
        for row in rng.choice(n, int(rng.integers(1, max(2, n // 3))), replace=False):
            grid[row] += rng.uniform(0.1, 0.6) * (rng.random(n) < rng.uniform(0.2, 1))
    if kinds[4]:
        y, x, spread = rng.uniform(0, n), rng.uniform(0, n), rng.uniform(0.08, 0.2) * n
        cloud = np.exp(-0.5 * ((np.arange(n)[:, None] - y) ** 2 + (np.arange(n)[None, :] - x) ** 2) / spread**2)
        grid += rng.uniform(0.3, 1) * cloud * rng.gamma(2, 0.5, (n, n))
    pieces: Grid = grid * rng.choice([0.2, 0.5, 1])
    return pieces


def _mix(n: int, rng: Rng) -> Grid:
    share = rng.uniform(0.25, 0.75)
    return share * _band(n, rng) + (1 - share) * _columns(n, rng)


_DRAW: dict[str, Callable[[int, Rng], Grid]] = {
    "diagonal": _band,
    "vertical": _columns,
    "mix": _mix,
    "block": _blocks,
    "other": _pieces,
}


def _uneven(n: int, rng: Rng) -> Grid:
    """[row, 1]: rows of different strength; sometimes every few rows a weak one."""
    strength = rng.uniform(rng.choice([0.2, 0.5, 0.8]), 1, (n, 1))
    return np.where(rng.random((n, 1)) < rng.choice([0, 0.1, 0.3]), 0.1 * strength, strength)


def _jitter(n: int, rng: Rng) -> Grid:
    """[row, 1] around 1."""
    return np.exp(rng.normal(0, rng.choice([0.05, 0.3]), (n, 1)))
