"""Variance split among crossed factors: against the mean squares of an analysis of variance, and against what was put in."""

from itertools import product

import numpy as np
import pytest

from tombola.errors import DataError
from tombola.stats import split_variance

FACTORS = ("head", "data", "dropout")


def differences(values: np.ndarray) -> np.ndarray:
    """[run, run] from [run, component]."""
    return ((values[:, None] - values[None]) ** 2).mean(-1)


def by_mean_squares(grid: np.ndarray) -> dict[tuple[str, ...], float]:
    """Expected mean squares of a random three-way design [a, b, c, component], solved by hand, mean over components."""
    a, b, c = grid.shape[:3]
    over = lambda *axes: grid.mean(axis=axes, keepdims=True)  # noqa: E731
    mean = over(0, 1, 2)
    main = {"a": over(1, 2) - mean, "b": over(0, 2) - mean, "c": over(0, 1) - mean}
    two = {
        "ab": over(2) - main["a"] - main["b"] - mean,
        "ac": over(1) - main["a"] - main["c"] - mean,
        "bc": over(0) - main["b"] - main["c"] - mean,
    }
    three = grid - mean - sum(main.values()) - sum(two.values())

    def mean_square(effect: np.ndarray, times: int, df: int) -> np.ndarray:
        return times * (effect**2).sum(axis=(0, 1, 2)) / df

    ms = {"a": mean_square(main["a"], b * c, a - 1), "b": mean_square(main["b"], a * c, b - 1)}
    ms |= {"c": mean_square(main["c"], a * b, c - 1), "ab": mean_square(two["ab"], c, (a - 1) * (b - 1))}
    ms |= {"ac": mean_square(two["ac"], b, (a - 1) * (c - 1)), "bc": mean_square(two["bc"], a, (b - 1) * (c - 1))}
    e = mean_square(three, 1, (a - 1) * (b - 1) * (c - 1))
    solved = {
        ("head",): (ms["a"] - ms["ab"] - ms["ac"] + e) / (b * c),
        ("data",): (ms["b"] - ms["ab"] - ms["bc"] + e) / (a * c),
        ("dropout",): (ms["c"] - ms["ac"] - ms["bc"] + e) / (a * b),
        ("head", "data"): (ms["ab"] - e) / c,
        ("head", "dropout"): (ms["ac"] - e) / b,
        ("data", "dropout"): (ms["bc"] - e) / a,
        FACTORS: e,
    }
    return {name: float(value.mean()) for name, value in solved.items()}


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 3, 2), (4, 3, 2)])
def test_it_is_the_analysis_of_variance(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    grid = rng.random((*shape, 30)) < rng.random(30)
    runs = list(product(*map(range, shape)))
    found = split_variance(FACTORS, runs, differences(grid.reshape(-1, 30).astype(float)))
    assert found.variance == pytest.approx(by_mean_squares(grid.astype(float)), abs=1e-12)
    assert sum(one for one in found.share.values() if one is not None) == pytest.approx(1.0)
    assert found.levels == shape


def test_masks_that_follow_one_factor_alone_are_said_to() -> None:
    runs = list(product((7, 8), repeat=3))
    masks = np.array([[(run[1] == 7) ^ (i % 3 == 0) for i in range(12)] for run in runs], dtype=float)
    found = split_variance(FACTORS, runs, differences(masks))
    assert found.total == 0.5 and found.difference[()] == 1.0 and found.difference["head", "dropout"] == 1.0
    assert found.share["data",] == 1.0 and found.alone == {"head": 0.0, "data": 1.0, "dropout": 0.0}
    assert {value for name, value in found.share.items() if name != ("data",)} == {0.0}


def test_variances_that_were_put_in_come_out() -> None:
    """Unbiased: many components with known effects; the mean over draws of the levels is what was put in."""
    rng, put_in = np.random.default_rng(0), {("head",): 0.5, ("data",): 2.0, ("head", "dropout"): 1.0, FACTORS: 0.25}
    found = []
    for _ in range(60):
        grid = np.zeros((3, 3, 3, 200))
        for name, variance in put_in.items():
            shape = [3 if factor in name else 1 for factor in FACTORS]
            grid += np.sqrt(variance) * rng.normal(size=(*shape, 200))
        found.append(split_variance(FACTORS, list(product(range(3), repeat=3)), differences(grid.reshape(27, 200))).variance)
    for name in found[0]:
        values = [one[name] for one in found]
        error = np.std(values) / np.sqrt(len(values))
        assert np.mean(values) == pytest.approx(put_in.get(name, 0.0), abs=max(4 * error, 1e-9)), name


def test_runs_that_are_all_the_same_have_nothing_to_split_and_gaps_are_refused() -> None:
    runs = list(product((0, 1), repeat=3))
    found = split_variance(FACTORS, runs, np.zeros((8, 8)))
    assert found.total == 0 and set(found.share.values()) == {None} and "the same" in found.note
    for wrong in (runs[:-1], [*runs[:-1], runs[0]], [(0, 0, 0)] * 8, []):
        with pytest.raises(DataError, match="no crossed design"):
            split_variance(FACTORS, wrong, np.zeros((len(wrong), len(wrong))))
