"""Each statistic against what does not share its code: a case worked by hand, an enumeration, a simulation."""

import math
import random
import time
from itertools import combinations, product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import confint_proportions_2indep

from tombola.errors import DataError
from tombola.stats import (
    band,
    difference_over_rows,
    fleiss_kappa,
    mcnemar_of_counts,
    metric_over_rows,
    over_rows,
    over_seeds,
    overlap,
    overlap_of_counts,
    smallest_detectable_difference,
    smallest_two_sided_p,
    survivor_correlation,
)

NAN = float("nan")


def mask(kept: set[int] | tuple[int, ...], n: int) -> list[bool]:
    return [i in kept for i in range(n)]


# over_seeds


def test_mean_std_and_interval_of_three_seeds_are_those_worked_by_hand() -> None:
    # mean 2, deviations -1, 0, 1: variance 2 / 2 = 1; t(.975, 2 df) = 4.302653 from the printed table
    estimate = over_seeds([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (estimate.value, estimate.std, estimate.n_seeds, estimate.note) == (2.0, 1.0, 3, "")
    assert estimate.low == pytest.approx(2 - half, abs=1e-6)
    assert estimate.high == pytest.approx(2 + half, abs=1e-6)


def test_interval_over_three_seeds_covers_the_truth_in_95_percent_of_simulated_studies() -> None:
    draw = random.Random(0)
    studies = [over_seeds([draw.gauss(0.8, 0.03) for _ in range(3)]) for _ in range(4000)]
    covered = sum(study.low <= 0.8 <= study.high for study in studies) / 4000  # type: ignore[operator]
    assert covered == pytest.approx(0.95, abs=0.011)  # three standard errors


def test_one_seed_has_a_value_but_no_std_and_no_interval_and_says_so() -> None:
    estimate = over_seeds([0.7])
    assert (estimate.value, estimate.std, estimate.low, estimate.high, estimate.n_seeds) == (0.7, None, None, None, 1)
    assert estimate.note == "one seed: no std, no interval"


def test_no_seeds_and_broken_seeds_give_a_reason_and_no_number() -> None:
    assert (over_seeds([]).value, over_seeds([]).note) == (None, "no seeds")
    broken = over_seeds([0.5, NAN, math.inf])
    assert (broken.value, broken.low, broken.n_seeds) == (None, None, 3)
    assert broken.note == "2 of 3 seeds gave no finite number"


def test_equal_seeds_are_not_sold_as_certainty() -> None:
    estimate = over_seeds([0.1] * 5)
    assert (estimate.low, estimate.high, estimate.std) == (0.1, 0.1, 0.0)
    assert "no width" in estimate.note


# over_rows


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_are_where_the_score_test_just_stops_rejecting(case: tuple[int, int]) -> None:
    correct, n = case
    z = NormalDist().inv_cdf(0.975)
    estimate = over_rows(correct, n)
    assert estimate.value == correct / n
    for bound in (estimate.low, estimate.high):
        assert bound is not None
        # the definition: |p_hat - p| = z * sqrt(p * (1 - p) / n)
        assert (estimate.value - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / n, abs=1e-9)


def test_rows_without_answers_have_a_reason_and_impossible_counts_raise() -> None:
    assert (over_rows(0, 0).value, over_rows(0, 0).note) == (None, "no rows")
    with pytest.raises(DataError, match="right answers must be a count") as error:
        over_rows(11, 10)
    assert error.value.got == "11 of 10"


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.integers(0, n), st.just(n))))
def test_a_difference_over_rows_is_newcombes(case: tuple[int, int, int]) -> None:
    a, b, n = case
    found = difference_over_rows(a / n, b / n, n)
    low, high = confint_proportions_2indep(a, n, b, n, method="newcomb", compare="diff")
    assert found.value == a / n - b / n and (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_a_difference_of_no_shares_is_refused_and_of_no_rows_undefined() -> None:
    with pytest.raises(DataError, match="no interval"):
        difference_over_rows(1.2, 0.5, 10)
    assert difference_over_rows(0.5, 0.5, 0).low is None


# overlap


@pytest.mark.parametrize(("size_a", "size_b", "n"), [(3, 4, 8), (5, 5, 8), (1, 2, 5), (6, 7, 9)])
def test_chance_overlap_is_that_of_every_possible_mask_of_the_size(size_a: int, size_b: int, n: int) -> None:
    a = mask(tuple(range(size_a)), n)
    others = [mask(kept, n) for kept in combinations(range(n), size_b)]
    shared = [sum(x and y for x, y in zip(a, b, strict=True)) for b in others]
    for b, observed in zip(others, shared, strict=True):
        found = overlap(a, b)
        assert (found.n, found.size_a, found.size_b, found.shared) == (n, size_a, size_b, observed)
        assert found.jaccard == observed / (size_a + size_b - observed)
        assert found.expected_shared == pytest.approx(sum(shared) / len(shared))
        assert found.expected_jaccard == pytest.approx(sum(s / (size_a + size_b - s) for s in shared) / len(shared))
        assert found.ratio == pytest.approx(observed * len(shared) / sum(shared))
        assert found.p_at_least == pytest.approx(sum(s >= observed for s in shared) / len(shared))
        assert found.p_at_most == pytest.approx(sum(s <= observed for s in shared) / len(shared))
        assert found.note == ""


def test_overlap_of_whole_models_takes_no_time_and_loses_no_mass() -> None:
    n = 40_000_000
    start = time.process_time()
    found = overlap_of_counts(n, n // 2, n // 4, n // 8)
    assert time.process_time() - start < 2  # 10 million counts are possible, few of them likely
    assert found.expected_jaccard == pytest.approx(0.125 / 0.625, abs=1e-6)
    assert found.p_at_least == pytest.approx(0.5, abs=1e-3)


def test_two_empty_masks_share_nothing_that_could_be_measured() -> None:
    found = overlap([False] * 4, [False] * 4)
    assert (found.jaccard, found.ratio, found.expected_jaccard, found.p_at_least) == (None, None, None, None)
    assert (found.shared, found.expected_shared, found.note) == (0, 0.0, "both masks are empty")


def test_an_empty_or_complete_mask_has_no_p_because_its_size_decides() -> None:
    empty = overlap([True, False, False], [False] * 3)
    assert (empty.jaccard, empty.expected_shared, empty.ratio, empty.p_at_least) == (0.0, 0.0, None, None)
    assert empty.note == "a mask keeps none of 3: its size alone decides what is shared"
    full = overlap([True] * 4, mask({0}, 4))
    assert (full.jaccard, full.expected_jaccard, full.ratio, full.p_at_most) == (0.25, 0.25, 1.0, None)
    assert full.note == "a mask keeps all of 4: its size alone decides what is shared"


def test_masks_over_different_components_are_refused() -> None:
    with pytest.raises(DataError, match=r"cannot be compared[\s\S]*72 and 144 components"):
        overlap([True] * 72, [True] * 144)
    with pytest.raises(DataError, match=r"cannot be rated together[\s\S]*lengths \[1, 2\]"):
        fleiss_kappa([[True], [True, False]])


# fleiss_kappa


def test_kappa_of_three_masks_over_four_heads_is_the_one_worked_by_hand() -> None:
    # kept by 3, 2, 0, 1 of 3 seeds. Agreeing pairs per head 3, 1, 3, 1 of 3: observed (1 + 1/3 + 1 + 1/3) / 4 = 2/3.
    # Kept in 6 of 12 votes: chance 1/2. kappa = (2/3 - 1/2) / (1 - 1/2) = 1/3.
    masks = [mask({0, 1}, 4), mask({0, 1, 3}, 4), mask({0}, 4)]
    estimate = fleiss_kappa(masks)
    assert estimate.value == pytest.approx(1 / 3)
    assert (estimate.n_seeds, estimate.note) == (3, "")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_kappa_of_two_masks_is_scotts_pi(votes: list[tuple[bool, bool]]) -> None:
    flat = [vote for pair in votes for vote in pair]
    if len(set(flat)) == 1:
        return
    kept = sum(flat) / len(flat)
    chance = kept**2 + (1 - kept) ** 2
    observed = sum(a == b for a, b in votes) / len(votes)
    estimate = fleiss_kappa([[a for a, _ in votes], [b for _, b in votes]])
    assert estimate.value == pytest.approx((observed - chance) / (1 - chance))


def test_opposite_masks_have_negative_kappa() -> None:
    assert fleiss_kappa([mask({0, 1}, 4), mask({2, 3}, 4)]).value == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("masks", "why"),
    [
        ([[True, True], [True, True]], "all masks keep everything: chance agreement is already complete"),
        ([[False, False], [False, False]], "all masks remove everything: chance agreement is already complete"),
        ([[True, False]], "kappa needs at least two masks"),
        ([], "kappa needs at least two masks"),
        ([[], []], "no components"),
    ],
)
def test_kappa_is_undefined_with_a_reason(masks: list[list[bool]], why: str) -> None:
    estimate = fleiss_kappa(masks)
    assert (estimate.value, estimate.note, estimate.n_seeds) == (None, why, len(masks))


# what n seeds and n rows can show


@pytest.mark.parametrize("n", range(1, 9))
def test_smallest_p_is_that_of_the_most_extreme_of_all_sign_patterns(n: int) -> None:
    differences = [0.01 * (i + 1) for i in range(n)]
    means = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((-1, 1), repeat=n)]
    extreme = sum(mean >= max(means) - 1e-12 for mean in means) / len(means)
    assert smallest_two_sided_p(n) == extreme


