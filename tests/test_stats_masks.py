"""What masks share, against what does not share its code: worked cases, another library, every mask there could be."""

import math
import warnings
from fractions import Fraction
from itertools import combinations, permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tombola.errors import DataError
from tombola.stats import (
    cochran_pairs,
    cochran_q,
    compare_orders,
    fleiss_kappa,
    krippendorff_alpha,
    mean_jaccard,
    overlap,
    overlap_of_tasks,
    rank_biased_overlap,
    spearman,
    stability,
    undecided,
)
from tombola.stats.chance import chance_counts, chance_totals, p_of

VOTES = st.integers(2, 5).flatmap(lambda n: st.lists(st.tuples(*[st.booleans()] * n), min_size=2, max_size=20))


def masks_of(*rows: str) -> list[list[bool]]:
    """A mask from each row of 1 and 0."""
    return [[one == "1" for one in row] for row in rows]


# agreement of several masks


@given(VOTES)
def test_kappa_is_that_of_statsmodels_and_alpha_that_of_krippendorffs_coincidences(votes: list[tuple[bool, ...]]) -> None:
    from statsmodels.stats.inter_rater import aggregate_raters
    from statsmodels.stats.inter_rater import fleiss_kappa as kappa

    masks = [list(mask) for mask in zip(*votes, strict=True)]
    if len({vote for row in votes for vote in row}) == 1:
        assert fleiss_kappa(masks).value is None and krippendorff_alpha(masks).value is None
        return
    table = aggregate_raters(np.asarray(votes, dtype=int))[0]
    assert fleiss_kappa(masks).value == pytest.approx(float(kappa(table)))
    # Every ordered pair of votes of one component, weighing 1 / (m − 1); disagreement against that of all pairs of votes.
    m, n = len(masks), len(votes) * len(masks)
    observed = sum(a != b for row in votes for a, b in permutations(row, 2)) / (m - 1)
    ones = sum(vote for row in votes for vote in row)
    by_chance = 2 * ones * (n - ones) / (n - 1)
    assert krippendorff_alpha(masks).value == pytest.approx(1 - observed / by_chance)


def test_alpha_of_krippendorffs_own_example_of_two_observers() -> None:
    meg, owen = masks_of("0100000010", "1110010000")
    estimate = krippendorff_alpha([meg, owen])
    assert estimate.value == pytest.approx(0.095, abs=5e-4)
    assert (estimate.low, estimate.note) == (None, "two masks: no interval")


def test_jaccard_is_the_mean_of_the_pairs_and_leaves_out_those_that_are_empty() -> None:
    a, b, c = masks_of("1100", "0110", "1111")
    assert mean_jaccard([a, b, c]).value == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    empty = [False] * 4
    with_two_empty = mean_jaccard([a, b, empty, empty])
    assert with_two_empty.value == pytest.approx((1 / 3 + 0 * 4) / 5)
    assert with_two_empty.note == "1 of 6 pairs are both empty: left out"
    assert mean_jaccard([empty, empty]).note == "all masks are empty"
    assert mean_jaccard([a]).note == "Jaccard needs at least two masks"


@given(VOTES.filter(lambda votes: len(votes[0]) > 2))
def test_the_interval_is_the_jackknife_over_masks(votes: list[tuple[bool, ...]]) -> None:
    masks = [list(mask) for mask in zip(*votes, strict=True)]
    for of in (fleiss_kappa, krippendorff_alpha, mean_jaccard):
        found, n = of(masks), len(masks)
        without = [of([mask for i, mask in enumerate(masks) if i != out]).value for out in range(n)]
        if found.value is None or None in without:
            assert found.low is None and found.note
            continue
        pseudo = [n * found.value - (n - 1) * one for one in without]  # the textbook form: their mean's standard error
        half = {3: 4.302653, 4: 3.182446, 5: 2.776445}[n] * np.std(pseudo, ddof=1) / math.sqrt(n)
        lowest = 0.0 if of is mean_jaccard else -1.0
        assert found.low == pytest.approx(max(lowest, found.value - half), abs=1e-5)
        assert found.high == pytest.approx(min(1.0, found.value + half), abs=1e-5)


def test_equal_masks_have_an_interval_without_width_and_say_so() -> None:
    estimate = fleiss_kappa(masks_of(*["1100"] * 4))
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)
    assert estimate.note == "no mask stands out: the interval has no width"


# Cochran's Q


