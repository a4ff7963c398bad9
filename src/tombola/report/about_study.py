"""What the page shows of scores over all tasks of a study: the paper's bars and tables, and what further experiments say beside them.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it. One row of `build.PARTS` each.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.cases import Case, Group, Split, Study, estimate, per_seed
from tombola.report.charts import Bar, Curve, Point
from tombola.report.figures import Line
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import (
    NONE,
    count,
    group_name,
    kind_css,
    kind_name,
    number,
    of_seeds,
    rows_of,
    span,
    spread,
)
from tombola.study.kinds import CONTROL_KINDS, TRAIN_MODES
from tombola.study.results import KINDS, ScoreRow, TicketRow

STAGES = ("pruned", "retrained")
MAIN = ("good", "random", "bad")
INVERTED = ("inverted", "inverted-revived")
LESIONED = tuple(kind for kind, one in CONTROL_KINDS.items() if one.lesion is not None)
MODES = tuple(mode.kind for mode in TRAIN_MODES.values())


# Good, random, bad


def bar_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 2: for each search and task the dense model, and good, random and bad as pruned and as retrained."""
    if len(study.cases) < 2:
        return ()  # its own section says it
    parts = []
    for i, (search, cases) in enumerate(study.by_search(_has_controls).items(), start=1):
        kinds = [kind for kind in KINDS if kind in MAIN or (kind == "strict-bad" and any(_has(case, kind) for case in cases))]
        parts.append(
            Part(
                f"{anchor}-{i}",
                search or "Scores",
                f"Good, random and bad tickets{f': {search}' if search else ''}",
                f"{_paper('Fig. 2', cases)}Bars: mean over seeds; whiskers: one std to each side; dots: seeds. "
                "Dashed: the majority line. Pruned: the mask on the fine-tuned weights. Retrained: on the base, trained again.",
                legend=_legend(["full", *kinds]),
                figures=(tuple(figure for case in cases if (figure := _bars(case, ["full", *kinds]))),),
                tables=(_bars_table(search, cases, kinds),),
                experiment="controls",
                cells=_cells(cases),
            )
        )
    return tuple(parts)


def _has_controls(case: Case) -> bool:
    return case.family == "" and _has(case, "good") and any(_has(case, kind) for kind in ("random", "bad"))


def _has(case: Case, kind: str, stage: str | None = None) -> bool:
    stages = STAGES if stage is None else (stage,)
    return bool(case.report) and any(case.report.group(kind, one) for one in stages if case.report)


def _bars(case: Case, kinds: Sequence[str], stages: Sequence[str] = ("full", *STAGES)) -> Figure | None:
    split = case.report
    if split is None:
        return None
    bars = []
    for stage in stages:
        groups = [group for kind in kinds if (group := split.group(kind, stage))]
        bars += [Bar("" if stage == "full" else stage, kind_css(one.kind), one.by_seed, _told(one)) for one in groups]
    svg = charts.bar_chart(bars, [_majority(split)], label=f"Bars of {case.title}; the table has their numbers")
    return Figure(case.task, svg, _of(split), natural=True, task=case.task) if svg else None


def _told(group: Group) -> str:
    return f"{group_name(group)}: {spread(group.score)}\n" + ", ".join(
        f"seed {seed}: {number(value)}" for seed, value in group.by_seed.items()
    )


def _of(split: Split) -> str:
    return f"{split.metric.replace('_', '-')}, n = {rows_of(split)}, {count(len({row.seed for row in split.rows}), 'seed')}"


def _majority(split: Split) -> Line:
    return Line("majority", f"majority line {number(split.majority)}", split.majority)


def _bars_table(search: str, cases: Sequence[Case], kinds: Sequence[str]) -> Table:
    columns = [("full", "full"), *((kind, stage) for stage in STAGES for kind in kinds)]
    columns = [one for one in columns if any(case.report and case.report.group(*one) for case in cases)]
    rows, tasks = [], []
    for case in cases:
        if split := case.report:
            cells = [_score(split.group(*one)) for one in columns]
            rows.append((case.task, *cells, number(split.majority), f"{split.metric}, n = {rows_of(split)}"))
            tasks.append(case.task)
    if len(rows) > 1:
        means = [_mean_of_tasks([split.group(*one) for case in cases if (split := case.report)]) for one in columns]
        majority = number(fmean(split.majority for case in cases if (split := case.report)))
        rows.append((f"mean of {len(rows)} tasks", *means, majority, "each task its metric"))
        tasks.append("*")
    return Table(
        f"Good, random and bad tickets{f', {search}' if search else ''}: mean ± std over seeds",
        ("Task", *("Full" if kind == "full" else f"{kind_name(kind).capitalize()}, {stage}" for kind, stage in columns), "Majority",
         "Metric"),
        tuple(rows),
        "Mean of tasks: within each seed first, over the tasks that have it; metrics differ, as in the paper.",
        tasks=tuple(tasks),
    )  # fmt: skip


