"""What the page shows beside tickets and scores: the loss around a model, challenge sets by heuristic, what masks depend on, and
published numbers.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it. The sums are those of
`tombola.study.survival` and `reference`; here they become pictures and text.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.cases import Study, per_seed
from tombola.report.charts import Bar, Curve, Point
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, count, interval, kind_css, number, of_seeds, span, spread
from tombola.study.beside_rows import LandscapeRow, SubgroupRow
from tombola.study.reference import ReferenceRow, compare_with_reference
from tombola.study.results import STAGES
from tombola.study.survival import bare, crossed_rows

# Loss landscape


def landscape_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """The paper's guess of flat optima: the loss on the line from the dense model to a ticket, and how sharp each model is."""
    rows = study.results.landscape
    if not rows:
        return ()
    unique = {(row.cell, row.kind, row.seed, row.draw, row.role): row for row in rows}.values()
    groups: dict[tuple[str, str, str, str], list[LandscapeRow]] = {}
    for row in unique:
        groups.setdefault((study.task_of(row.task) or bare(row.task), row.search, row.kind, row.role), []).append(row)
    shown = [
        (
            task,
            search or NONE,
            kind,
            role,
            of_seeds(_over(mine, "loss")),
            of_seeds(_over(mine, "over_line")) if _over(mine, "over_line") else NONE,
            of_seeds(_over(mine, "over_ends")) if _over(mine, "over_ends") else NONE,
            of_seeds(_over(mine, "sharpness")),
            str(len({row.seed for row in mine})),
            span(row.n for row in mine),
        )
        for (task, search, kind, role), mine in groups.items()
    ]
    drawn = []
    for task in dict.fromkeys(key[0] for key in groups):
        for role in dict.fromkeys(key[3] for key in groups if key[0] == task):
            curves = []
            for (one, search, kind, of_role), mine in groups.items():
                if (one, of_role) == (task, role) and (points := _line(mine, f"{search} {kind}")):
                    curves.append(Curve(kind_css(kind), points))
            svg = charts.curve_chart(
                curves, [], label=f"Loss between models, {task}, {role} rows", x_label="0 = dense, 1 = ticket"
            )
            if svg:
                drawn.append(Figure(task, svg, f"loss on {role} rows", natural=True, task=study.task_of(task)))
    table = Table(
        "Loss, barrier and sharpness: mean ± std over seeds",
        (
            "Task",
            "Search",
            "Model",
            "Rows are",
            "Loss",
            "Barrier over the line",
            "over the higher end",
            "Sharpness",
            "Seeds",
            "Rows",
        ),
        tuple(shown),
        "Barrier: the largest excess of the loss on the straight line from the dense model to the retrained ticket. "
        "Sharpness: the mean "
        "rise of the loss when weights move a fixed way in a random, filter-normalised direction.",
        stubs=4,
        tasks=tuple(study.task_of(key[0]) for key in groups),
    )
    kinds = dict.fromkeys(key[2] for key in groups if key[2] != "full")
    return (
        Part(
            anchor,
            "Loss landscape",
            "Do good tickets lie in the dense model’s valley?",
            "The paper guesses that tickets train well because optima of pre-trained models are flat.",
            legend=tuple((kind_css(kind), kind) for kind in kinds),
            figures=(tuple(drawn),) if drawn else (),
            tables=(table,),
            experiment="landscape",
            cells=tuple(sorted({row.cell for row in rows})),
        ),
    )


def _over(rows: Sequence[LandscapeRow], name: str) -> dict[int, float]:
    return per_seed((row.seed, value) for row in rows if (value := getattr(row, name)) is not None)


def _line(rows: Sequence[LandscapeRow], name: str) -> list[Point]:
    places = {row.at for row in rows if row.at}
    if len(places) != 1:
        return []
    points = []
    for i, at in enumerate(places.pop()):
        by_seed = per_seed((row.seed, row.losses[i]) for row in rows if row.at)
        points.append(Point(at, by_seed, f"{name} at {at:g}: loss {number(fmean(by_seed.values()))}"))
    return points


# Challenge sets by group


