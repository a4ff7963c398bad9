"""What finished cells of chains say, as plain rows: levels, masks trained on a task, lines between levels, what tickets share.

Read by what cells say of themselves, not by a plan: the same rows of a study, of a whole store, or of chains planned in Python.
`tombola.study.verdicts` judges them, and the page draws them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola import stats
from tombola.store import PROVENANCE
from tombola.study.cells import Cell, read_json, read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from tombola.stats import Overlap

JOINT = ("joint_round", "joint_snapshot")  # steps of chains over several tasks
Folder = Callable[[Cell], Path | None]  # where a finished cell lies; None where it is not finished
OF_MLM = ("rewind_source", "mlm_first_cut")  # options that play a part in chains of masked language modelling alone
JOINING = ("union", "intersection")  # rules of `tombola.study.derived` whose masks are of several tasks


@dataclass(frozen=True, slots=True)
class Scored:
    """One cell's score on one set of rows."""

    metric: str
    value: float
    n: int
    majority: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRow:
    """One level of a chain of one seed, trained; level 0 is the dense model."""

    cell: str  # that has its scores
    model: str
    task: str
    seed: int
    chain: str  # what sets this chain apart from others of its task: "rewind=none"; "" where there is one
    rewind: str
    level: int
    sparsity: float  # asked for
    ticket: str  # key of the cell that holds its mask; "" of the dense model
    metric: str
    value: float  # on the report rows
    n: int
    majority: float
    selection: float  # on the selection rows
    selection_rows: int
    steps: int  # of the optimizer, to find and train it, dense model included
    flops: float  # likewise, by formula
    body_of: tuple[str, ...] = ()  # of a chain over several tasks with one body: these; level 0 is then trained on all, too


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRow:
    """A mask trained on a task from the base, beside the dense model of the same task and seed."""

    cell: str
    model: str
    task: str  # target
    seed: int
    chain: str  # of its ticket, as of a LevelRow; "" of a mask of the base
    mask: str  # "ticket", "base, CRITERION", a kind of control, or a rule with its options
    source: str  # task of the ticket that it is or was made from; of joined ones all of them; "" of masks of the base
    mask_seed: int  # run seed of that ticket
    draw: int
    sparsity: float  # of the ticket it is, or was made from
    start: str  # "base", or of which training the weights are that it starts from: "trained on TASK", "early on TASK"
    metric: str
    value: float
    n: int
    majority: float
    dense: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierRow:
    """The straight line between the trained models of two levels of one seed."""

    cell: str
    model: str
    task: str
    seed: int
    chain: str
    lower: float  # sparsity of the denser end
    upper: float
    barrier: float  # largest rise of the loss on the report rows above the line between its ends, in nats a row


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRow:
    """What the tickets of two tasks share at one level of one seed, beside what their sizes alone would give.

    `a` may be several tasks with one body, by the name that `one_body` gives them; `b` is then one of them alone.
    """

    model: str
    a: str
    b: str
    seed: int
    chain: str
    sparsity: float
    overlap: "Overlap"


@dataclass(frozen=True, slots=True)
class ChainRows:
    """All of them, sorted: the same cells give the same rows."""

    levels: tuple[LevelRow, ...] = ()
    trained: tuple[TrainedRow, ...] = ()
    barriers: tuple[BarrierRow, ...] = ()
    shared: tuple[SharedRow, ...] = ()


