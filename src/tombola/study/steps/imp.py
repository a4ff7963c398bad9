"""The steps of a chain of iterative magnitude pruning: the snapshot of the rewind step, and the rounds."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tombola.anatomy import Anatomy, read_anatomy
from tombola.errors import SearchError
from tombola.gates import hold, prove_acts
from tombola.held import HeldValues
from tombola.mask import Mask
from tombola.objective import Objective, load_weights
from tombola.order import Several, Stretch
from tombola.scope import SCOPES, scope_parameters
from tombola.search.imp import ImpSettings, Round, Snapshot, cut, order_seed
from tombola.source import hash_tensor
from tombola.study import ranks
from tombola.study.cells import Cell, Lab, read_json, write_json
from tombola.study.data import base_folder, encoded_rows, layout_of, same_data, save_tokenizer, tokenizer_of
from tombola.study.steps.looks import Answers, Looks, epoch_ends, looking, looks_folder
from tombola.study.steps.losses import loss_of
from tombola.study.steps.shared import predict_all, read_predictions, run_seeds, taken_ticket, write_scores
from tombola.study.steps.tickets import good_ticket
from tombola.study.steps.training import resumable
from tombola.tasks.encode import Encoded
from tombola.ticket import Ticket, Weights
from tombola.train import Recipe, TrainLog, TrainSettings, fine_tune

Progress = Callable[[float], None]
HEAD = "head.safetensors"  # of a round: the head it ended with, where the next one goes on from it


class OneTask:
    """What the rounds of a chain train and score. `tombola.study.steps.joint` has the same for several tasks with one body."""

    def __init__(self, cell: Cell, lab: Lab) -> None:
        self.cell, self.lab, self.data = cell, lab, same_data(cell, lab)
        self.name, self.objective = self.data.task.name, self.data.task.objective
        self.looks: list[Looks] = []  # one a task, at the model that was trained

    def load(self, folder: Path | None) -> nn.Module:
        """The model with the weights that a round or snapshot wrote into a folder, or the base with a head that is drawn."""
        place = base_folder(self.lab, self.cell.settings["model"]) if folder is None else folder / "weights"
        model: nn.Module = load_weights(place, self.objective, head_seed=run_seeds(self.cell.settings).head)
        return model

    def anatomy(self, model: nn.Module) -> Anatomy:
        return read_anatomy(model, layout_of(self.cell.settings["model"]))

    def prove(self, model: nn.Module, anatomy: Anatomy, mask: Mask) -> None:
        """Raises: MaskError where the mask does not act."""
        prove_acts(model, anatomy, mask)

    def train_rows(self) -> Encoded | Several:
        return encoded_rows(self.lab, self.cell, "train", self.data.train)

    def recipe(self) -> Recipe | None:
        return loss_of(self.cell, self.lab, self.data)

    def looks_at(self, model: nn.Module, stretch: Stretch) -> list[Looks]:
        """Those that are asked for; a new one at each call."""
        if self.cell.settings.get("report_checkpoint") != "best":
            return []
        rows = len(encoded_rows(self.lab, self.cell, "train", self.data.train))
        at = epoch_ends(rows, self.cell.settings["train"]["batch_size"], stretch.steps, stretch.rows_from)
        return [Looks(looks_folder(self.cell, self.lab), at, lambda: predict_all(self.cell, self.lab, self.data, model))]

    def counts(self) -> dict[str, int]:
        """What is said of the rows that it was trained on."""
        return {"rows": len(self.data.train), "rows_dropped_as_leaked": self.data.leaked}

    def write_weights(self, model: nn.Module, out: Path) -> None:
        if ranks.rank() == 0:
            model.save_pretrained(out / "weights")  # type: ignore[operator]
            save_tokenizer(tokenizer_of(self.lab, self.cell), out / "weights")

    def write_scores(self, model: nn.Module, out: Path, ticket: Ticket | None, steps: int) -> dict[str, Any]:
        """Of a level that was trained for so many steps; of level 0 the dense model has them. What is said of looks."""
        dense, said = read_predictions(self.lab.folder(self.cell.inputs["dense"])), dict[str, Any]()
        if ticket is not None:
            predictions: Answers = predict_all(self.cell, self.lab, self.data, model)
            if self.looks:
                predictions, said = self.looks[0].best(self.data, predictions, steps)
            write_scores(self.cell, out, self.data, predictions, dense, ticket, stage="retrained")
        return said

    def of_ticket(self) -> tuple[Cell, Objective]:
        """The cell that says task, rows and training of a ticket, and what its models are asked."""
        return self.cell, self.objective


def run_snapshot(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """The base trained up to the rewind step: θ_i and γ_i, stored and never written to again."""
    snapshot_of(OneTask(cell, lab), out, progress)


def snapshot_of(asked: OneTask, out: Path, progress: Progress) -> None:
    """As `run_snapshot`, of one task or several."""
    cell, lab, settings = asked.cell, asked.lab, asked.cell.settings

    def trained(checkpoints: Path | None) -> tuple[nn.Module, TrainLog]:
        model = asked.load(None)
        model.to(settings["machine"]["device"])
        stretch = Stretch(**settings["stretch"])
        return model, _train(asked, model, checkpoints, stretch, run_seeds(settings).data, progress, asked.recipe())

    model, log = resumable(cell, lab, trained)
    asked.write_weights(model, out)
    rows = {"rows": asked.counts()["rows"]}
    write_json(out / "train.json", asdict(log) | rows | {"snapshot": Snapshot(model).digest})


def run_round(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """One round: the mask of the level before, trained from the rewind step, and the mask of the next level.

    Its scores are those of the level it trains. Without a level to cut to it trains and scores the last one.
    """
    round_of(OneTask(cell, lab), out, progress)


def round_of(asked: OneTask, out: Path, progress: Progress) -> None:
    """As `run_round`, of one task or several."""
    cell, lab, settings = asked.cell, asked.lab, asked.cell.settings
    ticket = taken_ticket(cell, lab)
    one = Round(**settings["round"])
    options = ImpSettings(**{name: value for name, value in settings["search"].items() if name != "sparsity"})
    log: TrainLog | None = None
    snapshot: str | None = None
    if "model" in cell.inputs:  # the dense model is what this round would train
        model = asked.load(lab.folder(cell.inputs["model"]))
        anatomy = asked.anatomy(model)
    else:
        model, anatomy, snapshot, log = resumable(
            cell, lab, lambda checkpoints: _trained(asked, ticket, one, options, checkpoints, progress)
        )
    if log is not None:
        looks = asked.write_scores(model, out, ticket, log.steps)
        write_json(out / "train.json", asdict(log) | asked.counts() | {"snapshot": snapshot} | looks)
    said: list[str] = []
    if settings["cuts"] is not None:
        said = _write_ticket(asked, out, model, anatomy, ticket, options)
    if settings["keep_weights"]:
        asked.write_weights(model, out)
    if settings["keep_head"]:
        save_file({name: model.get_parameter(name).detach().cpu().clone() for name in SCOPES["head"](model, anatomy)}, out / HEAD)
    write_json(out / "result.json", {"warnings": said})


def _trained(
    asked: OneTask,
    ticket: Ticket | None,
    one: Round,
    options: ImpSettings,
    checkpoints: Path | None,
    progress: Progress,
) -> tuple[nn.Module, Anatomy, str, TrainLog | None]:
    """The model at the end of the round, the digest of the rewind step, and what was done."""
    cell, lab, settings = asked.cell, asked.lab, asked.cell.settings
    taken = cell.inputs.get("snapshot")
    model = asked.load(None if taken is None else lab.folder(taken))
    anatomy = asked.anatomy(model)
    snapshot = Snapshot(model)
    _same_snapshot(cell, lab, snapshot.digest)
    head = SCOPES["head"](model, anatomy)
    before = _round_before(cell)
    if one.start == "carried":
        assert before is not None
        Snapshot(asked.load(lab.folder(before))).restore(model)
    elif one.head == "carried":
        assert before is not None
        with torch.no_grad():
            for name, value in _head_of(lab, before, head).items():
                model.get_parameter(name).copy_(value)
    mask = Mask() if ticket is None else ticket.mask
    model.to(settings["machine"]["device"])
    if ticket is not None:
        asked.prove(model, anatomy, mask)
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
    order = order_seed(run_seeds(settings).data, one.data_round)
    asked.looks = asked.looks_at(model, stretch)
    recipe = looking(asked.recipe(), *asked.looks)
    log = _train(asked, model, checkpoints, stretch, order, lambda share: progress(0.9 * share), recipe)
    wrong = [name for name, kept in mask.values.items() if bool(model.get_parameter(name).detach().cpu()[~kept].ne(0).any())]
    if wrong:
        raise SearchError("removed values moved while the round was trained", got=", ".join(wrong[:5]), expected="exactly 0")
    return model, anatomy, digest, log


def _train(
    asked: OneTask,
    model: nn.Module,
    checkpoints: Path | None,
    stretch: Stretch,
    order: int,
    progress: Progress,
    recipe: Recipe | None,
) -> TrainLog:
    cell, lab = asked.cell, asked.lab
    return fine_tune(
        model,
        asked.train_rows(),
        TrainSettings(**cell.settings["train"]),
        replace(run_seeds(cell.settings), data=order),
        device=cell.settings["machine"]["device"],
        progress=progress,
        checkpoints=checkpoints,
        every_seconds=lab.checkpoint_seconds,
        ours=lambda: lab.store.scratch(cell.key),
        stretch=stretch,
        recipe=recipe,
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
    asked: OneTask, out: Path, model: nn.Module, anatomy: Anatomy, before: Ticket | None, options: ImpSettings
) -> list[str]:
    """The ticket of the next level, within that of the level before; says what a user would not expect."""
    cell = asked.cell
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
    run, objective = asked.of_ticket()
    ticket = good_ticket(
        cell,
        run,
        mask=mask,
        found_on=Weights(f"{cell.settings['model']['name']}, round {cuts['level']} on {asked.name}", _fingerprint(model)),
        anatomy=anatomy,
        scope=options.scope,
        objective=objective,
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


def _fingerprint(model: nn.Module) -> str:
    """Of the weights a round ended with, as of a folder they would be written to; tied tensors once."""
    digest, seen = hashlib.sha256(), set[int]()
    for name, value in sorted(model.state_dict().items()):
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            hash_tensor(digest, name, value.detach().cpu())
    return digest.hexdigest()[:32]
