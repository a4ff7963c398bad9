"""The steps that train: fine_tune, retrain and train_mode."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tombola.anatomy import Anatomy, read_anatomy
from tombola.cut import prove_same, shrink
from tombola.errors import CheckpointError, TombolaError
from tombola.gates import hold, lesion_of, prove_acts
from tombola.lesion import LESIONS, copy_values
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.order import Stretch
from tombola.scope import SCOPES, scope_parameters
from tombola.source import fingerprint_folder
from tombola.study import ranks
from tombola.study.cells import Cell, Lab, write_json
from tombola.study.data import TaskData, base_folder, encoded_rows, layout_of, same_data, save_tokenizer, tokenizer_of
from tombola.study.kinds import TRAIN_MODES, TrainMode
from tombola.study.settings import RetrainSettings
from tombola.study.steps.looks import BEST, Answers, Looks, epoch_ends, looking, looks_folder
from tombola.study.steps.losses import loss_of
from tombola.study.steps.shared import lesion_seed, predict_all, read_predictions, run_seeds, taken_ticket, write_scores
from tombola.ticket import Ticket
from tombola.train import RunSeeds, TrainLog, TrainSettings, fine_tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]
Result = TypeVar("Result")


def run_training(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """fine_tune, retrain and train_mode: base weights, new head; with a ticket its mask is held throughout.

    Goes on where it was killed.
    """
    data, settings, ticket = same_data(cell, lab), cell.settings, taken_ticket(cell, lab)
    model, log, said, looks = resumable(cell, lab, lambda checkpoints: _trained(cell, lab, data, ticket, checkpoints, progress))
    predictions: Answers = predict_all(cell, lab, data, model)
    seen: dict[str, Any] = {}
    if looks is not None:
        predictions, seen = looks.best(data, predictions, log.steps)
    dense = read_predictions(lab.folder(cell.inputs["dense"])) if "dense" in cell.inputs else None
    kind = TRAIN_MODES[settings["mode"]].kind if "mode" in settings else "full"
    write_scores(cell, out, data, predictions, dense, ticket, stage="full" if dense is None else "retrained", kind=kind)
    train = asdict(log) | {"rows": len(data.train), "rows_dropped_as_leaked": data.leaked} | seen
    if settings["keep_weights"] and ranks.rank() == 0:  # transformers writes nothing on the others
        model.save_pretrained(out / "weights")
        save_tokenizer(tokenizer_of(lab, cell), out / "weights")
        train["weights_fingerprint"] = fingerprint_folder(out / "weights")
    write_json(out / "train.json", train)
    told = [*data.doubts, *([] if looks is None else [BEST])]
    doubts = {} if dense is not None or not told else {"of_data": told}  # of each task once
    if said or doubts:
        write_json(out / "result.json", {"warnings": said} | doubts)


def resumable(cell: Cell, lab: Lab, work: "Callable[[Path | None], Result]") -> "Result":
    """What `work` gives, told where the checkpoints of this cell are; anew where it cannot go on from what is there."""
    # Of several ranks each would need the random state of its own: what is killed there starts anew.
    checkpoints = lab.store.scratch(cell.key) / "training" if ranks.size() == 1 else None
    try:
        return work(checkpoints)
    except CheckpointError as error:  # what a cell cannot go on from, it starts without, and from the base: weights may be read
        lab.reporter.say(f"{error}\n  starting this run anew")
        assert checkpoints is not None
        lab.store.scratch(cell.key)  # raises when they are a successor's by now
        shutil.rmtree(checkpoints)
        return work(checkpoints)


def _trained(
    cell: Cell, lab: Lab, data: TaskData, ticket: Ticket | None, checkpoints: Path | None, progress: Progress
) -> "tuple[PreTrainedModel, TrainLog, list[str], Looks | None]":
    """The base after training, what was done, what a user would not expect, and the looks that were taken at it."""
    settings, seeds = cell.settings, run_seeds(cell.settings)
    device = settings["machine"]["device"]
    model = load_weights(base_folder(lab, settings["model"]), data.task.objective, head_seed=seeds.head)
    anatomy = read_anatomy(model, layout_of(settings["model"]))
    model.to(device)
    if "start" in cell.inputs:
        _start_from(cell, lab, model, anatomy)
    said: list[str] = []
    if ticket is not None:
        model, said = _prepare_retraining(cell, lab, model, anatomy, ticket)
    if "mode" in settings:
        prepare_mode(TRAIN_MODES[settings["mode"]], model, anatomy, seeds)
    if settings["train"]["epochs"] == 0 and not data.task.objective.causal:
        said.append("nothing was trained (epochs 0): the task head was drawn, and scores are those of chance")
    train, rows = TrainSettings(**settings["train"]), encoded_rows(lab, cell, "train", data.train)
    looks = None
    if settings.get("report_checkpoint") == "best":
        steps = settings["stretch"]["steps"] if "stretch" in settings else train.steps_of(len(rows))
        at = epoch_ends(len(rows), train.batch_size, steps)
        looks = Looks(looks_folder(cell, lab), at, lambda: predict_all(cell, lab, data, model))
    log = fine_tune(
        model,
        rows,
        train,
        seeds,
        device=device,
        progress=lambda share: progress(0.9 * share),
        checkpoints=checkpoints,
        every_seconds=lab.checkpoint_seconds,
        ours=lambda: lab.store.scratch(cell.key),  # raises when this process was stalled and lost its lock to a successor
        recipe=looking(loss_of(cell, lab, data), *([] if looks is None else [looks])),
        stretch=Stretch(**settings["stretch"]) if "stretch" in settings else None,
    )
    return model, log, said, looks


def _start_from(cell: Cell, lab: Lab, model: "PreTrainedModel", anatomy: Anatomy) -> None:
    """The weights of another cell in place of the base's: all of them, or without the task's head.

    A head of another task is never taken, though it may have as many classes.
    """
    start = cell.inputs["start"]
    assert isinstance(start, Cell)
    objective = same_data(start, lab).task.objective
    other = load_weights(lab.folder(start) / "weights", objective, head_seed=0)
    head = set(SCOPES["head"](model, anatomy)) if cell.settings["start"] == "body" else set()
    copy_values(model, other, [name for name, _ in model.named_parameters() if name not in head])


def prepare_mode(mode: TrainMode, model: "PreTrainedModel", anatomy: Anatomy, seeds: RunSeeds) -> None:
    """Weights drawn again, and all but the task's head frozen, as the mode says."""
    if mode.random:
        LESIONS["random-init"](model, anatomy, lesion_seed(seeds.mask, 0))
    if mode.frozen:
        head = set(SCOPES["head"](model, anatomy))
        if not head:
            raise TombolaError(
                "nothing is left to train",
                got=f"{type(model).__name__} without a head of the task's own",
                expected="a classifier",
                next="leave the frozen train modes out for this task",
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)


