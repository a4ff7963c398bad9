"""The verbs on a store: find, compare, and what becomes of a ticket that a user names. Their cells are described in
`tombola.study.runs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tombola.anatomy import Layout
from tombola.errors import SettingsError, TicketError, TombolaError
from tombola.evaluate import over_rows
from tombola.mask import Mask
from tombola.search import SEARCHES
from tombola.source import fingerprint_folder
from tombola.store import CELL
from tombola.study.cells import Cell, Given, Lab, read_json, read_rows
from tombola.study.data import base_folder, encoded_rows, named, task_data, task_of
from tombola.study.presets import DEFAULT
from tombola.study.runs import (
    Found,
    common_settings,
    implied,
    plan_find,
    plan_retrain,
    plan_test,
    plan_tuned,
    shared_settings,
    step_cell,
)
from tombola.study.settings import GROUPS, RetrainSettings, Settings, options_of, resolve
from tombola.study.steps.shared import read_predictions, ticket_of
from tombola.tasks import Task
from tombola.ticket import Ticket


def find(
    model: str,
    task: str | Task,
    *,
    method: str = "s-prune",
    preset: str = DEFAULT,
    seeds: Sequence[int] = (0,),
    store: "Path | str" = "tombola-store",
    data: "Path | str | None" = None,
    own_seeds: Mapping[str, int] | None = None,
    layout: "Layout | Sequence[Layout] | Path | str | None" = None,
    lab: Lab | None = None,
    **settings: Any,
) -> list[Ticket]:
    """A good ticket for each run seed: fine-tune `model` on `task`, then search while the score holds the floor.

    model      a Hub name (pinned to a commit, recorded), a local folder, or "demo"
    task       a name ("sst2", "qnli:train=train_from_dev", "hub:imdb"), or what `files_task` or `hub_task` made
    data       a folder in the layout of `--data`; None reads the Hub (generated tasks need neither)
    method     "s-prune" (whole parts to a floor), "m-prune" (single values to a floor), "one-shot" (to a sparsity), "imp" (train,
               prune, rewind, in rounds; the ticket has all levels), "learned" (scores, by gradient descent)
    preset     "paper", "released" or "corrected": what every setting is that is not given
    settings   any field of the settings' classes by its name, e.g. floor=0.9, train_rows=4000, scope="body"
    own_seeds  head, data, dropout or mask, to set one of the four alone
    layout     where the parts of the model are, or a YAML file that says so: for a model that cannot be read by structure.
               It is part of the cells, stands in the ticket, and holds for all that is done with the ticket later

    Every run is a cell of `store`; asking again loads it. Raises: TombolaError and its kinds; SettingsError holds every
    wrong setting at once.
    """
    resolved = resolve({**implied(task, method, settings, preset), **settings}, seeds, own_seeds, method=method, preset=preset)
    layouts = Layout.from_yaml(layout) if isinstance(layout, Path | str) else (layout,) if isinstance(layout, Layout) else layout
    lab = lab or open_lab(store, data)
    planned = plan_find(lab, model, task, resolved, seeds, layouts)
    lab.run([cell for found in planned for cell in found.cells])
    return [found_ticket(lab, found) for found in planned]


def found_ticket(lab: Lab, found: Found) -> Ticket:
    """The found ticket with its scores on the rows it was not chosen on, full and pruned, among its metrics."""
    if found.chain is None:
        ticket, stage = ticket_of(lab, found.search), "pruned"
    else:
        from tombola.study.chains import nested

        ticket, stage = nested(lab, found.chain), "retrained"
    measured = [row for what, cell in (("full", found.dense), (stage, found.pruned)) for row in _measured(lab, cell, what)]
    return replace(ticket, metrics=(*ticket.metrics, *measured))


def tested_ticket(lab: Lab, name: str) -> Ticket:
    """TICKET as `read_ticket`, with what this store knows of it: scores on the rows it was not chosen on, as `found_ticket`."""
    ticket, taken = read_ticket(lab, name), resolve_ticket(lab, name)
    try:
        dense = _found_on(lab, name)
    except TicketError:  # of another place
        return ticket
    cells = ("full", dense), ("pruned", plan_test(taken, dense, retrain=False).pruned)
    known = [row for what, cell in cells if lab.store.load(cell.key) is not None for row in _measured(lab, cell, what)]
    said = {(row.get("what"), row["split"], row["metric"]) for row in known}
    others = [row for row in ticket.metrics if (row.get("what"), row["split"], row["metric"]) not in said]
    return replace(ticket, metrics=(*others, *known))


def tuned_factors(lab: Lab, name: str) -> dict[str, Tensor]:
    """The factors of mask tuning of a ticket of this store, by path of the projection; computed where they are not known.

    Raises: TicketError for a ticket of another place; MaskError as `tombola.tuned.tune`.
    """
    cell = plan_tuned(resolve_ticket(lab, name), _found_on(lab, name))
    lab.run([cell])
    factors: dict[str, Tensor] = load_file(lab.folder(cell) / "factors.safetensors")
    return factors


def _measured(lab: Lab, cell: Cell, what: str) -> list[dict[str, Any]]:
    """The scores of a cell, but those on selection rows, as a ticket has them: with an interval over rows where there is one."""
    folder, found = lab.folder(cell), list[dict[str, Any]]()
    predictions = read_predictions(folder)
    for row in read_rows(folder / "scores.jsonl"):
        if row["role"] == "selection":
            continue
        said = {name: row[name] for name in ("split", "metric", "value", "n", "majority")} | {"what": what}
        spread = over_rows([predictions[row["role"]]], row["metric"])
        found.append(said | ({} if spread.low is None else {"low": spread.low, "high": spread.high}))
    return found


def method_of(ticket: Ticket) -> str:
    """The method a ticket was found by; of one from elsewhere, the one whose settings such a mask would have."""
    said = ticket.settings.get("method")
    return str(said) if said in SEARCHES else "one-shot" if ticket.mask.values else "s-prune"


def test_settings(ticket: Ticket, changes: Mapping[str, Any], preset: str | None = None) -> Settings:
    """The settings by which a ticket is tested: those of its preset (or another), where `changes` does not say otherwise."""
    return resolve(changes, (ticket.seeds.get("run", 0),), method=method_of(ticket), preset=preset or ticket.preset)


def refuse_unused(lab: Lab, ticket: str, changes: Mapping[str, Any], verb: str, groups: Sequence[str]) -> None:
    """Raises: SettingsError naming each setting that the ticket's method has and that plays no part in this verb."""
    used = [field.name for group in groups for field in fields(GROUPS[group])]
    unused = changes.keys() & options_of(method_of(read_ticket(lab, ticket))) - set(used)
    expected = ", ".join(used)
    problems = [TombolaError(f"{n} plays no part in {verb}", got=changes[n], expected=expected) for n in sorted(unused)]
    if problems:
        raise SettingsError(problems)


