"""Exact counts and ties by position, against a sort of (score, position) pairs in plain Python."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tombola.errors import MaskError
from tombola.prune import lowest, to_sparsity

NAN = float("nan")

# few different scores, so that ties are the rule; -0.0 and 0.0 are equal
tied = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 0.25, 7.0, float("inf"), -float("inf")])
rows = st.lists(st.tuples(tied, st.booleans()), min_size=1, max_size=40)


@settings(deadline=None)
@given(rows, st.data())
def test_lowest_are_the_first_of_all_pairs_of_score_and_position(entries: list[tuple[float, bool]], data: st.DataObject) -> None:
    scores, among = torch.tensor([s for s, _ in entries]), torch.tensor([a for _, a in entries])
    count = data.draw(st.integers(0, int(among.sum())))
    pairs = sorted((score, position) for position, (score, there) in enumerate(entries) if there)
    expected = {position for _, position in pairs[:count]}
    chosen = lowest(scores, count, among)
    assert {i for i, gone in enumerate(chosen.tolist()) if gone} == expected


def test_of_equal_scores_the_first_in_reading_order_goes_first() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    among = torch.tensor([[True, False, True], [True, True, True]])
    assert lowest(scores, 3, among).tolist() == [[False, False, True], [True, True, False]]


def test_a_large_tie_is_cut_at_its_count() -> None:
    # enough entries for a sort that is not stable to show
    chosen = lowest(torch.zeros(100_000), 33_333, torch.ones(100_000, dtype=torch.bool))
    assert bool(chosen[:33_333].all())
    assert int(chosen.sum()) == 33_333


def test_lowest_leaves_scores_and_candidates_as_they_were() -> None:
    scores, among = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, True, False])
    lowest(scores, 1, among)
    assert (scores.tolist(), among.tolist()) == ([3.0, 1.0, 2.0], [True, True, False])


@pytest.mark.parametrize("count", [-1, 3])
def test_more_than_there_are_is_refused_not_cut(count: int) -> None:
    with pytest.raises(MaskError, match="more entries asked for") as error:
        lowest(torch.zeros(4), count, torch.tensor([True, False, True, False]))
    assert (error.value.got, error.value.expected) == (count, "0 to 2")


def test_nan_among_the_candidates_is_refused_and_elsewhere_ignored() -> None:
    scores = torch.tensor([1.0, NAN, 0.0])
    with pytest.raises(MaskError, match="NaN"):
        lowest(scores, 1, torch.ones(3, dtype=torch.bool))
    assert lowest(scores, 1, torch.tensor([True, False, True])).tolist() == [False, False, True]


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 999), st.integers(0, 5))
def test_sparsity_removes_exactly_its_rounded_share_of_the_lowest(n: int, thousandths: int, kinds: int) -> None:
    scores = torch.randint(0, kinds + 1, (n,), generator=torch.Generator().manual_seed(n)).double()
    kept = to_sparsity(scores, thousandths / 1000)
    removed = n - int(kept.sum())
    # the nearest whole number; of two equally near ones floating point may give either
    assert abs(removed - Fraction(thousandths, 1000) * n) <= Fraction(1, 2)
    if 0 < removed < n:
        assert scores[~kept].max() <= scores[kept].min()


@pytest.mark.parametrize(("n", "sparsity", "removed"), [(144, 0.1, 14), (144, 0.9, 130), (12, 0.5, 6), (3, 0.5, 2), (5, 0.5, 2)])
def test_sparsity_counts_worked_by_hand(n: int, sparsity: float, removed: int) -> None:
    # 14.4, 129.6, 6; 1.5 and 2.5 both go to the even neighbour
    assert int((~to_sparsity(torch.arange(float(n)), sparsity)).sum()) == removed


def test_masks_of_rising_sparsity_are_nested_also_under_ties() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    masks = [to_sparsity(scores, k / 8) for k in range(8)]
    assert [int(mask.sum()) for mask in masks] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert all(bool((larger | ~smaller).all()) for larger, smaller in pairwise(masks))


@pytest.mark.parametrize("sparsity", [-0.01, 1.0, 1.5, NAN])
def test_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(MaskError, match="sparsity is out of range"):
        to_sparsity(torch.zeros(4), sparsity)
