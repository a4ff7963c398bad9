"""The steps: what each kind of cell computes. One function and one row of `STEPS` each.

    fine_tune   base → dense model of a task             weights, predictions, scores
    search      fine-tuned model → good ticket           ticket, path, importance of every step
    control     ticket → control ticket of its size      ticket
    derive      tickets → another ticket                 ticket
    evaluate    ticket on weights (pruned)               predictions, scores
    tune        what a ticket keeps, scaled              factors, predictions, scores
    lesion      part of a dense model destroyed          scores of each place
    train_mode  base, trained in another way             predictions, scores
    retrain     ticket on base, trained again            predictions, scores, weights when asked for
    patterns    labelled maps → classifiers of maps      weights, what they are worth
    attention   maps of one model                        classes and descriptors of each head, samples
    landscape   dense model, retrained ticket            losses between and around them
    probe       dense model → what its masks would begin with, losses
    bag_of_words  train rows → linear model of words     predictions, scores
    base_mask   base → ticket, nothing trained           ticket
    barrier     two trained models, and between them     loss and score of each point
    snapshot    base → the weights of a rewind step      weights
    round       a level of a chain, trained              scores of that level, ticket of the next
    joint_snapshot, joint_round                          the same of several tasks with one body

What a step may depend on stands in its cell: settings and inputs. The lab only says where things lie.
"""

from collections.abc import Mapping
from typing import Any

from tombola.study.cells import Cell, Step
from tombola.study.lesions import EXPECTED_PLACES, Cut
from tombola.study.steps.attention import run_attention, run_patterns
from tombola.study.steps.imp import run_round, run_snapshot
from tombola.study.steps.joint import alone, names_of, run_joint_round, run_joint_snapshot
from tombola.study.steps.landscape import run_landscape
from tombola.study.steps.losses import run_bias
from tombola.study.steps.probing import run_probe
from tombola.study.steps.scoring import run_barrier, run_evaluate, run_lesion, run_tune
from tombola.study.steps.tickets import EXPECTED_TRIALS, run_base_mask, run_control, run_derive, run_search
from tombola.study.steps.training import run_training
from tombola.study.steps.words import run_bag_of_words
from tombola.tasks import bare_name


def _rows(cell: Cell, *roles: str) -> float:
    counts: Mapping[str, int] = cell.settings["data"]["counts"]
    return float(sum(counts.get(role, 0) for role in roles))


def _training_work(cell: Cell) -> float:
    # forward, gradients of activations, gradients of weights: three passes a row
    train: Mapping[str, Any] = cell.settings["train"]
    if "stretch" in cell.settings:
        train = {**train, "steps": cell.settings["stretch"]["steps"]}
    trained: float = train["epochs"] * _rows(cell, "train") if "steps" not in train else train["steps"] * train["batch_size"]
    return 3.0 * trained + _rows(cell, "selection", "report", "challenge")


def _round_work(cell: Cell) -> float:
    if "model" in cell.inputs:
        return 1.0
    steps: int = cell.settings["round"]["steps"] if cell.step == "round" else cell.settings["stretch"]["steps"]
    trained: float = steps * cell.settings["train"]["batch_size"]
    return 3.0 * trained + _rows(cell, "selection", "report", "challenge")


def _search_work(cell: Cell) -> float:
    dense = cell.inputs["model"]
    assert isinstance(dense, Cell)
    if cell.settings["method"] == "learned":
        epochs: int = cell.settings["search"]["mask_epochs"]
        looks: int = 2 + cell.settings["search"].get("choice_looks", 0)
        return 3.0 * epochs * _rows(dense, "train") + looks * _rows(dense, "selection")
    return 2.0 * EXPECTED_TRIALS * _rows(dense, "selection")


def _joint_work(cell: Cell) -> float:
    steps: int = (cell.settings["round"] if cell.step == "joint_round" else cell.settings["stretch"])["steps"]
    together: int = sum(one["batch_size"] for one in cell.settings["tasks"])
    return 3.0 * steps * together + sum(_rows(one, "selection", "report", "challenge") for one in alone(cell))


def _joint_title(cell: Cell) -> str:
    what = [] if cell.step == "joint_snapshot" else [_about(cell)]
    return " · ".join([cell.step.replace("_", "-"), *what, names_of(cell), f"seed {cell.settings['seeds']['run']}"])


def _lesion_work(cell: Cell) -> float:
    return EXPECTED_PLACES[cell.settings["lesion"]["where"]] * _rows(cell, "selection", "report", "challenge")


def _landscape_work(cell: Cell) -> float:
    said, counts = cell.settings["landscape"], cell.settings["data"]["counts"]
    rows = sum(min(said["landscape_rows"], counts[role]) for role in ("train", "report"))
    return float(rows * (1 + 2 * said["directions"] + (said["points"] if "retrained" in cell.inputs else 0)))