def test_q_of_cochrans_own_table_form_is_the_one_worked_by_hand() -> None:
    # Sizes 4, 2, 1 of 3 seeds; kept by 3, 2, 1, 1, 0: Q = 2 · (3 · 21 − 49) / (3 · 7 − 15) = 28 / 6
    found = cochran_q(masks_of("11110", "11000", "10000"))
    assert found.q == pytest.approx(28 / 6)
    assert (found.df, found.varying) == (2, 3)
    assert found.p_chi2 == pytest.approx(math.exp(-28 / 12))  # chi-squared with two degrees of freedom
    # Of the 3 · 3 · 3 ways to give 2, 1 and 1 keeps to three seeds: squared sizes as large as 3² + 1² + 0² or larger.
    ways = [np.add.reduce(way) for way in product([(1, 1, 0), (1, 0, 1), (0, 1, 1)], *[np.eye(3, dtype=int).tolist()] * 2)]
    as_large = sum(sum(size**2 for size in way) >= 10 for way in ways) / 27
    assert found.p == pytest.approx(as_large, abs=0.02)


def test_q_cannot_see_that_masks_of_one_size_have_nothing_in_common() -> None:
    apart = cochran_q(masks_of("111000000", "000111000", "000000111"))
    assert (apart.q, apart.p) == (0.0, 1.0)
    assert apart.text == "survival rates are not shown to differ"
    assert fleiss_kappa(masks_of("111000000", "000111000", "000000111")).value == pytest.approx(-0.5)
    assert stability(masks_of("111000000", "000111000", "000000111")).p_at_most < 0.05  # the test that does see it


def test_q_of_a_pair_is_the_exact_mcnemar_and_holm_counts_all_pairs() -> None:
    masks = masks_of("1" * 10, "1" * 3 + "0" * 7, "1" * 3 + "0" * 7)
    pairs = cochran_pairs(masks)
    assert list(pairs) == [(0, 1), (0, 2), (1, 2)]
    assert pairs[0, 1].q == pytest.approx(7.0)
    assert pairs[0, 1].p == pytest.approx(2 / 2**7)
    assert pairs[0, 1].p_chi2 == pytest.approx(math.erfc(math.sqrt(7 / 2)))
    assert pairs[0, 1].p_corrected == pytest.approx(2 * 2 / 2**7)  # two of three pairs have a p
    assert pairs[0, 1].text == "survival rates differ"
    assert (pairs[1, 2].p, pairs[1, 2].p_corrected) == (None, None)
    assert pairs[1, 2].text == "undefined, because every component is kept by all seeds or by none"


def test_q_needs_two_masks() -> None:
    assert cochran_q(masks_of("10")).text == "undefined, because Cochran's Q needs at least two masks"


# chance given sizes


@pytest.mark.parametrize(("n", "sizes"), [(5, (2, 3, 1)), (4, (0, 4, 2)), (6, (3, 3))])
def test_counts_by_chance_have_the_law_of_all_masks_of_these_sizes(n: int, sizes: tuple[int, ...]) -> None:
    every = product(*[combinations(range(n), size) for size in sizes])
    law: dict[tuple[int, ...], int] = {}
    for kept in every:
        votes = [sum(i in mask for mask in kept) for i in range(n)]
        counts = tuple(votes.count(k) for k in range(len(sizes) + 1))
        law[counts] = law.get(counts, 0) + 1
    drawn = chance_counts(n, sizes, 40_000, np.random.default_rng(0))
    assert {tuple(row) for row in drawn.tolist()} == law.keys()
    for counts, ways in law.items():
        share = float(np.mean((drawn == counts).all(1)))
        assert share == pytest.approx(ways / sum(law.values()), abs=0.012)  # four standard errors and more


def test_totals_by_chance_have_the_law_of_all_ways_to_give_out_the_keeps() -> None:
    counts = [1, 2, 1, 1]  # of three seeds none, one, two, all keep these many components
    patterns = {k: [way for way in product((0, 1), repeat=3) if sum(way) == k] for k in range(4)}
    every = [np.add.reduce(way) for way in product(*[patterns[k] for k in range(4) for _ in range(counts[k])])]
    drawn = chance_totals(np.asarray(counts), 40_000, np.random.default_rng(0))
    for total in {tuple(way.tolist()) for way in every}:
        expected = sum(tuple(way.tolist()) == total for way in every) / len(every)
        assert float(np.mean((drawn == total).all(1))) == pytest.approx(expected, abs=0.012)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(*[st.booleans()] * 3), min_size=3, max_size=5))
def test_stability_is_held_against_every_triple_of_masks_of_these_sizes(votes: list[tuple[bool, ...]]) -> None:
    masks = [list(mask) for mask in zip(*votes, strict=True)]
    n, found = len(votes), stability(masks)
    if found.kappa.value is None:
        assert found.note == found.kappa.note and found.p_at_least is None
        return
    every = list(product(*[[[i in kept for i in range(n)] for kept in combinations(range(n), sum(mask))] for mask in masks]))
    kappas = [fleiss_kappa(list(some)).value for some in every]
    assert found.expected_kappa == pytest.approx(float(np.mean(kappas)))
    jaccards = [overlap(a, b).jaccard for some in every for a, b in combinations(some, 2)]
    if None not in jaccards:
        assert found.expected_jaccard == pytest.approx(float(np.mean(jaccards)))
    if found.p_at_least is None:
        assert max(kappas) - min(kappas) < 1e-12  # sizes decide
        return
    assert found.p_at_least == pytest.approx(np.mean([kappa >= found.kappa.value - 1e-9 for kappa in kappas]), abs=0.025)
    assert found.p_at_most == pytest.approx(np.mean([kappa <= found.kappa.value + 1e-9 for kappa in kappas]), abs=0.025)