def chain_rows(
    cells: Mapping[str, Cell], folder: Folder, names: Mapping[str, str] | None = None, *, share: bool = True
) -> ChainRows:
    """The rows of these cells, key → cell, as far as they are finished.

    names: a task as cells name it → as rows do. share: also what tickets share, for which all their masks are read.
    """
    wanted = {key: cell for key, cell in cells.items() if not any("design" in one.settings for one in cell.needed())}
    names, labels = names or {}, _labels(wanted.values())

    def name(cell: Cell) -> str:
        task = str(cell.settings["data"]["task"])
        return names.get(task, task)

    levels: dict[tuple[str, str, int, int], LevelRow] = {}
    trained, barriers = list[TrainedRow](), list[BarrierRow]()
    for cell in wanted.values():
        if cell.step == "round":
            for row in _levels(cell, folder, name, labels):
                levels[row.task, row.chain, row.seed, row.level] = row
        elif cell.step == "joint_round":
            for row in _joint_levels(cell, folder, name, labels):
                levels[row.task, row.chain, row.seed, row.level] = row
        elif cell.step == "retrain" and (one := _trained(cell, folder, name, labels)):
            trained.append(one)
        elif cell.step == "barrier" and (line := _barrier(cell, folder, name, labels)):
            barriers.append(line)
    return ChainRows(
        tuple(sorted(levels.values(), key=lambda row: (row.task, row.chain, row.level, row.seed))),
        tuple(sorted(trained, key=lambda row: (row.task, row.mask, row.source, row.sparsity, row.seed, row.draw, row.cell))),
        tuple(sorted(barriers, key=lambda row: (row.task, row.chain, row.lower, row.seed))),
        (*_shared(wanted.values(), folder, name, labels), *_joint_shared(wanted.values(), folder, name, labels)) if share else (),
    )


def one_body(tasks: str) -> str:
    """The name of several tasks that train one body."""
    return f"one body for {tasks}"


def score_in(place: Path, role: str = "report") -> Scored | None:
    """The score in a cell's folder by its task's own metric, the first that is written; None where it has none."""
    if not (place / "scores.jsonl").is_file():
        return None
    row = next((row for row in read_rows(place / "scores.jsonl") if row["role"] == role), None)
    return None if row is None else Scored(row["metric"], row["value"], row["n"], row["majority"])


def cost_of(cells: Iterable[Cell], folder: Folder) -> tuple[int, float]:
    """(optimizer steps, FLOPs by formula) that these finished cells took, each counted once."""
    steps, flops = 0, 0.0
    for cell in {one.key: one for one in cells}.values():
        if place := folder(cell):
            steps += read_json(place / "train.json")["steps"] if (place / "train.json").is_file() else 0
            flops += read_json(place / PROVENANCE)["cost"]["flops"]
    return steps, flops


# ------------------------------------------------------------------------------------------------------------- of one cell


def _levels(cell: Cell, folder: Folder, name: Callable[[Cell], str], labels: Mapping[str, str]) -> list[LevelRow]:
    """Of a round the level that it trains; of the first one the dense model."""
    of, below = cell, list(cell.needed())
    if cell.settings["round"]["level"] == 0:
        dense = cell.inputs["dense"]
        assert isinstance(dense, Cell)
        of, below = dense, [dense]
    place = folder(of)
    report, selection = (None if place is None else score_in(place, role) for role in ("report", "selection"))
    if report is None or selection is None:
        return []
    assert place is not None
    return [_level_row(cell, of, name(cell), labels, report, selection, cost_of(below, folder))]


def _level_row(
    cell: Cell,
    scored: Cell,
    task: str,
    labels: Mapping[str, str],
    report: Scored,
    selection: Scored,
    cost: tuple[int, float],
    body_of: tuple[str, ...] = (),
) -> LevelRow:
    """The row of the level that a round trains. scored: whose scores they are, of level 0 the dense model."""
    before = cell.inputs.get("ticket")
    return LevelRow(
        cell=scored.key,
        model=str(cell.settings["model"]["name"]),
        task=task,
        seed=cell.settings["seeds"]["run"],
        chain=labels[cell.key],
        rewind=cell.settings["search"]["rewind"],
        level=cell.settings["round"]["level"],
        sparsity=before.settings["cuts"]["to"] if isinstance(before, Cell) else 0.0,
        ticket=before.key if isinstance(before, Cell) else "",
        metric=report.metric,
        value=report.value,
        n=report.n,
        majority=report.majority,
        selection=selection.value,
        selection_rows=selection.n,
        steps=cost[0],
        flops=cost[1],
        body_of=body_of,
    )


