"""What survives, and how far seeds, tasks and searches agree on it: the tables of E9, E13 and E14 and what belongs to them.

Pure functions of `Results`, one a table: a row for each model, task and search that has what it asks for, and none for those that
have not. What needs single values or predictions stands in `tombola.study.overlap`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from tombola import stats
from tombola.errors import DataError
from tombola.stats import Estimate
from tombola.study.beside_rows import CrossedMask
from tombola.study.results import Results, ScoreRow, TicketRow
from tombola.study.variants import Variant
from tombola.tasks import TASKS

PARTS = ("heads", "mlps")
OTHER_PARTS = ("neurons", "layers")  # scopes of tickets that have these parts and no others
FACTORS = ("head", "data", "dropout")


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """Tickets that differ in their seed alone."""

    model: str
    search: str  # as of a ScoreRow
    family: str
    preset: str
    task: str  # without its variant
    variant: str = ""  # what tells its settings from others of the same task; "" where there are no others
    names: tuple[str, ...] = field(default=(), compare=False)  # `task` of its rows: of each variant it is a part of

    def is_like(self, other: "Case", variants: Mapping[str, Variant]) -> bool:
        """Whether the other is the same search, run alike, maybe on another task; `variants` as of Results.

        What sets a task's own variants apart must be the same in both; what every run of a task has, as its rows, may differ.
        """
        same = [(one.model, one.search, one.family, one.preset) for one in (self, other)]
        if same[0] != same[1]:
            return False
        known = [variants[one.names[0]] for one in (self, other) if one.names and one.names[0] in variants]
        if len(known) < 2:
            return self.variant == other.variant
        both = known[0].settings.keys() & known[1].settings.keys()
        telling = (known[0].differing.keys() | known[1].differing.keys()) & both - {"mask", "mask_of"}  # family, and the task
        return all(str(known[0].settings[name]) == str(known[1].settings[name]) for name in telling)


def bare(task: str) -> str:
    """The task of a row without the settings that tell its variants apart."""
    return task.partition(" (")[0]


def metric_of(task: str) -> str | None:
    """The metric of a row's task that stands first; None of tasks that tombola does not know."""
    known = TASKS.get(bare(task).partition(":")[0])
    return None if known is None else known.metric


def cases(tickets: Iterable[TicketRow], kind: str = "good") -> dict[Case, dict[int, TicketRow]]:
    """Case → seed → ticket, of one kind (its first draw). Variants of the same tickets, that differ in what follows, are one."""
    found: dict[Case, dict[int, TicketRow]] = {}
    for one in tickets:
        if one.kind == kind and one.draw == 0 and one.search:
            variant = one.task.removeprefix(bare(one.task)).strip()
            case = Case(one.model, one.search, one.family, one.preset, bare(one.task), variant, (one.task,))
            found.setdefault(case, {})[one.seed] = one
    found = {case: of for case, of in found.items() if len({_size(one) for one in of.values()}) == 1}  # one name, one model
    known: dict[tuple[Case, tuple[str, ...]], Case] = {}
    for case, of in sorted(found.items()):
        same = (replace(case, variant=""), tuple(sorted(one.cell for one in of.values())))
        first = known.setdefault(same, case)
        if first is not case:
            known[same] = replace(first, names=(*first.names, *case.names))
    found = {case: found[case] for case in known.values()}
    # A variant says how a task's settings differ, most often only by the search, which a case has already.
    alone = {replace(case, variant="") for case in found}
    if len(alone) == len(found):
        found = {replace(case, variant=""): of for case, of in found.items()}
    return dict(sorted(found.items()))


def is_whole(ticket: TicketRow) -> bool:
    """Whether its heads and MLPs are kept or removed whole, and single values are not its units."""
    return ticket.values is None and not ticket.neurons


def parts_of(ticket: TicketRow) -> tuple[str, ...]:
    """What it keeps or removes whole: heads and MLPs, or neurons, or layers; nothing where single values are its units."""
    return () if ticket.values is not None else (ticket.scope,) if ticket.scope in OTHER_PARTS else PARTS


