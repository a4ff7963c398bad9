"""The cells of one run, described: the dense model, its search, controls, tests, ladders. `tombola.study.jobs` runs them."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tombola.anatomy import Layout
from tombola.bias import BIAS_MODELS, BIASED_LMS
from tombola.errors import SettingsError, TombolaError
from tombola.losses import LOSSES, LossSettings
from tombola.objective import Objective
from tombola.search.imp import ImpSettings
from tombola.search.learned import check_learned
from tombola.source import fingerprint_files, resolve_model
from tombola.study import ranks
from tombola.study.cells import Cell, Given, Lab
from tombola.study.data import check_parts, named, rows_said, source_of, task_of
from tombola.study.derived import check_rule
from tombola.study.kinds import CONTROL_KINDS, TRAIN_MODES
from tombola.study.lesions import Cut, check_cut
from tombola.study.presets import DEFAULT, Rung, ladder, preset_values
from tombola.study.settings import RetrainSettings, Settings, options_of, resolve
from tombola.study.steps import STEPS
from tombola.tasks import Task, get_task
from tombola.train import RunSeeds
from tombola.tuned import DAMP, LIMIT

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
    learned_on: str | Task | None = None,
    until: float = 1.0,
) -> list[Found]:
    """The cells of finding a ticket, one `Found` per run seed. Reads the data and, unless all are in the store, the model's
    parts; computes nothing. `layout` says where the parts are, for a model that cannot be read by structure. `design` marks
    runs that are no seeds of a study, so that results never average them with those. Of a mask that is learned, `learned_on` is
    another task, of the same classes, whose rows it is learned and chosen on; `until` is the share of fine-tuning, in [0, 1],
    after which it begins.

    Raises: TombolaError for an unknown model, DataError for an unknown task or bad data, and as `check_parts`.
    """
    if settings.method == "imp":
        from tombola.study.chains import plan_chains

        chains = plan_chains(lab, model, task, settings, run_seeds, layout)
        return [Found(one.seed, one.dense, one.levels[-1], one.last, one) for one in chains]
    if settings.method == "learned":
        check_learned(settings.search, cell=True)
    common = common_settings(lab, model, task, settings, layout)
    more: dict[str, Any] = {}
    if learned_on is not None:
        more = {"learned_on": common_settings(lab, model, learned_on, settings, layout)["data"]}
    objective = task_of(lab, common["data"]["task"], common["data"].get("source")).objective
    check_losses(objective, settings.loss, (settings.loss.loss, getattr(settings.search, "mask_loss", "ce")))
    found = []
    for run, seeds in zip(run_seeds, settings.seeds, strict=True):
        shared = of_seed(common, run, seeds)
        training = shared | training_until(settings, common, until) | {"keep_weights": True}
        training |= {"design": design} if design else {}
        loss, mask_loss = settings.loss, getattr(settings.search, "mask_loss", "ce")
        teacher = {"teacher": step_cell("fine_tune", training)} if "teacher" in LOSSES[loss.loss].needs else {}
        dense = step_cell("fine_tune", training | loss.plain(loss.loss), **plan_bias(common, loss, loss.loss), **teacher)
        searching = {"method": settings.method, "preset": settings.preset, "search": settings.search_in_use}
        learning = loss.plain(mask_loss), plan_bias(common, loss, mask_loss)  # the teacher of a mask is the model itself
        search = step_cell("search", searching | learning[0] | more, model=dense, **learning[1])
        found.append(Found(run, dense, search, step_cell("evaluate", shared, ticket=search, weights=dense)))
    check_base(lab, common, settings, [one.search for one in found])
    return found


def of_seed(common: Mapping[str, Any], run: int, seeds: RunSeeds) -> dict[str, Any]:
    """What the cells of one run seed share."""
    return {**common, "seeds": {"run": run} | asdict(seeds)}


def check_base(lab: Lab, common: Mapping[str, Any], settings: Settings, searches: Sequence[Cell]) -> None:
    """As `check_parts`, of what is to be searched; nothing where all searches are in the store."""
    if any(lab.store.load(one.key) is None for one in searches):
        objective = task_of(lab, common["data"]["task"], common["data"].get("source")).objective
        check_parts(lab, common["model"], objective, getattr(settings.search, "scope", None))


def training_until(settings: Settings, common: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
    """How a model is trained, up to a share of its steps; at 0 it stays the base, with a head that was drawn."""
    if share >= 1.0:
        return {"train": settings.train.plain()}
    steps = settings.train.steps_of(common["data"]["counts"]["train"])
    done = round(share * steps)
    if done == 0:
        return {"train": replace(settings.train, epochs=0, steps=None).plain()}
    stretch = {"steps": done, "schedule_steps": steps, "rows_from": 0, "schedule_from": 0}
    return {"train": settings.train.plain(), "stretch": stretch}


def check_losses(objective: Objective, settings: LossSettings, losses: Sequence[str]) -> None:
    """Raises: SettingsError with all that losses need and a model asked so cannot have; nothing of cross-entropy."""
    problems, used = [], [loss for loss in losses if loss != "ce"]
    of_tokens, needs = objective.kind == "tokens", {need for loss in used for need in LOSSES[loss].needs}
    if used and objective.kind not in ("classes", "tokens"):
        problems.append(
            TombolaError(
                "losses against a bias or a teacher are of classes, answered by a head, or of tokens, each from those before it",
                got=f"{', '.join(dict.fromkeys(used))} for a model that is asked for {objective.kind}",
                next="leave loss and mask_loss at ce for this task",
            )
        )
    if of_tokens and "teacher" in needs:
        problems.append(
            TombolaError("losses with a teacher are of classes", got=", ".join(used), expected="poe, reweight, focal")
        )
    if of_tokens and used and settings.reweight_normalisation == "dataset_mean":
        problems.append(TombolaError("dataset_mean is of rows with classes", expected="batch_weight_sum, none"))
    known: Mapping[str, object] = BIASED_LMS if of_tokens else BIAS_MODELS
    if "bias" in needs and settings.bias_model is not None and settings.bias_model not in known:
        kind = "tokens" if of_tokens else "classes"
        problems.append(TombolaError(f"the bias_model is none of {kind}", got=settings.bias_model, expected=", ".join(known)))
    if problems:
        raise SettingsError(problems)


def plan_bias(common: Mapping[str, Any], settings: LossSettings, loss: str) -> dict[str, Cell]:
    """{"bias": the cell of the bias-only model that a loss needs}, or nothing. One for all seeds: it depends on rows alone.

    Raises: SettingsError when no bias-only model is named.
    """
    if "bias" not in LOSSES[loss].needs:
        return {}
    if settings.bias_model is None:
        known = ", ".join([*BIAS_MODELS, *BIASED_LMS])
        raise SettingsError([TombolaError(f"the loss {loss} needs a bias_model", got=settings.bias_model, expected=known)])
    of_tokens = settings.bias_model in BIASED_LMS
    said: dict[str, str] = {"bias_model": settings.bias_model, "predictions": settings.bias_predictions}
    said |= {"vectors": settings.bias_vectors} | ({"prior": settings.bias_prior} if of_tokens else {})
    base = {"model": common["model"]} if settings.bias_vectors == "model" or of_tokens else {}
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


def plan_probe(found: Found, before: Cell | None = None, rows: int = 256) -> Cell:
    """The cell of what can be seen, at the point where a learned mask begins, of how it would begin.

    before: that of the point before it. rows: of train, that it looks at.
    """
    said = {name: found.search.settings[name] for name in ("search", "loss") if name in found.search.settings}
    taken = dict(found.search.inputs) | ({} if before is None else {"before": before})
    return step_cell("probe", shared_settings(found.dense) | said | {"probe": {"rows": rows}}, **taken)


def plan_tuned(ticket: Cell | Given, dense: Cell) -> Cell:
    """The cell of mask tuning: what the ticket keeps of the weights of `dense` is scaled, by least squares on selection rows."""
    return step_cell("tune", shared_settings(dense) | {"tuning": {"damp": DAMP, "limit": LIMIT}}, ticket=ticket, weights=dense)


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
    if "report_checkpoint" in dense.settings:
        settings |= {"report_checkpoint": dense.settings["report_checkpoint"]}
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
    rungs = []
    for rung in ladder(text, options_of(method) - {**implied(task, method, values), **values}.keys()):
        asked = {**rung.values, **implied(task, method, {**rung.values, **values}, rung.preset), **values}
        settings = resolve(asked, run_seeds, own_seeds, method=method, preset=rung.preset)
        found = plan_find(lab, model, task, settings, run_seeds, layout)
        tested = [plan_test(one.search, one.dense, settings.retrain, retrain=retrain) for one in found] if retrain else []
        for one in found:
            if kinds:
                tested += plan_controls(one.search, one.dense, kinds, draws, settings, retrain=retrain)
        rungs.append(RungCells(rung, tuple(found), tuple(tested)))
    return rungs


def implied(task: str | Task, method: str, given: Mapping[str, Any] | None = None, preset: str = DEFAULT) -> dict[str, Any]:
    """Settings that a task sets where the user does not (`given` are the user's): rows it has for choosing masks are what masks
    are chosen on; a share of a log-likelihood, which is negative, is a share of what it is above its line; SQuAD and masked
    language modelling are as long as the preset says. Options that play no part on this task are set too: they make no rung.
    """
    if isinstance(task, str) and task.startswith("hub:"):
        return {}
    known = task if isinstance(task, Task) else get_task(task)
    said: dict[str, Any] = {"selection_split": "validation"} if "selection" in known.splits else {}
    options, given = options_of(method), given or {}
    if method != "learned" and given.get("loss", "ce") == "ce":  # nothing is trained against a bias: they make no rungs
        said |= {"bias_predictions": "out_of_fold", "reweight_normalisation": "batch_weight_sum"}
    if not known.labels and "floor_rule" in options:
        said["floor_rule"] = "fraction_above_baseline"
    if known.metric != "pearson" and "stsb_stop_metric" in options:
        said["stsb_stop_metric"] = "pearson"  # plays no part, and makes no rung
    own = preset_values(preset, options) | dict(given)
    if "squad_epochs" in options:
        if known.form == "span" and not {"epochs", "steps"} & given.keys():
            said["epochs"] = own["squad_epochs"]
        else:
            said["squad_epochs"] = ImpSettings().squad_epochs
        if known.form == "masked" and not {"epochs", "steps", "batch_size"} & given.keys():
            said["batch_size"], said["steps"] = map(int, own["mlm_finetune_steps"].split("x"))
        else:
            said["mlm_finetune_steps"] = ImpSettings().mlm_finetune_steps
    return said


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
