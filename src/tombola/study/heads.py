"""What heads and MLPs are like: patterns of attention, importance, weight magnitudes, and what masked models answer.

The tables of E10, E11, E12 and X13, as pure functions of `Results`; see `tombola.study.survival` for cases.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from tombola import stats
from tombola.attention.known import CLASSES
from tombola.stats import Estimate
from tombola.study.beside_rows import AttentionRow
from tombola.study.results import Results, ScoreRow, TicketRow
from tombola.study.survival import PARTS, Case, alike, bare, cases, is_whole, mask_of

HETEROGENEOUS = "other"  # the class of maps that may mean something: none of the plain patterns
ALL, SUPER = "all heads", "super-survivors"


@dataclass(frozen=True, slots=True, order=True)
class Maps:
    """Maps that were made alike: of one model and task, one kind, with the same options."""

    model: str
    task: str  # without its variant
    weights: str  # "fine_tuned" | "pretrained"
    kind: str  # "raw" | "weighted"
    norm_map_weight: str
    map_inputs: str
    map_preprocess: str
    pattern_split: str
    variants: tuple[str, ...] = ()  # of the task's settings that their models belong to; () where all belong to the same

    @staticmethod
    def of(row: AttentionRow) -> "Maps":
        said = (row.norm_map_weight, row.map_inputs, row.map_preprocess, row.pattern_split)
        return Maps(row.model, bare(row.task), row.weights, row.kind, *said)

    def has(self, case: Case) -> bool:
        """Whether the survivors of a case may be looked for among these maps."""
        same = (case.model, case.task) == (self.model, self.task)
        return same and (not self.variants or not case.variant or case.variant in self.variants)


@dataclass(frozen=True, slots=True)
class PatternRow:
    """E11: share of each class among the maps of some heads."""

    maps: Maps
    which: str  # "all heads" | "super-survivors"
    case: Case | None  # whose survivors; None of all heads
    seeds: tuple[int, ...]  # of fine-tuned models; () of the pre-trained one
    n_heads: int
    n_maps: int
    shares: Mapping[str, Estimate]  # class → share, over seeds
    means: Mapping[str, Estimate]  # entropy, distance, mass_cls, … : mean over heads, over seeds
    f1: float  # of the classifier
    note: str = ""


def pattern_rows(results: Results, search: str = "s-prune") -> list[PatternRow]:
    """E11: {all heads, super-survivors of each case of `search`} × {fine-tuned, pre-trained} × {raw, norm-weighted}."""
    survivors = super_survivors(results, search)
    rows = []
    for maps, of in _by_maps(results.attention).items():
        own = [case for case in survivors if maps.has(case)]
        rows.append(_shares(maps, of, None, None))
        rows += [_shares(maps, of, case, survivors[case]) for case in own]
    return rows


def super_survivors(results: Results, search: str = "s-prune") -> dict[Case, list[bool]]:
    """Case → the heads, layer by layer, that the good tickets of all its seeds keep; of two seeds or more."""
    return {
        case: np.logical_and.reduce([mask_of(one, "heads") for one in of.values()]).tolist()
        for case, of in cases(results.tickets).items()
        if case.search == search and case.family == "as found" and len(of) > 1 and all(map(is_whole, of.values()))
    }


def _by_maps(rows: Iterable[AttentionRow]) -> dict[Maps, list[AttentionRow]]:
    """Maps → its rows, each once, though a dense model may belong to several variants of its task.

    Models of other settings belong to other variants, and are kept apart.
    """
    rows = list(rows)
    variants: dict[str, set[str]] = {}
    for row in rows:
        variants.setdefault(row.cell, set()).add(row.task.removeprefix(bare(row.task)).strip())
    found: dict[Maps, dict[tuple[str, int, int, int], AttentionRow]] = {}
    for row in rows:
        maps = replace(Maps.of(row), variants=tuple(sorted(variants[row.cell])))
        found.setdefault(maps, {})[row.cell, row.layer, row.run, row.head] = row
    plain = Counter(replace(maps, variants=()) for maps in found)
    named = {maps: maps if plain[replace(maps, variants=())] > 1 else replace(maps, variants=()) for maps in found}
    return {named[maps]: list(of.values()) for maps, of in sorted(found.items())}


def _shares(maps: Maps, rows: Sequence[AttentionRow], case: Case | None, kept: Sequence[bool] | None) -> PatternRow:
    width, f1 = 1 + max(row.head for row in rows), rows[0].f1
    if kept is not None:
        rows = [row for row in rows if kept[row.layer * width + row.head]]
    by_seed: dict[int | None, list[AttentionRow]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    shares: dict[str, list[float]] = {name: [] for name in CLASSES}
    means: dict[str, list[float]] = {}
    for of in by_seed.values():
        if n := sum(row.n for row in of):
            for name in CLASSES:
                shares[name].append(sum(row.counts[name] for row in of) / n)
        for name in dict.fromkeys(name for row in of for name in row.means):
            there = [value for row in of if (value := row.means.get(name)) is not None]
            if there:
                means.setdefault(name, []).append(float(np.mean(there)))
    return PatternRow(
        maps,
        ALL if kept is None else SUPER,
        case,
        tuple(sorted(seed for seed in by_seed if seed is not None)),
        len({(row.layer, row.head) for row in rows}),
        sum(row.n for row in rows),
        {name: stats.over_seeds(values) for name, values in shares.items()},
        {name: stats.over_seeds(values) for name, values in means.items()},
        f1,
        "" if rows else "no head survives for every seed",
    )


# ------------------------------------------------------------------------------------------------------------------ E12


@dataclass(frozen=True, slots=True)
class SurvivorRow:
    """E12: whether the maps of super-survivors are heterogeneous more often than those of other heads."""

    maps: Maps  # its task is "all" where tasks are pooled
    case: Case | None  # None where tasks are pooled
    survivors: int  # heads
    heads: int
    pairs: int  # (row, head)
    pooled: Estimate  # r, every pair taken as independent: the published way
    clustered: Estimate  # the same r, its interval drawn by head

    def by(self, rule: str) -> Estimate:
        """By the option `survivor_correlation`: "pooled" | "clustered_by_head"."""
        return {"pooled": self.pooled, "clustered_by_head": self.clustered}[rule]


# The option survivor_correlation by preset: (paper, released, corrected).
SURVIVOR_CORRELATION = {"paper": "pooled", "released": "pooled", "corrected": "clustered_by_head"}


def survivor_rows(results: Results, search: str = "s-prune") -> list[SurvivorRow]:
    """E12, of each task and of all tasks pooled, a head of each task being a cluster of its own."""
    survivors, rows = super_survivors(results, search), []
    group_of = {case: i for i, group in enumerate(alike(survivors, results.variants)) for case in group}
    pooled: dict[tuple[Maps, int], list[tuple[Case, list[AttentionRow]]]] = {}
    for maps, of in _by_maps(results.attention).items():
        for case in (one for one in survivors if maps.has(one)):
            rows.append(_correlation(maps, case, [(case, of)], survivors))
            pooled.setdefault((replace(maps, task="all"), group_of[case]), []).append((case, of))
    rows += [_correlation(maps, None, of, survivors) for (maps, _), of in pooled.items() if len(of) > 1]
    return rows


def _correlation(
    maps: Maps, case: Case | None, of: Sequence[tuple[Case, Sequence[AttentionRow]]], survivors: Mapping[Case, Sequence[bool]]
) -> SurvivorRow:
    """From counts: the maps of a head differ in nothing but their class that matters here."""
    survives: list[bool] = []
    heterogeneous: list[bool] = []
    clusters: list[tuple[str, int, int]] = []
    kept, heads = set[tuple[str, int, int]](), set[tuple[str, int, int]]()
    for one, rows in of:
        width = 1 + max(row.head for row in rows)
        for row in rows:
            head = (one.task, row.layer, row.head)
            heads.add(head)
            if is_kept := survivors[one][row.layer * width + row.head]:
                kept.add(head)
            other = row.counts[HETEROGENEOUS]
            survives += [is_kept] * row.n
            heterogeneous += [True] * other + [False] * (row.n - other)
            clusters += [head] * row.n
    return SurvivorRow(
        maps,
        case,
        len(kept),
        len(heads),
        len(survives),
        stats.survivor_correlation(survives, heterogeneous),
        stats.survivor_correlation(survives, heterogeneous, clusters),
    )


# ------------------------------------------------------------------------------------------------------------------ E10

BINS = 24


@dataclass(frozen=True, slots=True)
class HistogramRow:
    """E10: the importance of what one trial of a search left, and where the next trial cut."""

    case: Case
    seed: int
    part: str
    step: int  # of the trial that left these parts, as in TicketRow.path; 0 is the dense model
    edges: tuple[float, ...]  # BINS + 1, from 0 to the largest of all seeds and steps; as parts compete: of heads within layers
    counts: tuple[int, ...]  # parts still there, by bin
    phase: str  # of the next trial; "" of the last one
    removed: int  # by the next trial
    cut: float | None  # between the most important part removed and the least important one kept; None where there is none
    passed: bool | None  # whether the next trial held the floor


def histogram_rows(results: Results) -> list[HistogramRow]:
    """E10, of every passed trial of the good tickets of searches that remove heads or MLPs."""
    rows = []
    for case, of in cases(results.tickets).items():
        stored = {seed: one for seed, one in sorted(of.items()) if one.steps and case.family == "as found"}
        for part in PARTS:
            top = max([0.0, *(value for one in stored.values() for step in one.steps for value in getattr(step, part))])
            for seed, one in stored.items():
                for step in one.steps:
                    values = getattr(step, part)
                    counts, edges = np.histogram(values, BINS, (0.0, top or 1.0))
                    at = next(i for i, trial in enumerate(one.path) if trial.step == step.step)
                    after = one.path[at + 1] if at + 1 < len(one.path) else None
                    removed = 0 if after is None else len(values) - after.kept.get(part, len(values))
                    cut = step.head_cut if part == "heads" else step.mlp_cut
                    phase, passed = ("", None) if after is None else (after.phase, after.passed)
                    said = (tuple(edges.tolist()), tuple(counts.tolist()), phase, removed, cut, passed)
                    rows.append(HistogramRow(case, seed, part, step.step, *said))
    return rows


# ------------------------------------------------------------------------------------------------------------------ X13


@dataclass(frozen=True, slots=True)
class OrderRow:
    """X13: whether two searches rank the same heads or MLPs first, by importance in the dense model or by what survives."""

    part: str
    a: Case
    seed_a: int
    b: Case
    seed_b: int
    found: stats.Orders


def order_rows(
    results: Results,
    search: str = "s-prune",
    by: Callable[[TicketRow, str], list[float] | None] | None = None,
    *,
    draws: int = 999,
) -> list[OrderRow]:
    """X13: rank-biased overlap and rank correlation: every pair of seeds of a task, and every pair of tasks at common seeds.

    by: what parts are ranked by, `importance` or, of masks of single values (E9 and E13 of m-prune), `survival.flat`: how much of
    each part survives.
    """
    by = by or importance
    found = {case: of for case, of in cases(results.tickets).items() if (case.search, case.family) == (search, "as found")}
    wanted = [(case, a, case, b) for case, of in found.items() for a, b in combinations(sorted(of), 2)]
    for one, other in combinations(found, 2):
        if one.is_like(other, results.variants):
            wanted += [(one, seed, other, seed) for seed in sorted(found[one].keys() & found[other].keys())]
    rows = []
    for case_a, seed_a, case_b, seed_b in wanted:
        for part in PARTS:
            a, b = by(found[case_a][seed_a], part), by(found[case_b][seed_b], part)
            if a is not None and b is not None:
                rows.append(OrderRow(part, case_a, seed_a, case_b, seed_b, stats.compare_orders(a, b, draws=draws)))
    return rows


def importance(ticket: TicketRow, part: str) -> list[float] | None:
    """Raw importance of each head or MLP of the dense model, layer by layer; None of tickets not found by it."""
    if part == "heads":
        return None if ticket.head_importance is None else [one for layer in ticket.head_importance for one in layer]
    return None if ticket.mlp_importance is None else list(ticket.mlp_importance)


@dataclass(frozen=True, slots=True)
class MagnitudeRow:
    """X13: mean |weight| of each head or MLP, fine-tuned (over seeds) beside pre-trained; and whether survivors are larger."""

    model: str
    task: str
    weights: str
    part: str
    seeds: tuple[int, ...]
    mean: tuple[float, ...]  # layer by layer, over seeds
    # Case of a search → Spearman's correlation with how many seeds keep the part, over parts
    with_survival: Mapping[Case, Estimate]


def magnitude_rows(results: Results) -> list[MagnitudeRow]:
    """X13, of the models whose attention was asked for."""
    found: dict[tuple[str, str, str, str], dict[int | None, dict[tuple[int, int], float]]] = {}
    for one in results.magnitudes:
        of = found.setdefault((one.model, bare(one.task), one.weights, one.part), {}).setdefault(one.seed, {})
        of[one.layer, -1 if one.head is None else one.head] = one.mean_abs
    every, rows = cases(results.tickets), []
    for (model, task, weights, part), seeds in sorted(found.items()):
        mean = np.mean([[of[at] for at in sorted(of)] for of in seeds.values()], axis=0).tolist()
        beside = {
            case: stats.spearman(mean, np.mean([mask_of(one, part) for one in of.values()], axis=0).tolist())
            for case, of in every.items()
            if (case.model, case.task, case.family) == (model, task, "as found") and all(map(is_whole, of.values()))
        }
        known = tuple(sorted(seed for seed in seeds if seed is not None))
        rows.append(MagnitudeRow(model, task, weights, part, known, tuple(mean), beside))
    return rows


@dataclass(frozen=True, slots=True)
class AnswersRow:
    """X13: how often a model answers each class, beside the dense model: a model that always gives one answer knows nothing."""

    model: str
    task: str
    kind: str
    stage: str
    search: str
    family: str
    split: str
    shares: Mapping[str, Estimate]  # class → share of the answers, over seeds (of the mean over draws)
    dense: Mapping[str, Estimate]


def answers_rows(results: Results) -> list[AnswersRow]:
    """X13: the distribution of predictions on the report rows, of every kind and stage that is held against a dense model."""
    found: dict[tuple[str, str, str, str, str, str, str], dict[int, list[ScoreRow]]] = {}
    seen: set[tuple[str, str]] = set()
    for row in results.scores:
        if row.role == "report" and row.agreement is not None and row.agreement.counts and (row.cell, row.task) not in seen:
            seen.add((row.cell, row.task))  # each cell once, whatever it is scored by
            key = (row.model, row.task, row.kind, row.stage, row.search, row.family, row.split)
            found.setdefault(key, {}).setdefault(row.seed, []).append(row)

    def shares(seeds: Mapping[int, Sequence[ScoreRow]], name: str, *, dense: bool) -> Estimate:
        values = []
        for rows in seeds.values():
            counts = [one.agreement.dense_counts if dense else one.agreement.counts for one in rows if one.agreement]
            values.append(float(np.mean([one[name] / sum(one.values()) for one in counts])))
        return stats.over_seeds(values)

    told = []
    for key, seeds in found.items():
        first = next(iter(seeds.values()))[0].agreement
        assert first is not None
        answered = {name: shares(seeds, name, dense=False) for name in first.counts}
        told.append(AnswersRow(*key, answered, {name: shares(seeds, name, dense=True) for name in first.dense_counts}))
    return told
