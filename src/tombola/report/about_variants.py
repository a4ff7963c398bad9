"""What the page shows of tickets made from others, of models and masks used otherwise, and of settings that differ.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from tombola.report.bars import (
    MAIN,
    STAGES,
    bars_of,
    bars_table,
    cells_of,
    difference_of,
    has,
    kept_of,
    legend_of,
    rows_of_kinds,
    score_of,
)
from tombola.report.cases import Case, Study, estimate
from tombola.report.layout import Part, Table
from tombola.report.words import NONE, interval, number, spread
from tombola.study.kinds import TRAIN_MODES
from tombola.study.results import TicketRow
from tombola.study.survival import joint_rows

INVERTED = ("inverted", "inverted-revived")


MODES = tuple(mode.kind for mode in TRAIN_MODES.values())


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
                *(kept_of(case, unit) for unit in ("heads", "MLPs")),
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
            anchor,
            "Super-survivors",
            "What survives in every seed",
            "Appendix E of the paper: the heads and MLPs that the tickets of all seeds keep, with random and bad ones "
            "of that size.",
            legend=legend_of(kinds),
            figures=(tuple(figure for case in cases if (figure := bars_of(case, kinds))),),
            tables=(bars_table("super-survivors", cases, MAIN), sizes),
            experiment="super-survivors",
            cells=cells_of(cases),
        ),
    )


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
        cells = [kept_of(case, "heads") if case else NONE for case in (joint, alone[0], both)]
        cells += [kept_of(case, "MLPs") if case else NONE for case in (joint, alone[1], both)]
        for stage in STAGES:
            for case in (joint, both):
                cells.append(score_of(case.report.group("good", stage)) if case and case.report else NONE)
            cells.append(difference_of(both, joint, stage))
        rows.append((task, *cells))
        tasks.append(task)
    if not rows:
        return ()
    table = Table(
        "Pruned together or apart: mean ± std over seeds",
        (
            "Task",
            "Heads, joint",
            "Heads, alone",
            "Heads, joined",
            "MLPs, joint",
            "MLPs, alone",
            "MLPs, joined",
            *(f"{what}, {stage}" for stage in STAGES for what in ("Joint", "Joined", "Joined − joint")),
        ),
        tuple(rows),
        "Joint: one search of heads and MLPs. Alone: a search of one kind, the other whole. Joined: both of these masks at once. "
        "If heads and MLPs did not depend on each other, joined masks would hold the floor as joint ones do.",
        tasks=tuple(tasks),
    )
    apart = _joint_table(study)
    return (
        Part(
            anchor,
            "Joint and joined",
            "Do heads and MLPs depend on each other?",
            tables=(table, apart) if apart else (table,),
            experiment="joined",
            cells=cells_of(used),
        ),
    )


def _joint_table(study: Study) -> Table | None:
    """What heads-only, MLPs-only and both masks lose, and what the joint ticket shares with the two others."""
    found = joint_rows(study.results)
    if not found:
        return None
    searches = ("s-prune", "s-prune-heads", "s-prune-mlps", "joined")
    return Table(
        "What is lost together and apart: full minus pruned score, mean over seeds",
        (
            *("Task", "Joint", "Heads only", "MLPs only", "Joined", "Interaction", "95 %"),
            *("Heads shared", "by chance", "MLPs shared", "by chance", "Seeds", "Note"),
        ),
        tuple(
            (
                study.task_of(row.task) or row.task,
                *(number(row.lost[name].value) if name in row.lost else NONE for name in searches),
                number(row.interaction.value, sign=True),
                interval(row.interaction),
                *(
                    number(value, 1)
                    for it in (row.shared_heads, row.shared_mlps)
                    for value in (it.shared.value, it.expected_shared)
                ),
                str(len(row.seeds)),
                row.note or NONE,
            )
            for row in found
        ),
        "Interaction: what both masks lose together beyond the sum of what each loses alone; above 0, heads and MLPs make up for "
        "each other. Shared: by the joint ticket and the one found on that kind alone.",
        tasks=tuple(study.task_of(row.task) or row.task for row in found),
    )


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
            cells += [score_of(one.report.group("good", stage)) if one and one.report else NONE for one in (whole, case)]
            cells.append(difference_of(case, whole, stage))
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
            anchor,
            "Size-matched",
            "Single values removed, as much as whole parts",
            legend=legend_of(kinds),
            figures=(tuple(figure for case in cases if (figure := bars_of(case, kinds))),),
            tables=(table,),
            experiment="size-matched",
            cells=cells_of(cases),
        ),
    )


def mode_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X1 and X2: models trained otherwise; masks used, inverted, drawn at random."""
    found = []
    modes = _first_of_task(case for case in study.cases if case.report and any(case.report.group(m, "retrained") for m in MODES))
    if modes:
        kinds = ["full", *MODES]
        found.append(
            Part(
                f"{anchor}-trained",
                "Train modes",
                "What does the score owe to pre-training?",
                "Fine-tuned in full; the task's head alone (frozen); and both from weights drawn again (random-init).",
                figures=(tuple(figure for case in modes if (figure := rows_of_kinds(case, kinds))),),
                tables=(bars_table("train modes", modes, MODES),),
                experiment="train-modes",
                cells=cells_of(modes),
            )
        )
    inverted = [case for case in study.cases if any(has(case, kind) for kind in INVERTED)]
    if inverted:
        kinds = ["full", "good", *INVERTED, "random", "bad"]
        found.append(
            Part(
                f"{anchor}-masks",
                "Mask modes",
                "Masks used and turned around",
                "Inverted: all that good removed, and nothing else. Revived: one head drawn in each layer that would have none.",
                figures=(tuple(figure for case in inverted if (figure := rows_of_kinds(case, kinds))),),
                tables=(bars_table("mask modes", inverted, kinds[1:]),),
                experiment="mask-modes",
                cells=cells_of(inverted),
            )
        )
    return tuple(found)


def _first_of_task(cases: Iterable[Case]) -> list[Case]:
    """A dense model belongs to every variant of its task: one of them is enough."""
    found: dict[str, Case] = {}
    for case in cases:
        found.setdefault(case.task, case)
    return list(found.values())


def setting_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Ladders, presets, rows that masks are chosen on: runs of one task and search that differ in a setting."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in study.cases:
        if not case.family and has(case, "good"):
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
            *(score_of(case.report.group(*one)) if case.report else NONE for one in columns),
        )
        for case in every
    ]
    table = Table(
        "The same search under other settings: mean ± std over seeds",
        (
            "Task",
            "Search",
            "Settings",
            "Share kept",
            *("Full" if kind == "full" else f"{kind.capitalize()}, {stage}" for kind, stage in columns),
        ),
        tuple(rows),
        stubs=3,
        tasks=tuple(case.task for case in every),
    )
    return (
        Part(
            anchor,
            "Settings compared",
            "What do settings change?",
            "Runs of one task and search that differ in a setting: presets, rungs of a ladder, rows that masks are chosen on.",
            tables=(table,),
            experiment="ladder",
            cells=cells_of(every),
        ),
    )
