"""Control masks: exact size per type, only what the kind allows, uniform and independent draws."""

import random
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, hypergeom

from tombola.errors import SearchError
from tombola.mask import Mask
from tombola.search.controls import CONTROLS, control


def good_mask(heads: int, mlps: int, *, layers: int = 12, seed: int = 0) -> Mask:
    """A mask that keeps this many of layers × 12 heads and of layers MLPs, anywhere."""
    rng = np.random.default_rng(seed)
    kept = [np.zeros(layers * 12, bool), np.zeros(layers, bool)]
    for part, count in zip(kept, (heads, mlps), strict=True):
        part[rng.permutation(len(part))[:count]] = True
    return Mask(heads=torch.from_numpy(kept[0]).reshape(layers, 12), mlps=torch.from_numpy(kept[1]))


def kept_of(mask: Mask, part: str) -> set[int]:
    return {i for i, kept in enumerate(mask.parts()[part].flatten().tolist()) if kept}


SIZES = [(0, 0), (1, 12), (30, 3), (72, 6), (95, 8), (143, 11), (144, 12), (144, 0)]


@pytest.mark.parametrize("sizes", SIZES)
def test_random_and_bad_have_exactly_the_size_of_the_ticket_per_type(sizes: tuple[int, int]) -> None:
    good = good_mask(*sizes)
    for kind, draw in product(("random", "bad"), range(5)):
        found = control(good, kind, seed=1, draw=draw)
        assert (len(kept_of(found, "heads")), len(kept_of(found, "mlps"))) == sizes
        assert found.heads is not None and tuple(found.heads.shape) == (12, 12)


@pytest.mark.parametrize("sizes", SIZES)
def test_strict_bad_keeps_only_what_was_removed_and_no_more_than_there_is(sizes: tuple[int, int]) -> None:
    good = good_mask(*sizes)
    for draw in range(5):
        found = control(good, "strict-bad", seed=1, draw=draw)
        for part, size, n in zip(("heads", "mlps"), sizes, (144, 12), strict=True):
            assert len(kept_of(found, part)) == min(size, n - size)
            assert not kept_of(found, part) & kept_of(good, part)


@pytest.mark.parametrize("sizes", SIZES)
def test_bad_takes_removed_parts_first_and_survivors_only_to_fill_up(sizes: tuple[int, int]) -> None:
    good = good_mask(*sizes)
    for draw in range(5):
        found = control(good, "bad", seed=1, draw=draw)
        for part, size, n in zip(("heads", "mlps"), sizes, (144, 12), strict=True):
            shared = kept_of(found, part) & kept_of(good, part)
            assert len(shared) == max(0, size - (n - size))
            if shared:
                assert kept_of(found, part) >= set(range(n)) - kept_of(good, part)


def test_same_arguments_give_the_same_mask_whatever_the_global_generators_hold() -> None:
    good, found = good_mask(95, 8), []
    for ambient in (0, 1):
        random.seed(ambient)
        np.random.seed(ambient)  # noqa: NPY002
        torch.manual_seed(ambient)
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
        found.append([control(good, kind, seed=7, draw=3) for kind in CONTROLS])
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])
    assert found[0] == found[1]


def test_seeds_draws_kinds_and_tickets_all_give_masks_of_their_own() -> None:
    goods = [good_mask(72, 6, seed=seed) for seed in range(4)]
    ways = list(product(goods, ("random", "bad", "strict-bad"), (0, 1, 11), (0, 1, 2, 12)))
    found = {control(good, kind, seed=seed, draw=draw) for good, kind, seed, draw in ways if kind == "random"}
    assert len(found) == len(ways) / 3
    # of 72 removed all go in; so here bad and strict-bad have one possible answer, and random is neither
    assert all(control(g, "bad", seed=s, draw=0) == control(g, "strict-bad", seed=s, draw=1) == ~g for g in goods for s in (0, 1))
    sparse = [good_mask(30, 3, seed=seed) for seed in range(4)]
    ways = list(product(sparse, CONTROLS, (0, 1, 11), (0, 1, 2, 12)))
    assert len({control(good, kind, seed=seed, draw=draw) for good, kind, seed, draw in ways}) == len(ways)


