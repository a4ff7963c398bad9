"""What the page shows of several tasks that train one body under one mask, beside chains of each task alone (X1)."""

from collections.abc import Mapping

from tombola.report.about_chains import filter_task, is_of_rewinding, percent
from tombola.report.about_transfer import jaccards
from tombola.report.cases import Study
from tombola.report.layout import Part, Table
from tombola.report.words import NONE, of_seeds
from tombola.study.chain_rows import LevelRow, SharedRow

Rows = Mapping[int, LevelRow]  # of a level, by seed


def joint_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X1: at each level the score of each task under the shared mask, under its own, and what the two masks share."""
    chains, alone = study.results.chains, dict[tuple[str, str, str, float], dict[int, LevelRow]]()
    together: dict[tuple[str, str, str, float], dict[int, LevelRow]] = {}
    for row in chains.levels:
        if row.body_of:
            together.setdefault((row.chain, row.task, row.model, row.sparsity), {})[row.seed] = row
        elif is_of_rewinding(row.chain):
            alone.setdefault((row.model, row.task, row.rewind, row.sparsity), {})[row.seed] = row
    if not together:
        return ()
    shared: dict[tuple[str, str, float], dict[int, SharedRow]] = {}
    for one in chains.shared:
        shared.setdefault((one.a, one.b, one.sparsity), {})[one.seed] = one
    rows, tasks = [], []
    for (chain, task, model, sparsity), mine in sorted(together.items()):
        rewind = next(iter(mine.values())).rewind
        own = alone.get((model, task, rewind, sparsity), {})
        dense = together.get((chain, task, model, 0.0), {})
        rows.append(
            (
                chain.removeprefix("one body for "), filter_task(task), percent(sparsity) if sparsity else "dense",
                _scores(mine), _minus(mine, dense) if sparsity else NONE, _scores(own), _minus(mine, own),
                jaccards(shared.get((chain, task, sparsity), {})),
            )
        )  # fmt: skip
        tasks.append(filter_task(task))
    return (
        Part(
            anchor,
            "One body for several tasks",
            "Does one mask serve several tasks?",
            "A step adds the losses of one batch of each task; the rows of shorter tasks come again. Heads stay apart. One mask "
            "is found, of the body they share.",
            tables=(
                Table(
                    "Scores under a shared mask, beside chains of each task alone: mean ± std over seeds",
                    (
                        *("Tasks", "Task", "Sparsity", "Shared mask", "Minus dense, trained on all"),
                        *("Own mask, trained alone", "Shared minus own", "Masks share / by chance"),
                    ),
                    tuple(rows),
                    "Row dense: nothing removed, all tasks trained together, and each alone. In a shared run each task sees as "
                    "many batches as the longest, which may be more than alone. Masks share: Jaccard, mean over seeds. * at or "
                    "below the majority line.",
                    stubs=3,
                    tasks=tuple(tasks),
                ),
            ),
            experiment="multi-task",
            cells=tuple(sorted({row.cell for by_seed in together.values() for row in by_seed.values()})),
            all_seeds=True,
        ),
    )


def _scores(rows: Rows) -> str:
    if not rows:
        return NONE
    low = sum(row.value for row in rows.values()) <= sum(row.majority for row in rows.values()) + 1e-12
    return of_seeds({seed: row.value for seed, row in rows.items()}) + ("*" if low else "")


def _minus(rows: Rows, others: Rows) -> str:
    both = {seed: row.value - others[seed].value for seed, row in rows.items() if seed in others}
    return of_seeds(both, sign=True) if both else NONE
