"""The step of a bias-only model, and the losses of cells that train against one."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tombola.bias import (
    BIASED_LMS,
    BiasPredictions,
    TokenOpinions,
    Vectors,
    bias_predictions,
    no_vectors,
    token_opinions,
    vectors_of_model,
)
from tombola.errors import SettingsError, TombolaError
from tombola.evaluate import Predictions, predict, score
from tombola.losses import LOSSES, Known, annealed, reduce, tokens_of
from tombola.objective import load_weights
from tombola.study.cells import Cell, Lab, read_json, write_json
from tombola.study.data import TaskData, base_folder, encoded_rows, same_data, tokenizer_of
from tombola.tasks.encode import Encoded
from tombola.tasks.mixed import may_stand_for
from tombola.train import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]
FOLDS = 5


def run_bias(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """What a bias-only model says of every train row, or of each of its tokens: log-probabilities, keyed by row id."""
    data = same_data(cell, lab)
    if data.task.objective.kind == "tokens":
        _run_biased_lm(cell, lab, data, out)
    else:
        _run_classifier(cell, lab, data, out)


def _run_classifier(cell: Cell, lab: Lab, data: TaskData, out: Path) -> None:
    said, labels = cell.settings["bias"], _classes_of(data)
    vectors: Vectors = no_vectors
    if said["vectors"] == "model":
        model = load_weights(base_folder(lab, cell.settings["model"]), data.task.objective, head_seed=0)
        vectors = vectors_of_model(model, tokenizer_of(lab, cell))
    found = bias_predictions(
        said["bias_model"],
        data.train.ids,
        data.train.texts,
        labels,
        data.task.labels,
        vectors=vectors,
        folds=FOLDS if said["predictions"] == "out_of_fold" else 1,
        seed=cell.settings["data"]["split_seed"],
    )
    save_file({"log_probabilities": found.log_probabilities.contiguous()}, out / "bias.safetensors")
    right = score(Predictions(found.ids, found.log_probabilities, tuple(labels)), "accuracy")
    write_json(out / "rows.json", {"ids": list(found.ids), "classes": list(found.classes)})
    weak = (
        [f"the bias-only model ({right.value:.3f}) is at or below the majority line ({right.majority:.3f}) of its own train rows"]
        if right.at_or_below_majority
        else []
    )
    about = {"accuracy": right.value, "majority": right.majority, "n": right.n}
    write_json(out / "result.json", {"warnings": weak} | about)


def _run_biased_lm(cell: Cell, lab: Lab, data: TaskData, out: Path) -> None:
    """The counts of a biased language model and of its prior, and how often it has the next token right."""
    said, encoded = cell.settings["bias"], encoded_rows(lab, cell, "train", data.train)
    kind, rows = BIASED_LMS[said["bias_model"]], [row["input_ids"] for row in encoded.inputs]
    begins = [1 if encoded.replies is None else len(row) - encoded.replies[i] for i, row in enumerate(rows)]
    full, prior = (
        token_opinions(encoded.ids, rows, context, begins=begins, left_out=said["predictions"] == "out_of_fold")
        for context in (kind.context, kind.prior)
    )
    write_json(out / "tokens.json", {"bias": full.as_json(), "prior": prior.as_json()})
    vocabulary, longest = len(tokenizer_of(lab, cell)), max(map(len, rows))
    right, asked = 0, Counter[int]()
    for i, row in enumerate(rows):
        gold = torch.tensor(row[begins[i] :])
        found = full.log_probabilities([i], vocabulary, longest)[0, begins[i] - 1 : len(row) - 1].argmax(-1)
        right += int((found == gold).sum())
        asked.update(row[begins[i] :])
    n, most = asked.total(), asked.most_common(1)[0][1]
    weak = [f"the biased language model ({right / n:.3f} of tokens) is no better than one and the same token ({most / n:.3f})"]
    said = {"warnings": weak if right <= most else [], "accuracy": right / n, "majority": most / n, "n": n}
    write_json(out / "result.json", said)


def read_token_bias(folder: Path) -> tuple[TokenOpinions, TokenOpinions]:
    """What a biased language model and its prior say, as the step wrote it."""
    said = read_json(folder / "tokens.json")
    return TokenOpinions.from_json(said["bias"]), TokenOpinions.from_json(said["prior"])


def read_bias(folder: Path) -> BiasPredictions:
    """What `run_bias` wrote."""
    rows, found = read_json(folder / "rows.json"), load_file(folder / "bias.safetensors")
    return BiasPredictions(tuple(rows["ids"]), found["log_probabilities"], tuple(rows["classes"]))


def loss_of(cell: Cell, lab: Lab, data: TaskData, teacher: "PreTrainedModel | None" = None) -> Recipe | None:
    """The loss that a cell trains with, where it is not the model's own. teacher: a model, where it is not the input `teacher`.

    Raises: DataError when bias predictions do not cover the train rows; TombolaError for a task with neither classes nor tokens.
    """
    said: Mapping[str, Any] | None = cell.settings.get("loss")
    if said is None:
        return None
    if data.task.objective.kind == "tokens":
        return _loss_of_tokens(cell, lab, encoded_rows(lab, _of_rows(cell), "train", data.train))
    loss = LOSSES[said["loss"]]
    everything = Known(labels=torch.tensor(_classes_of(data)))
    depends: dict[str, Any] = dict(said)
    if said["loss"] == "marginal" and (several := may_stand_for(data.task, data.train)) is not None:
        allowed = torch.zeros(len(several), len(data.task.labels), dtype=torch.bool)
        for row, classes in enumerate(several):
            allowed[row, list(classes)] = True
        everything = replace(everything, allowed=allowed)
    if "bias" in loss.needs:
        taken = cell.inputs["bias"]
        everything = replace(everything, bias=read_bias(lab.folder(taken)).of(data.train.ids, data.task.labels))
        depends["bias"] = taken.key
    if "teacher" in loss.needs:
        everything = replace(everything, teacher=_taught(cell, lab, data, teacher))
        depends["teacher"] = cell.inputs["teacher"].key if teacher is None else "itself"
    mean = 1.0
    if said["reweight_normalisation"] == "dataset_mean":
        if loss is LOSSES["focal"]:
            raise SettingsError([TombolaError("weights of focal depend on the model: they have no mean over the data")])
        weights = loss.of(torch.zeros(len(data.train), len(data.task.labels)), everything).weights
        mean = 1.0 if weights is None else float(weights.mean())

    def of(logits: Tensor, labels: Tensor, rows: Tensor, share: float) -> Tensor:
        rows = rows.cpu()
        bias, taught = (None if x is None else x[rows].to(logits) for x in (everything.bias, everything.teacher))
        bias = None if bias is None else annealed(bias, share, end=said["anneal_to"])
        allowed = None if everything.allowed is None else everything.allowed[rows].to(labels.device)
        known = Known(labels=labels, bias=bias, teacher=taught, allowed=allowed)
        return reduce(loss.of(logits.float(), known), said["reweight_normalisation"], mean)

    return Recipe(loss=of, said=depends)


def _loss_of_tokens(cell: Cell, lab: Lab, train: Encoded) -> Recipe:
    """The loss of each predicted token, against what a biased language model says of it; a mean over the tokens of a batch."""
    said: Mapping[str, Any] = cell.settings["loss"]
    loss, depends = LOSSES[said["loss"]], dict(said)
    experts: list[tuple[TokenOpinions, list[int]]] = []
    if "bias" in loss.needs:
        taken = cell.inputs["bias"]
        assert isinstance(taken, Cell)
        depends["bias"] = taken.key
        divided = said["loss"] == "poe" and taken.settings["bias"]["prior"] == "divided"
        lengths = [len(row["input_ids"]) for row in train.inputs]
        both = read_token_bias(lab.folder(taken))
        experts = [(one, one.at(train.ids, lengths)) for one in both[: 1 + divided]]

    def of(logits: Tensor, labels: Tensor, rows: Tensor, share: float) -> Tensor:
        found = [
            one.log_probabilities([at[i] for i in rows.tolist()], logits.shape[-1], logits.shape[1]).to(logits)
            for one, at in experts
        ]
        bias = None if not found else found[0] if len(found) == 1 else (found[0] - found[1]).log_softmax(-1)
        tokens, known, _ = tokens_of(logits.float(), labels, bias)
        known = known if known.bias is None else replace(known, bias=annealed(known.bias, share, end=said["anneal_to"]))
        return reduce(loss.of(tokens, known), said["reweight_normalisation"])

    return Recipe(loss=of, said=depends)


def favoured_rows(cell: Cell, lab: Lab, data: TaskData, train: Encoded) -> list[bool] | None:
    """Whether the bias-only model of a cell favours the right answer of each train row; None of a cell without one.

    Of classes: its probability is above that of chance. Of tokens: it gives them a higher likelihood than its prior does.
    """
    taken = cell.inputs.get("bias")
    if taken is None:
        return None
    if not train.tokens:
        found = read_bias(lab.folder(taken)).of(data.train.ids, data.task.labels)
        gold = found.log_softmax(-1)[torch.arange(len(found)), torch.tensor(_classes_of(data))]
        return (gold.exp() > 1 / len(data.task.labels)).tolist()
    full, prior = (
        [one.of_answers(i) for i in one.at(train.ids, [len(row["input_ids"]) for row in train.inputs])]
        for one in read_token_bias(lab.folder(taken))
    )
    return [a > b for a, b in zip(full, prior, strict=True)]


def _of_rows(cell: Cell) -> Cell:
    """A cell that says the rows that this one trains on."""
    said = cell if "model" in cell.settings else cell.inputs["model"]
    assert isinstance(said, Cell)
    return Cell("rows", 1, {**said.settings, "data": cell.settings["learned_on"]}) if "learned_on" in cell.settings else said


def _taught(cell: Cell, lab: Lab, data: TaskData, teacher: "PreTrainedModel | None") -> Tensor:
    """Log-probabilities of a teacher, a dense model, on the train rows."""
    rows = encoded_rows(lab, _of_rows(cell), "train", data.train)
    if teacher is None:
        teacher = load_weights(lab.folder(cell.inputs["teacher"]) / "weights", data.task.objective, head_seed=0)
        teacher.to(cell.settings["machine"]["device"])
    return predict(teacher, rows).logits.log_softmax(-1)


def _classes_of(data: TaskData) -> list[int]:
    labels = [label for label in data.train.labels if isinstance(label, int)]
    if len(labels) != len(data.train) or data.task.objective.causal or len(data.task.labels) < 2:
        raise TombolaError(
            "losses against a bias or a teacher are of classes, answered by a head",
            got=data.task.name,
            next="leave loss and mask_loss at ce for this task",
        )
    return labels