def _title(cell: Cell) -> str:
    planned: dict[str, Any] = {}  # a search or control has the task and seed of the model it goes back to
    for one in cell.needed():
        planned |= {name: one.settings[name] for name in ("seeds", "data") if name in one.settings}
    seeds, data = planned.get("seeds", {}), planned.get("data", {})
    return " · ".join(
        x
        for x in (
            cell.step.replace("_", "-"),
            _robust(cell) or _about(cell),
            bare_name(data.get("task", "")),
            f"seed {seeds['run']}" if seeds else "all seeds",
        )
        if x
    )


def _robust(cell: Cell) -> str:
    """Of what was learned or trained against a bias: loss and share; else nothing."""
    search = next((one for one in reversed(list(cell.needed())) if one.step == "search"), None)
    own = cell.settings.get("loss", {}).get("loss", "")
    if search is None or search.settings["method"] != "learned":
        return str(own)
    said = search.settings["search"]
    mask = f"learned, {said['mask_loss']}, {said['sparsity']:.0%}"
    return f"{mask}, then {own or 'ce'}" if cell.step == "retrain" else mask


def _about(cell: Cell) -> str:
    ticket = cell.inputs.get("ticket")
    if cell.step == "train_mode":
        return str(cell.settings["mode"])
    if cell.step == "control":
        return f"{cell.settings['kind']} {cell.settings['draw']}"
    if cell.step == "attention":
        return "fine-tuned" if "weights" in cell.inputs else "pre-trained"
    if cell.step == "lesion":
        return f"{Cut(**cell.settings['lesion'])} ({cell.settings['lesion']['where']})"
    if cell.step == "derive":
        return str(cell.settings["rule"])
    if cell.step == "base_mask":
        return f"{cell.settings['search']['criterion']}, {cell.settings['search']['sparsity']:.0%}"
    if cell.step in ("round", "joint_round"):
        cuts = cell.settings["cuts"]
        return "last level" if cuts is None else f"to {cuts['to']:.0%}"
    tested = _about(ticket) if isinstance(ticket, Cell) and ticket.step in ("control", "derive") else "good" if ticket else ""
    dense = cell.inputs.get("dense")
    trained = isinstance(dense, Cell) and "train" in cell.settings
    longer = trained and cell.settings["train"]["epochs"] != dense.settings["train"]["epochs"]  # type: ignore[union-attr]
    return f"{tested}, {cell.settings['train']['epochs']} epochs" if longer else tested


STEPS: dict[str, Step] = {
    "fine_tune": Step(1, run_training, _training_work, _title),
    "search": Step(1, run_search, _search_work, _title),
    "control": Step(1, run_control, lambda cell: 1.0, _title),
    "derive": Step(1, run_derive, lambda cell: 1.0, _title),
    "evaluate": Step(3, run_evaluate, lambda cell: _rows(cell, "selection", "report", "challenge"), _title),
    # of each site, some two a layer, a pass of the dense and of the masked model
    "tune": Step(1, run_tune, lambda cell: 24.0 * _rows(cell, "selection") + _rows(cell, "report", "challenge"), _title),
    "lesion": Step(1, run_lesion, _lesion_work, _title),
    "train_mode": Step(1, run_training, _training_work, _title),
    "retrain": Step(1, run_training, _training_work, _title),
    "patterns": Step(1, run_patterns, lambda cell: 1.0, lambda cell: f"patterns · {cell.settings['patterns']['map_preprocess']}"),
    "bag_of_words": Step(1, run_bag_of_words, lambda cell: 0.05 * _rows(cell, "train"), _title),
    "landscape": Step(1, run_landscape, _landscape_work, _title),
    # the nets read every head's map twice, raw and weighted: about as much again as the model
    "attention": Step(1, run_attention, lambda cell: 3.0 * cell.settings["attention"]["map_rows"], _title),
    "base_mask": Step(1, run_base_mask, lambda cell: 1.0, _title),
    "barrier": Step(1, run_barrier, lambda cell: 2.0 * cell.settings["points"] * _rows(cell, "selection", "report"), _title),
    "snapshot": Step(1, run_snapshot, _round_work, _title),
    "round": Step(1, run_round, _round_work, _title),
    "joint_snapshot": Step(1, run_joint_snapshot, _joint_work, _joint_title),
    "joint_round": Step(1, run_joint_round, _joint_work, _joint_title),
    "probe": Step(1, run_probe, lambda cell: 4.0 * cell.settings["probe"]["rows"] + _rows(cell, "selection"), _title),
    "bias": Step(1, run_bias, lambda cell: 0.1 * _rows(cell, "train"), _title),
}
