"""Control masks: exact size per type, only what the kind allows, uniform and independent draws."""

import hashlib
import random
from collections import Counter
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, hypergeom

from tombola.errors import MaskError, SearchError
from tombola.mask import Mask
from tombola.search import controls
from tombola.search.controls import CONTROLS, ControlSettings, control, needs_scores


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


def test_controls_of_stored_cells_are_still_the_ones_that_were_drawn() -> None:
    # the digest was taken from the first version of this function, whose masks lie in stores
    digest = hashlib.sha256()
    for sizes, kind, draw in product(((95, 8), (30, 3)), ("random", "bad", "strict-bad"), (0, 1)):
        for name, bits in control(good_mask(*sizes), kind, seed=3, draw=draw).pack().items():
            digest.update(name.encode() + bits.numpy().tobytes())
    assert digest.hexdigest()[:16] == "86e95d343f2f8414"


# ---------------------------------------------------------------------------------------------------- values of parameters

KEPT_OF_VALUES: dict[str, Any] = {"a.weight": [[1, 1], [0, 0]], "b.bias": [0, 1, 0]}  # 3 of 7, in two parameters


def values_mask(kept: dict[str, Any] = KEPT_OF_VALUES) -> Mask:
    return Mask(values={name: torch.tensor(part).bool() for name, part in kept.items()})


def positions(mask: Mask) -> tuple[int, ...]:
    """Kept values by their place in all parameters laid end to end, in the order of names."""
    flat = torch.cat([mask.values[name].flatten() for name in sorted(mask.values)])
    return tuple(torch.nonzero(flat).flatten().tolist())


masks_of_values = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6),
    min_size=1,
).map(lambda parts: Mask(values={name: torch.tensor(part) for name, part in parts.items()}))


@given(masks_of_values, st.integers(0, 5))
def test_values_of_all_parameters_are_one_type_of_exactly_the_size_of_the_ticket(good: Mask, draw: int) -> None:
    kept, n = len(positions(good)), sum(part.numel() for part in good.values.values())
    found = {kind: control(good, kind, seed=0, draw=draw) for kind in CONTROLS}
    for mask in found.values():
        assert {name: part.shape for name, part in mask.values.items()} == {n: p.shape for n, p in good.values.items()}
    survivors = set(positions(good))
    assert len(positions(found["random"])) == len(positions(found["bad"])) == kept
    assert len(survivors & set(positions(found["bad"]))) == max(0, 2 * kept - n)
    assert len(positions(found["strict-bad"])) == min(kept, n - kept)
    assert not survivors & set(positions(found["strict-bad"]))


@pytest.mark.parametrize(("kind", "among"), [("random", range(7)), ("bad", (2, 3, 4, 6)), ("strict-bad", (2, 3, 4, 6))])
def test_every_choice_of_values_over_all_parameters_is_equally_likely(kind: str, among: tuple[int, ...]) -> None:
    counts = Counter(positions(control(values_mask(), kind, seed=0, draw=draw)) for draw in range(3500))
    assert set(counts) == set(combinations(among, 3))
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_bad_values_are_topped_up_over_all_parameters_and_uniformly() -> None:
    good = values_mask({"a": [[1, 1], [1, 0]], "b": [0, 1]})  # 4 of 6: both removed go in, and 2 of the 4 survivors
    counts = Counter(positions(control(good, "bad", seed=1, draw=draw)) for draw in range(3000))
    assert set(counts) == {tuple(sorted({3, 4, *pair})) for pair in combinations((0, 1, 2, 5), 2)}
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_large_masks_keep_their_exact_size_and_what_a_matrix_keeps_is_what_chance_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    good = Mask(values={"a": torch.rand(700, 300, generator=generator) < 0.9, "b": torch.rand(90_000, generator=generator) < 0.1})
    (kept_a, n_a), (kept_b, n_b) = good.counts().values()
    found = control(good, "random", seed=0, draw=0)
    (found_a, _), (found_b, _) = found.counts().values()
    assert found_a + found_b == kept_a + kept_b
    chance = hypergeom(n_a + n_b, kept_a + kept_b, n_a)
    assert found_a != kept_a
    assert abs(found_a - chance.mean()) < 5 * chance.std()
    # no stripes: the halves of a matrix are kept alike
    top = int(found.values["a"][:350].sum())
    assert abs(top - found_a / 2) < 5 * hypergeom(n_a, found_a, n_a // 2).std()


def test_too_many_values_for_an_exact_draw_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "DRAWS_AT_ONCE", 7)
    with pytest.raises(SearchError, match="too many values for one exact draw") as error:
        control(values_mask(), "random", seed=0, draw=0)
    assert error.value.got == "7" and "exact_per_layer" in str(error.value.next)
    per_layer = ControlSettings(random_size="exact_per_layer")
    assert control(values_mask(), "random", seed=0, draw=0, settings=per_layer).counts() == values_mask().counts()