def _prepare_retraining(
    cell: Cell, lab: Lab, model: "PreTrainedModel", anatomy: Anatomy, ticket: Ticket
) -> "tuple[PreTrainedModel, list[str]]":
    """The weights a ticket is trained again from, with its mask held, or cut out; and what a user would not expect."""
    options, mask = RetrainSettings(**cell.settings["retrain"]), ticket.mask
    said = []
    if options.retrain_start == "pretrained_keep_tuned_embeddings":
        tuned = load_weights(lab.folder(cell.inputs["dense"]) / "weights", ticket.objective, head_seed=0)
        copy_values(model, tuned, scope_parameters(model, anatomy, "embeddings"))
    lesion_of(ticket)(model, anatomy)
    if options.empty_layer_bias == "mask_keeps_shrink_drops" and mask.heads is not None:
        emptied = [one.o for one, heads in zip(anatomy.attentions, mask.heads, strict=True) if not bool(heads.any())]
        biases = {f"{o.path}.bias": torch.zeros(o.n_out, dtype=torch.bool) for o in emptied if o.has_bias}
        mask = mask & Mask(values=biases)
        if biases:
            said.append(f"retrained without the bias of the attention output of {len(biases)} emptied layers, as released")
    prove_acts(model, anatomy, mask)
    if not options.retrain_shrunk:
        hold(model, anatomy, mask)
        return model, said
    if mask.values:
        raise TombolaError(
            "single values cannot be trained shrunk",
            got="a mask of single values, or empty_layer_bias mask_keeps_shrink_drops",
            expected="a ticket of heads, MLPs, neurons or layers",
            next="leave retrain_shrunk out: the mask is then held while the model trains",
        )
    small = shrink(model, mask, anatomy)  # no filling up: what would fill a group would be trained
    prove_same(model, anatomy, mask, small)
    return small, said
