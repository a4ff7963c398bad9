"""Paired tests and what samples can show, against enumeration, other libraries and worked cases."""

import math
import random
import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tombola.errors import DataError
from tombola.stats import (
    correct,
    mcnemar,
    mcnemar_of_counts,
    over_seeds,
    paired_over_rows,
    paired_over_seeds,
    smallest_detectable_difference,
    smallest_difference_over_seeds,
    smallest_paired_difference,
    two_level,
)

NAN = float("nan")


def accuracy(labels: list[int], answers: list[int]) -> float:
    return sum(a == b for a, b in zip(labels, answers, strict=True)) / len(labels)


# over seeds


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=7))
def test_p_over_seeds_counts_the_patterns_of_signs_that_are_as_extreme(pairs: list[tuple[int, int]]) -> None:
    a, b = ([value / 8 for value in side] for side in zip(*pairs, strict=True))  # eighths: sums are exact
    differences = [x - y for x, y in zip(a, b, strict=True)]
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((-1, 1), repeat=len(pairs))]
    found = paired_over_seeds(a, b)
    assert found.p == pytest.approx(sum(one >= abs(sum(differences)) for one in sums) / len(sums))
    assert found.difference == over_seeds(differences)
    assert found.smallest_p <= found.p


def test_five_seeds_are_said_not_to_reach_alpha_and_six_do() -> None:
    five = paired_over_seeds([0.9] * 5, [0.8, 0.7, 0.6, 0.5, 0.4])
    assert (five.p, five.smallest_p, five.can_reach) == (0.0625, 0.0625, False)
    assert five.note == "n = 5 cannot give p < 0.05: the smallest two-sided p is 0.0625"
    assert five.text.startswith("0.300 (0.104 to 0.496), p = 0.062 (exact sign-flip test, 5 seeds); n = 5 cannot")
    six = paired_over_seeds([0.9] * 6, [0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert (six.p, six.can_reach, six.note) == (0.03125, True, "")


def test_one_seed_none_and_broken_ones_have_reasons() -> None:
    one = paired_over_seeds([0.9], [0.8])
    assert (one.p, one.can_reach) == (1.0, False)
    none = paired_over_seeds([], [])
    assert (none.p, none.note, none.text) == (None, "no seeds", "undefined, because no seeds")
    assert paired_over_seeds([NAN, 1.0], [0.5, 0.5]).text == "undefined, because 1 of 2 seeds gave no finite number"
    with pytest.raises(DataError, match=r"same seeds on both sides[\s\S]*2 and 1 seeds"):
        paired_over_seeds([0.1, 0.2], [0.1])


def test_many_seeds_are_drawn_and_close_to_the_t_test() -> None:
    from scipy.stats import ttest_rel

    draw = random.Random(1)
    b = [draw.gauss(0.7, 0.05) for _ in range(30)]
    a = [value + draw.gauss(0.01, 0.03) for value in b]
    found = paired_over_seeds(a, b)
    assert found.test == "sign-flip test, 9,999 draws"
    assert found.p == pytest.approx(float(ttest_rel(a, b).pvalue), abs=0.02)
    assert found == paired_over_seeds(a, b)


# over rows


def test_mcnemar_reads_the_rows_that_only_one_model_has_right() -> None:
    a = [True] * 12 + [False] * 3 + [True] * 60 + [False] * 25
    b = [False] * 12 + [True] * 3 + [True] * 60 + [False] * 25
    found = mcnemar(a, b)
    assert found == mcnemar_of_counts(12, 3, 100)
    assert found.difference.value == pytest.approx(0.09)
    assert found.p == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    # Bonett and Price: (13 − 4) / 102 ± 1.96 sqrt((17 / 102 − (9 / 102)²) / 102)
    half = 1.959964 * math.sqrt((17 / 102 - (9 / 102) ** 2) / 102)
    assert found.difference.low == pytest.approx(9 / 102 - half, abs=1e-6)
    assert found.difference.high == pytest.approx(9 / 102 + half, abs=1e-6)
    assert found.smallest_p == 2 / 2**15


def test_mcnemar_says_when_too_few_rows_disagree() -> None:
    few = mcnemar_of_counts(5, 0, 400)
    assert (few.p, few.can_reach) == (0.0625, False)
    assert few.note == "the models disagree on 5 rows only, too few for p < 0.05"
    assert mcnemar_of_counts(0, 0, 50).p == 1.0
    assert mcnemar([], []).text == "undefined, because no rows"
    with pytest.raises(DataError, match="11 of 10"):
        mcnemar_of_counts(6, 5, 10)


def test_p_over_rows_is_that_of_every_exchange_of_answers() -> None:
    labels, a, b = [1, 0, 1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 0, 0, 1], [0, 0, 1, 0, 1, 1, 0, 0]
    found = paired_over_rows(accuracy, labels, a, b, resamples=999)
    both = list(zip(a, b, strict=True))
    swapped = [
        accuracy(labels, [pair[s] for s, pair in zip(swap, both, strict=True)])
        - accuracy(labels, [pair[1 - s] for s, pair in zip(swap, both, strict=True)])
        for swap in product((0, 1), repeat=8)
    ]
    observed = accuracy(labels, a) - accuracy(labels, b)
    assert found.difference.value == pytest.approx(observed)
    assert found.p == pytest.approx(sum(abs(one) >= abs(observed) - 1e-9 for one in swapped) / 256)  # 256 fit into 999: all
    assert found.p == pytest.approx(mcnemar([x == y for x, y in zip(labels, a, strict=True)],
                                            [x == y for x, y in zip(labels, b, strict=True)]).p)  # fmt: skip


def test_interval_over_rows_is_close_to_the_one_of_accuracy_that_has_a_formula() -> None:
    draw = random.Random(0)
    labels = [draw.randrange(2) for _ in range(300)]
    a = [y if draw.random() < 0.85 else 1 - y for y in labels]
    b = [y if draw.random() < 0.75 else 1 - y for y in labels]
    found = paired_over_rows(accuracy, labels, a, b)
    formula = mcnemar([x == y for x, y in zip(labels, a, strict=True)], [x == y for x, y in zip(labels, b, strict=True)])
    assert found.difference.low == pytest.approx(formula.difference.low, abs=0.012)
    assert found.difference.high == pytest.approx(formula.difference.high, abs=0.012)
    assert found.p == pytest.approx(formula.p, abs=0.05)  # three standard errors of 999 draws
    assert found.difference.note == "jackknife over 300 rows of one seed"
    assert found == paired_over_rows(accuracy, labels, a, b)


def test_answers_may_be_of_any_kind_and_same_answers_have_no_width() -> None:
    names = ["yes", "no", "yes"]
    same = paired_over_rows(lambda y, x: accuracy(y, x), names, names, list(names))
    assert (same.p, same.difference.low, same.difference.high) == (1.0, 0.0, 0.0)
    assert same.note == "the two models give the same answers to all rows"


def test_a_metric_without_a_value_gives_reasons_and_no_nan() -> None:
    def share_of_ones_right(labels: list[int], answers: list[int]) -> float:
        ones = [x == y for x, y in zip(labels, answers, strict=True) if y == 1]
        return sum(ones) / len(ones) if ones else NAN

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nowhere = paired_over_rows(lambda y, x: share_of_ones_right(y, x), [0, 0, 1], [0, 0, 1], [0, 0, 0], resamples=99)
        sometimes = paired_over_rows(
            lambda y, x: share_of_ones_right(y, x), [0, 1, 1, 0, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0], resamples=99
        )
    assert nowhere.text == "undefined, because the metric of one model is no finite number"
    assert sometimes.difference.value == pytest.approx(1.0)
    assert (sometimes.difference.low, sometimes.p) == (None, None)
    assert sometimes.difference.note == "no interval: the metric is undefined when a row is left out"
    assert sometimes.note == "the metric is undefined for some exchanges of answers"
    assert paired_over_rows(accuracy, [1], [1], [0]).note == "one row"


# seeds and rows


def test_without_rows_that_differ_the_two_level_interval_is_that_over_seeds() -> None:
    of_seeds = [0.10, 0.30, 0.20, 0.25]
    values = [[value + noise for noise in (0.001, -0.001, 0.0)] for value in of_seeds]  # rows hardly differ
    found, seeds = two_level(values, [[0.0] * 3] * 4), over_seeds(of_seeds)
    assert found.difference.value == pytest.approx(seeds.value)
    assert found.difference.std == pytest.approx(seeds.std)
    assert found.difference.low == pytest.approx(seeds.low, abs=1e-3)
    assert found.difference.high == pytest.approx(seeds.high, abs=1e-3)


def test_without_seeds_that_differ_the_two_level_interval_is_that_over_rows() -> None:
    draw = random.Random(2)
    rows = [draw.choice((0.0, 0.0, 1.0)) for _ in range(200)]
    found = two_level([rows, rows, rows], [[0.0] * 200] * 3)
    half = 1.971957 * float(np.std(rows, ddof=1)) / math.sqrt(200)  # t with 199 degrees of freedom
    assert found.difference.low == pytest.approx(sum(rows) / 200 - half, abs=1e-4)
    bootstrap = two_level([rows, rows, rows], [[0.0] * 200] * 3, method="bootstrap")
    assert bootstrap.difference.low == pytest.approx(found.difference.low, abs=0.01)
    assert bootstrap.p is None


def test_the_two_level_variance_is_that_of_statsmodels_anova() -> None:
    import pandas
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    draw = np.random.default_rng(0)
    values = draw.normal(0, 3, (4, 1)) + draw.normal(0, 0.3, (1, 30)) + draw.normal(0.1, 0.3, (4, 30))
    frame = pandas.DataFrame([(s, r, values[s, r]) for s in range(4) for r in range(30)], columns=["seed", "row", "x"])
    ms = anova_lm(ols("x ~ C(seed) + C(row)", frame).fit())["mean_sq"]
    error = math.sqrt((ms["C(seed)"] + ms["C(row)"] - ms["Residual"]) / 120)
    assert ms["C(seed)"] > 50 * ms["C(row)"]  # so its degrees of freedom are 3, all but a ten-thousandth
    found = two_level(values.tolist(), np.zeros((4, 30)).tolist()).difference
    assert found.high - found.low == pytest.approx(2 * 3.182446 * error, rel=1e-3)


def test_two_level_needs_two_of_each_the_same_rows_and_finite_values() -> None:
    assert two_level([[1.0, 0.0]], [[0.0, 0.0]]).text == "undefined, because it needs two seeds and two rows, not 1 and 2"
    assert two_level([], []).p is None
    two = two_level([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], [[0.0] * 3] * 2)
    assert (two.difference.value, two.difference.low, two.p) == (pytest.approx(2 / 3), None, None)
    assert two.note == "two seeds: no interval and no test over seeds and rows"
    same = two_level([[1.0, 1.0]] * 2, [[0.5, 0.5]] * 2)
    assert (same.difference.low, same.p, same.difference.note[:8]) == (0.5, None, "all rows")
    assert "1 values are no finite numbers" in two_level([[NAN, 1.0]] * 1 + [[0.0, 1.0]], [[0.0, 0.0]] * 2).text
    with pytest.raises(DataError, match="same rows in all seeds"):
        two_level([[1.0, 0.0], [1.0]], [[1.0, 0.0], [1.0]])


# families


@settings(max_examples=25)  # statsmodels takes a tenth of a second for each
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_multiplies_the_sorted_p_by_what_is_left_and_never_falls(p: list[float]) -> None:
    found = correct({f"task {i}": one for i, one in enumerate(p)}, family="good against random")
    order = sorted(range(len(p)), key=lambda i: p[i])
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - place) * p[i]))
        assert found.p[f"task {i}"] == pytest.approx(largest)