def test_random_masks_of_the_same_size_are_equally_likely() -> None:
    good = Mask(heads=torch.tensor([[True, True, False], [False, False, False]]), mlps=torch.tensor([True, False]))
    drawn = [control(good, "random", seed=draw // 50, draw=draw % 50) for draw in range(3000)]
    heads = Counter(tuple(sorted(kept_of(mask, "heads"))) for mask in drawn)
    assert set(heads) == set(combinations(range(6), 2))
    assert chisquare(list(heads.values())).pvalue > 1e-3
    # heads and MLPs are drawn independently of each other: all 15 × 2 pairs equally often
    pairs = Counter((tuple(sorted(kept_of(mask, "heads"))), min(kept_of(mask, "mlps"))) for mask in drawn)
    assert chisquare([pairs[pair] for pair in product(combinations(range(6), 2), (0, 1))]).pvalue > 1e-3


def test_bad_masks_of_one_ticket_are_equally_likely_among_those_allowed() -> None:
    # heads: 2 of the 4 removed, 6 ways; MLPs: both removed and 2 of the 4 survivors, 6 ways
    heads, mlps = torch.tensor([1, 0, 0, 1, 0, 0]).bool(), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    good = Mask(heads=heads[:, None], mlps=mlps)
    drawn = [control(good, "bad", seed=0, draw=draw) for draw in range(3000)]
    for part, always, from_these in (("heads", set[int](), (1, 2, 4, 5)), ("mlps", {2, 4}, (0, 1, 3, 5))):
        counts = Counter(tuple(sorted(kept_of(mask, part))) for mask in drawn)
        assert set(counts) == {tuple(sorted(always | set(pair))) for pair in combinations(from_these, 2)}
        assert chisquare(list(counts.values())).pvalue > 1e-3


def test_draws_share_with_the_ticket_and_with_each_other_what_chance_gives() -> None:
    good = good_mask(95, 8)
    drawn = [control(good, "random", seed=seed, draw=draw) for seed, draw in product(range(20), range(20))]
    for part, n, size in (("heads", 144, 95), ("mlps", 12, 8)):
        chance = hypergeom(n, size, size)
        error = 4 * chance.std() / np.sqrt(len(drawn))  # of a mean over 400 draws
        with_good = [len(kept_of(good, part) & kept_of(mask, part)) for mask in drawn]
        assert np.mean(with_good) == pytest.approx(chance.mean(), abs=error)
        assert np.std(with_good) == pytest.approx(chance.std(), rel=0.2)
        in_turn = [len(kept_of(a, part) & kept_of(b, part)) for a, b in zip(drawn, [*drawn[1:], drawn[0]], strict=True)]
        assert np.mean(in_turn) == pytest.approx(chance.mean(), abs=error)


def test_parts_a_ticket_does_not_mask_stay_unmasked_and_none_is_dropped() -> None:
    heads_only = control(Mask(heads=torch.tensor([[True, False, True]])), "random", seed=0, draw=0)
    assert heads_only.counts() == {"heads": (2, 3)}
    values = {"classifier.weight": torch.tensor([[True, False], [False, False]])}
    finer = control(Mask(neurons=torch.tensor([[True, False, False]]), values=values), "bad", seed=0, draw=0)
    assert finer.counts() == {"neurons": (1, 3), "classifier.weight": (1, 4)}
    assert not (finer.values["classifier.weight"] & values["classifier.weight"]).any()


def test_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(SearchError, match="unknown kind of control 'worst'") as error:
        control(good_mask(10, 2), "worst", seed=0, draw=0)
    assert error.value.expected == "random, bad, strict-bad"
