"""What finished chains and transfers say: matching by every rule, the level to choose, transfer matrices, overlaps, cost.

Pure reading: planned cells in, values out. A level is chosen on selection rows and reported on others (`Existence.chosen`), as
every mask here is; the paper chooses on the rows it reports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tombola import stats
from tombola.errors import StoreError
from tombola.stats import Match, Overlap, Transfer
from tombola.study.cells import Cell, Lab
from tombola.study.chain_rows import BarrierRow, LevelRow, Scored, TrainedRow, chain_rows, cost_of, score_in

if TYPE_CHECKING:
    from tombola.study.chains import Chain
    from tombola.study.chen2020 import Transferred


def score_of(lab: Lab, cell: Cell, role: str = "report") -> Scored:
    """The score of a cell by its task's own metric, the first that is written. Raises: StoreError when it is not finished."""
    found = score_in(lab.folder(cell), role)
    if found is None:
        raise StoreError("a cell without scores", got=f"{cell.step} {cell.key}", expected=f"a score on the {role} rows")
    return found


@dataclass(frozen=True, slots=True)
class Level:
    """One level over all seeds."""

    sparsity: float  # of the scope, as asked for
    total_sparsity: float | None  # of the whole model, embeddings and head included; None: not known
    seeds: tuple[int, ...]  # that have it: fewer than the chain's where some were stopped before, or are not finished
    scores: tuple[float, ...]  # on the report rows, one a seed
    match: Match  # against the dense models of the same seeds
    steps: int  # optimizer steps that a seed took to find and train it, dense model included
    flops: float  # likewise, mean over seeds


@dataclass(frozen=True, slots=True)
class Existence:
    """A chain's levels held against its dense models."""

    metric: str
    rows: int
    majority: float
    seeds: tuple[int, ...]
    dense: tuple[float, ...]  # one a seed
    levels: tuple[Level, ...]
    highest: Mapping[
        str, float | None
    ]  # rule → the highest sparsity that matches on the report rows themselves, as the paper reads it
    chosen: Mapping[str, float | None]  # rule → the highest that matches on the selection rows: whose score above is honest


def existence(lab: Lab, chains: "Sequence[Chain]", *, margin: float = stats.MARGIN) -> Existence:
    """Every level of finished chains of one task and setting, a chain a seed. Raises: StoreError where a cell is not finished."""
    from tombola.anatomy import size_of
    from tombola.study.steps.shared import ticket_of

    cells = {cell.key: cell for chain in chains for cell in chain.cells}
    for cell in cells.values():
        lab.folder(cell)
    total = {}
    for cell in chains[0].levels:
        ticket = ticket_of(lab, cell)
        total[cell.key] = 1 - size_of(ticket.anatomy, ticket.mask).total_share
    rows, std_kind = chain_rows(cells, lab.folder, share=False).levels, chains[0].settings.search.std_kind
    return existence_of(rows, total, margin=margin, std_kind=std_kind)


def existence_of(
    rows: Sequence[LevelRow],
    total: Mapping[str, float] = {},
    *,
    margin: float = stats.MARGIN,
    std_kind: Literal["sample", "none"] = "sample",
) -> Existence:
    """The levels of one chain over its seeds, each held against the dense models of the seeds that have it.

    A level that some seeds lack, since their chain was stopped or is not finished, is of those that are left: `highest` and
    `chosen` pass it over. total: key of a cell with a ticket → its sparsity of the whole model, where that is known. std_kind: as
    of `stats.matching`.
    """
    by_level: dict[int, dict[int, LevelRow]] = {}
    for row in rows:
        by_level.setdefault(row.level, {})[row.seed] = row
    begun = {row.seed for row in rows if row.level}
    dense = {seed: row for seed, row in sorted(by_level.pop(0).items()) if seed in begun}
    seeds, first = tuple(dense), next(iter(dense.values()))
    levels, selection, report = list[Level](), dict[float, list[float]](), dict[float, list[float]]()
    for _, of in sorted(by_level.items()):
        found = [of[seed] for seed in seeds if seed in of]
        scores, at = [row.value for row in found], found[0].sparsity
        if len(found) == len(seeds):
            report[at], selection[at] = scores, [row.selection for row in found]
        full = [dense[row.seed].value for row in found]
        levels.append(
            Level(
                sparsity=at,
                total_sparsity=next((total[row.ticket] for row in found if row.ticket in total), None),
                seeds=tuple(row.seed for row in found),
                scores=tuple(scores),
                match=stats.matching(scores, full, margin=margin, majority=first.majority, std_kind=std_kind),
                steps=found[0].steps,
                flops=sum(row.flops for row in found) / len(found),
            )
        )
    values, chosen_on = [row.value for row in dense.values()], [row.selection for row in dense.values()]
    highest = stats.highest_matching(report, values, margin=margin, std_kind=std_kind)
    chosen = stats.highest_matching(selection, chosen_on, margin=margin, std_kind=std_kind)
    return Existence(first.metric, first.n, first.majority, seeds, tuple(values), tuple(levels), highest, chosen)