def test_a_test_without_p_is_named_and_not_counted() -> None:
    found = correct({"MNLI": 0.02, "WNLI": None, "RTE": 0.04}, family="good against random, retrained")
    assert found.p == {"MNLI": pytest.approx(0.04), "WNLI": None, "RTE": pytest.approx(0.04)}
    assert (found.n, found.shown, found.note) == (2, ("MNLI", "RTE"), "without a p: WNLI")
    rates = correct({"a": 0.01, "b": 0.04, "c": 0.03}, family="x", method="fdr_bh")
    assert rates.p == {"a": pytest.approx(0.03), "b": pytest.approx(0.04), "c": pytest.approx(0.04)}
    assert correct({"WNLI": None}, family="x").n == 0
    assert correct({}, family="x").note == "no tests"
    with pytest.raises(DataError, match=r"p-values lie in \[0, 1\]"):
        correct({"a": 1.2}, family="x")


# what samples can show


@pytest.mark.parametrize(("n", "disagreement"), [(400, 0.1), (100, 0.3), (1000, 0.05)])
def test_the_paired_difference_is_found_by_four_of_five_simulated_tests(n: int, disagreement: float) -> None:
    difference = smallest_paired_difference(n, disagreement)
    assert difference is not None and difference < disagreement
    draw = np.random.default_rng(0)
    up = (disagreement + difference) / 2
    counts = draw.multinomial(n, [up, disagreement - up, 1 - disagreement], 1500)
    found = [mcnemar_of_counts(int(b), int(c), n).p < 0.05 for b, c, _ in counts]
    assert float(np.mean(found)) == pytest.approx(0.80, abs=0.04)  # four standard errors