def _joint_levels(cell: Cell, folder: Folder, name: Callable[[Cell], str], labels: Mapping[str, str]) -> Iterable[LevelRow]:
    """Of a round over several tasks the level that it trains, a row a task. Steps and FLOPs are those of all tasks together."""
    from tombola.study.steps.joint import alone

    place = folder(cell)
    if place is None:
        return
    tasks = tuple(name(one) for one in alone(cell))
    cost = cost_of((one for one in cell.needed() if one.step in JOINT), folder)
    for i, task in enumerate(tasks):
        report, selection = (score_in(place / f"task-{i}", role) for role in ("report", "selection"))
        assert report is not None and selection is not None
        yield _level_row(cell, cell, task, labels, report, selection, cost, tasks)


def _trained(cell: Cell, folder: Folder, name: Callable[[Cell], str], labels: Mapping[str, str]) -> TrainedRow | None:
    """None for a mask that owes nothing to a chain or to the base, and for one that is not trained yet."""
    ticket, dense = cell.inputs.get("ticket"), cell.inputs.get("dense")
    if not isinstance(ticket, Cell) or not isinstance(dense, Cell):
        return None
    said, place, home = _mask_of(ticket, name), folder(cell), folder(dense)
    if said is None or place is None or home is None:
        return None
    (mask, source, of), mine, theirs = said, score_in(place), score_in(home)
    if mine is None or theirs is None:
        return None
    chained = of.step == "round"
    start, settings = cell.inputs.get("start"), ticket.settings
    began = "base"
    if isinstance(start, Cell):
        began = f"{'early' if start.step == 'snapshot' else 'trained'} on {name(start)}"
    return TrainedRow(
        cell=cell.key,
        model=str(cell.settings["model"]["name"]),
        task=name(cell),
        seed=cell.settings["seeds"]["run"],
        chain=labels[of.key] if chained else "",
        mask=mask,
        source=source,
        mask_seed=of.settings["seeds"]["run"],
        draw=int(settings.get("draw", settings.get("options", {}).get("draw", 0))),
        sparsity=of.settings["cuts"]["to"] if chained else of.settings["search"]["sparsity"],
        start=began,
        metric=mine.metric,
        value=mine.value,
        n=mine.n,
        majority=mine.majority,
        dense=theirs.value,
    )


def _mask_of(ticket: Cell, name: Callable[[Cell], str]) -> tuple[str, str, Cell] | None:
    """What a mask is, of which task it is, and the cell that was found: the round, or the mask of the base."""
    if ticket.step == "round":
        return "ticket", name(ticket), ticket
    if ticket.step == "base_mask":
        return f"base, {ticket.settings['search']['criterion']}", "", ticket
    if ticket.step not in ("control", "derive"):
        return None
    taken = [one for role, one in sorted(ticket.inputs.items()) if isinstance(one, Cell) and role != "dense"]
    first = ticket.inputs.get("ticket")
    below = _mask_of(first, name) if isinstance(first, Cell) else None
    if below is None or below[2].step != "round":
        return None
    if ticket.step == "control":
        return str(ticket.settings["kind"]), below[1], below[2]
    rule, options = ticket.settings["rule"], ticket.settings["options"]
    if rule in JOINING:
        return rule, " + ".join(sorted(name(one) for one in taken if one.step == "round")), below[2]
    said = ", ".join(f"{option} {value:g}" for option, value in sorted(options.items()) if option != "draw")
    return f"{rule} {said}".strip(), below[1], below[2]


def _barrier(cell: Cell, folder: Folder, name: Callable[[Cell], str], labels: Mapping[str, str]) -> BarrierRow | None:
    ends = [cell.inputs[role] for role in ("a", "b")]
    place = folder(cell)
    if place is None:
        return None
    at, chain = list[float](), ""
    for end in ends:
        ticket = end.inputs.get("ticket") if isinstance(end, Cell) else None
        if isinstance(ticket, Cell) and ticket.step == "round":
            chain = labels[ticket.key]
            at.append(ticket.settings["cuts"]["to"])
        else:
            at.append(0.0)
    return BarrierRow(
        cell=cell.key,
        model=str(cell.settings["model"]["name"]),
        task=name(cell),
        seed=cell.settings["seeds"]["run"],
        chain=chain,
        lower=at[0],
        upper=at[1],
        barrier=float(read_json(place / "result.json")["barrier"]["report"]),
    )


