"""What masks share beyond their parts: single values, errors, and how well a ticket does on another task. Reads a store.

A table each, as in `tombola.study.survival`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from tombola import stats
from tombola.errors import DataError
from tombola.study.cells import Cell, cell_of
from tombola.study.results import Results, ScoreRow, TicketRow
from tombola.study.survival import PARTS, Case, bare, cases, is_whole, mask_of, metric_of

if TYPE_CHECKING:
    from tombola.store import Store


def with_shared(store: "Store", results: Results) -> Results:
    """The results with the tables of this file beside them, which only a store can give: what a page draws."""
    return replace(
        results,
        shared_values=tuple(values_rows(store, results)),
        shared_errors=tuple(errors_rows(store, results)),
        transfers=tuple(transfer_rows(store, results)),
    )


@dataclass(frozen=True, slots=True)
class ValuesRow:
    """How far masks of single values agree: over the seeds of a task, or of two tasks at matched seeds.

    There is no p: of millions of values every ratio other than 1 is beyond chance.
    """

    model: str
    search: str
    task: str
    other: str  # the same for seeds of one task
    name: str  # a parameter, or "all" of them
    n: int  # values
    pairs: int  # of masks
    kept: float  # mean share
    jaccard: float | None  # mean over pairs
    shared: float  # mean over pairs
    expected: float  # of masks of these sizes drawn at random
    expected_by_matrix: float  # likewise, sizes held within each parameter
    ratio: float | None
    ratio_by_matrix: float | None
    kappa: float | None = None  # Fleiss, of seeds of one task
    case: Case | None = None  # of `task`


def values_rows(store: "Store", results: Results) -> list[ValuesRow]:
    """Stability of masks of single values over seeds and between tasks, of each parameter and of all. Reads the tickets."""
    from tombola.ticket import Ticket

    found = {case: of for case, of in cases(results.tickets).items() if all(one.values is not None for one in of.values())}
    found = {case: of for case, of in found.items() if case.family == "as found"}

    masks: dict[str, dict[str, Bits]] = {}  # of each ticket; each is read once

    def masks_of(one: TicketRow) -> dict[str, Bits]:
        if one.cell not in masks:
            folder = store.load(one.cell)
            if folder is None:
                next_step = "give the store that the results were read from"
                raise DataError(f"the ticket {one.cell} is not in this store", next=next_step)
            values = Ticket.from_pretrained(folder / "ticket").mask.values
            flat = {name: part.numpy().reshape(-1) for name, part in values.items()}
            masks[one.cell] = {name: Bits(len(part), np.packbits(part)) for name, part in flat.items()}
        return masks[one.cell]

    rows = []
    for case, of in found.items():
        own = [masks_of(of[seed]) for seed in sorted(of)]
        if len(own) > 1:
            votes = {
                name: np.bincount(
                    np.sum([np.unpackbits(one[name].bits, count=one[name].n) for one in own], axis=0, dtype=np.int8),
                    minlength=len(own) + 1,
                )
                for name in _common(own)
            }
            votes["all"] = np.sum(list(votes.values()), axis=0)
            kappas = {name: stats.kappa_of_votes(counts) for name, counts in votes.items()}
            rows += _values(case, case.task, list(combinations(own, 2)), kappas)
    for (a, of_a), (b, of_b) in combinations(found.items(), 2):
        seeds = sorted(of_a.keys() & of_b.keys())
        if seeds and a.is_like(b, results.variants):
            rows += _values(a, b.task, [(masks_of(of_a[s]), masks_of(of_b[s])) for s in seeds], {})
    return rows


@dataclass(frozen=True, slots=True)
class Bits:
    """A mask of n values, eight to a byte: those of a whole study fit into memory."""

    n: int
    bits: UInt8[np.ndarray, " byte"]

    @property
    def kept(self) -> int:
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    def shared(self, other: "Bits") -> int:
        return int(np.bitwise_count(self.bits & other.bits).sum(dtype=np.int64))


def _common(masks: Sequence[Mapping[str, Bits]]) -> list[str]:
    return [name for name in masks[0] if all(name in one for one in masks)]


def _values(
    case: Case, other: str, pairs: Sequence[tuple[Mapping[str, Bits], Mapping[str, Bits]]], kappas: Mapping[str, float | None]
) -> list[ValuesRow]:
    names = _common([one for pair in pairs for one in pair])
    # [pair, parameter]: values, kept by a, kept by b, kept by both
    counts = np.array([[(a[x].n, a[x].kept, b[x].kept, a[x].shared(b[x])) for x in names] for a, b in pairs], dtype=float)

    def row(name: str, at: Any) -> ValuesRow:
        by = counts[:, at]  # [pair, parameter, 4]
        n, a, b, both = by.sum(1).T
        shared, expected = float(both.mean()), float((a * b / n).mean())
        within = float((by[:, :, 1] * by[:, :, 2] / by[:, :, 0]).sum(1).mean())
        either = a + b - both
        jaccard = float((both[either > 0] / either[either > 0]).mean()) if (either > 0).any() else None
        kept = float(((a + b) / (2 * n)).mean())
        said = (case.model, case.search, case.task, other, name, int(n[0]), len(pairs), kept, jaccard)
        ratios = shared / expected if expected else None, shared / within if within else None
        return ValuesRow(*said, shared, expected, within, *ratios, kappas.get(name), case)

    return [row("all", slice(None)), *(row(name, slice(i, i + 1)) for i, name in enumerate(names))]


@dataclass(frozen=True, slots=True)
class ErrorsRow:
    """Whether seeds whose masks share more parts also err on the same rows."""

    case: Case
    part: str
    role: str  # "report" | "challenge"
    seeds: tuple[int, ...]
    pairs: Mapping[tuple[int, int], tuple[float, float]]  # seeds → (Jaccard of masks, Jaccard of the rows answered wrong)
    found: stats.Mantel


def errors_rows(store: "Store", results: Results) -> list[ErrorsRow]:
    """Overlap of masks against overlap of errors, of good tickets as pruned; for cases of three seeds or more, and classes."""
    from tombola.study.steps.shared import read_predictions

    pruned = {
        (row.model, row.task, row.search, row.family, row.preset, row.seed): row.cell
        for row in results.scores
        if row.kind == "good" and row.stage == "pruned"
    }
    rows = []
    for case, of in cases(results.tickets).items():
        cells = {
            seed: pruned.get((one.model, one.task, one.search, one.family, one.preset, seed)) for seed, one in sorted(of.items())
        }
        folders = {seed: store.load(cell) for seed, cell in cells.items() if cell is not None}
        predictions = {seed: read_predictions(folder) for seed, folder in folders.items() if folder is not None}
        if len(predictions) < 3 or not all(is_whole(one) for one in of.values()):
            continue
        seeds = tuple(predictions)
        for role in ("report", "challenge"):
            if any(role not in one or one[role].regression or one[role].weights for one in predictions.values()):
                continue
            of_role = [one[role] for one in predictions.values()]
            wrong = [{x for x, said, label in zip(p.ids, p.classes, p.labels, strict=True) if said != label} for p in of_role]
            for part in PARTS:
                kept = [{i for i, kept in enumerate(mask_of(of[seed], part)) if kept} for seed in seeds]
                shared = {
                    (i, j): (_jaccard(kept[i], kept[j]), _jaccard(wrong[i], wrong[j]))
                    for i, j in combinations(range(len(seeds)), 2)
                }
                tables = [[[1.0 if i == j else shared[min(i, j), max(i, j)][at] for j in range(len(seeds))]
                           for i in range(len(seeds))] for at in (0, 1)]  # fmt: skip
                pairs = {(seeds[i], seeds[j]): both for (i, j), both in shared.items()}
                rows.append(ErrorsRow(case, part, role, seeds, pairs, stats.mantel(*tables)))
    return rows


def _jaccard(a: Collection[Any], b: Collection[Any]) -> float:
    """1 where both are empty: they are the same."""
    either = len(set(a) | set(b))
    return len(set(a) & set(b)) / either if either else 1.0


@dataclass(frozen=True, slots=True)
class TransferRow:
    """A ticket of one task tested on another, beside what it shares with that task's own ticket of the seed."""

    model: str
    search: str
    source: str
    target: str
    seed: int
    stage: str
    shared: Mapping[str, stats.Overlap]  # part → overlap of the two tickets
    metric: str
    value: float  # on the report rows of the target
    own: float | None  # of the target's own ticket at this stage
    full: float | None  # of the target's dense model


