"""What the page shows of scores over all tasks of a study: the paper's bars, its Table 2, and longer training.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
"""

from collections.abc import Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.bars import (
    MAIN,
    bars_of,
    bars_table,
    cells_of,
    has,
    legend_of,
    lines_of,
    mean_of_tasks,
    said_of_split,
    score_of,
)
from tombola.report.cases import Case, Group, Split, Study
from tombola.report.charts import Curve, Point
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, kind_css, kind_name, number, spread
from tombola.study.heads import answers_rows
from tombola.study.kinds import CONTROL_KINDS
from tombola.study.results import KINDS

LESIONED = tuple(kind for kind, one in CONTROL_KINDS.items() if one.lesion is not None)


def bar_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Fig. 2: for each search and task the dense model, and good, random and bad as pruned and as retrained."""
    if len(study.cases) < 2:
        return ()  # its own section says it
    parts = []
    for i, (search, cases) in enumerate(study.by_search(_has_controls).items(), start=1):
        kinds = [kind for kind in KINDS if kind in MAIN or (kind == "strict-bad" and any(has(case, kind) for case in cases))]
        parts.append(
            Part(
                f"{anchor}-{i}",
                search or "Scores",
                f"Good, random and bad tickets{f': {search}' if search else ''}",
                f"{_paper('Fig. 2', cases)}Bars: mean over seeds; whiskers: one std to each side; dots: seeds. "
                "Dashed: the majority line. Pruned: the mask on the fine-tuned weights. Retrained: on the base, trained again.",
                legend=legend_of(["full", *kinds]),
                figures=(tuple(figure for case in cases if (figure := bars_of(case, ["full", *kinds]))),),
                tables=(bars_table(search, cases, kinds),),
                experiment="controls",
                cells=cells_of(cases),
            )
        )
    return tuple(parts)


def _has_controls(case: Case) -> bool:
    return case.family == "" and has(case, "good") and any(has(case, kind) for kind in ("random", "bad"))


def _paper(what: str, cases: Sequence[Case]) -> str:
    return f"{what} of the paper. " if len({case.task for case in cases}) > 1 else ""


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
        if split is None or case.family or case.unusual:
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
        (task, number(majority[task]), *(score_of(by_task[task].get(key)) for key in ordered)) for task in by_task
    ]
    tasks = list(by_task)
    if len(rows) > 1:
        means = (mean_of_tasks([by_task[task].get(key) for task in tasks]) for key in ordered)
        rows.append((f"mean of {len(rows)} tasks", number(fmean(majority.values())), *means))
    table = Table(
        "Bad tickets beside baselines: mean ± std over seeds",
        ("Task", "Majority", *(_column(*key) for key in ordered)),
        tuple(rows),
        "Bad: what good removed, of the same size, trained again from the base. Drawn again: weights that no training "
        "has touched.",
        tasks=(*tasks, *["*"] * (len(rows) - len(tasks))),
    )
    return (
        Part(
            anchor,
            "Bad beside baselines",
            "How far do bad tickets come?",
            "Table 2 of the paper: bad tickets, trained again, beside what models reach that owe nothing to "
            "pre-training or to a mask.",
            tables=(table,),
            experiment="controls",
            cells=cells_of(used),
        ),
    )


def answer_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X13: which answer a model gives most, beside the dense model: one that always gives the same knows nothing."""
    rows, tasks = [], []
    cases = {case.name: case for case in study.cases}
    for row in answers_rows(study.results):
        case = cases.get(row.task)
        if case is None or case.family or case.unusual:
            continue
        most = max(row.shares, key=lambda name: row.shares[name].value or 0.0)
        both = row.shares.keys() & row.dense.keys()
        shifts = {name: (row.shares[name].value or 0.0) - (row.dense[name].value or 0.0) for name in row.shares if name in both}
        moved = max(shifts, key=lambda name: abs(shifts[name]), default="")
        rows.append(
            (
                case.task,
                case.label or case.search or NONE,
                row.stage,
                kind_name(row.kind),
                most,
                spread(row.shares[most]),
                spread(row.dense[most]) if most in row.dense else NONE,
                f"{moved} {number(shifts[moved], sign=True)}" if moved else NONE,
                str(row.shares[most].n_seeds),
            )
        )
        tasks.append(case.task)
    if len(set(tasks)) < 2:
        return ()  # of one task its own section says it
    table = Table(
        "Answers on report rows: share of rows, mean ± std over seeds",
        (
            "Task",
            "Search",
            "Stage",
            "Ticket",
            "Most frequent answer",
            "Its share",
            "in the dense model",
            "Largest shift",
            "Seeds",
        ),
        tuple(rows),
        "A ticket whose most frequent answer has all rows has learned nothing, whatever it scores.",
        stubs=4,
        tasks=tuple(tasks),
    )
    return (
        Part(
            anchor,
            "Answers",
            "What do tickets answer?",
            fold="Every task, search and ticket",
            folded=(table,),
            experiment="controls",
            all_seeds=True,
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
                other = "".join(f", {name}={value}" for name, value in case.unusual.items() if name != "epochs")
                key = (case.task, case.search + other, group.kind)
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
            Curve(
                kind_css(kind),
                [
                    Point(float(epochs), group.by_seed, f"{search} {kind}, {epochs} epochs: {spread(group.score)}")
                    for epochs, group in points.items()
                ],
            )
            for (_, search, kind), points in mine.items()
        ]
        lines = lines_of(splits[task], full.get(task))
        svg = charts.curve_chart(drawn, lines, label=f"Scores by epochs, {task}", x_label="epochs")
        figures.append(Figure(task, svg, said_of_split(splits[task]), natural=True, task=task))
    every = sorted({epochs for points in curves.values() for epochs in points})
    table = Table(
        "Scores by epochs of training again: mean ± std over seeds",
        ("Task", "Ticket", *(f"{epochs} epochs" for epochs in every)),
        tuple(
            (task, f"{search} {kind}".strip(), *(score_of(points.get(epochs)) for epochs in every))
            for (task, search, kind), points in curves.items()
        ),
        "Each number of epochs has a learning-rate schedule of its own.",
        stubs=2,
        tasks=tuple(task for task, _, _ in curves),
    )
    return (
        Part(
            anchor,
            "Longer training",
            "Do bad tickets catch up with longer training?",
            "Appendix D of the paper. Line: mean over seeds; band: one std to each side; solid grey: the dense model; "
            "dashed: majority.",
            legend=legend_of(["bad"]),
            figures=(tuple(figures),),
            tables=(table,),
            experiment="longer",
            cells=cells_of(used),
        ),
    )