def test_smallest_p_is_what_scipys_exact_wilcoxon_gives_and_passes_005_at_six_seeds() -> None:
    from scipy.stats import wilcoxon

    for n in (2, 5, 6):
        exact = float(wilcoxon([0.01 * (i + 1) for i in range(n)], method="exact").pvalue)
        assert smallest_two_sided_p(n) == pytest.approx(exact)
    assert smallest_two_sided_p(5) == 0.0625
    assert smallest_two_sided_p(6) == 0.03125
    with pytest.raises(DataError, match="needs seeds"):
        smallest_two_sided_p(0)


@pytest.mark.parametrize(("p", "n"), [(0.5, 100), (0.81, 400), (0.3, 1000)])
def test_detectable_difference_is_found_by_four_of_five_simulated_tests(p: float, n: int) -> None:
    import numpy as np

    difference = smallest_detectable_difference(p, n)
    assert difference is not None
    other = p - difference if p >= 0.5 else p + difference
    draw = np.random.default_rng(1)
    first, second = draw.binomial(n, p, 20_000) / n, draw.binomial(n, other, 20_000) / n
    pooled = (first + second) / 2
    z = (first - second) / np.sqrt(2 * pooled * (1 - pooled) / n)  # the usual test of two shares, not the arcsine one
    assert float(np.mean(np.abs(z) > 1.959964)) == pytest.approx(0.80, abs=0.025)