def flat(ticket: TicketRow | CrossedMask, part: str) -> list[float]:
    """What it keeps of each head or MLP (or layer), layer by layer: 1 or 0, or a share."""
    return [kept for layer in ticket.heads for kept in layer] if part == "heads" else list(ticket.mlps)


def mask_of(ticket: TicketRow, part: str) -> list[bool]:
    """The parts of which it keeps anything, layer by layer."""
    return list(ticket.neurons) if part == "neurons" else [kept > 0 for kept in flat(ticket, part)]


# ---------------------------------------------------------------------------------------------------------------- seeds


@dataclass(frozen=True, slots=True)
class StabilityRow:
    """E9: the masks of several seeds of one case."""

    case: Case
    part: str  # of `parts_of`
    seeds: tuple[int, ...]
    found: stats.Stability
    pairs: Mapping[tuple[int, int], stats.CochranQ]  # of two seeds each


def stability_rows(results: Results, *, draws: int = stats.DRAWS) -> list[StabilityRow]:
    """E9: kappa, alpha, Jaccard, Cochran's Q (all seeds, and every pair), undecided share; for masks of whole parts.

    draws: of each permutation test.
    """
    rows = []
    for case, of in cases(results.tickets).items():
        seeds = tuple(sorted(of))
        units = {parts_of(one) for one in of.values()}
        if len(seeds) < 2 or case.family != "as found" or len(units) > 1:
            continue
        for part in units.pop():
            masks = [mask_of(of[seed], part) for seed in seeds]
            pairs = {(seeds[i], seeds[j]): one for (i, j), one in stats.cochran_pairs(masks).items()}
            rows.append(StabilityRow(case, part, seeds, stats.stability(masks, draws=draws), pairs))
    return rows


@dataclass(frozen=True, slots=True)
class SurvivalRow:
    """How much of each part survives, over seeds; for masks of whole parts it is how many seeds keep it."""

    case: Case
    part: str
    seeds: tuple[int, ...]
    mean: tuple[float, ...]  # of each part, layer by layer
    std: tuple[float, ...] | None  # sample std over seeds; None of one seed
    correlation: float | None  # mean over pairs of seeds of Spearman's correlation of survival; None where it is constant
    note: str = ""


def survival_rows(results: Results) -> list[SurvivalRow]:
    """App. A: surviving share of each head and MLP, of masks of single values too."""
    rows = []
    for case, of in cases(results.tickets).items():
        seeds = tuple(sorted(of))
        for part in PARTS:
            kept = np.array([flat(of[seed], part) for seed in seeds])
            std = tuple(kept.std(0, ddof=1).tolist()) if len(seeds) > 1 else None
            found = [stats.spearman(a.tolist(), b.tolist()).value for a, b in combinations(kept, 2)]
            there = [one for one in found if one is not None]
            mean = float(np.mean(there)) if there else None
            lost = len(found) - len(there)
            note = f"{lost} of {len(found)} pairs of seeds have no order: left out" if lost else "" if found else "one seed"
            rows.append(SurvivalRow(case, part, seeds, tuple(kept.mean(0).tolist()), std, mean, note))
    return rows


# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True, slots=True)
class OverlapRow:
    """E13: what the masks of two tasks share at matched seeds; of a task with itself its sizes."""

    a: Case
    b: Case
    part: str
    seeds: tuple[int, ...]
    found: stats.TaskOverlap
    p_corrected: float | None  # of p_at_least, Holm over all pairs of tasks of this search and part


def overlap_rows(results: Results, *, draws: int = stats.DRAWS) -> list[OverlapRow]:
    """E13, for every search and family of whole parts: joint, separate, super-survivors. `draws` of each test."""
    rows = []
    for kin in _kin(results):
        for part in PARTS:
            pairs = []
            for a, b in [*((one, one) for one in kin), *combinations(kin, 2)]:
                seeds = tuple(sorted(kin[a].keys() & kin[b].keys()))
                if not seeds:
                    continue
                masks = [[mask_of(kin[case][seed], part) for seed in seeds] for case in (a, b)]
                if a == b:
                    sizes = stats.over_seeds([float(sum(mask)) for mask in masks[0]])
                    found = stats.TaskOverlap(len(masks[0][0]), sizes, None, None, None, None, "a task with itself: its sizes")
                else:
                    found = stats.overlap_of_tasks(*masks, draws=draws)
                pairs.append(OverlapRow(a, b, part, seeds, found, None))
            tested = {str(i): row.found.p_at_least for i, row in enumerate(pairs) if row.a != row.b}
            corrected = stats.correct(tested, family="pairs of tasks").p if tested else {}
            rows += [replace(row, p_corrected=corrected.get(str(i))) for i, row in enumerate(pairs)]
    return rows


