"""What the page shows of scores: for each split a chart, its numbers and the agreement with the dense model; and the tables
that set several tasks side by side, on the page and in a paper. Of this room it imports `words`, `cases`, `bars`,
`figures` and `layout`.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from tombola.report import figures
from tombola.report.bars import lines_of
from tombola.report.cases import Case, Group, Split, estimate
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import (
    NONE,
    draws,
    group_name,
    kind_css,
    kind_name,
    number,
    of_seeds,
    rows_of,
    sample,
    span,
    split_title,
    spread,
)
from tombola.stats import Estimate, correct
from tombola.study.results import Agreement

LEADS = {  # role of a split → what its rows are
    "report": "These rows had no part in choosing the mask.",
    "challenge": "Rows of another distribution than the training data; they have no part in the verdict.",
    "selection": "The mask was chosen on these rows: good looks better here than it is.",
}
SCORE_HEAD = ("Stage", "Ticket", "Score", "95 % interval", "Majority", "Seeds", "Draws per seed", "Rows")
MAX_CLASSES = 6  # columns of the agreement table


def score_part(anchor: str, case: Case, split: Split) -> Part:
    """The scores of one split. Its agreement table stands open on report rows only, its chart is left out for selection rows."""
    title, dense, is_report = split_title(split), split.dense, split.role == "report"
    reused = is_report and split.name in case.reused
    scores = Table(
        f"{title}: mean ± std over seeds",
        (*SCORE_HEAD, "Minus dense"),
        tuple(
            (*_score_cells(group), of_seeds(group.less(dense), sign=True) if dense and group is not dense else NONE)
            for group in split.groups
        ),
        "Draws of a control are averaged within their seed first. Minus dense: within each seed.",
        stubs=2,
    )
    chart = _score_chart(split) if split.role != "selection" else None
    agreement = (table,) if (table := _agreement_table(split)) else ()
    return Part(
        anchor,
        "Scores" if is_report else split.role.capitalize(),
        f"Scores on {split.role} rows: {split.name}",
        LEADS["selection"] if reused else LEADS.get(split.role, ""),
        figures=((chart,),) if chart else (),
        tables=(scores, *agreement) if is_report else (scores,),
        fold="Agreement with the dense model",
        folded=() if is_report else agreement,
    )


def glance_table(cases: Sequence[Case]) -> Table:
    """Every comparison of several cases, a row each."""
    # One family a stage: that is what the first sentence of the page counts.
    by_stage: dict[str, dict[str, float | None]] = {}
    for case in cases:
        for it in case.comparisons:
            by_stage.setdefault(it.stage, {})[case.title] = it.paired.p if it.paired.can_reach else None
    corrected = {stage: correct(p, family=f"good against random, {stage}") for stage, p in by_stage.items()}
    ahead = {"good": "good", "random": "random", "neither": "too close", None: "unknown"}
    return Table(
        "Good against random on report rows: mean ± std over seeds",
        ("Task", "Stage", "Good", "Random", "Difference", "Can be shown", "Ahead", "p (Holm)", "Metric, split", "Rows", "Sample"),
        tuple(
            (
                case.title,
                it.stage,
                spread(it.good.score),
                spread(it.random.score),
                spread(it.difference, sign=True),
                number(it.detectable),
                ahead[it.ahead],
                number(corrected[it.stage].p[case.title]),
                f"{it.split.metric}, {it.split.name}",
                rows_of(it.split),
                sample(it.random.rows),
            )
            for case in cases
            for it in case.comparisons
        ),
        "Difference: good minus random within each seed. Can be shown: see “How to read the numbers”. "
        "p: exact sign-flip test over seeds, corrected by Holm over the tasks of a stage; none with fewer than six seeds.",
        stubs=2,
    )


def flat_table(cases: Sequence[Case], role: str) -> Table:
    """The scores of all cases on the splits of one role, for a paper; no rows if there are none."""
    return Table(
        f"Scores on {role} rows",
        ("Task", "Split", "Metric", *SCORE_HEAD),
        tuple(
            (case.title, f"{split.name} ({role})", split.metric, *_score_cells(group))
            for case in cases
            for split in case.splits
            if split.role == role
            for group in split.groups
        ),
        stubs=5,
    )


def _score_cells(group: Group) -> tuple[str, ...]:
    by_seed = group.by_seed
    return (
        group.stage,
        kind_name(group.kind),
        of_seeds(by_seed),
        of_seeds(by_seed, "i"),
        number(fmean(row.majority for row in group.rows)),
        of_seeds(by_seed, "n"),
        draws(group.rows),
        span(row.n for row in group.rows),
    )


def _score_chart(split: Split) -> Figure | None:
    title = split_title(split)
    svg = figures.dot_chart(
        [_dot_row(group) for group in split.groups], lines_of(split), label=f"Dot chart of {title}; the table has its numbers"
    )
    caption = f"{title}. Large dots: seeds. Small dots: draws of a control. Bar: mean over seeds; line: one std to each side."
    return Figure("", svg, caption) if svg else None


def _dot_row(group: Group) -> figures.DotRow:
    dots = []
    for seed, mean in group.by_seed.items():
        rows = group.within([seed]).rows
        each = f"\nmean of {len(rows)} draws: {', '.join(number(row.value) for row in rows)}" if len(rows) > 1 else ""
        title = f"{group_name(group)}\nseed {seed}: {number(mean)}{each}\n{rows[0].split}, {span(row.n for row in rows)} rows"
        dots.append(figures.Dot(mean, tuple(row.value for row in rows), title, seed))
    heading = {"pruned": "Pruned, not trained again", "retrained": "Retrained from the base"}.get(group.stage, "")
    css = kind_css(group.kind)
    score = group.score
    text, behind = of_seeds(group.by_seed), f" · {sample(group.rows)}"
    return figures.DotRow(heading, kind_name(group.kind), css, text, score.value, score.std, tuple(dots), behind)


def _agreement_table(split: Split) -> Table | None:
    known = [
        (group, [(row.seed, row.agreement) for row in group.rows if row.agreement and row.agreement.n]) for group in split.groups
    ]
    groups = [(group, pairs) for group, pairs in known if pairs]
    if not groups:
        return None
    if split.of_values:
        return _difference_table(split, groups)

    def over(pairs: list[tuple[int, Agreement]], of: Callable[[Agreement], int | None]) -> Estimate:
        return estimate((seed, (of(it) or 0) / it.n) for seed, it in pairs)

    def change(pairs: list[tuple[int, Agreement]], name: str) -> Estimate:
        return over(pairs, lambda it: it.counts.get(name, 0) - it.dense_counts.get(name, 0))

    names = list(dict.fromkeys(name for _, pairs in groups for _, it in pairs for name in (*it.dense_counts, *it.counts)))
    largest = sorted(names, key=lambda name: -max(abs(change(pairs, name).value or 0) for _, pairs in groups))[:MAX_CLASSES]
    shown = [name for name in names if name in largest]
    cut = f" The {len(shown)} of {len(names)} classes that change most." if len(shown) < len(names) else ""
    classes = (f"Δ {name}" for name in shown)
    return Table(
        f"{split_title(split)}: how the predictions differ from those of the dense model of the same seed",
        ("Stage", "Ticket", "Rows that flip", "Lost", "Gained", *classes, "Seeds", "Draws per seed", "Rows"),
        tuple(
            (
                group.stage,
                kind_name(group.kind),
                spread(over(pairs, lambda it: it.flips)),
                spread(over(pairs, lambda it: it.lost)),
                spread(over(pairs, lambda it: it.gained)),
                *(spread(change(pairs, name), sign=True) for name in shown),
                str(len({seed for seed, _ in pairs})),
                draws(group.rows),
                span(it.n for _, it in pairs),
            )
            for group, pairs in groups
        ),
        "As shares of all rows, mean ± std over seeds. Lost: right in the dense model, wrong here; gained: the other way round. "
        f"Δ: share of rows given this class, minus that of the dense model.{cut}",
        stubs=2,
    )


def _difference_table(split: Split, groups: list[tuple[Group, list[tuple[int, Agreement]]]]) -> Table:
    """Agreement of values: how far they are from those of the dense model."""
    return Table(
        f"{split_title(split)}: how far the predictions are from those of the dense model of the same seed",
        ("Stage", "Ticket", "Mean |difference|", "Seeds", "Draws per seed", "Rows"),
        tuple(
            (
                group.stage,
                kind_name(group.kind),
                spread(estimate((seed, it.mean_difference or 0.0) for seed, it in pairs)),
                str(len({seed for seed, _ in pairs})),
                draws(group.rows),
                span(it.n for _, it in pairs),
            )
            for group, pairs in groups
        ),
        "In units of the label, or of running text in nats per token; mean ± std over seeds.",
        stubs=2,
    )
