"""The steps that score what is there: evaluate, lesion and barrier."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from tombola.anatomy import Anatomy, read_anatomy
from tombola.cut import prove_same, shrink
from tombola.errors import MaskError
from tombola.evaluate import mean_loss, predict, score
from tombola.gates import lesion_of, masked, prove_acts
from tombola.landscape import along_line, barrier
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.study.cells import Cell, Given, Lab, write_json, write_rows
from tombola.study.data import base_folder, encoded_rows, layout_of, same_data
from tombola.study.lesions import PLACES, Cut, Patient, done, said_of
from tombola.study.steps.shared import lesion_seed, predict_all, read_predictions, score_rows, taken_ticket, write_scores
from tombola.tasks.encode import batches
from tombola.tuned import fold, tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]


def run_evaluate(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A ticket's mask on given weights, nothing trained."""
    data, ticket = same_data(cell, lab), taken_ticket(cell, lab)
    assert ticket is not None
    weights = cell.inputs.get("weights")
    if weights is None:
        folder = base_folder(lab, cell.settings["model"])
    else:
        folder = lab.folder(weights) / "weights" if isinstance(weights, Cell) else weights.folder
    model = load_weights(folder, data.task.objective, head_seed=cell.settings["seeds"]["head"])
    anatomy = read_anatomy(model, layout_of(cell.settings["model"]))
    model.to(cell.settings["machine"]["device"])
    anatomy.check(ticket.mask)
    # The dense predictions of the same weights: read where they were stored for these very rows, else made here.
    stored = isinstance(weights, Cell) and weights.settings["data"] == cell.settings["data"]
    dense = read_predictions(lab.folder(weights)) if stored and weights else predict_all(cell, lab, data, model)
    progress(0.3)
    if not isinstance(weights, Given):  # weights of one's own were trained from a lesion, if at all: not to be destroyed again
        lesion_of(ticket)(model, anatomy)
    prove_acts(model, anatomy, ticket.mask)
    with as_small_as_it_gets(model, anatomy, ticket.mask) as pruned:
        predictions = predict_all(cell, lab, data, pruned)
    write_scores(cell, out, data, predictions, dense, ticket, stage="pruned")
    head = (
        []
        if weights is not None
        else ["the weights are the base: the task head was drawn, not trained, and scores are those of chance"]
    )
    write_json(out / "result.json", {"warnings": head})


