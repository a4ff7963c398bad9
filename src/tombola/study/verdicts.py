"""What finished chains and transfers say: matching by every rule, the level to choose, transfer matrices, overlaps, cost.

Pure reading: planned cells in, values out. A level is chosen on selection rows and reported on others (`Existence.chosen`), as
every mask here is; the paper chooses on the rows it reports.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tombola import stats
from tombola.stats import Match, Overlap, Transfer
from tombola.store import PROVENANCE
from tombola.study.cells import Cell, Lab, read_json, read_rows
from tombola.study.chains import Chain
from tombola.study.chen2020 import Transferred
from tombola.study.steps.shared import ticket_of


@dataclass(frozen=True, slots=True)
class Scored:
    """One cell's score on one set of rows."""

    metric: str
    value: float
    n: int
    majority: float


def score_of(lab: Lab, cell: Cell, role: str = "report") -> Scored:
    """The score of a cell by its task's own metric, the first that is written. Raises: StoreError when it is not finished."""
    row = next(row for row in read_rows(lab.folder(cell) / "scores.jsonl") if row["role"] == role)
    return Scored(row["metric"], row["value"], row["n"], row["majority"])


@dataclass(frozen=True, slots=True)
class Level:
    """One level over all seeds."""

    sparsity: float
    total_sparsity: float  # of the whole model, embeddings and head included
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
    dense: tuple[float, ...]
    levels: tuple[Level, ...]
    highest: Mapping[
        str, float | None
    ]  # rule → the highest sparsity that matches on the report rows themselves, as the paper reads it
    chosen: Mapping[str, float | None]  # rule → the highest that matches on the selection rows: whose score above is honest


def existence(lab: Lab, chains: Sequence[Chain], *, margin: float = stats.MARGIN) -> Existence:
    """Every level of finished chains of one task and setting, a chain a seed. Raises: StoreError where a cell is not finished."""
    from tombola.anatomy import size_of

    dense = [score_of(lab, chain.dense) for chain in chains]
    by_role = {role: [score_of(lab, chain.dense, role).value for chain in chains] for role in ("selection", "report")}
    levels, selection, report = list[Level](), dict[float, list[float]](), dict[float, list[float]]()
    for k, sparsity in enumerate(chains[0].sparsities, start=1):
        scores = [score_of(lab, chain.scored(k)).value for chain in chains]
        report[sparsity], selection[sparsity] = scores, [score_of(lab, chain.scored(k), "selection").value for chain in chains]
        ticket = ticket_of(lab, chains[0].levels[k - 1])
        steps, flops = zip(*(cost_to(lab, chain, k) for chain in chains), strict=True)
        levels.append(
            Level(
                sparsity=ticket.sparsity,
                total_sparsity=1 - size_of(ticket.anatomy, ticket.mask).total_share,
                scores=tuple(scores),
                match=stats.matching(scores, by_role["report"], margin=margin, majority=dense[0].majority),
                steps=steps[0],
                flops=sum(flops) / len(flops),
            )
        )
    highest = stats.highest_matching(report, by_role["report"], margin=margin)
    chosen = stats.highest_matching(selection, by_role["selection"], margin=margin)
    first = dense[0]
    return Existence(first.metric, first.n, first.majority, tuple(by_role["report"]), tuple(levels), highest, chosen)


def cost_to(lab: Lab, chain: Chain, level: int) -> tuple[int, float]:
    """(optimizer steps, FLOPs by formula) of a chain up to the trained model of a level: what finding and training it took."""
    cells = [chain.dense, *([] if chain.snapshot is None else [chain.snapshot]), *chain.levels[:level]]
    if level and chain.scored(level) not in cells:
        cells.append(chain.scored(level))
    steps, flops = 0, 0.0
    for cell in {one.key: one for one in cells}.values():
        folder = lab.folder(cell)
        steps += read_json(folder / "train.json")["steps"] if (folder / "train.json").is_file() else 0
        flops += read_json(folder / PROVENANCE)["cost"]["flops"]
    return steps, flops


# --------------------------------------------------------------------------------------------------------------- transfer


@dataclass(frozen=True, slots=True)
class Matrix:
    """A transfer matrix at one sparsity: rows are sources, columns targets."""

    sparsity: float
    cells: tuple[Transfer, ...]
    dark: Mapping[str, int]  # source → targets but itself where it does no worse than their own ticket
    matching_dense: Mapping[str, Mapping[str, int]]  # source → rule → targets but itself where it matches the dense model


def transfer_matrices(lab: Lab, runs: Sequence[Transferred], *, margin: float = stats.MARGIN) -> list[Matrix]:
    """The matrices of finished runs, one a sparsity, each cell with both verdicts: against the dense model and against the
    target's own ticket. A source that was run at a sparsity of its own (MLM) has a row in that matrix, its targets' own tickets
    permitting.
    """
    matrices = []
    for sparsity in sorted({one.sparsity for one in runs}):
        scores: dict[tuple[str, str], list[float]] = {}
        dense: dict[str, dict[int, float]] = {}
        majority: dict[str, float] = {}
        for one in (run for run in runs if run.sparsity == sparsity):
            found = score_of(lab, one.cell)
            scores.setdefault((one.source, one.target), []).append(found.value)
            dense.setdefault(one.target, {})[one.seed] = score_of(lab, one.dense).value
            majority[one.target] = found.majority
        cells = stats.transfers(scores, {t: list(of.values()) for t, of in dense.items()}, margin=margin, majority=majority)
        counts: dict[str, dict[str, int]] = {}
        for cell in cells:
            mine = counts.setdefault(cell.source, dict.fromkeys(cell.vs_dense.verdicts, 0))
            for rule, verdict in cell.vs_dense.verdicts.items():
                mine[rule] += cell.source != cell.target and bool(verdict.matches)
        matrices.append(Matrix(sparsity, tuple(cells), stats.dark_counts(cells), counts))
    return matrices


def overlaps(lab: Lab, tickets: Mapping[str, Cell]) -> dict[tuple[str, str], Overlap]:
    """What every pair of finished tickets of single values shares, beside what their sizes alone would give (X7)."""
    masks = {name: ticket_of(lab, cell).mask for name, cell in tickets.items()}
    names = list(masks)
    return {(a, b): masks[a].overlap_by_type(masks[b])["values"] for i, a in enumerate(names) for b in names[i + 1 :]}


@dataclass(frozen=True, slots=True)
class Barrier:
    """The line between a level and the next."""

    barrier: float  # rise of the loss above the line between its ends, in nats a row
    lower: str  # key of the cell of the denser end


def barriers(lab: Lab, cells: Sequence[Cell], role: str = "report") -> list[Barrier]:
    """What finished cells of lines say, in their order (X9)."""
    found = []
    for cell in cells:
        end: Any = cell.inputs["a"]
        found.append(Barrier(float(read_json(lab.folder(cell) / "result.json")["barrier"][role]), end.key))
    return found


# ------------------------------------------------------------------------------------------------------------- early stop


def run_until_lost(lab: Lab, chain: Chain, *, margin: float = stats.MARGIN) -> int:
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