# ----------------------------------------------------------------------------------------------------------- over all cells


def _labels(cells: Iterable[Cell]) -> dict[str, str]:
    """Key of every round at hand or below → what its settings set apart from those of other chains of its task."""
    rounds = {one.key: one for cell in cells for one in cell.needed() if one.step in ("round", "joint_round")}
    said = {key: _settings_of(cell) for key, cell in rounds.items()}
    labels = {}
    for key, mine in said.items():
        peers = [other for other in said.values() if other["task"] == mine["task"]]
        differing = sorted({name for other in peers for name in other if str(other[name]) != str(mine.get(name))})
        together = [mine["task"]] if rounds[key].step == "joint_round" else []
        if mine["report_checkpoint"] == "best":  # never without its name
            differing = sorted({*differing, "report_checkpoint"})
        labels[key] = ", ".join([*together, *(f"{name}={mine[name]}" for name in differing if name in mine)])
    return labels


def _settings_of(cell: Cell) -> dict[str, Any]:
    """What two chains must share to be seeds of one; sparsity and level are of the round."""
    flat: dict[str, Any] = {"preset": cell.settings["preset"]}
    flat["report_checkpoint"] = cell.settings.get("report_checkpoint", "last")
    for part in ("data", "train", "search"):
        flat |= cell.settings.get(part, {})
    if cell.step == "joint_round":
        flat |= _settings_of_tasks(cell)
    model = cell.settings["model"]
    flat["model"] = f"{model['name']} {model['fingerprint'][:6]}"
    if cell.step == "round" and "mlm" in flat:  # of evaluation masks that are redrawn each seed has its own
        flat["mlm"] = flat["mlm"].get("weigh")
    return {name: value for name, value in flat.items() if name not in ("sparsity", "rows", "counts", "source")}


def _settings_of_tasks(cell: Cell) -> dict[str, Any]:
    """Of a round over several tasks the name of all, and what each sets where they differ."""
    from tombola.study.steps.joint import names_of

    left_out = ("rows", "counts", "source", "task")
    said = []
    for one in cell.settings["tasks"]:
        own = {name: value for name, value in one["data"].items() if name not in left_out} | {"batch_size": one["batch_size"]}
        said.append(own | ({"mlm": own["mlm"].get("weigh")} if "mlm" in own else {}))
    values = {name: [one[name] for one in said if name in one] for name in dict.fromkeys(name for one in said for name in one)}
    shown = {name: of[0] if all(one == of[0] for one in of) else of for name, of in values.items()}
    return {"task": one_body(names_of(cell))} | shown


def _joint_shared(
    cells: Iterable[Cell], folder: Folder, name: Callable[[Cell], str], labels: Mapping[str, str]
) -> Iterable[SharedRow]:
    """What the ticket of several tasks shares with the ticket of each alone: of the same base, seed, and options of the chain."""
    from tombola.study.steps.joint import alone

    def options(cell: Cell) -> str:
        said = {**cell.settings["search"], "preset": cell.settings["preset"]}
        return repr(sorted((one, value) for one, value in said.items() if one not in ("sparsity", *OF_MLM)))

    ends: dict[tuple[str, str, str, int, str], Cell] = {}  # model, label, options, seed, task → the last round
    for cell in cells:
        if cell.step in ("round", "joint_round") and cell.settings["cuts"] is not None and folder(cell) is not None:
            task = name(cell) if cell.step == "round" else ""
            where = str(cell.settings["model"]["fingerprint"]), labels[cell.key], options(cell)
            known = (*where, cell.settings["seeds"]["run"], task)
            if known not in ends or ends[known].settings["round"]["level"] < cell.settings["round"]["level"]:
                ends[known] = cell
    read: dict[str, Any] = {}

    def pruned_at(cell: Cell) -> Any:
        if cell.key not in read:
            read[cell.key] = _pruned_at(cell, folder)
        return read[cell.key]

    for (model, label, of, seed, task), cell in sorted(ends.items(), key=lambda one: one[0]):
        if task:
            continue
        tasks = {name(one) for one in alone(cell)}
        for (its_model, its_label, its, its_seed, own), other in sorted(ends.items(), key=lambda one: one[0]):
            if own in tasks and (its_model, its, its_seed) == (model, of, seed):
                for sparsity, overlap in _overlaps(*pruned_at(cell), *pruned_at(other)).items():
                    named = str(cell.settings["model"]["name"])
                    yield SharedRow(model=named, a=label, b=own, seed=seed, chain=its_label, sparsity=sparsity, overlap=overlap)