def _score(group: Group | None) -> str:
    return of_seeds(group.by_seed) if group else NONE


def _mean_of_tasks(groups: Sequence[Group | None]) -> str:
    """Over tasks within each seed that all of them have; a dash where one task has no such scores."""
    found = [group.by_seed for group in groups if group]
    seeds = set.intersection(*(set(one) for one in found)) if found else set()
    if len(found) < len(groups) or not seeds:
        return NONE
    return of_seeds({seed: fmean(one[seed] for one in found) for seed in sorted(seeds)})


# Table 2


def versus_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Table 2: bad tickets beside the majority line, baselines, and models that start from weights drawn again."""
    if len(study.cases) < 2:
        return ()
    columns: dict[tuple[str, str, str], None] = {}
    by_task: dict[str, dict[tuple[str, str, str], Group]] = {}
    majority: dict[str, float] = {}
    used: list[Case] = []
    for case in study.cases:
        split = case.report
        if split is None or case.family:
            continue
        wanted = [one for one in split.groups if _is_beside(one)]
        if not wanted:
            continue
        used.append(case)
        majority.setdefault(case.task, split.majority)
        for group in wanted:
            of_search = group.kind in CONTROL_KINDS and group.kind != "dense-random-init"
            key = (case.label or case.search if of_search else "", group.kind, group.stage)
            columns[key] = None
            by_task.setdefault(case.task, {}).setdefault(key, group)
    if not any(kind not in ("bad", "full") for _, kind, _ in columns) and not any(kind == "bad" for _, kind, _ in columns):
        return ()
    ordered = sorted(columns, key=lambda key: (key[1] != "full", key[0] == "", key[0], key[1], key[2]))
    rows: list[tuple[str, ...]] = [
        (task, number(majority[task]), *(_score(by_task[task].get(key)) for key in ordered)) for task in by_task
    ]
    tasks = list(by_task)
    if len(rows) > 1:
        means = (_mean_of_tasks([by_task[task].get(key) for task in tasks]) for key in ordered)
        rows.append((f"mean of {len(rows)} tasks", number(fmean(majority.values())), *means))
    table = Table(
        "Bad tickets beside baselines: mean ± std over seeds",
        ("Task", "Majority", *(_column(*key) for key in ordered)),
        tuple(rows),
        "Bad: what good removed, of the same size, trained again from the base. Drawn again: weights that no training has touched.",
        tasks=(*tasks, *["*"] * (len(rows) - len(tasks))),
    )
    return (
        Part(
            anchor,
            "Bad beside baselines",
            "How far do bad tickets come?",
            "Table 2 of the paper: bad tickets, trained again, beside what models reach that owe nothing to pre-training or to a mask.",
            tables=(table,),
            experiment="controls",
            cells=_cells(used),
        ),
    )


def _is_beside(group: Group) -> bool:
    """Dense, bad and strict-bad retrained, lesioned weights, train modes from fresh weights, and whatever is no ticket at all."""
    known = group.kind in KINDS
    return (
        group.kind == "full"
        or (group.kind in ("bad", "strict-bad") and group.stage == "retrained")
        or group.kind in LESIONED
        or group.kind == "random-init"
        or not known
    )


def _column(search: str, kind: str, stage: str) -> str:
    name = kind_name(kind) if kind == "full" else f"{kind}, {stage}"
    return f"{search}: {name}" if search else name[:1].upper() + name[1:]


# Longer training


def epoch_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Appendix D: bad tickets trained again for longer, each number of epochs a schedule of its own."""
    curves: dict[tuple[str, str, str], dict[int, Group]] = {}
    full: dict[str, Group] = {}
    splits: dict[str, Split] = {}
    used = []
    for case in study.cases:
        if case.family or not (split := case.report) or "epochs" not in case.settings:
            continue
        epochs = int(case.settings["epochs"])
        for group in split.groups:
            if group.stage == "retrained" and group.kind in ("bad", "strict-bad", "random", "good"):
                other = case.differing.keys() - {"epochs", "method", "procedure", "criterion"}
                key = (case.task, case.search + "".join(f", {n}={case.differing[n]}" for n in sorted(other)), group.kind)
                curves.setdefault(key, {})[epochs] = group
                splits.setdefault(case.task, split)
                used.append(case)
        if split.dense:
            full.setdefault(case.task, split.dense)
    curves = {key: dict(sorted(points.items())) for key, points in curves.items() if len(points) > 1}
    if not curves:
        return ()
    tasks = list(dict.fromkeys(task for task, _, _ in curves))
    figures = []
    for task in tasks:
        mine = {key: points for key, points in curves.items() if key[0] == task}
        drawn = [
            Curve(kind_css(kind), [Point(epochs, group.by_seed, f"{search} {kind}, {epochs} epochs: {spread(group.score)}")
                                   for epochs, group in points.items()])
            for (_, search, kind), points in mine.items()
        ]  # fmt: skip
        lines = [_majority(splits[task])]
        if task in full and (score := full[task].score.value) is not None:
            lines.append(Line("line-full", f"dense {number(score)}", score))
        svg = charts.curve_chart(drawn, lines, label=f"Scores by epochs, {task}", x_label="epochs")
        figures.append(Figure(task, svg, _of(splits[task]), natural=True, task=task))
    every = sorted({epochs for points in curves.values() for epochs in points})
    table = Table(
        "Scores by epochs of training again: mean ± std over seeds",
        ("Task", "Ticket", *(f"{epochs} epochs" for epochs in every)),
        tuple(
            (task, f"{search} {kind}".strip(), *(_score(points.get(epochs)) for epochs in every))
            for (task, search, kind), points in curves.items()
        ),
        "Each number of epochs has a learning-rate schedule of its own.",
        stubs=2,
        tasks=tuple(task for task, _, _ in curves),
    )
    return (
        Part(
            anchor, "Longer training", "Do bad tickets catch up with longer training?",
            "Appendix D of the paper. Line: mean over seeds; band: one std to each side; solid grey: the dense model; dashed: majority.",
            legend=_legend(["bad"]), figures=(tuple(figures),), tables=(table,), experiment="longer", cells=_cells(used),
        ),
    )  # fmt: skip


