"""What the page shows of heads and MLPs by themselves: what they look at, what searches went by, how large their weights are.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
The numbers are those of `tombola.study.heads`; here they become pictures and text.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.cases import UNIT_NAMES, Case, Study
from tombola.report.charts import Stack
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, count, interval, number, significant, spread
from tombola.stats import ALPHA, Estimate
from tombola.study.beside_rows import MapSample
from tombola.study.heads import (
    ALL,
    HistogramRow,
    OrderRow,
    PatternRow,
    histogram_rows,
    magnitude_rows,
    order_rows,
    pattern_rows,
    survivor_rows,
)
from tombola.study.results import TicketRow
from tombola.study.survival import PARTS, bare, flat
from tombola.study.survival import Case as SurvivalCase

MAPS = {"raw": "raw", "weighted": "norm-weighted"}
WEIGHTS = {"fine_tuned": "fine-tuned", "pretrained": "pre-trained"}
CSS = {"other": "heterogeneous"}  # class of a map → css class, where they differ
CLASS_NAMES = {
    "diagonal": "diagonal",
    "vertical": "vertical",
    "mix": "vertical and diagonal",
    "block": "block",
    "other": "heterogeneous",
}
SAMPLE = 84  # pixels
SLIDES = "Step of the search"
ORDER_DRAWS = 199  # of each permutation test: only how many pairs agree beyond chance is shown


# Attention


def attention_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 4 and App. F: share of each pattern among the maps of all heads and of super-survivors; what else is said of heads."""
    if not study.results.attention:
        return ()
    rows = [row for row in pattern_rows(study.results) if _usual(study, row.case)]
    figures = []
    by_task: dict[tuple[str, str], list[PatternRow]] = {}
    for row in rows:
        by_task.setdefault((row.maps.kind, row.maps.task), []).append(row)
    for kind in MAPS:
        drawn = []
        for (one, task), mine in by_task.items():
            if one != kind:
                continue
            first = {
                (row.maps.weights, row.which): row for row in reversed(mine) if row.n_maps
            }  # of one search under one setting
            stacks = [_stack(row) for row in mine if first.get((row.maps.weights, row.which)) is row]
            svg = charts.stacked(stacks, label=f"Patterns of {MAPS[kind]} maps, {task}; the table has the numbers")
            drawn.append(Figure(f"{task}, {MAPS[kind]} maps", svg, "", natural=True, task=study.task_of(task)))
        figures.append(tuple(drawn))
    names = list(dict.fromkeys(name for row in rows for name in row.means))
    described = [
        (
            row.maps.task,
            WEIGHTS.get(row.maps.weights, row.maps.weights),
            MAPS.get(row.maps.kind, row.maps.kind),
            row.which,
            *(spread(share) for share in row.shares.values()),
            *(spread(row.means[name], 2) if name in row.means else NONE for name in names),
            str(row.n_heads),
            f"{row.n_maps:,}",
            str(len(row.seeds)) if row.seeds else NONE,
        )
        for row in rows
    ]
    classes = list(rows[0].shares) if rows else []
    table = Table(
        "Patterns of attention: share of maps, mean ± std over seeds",
        (
            "Task",
            "Weights",
            "Maps",
            "Heads of",
            *(CLASS_NAMES.get(name, name) for name in classes),
            *map(_described, names),
            "Heads",
            "n",
            "Seeds",
        ),
        tuple(described),
        "Super-survivors: heads that the s-prune tickets of all seeds keep. Entropy in nats; distance in tokens; "
        "masses are shares of "
        f"attention. The classifier’s weighted F1 on labelled maps: {_f1(rows)}.",
        stubs=4,
        tasks=tuple(study.task_of(row.maps.task) for row in rows),
    )
    legend = tuple((CSS.get(name, name), CLASS_NAMES.get(name, name)) for name in classes)
    cells = tuple(sorted({row.cell for row in study.results.attention}))
    found = [
        Part(
            f"{anchor}-patterns",
            "Attention patterns",
            "What do heads look at?",
            "Fig. 4 of the paper: maps of rows of each task, classified. If survivors were the heads that mean something, "
            "heterogeneous maps would be more frequent among them.",
            legend=legend,
            figures=tuple(row for row in figures if row),
            tables=(table,),
            experiment="attention",
            cells=cells,
            all_seeds=True,
        )
    ]
    if correlated := [row for row in survivor_rows(study.results) if _usual(study, row.case)]:
        found.append(
            Part(
                f"{anchor}-survivors",
                "Survivors and patterns",
                "Are the maps of survivors heterogeneous more often?",
                tables=(
                    Table(
                        "Correlation of (head is a super-survivor) and (map is heterogeneous)",
                        (
                            "Task",
                            "Weights",
                            "Maps",
                            "r",
                            "95 %, clustered by head",
                            "95 %, pooled",
                            "Survivors",
                            "Heads",
                            "Pairs",
                        ),
                        tuple(
                            (
                                row.maps.task,
                                WEIGHTS.get(row.maps.weights, row.maps.weights),
                                MAPS.get(row.maps.kind, row.maps.kind),
                                number(row.clustered.value),
                                interval(row.clustered),
                                interval(row.pooled),
                                str(row.survivors),
                                str(row.heads),
                                f"{row.pairs:,}",
                            )
                            for row in correlated
                        ),
                        "The maps of one head are not independent: the interval clustered by head is the one to quote; "
                        "pooled is the "
                        "published way.",
                        stubs=3,
                        tasks=tuple("*" if row.maps.task == "all" else study.task_of(row.maps.task) for row in correlated),
                    ),
                ),
                experiment="attention",
                all_seeds=True,
            )
        )
    if samples := _samples(study):
        found.append(
            Part(
                f"{anchor}-samples",
                "Sample maps",
                "Maps, as they look",
                "Rows: the token that attends; columns: the token it attends to; the stronger the more. Drawn by chance "
                "of each class.",
                figures=samples,
                experiment="attention",
            )
        )
    return tuple(found)


