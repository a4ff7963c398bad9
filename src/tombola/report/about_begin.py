"""What the page shows of when to start: probes over the points of fine-tuning, and what a rule on each would have cost.

The sums are those of `tombola.study.begin`.
"""

from collections.abc import Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.cases import Study
from tombola.report.charts import Curve as Drawn
from tombola.report.charts import Point
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, number
from tombola.study.begin import FIXED, PROBES, Cost, Curve, Held, leave_one_out, rank_correlation


def begin_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Each probe over fine-tuning, a figure a task; with two tasks or more the rules, each fitted on all tasks but one."""
    curves = study.results.begin
    if not curves:
        return ()
    tables = _rules(curves)
    lead = "What can be seen at a point of fine-tuning before a mask is trained there. " + (
        ""
        if tables
        else "A rule is fitted on some tasks and tried on another: with a single task there are probes, and no rule is scored."
    )
    return (
        Part(
            f"{anchor}-begin",
            "When to begin",
            "Can it be told when mask training may begin?",
            lead,
            figures=tuple(_figures(curves, task) for task in dict.fromkeys(curve.task for curve in curves)),
            tables=(*tables, _points(curves)),
            experiment="start-point",
        ),
    )


def _figures(curves: Sequence[Curve], task: str) -> tuple[Figure, ...]:
    mine, drawn = [curve for curve in curves if curve.task == task], list[Figure]()
    for probe in PROBES:
        by_share: dict[float, dict[int, float]] = {}
        for curve in mine:
            for share, value in zip(curve.shares, curve.probes.get(probe, ()), strict=False):
                if value is not None:
                    by_share.setdefault(share, {})[curve.seed] = value
        points = [
            Point(share, of, f"{share:g}: {number(fmean(of.values()))}, {len(of)} seeds")
            for share, of in sorted(by_share.items())
        ]
        if points:
            said = f"{task}: {_name(probe)}"
            svg = charts.curve_chart([Drawn("full", points)], [], label=said, x_label="% of fine-tuning", percent=True)
            drawn.append(Figure(said, svg, "", natural=True, task=task))
    return tuple(drawn)


def _points(curves: Sequence[Curve]) -> Table:
    """All values, means over seeds."""
    probes = [probe for probe in PROBES if any(probe in curve.probes for curve in curves)]
    rows = []
    for task, share in sorted({(curve.task, share) for curve in curves for share in curve.shares}):
        mine = [(curve, curve.shares.index(share)) for curve in curves if curve.task == task and share in curve.shares]
        values = [[curve.probes[p][at] for curve, at in mine if p in curve.probes] for p in probes]
        known = [[value for value in some if value is not None] for some in values]
        rows.append(
            (
                task,
                f"{share:.0%}",
                *(number(fmean(some)) if some else NONE for some in known),
                number(fmean(curve.scores[at] for curve, at in mine)),
                f"{fmean(curve.steps[at] for curve, at in mine):,.0f}",
                str(len(mine)),
            )
        )
    about = "; ".join(f"{_name(probe)}: {PROBES[probe]}" for probe in probes)
    return Table(
        "Probes of each point of fine-tuning: means over seeds",
        ("Task", "Begun at", *map(_name, probes), "Challenge", "Steps", "Seeds"),
        tuple(rows),
        f"{about}. Challenge: of the mask that began there; steps: of fine-tuning and mask.",
        stubs=2,
        tasks=tuple(row[0] for row in rows),
    )


def _rules(curves: Sequence[Curve]) -> tuple[Table, ...]:
    """A line for each probe that two tasks have, and for beginnings that need no rule; nothing where no probe has two."""
    found = {}
    for probe in PROBES:
        mine = [curve for curve in curves if probe in curve.probes]
        if len({curve.task for curve in mine}) > 1:
            found[probe] = leave_one_out(mine, probe)
    rows = [(f"rule on {_name(probe)}", *_cost([one.cost for one in held]), *_best(held)) for probe, held in found.items()]
    if not found:
        return ()
    some = next(iter(found.values()))
    rows += [(f"always at {share:.0%}", *_cost([one.fixed[share] for one in some]), NONE) for share in FIXED]
    rows.append(("a point that is drawn", *_cost([one.random for one in some]), NONE))
    tasks = len({one.task for one in some})
    table = Table(
        "When to begin: each task by a rule that was fitted on all others",
        ("Begins", "Regret", "Largest regret", "Steps saved", "Rank correlation"),
        tuple(rows),
        f"{tasks} tasks, {len(some)} curves of a task and seed; means over curves. Regret: challenge score of a mask begun at "
        "the end minus that of this one. Steps saved: share of all steps of fine-tuning and mask, without what probes cost. "
        "Rank correlation: of the share predicted with the earliest that loses no more than 0.005.",
    )
    return (table,)


def _cost(costs: Sequence[Cost]) -> tuple[str, str, str]:
    regrets = [one.regret for one in costs]
    return number(fmean(regrets)), number(max(regrets)), f"{fmean(one.saved for one in costs):.0%}"


def _best(held: Sequence[Held]) -> tuple[str]:
    found = rank_correlation(held)
    return (NONE if found is None else number(found, 2),)


def _name(probe: str) -> str:
    return probe.replace("_", " ")