# Tickets made from others


def super_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Appendix E: what the tickets of all seeds keep, against random and bad tickets of that size."""
    cases = [case for case in study.cases if case.family == "super"]
    if not cases:
        return ()
    kinds = ["full", *MAIN]
    sizes = Table(
        "How much is kept in all seeds",
        ("Task", "Search", "Heads kept", "MLPs kept", "Share of body", "Random shares", "Bad shares"),
        tuple(
            (
                case.task,
                case.search,
                *(_kept(case, unit) for unit in ("heads", "MLPs")),
                spread(estimate((ticket.seed, ticket.body_share) for ticket in case.good)),
                *(_shared(case.by_kind.get(kind, ())) for kind in ("random", "bad")),
            )
            for case in cases
        ),
        "Shares: heads that a control has in common with the super-survivors, mean over seeds.",
        stubs=2,
        tasks=tuple(case.task for case in cases),
    )
    return (
        Part(
            anchor, "Super-survivors", "What survives in every seed",
            "Appendix E of the paper: the heads and MLPs that the tickets of all seeds keep, with random and bad ones of that size.",
            legend=_legend(kinds),
            figures=(tuple(figure for case in cases if (figure := _bars(case, kinds))),),
            tables=(_bars_table("super-survivors", cases, MAIN), sizes),
            experiment="super-survivors", cells=_cells(cases),
        ),
    )  # fmt: skip


def _kept(case: Case, unit: str) -> str:
    if unit not in case.units or not case.good:
        return NONE
    return f"{spread(estimate((t.seed, float(sum(case.units[unit](t)))) for t in case.good), 1)} of {len(case.units[unit](case.good[0]))}"


def _shared(tickets: Sequence[TicketRow]) -> str:
    values = [(ticket.seed, float(ticket.shared_with_good["heads"])) for ticket in tickets if "heads" in ticket.shared_with_good]
    return spread(estimate(values), 1) if values else NONE


def joined_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X10: the heads-only and the MLPs-only mask applied together, beside the mask found on both at once; and their sizes."""
    rows, tasks, used = [], [], []
    for task in study.tasks:
        of_task = [case for case in study.cases if case.task == task]
        joint = next((case for case in of_task if case.search == "s-prune" and not case.family and case.good), None)
        both = next((case for case in of_task if case.family == "joined"), None)
        alone = [
            next((case for case in of_task if case.search == f"s-prune, {what} only" and not case.family), None)
            for what in ("heads", "MLPs")
        ]
        if joint is None or (both is None and not any(alone)):
            continue
        used += [case for case in (joint, both, *alone) if case]
        cells = [_kept(case, "heads") if case else NONE for case in (joint, alone[0], both)]
        cells += [_kept(case, "MLPs") if case else NONE for case in (joint, alone[1], both)]
        for stage in STAGES:
            for case in (joint, both):
                cells.append(_score(case.report.group("good", stage)) if case and case.report else NONE)
            cells.append(_difference(both, joint, stage))
        rows.append((task, *cells))
        tasks.append(task)
    if not rows:
        return ()
    table = Table(
        "Pruned together or apart: mean ± std over seeds",
        ("Task", "Heads, joint", "Heads, alone", "Heads, joined", "MLPs, joint", "MLPs, alone", "MLPs, joined",
         *(f"{what}, {stage}" for stage in STAGES for what in ("Joint", "Joined", "Joined − joint"))),
        tuple(rows),
        "Joint: one search of heads and MLPs. Alone: a search of one kind, the other whole. Joined: both of these masks at once. "
        "If heads and MLPs did not depend on each other, joined masks would hold the floor as joint ones do.",
        tasks=tuple(tasks),
    )  # fmt: skip
    return (
        Part(anchor, "Joint and joined", "Do heads and MLPs depend on each other?", tables=(table,), experiment="joined",
             cells=_cells(used)),
    )  # fmt: skip


