"""What the page shows beside tickets and scores: attention maps, the loss around a model, challenge sets by heuristic, what masks
depend on, and published numbers.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it. The sums are those of
`tombola.study.heads`, `survival` and `reference`; here they become pictures and text.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.cases import Study, per_seed
from tombola.report.charts import Bar, Curve, Point, Stack
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, count, interval, kind_css, number, of_seeds, span, spread
from tombola.study.beside_rows import LandscapeRow, MapSample, SubgroupRow
from tombola.study.heads import ALL, PatternRow, pattern_rows, survivor_rows
from tombola.study.reference import ReferenceRow, compare_with_reference
from tombola.study.results import STAGES
from tombola.study.survival import Case as SurvivalCase
from tombola.study.survival import bare, crossed_rows

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


def _task(study: Study, name: str) -> str:
    """The task of a row as the page's filter knows it."""
    plain = bare(name)
    short = plain.partition(":")[0]
    return plain if plain in study.tasks else short if short in study.tasks else ""


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
            drawn.append(Figure(f"{task}, {MAPS[kind]} maps", svg, "", natural=True, task=_task(study, task)))
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
        tasks=tuple(_task(study, row.maps.task) for row in rows),
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
                        tasks=tuple("*" if row.maps.task == "all" else _task(study, row.maps.task) for row in correlated),
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
    found = study.case_of(case.task, case.variant) if case else None
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
            pictures.append(Figure(CLASS_NAMES.get(label, label), svg, caption, natural=True, task=_task(study, sample.task)))
        found.append(tuple(pictures))
    return tuple(row for row in found if row)


# Loss landscape


def landscape_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """The paper's guess of flat optima: the loss on the line from the dense model to a ticket, and how sharp each model is."""
    rows = study.results.landscape
    if not rows:
        return ()
    unique = {(row.cell, row.kind, row.seed, row.draw, row.role): row for row in rows}.values()
    groups: dict[tuple[str, str, str, str], list[LandscapeRow]] = {}
    for row in unique:
        groups.setdefault((_task(study, row.task) or bare(row.task), row.search, row.kind, row.role), []).append(row)
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
                drawn.append(Figure(task, svg, f"loss on {role} rows", natural=True, task=_task(study, task)))
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
        tasks=tuple(_task(study, key[0]) for key in groups),
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
    unique = {
        (row.cell, row.kind, row.stage, row.seed, row.draw, row.split, row.group, row.metric): row
        for row in study.results.subgroups
    }
    groups: dict[tuple[str, str, str, str, str], list[SubgroupRow]] = {}
    for row in unique.values():
        groups.setdefault((row.task, row.split, row.group, row.kind, row.stage), []).append(row)
    if not groups:
        return ()
    names = list(dict.fromkeys(key[2] for key in groups))
    lines = sorted({(t, s, k, st) for t, s, _, k, st in groups}, key=lambda key: (key[0], key[1], STAGES.index(key[3]), key[2]))
    titles = {row.task: row for row in unique.values()}
    table = Table(
        "Scores by group of the challenge rows: mean ± std over seeds",
        ("Task", "Split", "Ticket", "Stage", *names, "Rows of each"),
        tuple(
            (
                study.title_of(task),
                split,
                kind,
                stage,
                *(
                    of_seeds(per_seed((row.seed, row.value) for row in groups[task, split, name, kind, stage]))
                    if (task, split, name, kind, stage) in groups
                    else NONE
                    for name in names
                ),
                span(row.n for name in names for row in groups.get((task, split, name, kind, stage), ())),
            )
            for task, split, kind, stage in lines
        ),
        stubs=4,
        tasks=tuple(_task(study, task) for task, _, _, _ in lines),
    )
    drawn = []
    for task in titles:
        bars = [
            Bar(
                f"{name}: {kind}, {stage}" if stage != "full" else f"{name}: full",
                kind_css(kind),
                per_seed((row.seed, row.value) for row in mine),
                f"{name}, {kind}, {stage}",
            )
            for (one, _, name, kind, stage), mine in groups.items()
            if one == task and kind in ("full", "good", "random", "bad")
        ]
        if bars and len(bars) <= 40:
            svg = charts.row_chart(bars, [], label=f"Scores by group, {task}; the table has the numbers")
            drawn.append(Figure(study.title_of(task), svg, "", natural=True, task=_task(study, task)))
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
        tasks=tuple(_task(study, row.task) for row in rows),
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
    if not any(row.obtained is not None for row in rows):
        return ()
    parts = []
    for table, title in REFERENCE_TABLES.items():
        every = [row for row in rows if row.table == table]
        mine = [row for row in every if row.obtained is not None]
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
                        tasks=tuple(_task(study, row.task) or "*" for row in mine),
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