def _usual(study: Study, case: SurvivalCase | None) -> bool:
    """Whether the tickets that survivors are of were found as most of the study's were."""
    found = study.case_of(case) if case else None
    return found is None or not found.unusual


def _stack(row: PatternRow) -> Stack:
    label = f"{WEIGHTS.get(row.maps.weights, row.maps.weights)}, {'all' if row.which == ALL else 'super'}"
    shares = {CSS.get(name, name): share.value or 0.0 for name, share in row.shares.items()}
    told = {
        CSS.get(
            name, name
        ): f"{label}: {CLASS_NAMES.get(name, name)} {spread(share)}\n{row.n_maps:,} maps of {count(row.n_heads, 'head')}"
        for name, share in row.shares.items()
    }
    return Stack(label, shares, told)


def _described(name: str) -> str:
    words = name.replace("mass_", "mass on ").replace("_", " ")
    return {"mass on cls": "Mass on [CLS]", "mass on sep": "Mass on [SEP]"}.get(words, words[:1].upper() + words[1:])


def _f1(rows: Sequence[PatternRow]) -> str:
    known = dict.fromkeys((MAPS.get(row.maps.kind, row.maps.kind), number(row.f1, 2)) for row in rows)
    return ", ".join(f"{value} ({kind})" for kind, value in known) or NONE


def _samples(study: Study) -> tuple[tuple[Figure, ...], ...]:
    """One map of each kind, class and weights: a row of pictures for each kind."""
    first: dict[tuple[str, str, str], MapSample] = {}
    for sample in study.results.map_samples:
        first.setdefault((sample.kind, sample.label, sample.weights), sample)
    found = []
    for kind in MAPS:
        pictures = []
        for (one, label, weights), sample in first.items():
            if one != kind or not sample.pixels:
                continue
            told = f"{MAPS[kind]} map of layer {sample.layer}, head {sample.head}"
            svg = charts.picture(sample.pixels, size=SAMPLE, label=f"{told}: {CLASS_NAMES.get(label, label)}")
            where = (
                f"{MAPS[kind]}, {WEIGHTS.get(weights, weights)}; {bare(sample.task)}, layer {sample.layer}, head {sample.head}"
            )
            caption = f"{where}; {sample.tokens} tokens, p = {number(sample.probability, 2)}"
            pictures.append(Figure(CLASS_NAMES.get(label, label), svg, caption, natural=True, task=study.task_of(sample.task)))
        found.append(tuple(pictures))
    return tuple(row for row in found if row)


# What searches go by


