"""What the page shows of masks over all tasks of a study: do seeds agree, and do tasks?

Each function takes an anchor and the study and returns parts, none where the store has no tickets for it. One row of
`build.PARTS` each. The numbers are those of `tombola.study.survival`; all chance levels are those of masks of the same sizes.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, combinations_with_replacement
from statistics import fmean

from tombola.report import charts, figures
from tombola.report.about_tickets import kappa_text, rates_text
from tombola.report.bars import good_cells_of
from tombola.report.cases import AS_FOUND, UNIT_NAMES, Case, Study
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, count, number, probability, spread
from tombola.stats import ALPHA, overlap
from tombola.study.survival import PARTS, OverlapRow, StabilityRow, TasksSurvivedRow, tasks_survived_rows


def _structured(case: Case) -> bool:
    return bool(case.good) and bool(case.units) and case.column == "MLP" and len(case.shapes) == 1


def stability_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """E9: whether the tickets of several seeds keep the same parts, for every task and search."""
    rows, tasks, used = [], [], []
    known = [(case, parts) for found, parts in study.stability.items() if (case := study.case_of(found))]
    for case, parts in sorted(known, key=lambda one: study.cases.index(one[0])):
        used.append(case)
        for part, row in parts.items():
            it = row.found
            if all(size == it.n for size in it.sizes):
                continue  # a kind that this search leaves whole
            rows.append(
                (
                    case.task,
                    case.label or case.search,
                    UNIT_NAMES.get(part, part),
                    kappa_text(it),
                    number(it.expected_kappa),
                    number(it.alpha.value),
                    number(it.jaccard.value),
                    number(it.expected_jaccard),
                    probability(it.p_at_least).removeprefix("= "),
                    rates_text(it),
                    _pairs_that_differ(row),
                    number(it.undecided.share.value),
                    number(it.undecided.expected),
                    str(len(row.seeds)),
                )
            )
            tasks.append(case.task)
    if len(used) < 2:
        return ()  # of one case its own section says it
    table = Table(
        "Tickets of different seeds",
        (
            "Task",
            "Search",
            "Unit",
            "Fleiss kappa",
            "by chance",
            "Alpha",
            "Jaccard",
            "by chance",
            "p, given sizes",
            "Sizes",
            "Pairs that differ",
            "Undecided",
            "by chance",
            "Seeds",
        ),
        tuple(rows),
        "Kappa: 1 = one mask in all seeds, 0 = chance; in brackets its 95 % interval over seeds (jackknife). Alpha: "
        "Krippendorff’s. "
        "p, given sizes: chance that masks of these sizes agree as much. Sizes: whether the shares that seeds keep differ "
        "(Cochran’s Q), which says nothing of which parts they keep; "
        "pairs of seeds that differ in it, by Holm. Undecided: share of parts whose survival has a "
        "std of .45–.55.",
        stubs=3,
        tasks=tuple(tasks),
    )
    return (
        Part(
            anchor,
            "Stability",
            "Do seeds agree on which parts to keep?",
            "Whether the tickets of a task’s seeds share more than their sizes explain.",
            tables=(table,),
            experiment="s-prune",
            cells=good_cells_of(used),
            all_seeds=True,
        ),
    )


def _pairs_that_differ(row: StabilityRow) -> str:
    known = [one.p_corrected for one in row.pairs.values() if one.p_corrected is not None]
    return f"{sum(p < ALPHA for p in known)} of {len(known)}" if known else NONE


def task_overlap_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 5 and App. G: what the tickets of two tasks share at matched seeds, beside chance given their sizes."""
    found = {case.name: one for row in study.overlaps for one in (row.a, row.b) if (case := study.case_of(one))}
    pairs = {(row.a, row.b, row.part): row for row in study.overlaps}
    parts = []
    searches = study.by_search(lambda case: case.name in found and _structured(case) and case.family in ("", "super"))
    for i, (search, cases) in enumerate(searches.items(), start=1):
        ordered = [found[case.name] for case in cases]
        if len({case.task for case in cases}) < 2:
            continue
        drawn, tables = [], []
        for part in PARTS:
            rows = {
                (a, b): row
                for a, b in combinations_with_replacement(range(len(ordered)), 2)
                for one, other in ((ordered[a], ordered[b]), (ordered[b], ordered[a]))
                if (row := pairs.get((one, other, part)))
            }
            if all(row.found.shared.value in (0, row.found.n) for (a, b), row in rows.items() if a == b):
                continue  # a kind that this search leaves whole
            names = [case.task for case in cases]
            drawn.append(_matrix(names, UNIT_NAMES.get(part, part), rows))
            tables.append(_pairs_table(search, UNIT_NAMES.get(part, part), names, rows))
        parts.append(
            Part(
                f"{anchor}-{i}",
                f"Overlap, {search}",
                f"Do tasks share their tickets? {search}",
                "Numbers: parts kept for both tasks, mean over matched seeds; on the diagonal the size of the ticket. "
                "Blue: more than "
                "masks of these sizes share by chance; orange: less; the stronger, the further from chance.",
                figures=(tuple(drawn),),
                fold="All pairs, with chance and p",
                folded=tuple(tables),
                experiment="s-prune",
                cells=good_cells_of(cases),
                all_seeds=True,
            )
        )
    return tuple(parts)


