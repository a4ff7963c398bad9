"""What the cells of a store say, as plain rows: the one thing the report and the tables read.

A number never travels alone: every `ScoreRow` carries its split, the number of rows it was measured on, its seed and
the majority line of that split. `collect` reads them from a store.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola import stats
from tombola.study.begin import Curve, curves_of
from tombola.study.beside_rows import AttentionRow, CrossedMask, LandscapeRow, Magnitude, MapSample, SubgroupRow, rows_beside
from tombola.study.chain_rows import JOINT, ChainRows, chain_rows
from tombola.study.frontier import Frontier, read_frontiers
from tombola.study.kinds import CONTROL_KINDS, TRAIN_MODES
from tombola.study.robust_rows import RobustRow, robust_rows
from tombola.study.variants import Variant, epochs_of, flat_settings, how_found, short_names, variants_of

if TYPE_CHECKING:
    from torch import Tensor

    from tombola.store import Store
    from tombola.study.cells import Cell, Lab
    from tombola.study.runs import RungCells

# "full" = the dense fine-tuned model; "lesion" = that model with a part destroyed; those of TRAIN_MODES = a dense model
# trained otherwise; "bag-of-words" = a linear model of words; the others are tickets
KINDS = ("full", "good", *CONTROL_KINDS, *(mode.kind for mode in TRAIN_MODES.values()), "bag-of-words", "lesion")
STAGES = ("full", "pruned", "retrained")  # pruned = mask on found_on; retrained = mask on base, trained again


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the predictions of a masked model differ from those of the dense model of the same seed, on the same rows.

    Of a regression there is the mean difference alone: values do not flip, and are not right or wrong.
    """

    flips: int | None  # rows whose predicted class changed
    n: int  # rows compared
    lost: int | None  # rows the dense model has right and this one wrong
    gained: int | None  # rows this one has right and the dense model wrong
    dense_counts: Mapping[str, int]  # class name -> rows the dense model gives that class
    counts: Mapping[str, int]  # class name -> rows this model gives that class
    mean_difference: float | None = None  # mean |value − value of the dense model|, in units of the label


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One score of one model on one split."""

    cell: str  # fingerprint of the cell it comes from
    model: str  # name of the base, e.g. "demo"
    task: str
    seed: int
    kind: str  # one of KINDS
    stage: str  # one of STAGES
    draw: int  # 0 for full and good; the number of the draw for controls
    split: str  # e.g. "validation", "challenge"
    role: str  # "selection" (rows the mask was chosen on) | "report" | "challenge"
    metric: str  # e.g. "accuracy", "matthews"
    value: float
    n: int  # rows
    majority: float  # the same metric for always answering the most frequent class of this split, or one and the same value
    agreement: Agreement | None = None  # None for the dense model itself
    lesion: str = ""  # of kind "lesion": what was done where, e.g. "redraw q+k, layers 3-4"; no two are to be averaged
    search: str = ""  # how the ticket was found: a name of SEARCHED, or a method; "" of models without one
    # "as found"; a family of `derived.RULES` (joined, super, size-matched); "found on TASK", of a ticket tested on another task;
    # "" of models without a ticket
    family: str = ""
    epochs: int | None = None  # of the training that this model comes from last
    preset: str = ""  # of the search; "" of models without one


@dataclass(frozen=True, slots=True)
class PathStep:
    """One trial of a search: a mask was tried, scored, and kept or rolled back."""

    step: int
    phase: str  # "full", then "joint" | "heads" | "mlps" | "m-prune"
    kept: Mapping[str, int]  # part → entries, "values" for single values of all parameters
    score: float  # on the selection rows
    passed: bool


@dataclass(frozen=True, slots=True)
class ImportanceStep:
    """What a search of heads and MLPs went by at one trial: the importance of what was left, and where the next one cut."""

    step: int  # as in `PathStep`
    heads: tuple[float, ...]  # of the heads still there, as they are ranked: scaled within layers where the search does so
    mlps: tuple[float, ...]
    head_cut: float | None  # between those removed next and those kept; None where nothing was, or the ranks are not these
    mlp_cut: float | None


@dataclass(frozen=True, slots=True)
class TicketRow:
    """One ticket: what it keeps, how large it is, and how it was found."""

    cell: str
    model: str
    task: str
    seed: int
    kind: str  # one of KINDS
    draw: int
    heads: tuple[tuple[float, ...], ...]  # [layer][head], share of it that is kept: 1 or 0 where whole heads are removed
    mlps: tuple[float, ...]  # [layer], likewise; of neurons the share of them
    body_share: float  # surviving share of the maskable values: of heads and MLPs, or of the scope of single values
    total_share: float  # surviving share of all parameters of the model, in [0, 1]
    scope: str = "heads+mlps"
    values: tuple[int, int] | None = None  # (kept, all) single values of an unstructured ticket
    shared_with_good: Mapping[str, int] = field(default_factory=dict)  # part → kept by this control and its good ticket too
    head_importance: tuple[tuple[float, ...], ...] | None = None  # raw mean |dL/dξ| of the dense model, good only
    mlp_importance: tuple[float, ...] | None = None  # of a ticket of layers theirs, of one of neurons their mean
    path: tuple[PathStep, ...] = ()
    floor_score: float | None = None  # the score the mask had to hold on the selection rows
    full_score: float | None = None  # of the dense model on the selection rows
    selection_rows: int | None = None  # rows the mask was chosen on
    neurons: tuple[bool, ...] = ()  # all of them in the order of layers, where the mask is of neurons
    steps: tuple[ImportanceStep, ...] = ()  # good tickets of heads and MLPs only
    search: str = ""  # as of a ScoreRow
    family: str = ""
    preset: str = ""


@dataclass(frozen=True, slots=True)
class Results:
    """Everything a page shows. `settings` and `provenance` are flat name -> printable value."""

    scores: tuple[ScoreRow, ...]
    tickets: tuple[TicketRow, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    provenance: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # said by the cells themselves; the page adds those it can see from the rows
    lesions: tuple[ScoreRow, ...] = ()  # scores of kind "lesion", which stand apart: each names its lesion
    variants: Mapping[str, Variant] = field(default_factory=dict)  # `task` of rows → what it stands for
    command: str = ""  # what computes these cells again, where a study asked for them
    attention: tuple[AttentionRow, ...] = ()
    map_samples: tuple[MapSample, ...] = ()
    magnitudes: tuple[Magnitude, ...] = ()
    subgroups: tuple[SubgroupRow, ...] = ()
    landscape: tuple[LandscapeRow, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    begin: tuple[Curve, ...] = ()  # of start points that were probed
    robust: tuple[RobustRow, ...] = ()  # of tasks with challenge rows, where anything was learned or trained against a bias
    crossed: tuple[CrossedMask, ...] = ()  # tickets of the crossed design, which are no seeds of a study
    # Tables of `tombola.study.overlap`, where `with_shared` made them: it reads masks and predictions again
    shared_values: tuple[Any, ...] = ()
    shared_errors: tuple[Any, ...] = ()
    transfers: tuple[Any, ...] = ()
    chains: ChainRows = field(default_factory=ChainRows)  # levels of chains of rounds, and what was made of their masks


def collect(store: "Store", keys: Collection[str] | None = None) -> Results:
    """Everything the finished cells of a store say, or those of them in `keys`; sorted: the same store gives the same page."""
    from tombola.ticket import reading_chains

    with reading_chains():
        return _collect(store, keys)


def _collect(store: "Store", keys: Collection[str] | None) -> Results:
    from tombola.study.cells import cell_of, read_json, read_rows
    from tombola.study.cost import total_cost

    scores: list[ScoreRow] = []
    lesions: list[ScoreRow] = []
    tickets: list[TicketRow] = []
    warnings: dict[str, None] = {}  # in order, each once
    settings: dict[str, object] = {}
    made_with: dict[str, object] = {}
    beside: dict[str, list[Any]] = {}
    entries = sorted((one for one in store.entries() if keys is None or one.key in keys), key=lambda entry: entry.key)
    cells = {key: cell for key, cell in ((entry.key, cell_of(entry)) for entry in entries) if "task" in flat_settings(cell)}
    of_several = {entry.key: entry.folder for entry in entries if entry.key in cells and cells[entry.key].step in JOINT}
    joint = {key: cells.pop(key) for key in of_several}  # of no task alone: there are rows of chains of them, and no others
    # Of a cell of no task there is nothing to show, and what was trained with and without its weights kept is one run.
    twins = {one.without_weights for one in cells.values() if one.step == "retrain" and one.settings["keep_weights"]}
    entries = [entry for entry in entries if entry.key in cells and entry.key not in twins]
    entries.sort(key=lambda entry: _from_the_first(cells[entry.key]))
    variants = variants_of(cells)
    stands_for: dict[str, Variant] = {}
    again = (cell for cell in cells.values() if cell.step == "retrain")
    trained_again = {cell.inputs["ticket"].key for cell in again} & {_trained(c).key for c in cells.values() if c.step == "round"}
    short = short_names(str(flat_settings(cell)["task"]) for cell in cells.values())
    crossed = _crossed(cells)
    for entry in entries:
        cell, folder = cells[entry.key], entry.folder
        if entry.key in crossed:
            ticket = _ticket_row(entry.key, folder)
            said = asdict(ticket) | {f"{name}_seed": seed for name, seed in crossed[entry.key].items()} | how_found(cell)
            said = {name: said[name] for name in CrossedMask.__dataclass_fields__}
            names = [short[ticket.task] + variant for variant in variants[entry.key]]
            beside.setdefault("crossed", []).extend(CrossedMask(**said | {"task": task}) for task in names)
        if _is_of_design(cell):
            continue
        stands_for |= {(one := replace(of, task=short[of.task])).task + text: one for text, of in variants[entry.key].items()}
        for name, found in (("scores.jsonl", scores), ("lesions.jsonl", lesions)):
            if (folder / name).is_file():
                how, of = how_found(cell), dict(variants.get(_trained(cell).key, variants[entry.key]))
                if _trained(cell).key in trained_again:  # two runs of one seed are not to be averaged as one
                    of = {f"{text[:-1] or ' ('}{', ' * bool(text)}in its chain)": one for text, one in of.items()}
                    stands_for |= {(one := replace(v, task=short[v.task])).task + text: one for text, v in of.items()}
                rows = [replace(_score_row(entry.key, row), **how, epochs=epochs_of(cell)) for row in read_rows(folder / name)]
                found += [replace(row, task=short[row.task] + variant) for variant in of for row in rows]
        if (folder / "ticket").is_dir():
            ticket = replace(_ticket_row(entry.key, folder), **how_found(cell))
            tickets += [replace(ticket, task=short[ticket.task] + variant) for variant in variants[entry.key]]
        for name, own in rows_beside(entry.key, folder).items():
            how = how_found(cell) if name == "landscape" else {}
            named = [replace(row, task=short[row.task] + variant, **how) for variant in variants[entry.key] for row in own]
            beside.setdefault(name, []).extend(named)
        if (folder / "result.json").is_file():
            where = _where(cell.settings, tickets[-1] if (folder / "ticket").is_dir() else None)
            result = read_json(folder / "result.json")
            warnings |= dict.fromkeys(f"{where}{said}" for said in result["warnings"])
            if "of_data" in result:  # the same for every seed and setting of a task
                warnings |= dict.fromkeys(f"{short[cell.settings['data']['task']]}: {said}" for said in result["of_data"])
        if cell.step in ("fine_tune", "search"):
            _note(settings, cell.settings)
        if (folder / "provenance.json").is_file():
            _note(
                made_with,
                {name: value for name, value in read_json(folder / "provenance.json").items() if name not in ("started", "cost")},
            )
    seconds = made_with.pop("seconds", None)
    total = f"{sum(seconds):.0f} s in {len(seconds)} cells" if isinstance(seconds, list) else None
    provenance = {"store": str(store.root.resolve()), "cells": len(entries)} | ({"computing": total} if total else {})
    spent = total_cost(store, [*(entry.key for entry in entries), *joint])
    if spent.cells:
        provenance["cost"], provenance["energy"] = spent.lines()
    further: dict[str, Any] = {name: tuple(rows) for name, rows in beside.items()}
    places = {entry.key: entry.folder for entry in entries} | of_several
    further["chains"] = chain_rows({key: (cells | joint)[key] for key in places}, lambda cell: places.get(cell.key), short)
    folders = {entry.key: entry.folder for entry in store.entries() if entry.key in cells}
    robust = robust_rows(cells, folders)
    return Results(
        tuple(sorted(scores, key=_order)),
        tuple(sorted(tickets, key=_order)),
        {name: _shown(value) for name, value in settings.items() if name not in ("rows", "counts")},
        provenance | {name: _shown(value) for name, value in made_with.items()},
        tuple(warnings),
        tuple(sorted(lesions, key=_order)),
        variants=stands_for,
        frontiers=tuple(read_frontiers(store, keys)),
        robust=robust,
        begin=curves_of(cells, folders, robust),
        **further,
    )


def _from_the_first(cell: "Cell") -> tuple[str, ...]:
    """The keys of a chain up to a round, so that sorted by it levels follow each other; of any other cell its own."""
    from tombola.study.cells import Cell

    before = cell.inputs.get("ticket") if cell.step == "round" else None
    return (*(_from_the_first(before) if isinstance(before, Cell) else ()), cell.key)


def _trained(cell: "Cell") -> "Cell":
    """The cell whose ticket the scores of a cell are of: a round trains the level before the one that it holds."""
    from tombola.study.cells import Cell

    before = cell.inputs.get("ticket") if cell.step == "round" else None
    return before if isinstance(before, Cell) else cell


def _is_of_design(cell: "Cell") -> bool:
    """Whether a cell is of a run that is no seed of a study, see `plan_find`."""
    return any("design" in one.settings for one in cell.needed())


def _crossed(cells: "Mapping[str, Cell]") -> dict[str, Mapping[str, int]]:
    """Search cells of a crossed design → their seeds; with the ordinary run that is one combination of it."""

    def what(cell: "Cell") -> tuple[str, int, Mapping[str, int]]:
        seeds = next(one.settings["seeds"] for one in cell.needed() if "seeds" in one.settings)
        return repr(sorted(flat_settings(cell).items())), seeds["run"], seeds

    searches = {key: (_is_of_design(cell), *what(cell)) for key, cell in cells.items() if cell.step == "search"}
    designs = {(settings, run) for of_design, settings, run, _ in searches.values() if of_design}
    return {
        key: {name: seed for name, seed in seeds.items() if name in ("head", "data", "dropout")}
        for key, (of_design, settings, run, seeds) in searches.items()
        if of_design or ((settings, run) in designs and len(set(seeds.values())) == 1)
    }


def ladder_rows(lab: "Lab", rungs: "Sequence[RungCells]") -> list[dict[str, Any]]:
    """For each rung what it changes, the share its good tickets keep, and its scores on the report rows.

    `scores` and `minus_first` have an Estimate (value, low, high, std, n_seeds) for each "kind, stage": over seeds, of the mean
    over draws; the second of the difference to the first rung within each seed.
    """
    from tombola.anatomy import size_of
    from tombola.study.presets import OPTIONS, preset_values
    from tombola.study.steps.shared import ticket_of

    def by_seed(rows: list[ScoreRow]) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, list[float]]] = {}
        for row in rows:
            found.setdefault(f"{row.kind}, {row.stage}", {}).setdefault(row.seed, []).append(row.value)
        return {what: {seed: sum(of) / len(of) for seed, of in seeds.items()} for what, seeds in found.items()}

    said, first = [], None
    for one in rungs:
        scored = [
            cell for cell in one.cells if cell.step != "round" or cell.settings["cuts"] is None
        ]  # of a chain its last level
        rows = [row for row in scores_of(lab, scored) if row.role == "report"]
        rows = [row for row in rows if row.metric == rows[0].metric]
        scores = by_seed(rows)
        first = first or scores
        tickets = [ticket_of(lab, found.search) for found in one.found]
        before = preset_values(rungs[0].rung.preset)
        changes = [f"{name}: {before[name]} → {value}" for name, value in one.rung.values.items() if name in OPTIONS]
        minus = {
            what: asdict(stats.over_seeds([value - first[what][seed] for seed, value in seeds.items() if seed in first[what]]))
            for what, seeds in scores.items()
            if what in first and first is not scores
        }
        said.append(
            {
                "rung": one.rung.name,
                "change": "; ".join(changes) or "all of the preset",
                "kept_share": stats.over_seeds([size_of(t.anatomy, t.mask).body_share for t in tickets]).value,
                "metric": rows[0].metric,
                "split": rows[0].split,
                "n": rows[0].n,
                "seeds": len(tickets),
                "scores": {what: asdict(stats.over_seeds(list(seeds.values()))) for what, seeds in scores.items()},
                "minus_first": minus,
            }
        )
    return said


def scores_of(lab: "Lab", cells: "Sequence[Cell]") -> list[ScoreRow]:
    """The score rows of these finished cells, each cell once."""
    from tombola.study.cells import read_rows

    folders = {cell.key: lab.folder(cell) for cell in cells}
    files = {key: folder / "scores.jsonl" for key, folder in folders.items()}
    return [_score_row(key, row) for key, file in files.items() if file.is_file() for row in read_rows(file)]


def _score_row(key: str, row: dict[str, Any]) -> ScoreRow:
    said = row.pop("agreement")
    return ScoreRow(cell=key, **row, agreement=None if said is None else Agreement(**said))


def _ticket_row(key: str, folder: Path) -> TicketRow:
    from safetensors.torch import load_file

    from tombola.anatomy import size_of
    from tombola.ticket import Ticket

    ticket = Ticket.from_pretrained(folder / "ticket")
    size, details = size_of(ticket.anatomy, ticket.mask), ticket.details
    steps = load_file(folder / "steps.safetensors") if (folder / "steps.safetensors").is_file() else {}
    dense = {name: of[0] for name, of in steps.items() if name.endswith("_importance")}
    of_heads, of_mlps = dense.get("head_importance"), dense.get("mlp_importance")
    if dense and ticket.scope in ("neurons", "layers"):  # what could be removed decides, and that alone
        of_heads, of_mlps = None, dense["neuron_importance"].mean(1) if ticket.scope == "neurons" else dense["layer_importance"]
    kept = details.get("survival") or {name: part.double().tolist() for name, part in ticket.mask.parts().items()}
    return TicketRow(
        cell=key,
        model=ticket.base.name,
        task=str(ticket.task),
        seed=ticket.seeds["run"],
        kind=ticket.kind,
        draw=details.get("draw", 0),
        heads=tuple(tuple(row) for row in kept["heads"]),
        mlps=tuple(kept["mlps"]),
        body_share=size.body_share,
        total_share=size.total_share,
        scope=ticket.scope,
        values=ticket.mask.counts_by_type().get("values"),
        shared_with_good=details.get("shared_with_good", {}),
        head_importance=None if of_heads is None else tuple(tuple(row) for row in of_heads.tolist()),
        mlp_importance=None if of_mlps is None else tuple(of_mlps.tolist()),
        path=tuple(PathStep(**step) for step in details.get("path", ()) if "passed" in step),  # of a method that tries masks
        floor_score=details.get("floor_score"),
        full_score=details.get("full_score"),
        selection_rows=next((m["n"] for m in ticket.metrics if m["split"] == "selection"), None),
        neurons=() if ticket.mask.neurons is None else tuple(ticket.mask.flat("neurons").tolist()),
        steps=_importance_steps(steps, ticket.settings["search"], details["path"])
        if ticket.scope == "heads+mlps" and steps
        else (),
    )


def _importance_steps(
    stored: "Mapping[str, Tensor]", settings: Mapping[str, Any], path: Sequence[Mapping[str, Any]]
) -> tuple[ImportanceStep, ...]:
    """Of every trial that passed, what it left and by which importance the next trial removed more."""
    from tombola.scores import normalise

    found = []
    for i, trial in enumerate(path):
        if not trial["passed"]:
            continue
        left = {unit: stored[unit][i].bool() for unit in ("heads", "mlps")}
        members = left["heads"] if settings.get("importance_norm_members") == "remaining_heads" else left["heads"] | True
        ranked = {"heads": normalise(stored["head_importance"][i], members), "mlps": stored["mlp_importance"][i]}
        cuts: dict[str, float | None] = {"heads": None, "mlps": None}
        for unit, scores in ranked.items() if i + 1 < len(path) else ():  # every trial starts from the last that passed
            kept = stored[unit][i + 1].bool()
            gone, stay = scores[left[unit] & ~kept], scores[kept]
            if len(gone) and len(stay) and gone.max() <= stay.min():
                cuts[unit] = float(gone.max() + stay.min()) / 2
        values = {unit: tuple(scores[left[unit]].tolist()) for unit, scores in ranked.items()}
        found.append(ImportanceStep(trial["step"], values["heads"], values["mlps"], cuts["heads"], cuts["mlps"]))
    return tuple(found)


def _order(row: "ScoreRow | TicketRow") -> tuple[Any, ...]:
    place = (row.model, row.task, KINDS.index(row.kind), row.seed, row.draw)
    return (*place, row.stage, row.lesion, row.role, row.metric) if isinstance(row, ScoreRow) else place


def _where(settings: Mapping[str, Any], ticket: "TicketRow | None") -> str:
    if ticket is not None:
        return f"{ticket.task}, seed {ticket.seed}: "
    seed = f", seed {settings['seeds']['run']}" if "seeds" in settings else ""
    return f"{settings['data']['task']}{seed}: " if "data" in settings else ""


def _note(seen: dict[str, object], settings: Mapping[str, Any]) -> None:
    """Adds settings to those seen, flat; a name with several values keeps all of them, in a list."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and name not in ("rows", "counts"):
            _note(seen, {key if name in ("data", "train", "search") else f"{name} {key}": one for key, one in value.items()})
        elif name not in ("rows", "counts"):
            values = seen.setdefault(name, [])
            if isinstance(values, list) and (value not in values or name == "seconds"):
                values.append(value)


def _shown(values: object) -> object:
    return ", ".join("all" if v is None else str(v) for v in values) if isinstance(values, list) else values
