"""The steps of a chain of iterative magnitude pruning: the snapshot of the rewind step, and the rounds."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tombola.anatomy import Anatomy, read_anatomy
from tombola.errors import SearchError
from tombola.gates import hold, prove_acts
from tombola.held import HeldValues
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.scope import SCOPES, scope_parameters
from tombola.search.imp import ImpSettings, Round, Snapshot, cut, order_seed
from tombola.source import hash_tensor
from tombola.study import ranks
from tombola.study.cells import Cell, Lab, read_json, write_json
from tombola.study.data import TaskData, base_folder, encoded_rows, layout_of, same_data, save_tokenizer, tokenizer_of
from tombola.study.steps.losses import loss_of
from tombola.study.steps.shared import predict_all, read_predictions, run_seeds, taken_ticket, write_scores
from tombola.study.steps.tickets import good_ticket
from tombola.study.steps.training import resumable
from tombola.ticket import Ticket, Weights
from tombola.train import Stretch, TrainLog, TrainSettings, fine_tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]
HEAD = "head.safetensors"  # of a round: the head it ended with, where the next one goes on from it


def run_snapshot(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """The base trained up to the rewind step: θ_i and γ_i, stored and never written to again."""
    data, settings, seeds = same_data(cell, lab), cell.settings, run_seeds(cell.settings)

    def trained(checkpoints: Path | None) -> "tuple[PreTrainedModel, TrainLog]":
        model = load_weights(base_folder(lab, settings["model"]), data.task.objective, head_seed=seeds.head)
        model.to(settings["machine"]["device"])
        return model, _train(cell, lab, data, model, checkpoints, Stretch(**settings["stretch"]), seeds.data, progress)

    model, log = resumable(cell, lab, trained)
    if ranks.rank() == 0:
        model.save_pretrained(out / "weights")
        save_tokenizer(tokenizer_of(lab, cell), out / "weights")
    write_json(out / "train.json", asdict(log) | {"rows": len(data.train), "snapshot": Snapshot(model).digest})


def run_round(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """One round: the mask of the level before, trained from the rewind step, and the mask of the next level.

    Its scores are those of the level it trains. Without a level to cut to it trains and scores the last one.
    """
    data, settings, ticket = same_data(cell, lab), cell.settings, taken_ticket(cell, lab)
    one = Round(**settings["round"])
    options = ImpSettings(**{name: value for name, value in settings["search"].items() if name != "sparsity"})
    log: TrainLog | None = None
    snapshot: str | None = None
    if "model" in cell.inputs:  # the dense model is what this round would train
        model = load_weights(lab.folder(cell.inputs["model"]) / "weights", data.task.objective, head_seed=0)
        anatomy = read_anatomy(model, layout_of(settings["model"]))
    else:
        model, anatomy, snapshot, log = resumable(
            cell, lab, lambda checkpoints: _trained(cell, lab, data, ticket, one, options, checkpoints, progress)
        )
    if log is not None:
        dense = read_predictions(lab.folder(cell.inputs["dense"]))
        if ticket is not None:  # of level 0 the dense model has its own
            write_scores(cell, out, data, predict_all(cell, lab, data, model), dense, ticket, stage="retrained")
        train = asdict(log) | {"rows": len(data.train), "rows_dropped_as_leaked": data.leaked, "snapshot": snapshot}
        write_json(out / "train.json", train)
    said: list[str] = []
    if settings["cuts"] is not None:
        said = _write_ticket(cell, lab, out, data, model, anatomy, ticket, options)
    if settings["keep_weights"] and ranks.rank() == 0:
        model.save_pretrained(out / "weights")
        save_tokenizer(tokenizer_of(lab, cell), out / "weights")
    if settings["keep_head"]:
        save_file({name: model.get_parameter(name).detach().cpu().clone() for name in SCOPES["head"](model, anatomy)}, out / HEAD)
    write_json(out / "result.json", {"warnings": said})


def _trained(
    cell: Cell,
    lab: Lab,
    data: TaskData,
    ticket: Ticket | None,
    one: Round,
    options: ImpSettings,
    checkpoints: Path | None,
    progress: Progress,
) -> "tuple[PreTrainedModel, Anatomy, str, TrainLog | None]":
    """The model at the end of the round, the digest of the rewind step, and what was done."""
    settings, seeds, objective = cell.settings, run_seeds(cell.settings), data.task.objective
    taken = cell.inputs.get("snapshot")
    folder = base_folder(lab, settings["model"]) if taken is None else lab.folder(taken) / "weights"
    model = load_weights(folder, objective, head_seed=seeds.head)
    anatomy = read_anatomy(model, layout_of(settings["model"]))
    snapshot = Snapshot(model)
    _same_snapshot(cell, lab, snapshot.digest)
    head = SCOPES["head"](model, anatomy)
    before = _round_before(cell)
    if one.start == "carried":
        assert before is not None
        Snapshot(load_weights(lab.folder(before) / "weights", objective, head_seed=0)).restore(model)
    elif one.head == "carried":
        assert before is not None
        with torch.no_grad():
            for name, value in _head_of(lab, before, head).items():
                model.get_parameter(name).copy_(value)
    mask = Mask() if ticket is None else ticket.mask
    model.to(settings["machine"]["device"])
    if ticket is not None:
        prove_acts(model, anatomy, mask)
        hold(model, anatomy, mask)
    if one.start == "snapshot":
        snapshot.check(model, mask, carried=head if one.head == "carried" else ())
    digest = snapshot.digest
    del snapshot  # a whole model: not to be there while moments are
    if one.level == 0 and options.mlm_first_cut == "before_training":
        return model, anatomy, digest, None
    stretch = Stretch(
        steps=one.steps, schedule_steps=one.schedule_steps, rows_from=one.rows_from, schedule_from=one.schedule_from
    )
    order = order_seed(seeds.data, one.data_round)
    log = _train(cell, lab, data, model, checkpoints, stretch, order, lambda share: progress(0.9 * share))
    wrong = [name for name, kept in mask.values.items() if bool(model.get_parameter(name).detach().cpu()[~kept].ne(0).any())]
    if wrong:
        raise SearchError("removed values moved while the round was trained", got=", ".join(wrong[:5]), expected="exactly 0")
    return model, anatomy, digest, log


def _train(
    cell: Cell,
    lab: Lab,
    data: TaskData,
    model: "PreTrainedModel",
    checkpoints: Path | None,
    stretch: Stretch,
    order: int,
    progress: Progress,
) -> TrainLog:
    return fine_tune(
        model,
        encoded_rows(lab, cell, "train", data.train),
        TrainSettings(**cell.settings["train"]),
        replace(run_seeds(cell.settings), data=order),
        device=cell.settings["machine"]["device"],
        progress=progress,
        checkpoints=checkpoints,
        every_seconds=lab.checkpoint_seconds,
        ours=lambda: lab.store.scratch(cell.key),
        stretch=stretch,
        recipe=loss_of(cell, lab, data),
    )


def _round_before(cell: Cell) -> Cell | None:
    """The cell that has what the round before ended with: itself, or the dense model that stands for it."""
    before = cell.inputs.get("ticket")
    if not isinstance(before, Cell):
        return None
    model = before.inputs.get("model")
    return model if isinstance(model, Cell) else before


def _head_of(lab: Lab, before: Cell, names: list[str]) -> dict[str, Tensor]:
    """The head that a round ended with."""
    folder = lab.folder(before)
    if (folder / HEAD).is_file():
        return dict(load_file(folder / HEAD))
    weights = load_file(folder / "weights" / "model.safetensors")
    return {name: weights[name] for name in names if name in weights}


def _same_snapshot(cell: Cell, lab: Lab, digest: str) -> None:
    """Raises: SearchError when the rewind step has other weights than the rounds before had it with."""
    before = cell.inputs.get("ticket")
    while isinstance(before, Cell):
        file = lab.folder(before) / "train.json"
        if file.is_file():
            found = read_json(file)["snapshot"]
            if found != digest:
                raise SearchError(
                    "the weights of the rewind step are not those that the chain began with",
                    got=digest,
                    expected=found,
                    next="run the chain anew in a store of its own, with one version of everything",
                )
            return
        before = before.inputs.get("ticket")


def _write_ticket(
    cell: Cell,
    lab: Lab,
    out: Path,
    data: TaskData,
    model: "PreTrainedModel",
    anatomy: Anatomy,
    before: Ticket | None,
    options: ImpSettings,
) -> list[str]:
    """The ticket of the next level, within that of the level before; says what a user would not expect."""
    if before is None:
        kept = {
            name: torch.ones(p.shape, dtype=torch.bool) for name, p in scope_parameters(model, anatomy, options.scope).items()
        }
    else:
        kept = dict(before.mask.values)
    held = HeldValues.on(model)
    if held is not None:
        held.enforce()
    cuts = cell.settings["cuts"]
    mask = Mask(values=cut(model, kept, options, since=cuts["since"], to=cuts["to"]))
    anatomy.check(mask)
    heads, mlps = anatomy.survival(mask)
    ticket = good_ticket(
        cell,
        cell,
        mask=mask,
        found_on=Weights(f"{cell.settings['model']['name']}, round {cuts['level']} on {data.task.name}", _fingerprint(model)),
        anatomy=anatomy,
        scope=options.scope,
        objective=data.task.objective,
        details={"level": cuts["level"], "survival": {"heads": heads.tolist(), "mlps": mlps.tolist()}},
        parents=() if before is None else (before.identity,),
    )
    if before is None:
        ticket.save_pretrained(out / "ticket")
    else:
        taken = cell.inputs["ticket"]
        assert isinstance(taken, Cell)
        ticket.save_pretrained(out / "ticket", within=(before, f"../../{taken.key}/ticket"))
    return ["the mask keeps none of the values: the network is empty"] if mask.is_empty else []


def _fingerprint(model: "PreTrainedModel") -> str:
    """Of the weights a round ended with, as of a folder they would be written to; tied tensors once."""
    digest, seen = hashlib.sha256(), set[int]()
    for name, value in sorted(model.state_dict().items()):
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            hash_tensor(digest, name, value.detach().cpu())
    return digest.hexdigest()[:32]