def plan_retrain_on(lab: Lab, ticket: str, task: str | Task | None, changes: Mapping[str, Any]) -> Cell:
    """The cell of `tombola retrain TICKET TASK`: the ticket's own settings and seeds, where `changes` does not say otherwise."""
    refuse_unused(lab, ticket, changes, "retrain", ("data", "train", "retrain"))
    own = {field.name for field in fields(RetrainSettings)}
    options = test_settings(read_ticket(lab, ticket), {name: value for name, value in changes.items() if name in own}).retrain
    others = {name: value for name, value in changes.items() if name not in own}
    return plan_retrain(resolve_ticket(lab, ticket), dense_of(lab, ticket, task, others), options, keep_weights=True)


def plan_evaluate(lab: Lab, ticket: str, task: str | Task | None, weights: str, changes: Mapping[str, Any]) -> Cell:
    """The cell of `tombola evaluate TICKET TASK --weights base|found_on|PATH`; nothing is trained but, if missing, found_on."""
    refuse_unused(lab, ticket, changes, "evaluate", ("data", "train"))
    taken, dense = resolve_ticket(lab, ticket), dense_of(lab, ticket, task, changes)
    shared = shared_settings(dense)
    if weights == "base":
        return step_cell("evaluate", shared, ticket=taken)
    if weights == "found_on":
        return step_cell("evaluate", shared, ticket=taken, weights=_found_on(lab, ticket))
    folder = Path(weights)
    if not (folder / "config.json").is_file():
        raise TombolaError(
            "there are no such weights", got=weights, expected="base, found_on, or a folder written by save_pretrained"
        )
    return step_cell("evaluate", shared, ticket=taken, weights=Given(fingerprint_folder(folder), folder, "weights"))