def cost_to(lab: Lab, chain: "Chain", level: int) -> tuple[int, float]:
    """(optimizer steps, FLOPs by formula) of a chain up to the trained model of a level: what finding and training it took."""
    cells = [chain.dense, *([] if chain.snapshot is None else [chain.snapshot]), *chain.levels[:level]]
    return cost_of([*cells, *([chain.scored(level)] if level else [])], lab.folder)


# --------------------------------------------------------------------------------------------------------------- transfer


@dataclass(frozen=True, slots=True)
class Matrix:
    """A transfer matrix at one sparsity: rows are sources, columns targets."""

    sparsity: float
    cells: tuple[Transfer, ...]
    dark: Mapping[str, int]  # source → targets but itself where it does no worse than their own ticket
    matching_dense: Mapping[str, Mapping[str, int]]  # source → rule → targets but itself where it matches the dense model


def transfer_matrices(lab: Lab, runs: "Sequence[Transferred]", *, margin: float = stats.MARGIN) -> list[Matrix]:
    """The matrices of finished runs, as `matrices_of`. Raises: StoreError where a run is not finished."""
    for one in runs:
        lab.folder(one.cell)
    rows = chain_rows({one.cell.key: one.cell for one in runs}, lab.folder, share=False).trained
    return matrices_of(rows, margin=margin)


def matrices_of(rows: Sequence[TrainedRow], *, margin: float = stats.MARGIN) -> list[Matrix]:
    """The matrices of masks trained from the base, one a sparsity, each cell with both verdicts: against the dense model
    and against the target's own ticket. Tickets of every task, each by the seeds it was found with, masks of the base, and random
    ones of the target's own. A source that was run at a sparsity of its own (MLM) has a row in that matrix, its targets' own
    tickets permitting.
    """
    matrices = []
    wanted = [row for row in rows if row.start == "base" and row.mask_seed == row.seed and source_of(row)]
    for sparsity in sorted({row.sparsity for row in wanted}):
        scores: dict[tuple[str, str], dict[int, float]] = {}
        dense: dict[str, dict[int, float]] = {}
        majority: dict[str, float] = {}
        for row in (one for one in wanted if one.sparsity == sparsity):
            scores.setdefault((source_of(row), row.task), {})[row.seed] = row.value
            dense.setdefault(row.task, {})[row.seed] = row.dense
            majority[row.task] = row.majority
        by_seed = {pair: [of[seed] for seed in sorted(of)] for pair, of in scores.items()}
        full = {task: [of[seed] for seed in sorted(of)] for task, of in dense.items()}
        cells = stats.transfers(by_seed, full, margin=margin, majority=majority)
        counts: dict[str, dict[str, int]] = {}
        for cell in cells:
            mine = counts.setdefault(cell.source, dict.fromkeys(cell.vs_dense.verdicts, 0))
            for rule, verdict in cell.vs_dense.verdicts.items():
                mine[rule] += cell.source != cell.target and bool(verdict.matches)
        matrices.append(Matrix(sparsity, tuple(cells), stats.dark_counts(cells), counts))
    return matrices


def source_of(row: TrainedRow) -> str:
    """The row of a transfer matrix that a trained mask belongs to; "" for one that is of none."""
    if row.mask == "ticket":
        return row.source
    if row.mask.startswith("base, "):
        return row.mask
    return "random" if row.mask == "random" and row.source == row.task and row.draw == 0 else ""


def overlaps(lab: Lab, tickets: Mapping[str, Cell]) -> dict[tuple[str, str], Overlap]:
    """What every pair of finished tickets of single values shares, beside what their sizes alone would give (X7)."""
    from tombola.study.steps.shared import ticket_of

    masks = {name: ticket_of(lab, cell).mask for name, cell in tickets.items()}
    names = list(masks)
    return {(a, b): masks[a].overlap_by_type(masks[b])["values"] for i, a in enumerate(names) for b in names[i + 1 :]}


def barriers(lab: Lab, cells: Sequence[Cell]) -> list[BarrierRow]:
    """What finished cells of lines say, from the densest level on (X9). Raises: StoreError where one is not finished."""
    for cell in cells:
        lab.folder(cell)
    return list(chain_rows({cell.key: cell for cell in cells}, lab.folder, share=False).barriers)


# ------------------------------------------------------------------------------------------------------------- early stop


def run_until_lost(lab: Lab, chain: "Chain", *, margin: float = stats.MARGIN) -> int:
    """Runs a chain level by level and stops when a level is certainly lost (`tombola.stats.certainly_lost`, on the selection
    rows).

    Returns the levels that were trained and scored; the cells of later ones are not there. The same call again computes nothing.
    """
    lab.run([chain.dense])
    dense = score_of(lab, chain.dense, "selection")
    for level in range(1, len(chain.levels) + 1):
        lab.run([chain.levels[level - 1], chain.scored(level)])
        mine = score_of(lab, chain.scored(level), "selection")
        if stats.certainly_lost([mine.value], [dense.value], mine.n, margin=margin):
            lab.reporter.say(
                f"stopped at {chain.sparsities[level - 1]:.0%}: {mine.value:.3f} after {dense.value:.3f} is certainly lost"
            )
            return level
    return len(chain.levels)