@dataclass(frozen=True, slots=True)
class TasksSurvivedRow:
    """E14: by how many tasks each part is kept."""

    model: str
    search: str
    family: str
    preset: str
    part: str
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]  # that all of these tasks have
    mean: tuple[float, ...]  # over seeds, of each part layer by layer
    std: tuple[float, ...] | None
    by_seed: Mapping[int, tuple[int, ...]]  # seed → of how many tasks each part is kept
    cases: tuple[Case, ...]  # one a task


def tasks_survived_rows(results: Results) -> list[TasksSurvivedRow]:
    """E14, of searches with two tasks or more at common seeds."""
    rows = []
    for kin in _kin(results):
        seeds = tuple(sorted(set.intersection(*(set(of) for of in kin.values()))))
        if len(kin) < 2 or not seeds:
            continue
        case = next(iter(kin))
        for part in PARTS:
            counts = np.array([np.sum([mask_of(of[seed], part) for of in kin.values()], axis=0) for seed in seeds])
            std = tuple(counts.std(0, ddof=1).tolist()) if len(seeds) > 1 else None
            names, said = tuple(one.task for one in kin), (case.model, case.search, case.family, case.preset)
            by_seed = {seed: tuple(of.tolist()) for seed, of in zip(seeds, counts, strict=True)}
            rows.append(TasksSurvivedRow(*said, part, names, seeds, tuple(counts.mean(0).tolist()), std, by_seed, tuple(kin)))
    return rows


def _kin(results: Results) -> list[dict[Case, dict[int, TicketRow]]]:
    """Cases of one search, run alike on several tasks; whole parts of one number of layers and heads only."""
    found = {case: of for case, of in cases(results.tickets).items() if all(is_whole(one) for one in of.values())}
    sizes = {case: _size(next(iter(of.values()))) for case, of in found.items()}
    return [
        {case: found[case] for case in group if sizes[case] == size}
        for group in alike(found, results.variants)
        for size in [sizes[group[0]]]
    ]


def _size(ticket: TicketRow) -> tuple[int, int]:
    """Heads and MLPs of its model."""
    return sum(map(len, ticket.heads)), len(ticket.mlps)


def alike(found: Iterable[Case], variants: Mapping[str, Variant]) -> list[list[Case]]:
    """The cases in groups of one search run alike, each task once in a group."""
    groups: list[list[Case]] = []
    for case in found:
        fit = (group for group in groups if all(one.task != case.task and one.is_like(case, variants) for one in group))
        group = next(fit, None)
        if group is None:
            groups.append([case])
        else:
            group.append(case)
    return groups


# ------------------------------------------------------------------------------------------------------ joint, separate


@dataclass(frozen=True, slots=True)
class JointRow:
    """Whether heads and MLPs interact: masks found jointly beside those found apart, and those joined."""

    model: str
    task: str
    preset: str
    seeds: tuple[int, ...]
    kept: Mapping[str, Estimate]  # "s-prune heads", "s-prune-heads heads", "s-prune mlps", "s-prune-mlps mlps" → share kept
    shared_heads: stats.TaskOverlap  # of the joint and the heads-only masks of one seed
    shared_mlps: stats.TaskOverlap
    metric: str
    lost: Mapping[str, Estimate]  # search or "joined" → full minus pruned score on the report rows
    # what is lost by both masks together beyond the sum of what each loses alone; above 0: they make up for each other
    interaction: Estimate
    note: str = ""