def test_detectable_difference_takes_the_larger_direction_and_can_be_out_of_reach() -> None:
    assert smallest_detectable_difference(0.9, 200) == pytest.approx(smallest_detectable_difference(0.1, 200))
    from_one = smallest_detectable_difference(1.0, 50)  # only downwards: sin(pi/2 - 1.400793 * sqrt(2/50)) ** 2
    assert from_one == pytest.approx(1 - math.cos(2.801585 / 10) ** 2, abs=1e-6)
    assert smallest_detectable_difference(0.5, 6) is None
    with pytest.raises(DataError, match=r"p = 1\.2, n = 10"):
        smallest_detectable_difference(1.2, 10)
    with pytest.raises(DataError, match="n = 0"):
        smallest_detectable_difference(0.5, 0)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (3, 10), (10, 3), (5, 5), (0, 6)])
def test_mcnemar_counts_the_coin_tosses_at_least_as_uneven(b: int, c: int) -> None:
    heads = [sum(toss) for toss in product((0, 1), repeat=b + c)]
    uneven = sum(abs(2 * h - (b + c)) >= abs(b - c) for h in heads) / len(heads)
    assert mcnemar_of_counts(b, c, 20).p == pytest.approx(uneven)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(DataError, match="must be a count"):
        mcnemar_of_counts(-1, 4, 10)


# ---------------------------------------------------------------------------------------------------- survivor correlation


def test_survivor_correlation_is_pearsons_r_and_pooled_its_fisher_interval() -> None:
    from scipy.stats import pearsonr

    rng = np.random.default_rng(0)
    x = rng.random(200) < 0.6
    y = (rng.random(200) < 0.3) | (x & (rng.random(200) < 0.3))
    found = survivor_correlation(x.tolist(), y.tolist())
    oracle = pearsonr(x.astype(float), y.astype(float))
    assert found.value == pytest.approx(oracle.statistic)
    interval = oracle.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert "independent" in found.note


def test_pairs_of_one_head_count_less_than_independent_ones() -> None:
    """Copies of each pair change nothing: neither r nor, drawn by head, the interval; the published interval shrinks."""
    rng = np.random.default_rng(1)
    x, y = (rng.random(40) < 0.5).tolist(), (rng.random(40) < 0.5).tolist()
    heads = list(range(40))
    once = survivor_correlation(x, y, heads)
    often = survivor_correlation(x * 25, y * 25, heads * 25)
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    published = survivor_correlation(x * 25, y * 25)
    assert published.high - published.low < 0.4 * (often.high - often.low)
    assert "40 heads" in often.note