def _difference(a: Case | None, b: Case | None, stage: str, kind: str = "good") -> str:
    one, other = (case.report.group(kind, stage) if case and case.report else None for case in (a, b))
    if not one or not other or not (found := one.less(other)):
        return NONE
    return of_seeds(found, sign=True)


def matched_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X11: masks of single values that remove exactly the share that an s-mask removes."""
    cases = [case for case in study.cases if case.family == "size-matched"]
    if not cases:
        return ()
    kinds = ["full", *MAIN]
    rows = []
    for case in cases:
        whole = next((one for one in study.cases if (one.task, one.search, one.family) == (case.task, case.search, "")), None)
        share = spread(estimate((ticket.seed, ticket.body_share) for ticket in case.good))
        cells = []
        for stage in STAGES:
            cells += [_score(one.report.group("good", stage)) if one and one.report else NONE for one in (whole, case)]
            cells.append(_difference(case, whole, stage))
        rows.append((case.task, case.search, share, *cells))
    table = Table(
        "Whole parts or single values, at the same size: mean ± std over seeds",
        (
            "Task",
            "Search",
            "Share kept",
            *(f"{what}, {stage}" for stage in STAGES for what in ("Parts", "Values", "Values − parts")),
        ),
        tuple(rows),
        "Values: those of lowest magnitude removed, exactly as large a share as the ticket of whole parts removes.",
        stubs=2,
        tasks=tuple(case.task for case in cases),
    )
    return (
        Part(
            anchor, "Size-matched", "Single values removed, as much as whole parts",
            legend=_legend(kinds), figures=(tuple(figure for case in cases if (figure := _bars(case, kinds))),), tables=(table,),
            experiment="size-matched", cells=_cells(cases),
        ),
    )  # fmt: skip


# How models and masks are used


def mode_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X1 and X2: models trained otherwise; masks used, inverted, drawn at random."""
    found = []
    modes = _first_of_task(case for case in study.cases if case.report and any(case.report.group(m, "retrained") for m in MODES))
    if modes:
        kinds = ["full", *MODES]
        found.append(
            Part(
                f"{anchor}-trained", "Train modes", "What does the score owe to pre-training?",
                "Fine-tuned in full; the task's head alone (frozen); and both from weights drawn again (random-init).",
                figures=(tuple(figure for case in modes if (figure := _rows(case, kinds))),),
                tables=(_bars_table("train modes", modes, MODES),),
                experiment="train-modes", cells=_cells(modes),
            )
        )  # fmt: skip
    inverted = [case for case in study.cases if any(_has(case, kind) for kind in INVERTED)]
    if inverted:
        kinds = ["full", "good", *INVERTED, "random", "bad"]
        found.append(
            Part(
                f"{anchor}-masks", "Mask modes", "Masks used and turned around",
                "Inverted: all that good removed, and nothing else. Revived: one head drawn in each layer that would have none.",
                figures=(tuple(figure for case in inverted if (figure := _rows(case, kinds))),),
                tables=(_bars_table("mask modes", inverted, kinds[1:]),),
                experiment="mask-modes", cells=_cells(inverted),
            )
        )  # fmt: skip
    return tuple(found)