def test_agreement_on_sizes_of_layers_alone_vanishes_when_layers_are_groups() -> None:
    draw = np.random.default_rng(3)
    first_layer = [np.r_[draw.permutation(12) < 11, draw.permutation(12) < 1] for _ in range(5)]  # which head is chance
    groups = [0] * 12 + [1] * 12
    assert stability(first_layer).p_at_least == 1e-4
    within = stability(first_layer, groups=groups)
    assert within.p_at_least > 0.05
    assert within.kappa == stability(first_layer).kappa
    assert within.expected_kappa == pytest.approx(1 - 2 * (11 / 144) / 0.5, abs=1e-9)  # two draws of a head differ, by layer
    with pytest.raises(DataError, match=r"needs a group[\s\S]*3 groups"):
        stability(first_layer, groups=[0, 0, 1])


def test_stability_of_one_mask_or_none_has_reasons_instead_of_numbers() -> None:
    for masks in ([], masks_of("110")):
        found = stability(masks)
        assert (found.kappa.value, found.p_at_least, found.cochran.p, found.undecided.share.value) == (None,) * 4
        assert found.note == "kappa needs at least two masks"
    forced = stability(masks_of("1111", "0000", "1100"))
    assert forced.note == "but for one the masks keep all or nothing: their sizes alone decide how they agree"
    assert forced.p_at_least is None and forced.expected_kappa == pytest.approx(forced.kappa.value)


def test_the_same_masks_give_the_same_p() -> None:
    masks = masks_of("11010", "01110", "10011")
    assert stability(masks) == stability(masks)
    assert stability(masks, seed=1).p_at_least != stability(masks).p_at_least


def test_a_p_counts_the_observed_one_among_the_draws() -> None:
    assert p_of(np.array([1.0, 2.0, 3.0]), 3.0) == (2 / 4, 1.0)
    assert p_of(np.array([1.0, 2.0, 3.0]), 4.0) == (1 / 4, 1.0)
    assert p_of(np.array([0.1 + 0.2]), 0.3) == (1.0, 1.0)  # equal but for rounding


# undecided components


def test_with_five_seeds_the_band_holds_components_kept_by_two_or_three() -> None:
    masks = masks_of("11110", "11100", "11000", "10000", "10000")  # kept by 5, 3, 2, 1, 0
    found = undecided(masks)
    assert found.counts == (2, 3)
    assert [np.std([1] * k + [0] * (5 - k), ddof=1) < 0.55 for k in (1, 2)] == [True, True]
    assert found.share.value == 2 / 5
    assert (found.n, found.n_seeds, found.note) == (5, 5, "")


def test_chance_alone_leaves_most_heads_undecided_when_half_survive() -> None:
    draw = np.random.default_rng(0)
    masks = [draw.permutation(144) < 72 for _ in range(5)]
    found = undecided(masks)
    assert found.expected == pytest.approx(20 / 32, abs=0.01)  # 10 + 10 of the 2^5 patterns
    assert found.p_at_least > 0.05 and found.p_at_most > 0.05


def test_the_band_of_two_three_and_four_seeds_is_said_to_miss_an_even_split() -> None:
    for seeds in (2, 3):
        found = undecided([[True, False]] * seeds)
        assert (found.share.value, found.counts) == (None, ())
        assert found.share.text == f"undefined, because no split of {seeds} seeds has a std of 0.45 to 0.55"
    four = undecided(masks_of("110", "100", "000", "100"))
    assert four.counts == (1, 3)
    assert four.note == "with 4 seeds an even split has a std outside the band"


# two tasks


def test_the_overlap_of_tasks_is_held_against_every_renaming_of_components() -> None:
    first, second = masks_of("11000", "11100"), masks_of("11010", "01100")
    found = overlap_of_tasks(first, second)
    assert found.shared.value == (2 + 2) / 2
    assert found.expected_shared == pytest.approx((2 * 3 / 5 + 3 * 2 / 5) / 2)
    assert found.ratio == pytest.approx(2 / 1.2)
    shared = [
        sum(a and mask[order[i]] for one, mask in zip(first, second, strict=True) for i, a in enumerate(one))
        for order in permutations(range(5))
    ]
    assert np.mean(shared) / 2 == pytest.approx(found.expected_shared)
    assert found.p_at_least == pytest.approx(np.mean([one >= 4 for one in shared]), abs=0.02)
    assert found.p_at_most == pytest.approx(np.mean([one <= 4 for one in shared]), abs=0.02)