def subgroup_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X3: scores on each heuristic of HANS, and on whatever groups another challenge set has."""
    robust = {row.cell for row in study.results.robust}  # `about_robust` has the groups of their tasks
    further = {row.task for row in study.results.subgroups if row.cell not in robust}
    shown = {
        row.task for row in study.results.subgroups if row.cell in robust and (row.kind != "full" or row.task not in further)
    }
    unique = {
        (row.cell, row.kind, row.stage, row.seed, row.draw, row.split, row.group, row.metric): row
        for row in study.results.subgroups
        if row.role != "selection" and row.task not in shown  # what a mask was chosen on says nothing of shortcuts
    }
    groups: dict[tuple[str, str, str, str, str], list[SubgroupRow]] = {}
    for row in unique.values():
        groups.setdefault((row.task, row.split, row.group, row.kind, row.stage), []).append(row)
    if not groups:
        return ()
    titles = list(dict.fromkeys(row.task for row in unique.values()))
    lines = sorted(dict.fromkeys(key[:3] for key in groups), key=lambda key: (titles.index(key[0]), key[1]))
    tickets = sorted(dict.fromkeys(key[3:] for key in groups), key=lambda key: STAGES.index(key[1]))
    table = Table(
        "Scores by group: mean ± std over seeds",
        ("Task", "Rows of", "Group", *("dense" if stage == "full" else f"{stage} {kind}" for kind, stage in tickets), "Rows"),
        tuple(
            (
                study.title_of(task),
                split,
                group,
                *(
                    of_seeds(per_seed((row.seed, row.value) for row in groups.get((task, split, group, *ticket), ())))
                    for ticket in tickets
                ),
                span(row.n for ticket in tickets for row in groups.get((task, split, group, *ticket), ())),
            )
            for task, split, group in lines
        ),
        stubs=3,
        tasks=tuple(study.task_of(task) for task, _, _ in lines),
    )
    drawn = []
    for task in titles:
        several = len({key[1] for key in groups if key[0] == task}) > 1
        bars = [
            Bar(
                f"{split}, {name}: {said}" if several else f"{name}: {said}",
                kind_css(kind),
                per_seed((row.seed, row.value) for row in mine),
                f"{split}, {name}, {kind}, {stage}",
            )
            for (one, split, name, kind, stage), mine in groups.items()
            for said in ["full" if stage == "full" else f"{kind}, {stage}"]
            if one == task and kind in ("full", "good", "random", "bad")
        ]
        if bars and len(bars) <= 40:
            svg = charts.row_chart(bars, [], label=f"Scores by group, {task}; the table has the numbers")
            drawn.append(Figure(study.title_of(task), svg, "", natural=True, task=study.task_of(task)))
    return (
        Part(
            anchor,
            "Challenge sets, by group",
            "Where do shortcuts fail?",
            figures=(tuple(drawn),) if drawn else (),
            tables=(table,),
            experiment="hans",
            cells=tuple(sorted({row.cell for row in unique.values()})),
        ),
    )


# What masks depend on


def crossed_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """The crossed design: how much of the difference between masks comes from head init, data order and dropout."""
    rows = crossed_rows(study.results)
    if not rows:
        return ()
    factors = list(dict.fromkeys(name for row in rows if row.found for name in row.found.share))
    table = Table(
        "What masks differ by: share of their variance",
        ("Task", "Search", "Part", *(" × ".join(names) for names in factors), "Runs", "Note"),
        tuple(
            (
                bare(row.task),
                row.search,
                row.part.replace("mlps", "MLPs"),
                *(number(row.found.share.get(name)) if row.found else NONE for name in factors),
                str(row.runs),
                row.note or NONE,
            )
            for row in rows
        ),
        "Runs that differ in one of head init, data order and dropout at a time; shares of variance, together with "
        "what factors do "
        "only jointly.",
        stubs=3,
        tasks=tuple(study.task_of(row.task) for row in rows),
    )
    return (
        Part(
            anchor,
            "Crossed design",
            "Which seed decides the mask?",
            tables=(table,),
            experiment="crossed",
            cells=tuple(sorted({one.cell for one in study.results.crossed})),
            all_seeds=True,
        ),
    )


# Published numbers

REFERENCE_TABLES: Mapping[str, str] = {
    "scores": "Scores (Fig. 2, App. C)",
    "sizes": "Sizes (Fig. 1, App. A)",
    "table2": "Bad tickets and baselines (Table 2)",
    "longer": "Longer training (App. D)",
    "others": "Other numbers",
}


def reference_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """What was obtained beside what is published; only of tasks that the paper has."""
    rows = compare_with_reference(study.results)
    parts = []
    for table, title in REFERENCE_TABLES.items():
        every = [row for row in rows if row.table == table]
        mine = [row for row in every if row.obtained is not None and row.obtained.value is not None]
        if not mine:
            continue
        absent = len(every) - len(mine)
        notes = dict.fromkeys(note for row in mine for note in row.notes)
        numbered = {note: i for i, note in enumerate(notes, start=1)}
        listed = "; ".join(f"({i}) {note}" for note, i in numbered.items())
        lacking = f" {count(absent, 'published number')} of these tasks have nothing to be held against here." if absent else ""
        parts.append(
            Part(
                f"{anchor}-{table}",
                title,
                f"Published numbers: {title}",
                "Obtained, published, difference. Nothing is judged here: other models, rows and presets give other numbers.",
                tables=(
                    Table(
                        title,
                        ("Task", "What", "Obtained", "95 %", "n", "Published", "Difference", "Notes"),
                        tuple(_reference_cells(row, numbered, study) for row in mine),
                        (f"Notes: {listed}." if listed else "") + lacking,
                        stubs=2,
                        tasks=tuple(study.task_of(row.task) or "*" for row in mine),
                    ),
                ),
                experiment="",
                all_seeds=True,
            )
        )
    return tuple(parts)


def _reference_cells(row: ReferenceRow, numbered: Mapping[str, int], study: Study) -> tuple[str, ...]:
    published = number(row.reference) + (f" ± {number(row.reference_std)}" if row.reference_std is not None else "")
    return (
        study.title_of(row.task),
        f"{row.what}{f', {row.metric}' if row.table == 'sizes' else ''}",
        spread(row.obtained) if row.obtained else NONE,
        interval(row.obtained) if row.obtained else NONE,
        str(row.obtained.n_seeds) if row.obtained else NONE,
        published,
        number(row.difference, sign=True),
        " ".join(f"({i})" for i in sorted(numbered[note] for note in row.notes)) or NONE,
    )
