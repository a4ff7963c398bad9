"""Exact counts and ties by position, against a sort of (score, position) pairs in plain Python."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tombola.prune
from tombola.errors import MaskError
from tombola.prune import Granularity, lowest, prune, to_sparsity, without_lowest

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


# several tensors together

# lists of (score, whether it is still there), one list a tensor; empty tensors too
many = st.lists(st.lists(st.tuples(tied, st.booleans()), max_size=12), min_size=1, max_size=4)


def tensors(entries: list[list[tuple[float, bool]]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    # names that sort otherwise than they come
    named = {f"p{9 - i}": rows for i, rows in enumerate(entries)}
    scores = {name: torch.tensor([score for score, _ in rows]) for name, rows in named.items()}
    return scores, {name: torch.tensor([there for _, there in rows], dtype=torch.bool) for name, rows in named.items()}


def sorted_away(scores: dict[str, Tensor], among: dict[str, Tensor], count: int) -> dict[str, list[bool]]:
    """What is left of `among` when a sort of (score, tensor, position) has lost its first `count` triples."""
    triples = sorted(
        (score, i, j)
        for i, (x, there) in enumerate(zip(scores.values(), among.values(), strict=True))
        for j, (score, candidate) in enumerate(zip(x.tolist(), there.tolist(), strict=True))
        if candidate
    )
    gone = {(i, j) for _, i, j in triples[:count]}
    return {name: [there and (i, j) not in gone for j, there in enumerate(among[name].tolist())] for i, name in enumerate(scores)}


@given(many, st.data())
def test_without_lowest_is_a_sort_by_score_tensor_and_position(entries: Any, data: st.DataObject) -> None:
    scores, among = tensors(entries)
    count = data.draw(st.integers(0, sum(int(x.sum()) for x in among.values())))
    left = without_lowest(scores, count, among)
    assert list(left) == list(scores)
    assert {name: x.tolist() for name, x in left.items()} == sorted_away(scores, among, count)


@given(many, st.sampled_from(["global", "per_matrix"]), st.integers(0, 99))
def test_prune_removes_the_rounded_share_of_all_or_of_each(entries: Any, granularity: Granularity, hundredths: int) -> None:
    scores, _ = tensors(entries)
    everything = {name: torch.ones(len(x), dtype=torch.bool) for name, x in scores.items()}
    kept = prune(scores, hundredths / 100, granularity=granularity)
    if granularity == "global":
        n = sum(len(x) for x in scores.values())
        expected = sorted_away(scores, everything, round(hundredths / 100 * n))
    else:
        expected = {}
        for name, x in scores.items():
            expected |= sorted_away({name: x}, {name: everything[name]}, round(hundredths / 100 * len(x)))
    assert {name: x.tolist() for name, x in kept.items()} == expected


@given(many, st.sampled_from(["global", "per_matrix"]), st.lists(st.integers(0, 99), min_size=2, max_size=4))
def test_levels_that_start_from_the_level_before_are_nested_and_of_exact_size(
    entries: Any, granularity: Granularity, shares: list[int]
) -> None:
    scores, _ = tensors(entries)
    kept: dict[str, Tensor] | None = None
    for level, share in enumerate(sorted(shares)):
        # other scores at each level, as after training
        moved = {name: torch.roll(x, level) for name, x in scores.items()}
        smaller = prune(moved, share / 100, granularity=granularity, among=kept)
        sizes = {name: (int(x.sum()), len(x)) for name, x in smaller.items()}
        if granularity == "global":
            n = sum(size for _, size in sizes.values())
            assert sum(left for left, _ in sizes.values()) == n - round(share / 100 * n)
        else:
            assert all(left == n - round(share / 100 * n) for left, n in sizes.values())
        assert kept is None or all(bool((kept[name] | ~smaller[name]).all()) for name in kept)
        kept = smaller


@pytest.mark.parametrize("sample", [1, 3, 16])
@given(st.lists(tied, min_size=1, max_size=60), st.lists(tied, max_size=60), st.data())
def test_a_sample_that_misleads_costs_time_and_no_exactness(
    sample: int, first: list[float], second: list[float], data: st.DataObject
) -> None:
    # a sample of 1 brackets by nearly nothing; in sorted and periodic rows the stride resonates
    first = data.draw(st.sampled_from([first, sorted(first), first[:2] * 20]))
    scores, among = tensors([[(score, True) for score in rows] for rows in (first, second)])
    count = data.draw(st.integers(0, len(first) + len(second)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tombola.prune, "_SAMPLE", sample)
        left = without_lowest(scores, count, among)
    assert {name: x.tolist() for name, x in left.items()} == sorted_away(scores, among, count)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("sparsity", [0.0001, 0.3, 0.7, 0.9999])
def test_half_a_million_values_go_as_in_a_stable_sort(sparsity: float, periodic: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (300, 400), "b": (400,), "c": (700, 571)}
    # few enough different values for thousands of ties
    scores = {name: torch.from_numpy(rng.integers(0, 5000, shape).astype(np.float32)) for name, shape in shapes.items()}
    if periodic:  # each seventh value, all that a sample with a stride of 7 sees of a tensor, is far above the others
        for x in scores.values():
            x.view(-1)[::7] += 10_000
    kept = prune(scores, sparsity)
    flat = torch.cat([x.flatten() for x in scores.values()])
    expected = torch.ones(len(flat), dtype=torch.bool)
    expected[torch.argsort(flat, stable=True)[: round(sparsity * len(flat))]] = False
    assert torch.equal(torch.cat([x.flatten() for x in kept.values()]), expected)
    assert {name: tuple(x.shape) for name, x in kept.items()} == shapes


def test_infinite_scores_are_scores_and_what_is_not_there_never_takes_their_place() -> None:
    inf = float("inf")
    scores, among = torch.tensor([5.0, inf, inf, -inf, inf]), torch.tensor([False, False, True, True, True])
    assert lowest(scores, 1, among).tolist() == [False, False, False, True, False]
    assert lowest(scores, 2, among).tolist() == [False, False, True, True, False]
    assert lowest(scores, 3, among).tolist() == [False, False, True, True, True]


def test_scores_of_several_types_are_compared_exactly() -> None:
    # 1 + 1e-12 is 1 in fp32, 2^24 + 1 is 2^24
    scores = {"single": torch.tensor([1.0, 1.0]), "double": torch.tensor([1 - 1e-12, 1 + 1e-12], dtype=torch.float64)}
    assert {name: x.tolist() for name, x in prune(scores, 0.75).items()} == {"single": [False] * 2, "double": [False, True]}
    assert {name: x.tolist() for name, x in prune(scores, 0.25).items()} == {"single": [True] * 2, "double": [False, True]}
    assert lowest(torch.tensor([2**24 + 1, 2**24]), 1, torch.ones(2, dtype=torch.bool)).tolist() == [False, True]
    assert to_sparsity(torch.tensor([3.0, 1.0], dtype=torch.bfloat16), 0.5).tolist() == [True, False]


def test_scores_and_masks_given_are_left_as_they_were_and_returned_ones_are_their_own() -> None:
    scores, among = {"a": torch.tensor([3.0, 1.0, 2.0])}, {"a": torch.tensor([True, True, False])}
    for sparsity in (1 / 3, 0.67):
        prune(scores, sparsity, among=among)["a"].fill_(False)
    without_lowest(scores, 0, among)["a"].fill_(False)
    assert (scores["a"].tolist(), among["a"].tolist()) == ([3.0, 1.0, 2.0], [True, True, False])


def test_a_sparsity_below_what_is_removed_already_is_refused() -> None:
    scores, among = {"a": torch.ones(4), "b": torch.ones(4)}, {"a": torch.zeros(4).bool(), "b": torch.ones(4).bool()}
    with pytest.raises(MaskError, match="more is removed already") as error:
        prune(scores, 0.25, among=among)
    assert (error.value.got, error.value.expected) == ("4 of 8 entries removed", "at most 2 at sparsity 0.25")
    assert prune(scores, 0.5, among=among)["b"].all()
    with pytest.raises(MaskError, match="more is removed already") as error:
        prune(scores, 0.5, granularity="per_matrix", among=among)
    assert error.value.got == "4 of 4 entries removed in a"


@pytest.mark.parametrize("among", [{}, {"a": torch.ones(3, 2).bool()}])
def test_masks_of_other_names_or_shapes_are_refused(among: dict[str, Tensor]) -> None:
    for act in (
        lambda: without_lowest({"a": torch.ones(2, 3)}, 1, among),
        lambda: prune({"a": torch.ones(6, 1)}, 0.5, among=among),
    ):
        with pytest.raises(MaskError, match="do not belong together"):
            act()


def test_no_scores_and_nan_are_refused_by_name() -> None:
    with pytest.raises(MaskError, match="nothing to prune"):
        prune({}, 0.5)
    with pytest.raises(MaskError, match="NaN") as error:
        prune({"fine": torch.ones(2), "broken": torch.tensor([1.0, NAN])}, 0.0)
    assert error.value.got == "broken"