def test_the_interval_drawn_by_head_is_that_of_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(2)
    heads = np.repeat(np.arange(30), 6)
    x = np.repeat(rng.random(30) < 0.5, 6)
    y = rng.random(180) < np.where(x, 0.6, 0.3)
    found = survivor_correlation(x.tolist(), y.tolist(), heads.tolist())
    drawn = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(heads == h) for h in rng.integers(0, 30, 30)])
        drawn.append(np.corrcoef(x[rows], y[rows])[0, 1])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.02)
    again = survivor_correlation(x.tolist(), y.tolist(), heads.tolist())
    assert found == again


def test_survivor_correlation_that_has_no_answer_says_so() -> None:
    assert survivor_correlation([True, True], [True, False]).value is None
    assert survivor_correlation([], []).note == "no pairs"
    assert survivor_correlation([True, False, True], [True, False, False], ["a", "a", "a"]).low is None
    with pytest.raises(DataError, match="do not fit"):
        survivor_correlation([True], [True, False])


# metric_over_rows


def accuracy(labels: object, answers: object) -> float:
    return float(np.mean(np.asarray(labels) == np.asarray(answers)))


def test_a_share_over_rows_has_the_interval_of_its_standard_error() -> None:
    # of a share the jackknife is exact: its standard error is sqrt(p (1 - p) / (n - 1)); t(.975, 9 df) = 2.262157 from the table
    found = metric_over_rows(accuracy, [1] * 10, [[1] * 7 + [0] * 3])
    half = 2.262157 * math.sqrt(0.7 * 0.3 / 9)
    assert (found.value, found.std, found.n_seeds) == (0.7, None, 1)
    assert found.low == pytest.approx(0.7 - half, abs=1e-6) and found.high == pytest.approx(0.7 + half, abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=6, max_size=30), st.randoms())
def test_any_metric_over_rows_is_the_jackknife_row_by_row_in_whatever_order(
    rows: list[tuple[bool, bool, bool]], draw: random.Random
) -> None:
    def gain(labels: object, answers: object) -> float:  # something that is no mean over rows
        return accuracy(labels, answers) ** 2 + 0.1 * float(np.mean(np.asarray(answers)))

    labels, a, b = (list(column) for column in zip(*rows, strict=True))
    found = metric_over_rows(gain, labels, [a, b])
    n = len(labels)
    left = [
        (gain(labels[:i] + labels[i + 1 :], a[:i] + a[i + 1 :]) + gain(labels[:i] + labels[i + 1 :], b[:i] + b[i + 1 :])) / 2
        for i in range(n)
    ]
    error = math.sqrt((n - 1) / n * sum((x - sum(left) / n) ** 2 for x in left))
    from scipy.stats import t

    assert found.value == pytest.approx((gain(labels, a) + gain(labels, b)) / 2) and found.n_seeds == 2
    assert found.high - found.value == pytest.approx(t.ppf(0.975, n - 1) * error, abs=1e-9)  # type: ignore[operator]
    shuffled = rows[:]
    draw.shuffle(shuffled)
    first, *others = (list(column) for column in zip(*shuffled, strict=True))
    again = metric_over_rows(gain, first, others)
    assert again.low == pytest.approx(found.low, abs=1e-9)


def test_the_interval_over_rows_covers_the_truth_in_95_percent_of_simulated_splits() -> None:
    draw, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        right = draw.random(200) < 0.8
        found = metric_over_rows(accuracy, [True] * 200, [right.tolist()])
        covered += found.low <= 0.8 <= found.high  # type: ignore[operator]
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_what_has_no_interval_over_rows_says_why() -> None:
    assert metric_over_rows(accuracy, [1], [[1]]).value is None
    assert metric_over_rows(accuracy, [1, 0], []).note == "no models"
    assert "finite" in metric_over_rows(lambda *_: NAN, [1, 0], [[1, 0]]).note
    few = metric_over_rows(lambda y, x: NAN if len(y) < 3 else 0.5, [1, 0, 1], [[1, 0, 1]])
    assert few.value == 0.5 and few.low is None and "left out" in few.note
    with pytest.raises(DataError):
        metric_over_rows(accuracy, [1, 0], [[1]])


def test_a_band_is_a_median_between_two_of_the_values() -> None:
    # of 9 throws of a coin fewer than 2 heads come in 10 of 512 cases, fewer than 3 in 46: the second from each end
    assert band([9.0, *map(float, range(1, 9))]).text == "5.00 (2.00 to 8.00)"
    assert band([3.0]).text == "3.00 (3.00 to 3.00)"
