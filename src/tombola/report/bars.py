"""Bars, rows and tables of scores that several parts of the page share: what every one of them says of a case in the same way."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.cases import Case, Group, Split, estimate
from tombola.report.charts import Bar
from tombola.report.figures import Line
from tombola.report.layout import Figure, Table
from tombola.report.words import (
    NONE,
    count,
    group_name,
    kind_css,
    kind_name,
    number,
    of_seeds,
    rows_of,
    spread,
)

STAGES = ("pruned", "retrained")  # of tickets; a dense model has its own
MAIN = ("good", "random", "bad")


def has(case: Case, kind: str, stage: str | None = None) -> bool:
    stages = STAGES if stage is None else (stage,)
    return bool(case.report) and any(case.report.group(kind, one) for one in stages if case.report)


def bars_of(case: Case, kinds: Sequence[str], stages: Sequence[str] = ("full", *STAGES)) -> Figure | None:
    split = case.report
    if split is None:
        return None
    bars = []
    for stage in stages:
        groups = [group for kind in kinds if (group := split.group(kind, stage))]
        bars += [Bar("" if stage == "full" else stage, kind_css(one.kind), one.by_seed, told(one)) for one in groups]
    svg = charts.bar_chart(bars, [majority_line(split)], label=f"Bars of {case.title}; the table has their numbers")
    return Figure(case.task, svg, said_of_split(split), natural=True, task=case.task) if svg else None


def told(group: Group) -> str:
    return f"{group_name(group)}: {spread(group.score)}\n" + ", ".join(
        f"seed {seed}: {number(value)}" for seed, value in group.by_seed.items()
    )


def said_of_split(split: Split) -> str:
    return f"{split.metric.replace('_', '-')}, n = {rows_of(split)}, {count(len({row.seed for row in split.rows}), 'seed')}"


def majority_line(split: Split) -> Line:
    return Line("majority", f"majority line {number(split.majority)}", split.majority)


def lines_of(split: Split | None, dense: Group | None = None) -> list[Line]:
    """What scores are held against: the majority line and the dense model, that of the split if no other is given."""
    lines = [majority_line(split)] if split else []
    dense = dense or (split.dense if split else None)
    if dense and (score := dense.score.value) is not None:
        lines.append(Line("line-full", f"dense {number(score)}", score))
    return lines


def bars_table(search: str, cases: Sequence[Case], kinds: Sequence[str]) -> Table:
    columns = [("full", "full"), *((kind, stage) for stage in STAGES for kind in kinds)]
    columns = [one for one in columns if any(case.report and case.report.group(*one) for case in cases)]
    rows, tasks = [], []
    for case in cases:
        if split := case.report:
            cells = [score_of(split.group(*one)) for one in columns]
            rows.append((case.task, *cells, number(split.majority), f"{split.metric}, n = {rows_of(split)}"))
            tasks.append(case.task)
    if len(rows) > 1:
        means = [mean_of_tasks([split.group(*one) for case in cases if (split := case.report)]) for one in columns]
        majority = number(fmean(split.majority for case in cases if (split := case.report)))
        rows.append((f"mean of {len(rows)} tasks", *means, majority, "each task its metric"))
        tasks.append("*")
    return Table(
        f"Good, random and bad tickets{f', {search}' if search else ''}: mean ± std over seeds",
        (
            "Task",
            *("Full" if kind == "full" else f"{kind_name(kind).capitalize()}, {stage}" for kind, stage in columns),
            "Majority",
            "Metric",
        ),
        tuple(rows),
        "Mean of tasks: within each seed first, over the tasks that have it; metrics differ, as in the paper.",
        tasks=tuple(tasks),
    )


def score_of(group: Group | None) -> str:
    return of_seeds(group.by_seed) if group else NONE


def mean_of_tasks(groups: Sequence[Group | None]) -> str:
    """Over tasks within each seed that all of them have; a dash where one task has no such scores."""
    found = [group.by_seed for group in groups if group]
    seeds = set.intersection(*(set(one) for one in found)) if found else set()
    if len(found) < len(groups) or not seeds:
        return NONE
    return of_seeds({seed: fmean(one[seed] for one in found) for seed in sorted(seeds)})


def rows_of_kinds(case: Case, kinds: Sequence[str]) -> Figure | None:
    """A row a kind and stage, with names: for kinds that no one knows by their colour."""
    split = case.report
    if split is None:
        return None
    groups = [group for stage in ("full", *STAGES) for kind in kinds if (group := split.group(kind, stage))]
    bars = [
        Bar("full" if group.kind == "full" else f"{group.kind}, {group.stage}", kind_css(group.kind), group.by_seed, told(group))
        for group in groups
    ]
    svg = charts.row_chart(bars, [majority_line(split)], label=f"Scores of {case.title}; the table has their numbers")
    return Figure(case.task, svg, said_of_split(split), natural=True, task=case.task) if svg else None


def difference_of(a: Case | None, b: Case | None, stage: str, kind: str = "good") -> str:
    one, other = (case.report.group(kind, stage) if case and case.report else None for case in (a, b))
    if not one or not other or not (found := one.less(other)):
        return NONE
    return of_seeds(found, sign=True)


def kept_of(case: Case, unit: str) -> str:
    if unit not in case.units or not case.good:
        return NONE
    of = case.units[unit]
    kept = estimate((ticket.seed, float(sum(of(ticket)))) for ticket in case.good)
    return f"{spread(kept, 1)} of {len(of(case.good[0]))}"


def legend_of(kinds: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((kind_css(kind), kind_name(kind)) for kind in kinds)


def cells_of(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(sorted({key for case in cases for key in case.cells}))


def good_cells_of(cases: Iterable[Case]) -> tuple[str, ...]:
    """Of the searches alone."""
    return tuple(sorted({ticket.cell for case in cases for ticket in case.good}))
