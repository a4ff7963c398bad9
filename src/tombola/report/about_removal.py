"""What the page shows of removing and destroying: scores by sparsity, and lesions of parts of the dense model.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.bars import (
    STAGES,
    cells_of,
    lines_of,
    said_of_split,
)
from tombola.report.cases import Case, Group, Split, Study, estimate, per_seed
from tombola.report.charts import Bar, Curve, Point
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import (
    NONE,
    count,
    number,
    of_seeds,
    rows_of,
    span,
    spread,
)
from tombola.study.results import ScoreRow, TicketRow


def sparsity_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X8 and the paths of m-pruning: the score by the share of values removed."""
    figures, rows, tasks, used = [], [], [], []
    for task in study.tasks:
        of_task = [case for case in study.cases if case.task == task]
        steps = [case for case in of_task if case.settings.get("method") == "one-shot" and case.report and not case.family]
        paths = [case for case in of_task if case.good and any(t.values and t.path for t in case.good) and not case.family]
        curves: dict[tuple[str, str], list[Point]] = {}
        for case in sorted(steps, key=_by_criterion):
            sparsity, criterion = float(case.settings["sparsity"]), str(case.settings.get("criterion", ""))
            for stage in STAGES:
                if case.report and (group := case.report.group("good", stage)):
                    said = f"{criterion}, {100 * sparsity:g} % removed, {stage}: {spread(group.score)}"
                    curves.setdefault((criterion, stage), []).append(Point(sparsity, group.by_seed, said))
                    rows.append(
                        (
                            task,
                            f"one-shot {criterion}, {stage}",
                            f"{sparsity:.3f}",
                            of_seeds(group.by_seed),
                            of_seeds(group.by_seed, "i"),
                            f"{case.report.name}, n = {rows_of(case.report)}",
                        )
                    )
                    tasks.append(task)
        for case in paths:
            points = list(_path_points(case.good))
            curves.setdefault((f"{case.label or case.search} path", "pruned"), []).extend(points)
        if not curves:
            continue
        used += [*steps, *paths]
        split = next((case.report for case in (*steps, *paths) if case.report), None)
        lines = lines_of(split)
        drawn = [Curve(_curve_css(name), points, dashed=stage == "retrained") for (name, stage), points in curves.items()]
        svg = charts.curve_chart(drawn, lines, label=f"Scores by sparsity, {task}", x_label="values removed, %", percent=True)
        if svg:
            figures.append(Figure(task, svg, said_of_split(split) if split else "selection rows", natural=True, task=task))
    if not figures:
        return ()
    head = ("Task", "How", "Sparsity", "Score", "95 % interval", "Rows")
    table = Table("Values removed in one step: mean ± std over seeds", head, tuple(rows), stubs=2, tasks=tuple(tasks))
    return (
        Part(
            anchor,
            "Sparsity",
            "How much can be removed?",
            "Line: mean over seeds; band: one std to each side. Dashed lines: retrained. The path of m-pruning is "
            "scored on selection "
            "rows, all else on report rows.",
            legend=(("good", "magnitude"), ("random", "random"), ("strict-bad", "path of m-prune")),
            figures=(tuple(figures),),
            tables=(table,) if rows else (),
            experiment="one-shot",
            cells=cells_of(used),
        ),
    )


def _by_criterion(case: Case) -> tuple[str, float]:
    return str(case.settings.get("criterion", "")), float(case.settings.get("sparsity", 0))


def _curve_css(name: str) -> str:
    if name.endswith("path"):
        return "strict-bad"
    return {"magnitude": "good", "random": "random"}.get(name, "weights")


def _path_points(tickets: Sequence[TicketRow]) -> Iterable[Point]:
    """The trials of all seeds by step: every seed removes the same share of what remains, so steps are comparable."""
    by_step: dict[int, dict[int, tuple[float, float]]] = {}
    for ticket in tickets:
        for trial in ticket.path if ticket.values else ():
            kept = trial.kept.get("values")
            if kept is not None and ticket.values:
                by_step.setdefault(trial.step, {})[ticket.seed] = (1 - kept / ticket.values[1], trial.score)
    for step, found in sorted(by_step.items()):
        sparsity = fmean(x for x, _ in found.values())
        scores = {seed: score for seed, (_, score) in found.items()}
        told = f"step {step}, {100 * sparsity:.1f} % removed: {spread(estimate(scores.items()))} ({count(len(scores), 'seed')})"
        yield Point(sparsity, scores, told)


ACT_WORDS: Mapping[str, str] = {
    "redraw": "Drawn again",
    "zero": "Set to zero",
    "revert": "Put back to the pre-trained values",
    "revert-rotated": "Put back, from the row before",
    "drop-residual": "No residual around the MLP",
    "double-branch": "The MLP's output twice",
    "redraw-removed-heads": "Removed heads drawn again, not masked",
}


