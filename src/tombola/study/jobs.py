"""The verbs: find, controls, retrain, evaluate, compare. Each turns what a user asks into cells and has a lab run them.

`plan_*` only describes (for `--dry-run` and for larger studies); the verb of the same name runs and returns values.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tombola.anatomy import Layout
from tombola.bias import BIAS_MODELS
from tombola.errors import SettingsError, TicketError, TombolaError
from tombola.losses import LOSSES, LossSettings
from tombola.mask import Mask
from tombola.search import SEARCHES
from tombola.search.imp import ImpSettings
from tombola.search.learned import check_learned
from tombola.store import CELL
from tombola.study import ranks
from tombola.study.cells import Cell, Given, Lab, read_json, read_rows
from tombola.study.data import base_folder, check_parts, encoded_rows, named, rows_said, source_of, task_data, task_of
from tombola.study.derived import check_rule
from tombola.study.kinds import CONTROL_KINDS, TRAIN_MODES
from tombola.study.lesions import Cut, check_cut
from tombola.study.presets import DEFAULT, Rung, ladder
from tombola.study.settings import GROUPS, RetrainSettings, Settings, options_of, resolve
from tombola.study.steps import STEPS
from tombola.study.steps.shared import ticket_of
from tombola.tasks import Task, get_task
from tombola.ticket import Ticket, fingerprint_files, fingerprint_folder, resolve_model

if TYPE_CHECKING:
    from tombola.study.chains import Chain


@dataclass(frozen=True, slots=True)
class Found:
    """The cells of one seed of a find: the dense model, the good ticket, its score as pruned."""

    seed: int
    dense: Cell
    search: Cell
    pruned: Cell  # of a chain of rounds: the score of its last level, trained
    chain: "Chain | None" = None  # of iterative magnitude pruning

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.dense, self.search, self.pruned) if self.chain is None else self.chain.cells


@dataclass(frozen=True, slots=True)
class Tested:
    """The cells of one ticket under test, good or control: itself, its score as pruned and, when asked for, retrained."""

    ticket: Cell | Given
    pruned: Cell
    retrained: Cell | None

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(c for c in (self.ticket, self.pruned, self.retrained) if isinstance(c, Cell))


def machine() -> dict[str, Any]:
    """Device kind and thread count: results are bit-identical only where both are the same, so they are part of a cell.

    With several ranks (torchrun) their number too.
    """
    import torch

    here = {"device": "cuda" if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads()}
    return here | ({"ranks": ranks.size()} if ranks.size() > 1 else {})


def plan_find(
    lab: Lab,
    model: str,
    task: str | Task,
    settings: Settings,
    run_seeds: Sequence[int],
    layout: Sequence[Layout] | None = None,
    *,
    design: str | None = None,
) -> list[Found]:
    """The cells of finding a ticket, one `Found` per run seed. Reads the data and, unless all are in the store, the model's
    parts; computes nothing. `layout` says where the parts are, for a model that cannot be read by structure. `design` marks
    runs that are no seeds of a study, so that results never average them with those.

    Raises: TombolaError for an unknown model, DataError for an unknown task or bad data, and as `check_parts`.
    """
    if settings.method == "imp":
        from tombola.study.chains import plan_chains

        chains = plan_chains(lab, model, task, settings, run_seeds, layout)
        return [Found(one.seed, one.dense, one.levels[-1], one.last, one) for one in chains]
    if settings.method == "learned":
        check_learned(settings.search, cell=True)
    common = common_settings(lab, model, task, settings, layout)
    found = []
    for run, seeds in zip(run_seeds, settings.seeds, strict=True):
        shared = common | {"seeds": {"run": run} | asdict(seeds)}
        training = shared | {"train": settings.train.plain(), "keep_weights": True} | ({"design": design} if design else {})
        loss, mask_loss = settings.loss, getattr(settings.search, "mask_loss", "ce")
        teacher = {"teacher": step_cell("fine_tune", training)} if "teacher" in LOSSES[loss.loss].needs else {}
        dense = step_cell("fine_tune", training | loss.plain(loss.loss), **plan_bias(common, loss, loss.loss), **teacher)
        searching = {"method": settings.method, "preset": settings.preset, "search": settings.search_in_use}
        learning = loss.plain(mask_loss), plan_bias(common, loss, mask_loss)  # the teacher of a mask is the model itself
        search = step_cell("search", searching | learning[0], model=dense, **learning[1])
        found.append(Found(run, dense, search, step_cell("evaluate", shared, ticket=search, weights=dense)))
    if any(lab.store.load(one.search.key) is None for one in found):
        objective = task_of(lab, common["data"]["task"], common["data"].get("source")).objective
        check_parts(lab, common["model"], objective, getattr(settings.search, "scope", None))
    return found


def plan_bias(common: Mapping[str, Any], settings: LossSettings, loss: str) -> dict[str, Cell]:
    """{"bias": the cell of the bias-only model that a loss needs}, or nothing. One for all seeds: it depends on rows alone.

    Raises: SettingsError when no bias-only model is named.
    """
    if "bias" not in LOSSES[loss].needs:
        return {}
    if settings.bias_model not in BIAS_MODELS:
        known = ", ".join(BIAS_MODELS)
        raise SettingsError([TombolaError(f"the loss {loss} needs a bias_model", got=settings.bias_model, expected=known)])
    said = {"bias_model": settings.bias_model, "predictions": settings.bias_predictions, "vectors": settings.bias_vectors}
    base = {"model": common["model"]} if settings.bias_vectors == "model" else {}
    return {"bias": step_cell("bias", {"data": common["data"], "bias": said} | base)}


def plan_controls(
    ticket: Cell | Given, dense: Cell, kinds: Sequence[str], draws: int, settings: Settings, *, retrain: bool
) -> list[Tested]:
    """The cells of `draws` controls of each kind for a good ticket that was found on `dense`.

    Raises: SettingsError for unknown or repeated kinds and for fewer than one draw, all at once.
    """
    problems = []
    for kind in kinds:
        if kind not in CONTROL_KINDS:
            near = difflib.get_close_matches(kind, CONTROL_KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else None
            problems.append(TombolaError(f"unknown kind of control {kind!r}", expected=", ".join(CONTROL_KINDS), next=hint))
    if len(set(kinds)) < len(kinds):
        problems.append(TombolaError("a kind of control is given twice", got=", ".join(kinds)))
    if draws < 1 or not kinds:
        problems.append(
            TombolaError("nothing is asked for", got=f"{len(kinds)} kinds × {draws} draws", expected="at least one of each")
        )
    if problems:
        raise SettingsError(problems)
    controls = []
    for kind in kinds:
        options = asdict(replace(settings.control, **CONTROL_KINDS[kind].changes))
        for draw in range(draws):
            taken = step_cell("control", {"kind": kind, "draw": draw, "control": options}, ticket=ticket)
            controls.append(plan_test(taken, dense, settings.retrain, retrain=retrain))
    return controls


def plan_test(ticket: Cell | Given, dense: Cell, options: RetrainSettings = RetrainSettings(), *, retrain: bool) -> Tested:
    """The cells that test one ticket: its score as pruned and, when asked for, retrained."""
    pruned = step_cell("evaluate", shared_settings(dense), ticket=ticket, weights=dense)
    return Tested(ticket, pruned, plan_retrain(ticket, dense, options) if retrain else None)


def plan_retrain(
    ticket: Cell | Given,
    dense: Cell,
    options: RetrainSettings = RetrainSettings(),
    *,
    keep_weights: bool = False,
    epochs: int | None = None,
    loss: LossSettings | None = None,
    start: Cell | None = None,
    taking: Literal["body", "all"] = "body",
) -> Cell:
    """The cell of training a ticket's mask from the base, as `dense` was trained (same rows, seeds, schedule).

    epochs: another number of them, with a schedule of its own. loss: another one, with `dense` as teacher where it needs one.
    start: a cell with weights to start from instead of the base, without its head ("body") or with it ("all").
    """
    train = dense.settings["train"] | ({} if epochs is None else {"epochs": epochs})
    settings = shared_settings(dense) | {"train": train, "retrain": options.said(), "keep_weights": keep_weights}
    known = {name: one for name, one in dense.inputs.items() if name in ("bias", "teacher")}
    if loss is not None:
        settings, known = settings | loss.plain(loss.loss), dict(plan_bias(dense.settings, loss, loss.loss))
        known |= {"teacher": dense} if "teacher" in LOSSES[loss.loss].needs else {}
    elif "loss" in dense.settings:
        settings |= {"loss": dense.settings["loss"]}
    if start is not None:
        settings, known = settings | {"start": taking}, known | {"start": start}
    return step_cell("retrain", settings, ticket=ticket, dense=dense, **known)


def plan_base_mask(
    dense: Cell, criterion: str, sparsity: float, *, scope: str, granularity: str = "global", rows: int = 128
) -> Cell:
    """The cell of a mask of the pre-trained weights of `dense`'s base, for its task.

    rows: of train, for a criterion that looks at any.
    """
    search = {"criterion": criterion, "sparsity": sparsity, "scope": scope, "granularity": granularity}
    said = {"train": dense.settings["train"], "method": "one-shot", "preset": DEFAULT, "search": search, "rows": rows}
    return step_cell("base_mask", shared_settings(dense) | said)


def plan_barrier(a: Cell, b: Cell, points: int = 11) -> Cell:
    """The cell of the straight line between two trained models of one task, whose cells keep their weights."""
    return step_cell("barrier", shared_settings(a) | {"points": points}, a=a, b=b)


def plan_train_mode(mode: str, dense: Cell) -> Cell:
    """The cell of training the base in another mode of `TRAIN_MODES` than `dense`, on the same rows, by the same seeds and
    schedule; its predictions are compared with those of `dense`. Raises: SettingsError for an unknown mode.
    """
    if mode not in TRAIN_MODES:
        raise SettingsError([TombolaError(f"there is no train mode {mode!r}", expected=", ".join(TRAIN_MODES))])
    settings = shared_settings(dense) | {"train": dense.settings["train"], "mode": mode, "keep_weights": False}
    return step_cell("train_mode", settings, dense=dense)


def plan_derived(rule: str, ticket: Cell | Given, others: Sequence[Cell | Given] = (), **options: Any) -> Cell:
    """The cell of a ticket made from others by a rule of `tombola.study.derived`; base and seeds are those of `ticket`.

    Raises: SettingsError as `check_rule`.
    """
    check_rule(rule, options)
    taken = {f"other_{i}": one for i, one in enumerate(others)}
    return step_cell("derive", {"rule": rule, "options": options}, **taken, ticket=ticket)


def plan_lesion(cut: Cut, dense: Cell, ticket: Cell | Given | None = None) -> Cell:
    """The cell of one lesion of a dense model, in all its places; of removed heads with the ticket that removes them.

    Raises: SettingsError as `check_cut`.
    """
    check_cut(cut)
    taken = {} if ticket is None else {"ticket": ticket}
    return step_cell("lesion", shared_settings(dense) | {"lesion": asdict(cut)}, weights=dense, **taken)


@dataclass(frozen=True, slots=True)
class RungCells:
    """The cells of one rung of a ladder, over all its seeds."""

    rung: Rung
    found: tuple[Found, ...]
    tested: tuple[Tested, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(cell for cells in (*(f.cells for f in self.found), *(t.cells for t in self.tested)) for cell in cells)


def plan_ladder(
    lab: Lab,
    model: str,
    task: str | Task,
    text: str,
    values: Mapping[str, Any],
    run_seeds: Sequence[int],
    own_seeds: Mapping[str, int] | None = None,
    *,
    method: str = "s-prune",
    kinds: Sequence[str] = (),
    draws: int = 1,
    retrain: bool = False,
    layout: Sequence[Layout] | None = None,
) -> list[RungCells]:
    """The cells of every rung of the ladder "A:B"; work that rungs share is one cell.

    `values`, and what the task implies, are set on every rung, whatever its preset says; an option set so makes no rung.
    Raises: as `resolve` and `plan_find`.
    """
    rungs, values = [], {**implied(task, method), **values}
    for rung in ladder(text, options_of(method) - values.keys()):
        settings = resolve({**rung.values, **values}, run_seeds, own_seeds, method=method, preset=rung.preset)
        found = plan_find(lab, model, task, settings, run_seeds, layout)
        tested = [plan_test(one.search, one.dense, settings.retrain, retrain=retrain) for one in found] if retrain else []
        for one in found:
            if kinds:
                tested += plan_controls(one.search, one.dense, kinds, draws, settings, retrain=retrain)
        rungs.append(RungCells(rung, tuple(found), tuple(tested)))
    return rungs


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
    resolved = resolve({**implied(task, method), **settings}, seeds, own_seeds, method=method, preset=preset)
    layouts = Layout.from_yaml(layout) if isinstance(layout, Path | str) else (layout,) if isinstance(layout, Layout) else layout
    lab = lab or open_lab(store, data)
    planned = plan_find(lab, model, task, resolved, seeds, layouts)
    lab.run([cell for found in planned for cell in found.cells])
    return [found_ticket(lab, found) for found in planned]


def implied(task: str | Task, method: str) -> dict[str, Any]:
    """Settings that a task sets where the user does not: rows it has for choosing masks are what masks are chosen on; and a
    share of a log-likelihood, which is negative, is a share of what it is above its line."""
    if isinstance(task, str) and task.startswith("hub:"):
        return {}
    known = task if isinstance(task, Task) else get_task(task)
    said = {"selection_split": "validation"} if "selection" in known.splits else {}
    options = options_of(method)
    if not known.labels and "floor_rule" in options:
        said["floor_rule"] = "fraction_above_baseline"
    if known.metric != "pearson" and "stsb_stop_metric" in options:
        said["stsb_stop_metric"] = "pearson"  # plays no part, and makes no rung
    return said


def found_ticket(lab: Lab, found: Found) -> Ticket:
    """The found ticket with its scores on the rows it was not chosen on, full and pruned, among its metrics."""
    if found.chain is None:
        ticket, stage = ticket_of(lab, found.search), "pruned"
    else:
        from tombola.study.chains import nested

        ticket, stage = nested(lab, found.chain), "retrained"
    measured = [
        {name: row[name] for name in ("split", "metric", "value", "n", "majority")} | {"what": what}
        for what, cell in (("full", found.dense), (stage, found.pruned))
        for row in read_rows(lab.folder(cell) / "scores.jsonl")
        if row["role"] != "selection"
    ]
    return replace(ticket, metrics=(*ticket.metrics, *measured))


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


def common_settings(
    lab: Lab, model: str, task: str | Task, settings: Settings, layout: Sequence[Layout] | None = None
) -> dict[str, Any]:
    """What every cell of a run shares: model, data (with the fingerprints of the rows) and machine."""
    spec = named(lab, task)
    if ("model", model) not in lab.cache:  # hashed once a run, though every experiment of a study asks
        source = resolve_model(model)
        identity = {"name": source.name, "revision": source.revision, "fingerprint": source.fingerprint}
        lab.cache["model", model] = identity | {"files": fingerprint_files(source.folder)}
    data = asdict(settings.data)
    if data["report_rows"] is None:  # what is not asked for is not said: cells made before there was such a cap keep their keys
        del data["report_rows"]
    objective = task_of(lab, spec, source_of(lab, spec).get("source")).objective
    if objective.kind == "masked":  # likewise said only where it plays a part
        options = settings.search if settings.method == "imp" else ImpSettings()
        data["mlm"] = {"eval_seed": 0, "weigh": options.mlm_accuracy_weight}
    if objective.kind != "span":
        del data["stride"]
    by_hand = {} if layout is None else {"layout": [one.plain() for one in layout]}  # for the same reason only when given
    return {
        "model": lab.cache["model", model] | by_hand,
        "data": {"task": spec} | data | rows_said(lab, spec, data) | source_of(lab, spec),
        "machine": dict(lab.machine or machine()),
    }


def shared_settings(dense: Cell) -> dict[str, Any]:
    """What all cells that stand on a dense model say as it does."""
    return {name: dense.settings[name] for name in ("model", "data", "machine", "seeds")}


def step_cell(step: str, settings: Mapping[str, Any], **inputs: Cell | Given) -> Cell:
    """The cell of a step of today's version."""
    return Cell(step, STEPS[step].version, settings, inputs)