def seconds_per_row_pass(lab: Lab, cell: Cell) -> float:
    """About how long one row takes once through the model here: a few rows of the task, timed. For estimates only."""
    import time

    from tombola.evaluate import predict
    from tombola.objective import load_weights

    dense = cell.run
    assert dense is not None
    data = task_data(lab, dense.settings["data"]["task"], dense.settings["data"])
    rows = data.train.take(range(0, len(data.train), max(1, len(data.train) // 96)))
    encoded = encoded_rows(lab, dense, "calibration", rows)
    model = load_weights(base_folder(lab, dense.settings["model"]), data.task.objective, head_seed=0)
    model.to(dense.settings["machine"]["device"])
    predict(model, encoded)  # the first pass pays for set-up
    started = time.perf_counter()
    predict(model, encoded)
    return (time.perf_counter() - started) / len(rows)


def compare(lab: Lab, tickets: Sequence[str]) -> dict[str, Any]:
    """Sizes of two or more tickets, and their overlap pair by pair beside what their sizes alone would give."""
    from tombola import stats

    if len(tickets) < 2:
        raise TombolaError("nothing to compare", got=f"{len(tickets)} ticket", expected="two or more")
    read = [read_ticket(lab, name) for name in tickets]
    rows = [
        {
            "ticket": name,
            "kind": t.kind,
            "task": t.task,
            "sparsity": t.sparsity,
            "kept": {n: k for n, (k, _) in t.mask.counts_by_type().items()},
        }
        for name, t in zip(tickets, read, strict=True)
    ]
    pairs = []
    for i, a in enumerate(read):
        for j in range(i + 1, len(read)):
            for part, one in a.mask.overlap_by_type(read[j].mask).items():
                pairs.append({"a": tickets[i], "b": tickets[j], "part": part} | asdict(one))
    kappa = {}
    for part in dict.fromkeys(one["part"] for one in pairs):
        masks = [t.mask for t in read]
        if part == "values":  # of the parameters that all of them mask
            common = [name for name in masks[0].values if all(name in mask.values for mask in masks)]
            masks = [Mask(values={name: mask.values[name] for name in common}) for mask in masks]
        if any(part not in mask.counts_by_type() for mask in masks):  # what two share, a third does not have
            continue
        estimate = stats.fleiss_kappa([mask.flat(part) for mask in masks])
        kappa[part] = {"value": estimate.value, "low": estimate.low, "high": estimate.high, "note": estimate.note}
    return {"tickets": rows, "pairs": pairs, "fleiss_kappa": kappa}


# ------------------------------------------------------------------------------------------------------------- resolving


def open_lab(store: "Path | str", data: "Path | str | None" = None) -> Lab:
    """A silent lab on a store and, where given, a folder of data."""
    from tombola.store import Store

    return Lab(Store(Path(store)), None if data is None else Path(data))


def resolve_ticket(lab: Lab, name: str) -> Cell | Given:
    """TICKET as an input: the cell of the store that made it where that is there, else the folder as it is.

    `name` is a folder, a Hub repository, or the start of a cell's key.
    """
    folder = _ticket_folder(lab, name)
    ticket = Ticket.from_pretrained(folder)
    cell = _stored(lab, ticket.cell)
    if cell is not None and ticket_of(lab, cell).identity == ticket.identity:
        return cell
    return Given(ticket.identity, folder, "ticket")


def read_ticket(lab: Lab, name: str) -> Ticket:
    """The ticket of a folder, a Hub repository, or the start of a cell's key."""
    return Ticket.from_pretrained(_ticket_folder(lab, name))


def dense_of(lab: Lab, name: str, task: str | Task | None = None, changes: Mapping[str, Any] | None = None) -> Cell:
    """The fine_tune cell a ticket is to be held against: the one it was found on, for its own task and settings.

    For another task (or `changes`) it is the same base, trained on that task with the ticket's settings and seeds otherwise.
    """
    ticket = read_ticket(lab, name)
    spec = None if task is None else named(lab, task)
    if (spec is None or spec == ticket.task) and not changes:
        try:
            return _found_on(lab, name)
        except TicketError:
            pass
    if spec is None and ticket.task is None:
        raise TicketError("the ticket does not say for which task it is", got=name, next="name the task after the ticket")
    # A ticket from elsewhere does not say how its model was trained: then the preset does.
    said = dict(ticket.settings.get("data", {})) | dict(ticket.settings.get("train", {}))
    values = {name: value for name, value in said.items() if name not in ("task", "rows", "counts", "source", "mlm")}
    if task is not None and spec != ticket.task and values.get("selection_split") == "validation":
        del values["selection_split"]  # of rows that the other task need not have
    values |= ({} if task is None else implied(task, method_of(ticket))) | dict(changes or {})
    resolved = resolve(values, (ticket.seeds.get("run", 0),), method=method_of(ticket), preset=ticket.preset)
    if spec is None:
        task_of(lab, str(ticket.task), said.get("source"))  # its rows are brought here, or it is said that they are not
    common = common_settings(lab, ticket.base.name, str(ticket.task) if spec is None else spec, resolved, ticket.layout)
    if common["model"]["fingerprint"] != ticket.base.fingerprint:
        raise TicketError(
            f"the weights of {ticket.base.name} are not those this ticket was made for",
            got=common["model"]["fingerprint"], expected=ticket.base.fingerprint, next="use the revision it was made with",
        )  # fmt: skip
    settings = common | {"seeds": {"run": 0} | dict(ticket.seeds), "train": resolved.train.plain(), "keep_weights": True}
    return step_cell("fine_tune", settings)


def _found_on(lab: Lab, name: str) -> Cell:
    """The fine_tune cell a ticket of this store was found on."""
    cell = resolve_ticket(lab, name)
    while isinstance(cell, Cell):
        if cell.step == "fine_tune":
            return cell
        below = (cell.inputs.get(role) for role in ("model", "dense", "ticket"))
        cell = next((one for one in below if one is not None), Given("", Path(), "none"))
    raise TicketError(
        "this ticket was not made in this store, so the weights it was found on are not known to it",
        got=name,
        next="pass --store FOLDER, or --weights PATH with the weights it was found on",
    )


def _ticket_folder(lab: Lab, name: str) -> Path:
    import re

    if Path(name).is_dir() or not re.fullmatch(r"[0-9a-f]{4,32}", name):
        return Path(name)
    key = lab.store.find(name)
    folder = lab.store.load(key)
    if folder is None or not (folder / "ticket").is_dir():
        raise TicketError(f"cell {key} holds no ticket", next="`tombola store ls` lists search and control cells, which do")
    return folder / "ticket"


def _stored(lab: Lab, key: str | None) -> Cell | None:
    folder = None if key is None else lab.store.load(key)
    return None if folder is None else Cell.from_description(read_json(folder / CELL))