def _first_of_task(cases: Iterable[Case]) -> list[Case]:
    """A dense model belongs to every variant of its task: one of them is enough."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.task, case)
    return list(found.values())


def _rows(case: Case, kinds: Sequence[str]) -> Figure | None:
    """A row a kind and stage, with names: for kinds that no one knows by their colour."""
    split = case.report
    if split is None:
        return None
    groups = [group for stage in ("full", *STAGES) for kind in kinds if (group := split.group(kind, stage))]
    bars = [Bar("full" if group.kind == "full" else f"{group.kind}, {group.stage}", kind_css(group.kind), group.by_seed, _told(group))
            for group in groups]  # fmt: skip
    svg = charts.row_chart(bars, [_majority(split)], label=f"Scores of {case.title}; the table has their numbers")
    return Figure(case.task, svg, _of(split), natural=True, task=case.task) if svg else None


def setting_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Ladders, presets, rows that masks are chosen on: runs of one task and search that differ in a setting."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in study.cases:
        if not case.family and _has(case, "good"):
            groups.setdefault((case.task, case.search), []).append(case)
    groups = {key: cases for key, cases in groups.items() if len(cases) > 1}
    if not groups:
        return ()
    columns = [("full", "full"), *((kind, stage) for stage in STAGES for kind in MAIN)]
    every = [case for cases in groups.values() for case in cases]
    columns = [one for one in columns if any(case.report and case.report.group(*one) for case in every)]
    shared = Counter(
        name for case in every for name in case.differing if name not in ("method", "procedure", "criterion", "mask")
    )
    rows = [
        (
            case.task,
            case.search,
            ", ".join(f"{name}={case.differing[name]}" for name in shared if name in case.differing) or NONE,
            spread(estimate((ticket.seed, ticket.body_share) for ticket in case.good)) if case.good else NONE,
            *(_score(case.report.group(*one)) if case.report else NONE for one in columns),
        )
        for case in every
    ]
    table = Table(
        "The same search under other settings: mean ± std over seeds",
        ("Task", "Search", "Settings", "Share kept", *("Full" if kind == "full" else f"{kind.capitalize()}, {stage}"
                                                        for kind, stage in columns)),
        tuple(rows),
        stubs=3,
        tasks=tuple(case.task for case in every),
    )  # fmt: skip
    return (
        Part(anchor, "Settings compared", "What do settings change?", "Runs of one task and search that differ in a setting: presets, "
             "rungs of a ladder, rows that masks are chosen on.", tables=(table,), experiment="ladder", cells=_cells(every)),
    )  # fmt: skip


# Sparsity


def sparsity_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X8 and the paths of m-pruning: the score by the share of values removed."""
    figures, rows, tasks, used = [], [], [], []
    for task in study.tasks:
        of_task = [case for case in study.cases if case.task == task]
        steps = [case for case in of_task if case.settings.get("method") == "one-shot" and case.report and not case.family]
        paths = [case for case in of_task if case.good and any(t.values and t.path for t in case.good) and not case.family]
        curves: dict[tuple[str, str], list[Point]] = {}
        for case in sorted(steps, key=lambda one: float(one.settings.get("sparsity", 0))):
            sparsity, criterion = float(case.settings["sparsity"]), str(case.settings.get("criterion", ""))
            for stage in STAGES:
                if case.report and (group := case.report.group("good", stage)):
                    said = f"{criterion}, {100 * sparsity:g} % removed, {stage}: {spread(group.score)}"
                    curves.setdefault((criterion, stage), []).append(Point(sparsity, group.by_seed, said))
                    rows.append((task, f"one-shot {criterion}, {stage}", f"{sparsity:.3f}", of_seeds(group.by_seed),
                                 of_seeds(group.by_seed, "i"), f"{case.report.name}, n = {rows_of(case.report)}"))  # fmt: skip
                    tasks.append(task)
        for case in paths:
            points = list(_path_points(case.good))
            curves.setdefault((f"{case.label or case.search} path", "pruned"), []).extend(points)
        if not curves:
            continue
        used += [*steps, *paths]
        split = next((case.report for case in (*steps, *paths) if case.report), None)
        lines = [_majority(split)] if split else []
        if split and split.dense and (score := split.dense.score.value) is not None:
            lines.append(Line("line-full", f"dense {number(score)}", score))
        drawn = [Curve(_curve_css(name), points, dashed=stage == "retrained") for (name, stage), points in curves.items()]
        svg = charts.curve_chart(drawn, lines, label=f"Scores by sparsity, {task}", x_label="values removed, %", percent=True)
        if svg:
            figures.append(Figure(task, svg, _of(split) if split else "selection rows", natural=True, task=task))
    if not figures:
        return ()
    head = ("Task", "How", "Sparsity", "Score", "95 % interval", "Rows")
    table = Table("Values removed in one step: mean ± std over seeds", head, tuple(rows), stubs=2, tasks=tuple(tasks))
    return (
        Part(
            anchor, "Sparsity", "How much can be removed?",
            "Line: mean over seeds; band: one std to each side. Dashed lines: retrained. The path of m-pruning is scored on selection "
            "rows, all else on report rows.",
            legend=(("good", "magnitude"), ("random", "random"), ("strict-bad", "path of m-prune")),
            figures=(tuple(figures),), tables=(table,) if rows else (), experiment="one-shot", cells=_cells(used),
        ),
    )  # fmt: skip


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