def _shared(cells: Iterable[Cell], folder: Folder, name: Callable[[Cell], str], labels: Mapping[str, str]) -> Iterable[SharedRow]:
    """Every pair of tasks whose chains have the same name, seed by seed, at each level that both have."""
    ends: dict[tuple[str, str, int, str], Cell] = {}
    for cell in cells:
        if cell.step == "round" and cell.settings["cuts"] is not None and folder(cell) is not None:
            key = (str(cell.settings["model"]["fingerprint"]), labels[cell.key], cell.settings["seeds"]["run"], name(cell))
            if key not in ends or ends[key].settings["round"]["level"] < cell.settings["round"]["level"]:
                ends[key] = cell
    groups: dict[tuple[str, str, int], dict[str, Cell]] = {}
    for (model, chain, seed, task), cell in sorted(ends.items(), key=lambda one: one[0]):
        groups.setdefault((model, chain, seed), {})[task] = cell
    for (_, chain, seed), by_task in groups.items():
        if len(by_task) < 2:
            continue
        read = {task: _pruned_at(cell, folder) for task, cell in by_task.items()}
        for a, b in combinations(by_task, 2):
            (at_a, of_a), (at_b, of_b) = read[a], read[b]
            for sparsity, overlap in _overlaps(at_a, of_a, at_b, of_b).items():
                model = str(by_task[a].settings["model"]["name"])
                yield SharedRow(model=model, a=a, b=b, seed=seed, chain=chain, sparsity=sparsity, overlap=overlap)


def _pruned_at(last: Cell, folder: Folder) -> "tuple[list[float], dict[str, Tensor]]":
    """Sparsities of the levels up to that of a round's ticket, and for each value the level at which it goes."""
    from tombola.levels import Levels
    from tombola.ticket import Ticket

    cells = [last]
    while isinstance(before := cells[0].inputs.get("ticket"), Cell):
        cells.insert(0, before)
    places = [folder(cell) for cell in cells]
    masks = [Ticket.from_pretrained(place / "ticket").mask for place in places if place is not None]
    return [cell.settings["cuts"]["to"] for cell in cells], dict(Levels.of(masks).pruned_at)


def _overlaps(
    at_a: Sequence[float], of_a: "Mapping[str, Tensor]", at_b: Sequence[float], of_b: "Mapping[str, Tensor]"
) -> "dict[float, Overlap]":
    """Sparsity that both have → what their masks share: one count of every pair of levels serves them all."""
    import numpy as np

    n_a, n_b = len(at_a) + 1, len(at_b) + 1
    counts = np.zeros(n_a * n_b, dtype=np.int64)
    for name, levels in of_a.items():
        # never removed counts as the level after the last
        a, b = (np.where(one.numpy() == 0, n, one.numpy()).reshape(-1) - 1 for one, n in ((levels, n_a), (of_b[name], n_b)))
        counts += np.bincount(a.astype(np.int64) * n_b + b, minlength=n_a * n_b)
    table = counts.reshape(n_a, n_b)
    found = {}
    for i, sparsity in enumerate(at_a, start=1):
        near = [j for j, other in enumerate(at_b, start=1) if abs(other - sparsity) < 1e-9]
        if near and sparsity < 1:
            j = near[0]
            sizes = int(table[i:].sum()), int(table[:, j:].sum())
            found[sparsity] = stats.overlap_of_counts(int(table.sum()), *sizes, int(table[i:, j:].sum()))
    return found