def run_tune(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A ticket on the weights it was found on, what it keeps scaled by least squares on the selection rows, nothing trained."""
    data, ticket, dense = same_data(cell, lab), taken_ticket(cell, lab), cell.inputs["weights"]
    assert ticket is not None
    model = load_weights(lab.folder(dense) / "weights", data.task.objective, head_seed=cell.settings["seeds"]["head"])
    anatomy = read_anatomy(model, layout_of(cell.settings["model"]))
    model.to(cell.settings["machine"]["device"])
    prove_acts(model, anatomy, ticket.mask)
    selection, device = encoded_rows(lab, cell, "selection", data.selection), cell.settings["machine"]["device"]
    tuning = tune(model, ticket.mask, anatomy, lambda: batches(selection, device=device), **cell.settings["tuning"])
    progress(0.8)
    fold(model, tuning.factors)
    with as_small_as_it_gets(model, anatomy, ticket.mask) as pruned:
        predictions = predict_all(cell, lab, data, pruned)
    write_scores(cell, out, data, predictions, read_predictions(lab.folder(dense)), ticket, stage="pruned")
    save_file({path: of.contiguous() for path, of in tuning.factors.items()}, out / "factors.safetensors")
    said = {"loss": tuning.loss, "errors": tuning.errors, "left": tuning.left}
    write_json(out / "result.json", {"warnings": [], "tuning": said})


@contextmanager
def as_small_as_it_gets(model: "PreTrainedModel", anatomy: Anatomy, mask: Mask) -> "Iterator[PreTrainedModel]":
    """The model under `mask`: cut where that is exact and proved so on these weights, else with the mask on.

    Single values are not cut: what they leave would be looked for in every cell, and is seldom a whole head.
    """
    small = None
    if not mask.values and not mask.removes_nothing:
        with suppress(MaskError):  # shared layers, custom modules, heads that are computed with all at once
            cut = shrink(model, mask, anatomy, groups="fill", share=True)
            prove_same(model, anatomy, mask, cut)
            small = cut
    if small is not None:
        yield small
        return
    with masked(model, anatomy, mask):
        yield model


def run_lesion(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A lesion of the dense model, in each of its places, nothing trained after it.

    With a ticket its removed heads are what is destroyed; what else it removes is masked, as in its pruned score.
    """
    data, ticket, dense = same_data(cell, lab), taken_ticket(cell, lab), cell.inputs["weights"]
    cut, seeds, objective = Cut(**cell.settings["lesion"]), cell.settings["seeds"], data.task.objective
    model = load_weights(lab.folder(dense) / "weights", objective, head_seed=seeds["head"])
    anatomy = read_anatomy(model, layout_of(cell.settings["model"]))
    model.to(cell.settings["machine"]["device"])
    base: list[PreTrainedModel] = []

    def pretrained() -> "PreTrainedModel":
        if not base:
            base.append(load_weights(base_folder(lab, cell.settings["model"]), objective, head_seed=seeds["head"]))
        return base[0]

    patient = Patient(model, anatomy, pretrained, lesion_seed(seeds["mask"], cut.draw))
    heads = None if ticket is None else ticket.mask.heads
    beside = Mask() if ticket is None else Mask(mlps=ticket.mask.mlps, neurons=ticket.mask.neurons)
    before, places, rows = read_predictions(lab.folder(dense)), PLACES[cut.where](anatomy.n_layers), list[dict[str, Any]]()
    for i, layers in enumerate(places):
        with done(cut, layers, patient, heads), masked(model, anatomy, beside):
            predictions = predict_all(cell, lab, data, model)
        said = {"kind": "lesion", "stage": "pruned", "draw": cut.draw, "lesion": said_of(cut, layers, anatomy.n_layers)}
        rows += score_rows(cell, data, predictions, before, said)
        progress((i + 1) / len(places))
    write_rows(out / "lesions.jsonl", rows)
    spared = heads is not None and bool(heads.all())
    write_json(out / "result.json", {"warnings": ["the ticket removes no heads, so none was destroyed"] if spared else []})


def run_barrier(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """Two trained models of one task, and those on the straight line between them: loss and score at each point.

    Weights of both are as they were trained, removed values 0 in each.
    """
    data, settings = same_data(cell, lab), cell.settings
    model, end = (
        load_weights(lab.folder(cell.inputs[role]) / "weights", data.task.objective, head_seed=0) for role in ("a", "b")
    )
    model.to(settings["machine"]["device"])
    metric, at = data.task.metric, [i / (settings["points"] - 1) for i in range(settings["points"])]
    encoded = {role: encoded_rows(lab, cell, role, of) for role, (_, of) in data.evaluated().items() if role != "challenge"}
    done: list[float] = []

    def measured() -> dict[str, dict[str, Any]]:
        done.append(1 / len(at))
        progress(min(sum(done), 0.99))
        found = {role: (mean_loss(model, one), score(predict(model, one), metric)) for role, one in encoded.items()}
        return {role: {"loss": loss, "n": one.n, "metric": metric, "value": one.value} for role, (loss, one) in found.items()}

    line = along_line(model, dict(end.named_parameters()), at, measured)
    write_rows(
        out / "barrier.jsonl",
        ({"share": t, "role": role} | row for t, by in zip(at, line, strict=True) for role, row in by.items()),
    )
    said = {role: barrier(at, [by[role]["loss"] for by in line]).over_line for role in encoded}
    write_json(out / "result.json", {"warnings": [], "barrier": said})