# -------------------------------------------------------------------------------------------------------------- the options


def test_random_per_layer_keeps_the_size_of_every_row_and_every_parameter() -> None:
    heads = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    units = Mask(heads=heads, mlps=torch.tensor([1, 0, 0, 1]).bool(), neurons=heads[:, :3])
    settings = ControlSettings(random_size="exact_per_layer")
    drawn = [control(units, "random", seed=0, draw=draw, settings=settings) for draw in range(1200)]
    for mask in drawn:
        assert mask.heads is not None and mask.neurons is not None and mask.mlps is not None
        assert mask.heads.sum(1).tolist() == [3, 0, 4, 1] and mask.neurons.sum(1).tolist() == [3, 0, 3, 1]
        assert int(mask.mlps.sum()) == 2
    rows = Counter(tuple(kept_of(mask, "heads")) for mask in drawn)
    assert len(rows) == 16 and chisquare(list(rows.values())).pvalue > 1e-3
    # a layer has one MLP: which layers keep theirs is drawn over all of them
    assert len({tuple(kept_of(mask, "mlps")) for mask in drawn}) == 6
    by_parameter = [control(values_mask(), "random", seed=0, draw=draw, settings=settings) for draw in range(1800)]
    assert all(mask.counts() == values_mask().counts() for mask in by_parameter)
    choices = Counter(map(positions, by_parameter))
    assert len(choices) == 6 * 3 and chisquare(list(choices.values())).pvalue > 1e-3


def test_bernoulli_keeps_each_entry_with_the_share_of_its_type() -> None:
    good, settings = good_mask(96, 3), ControlSettings(random_size="bernoulli")
    drawn = [control(good, "random", seed=0, draw=draw, settings=settings) for draw in range(1000)]
    for part, n, share in (("heads", 144, 96 / 144), ("mlps", 12, 3 / 12)):
        sizes = np.array([len(kept_of(mask, part)) for mask in drawn])
        expected = binom(n, share)
        assert sizes.mean() == pytest.approx(expected.mean(), abs=4 * expected.std() / np.sqrt(len(drawn)))
        assert sizes.std() == pytest.approx(expected.std(), rel=0.15)
    # of values: the share of all parameters together, 3 of 7, not each parameter's own
    found = [control(values_mask(), "random", seed=0, draw=draw, settings=settings) for draw in range(2000)]
    by_place = np.bincount(np.concatenate([positions(mask) for mask in found]).astype(int), minlength=7)
    assert np.abs(by_place - 2000 * 3 / 7).max() < 4 * binom(2000, 3 / 7).std()
    for all_or_nothing in (Mask(mlps=torch.ones(4).bool()), Mask(mlps=torch.zeros(4).bool())):
        assert control(all_or_nothing, "random", seed=0, draw=0, settings=settings) == all_or_nothing


@pytest.mark.parametrize("kind", ["bad", "strict-bad"])
def test_the_size_of_bad_tickets_does_not_depend_on_how_random_ones_are_sized(kind: str) -> None:
    good, default = good_mask(95, 8), control(good_mask(95, 8), kind, seed=0, draw=0)
    for size in ("bernoulli", "exact_per_layer"):
        assert control(good, kind, seed=0, draw=0, settings=ControlSettings(random_size=size)) == default