def transfer_rows(store: "Store", results: Results) -> list[TransferRow]:
    """Overlap against transfer: cells that test a good ticket on another task (`tombola retrain TICKET TASK`, `evaluate`)."""
    cells = {entry.key: cell_of(entry) for entry in store.entries()}
    tickets = {one.cell: one for one in results.tickets if one.kind == "good"}
    home = {(one.model, bare(one.task), one.search, one.family, one.preset, one.seed): one for one in tickets.values()}
    report = [row for row in results.scores if row.role == "report" and row.metric == (metric_of(row.task) or row.metric)]
    # what a score is of (its ticket's cell, none for a dense model), where, and at which stage
    tested: dict[tuple[str | None, str, int, str], ScoreRow] = {}
    for row in report:
        taken = cells[row.cell].inputs.get("ticket") if row.cell in cells else None
        if taken is None and row.kind == "full":
            tested[None, bare(row.task), row.seed, "full"] = row
        elif isinstance(taken, Cell) and taken.key in tickets:
            tested.setdefault((taken.key, bare(row.task), row.seed, row.stage), row)
    rows = []
    for (key, target, seed, stage), row in tested.items():
        source = None if key is None else tickets[key]
        own = source and home.get((source.model, target, source.search, source.family, source.preset, source.seed))
        if source is None or own is None or bare(source.task) == target:
            continue
        shared = {part: stats.overlap(mask_of(source, part), mask_of(own, part)) for part in PARTS}
        beside = [tested.get((own.cell, target, seed, stage)), tested.get((None, target, seed, "full"))]
        values = [None if one is None else one.value for one in beside]
        said = (row.model, source.search, bare(source.task), target, seed, stage, shared, row.metric, row.value)
        rows.append(TransferRow(*said, *values))
    return rows