def _matrix(names: Sequence[str], unit: str, rows: Mapping[tuple[int, int], OverlapRow]) -> Figure:
    tiles = {}
    n = max(row.found.n for row in rows.values())
    for (a, b), row in rows.items():
        it = row.found
        if a == b:
            title = f"{names[a]}: keeps {spread(it.shared, 1)} of {it.n} {unit}"
            tiles[a, a] = charts.Tile(number(it.shared.value, 1), 0.0, title)
            continue
        ratio = it.ratio
        title = (
            f"{names[a]} and {names[b]}: {number(it.shared.value, 1)} {unit} shared, {number(it.expected_shared, 1)} by chance\n"
        )
        title += f"ratio {number(ratio)}, p (this much or more) {number(it.p_at_least)}" + (f"\n{it.note}" if it.note else "")
        shade = None if ratio is None else max(-1.0, min(1.0, 2.5 * (ratio - 1)))
        for place in ((a, b), (b, a)):
            tiles[place] = charts.Tile(number(it.shared.value, 1), shade, title)
    svg = charts.matrix(names, tiles, label=f"Overlap of {unit} between tasks; the table has the numbers")
    return Figure(unit, svg, f"of {n} {unit}", natural=True)


def _pairs_table(search: str, unit: str, names: Sequence[str], rows: Mapping[tuple[int, int], OverlapRow]) -> Table:
    pairs = {(names[a], names[b]): row for (a, b), row in rows.items() if a != b}
    return Table(
        f"{unit} that two tasks share, {search}",
        ("Task", "and", "Shared", "by chance", "Ratio", "p, this much or more", "Holm", "p, this much or less", "Seeds"),
        tuple(
            (
                *both,
                spread(row.found.shared, 1),
                number(row.found.expected_shared, 1),
                number(row.found.ratio),
                number(row.found.p_at_least),
                number(row.p_corrected),
                number(row.found.p_at_most),
                str(row.found.shared.n_seeds),
            )
            for both, row in pairs.items()
        ),
        "Mean ± std over matched seeds. p: parts of one task renamed at random, in the same way for all of its seeds; Holm: "
        "corrected over all pairs of tasks of this search.",
        stubs=2,
        tasks=tuple(pairs),
    )


