"""The page's overview: one line a task, and which claims hold; and what two studies conclude otherwise."""

from collections.abc import Mapping, Sequence

from tombola.report.cases import Case, Study, estimate
from tombola.report.conclusions import CONCLUSIONS, Change, Finding, findings, tally
from tombola.report.layout import Part, Section, Table
from tombola.report.words import NONE, count, interval, listed, number, of_seeds, rows_of, spread

AHEAD = {"good": "good ahead", "random": "random ahead", "neither": "too close to tell", None: "unknown"}
SHOWN = ("full", "good", "random", "bad")


def overview_table(study: Study) -> Table | None:
    """One line a task and search: dense, good, random and bad with their intervals, what is kept, and the verdict."""
    found = []
    for case in study.cases:
        comparison = next(iter(case.comparisons), None)
        if comparison is None or case.family:
            continue
        split, stage = comparison.split, comparison.stage
        groups = {kind: split.group(kind, "full" if kind == "full" else stage) for kind in SHOWN}
        kept = spread(estimate((ticket.seed, ticket.body_share) for ticket in case.good)) if case.good else NONE
        beaten = comparison.good.score.value is not None and comparison.good.score.value > split.majority
        said = AHEAD[comparison.ahead] + ("" if beaten else "; good below majority")
        scores = {
            kind: (of_seeds(it.by_seed, "m"), of_seeds(it.by_seed, "i")) if it else (NONE, NONE) for kind, it in groups.items()
        }
        search = ", ".join(filter(None, (case.label or case.search, stage)))
        metric = f"{split.metric}, n = {rows_of(split)}"
        rows = NONE if comparison.over_rows is None else interval(comparison.over_rows)
        less = (of_seeds(comparison.good.less(comparison.random), "m", sign=True), interval(comparison.difference), rows)
        found.append((case.task, search, said, *less, kept, scores, number(split.majority), metric))
    if not found:
        return None
    kinds = [kind for kind in SHOWN if any(line[7][kind][0] != NONE for line in found)]
    return Table(
        "What was found: mean and 95 % interval over seeds, on report rows",
        (
            "Task",
            "Search",
            "Good or random?",
            "Good − random",
            "95 % over seeds",
            "over rows",
            "Kept",
            *(text for kind in kinds for text in (kind.capitalize(), "95 %")),
            "Majority",
            "Metric",
        ),
        tuple((*line[:7], *(text for kind in kinds for text in line[7][kind]), *line[8:]) for line in found),
        "Ahead: both intervals leave out zero, since other seeds and other rows would have to show it too; over rows it is "
        "known of accuracy alone. Kept: share of the values of heads and MLPs, or of single values, that good keeps.",
        stubs=2,
        tasks=tuple(line[0] for line in found),
    )


MANY_SEARCHES = 8  # are counted


def claims_table(study: Study) -> Table | None:
    """Which conclusions hold, for how many tasks."""
    found = findings(study)
    if not found or not any(len(of) > 1 for of in found.values()):
        return None
    rows = []
    for name, of in found.items():
        searches = list(dict.fromkeys(search for _, search in of))
        if len(searches) > MANY_SEARCHES:
            counts = tally(list(of.values()))
            rows.append((CONCLUSIONS[name].about, f"{len(searches)} searches", *(str(n) if n else NONE for n in counts.values())))
            continue
        for search in searches:
            mine = {task: finding for (task, one), finding in of.items() if one == search}
            counts = tally(list(mine.values()))
            rows.append((CONCLUSIONS[name].about, search or NONE, *(_tasks(mine, outcome) for outcome in counts)))
    return Table(
        "Which claims hold",
        ("Claim", "Search", "Holds", "Fails", "Undecided"),
        tuple(rows),
        "Holds: both 95 % intervals, over seeds and (of accuracy) over rows, lie on the claim’s side; fails: on the other; "
        "undecided: neither, or too few seeds. “Good or random?” is decided in the same way. "
        "Of seeds that agree: p of the agreement, given sizes. Of many searches: numbers of tasks and searches.",
        stubs=2,
    )


def _tasks(found: Mapping[str, Finding], outcome: str) -> str:
    mine = [task for task, finding in found.items() if finding.outcome == outcome]
    if not mine:
        return NONE
    return f"all {len(mine)}" if len(mine) == len(found) > 1 else f"{len(mine)}: {', '.join(mine)}"


def compare_sentence(changes: Sequence[Change], names: tuple[str, str]) -> str:
    """What the whole comparison comes to."""
    changed, turned = [one for one in changes if one.changed], [one for one in changes if one.turned]
    if not changes:
        return f"{names[0]} and {names[1]} have no task, search and conclusion in common."
    said = f"{len(changed)} of {count(len(changes), 'conclusion')} differ between {names[0]} and {names[1]}"
    if not changed:
        return f"{said}."
    if not turned:
        return f"{said}; none turns from holds to fails or back: in each, one of the two is undecided."
    return f"{said}; {count(len(turned), 'conclusion')} turn: {listed([f'{one.conclusion} on {one.task}' for one in turned])}."


def compare_table(changes: Sequence[Change], names: tuple[str, str]) -> Table:
    """A row a conclusion, task and search; those that changed first within each conclusion."""
    ordered = [
        one for name in CONCLUSIONS for one in sorted((c for c in changes if c.conclusion == name), key=lambda c: not c.changed)
    ]
    return Table(
        f"Conclusions of {names[0]} and {names[1]}",
        ("Conclusion", "Task", "Search", names[0], "95 %", "", names[1], "95 %", "", "Difference", "95 %", "Changed"),
        tuple(
            (
                one.conclusion,
                one.task,
                one.search or NONE,
                *(
                    text
                    for side in (one.a, one.b)
                    for text in (number(side.estimate.value), interval(side.estimate), side.outcome)
                ),
                number(one.difference.value, sign=True),
                interval(one.difference),
                "turned" if one.turned else "changed" if one.changed else "same",
            )
            for one in ordered
        ),
        "Each number is the difference that its conclusion is about, mean over seeds. Difference: the second study "
        "minus the first, "
        "within the seeds that both have.",
        stubs=3,
        tasks=tuple(one.task for one in ordered),
    )


def compare_section(changes: Sequence[Change], names: tuple[str, str]) -> Section:
    """The page's section about two studies."""
    part = Part(
        "compare-conclusions", "Conclusions", "Conclusion by conclusion", tables=(compare_table(changes, names),), all_seeds=True
    )
    return Section("compare", f"{names[0]} and {names[1]}", compare_sentence(changes, names), (part,))


def said_of(case: Case) -> str:
    """A folded section's one line."""
    comparison = next(iter(case.comparisons), None)
    if comparison is None:
        return listed(sorted({group.kind for split in case.splits for group in split.groups})) or "tickets without scores"
    it = comparison
    return (
        f"{it.stage.capitalize()}: good {number(it.good.score.value)}, random {number(it.random.score.value)} "
        f"({it.split.metric.replace('_', '-')}); {AHEAD[it.ahead]}."
    )
