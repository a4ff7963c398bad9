"""What the page shows of masks over all tasks of a study: do seeds agree, do tasks, and what did each search go by?

Each function takes an anchor and the study and returns parts, none where the store has no tickets for it. One row of
`build.PARTS` each. All chance levels are those of masks of the same sizes.
"""

from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, stdev

from tombola.report import charts, figures
from tombola.report.cases import UNITS, Case, Study
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, count, interval, number, probability, spread
from tombola.stats import ALPHA, TaskOverlap, over_seeds, overlap, overlap_of_tasks, stability
from tombola.study.results import TicketRow

SLIDES = "Step of the search"
DRAWS = 1_999  # of permutation tests on the page: p is then a multiple of .0005


def _structured(case: Case) -> bool:
    return bool(case.good) and bool(case.units) and case.column == "MLP" and len(case.shapes) == 1


def stability_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """E9: whether the tickets of several seeds keep the same parts, for every task and search."""
    cases = [case for case in study.cases if not case.family and _structured(case) and len({t.seed for t in case.good}) > 1]
    if len(cases) < 2:
        return ()  # of one case its own section says it
    rows, tasks = [], []
    for case in cases:
        for unit, of in case.units.items():
            found = stability([of(ticket) for ticket in case.good], draws=DRAWS)
            kappa, ends = found.kappa, interval(found.kappa)
            rows.append(
                (
                    case.task,
                    case.label or case.search,
                    unit,
                    "undefined" if kappa.value is None else number(kappa.value) + (f" ({ends})" if ends != NONE else ""),
                    number(found.expected_kappa),
                    number(found.alpha.value),
                    number(found.jaccard.value),
                    number(found.expected_jaccard),
                    probability(found.p_at_least).removeprefix("= "),
                    found.cochran.text.removeprefix("survival rates ").removeprefix("are ").split(",")[0],
                    number(found.undecided.share.value),
                    number(found.undecided.expected),
                    str(len(found.sizes)),
                )
            )
            tasks.append(case.task)
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
            "Undecided",
            "by chance",
            "Seeds",
        ),
        tuple(rows),
        "Kappa: 1 = one mask in all seeds, 0 = chance; in brackets its 95 % interval over seeds (jackknife). Alpha: "
        "Krippendorff’s. "
        "p, given sizes: chance that masks of these sizes agree as much. Sizes: whether the shares that seeds keep differ "
        "(Cochran’s Q), which says nothing of which parts they keep. Undecided: share of parts whose survival has a "
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
            cells=_cells(cases),
            all_seeds=True,
        ),
    )


def importance_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 3: at every step of a search the importance of the heads still there, and where the step cut."""
    cases = [case for case in study.cases if not case.family and any(t.steps for t in case.good)]
    parts = []
    for i, (search, mine) in enumerate(study.by_search(lambda case: case in cases).items(), start=1):
        drawn = (tuple(figure for case in mine if (figure := _histogram(case, unit))) for unit in ("heads", "mlps"))
        if not (rows := [row for row in drawn if row]):
            continue
        parts.append(
            Part(
                f"{anchor}-{i}",
                f"Importance, {search}" if search else "Importance",
                f"What the search went by, step by step{f': {search}' if search else ''}",
                "Fig. 3 of the paper. Of the parts still there, how many have which importance; line: below it the next step "
                "removed. Heads are scaled within their layer, as the search ranks them.",
                slider=SLIDES,
                figures=tuple(rows),
                experiment="s-prune",
                cells=tuple(sorted({t.cell for case in mine for t in case.good})),
            )
        )
    return tuple(parts)


def _histogram(case: Case, unit: str) -> Figure | None:
    name = "heads" if unit == "heads" else "MLPs"
    found = {ticket.seed: ticket.steps for ticket in case.good if ticket.steps}
    values = [value for steps in found.values() for step in steps for value in getattr(step, unit)]
    sizes = {len(getattr(step, unit)) for steps in found.values() for step in steps}
    if len(values) < 2 or max(sizes) < 2 or (len(sizes) == 1 and len(found) < 2 and max(map(len, found.values())) > 1):
        return None  # a kind that this search leaves whole
    top = max(values)
    steps = {
        seed: [
            charts.Bins(
                _bins(getattr(step, unit), top),
                step.head_cut if unit == "heads" else step.mlp_cut,
                f"trial {step.step}, seed {seed}: {len(getattr(step, unit))} {name}",
            )
            for step in mine
        ]
        for seed, mine in found.items()
    }
    svg = charts.histogram(steps, top, label=f"Histogram of the importance of {name}, {case.title}")
    return Figure(case.task, svg, f"importance of {name}", natural=True, task=case.task) if svg else None


def _bins(values: Sequence[float], top: float) -> list[int]:
    counts = [0] * charts.BINS
    for value in values:
        counts[min(charts.BINS - 1, int(charts.BINS * value / top))] += 1
    return counts


def task_overlap_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 5 and App. G: what the tickets of two tasks share at matched seeds, beside chance given their sizes."""
    parts = []
    searches = study.by_search(lambda case: _structured(case) and case.family in ("", "super"))
    for i, (search, cases) in enumerate(searches.items(), start=1):
        shape = cases[0].shapes[0]
        mine = [case for case in cases if case.shapes[0] == shape]
        if len({case.task for case in mine}) < 2:
            continue
        units = [
            unit for unit in mine[0].units if any(0 < sum(UNITS[unit](t)) < len(UNITS[unit](t)) for c in mine for t in c.good)
        ]
        drawn, tables = [], []
        for unit in units:
            pairs = _pairs(mine, unit)
            drawn.append(_matrix(mine, unit, pairs))
            tables.append(_pairs_table(search, unit, pairs))
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
                cells=tuple(sorted({t.cell for case in mine for t in case.good})),
                all_seeds=True,
            )
        )
    return tuple(parts)