def test_reseeded_draws_repeat_over_seeds_draws_and_tickets_of_one_size() -> None:
    a, b, settings = good_mask(95, 8, seed=0), good_mask(95, 8, seed=1), ControlSettings(control_draws="reseeded_42")
    ways = list(product((a, b), (0, 7), (0, 1)))
    assert len({control(good, "random", seed=s, draw=d, settings=settings) for good, s, d in ways}) == 1
    assert len({control(good, "random", seed=s, draw=d) for good, s, d in ways}) == len(ways)
    assert control(a, "bad", seed=0, draw=0, settings=settings) == control(a, "bad", seed=3, draw=4, settings=settings)
    assert control(a, "bad", seed=0, draw=0, settings=settings) != control(b, "bad", seed=0, draw=0, settings=settings)


def test_lowest_importance_keeps_the_worst_heads_and_mlps_at_the_size_of_the_ticket() -> None:
    good = Mask(heads=torch.tensor([[True, True, False], [False, False, True]]), mlps=torch.tensor([True, False]))
    scores = {"heads": torch.tensor([[0.3, 0.1, 0.3], [0.2, 0.9, 0.3]]), "mlps": torch.tensor([1.0, 2.0])}
    settings = ControlSettings(bad_s_rule="lowest_importance")
    found = control(good, "bad", seed=5, draw=2, settings=settings, scores=scores)
    # 0.1, 0.2, then the first of three equals; what the ticket kept plays no part
    assert kept_of(found, "heads") == {1, 3, 0} and kept_of(found, "mlps") == {0}
    assert found == control(good, "bad", seed=0, draw=0, settings=settings, scores=scores)
    # values go by a rule of their own, which needs no scores here
    both = Mask(mlps=good.mlps, values=values_mask().values)
    drawn = control(both, "bad", seed=0, draw=0, settings=settings, scores=scores)
    assert not set(positions(drawn)) & set(positions(both))


def test_remove_highest_takes_the_highest_values_of_all_parameters_away() -> None:
    scores = {"a.weight": torch.tensor([[9.0, 1.0], [8.0, 2.0]]), "b.bias": torch.tensor([7.0, 0.5, 6.0])}
    settings = ControlSettings(bad_m_rule="remove_highest")
    found = control(values_mask(), "bad", seed=0, draw=0, settings=settings, scores=scores)
    assert found == values_mask({"a.weight": [[0, 1], [0, 1]], "b.bias": [0, 1, 0]})  # 0.5, 1 and 2 are left


def test_scores_that_are_missing_of_another_shape_or_nan_are_refused() -> None:
    settings = ControlSettings(bad_m_rule="remove_highest", bad_s_rule="lowest_importance")
    with pytest.raises(SearchError, match="needs a score for each") as error:
        control(values_mask(), "bad", seed=0, draw=0, settings=settings, scores={"a.weight": torch.ones(4)})
    assert error.value.got == "a.weight: (4,); b.bias: no scores"
    assert error.value.expected == "a.weight: (2, 2); b.bias: (3,)"
    with pytest.raises(SearchError, match="lowest heads needs a score"):
        control(good_mask(20, 3), "bad", seed=0, draw=0, settings=settings)
    scores = {"a.weight": torch.ones(2, 2), "b.bias": torch.tensor([1.0, float("nan"), 1.0])}
    with pytest.raises(MaskError, match="NaN"):
        control(values_mask(), "bad", seed=0, draw=0, settings=settings, scores=scores)
    # kinds that need no scores do not ask for them
    control(values_mask(), "strict-bad", seed=0, draw=0, settings=settings)


def test_scores_are_asked_for_only_by_the_rules_that_read_them() -> None:
    values, units = values_mask(), good_mask(20, 3)
    for s_rule, m_rule in product(("pruned_plus_fill", "lowest_importance"), ("pruned_plus_fill", "remove_highest")):
        settings = ControlSettings(bad_s_rule=s_rule, bad_m_rule=m_rule)
        for good, kind in product((values, units), CONTROLS):
            try:  # the oracle: does a draw without scores come through?
                control(good, kind, seed=0, draw=0, settings=settings)
            except SearchError:
                assert needs_scores(good, kind, settings)
            else:
                assert not needs_scores(good, kind, settings)