def lesion_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X4 to X7 and X9: the dense model with a part destroyed, in all layers and in each."""
    wanted = [row for row in study.results.lesions if row.role == "report"]
    if not wanted:
        return ()
    variants = study.results.variants
    rows: dict[tuple[str, str, str], dict[tuple[str, int, int], ScoreRow]] = {}
    for row in wanted:
        task = variants[row.task].task if row.task in variants else row.task
        act_what, _, where = row.lesion.partition(", layer")
        # A cell stands in every variant of its task: once is enough.
        rows.setdefault((task, act_what, where.removeprefix("s ").strip()), {})[(row.cell, row.seed, row.draw)] = row
    full = {case.task: (case.report, case.report.dense) for case in study.cases if case.report and case.report.dense}
    parts = []
    acts = [act for act in ACT_WORDS if any(what.split(" ")[0] == act for _, what, _ in rows)]
    whole = {
        act: {
            task: [
                (what.partition(" ")[2], _by_seed(found))
                for (of, what, where), found in rows.items()
                if of == task and not where and what.split(" ")[0] == act
            ]
            for task in dict.fromkeys(task for task, _, _ in rows)
        }
        for act in acts
    }
    for act in acts:
        figures = []
        for task, found in whole[act].items():
            if not found:
                continue
            split, dense = full.get(task, (None, None))
            lines = lines_of(split, dense)
            bars = [
                Bar(what, "weights", by_seed, f"{act} {what}: {spread(estimate(by_seed.items()))}") for what, by_seed in found
            ]
            svg = charts.row_chart(bars, lines, label=f"{ACT_WORDS[act]}, {task}; the table has the numbers")
            figures.append(Figure(task, svg, said_of_split(split) if split else "", natural=True, task=task))
        deep = [figure for task in whole[act] if (figure := _depth(task, act, rows, full.get(task, (None, None))[1])) is not None]
        table = _lesion_table(act, rows, full)
        cells = tuple(
            sorted({row.cell for (_, what, _), found in rows.items() if what.split(" ")[0] == act for row in found.values()})
        )
        parts.append(
            Part(
                f"{anchor}-{act}",
                ACT_WORDS[act],
                ACT_WORDS[act],
                "Nothing is trained after it. Solid line: the dense model; dashed: the majority line."
                + (" Maps: loss of score when one layer alone is hit, the stronger the more." if deep else ""),
                figures=tuple(row for row in (tuple(figures), tuple(deep)) if row),
                fold="The numbers",
                folded=(table,),
                experiment=_EXPERIMENTS.get(act, ""),
                cells=cells,
            )
        )
    return tuple(parts)


_EXPERIMENTS = {
    "redraw": "redrawn",
    "zero": "zeroed",
    "revert": "reverted",
    "revert-rotated": "reverted",
    "drop-residual": "no-residual",
    "double-branch": "no-residual",
    "redraw-removed-heads": "redrawn-heads",
}


def _by_seed(found: Mapping[tuple[str, int, int], ScoreRow]) -> dict[int, float]:
    return dict(sorted(per_seed((row.seed, row.value) for row in found.values()).items()))


def _depth(
    task: str, act: str, rows: Mapping[tuple[str, str, str], Mapping[tuple[str, int, int], ScoreRow]], dense: Group | None
) -> Figure | None:
    """Parts down, layers across: how much score goes when that part of that layer alone is destroyed."""
    found = {
        (what.partition(" ")[2], int(where)): _by_seed(mine)
        for (of, what, where), mine in rows.items()
        if of == task and where.isdigit() and what.split(" ")[0] == act
    }
    if not found or dense is None:
        return None
    names = list(dict.fromkeys(what for what, _ in found))
    layers = range(max(layer for _, layer in found) + 1)
    lost = {
        key: fmean(dense.by_seed[seed] - value for seed, value in by_seed.items() if seed in dense.by_seed)
        for key, by_seed in found.items()
        if by_seed.keys() & dense.by_seed.keys()
    }
    top = max([1e-9, *lost.values()])
    tiles = {}
    for i, name in enumerate(names):
        for layer in layers:
            if (value := lost.get((name, layer))) is not None:
                tiles[i, layer] = charts.Tile(
                    number(value, 2), max(-1.0, min(1.0, value / top)), f"{act} {name}, layer {layer}\nscore lost {number(value)}"
                )
    svg = charts.matrix(names, tiles, label=f"{act}, layer by layer, {task}", columns=[str(layer) for layer in layers])
    return Figure(f"{task}, one layer at a time", svg, "dense minus lesioned, mean over seeds", natural=True, task=task)


def _lesion_table(
    act: str,
    rows: Mapping[tuple[str, str, str], Mapping[tuple[str, int, int], ScoreRow]],
    full: Mapping[str, tuple[Split | None, Group | None]],
) -> Table:
    shown, tasks = [], []
    for (task, what, where), found in rows.items():
        if what.split(" ")[0] != act:
            continue
        by_seed, dense = _by_seed(found), full.get(task, (None, None))[1]
        less = {seed: value - dense.by_seed[seed] for seed, value in by_seed.items() if dense and seed in dense.by_seed}
        n = span(row.n for row in found.values())
        place = f"layer{'s' if '-' in where else ''} {where}" if where else "all"
        shown.append((task, what.partition(" ")[2], place, of_seeds(by_seed), of_seeds(less, sign=True) if less else NONE, n))
        tasks.append(task)
    head = ("Task", "What", "Layers", "Score", "Minus dense", "Rows")
    return Table(f"{ACT_WORDS[act]}: mean ± std over seeds", head, tuple(shown), stubs=3, tasks=tuple(tasks))