def test_with_groups_tasks_are_compared_within_layers_only() -> None:
    first, second = masks_of("1100" + "0000", "1100" + "1000"), masks_of("1100" + "0000", "1010" + "0001")
    groups = [0] * 4 + [1] * 4
    found = overlap_of_tasks(first, second, groups=groups)
    assert found.expected_shared == pytest.approx((2 * 2 / 4 + 2 * 2 / 4 + 1 * 1 / 4) / 2)
    shared = [
        sum(a and mask[order[i]] for one, mask in zip(first, second, strict=True) for i, a in enumerate(one))
        for order in ((*left, *(4 + i for i in right)) for left in permutations(range(4)) for right in permutations(range(4)))
    ]
    observed = 2 + 1
    assert found.p_at_least == pytest.approx(np.mean([one >= observed for one in shared]), abs=0.02)


def test_tasks_whose_masks_keep_all_or_nothing_have_no_p() -> None:
    found = overlap_of_tasks(masks_of("1111", "0000"), masks_of("1100", "1010"))
    assert (found.shared.value, found.expected_shared, found.p_at_least) == (1.0, 1.0, None)
    assert found.note == "all masks of a task keep all or nothing: their sizes alone decide what is shared"
    empty = overlap_of_tasks(masks_of("0000"), masks_of("1100"))
    assert (empty.ratio, empty.p_at_most) == (None, None)
    assert overlap_of_tasks([], []).note == "no seeds"
    with pytest.raises(DataError, match="same seeds on both sides"):
        overlap_of_tasks(masks_of("10"), masks_of("10", "01"))


# orders of importance


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.randoms(), st.sampled_from([0.5, 0.9, 0.98]))
def test_rank_biased_overlap_is_its_infinite_sum(scores: list[int], draw: object, p: float) -> None:
    other = draw.sample(scores, len(scores))  # type: ignore[attr-defined]
    orders = [sorted(range(len(scores)), key=lambda i, of=of: (-of[i], i)) for of in (scores, other)]
    total = sum(
        (1 - p) * p ** (d - 1) * (len({*orders[0][:d]} & {*orders[1][:d]}) / d if d <= len(scores) else 1.0)
        for d in range(1, 2000)
    )
    found = rank_biased_overlap([float(s) for s in scores], [float(s) for s in other], persistence=p)
    assert found == pytest.approx(total, abs=1e-9)


def test_orders_are_held_against_every_order_there_is() -> None:
    a, b = [5.0, 4.0, 3.0, 2.0, 1.0], [4.0, 5.0, 2.0, 3.0, 1.0]
    found = compare_orders(a, b)
    every = [[b[i] for i in order] for order in permutations(range(5))]
    overlaps = [rank_biased_overlap(a, other) for other in every]
    # 1 − 6 Σd² / (n (n² − 1)): differences 1, 1, 1, 1, 0
    assert found.spearman.value == pytest.approx(float(1 - Fraction(6 * 4, 5 * 24)))
    assert found.expected_rbo == pytest.approx(float(np.mean(overlaps)))
    assert found.p_rbo == pytest.approx(np.mean([one >= found.rbo - 1e-9 for one in overlaps]), abs=0.02)
    rhos = [abs(float(np.corrcoef(a, other)[0, 1])) for other in every]
    assert found.p_spearman == pytest.approx(np.mean([rho >= found.spearman.value - 1e-9 for rho in rhos]), abs=0.02)


def test_the_same_order_is_all_overlap_and_has_no_interval() -> None:
    found = compare_orders([3.0, 2.0, 1.0, 0.0], [30.0, 20.0, 10.0, 5.0])
    assert found.rbo == pytest.approx(1.0)
    assert found.spearman.value == pytest.approx(1.0) and found.spearman.low is None
    assert found.note == "the orders are the same or opposite: no interval"


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "an importance is the same for all parts: it gives no order"),
        ([1.0, math.nan, 1.0], [1.0, 2.0, 3.0], "an importance is no finite number"),
        ([], [], "no parts"),
        ([1.0], [1.0], "one part has no order"),
    ],
)
def test_importances_without_an_order_say_so(a: list[float], b: list[float], why: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare_orders(a, b)
    assert (found.spearman.value, found.rbo, found.note) == (None, None, why)
    assert spearman(a, b).text == f"undefined, because {why}"


def test_orders_of_different_parts_are_refused() -> None:
    with pytest.raises(DataError, match="same parts on both sides"):
        rank_biased_overlap([1.0], [1.0, 2.0])
    with pytest.raises(DataError, match="needs a persistence"):
        rank_biased_overlap([1.0], [1.0], persistence=1.0)
