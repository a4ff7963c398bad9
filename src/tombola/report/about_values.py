"""What the page shows of masks of single values over all tasks, and of what masks share beside their parts: errors, other tasks.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
The numbers are those of `tombola.study.survival` and `tombola.study.overlap`.
"""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.bars import good_cells_of
from tombola.report.cases import UNIT_NAMES, Case, Study
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, number, of_seeds, probability
from tombola.study.overlap import ErrorsRow, TransferRow, ValuesRow
from tombola.study.results import STAGES
from tombola.study.survival import PARTS, survival_rows

ALL = "all"  # name of a ValuesRow over all parameters


def kept_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """App. A: how much of each head and MLP survives, and whether seeds agree on it; of masks of single values too."""
    found = [
        (case, row)
        for row in survival_rows(study.results)
        if len(row.seeds) > 1
        and min(row.mean) < 1
        and (case := study.case_of(row.case))
        and not case.family
        and case.column == "MLP"
    ]
    if len({case.name for case, _ in found}) < 2:
        return ()  # of one case its own section says it
    found.sort(key=lambda one: study.cases.index(one[0]))
    table = Table(
        "Surviving share of heads and MLPs",
        ("Task", "Search", "Unit", "Mean", "Least to most kept part", "Std over seeds", "Spearman of two seeds", "Seeds", "Note"),
        tuple(
            (
                case.task,
                case.label or case.search,
                UNIT_NAMES.get(row.part, row.part),
                number(fmean(row.mean)),
                f"{number(min(row.mean))} to {number(max(row.mean))}",
                number(fmean(row.std)) if row.std else NONE,
                number(row.correlation),
                str(len(row.seeds)),
                row.note or NONE,
            )
            for case, row in found
        ),
        "Of masks of whole parts the share of seeds that keep a part, of single values the share of its values that is kept. "
        "Std: mean over parts. Spearman: whether two seeds keep more of the same parts, mean over pairs of seeds.",
        stubs=3,
        tasks=tuple(case.task for case, _ in found),
    )
    cases = [case for case, _ in found]
    return (
        Part(
            anchor,
            "Surviving shares",
            "Do seeds keep as much of each part?",
            "App. A of the paper. Maps are in the sections of tasks that have one.",
            fold="Every task and search",
            folded=(table,),
            experiment="m-prune",
            cells=good_cells_of(cases),
            all_seeds=True,
        ),
    )


def value_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """E9 and E13 of masks of single values: what two seeds, and two tasks, keep in common, against chance given sizes."""
    rows = [(case, row) for row in study.results.shared_values if (case := _usual(study, row))]
    if not rows:
        return ()
    rows.sort(key=lambda one: study.cases.index(one[0]))  # stable: parameters stay in their order
    tables, figures = [], []
    for which, title in ((True, "Single values that two seeds keep"), (False, "Single values that two tasks keep")):
        mine = [(case, row) for case, row in rows if row.name == ALL and (row.task == row.other) == which]
        if mine:
            tables.append(_values_table(title, mine, study))
    for case in {case.name: case for case, row in rows if row.task == row.other}.values():
        own = [row for other, row in rows if other is case and row.task == row.other]
        if figure := _by_matrix(case, own):
            figures.append(figure)
    return (
        Part(
            anchor,
            "Single values",
            "Do masks of single values agree?",
            "By chance: masks of these sizes drawn at random, or with as many kept in each matrix. Much of what magnitude keeps "
            "was large before fine-tuning: agreement alone says little of a task. Tiles: Fleiss kappa over seeds, by matrix and "
            "layer.",
            figures=(tuple(figures),) if figures else (),
            tables=tuple(tables),
            experiment="m-prune",
            cells=good_cells_of([case for case, _ in rows]),
            all_seeds=True,
        ),
    )


def _usual(study: Study, row: ValuesRow) -> Case | None:
    case = study.case_of(row.case) if row.case else None
    return case if case and not case.unusual else None


def _values_table(title: str, rows: Sequence[tuple[Case, ValuesRow]], study: Study) -> Table:
    apart = any(row.task != row.other for _, row in rows)
    return Table(
        title,
        (
            *("Task", *(("and",) if apart else ()), "Search", "Kept", "Jaccard", "Shared, share of all", "by chance", "Ratio"),
            *("Ratio, sizes of matrices given", *(() if apart else ("Fleiss kappa",)), "Pairs"),
        ),
        tuple(
            (
                case.task,
                *((study.task_of(row.other) or row.other,) if apart else ()),
                case.label or row.search,
                number(row.kept),
                number(row.jaccard),
                number(row.shared / row.n),
                number(row.expected / row.n),
                number(row.ratio),
                number(row.ratio_by_matrix),
                *(() if apart else (number(row.kappa),)),
                str(row.pairs),
            )
            for case, row in rows
        ),
        "Means over pairs of masks. There is no p: of millions of values every ratio other than 1 is beyond chance.",
        stubs=3 if apart else 2,
        tasks=tuple((case.task, study.task_of(row.other)) if apart else case.task for case, row in rows),
    )