# Lesions

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
            task: [(what.partition(" ")[2], _by_seed(found)) for (of, what, where), found in rows.items()
                   if of == task and not where and what.split(" ")[0] == act]
            for task in dict.fromkeys(task for task, _, _ in rows)
        }
        for act in acts
    }  # fmt: skip
    for act in acts:
        figures = []
        for task, found in whole[act].items():
            if not found:
                continue
            split, dense = full.get(task, (None, None))
            lines = [_majority(split)] if split else []
            if dense and (score := dense.score.value) is not None:
                lines.append(Line("line-full", f"dense {number(score)}", score))
            bars = [
                Bar(what, "weights", by_seed, f"{act} {what}: {spread(estimate(by_seed.items()))}") for what, by_seed in found
            ]
            svg = charts.row_chart(bars, lines, label=f"{ACT_WORDS[act]}, {task}; the table has the numbers")
            figures.append(Figure(task, svg, _of(split) if split else "", natural=True, task=task))
        deep = [figure for task in whole[act] if (figure := _depth(task, act, rows, full.get(task, (None, None))[1])) is not None]
        table = _lesion_table(act, rows, full)
        cells = tuple(
            sorted({row.cell for (_, what, _), found in rows.items() if what.split(" ")[0] == act for row in found.values()})
        )
        parts.append(
            Part(
                f"{anchor}-{act}", ACT_WORDS[act], ACT_WORDS[act],
                "Nothing is trained after it. Solid line: the dense model; dashed: the majority line."
                + (" Maps: loss of score when one layer alone is hit, the darker the more." if deep else ""),
                figures=tuple(row for row in (tuple(figures), tuple(deep)) if row),
                fold="The numbers", folded=(table,), experiment=_EXPERIMENTS.get(act, ""), cells=cells,
            )
        )  # fmt: skip
    return tuple(parts)


_EXPERIMENTS = {"redraw": "redrawn", "zero": "zeroed", "revert": "reverted", "revert-rotated": "reverted",
                "drop-residual": "no-residual", "double-branch": "no-residual", "redraw-removed-heads": "redrawn-heads"}  # fmt: skip


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


# Small words


def _legend(kinds: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((kind_css(kind), kind_name(kind)) for kind in kinds)


def _paper(what: str, cases: Sequence[Case]) -> str:
    return f"{what} of the paper. " if len({case.task for case in cases}) > 1 else ""


def _cells(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(sorted({key for case in cases for key in case.cells}))


PartsOf = Callable[[str, Study], tuple[Part, ...]]