def _pairs(cases: Sequence[Case], unit: str) -> dict[tuple[int, int], tuple[str, str, TaskOverlap]]:
    masks = [{ticket.seed: UNITS[unit](ticket) for ticket in case.good} for case in cases]
    found = {}
    for a, b in combinations(range(len(cases)), 2):
        seeds = sorted(masks[a].keys() & masks[b].keys())
        if seeds:
            shared = overlap_of_tasks([masks[a][s] for s in seeds], [masks[b][s] for s in seeds], draws=DRAWS)
            found[a, b] = (cases[a].task, cases[b].task, shared)
    return found


def _matrix(cases: Sequence[Case], unit: str, pairs: dict[tuple[int, int], tuple[str, str, TaskOverlap]]) -> Figure:
    tiles = {}
    for i, case in enumerate(cases):
        sizes = over_seeds([float(sum(UNITS[unit](ticket))) for ticket in case.good])
        n = len(UNITS[unit](case.good[0]))
        tiles[i, i] = charts.Tile(number(sizes.value, 1), 0.0, f"{case.task}: keeps {spread(sizes, 1)} of {n} {unit}")
    for (a, b), (one, other, it) in pairs.items():
        ratio = it.ratio
        title = f"{one} and {other}: {number(it.shared.value, 1)} {unit} shared, {number(it.expected_shared, 1)} by chance\n"
        title += f"ratio {number(ratio)}, p (this much or more) {number(it.p_at_least)}" + (f"\n{it.note}" if it.note else "")
        shade = None if ratio is None else max(-1.0, min(1.0, 2.5 * (ratio - 1)))
        for place in ((a, b), (b, a)):
            tiles[place] = charts.Tile(number(it.shared.value, 1), shade, title)
    svg = charts.matrix([case.task for case in cases], tiles, label=f"Overlap of {unit} between tasks; the table has the numbers")
    return Figure(unit, svg, f"of {len(UNITS[unit](cases[0].good[0]))} {unit}", natural=True)


def _pairs_table(search: str, unit: str, pairs: dict[tuple[int, int], tuple[str, str, TaskOverlap]]) -> Table:
    return Table(
        f"{unit} that two tasks share, {search}",
        ("Task", "and", "Shared", "by chance", "Ratio", "p, this much or more", "p, this much or less", "Seeds"),
        tuple(
            (
                one,
                other,
                spread(it.shared, 1),
                number(it.expected_shared, 1),
                number(it.ratio),
                number(it.p_at_least),
                number(it.p_at_most),
                str(it.shared.n_seeds),
            )
            for one, other, it in pairs.values()
        ),
        "Mean ± std over matched seeds. p: parts of one task renamed at random, in the same way for all of its seeds.",
        stubs=2,
        tasks=tuple((one, other) for one, other, _ in pairs.values()),
    )


def task_survival_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 15: for how many tasks each head and MLP survives, mean over seeds."""
    drawn = []
    for search, cases in study.by_search(lambda case: _structured(case) and not case.family).items():
        mine = [case for case in cases if case.shapes[0] == cases[0].shapes[0]]
        if len({case.task for case in mine}) < 2:
            continue
        first = mine[0].good[0]
        layers, heads = len(first.mlps), len(first.heads[0])
        seeds = sorted(set.intersection(*({t.seed for t in case.good} for case in mine)))
        if not seeds:
            continue
        raw = {
            seed: [sum(kept) for kept in zip(*(_parts(t) for case in mine for t in case.good if t.seed == seed), strict=True)]
            for seed in seeds
        }
        heat = figures.Heat(
            layers, heads, {seed: [value / len(mine) for value in found] for seed, found in raw.items()}, "tasks", raw=raw
        )
        svg = figures.heat_map(heat, css="survival", width=348, label=f"Tasks survived, {search}", name=f"of {len(mine)} tasks")
        stds = [stdev(values) for values in zip(*raw.values(), strict=True)] if len(seeds) > 1 else []
        spreads = f"; std over seeds {number(fmean(stds), 2)} on average" if stds else ""
        caption = f"{len(mine)} tasks, {count(len(seeds), 'seed')}{spreads}"
        drawn.append(Figure(search or "tickets", svg, caption, ("survival", "no task", "all tasks"), natural=True))
    if not drawn:
        return ()
    shown = [case for case in study.cases if _structured(case) and not case.family]
    return (
        Part(
            anchor,
            "Survival over tasks",
            "Which parts survive for how many tasks?",
            "Fig. 15 of the paper. Shade: in how many tasks a part survives, mean over seeds; point at one for its numbers.",
            figures=(tuple(drawn),),
            experiment="s-prune",
            cells=_cells(shown),
        ),
    )


def _parts(ticket: TicketRow) -> list[float]:
    return [*(share for row in ticket.heads for share in row), *ticket.mlps]


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
            cells=_cells(used),
            all_seeds=True,
        ),
    )


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(fmean(known)) if known else "undefined"


def _cells(cases: Sequence[Case]) -> tuple[str, ...]:
    return tuple(sorted({t.cell for case in cases for t in case.good}))