def importance_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 3: at every step of a search the importance of the heads and MLPs still there, and where the next step cut."""
    rows: dict[str, dict[str, list[HistogramRow]]] = {}
    for row in histogram_rows(study.results):
        if case := study.case_of(row.case):
            rows.setdefault(case.name, {}).setdefault(row.part, []).append(row)
    parts = []
    for i, (search, mine) in enumerate(study.by_search(lambda case: case.name in rows).items(), start=1):
        drawn = (
            tuple(figure for case in mine if (figure := _histogram(case, part, rows[case.name].get(part, [])))) for part in PARTS
        )
        if not (found := [row for row in drawn if row]):
            continue
        parts.append(
            Part(
                f"{anchor}-{i}",
                f"Importance, {search}" if search else "Importance",
                f"What the search went by, step by step{f': {search}' if search else ''}",
                "Fig. 3 of the paper. Of the parts still there, how many have which importance; line: below it the next step "
                "removed. Heads are scaled within their layer, as the search ranks them.",
                slider=SLIDES,
                figures=tuple(found),
                experiment="s-prune",
                cells=tuple(sorted({t.cell for case in mine for t in case.good})),
            )
        )
    return tuple(parts)


def _histogram(case: Case, part: str, rows: Sequence[HistogramRow]) -> Figure | None:
    unit = UNIT_NAMES.get(part, part)
    sizes = {sum(row.counts) for row in rows}
    several = max([0, *(sum(row.seed == seed for row in rows) for seed in {row.seed for row in rows})]) > 1
    if not rows or max(sizes) < 2 or (len(sizes) == 1 and len({row.seed for row in rows}) < 2 and several):
        return None  # a kind that this search leaves whole
    steps: dict[int, list[charts.Bins]] = {}
    for row in rows:
        told = f"trial {row.step}, seed {row.seed}: {sum(row.counts)} {unit}"
        steps.setdefault(row.seed, []).append(charts.Bins(row.counts, row.cut, told))
    svg = charts.histogram(steps, rows[0].edges[-1], label=f"Histogram of the importance of {unit}, {case.title}")
    return Figure(case.task, svg, f"importance of {unit}", natural=True, task=case.task) if svg else None


# X13: orders and magnitudes

# What parts are ranked by → search, and the function of a ticket and a part
ORDERS: Mapping[str, tuple[str, Callable[[TicketRow, str], list[float] | None] | None]] = {
    "importance in the dense model": ("s-prune", None),
    "share that m-prune keeps": ("m-prune", flat),
}


def order_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X13: whether seeds and tasks rank the same heads and MLPs first; of masks of single values by how much of each survives."""
    rows, tasks, used = [], [], set()
    for name, (search, by) in ORDERS.items():
        found: dict[tuple[SurvivalCase, SurvivalCase, str], list[OrderRow]] = {}
        for row in order_rows(study.results, search, by, draws=ORDER_DRAWS):
            found.setdefault((row.a, row.b, row.part), []).append(row)
        for (a, b, part), pairs in found.items():
            one, other = (study.case_of(case) for case in (a, b))
            if one is None or other is None or one.unusual or other.unusual:
                continue
            known = [row.found for row in pairs if row.found.rbo is not None]
            if not known:
                continue  # no order to speak of
            rows.append(
                (
                    name,
                    one.task if a == b else f"{one.task} and {other.task}",
                    UNIT_NAMES.get(part, part),
                    "two seeds" if a == b else "one seed",
                    number(fmean(it.rbo or 0.0 for it in known)),
                    number(fmean(it.expected_rbo or 0.0 for it in known)),
                    number(fmean(it.spearman.value or 0.0 for it in known)),
                    f"{sum((it.p_rbo or 1.0) < ALPHA for it in known)} of {len(known)}",
                    f"{len(known)} of {len(pairs)}",
                )
            )
            tasks.append(one.task if a == b else (one.task, other.task))
            used |= {ticket.cell for case in (one, other) for ticket in case.good}
    if not rows:
        return ()
    table = Table(
        "Orders of heads and MLPs",
        (
            "Ranked by",
            "Task",
            "Unit",
            "Pairs of",
            "Rank-biased overlap",
            "by chance",
            "Spearman",
            f"Pairs with p < {ALPHA}",
            "Pairs with orders",
        ),
        tuple(rows),
        "Means over pairs of seeds of a task, or of two tasks at the same seed. Rank-biased overlap: what the tops of two "
        "rankings share, the first places counting most; 1 = the same order.",
        stubs=4,
        tasks=tuple(tasks),
    )
    return (
        Part(
            anchor,
            "Orders",
            "Do seeds and tasks rank the same parts first?",
            "Tickets of one size may differ although searches agree on what matters most. These are the rankings themselves.",
            fold="Every task and pair of tasks",
            folded=(table,),
            experiment="s-prune",
            cells=tuple(sorted(used)),
            all_seeds=True,
        ),
    )


def magnitude_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X13: mean |weight| of heads and MLPs, and whether larger ones survive."""
    found = magnitude_rows(study.results)
    if not found:
        return ()
    rows = [
        (
            row.task,
            WEIGHTS.get(row.weights, row.weights),
            UNIT_NAMES.get(row.part, row.part),
            significant(fmean(row.mean)),
            f"{significant(min(row.mean))} to {significant(max(row.mean))}",
            ", ".join(_goes_with(study, row.with_survival)) or NONE,
            str(len(row.seeds)) if row.seeds else NONE,
        )
        for row in found
    ]
    table = Table(
        "Mean magnitude of weights, by head and MLP",
        ("Task", "Weights", "Unit", "Mean |weight|", "Smallest to largest", "Spearman with survival (95 %)", "Seeds"),
        tuple(rows),
        "Survival: how many seeds keep the part. A positive correlation: larger parts survive; its interval is over parts.",
        stubs=3,
        tasks=tuple(study.task_of(row.task) for row in found),
    )
    return (
        Part(
            anchor,
            "Magnitudes",
            "Do parts with larger weights survive?",
            tables=(table,),
            experiment="attention",
            cells=tuple(sorted({row.cell for row in study.results.magnitudes})),
            all_seeds=True,
        ),
    )


def _goes_with(study: Study, found: Mapping[SurvivalCase, Estimate]) -> list[str]:
    told = []
    for one, rho in found.items():
        case = study.case_of(one)
        if case is not None and not case.unusual and rho.value is not None:
            ends = interval(rho)
            told.append(f"{case.search}: {number(rho.value, 2)}" + (f" ({ends})" if ends != NONE else ""))
    return told