def _by_matrix(case: Case, rows: Sequence[ValuesRow]) -> Figure | None:
    """Kinds of matrix down, layers across."""
    found: dict[str, dict[int, ValuesRow]] = {}
    for row in rows:
        if (place := re.search(r"\.(\d+)\.", row.name)) and row.name.endswith("weight"):
            found.setdefault(row.name[place.end() :].removesuffix(".weight"), {})[int(place[1])] = row
    layers = sorted({layer for of in found.values() for layer in of})
    if not layers:
        return None
    tiles = {
        (i, layers.index(layer)): charts.Tile(
            number(row.kappa, 2),
            row.kappa,
            f"{row.name}\nkappa {number(row.kappa)}, kept {number(row.kept)}, ratio to chance {number(row.ratio)}",
        )
        for i, of in enumerate(found.values())
        for layer, row in of.items()
    }
    names = _shortest([name.replace(".dense", "") for name in found])
    svg = charts.matrix(names, tiles, label=f"Kappa by matrix, {case.title}", columns=[str(layer) for layer in layers])
    return Figure(case.title, svg, f"kappa over seeds, {case.search}", natural=True, task=case.task)


def _shortest(names: Sequence[str]) -> list[str]:
    """Each name from its end, with as many parts as tell it from the others: "key", but "attention.output" and "output"."""
    ends = [[name.split(".", at)[-1] for at in range(name.count("."), -1, -1)] for name in names]
    return [next((end for end in own if not any(end in other for other in ends if other is not own)), own[-1]) for own in ends]


def error_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Whether seeds whose masks share more also err on the same rows."""
    rows: list[tuple[Case, ErrorsRow]] = [
        (case, row) for row in study.results.shared_errors if (case := study.case_of(row.case)) and not case.unusual
    ]
    if not rows:
        return ()
    rows.sort(key=lambda one: study.cases.index(one[0]))
    table = Table(
        "Masks that are alike, and errors that are",
        ("Task", "Search", "Rows are", "Unit", "Jaccard of masks", "Jaccard of errors", "r", "p", "Smallest p", "Seeds"),
        tuple(
            (
                case.task,
                case.label or case.search,
                row.role,
                UNIT_NAMES.get(row.part, row.part),
                *(number(fmean(pair[i] for pair in row.pairs.values())) for i in (0, 1)),
                number(row.found.r),
                probability(row.found.p).removeprefix("= "),
                number(row.found.smallest_p),
                str(len(row.seeds)),
            )
            for case, row in rows
        ),
        "Good tickets as pruned. r over pairs of seeds; p by renaming seeds (Mantel), of which few give no small one.",
        stubs=4,
        tasks=tuple(case.task for case, _ in rows),
    )
    return (
        Part(
            anchor,
            "Errors",
            "Do seeds with like masks make like errors?",
            tables=(table,),
            experiment="s-prune",
            cells=good_cells_of([case for case, _ in rows]),
            all_seeds=True,
        ),
    )


def transfer_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Tickets of one task on another, beside what they share with that task's own."""
    groups: dict[tuple[str, str, str, str], list[TransferRow]] = {}
    for row in study.results.transfers:
        groups.setdefault((row.source, row.target, row.search, row.stage), []).append(row)
    if not groups:
        return ()
    lines = sorted(groups, key=lambda key: (key[0], key[1], key[2], STAGES.index(key[3])))
    table = Table(
        "Tickets of one task on another: mean ± std over seeds",
        (
            *("Found on", "Tested on", "Search", "Stage", "Score", "Own ticket", "Dense"),
            *(f"Jaccard of {UNIT_NAMES.get(part, part)}" for part in PARTS),
        ),
        tuple(
            (
                *key,
                *(_scores(groups[key], name) for name in ("value", "own", "full")),
                *(of_seeds(_jaccard(groups[key], part)) if _jaccard(groups[key], part) else NONE for part in PARTS),
            )
            for key in lines
        ),
        "Own ticket: of the task it is tested on, at the same seed and stage. Jaccard: of the two tickets.",
        stubs=4,
        tasks=tuple((study.task_of(source), study.task_of(target)) for source, target, _, _ in lines),
    )
    return (
        Part(
            anchor,
            "Transfer",
            "Does a ticket serve another task better the more it shares with that task’s own?",
            tables=(table,),
        ),
    )


def _scores(rows: Sequence[TransferRow], name: str) -> str:
    found: Mapping[int, float] = {row.seed: value for row in rows if (value := getattr(row, name)) is not None}
    return of_seeds(found) if found else NONE


def _jaccard(rows: Sequence[TransferRow], part: str) -> dict[int, float]:
    return {row.seed: value for row in rows if (value := row.shared[part].jaccard) is not None}