def task_survival_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 15: for how many tasks each head and MLP survives, mean over seeds."""
    rows: dict[str, dict[str, TasksSurvivedRow]] = {}
    for row in tasks_survived_rows(study.results):
        case = study.case_of(row.cases[0])
        if case is not None and row.family == AS_FOUND and _structured(case):
            rows.setdefault(case.name, {})[row.part] = row
    drawn: list[Figure] = []
    used: list[Case] = []
    for search, cases in study.by_search(lambda case: case.name in rows).items():
        for case in cases:
            heads, mlps = (rows[case.name][part] for part in PARTS)
            layers, tasks = len(mlps.mean), len(heads.tasks)
            raw = {seed: [*heads.by_seed[seed], *mlps.by_seed[seed]] for seed in heads.seeds}
            shades = {seed: [value / tasks for value in of] for seed, of in raw.items()}
            heat = figures.Heat(
                layers, len(heads.mean) // layers, shades, "tasks", raw={s: [float(v) for v in of] for s, of in raw.items()}
            )
            svg = figures.heat_map(heat, css="survival", width=348, label=f"Tasks survived, {search}", name=f"of {tasks} tasks")
            stds = [*(heads.std or ()), *(mlps.std or ())]
            spreads = f"; std over seeds {number(fmean(stds), 2)} on average" if stds else ""
            caption = f"{tasks} tasks, {count(len(heads.seeds), 'seed')}{spreads}"
            drawn.append(Figure(search or "tickets", svg, caption, ("survival", "no task", "all tasks"), natural=True))
            used += [one for found in heads.cases if (one := study.case_of(found))]
    if not drawn:
        return ()
    return (
        Part(
            anchor,
            "Survival over tasks",
            "Which parts survive for how many tasks?",
            "Fig. 15 of the paper. Shade: in how many tasks a part survives, mean over seeds; point at one for its numbers.",
            figures=(tuple(drawn),),
            experiment="s-prune",
            cells=good_cells_of(used),
        ),
    )


def chosen_on_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X12: masks chosen on rows that were trained on, beside those chosen on other rows, and beside those of other seeds."""
    rows, tasks, used = [], [], []
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in study.cases:
        if not case.family and _structured(case) and "selection_split" in case.differing:
            rest = ", ".join(f"{n}={v}" for n, v in case.differing.items() if n != "selection_split")
            groups.setdefault((case.task, rest), []).append(case)
    for (task, _), cases in groups.items():
        for one, other in combinations(cases, 2):
            for unit, of in one.units.items():
                masks = [{t.seed: of(t) for t in case.good} for case in (one, other)]
                seeds = sorted(masks[0].keys() & masks[1].keys())
                if not seeds:
                    continue
                same = [overlap(masks[0][s], masks[1][s]) for s in seeds]
                apart = [overlap(a[s], a[t]) for a in masks for s, t in combinations(sorted(a), 2)]
                rows.append(
                    (
                        task,
                        one.search,
                        f"{one.settings['selection_split']} and {other.settings['selection_split']}",
                        unit,
                        *(_mean([found.jaccard for found in same]), _mean([found.expected_jaccard for found in same])),
                        f"{sum((f.p_at_least or 1) < ALPHA for f in same)} of {len(same)}",
                        *(_mean([found.jaccard for found in apart]), str(len(seeds))),
                    )
                )
                tasks.append(task)
            used += [one, other]
    if not rows:
        return ()
    table = Table(
        "Masks chosen on different rows, of the same model",
        (
            "Task",
            "Search",
            "Chosen on",
            "Unit",
            "Jaccard",
            "by chance",
            f"Seeds with p < {ALPHA}",
            "Jaccard of two seeds",
            "Seeds",
        ),
        tuple(rows),
        "Jaccard: parts that both masks keep over parts that either keeps. Of two seeds: the same, for two models on "
        "the same rows.",
        stubs=4,
        tasks=tuple(tasks),
    )
    return (
        Part(
            anchor,
            "Chosen on train rows",
            "Does it matter which rows a mask is chosen on?",
            "If masks chosen on other rows of the same model agree no more than those of two seeds, the rows decide "
            "as much as the model.",
            tables=(table,),
            experiment="mask-on-train",
            cells=good_cells_of(used),
            all_seeds=True,
        ),
    )


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(fmean(known)) if known else "undefined"