def joint_rows(results: Results) -> list[JointRow]:
    """Claim (g): joint against heads-only, MLPs-only and their union (`joined`); for tasks that have the three searches."""
    found, rows = cases(results.tickets), []
    for joint, both in found.items():
        if joint.search != "s-prune" or joint.family != "as found":
            continue
        apart = {name: _sibling(found, joint, name) for name in ("s-prune-heads", "s-prune-mlps")}
        heads, mlps = apart["s-prune-heads"], apart["s-prune-mlps"]
        seeds = tuple(sorted(both.keys() & heads.keys() & mlps.keys()))
        if not seeds:
            continue
        sides = {("s-prune", "heads"): both, ("s-prune-heads", "heads"): heads}
        sides |= {("s-prune", "mlps"): both, ("s-prune-mlps", "mlps"): mlps}
        kept = {
            f"{search} {part}": stats.over_seeds([float(np.mean(mask_of(of[seed], part))) for seed in seeds])
            for (search, part), of in sides.items()
        }
        shared = [
            stats.overlap_of_tasks([mask_of(both[s], part) for s in seeds], [mask_of(of[s], part) for s in seeds])
            for part, of in (("heads", heads), ("mlps", mlps))
        ]
        scores, metric = _scores_by_seed(results.scores, joint)
        full = scores.get("full", {})
        tested = {name: of for name, of in scores.items() if name != "full"}
        lost = {name: {s: full[s] - of[s] for s in seeds if s in of and s in full} for name, of in tested.items()}
        needed = [lost.get(name, {}) for name in ("joined", "s-prune-heads", "s-prune-mlps")]
        common = sorted(set.intersection(*(set(one) for one in needed)))
        together = [needed[0][s] - needed[1][s] - needed[2][s] for s in common]
        note = "" if common else "no scores of joined masks: ask for the experiment joined"
        rows.append(
            JointRow(
                joint.model, joint.task, joint.preset, seeds, kept, shared[0], shared[1], metric,
                {name: stats.over_seeds(list(of.values())) for name, of in lost.items() if of}, stats.over_seeds(together), note,
            )
        )  # fmt: skip
    return rows


def _sibling(found: Mapping[Case, dict[int, TicketRow]], case: Case, search: str) -> dict[int, TicketRow]:
    """The tickets of another search under the same preset, where only one case can be meant."""
    meant = replace(case, search=search, variant="")
    near = [of for one, of in found.items() if replace(one, variant="") == meant]
    return near[0] if len(near) == 1 else {}


def _scores_by_seed(scores: Iterable[ScoreRow], case: Case) -> tuple[dict[str, dict[int, float]], str]:
    """ "full", search or "joined" → seed → score as pruned on the report rows, by the task's first metric; and that metric."""
    found: dict[str, dict[int, float]] = {}
    metric = ""
    for row in scores:
        if (row.model, bare(row.task), row.role) != (case.model, case.task, "report") or row.kind not in ("full", "good"):
            continue
        name = "full" if row.kind == "full" else "joined" if row.family == "joined" else row.search
        good = row.stage == "pruned" and row.preset == case.preset and row.family in ("as found", "joined")
        if row.kind == "full" or good:
            metric = metric or metric_of(row.task) or row.metric
            if row.metric == metric:
                found.setdefault(name, {})[row.seed] = row.value
    return found, metric


# -------------------------------------------------------------------------------------------------------------- crossed


@dataclass(frozen=True, slots=True)
class CrossedRow:
    """What the masks of one search depend on: head init, data order, dropout."""

    model: str
    task: str
    search: str
    part: str
    runs: int
    found: stats.Split | None
    note: str = ""


def crossed_rows(results: Results) -> list[CrossedRow]:
    """The crossed design: variance of masks (of single values: of survival of each part) split among its factors."""
    of: dict[tuple[str, str, str], list[CrossedMask]] = {}
    for one in results.crossed:
        of.setdefault((one.model, one.task, one.search), []).append(one)
    rows = []
    for (model, task, search), runs in sorted(of.items()):
        levels = [(one.head_seed, one.data_seed, one.dropout_seed) for one in runs]
        for part in PARTS:
            kept = np.array([flat(one, part) for one in runs])
            differences = ((kept[:, None] - kept[None]) ** 2).mean(-1)
            try:
                found, note = stats.split_variance(FACTORS, levels, differences), ""
            except DataError as error:  # a study that is not yet done
                found, note = None, str(error).partition("\n")[0]
            rows.append(CrossedRow(model, task, search, part, len(runs), found, note))
    return rows