def test_pairs_show_less_than_independent_answers_of_the_same_accuracy_do() -> None:
    assert smallest_paired_difference(400, 0.1) < smallest_detectable_difference(0.85, 400)


def test_rows_that_hardly_disagree_show_nothing() -> None:
    assert smallest_paired_difference(400, 0.0) is None
    assert smallest_paired_difference(400, 0.01) is None  # 4 rows: p = .125 at best
    for wrong in ({"disagreement": 1.5}, {"disagreement": 0.1, "alpha": 0.0}):
        with pytest.raises(DataError):
            smallest_paired_difference(400, **wrong)


@pytest.mark.parametrize(("n", "alpha", "power"), [(3, 0.05, 0.8), (5, 0.05, 0.8), (10, 0.01, 0.9), (40, 0.05, 0.5)])
def test_the_difference_over_seeds_is_that_of_statsmodels(n: int, alpha: float, power: float) -> None:
    from statsmodels.stats.power import TTestPower

    found = smallest_difference_over_seeds(n, 0.02, alpha=alpha, power=power)
    assert found is not None
    assert float(TTestPower().power(found / 0.02, n, alpha)) == pytest.approx(power, abs=1e-4)


def test_one_seed_shows_no_difference_and_wrong_numbers_are_refused() -> None:
    assert smallest_difference_over_seeds(1, 0.02) is None
    assert smallest_difference_over_seeds(5, 0.0) == 0.0
    for wrong in ((0, 0.1), (5, -0.1), (5, NAN)):
        with pytest.raises(DataError, match="no detectable difference"):
            smallest_difference_over_seeds(*wrong)
    with pytest.raises(DataError, match="no test has these rates"):
        smallest_detectable_difference(0.5, 100, power=0.01)


def test_a_stricter_test_and_more_power_need_a_larger_difference() -> None:
    usual = smallest_detectable_difference(0.8, 400)
    assert usual < smallest_detectable_difference(0.8, 400, alpha=0.01)
    assert usual < smallest_detectable_difference(0.8, 400, power=0.9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.sampled_from(["holm", "fdr_bh"]))
def test_a_family_is_corrected_as_statsmodels_does(p: list[float], method: Any) -> None:
    from statsmodels.stats.multitest import multipletests

    found = correct({str(i): one for i, one in enumerate(p)}, family="any", method=method).p
    assert list(found.values()) == pytest.approx(list(multipletests(p, method=method)[1]), abs=1e-12)
