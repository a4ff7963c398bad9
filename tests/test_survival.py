"""Tables of what survives and what heads are like, from rows made by hand: counted again in plain Python."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from tombola import stats
from tombola.errors import DataError
from tombola.study.beside_rows import AttentionRow, CrossedMask, Magnitude
from tombola.study.heads import (
    ALL,
    SUPER,
    answers_rows,
    magnitude_rows,
    order_rows,
    pattern_rows,
    survivor_rows,
)
from tombola.study.results import Agreement, Results, ScoreRow, TicketRow
from tombola.study.survival import (
    cases,
    crossed_rows,
    flat,
    joint_rows,
    overlap_rows,
    stability_rows,
    survival_rows,
    tasks_survived_rows,
)
from tombola.study.variants import Variant

LAYERS, HEADS = 3, 4


def ticket(task: str, seed: int, kept: list[float], mlps: Sequence[float], **said: Any) -> TicketRow:
    """A good ticket of 3 layers of 4 heads."""
    heads = tuple(tuple(kept[i * HEADS : (i + 1) * HEADS]) for i in range(LAYERS))
    plain: dict[str, Any] = {"kind": "good", "draw": 0, "search": "s-prune", "family": "as found", "preset": "corrected"}
    sizes = {"body_share": sum(kept) / 12, "total_share": 0.5}
    cell = f"{task} {seed} {said.get('search', '')} {said.get('family', '')}"
    whole = tuple(map(float, mlps))
    return TicketRow(cell=cell, model="m", task=task, seed=seed, heads=heads, mlps=whole, **{**plain, **sizes, **said})


def score(task: str, seed: int, kind: str, stage: str, value: float, **said: Any) -> ScoreRow:
    plain: dict[str, Any] = {"draw": 0, "split": "validation", "role": "report", "metric": "accuracy", "n": 100, "majority": 0.5}
    cell = f"{task} {seed} {kind} {stage} {sorted(said.items())}"
    return ScoreRow(cell=cell, model="m", task=task, seed=seed, kind=kind, stage=stage, value=value, **{**plain, **said})


def drawn(seed: int, n: int = 12) -> list[float]:
    rng = random.Random(seed)
    return [float(rng.random() < 0.5) for _ in range(n)]


TICKETS = tuple(
    ticket(task, seed, drawn(10 * i + seed), [1, seed % 2, i]) for i, task in enumerate(("rte", "mrpc")) for seed in (0, 1, 2)
)


# ---------------------------------------------------------------------------------------------------------------- cases


def test_cases_leave_out_variants_that_say_no_more_than_the_search() -> None:
    searches = [replace(one, task=f"{one.task} (method=s-prune)") for one in TICKETS]
    values = [replace(one, task=f"{one.task} (method=m-prune)", search="m-prune", values=(5, 9)) for one in TICKETS[:3]]
    found = cases(searches + [replace(one, task=one.task.replace("s-prune", "m-prune")) for one in values])
    assert [(case.search, case.task, case.variant, sorted(of)) for case, of in found.items()] == [
        *[("m-prune", "rte", "", [0, 1, 2]), ("s-prune", "mrpc", "", [0, 1, 2]), ("s-prune", "rte", "", [0, 1, 2])]
    ]
    variants = [replace(one, task=f"{one.task} (epochs={e})", cell=f"{one.cell} {e}") for one in TICKETS for e in (1, 2)]
    assert len(cases(variants)) == 4 and {case.variant for case in cases(variants)} == {"(epochs=1)", "(epochs=2)"}
    # what is trained afterwards for longer has the same tickets: one case, whatever its rows are called
    same = [replace(one, task=f"{one.task} (epochs={e})") for one in TICKETS for e in (1, 2)]
    assert [(case.task, case.variant, case.names) for case in cases(same)] == [
        (task, "", (f"{task} (epochs=1)", f"{task} (epochs=2)")) for task in ("mrpc", "rte")
    ]
    controls = [replace(one, kind="random") for one in TICKETS]
    assert cases([*TICKETS, *controls]).keys() == cases(TICKETS).keys()


def test_tasks_of_which_one_was_run_in_two_ways_are_compared_where_they_were_run_alike() -> None:
    """Of rte, masks were chosen on dev and on train rows; of mrpc on dev rows alone, so that its rows do not say so."""
    rows = [replace(one, task=f"rte (split={s})", cell=f"{one.cell} {s}") for one in TICKETS[:3] for s in ("dev", "train")]
    variants = {f"rte (split={s})": Variant("rte", {"split": s, "rate": 1}, {"split": s}) for s in ("dev", "train")}
    # a ticket tested on another task makes whose mask it is a setting that differs: it is no way to run a search
    variants = {name: replace(of, settings={**of.settings, "mask_of": "rte"}) for name, of in variants.items()}
    variants["mrpc"] = Variant("mrpc", {"split": "dev", "rate": 2, "mask_of": "mrpc"}, {"mask_of": "mrpc"})
    found = overlap_rows(Results((), (*rows, *TICKETS[3:]), variants=variants))
    pairs = {(row.a.task, row.b.task, row.b.variant) for row in found if row.a != row.b}
    assert pairs == {("mrpc", "rte", "(split=dev)")}


# ------------------------------------------------------------------------------------------------------ E9, E13, E14


def test_stability_is_that_of_the_masks() -> None:
    rows = stability_rows(Results((), TICKETS))
    assert [(row.case.task, row.part) for row in rows] == [(t, p) for t in ("mrpc", "rte") for p in ("heads", "mlps")]
    masks = [[bool(x) for x in drawn(seed)] for seed in (0, 1, 2)]
    (row,) = (one for one in rows if one.case.task == "rte" and one.part == "heads")
    assert row.found == stats.stability(masks) and row.pairs.keys() == {(0, 1), (0, 2), (1, 2)}
    # kappa by its definition
    k = np.sum(masks, axis=0)
    share = k.sum() / 36
    agreeing = np.mean([(x * (x - 1) + (3 - x) * (2 - x)) / 6 for x in k])
    chance = share**2 + (1 - share) ** 2
    assert row.found.kappa.value == pytest.approx((agreeing - chance) / (1 - chance))
    values = [replace(one, values=(3, 9)) for one in TICKETS]
    assert stability_rows(Results((), tuple(values))) == [], "of single values there are no whole parts"
    assert stability_rows(Results((), TICKETS[:1])) == []


def test_survival_is_a_mean_over_seeds_of_single_values_too() -> None:
    shares = [[0.1 * ((i * (s + 1)) % 10) for i in range(12)] for s in range(3)]
    rows = survival_rows(Results((), tuple(ticket("rte", s, shares[s], [0.5, 0.5, 0.5], values=(5, 9)) for s in range(3))))
    heads, mlps = rows
    assert heads.mean == pytest.approx(np.mean(shares, axis=0).tolist())
    assert heads.std == pytest.approx(np.std(shares, axis=0, ddof=1).tolist())
    assert heads.correlation == pytest.approx(np.mean([spearmanr(a, b).statistic for a, b in combinations(shares, 2)]))
    assert mlps.correlation is None and "3 of 3 pairs" in mlps.note


def test_overlap_of_tasks_is_over_matched_seeds_with_sizes_on_the_diagonal() -> None:
    rows = overlap_rows(Results((), (*TICKETS, ticket("mrpc", 9, drawn(1), [1.0, 1.0, 1.0]))))
    (heads,) = (row for row in rows if row.part == "heads" and row.a != row.b)
    assert heads.seeds == (0, 1, 2)
    shared = [sum(a * b for a, b in zip(drawn(seed), drawn(10 + seed), strict=True)) for seed in (0, 1, 2)]
    assert heads.found.shared.value == pytest.approx(np.mean(shared))
    assert heads.found.shared.std == pytest.approx(np.std(shared, ddof=1))
    expected = np.mean([sum(drawn(seed)) * sum(drawn(10 + seed)) / 12 for seed in (0, 1, 2)])
    assert heads.found.expected_shared == pytest.approx(expected) and heads.p_corrected == heads.found.p_at_least
    diagonal = {row.a.task: row for row in rows if row.a == row.b and row.part == "heads"}
    assert diagonal["rte"].found.shared.value == pytest.approx(np.mean([sum(drawn(seed)) for seed in (0, 1, 2)]))
    assert diagonal["rte"].p_corrected is None and diagonal["mrpc"].seeds == (0, 1, 2, 9)


def test_tasks_survived_are_counted_seed_by_seed() -> None:
    heads, mlps = tasks_survived_rows(Results((), TICKETS))
    counts = np.array([[a + b for a, b in zip(drawn(seed), drawn(10 + seed), strict=True)] for seed in (0, 1, 2)])
    assert heads.mean == pytest.approx(counts.mean(0).tolist()) and heads.std == pytest.approx(counts.std(0, ddof=1).tolist())
    assert [list(heads.by_seed[seed]) for seed in (0, 1, 2)] == counts.tolist()
    assert mlps.mean == pytest.approx([2.0, 2 / 3, 1.0]) and mlps.tasks == ("mrpc", "rte")
    assert tasks_survived_rows(Results((), TICKETS[:3])) == []


# ------------------------------------------------------------------------------------------------------- joint, crossed


def test_interaction_is_what_both_masks_lose_beyond_their_sum() -> None:
    masks: list[TicketRow] = []
    scores: list[ScoreRow] = []
    for seed in (0, 1):
        masks += [ticket("rte", seed, drawn(seed), [1, 0, 1])]
        masks += [ticket("rte", seed, drawn(seed + 5), [1, 1, 1], search="s-prune-heads")]
        masks += [ticket("rte", seed, [1.0] * 12, [0, 0, 1], search="s-prune-mlps")]
        scores += [score("rte", seed, "full", "full", 0.9)]
        for search, family, value in (
            ("s-prune", "as found", 0.8), ("s-prune-heads", "as found", 0.85), ("s-prune-mlps", "as found", 0.8),
            ("s-prune-heads + s-prune-mlps", "joined", 0.6 + 0.05 * seed),
        ):  # fmt: skip
            said = {"search": search, "family": family, "preset": "corrected"}
            scores.append(score("rte", seed, "good", "pruned", value, **said))
            scores.append(score("rte", seed, "good", "retrained", 0.1, **said))
    (row,) = joint_rows(Results(tuple(scores), tuple(masks)))
    assert row.seeds == (0, 1) and row.metric == "accuracy"
    assert row.lost["joined"].value == pytest.approx((0.3 + 0.25) / 2) and row.lost["s-prune-heads"].value == pytest.approx(0.05)
    assert row.interaction.value == pytest.approx(np.mean([0.3 - 0.05 - 0.1, 0.25 - 0.05 - 0.1]))
    assert row.kept["s-prune mlps"].value == pytest.approx(2 / 3) and row.kept["s-prune-mlps mlps"].value == pytest.approx(1 / 3)
    shared = np.mean([sum(a * b for a, b in zip(drawn(s), drawn(s + 5), strict=True)) for s in (0, 1)])
    assert row.shared_heads.shared.value == pytest.approx(shared)
    (without,) = joint_rows(Results((), tuple(masks)))
    assert without.interaction.value is None and "joined" in without.note
    assert joint_rows(Results(tuple(scores), tuple(masks[:2]))) == []


def test_crossed_masks_are_split_by_factor_and_a_study_not_yet_done_says_so() -> None:
    masks = [
        CrossedMask(cell=f"{h}{d}{o}", model="m", task="rte", search="s-prune", head_seed=h, data_seed=d, dropout_seed=o,
                    heads=((float(d), float(d), 1.0, 0.0),) * LAYERS, mlps=(float(h), 1.0, 1.0))
        for h, d, o in product((0, 1), repeat=3)
    ]  # fmt: skip
    heads, mlps = crossed_rows(Results((), (), crossed=tuple(masks)))
    assert heads.found is not None and mlps.found is not None
    assert heads.found.share["data",] == 1.0 and heads.found.total == pytest.approx(0.25) and heads.runs == 8
    assert mlps.found.alone == {"head": 1.0, "data": 0.0, "dropout": 0.0} and mlps.found.total == pytest.approx(1 / 6)
    (unfinished, _) = crossed_rows(Results((), (), crossed=tuple(masks[:-1])))
    assert unfinished.found is None and "no crossed design" in unfinished.note


# ------------------------------------------------------------------------------------------------------------ E11, E12


def attention(task: str, seed: int | None, layer: int, head: int, other: int, kind: str = "raw", n: int = 10) -> AttentionRow:
    counts = {"diagonal": n - other, "vertical": 0, "mix": 0, "block": 0, "other": other}
    options = {"norm_map_weight": "out_projection", "map_inputs": "full_real_tokens", "map_preprocess": "same"}
    weights = "pretrained" if seed is None else "fine_tuned"
    shares = {name: k / n for name, k in counts.items()}
    return AttentionRow(
        cell=f"{task} {seed}", model="m", task=task, seed=seed, weights=weights, kind=kind, layer=layer, run=0, head=head, n=n,
        unclassified=0, counts=counts, shares=shares, means={"entropy": float(head)}, f1=0.8, split="validation",
        pattern_split="stratified_kfold", **options,
    )  # fmt: skip


def maps_of(task: str, seed: int | None, rng: random.Random) -> list[AttentionRow]:
    return [attention(task, seed, layer, head, rng.randint(0, 10)) for layer in range(LAYERS) for head in range(HEADS)]


def test_pattern_shares_are_over_maps_then_over_seeds() -> None:
    rng = random.Random(0)
    maps = [one for seed in (0, 1, 2, None) for one in maps_of("rte", seed, rng)]
    twice = [replace(one, task="rte (method=s-prune)") for one in maps]
    rows = {(row.maps.weights, row.which): row for row in pattern_rows(Results((), TICKETS[:3], attention=tuple(maps + twice)))}
    assert rows.keys() == set(product(("fine_tuned", "pretrained"), (ALL, SUPER)))
    both = [all(kept) for kept in zip(*(drawn(seed) for seed in (0, 1, 2)), strict=True)]
    assert 0 < sum(both) < 12
    for which, keep in ((ALL, [True] * 12), (SUPER, both)):
        row = rows["fine_tuned", which]
        chosen = [one for one in maps if keep[one.layer * HEADS + one.head]]
        by_seed = [np.mean([one.counts["other"] / 10 for one in chosen if one.seed == seed]) for seed in (0, 1, 2)]
        assert row.shares["other"].value == pytest.approx(np.mean(by_seed)) and row.n_heads == sum(keep)
        assert row.shares["other"].std == pytest.approx(np.std(by_seed, ddof=1)) and row.n_maps == 30 * sum(keep)
        assert sum(one.value or 0 for one in row.shares.values()) == pytest.approx(1.0)
    assert rows["pretrained", ALL].seeds == () and rows["pretrained", ALL].shares["other"].std is None
    assert rows["fine_tuned", ALL].means["entropy"].value == pytest.approx(1.5)


def test_maps_of_models_of_other_settings_are_kept_apart() -> None:
    rng = random.Random(3)
    one, two = ([replace(x, cell=f"{x.cell} {e}", task=f"rte (epochs={e})") for x in maps_of("rte", 0, rng)] for e in (1, 2))
    base = [replace(x, task=f"rte (epochs={e})") for x in maps_of("rte", None, rng) for e in (1, 2)]
    tickets = tuple(replace(x, cell=f"{x.cell} {e}", task=f"rte (epochs={e})") for x in TICKETS[:3] for e in (1, 2))
    rows = pattern_rows(Results((), tickets, attention=(*one, *two, *base)))
    tuned = [row for row in rows if row.maps.weights == "fine_tuned" and row.which == ALL]
    assert [row.maps.variants for row in tuned] == [("(epochs=1)",), ("(epochs=2)",)]
    for row, own in zip(tuned, (one, two), strict=True):
        assert row.shares["other"].value == pytest.approx(np.mean([x.counts["other"] / 10 for x in own]))
    supers = [(row.maps.variants, row.case.variant) for row in rows if row.case and row.maps.weights == "fine_tuned"]
    assert supers == [(("(epochs=1)",), "(epochs=1)"), (("(epochs=2)",), "(epochs=2)")]
    assert [row.maps.variants for row in rows if row.maps.weights == "pretrained" and row.which == ALL] == [()]


def test_the_correlation_with_survival_is_that_of_all_pairs() -> None:
    rng = random.Random(1)
    maps = [one for task in ("rte", "mrpc") for seed in (0, 1) for one in maps_of(task, seed, rng)]
    results = Results((), TICKETS, attention=tuple(maps))
    rows = {row.maps.task: row for row in survivor_rows(results)}
    assert rows.keys() == {"rte", "mrpc", "all"}
    x: list[bool] = []
    y: list[bool] = []
    for i, task in enumerate(("rte", "mrpc")):
        kept = [all(of) for of in zip(*(drawn(10 * i + seed) for seed in (0, 1, 2)), strict=True)]
        for one in (one for one in maps if one.task == task):
            x += [kept[one.layer * HEADS + one.head]] * 10
            y += [True] * one.counts["other"] + [False] * (10 - one.counts["other"])
        if task == "rte":
            assert rows["rte"].pooled.value == pytest.approx(pearsonr(x, y).statistic)
    pooled = rows["all"]
    assert pooled.pooled.value == pytest.approx(pearsonr(x, y).statistic) == pooled.clustered.value
    assert pooled.pairs == len(x) and pooled.heads == 24 and pooled.case is None
    assert pooled.by("pooled") is pooled.pooled and pooled.by("clustered_by_head") is pooled.clustered
    ends = [(one.high or 0) - (one.low or 0) for one in (pooled.pooled, pooled.clustered)]
    assert ends[1] > 1.5 * ends[0], "maps of one head are not independent"


# ------------------------------------------------------------------------------------------------------------------ X13


def test_orders_are_compared_between_seeds_and_between_tasks() -> None:
    rng = random.Random(2)

    def scored(one: TicketRow) -> TicketRow:
        heads = tuple(tuple(rng.random() for _ in range(HEADS)) for _ in range(LAYERS))
        return replace(one, head_importance=heads, mlp_importance=(0.3, 0.2, 0.1))

    own = tuple(scored(one) for one in TICKETS)
    rows = order_rows(Results((), own), draws=99)
    assert len(rows) == 2 * (3 + 3 + 3)
    row = next(one for one in rows if one.part == "heads" and one.a.task != one.b.task and one.seed_a == one.seed_b == 1)
    a, b = ([x for layer in one.head_importance or () for x in layer] for one in own if one.seed == 1)
    assert row.found.spearman.value == pytest.approx(spearmanr(a, b).statistic)
    assert all(one.found.rbo == pytest.approx(1.0) for one in rows if one.part == "mlps")
    assert order_rows(Results((), TICKETS)) == []
    shares = [[((i * step) % 12) / 12 for i in range(12)] for step in (3, 4)]
    said: dict[str, Any] = {"search": "m-prune", "values": (5, 9)}
    values = tuple(ticket("rte", seed, of, [1, 1, 1], **said) for seed, of in enumerate(shares))
    heads, mlps = order_rows(Results((), values), "m-prune", flat, draws=99)
    assert heads.found.spearman.value == pytest.approx(spearmanr(*(flat(one, "heads") for one in values)).statistic)
    assert mlps.found.spearman.value is None and "same for all parts" in mlps.found.note


def test_magnitudes_are_means_over_seeds_and_go_with_survival_or_not() -> None:
    def of(seed: int | None, weights: str, size: float) -> list[Magnitude]:
        common: dict[str, Any] = {"cell": "c", "model": "m", "task": "rte", "seed": seed, "weights": weights}
        common |= {"part": "mlps", "head": None}
        return [Magnitude(layer=layer, mean_abs=size * (layer + 1), **common) for layer in range(3)]

    sizes = (*of(0, "fine_tuned", 1.0), *of(1, "fine_tuned", 3.0), *of(None, "pretrained", 1.0))
    masks = tuple(ticket("rte", seed, drawn(seed), [0, seed, 1]) for seed in (0, 1))
    rows = {row.weights: row for row in magnitude_rows(Results((), masks, magnitudes=sizes))}
    assert rows["fine_tuned"].mean == pytest.approx((2.0, 4.0, 6.0)) and rows["fine_tuned"].seeds == (0, 1)
    assert rows["pretrained"].mean == (1.0, 2.0, 3.0) and rows["pretrained"].seeds == ()
    (survives,) = rows["fine_tuned"].with_survival.values()
    assert survives.value == pytest.approx(1.0), "0, half and all of the seeds, as the weights grow"


def test_answers_are_shares_beside_those_of_the_dense_model() -> None:
    def of(seed: int, yes: int) -> ScoreRow:
        agreement = Agreement(5, 100, 3, 2, {"yes": 50, "no": 50}, {"yes": yes, "no": 100 - yes})
        return score("rte", seed, "bad", "pruned", 0.5, agreement=agreement, search="s-prune", family="as found")

    (row,) = answers_rows(Results((of(0, 90), of(1, 100), replace(of(1, 100), metric="f1")), ()))
    assert row.shares["yes"].value == pytest.approx(0.95) and row.shares["no"].n_seeds == 2
    assert row.dense["no"].value == pytest.approx(0.5)


# --------------------------------------------------------------------------------------------------------------- Mantel


def test_mantel_of_few_things_tries_every_order() -> None:
    from itertools import permutations

    rng = np.random.default_rng(0)
    a, b = (x + x.T for x in rng.random((2, 5, 5)))
    above = np.triu_indices(5, 1)
    found = stats.mantel(a.tolist(), b.tolist())
    assert found.r == pytest.approx(pearsonr(a[above], b[above]).statistic)
    others = [abs(pearsonr(a[above], b[np.ix_(p, p)][above]).statistic) for p in permutations(range(5))]
    assert found.r is not None and found.p == pytest.approx(np.mean([x >= abs(found.r) - 1e-9 for x in others]))
    assert found.smallest_p == pytest.approx(1 / 120)


def test_mantel_of_many_things_is_drawn_and_holds_its_level() -> None:
    rng = np.random.default_rng(1)
    ps = []
    for _ in range(200):
        a, b = (x + x.T for x in rng.random((2, 9, 9)))
        ps.append(stats.mantel(a.tolist(), b.tolist(), draws=99).p or 0)
    assert 0.01 <= np.mean([p <= 0.05 for p in ps]) <= 0.1
    same = a.tolist()
    assert stats.mantel(same, same, draws=99).p == pytest.approx(0.01)


def test_mantel_that_has_no_answer_says_why() -> None:
    assert stats.mantel(np.eye(2).tolist(), np.eye(2).tolist()).r is None
    assert "alike" in stats.mantel(np.ones((4, 4)).tolist(), np.eye(4).tolist()).note
    with pytest.raises(DataError, match="do not fit"):
        stats.mantel(np.eye(2).tolist(), [[1.0]])
