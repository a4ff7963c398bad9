"""Predictions keyed by row id → scores, subgroups, and agreement with the dense model.

Rows are joined by id, never by position. Each score comes with its majority line: what always answering the most frequent
class of that split would score.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tombola.errors import DataError
from tombola.gates import Gates
from tombola.scores import GateGradients, gate_gradients
from tombola.tasks.encode import TOKENS_PER_BATCH, Encoded, batches


@dataclass(frozen=True, slots=True)
class Predictions:
    """Logits by row id, with the true labels of the same rows."""

    ids: tuple[str, ...]
    logits: Float[Tensor, "row out"]
    labels: tuple[int, ...]

    @property
    def classes(self) -> list[int]:
        """The predicted class of each row; of equal logits the first."""
        return [int(c) for c in self.logits.argmax(-1)]


def predict(model: torch.nn.Module, encoded: Encoded, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> Predictions:
    """Predictions of a classifier, in eval mode and without gradients; the model's mode is left as it was."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    logits: Tensor | None = None
    try:
        with torch.inference_mode():
            for rows, inputs in batches(encoded, tokens_per_batch, device):
                features = {name: value for name, value in inputs.items() if name != "labels"}
                output = model(**features).logits.float().cpu()
                logits = torch.zeros(len(encoded), output.shape[-1]) if logits is None else logits
                logits[rows] = output
    finally:
        model.train(was_training)
    assert logits is not None  # encode refuses empty sets
    return Predictions(encoded.ids, logits.clone(), encoded.labels)


def score_and_gradients(
    gates: Gates, encoded: Encoded, *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> tuple[Predictions, GateGradients]:
    """Predictions and gate gradients under the current mask, from the same forward pass."""
    device = next(gates.model.parameters()).device
    gradients = gate_gradients(gates, batches(encoded, tokens_per_batch, device), len(encoded))
    return Predictions(encoded.ids, gradients.logits, encoded.labels), gradients


# ------------------------------------------------------------------------------------------------------------- metrics


def _accuracy(labels: Sequence[int], predicted: Sequence[int]) -> float:
    return float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def _matthews(labels: Sequence[int], predicted: Sequence[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len({*labels, *predicted}) == 1:  # sklearn says 0 too, with a warning
        return 0.0
    return float(matthews_corrcoef(labels, predicted))  # 0 for a constant answer: no information, as GLUE has it


def _f1(labels: Sequence[int], predicted: Sequence[int]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, pos_label=1, zero_division=0.0))


METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "accuracy": _accuracy,
    "matthews": _matthews,
    "f1": _f1,
}


@dataclass(frozen=True, slots=True)
class Score:
    """One metric on one set of rows. Higher is better; a fraction, not a percentage."""

    metric: str
    value: float
    n: int
    majority: float  # the same metric for always answering the most frequent class of these rows

    @property
    def at_or_below_majority(self) -> bool:
        return self.value <= self.majority


def score(predictions: Predictions, metric: str) -> Score:
    """The metric of these predictions, beside its majority line. Raises: DataError for an unknown metric."""
    if metric not in METRICS:
        raise DataError(f"unknown metric {metric!r}", expected=sorted(METRICS))
    labels, counts = predictions.labels, Counter(predictions.labels)
    # of equally frequent classes the one that scores higher: under F1 they differ, and row order may not decide
    majority = max(METRICS[metric](labels, [c] * len(labels)) for c, n in counts.items() if n == max(counts.values()))
    return Score(metric, METRICS[metric](labels, predictions.classes), len(labels), majority)


def subgroup_scores(predictions: Predictions, groups: Mapping[str, str], metric: str = "accuracy") -> dict[str, Score]:
    """The score of each subgroup, by name; `groups` maps row ids to subgroups. Raises: DataError for rows without one."""
    without = [row for row in predictions.ids if row not in groups]
    if without:
        raise DataError("rows without a subgroup", got=without[:5], expected="a subgroup for every row id")
    members: dict[str, list[int]] = {}
    for position, row in enumerate(predictions.ids):
        members.setdefault(groups[row], []).append(position)
    return {
        name: score(
            Predictions(
                tuple(predictions.ids[i] for i in rows), predictions.logits[rows], tuple(predictions.labels[i] for i in rows)
            ),
            metric,
        )
        for name, rows in sorted(members.items())
    }


@dataclass(frozen=True, slots=True)
class Flips:
    """How predictions differ from the dense model's on the same rows; counts by class number."""

    flips: int  # rows answered otherwise
    lost: int  # rows the dense model has right and this one wrong
    gained: int  # rows this one has right and the dense model wrong
    n: int
    dense_counts: Mapping[int, int]
    counts: Mapping[int, int]


def agreement(dense: Predictions, other: Predictions) -> Flips:
    """How often `other` answers differently from `dense`, joined by row id. Raises: DataError when the rows differ."""
    by_id = dict(zip(dense.ids, dense.classes, strict=True))
    if by_id.keys() != set(other.ids):
        missing = sorted(by_id.keys() ^ set(other.ids))[:5]
        raise DataError("predictions to compare are of different rows", got=f"only on one side: {missing}")
    rows = [(by_id[row], answer, label) for row, answer, label in zip(other.ids, other.classes, other.labels, strict=True)]
    return Flips(
        flips=sum(before != answer for before, answer, _ in rows),
        lost=sum(before == label != answer for before, answer, label in rows),
        gained=sum(before != label == answer for before, answer, label in rows),
        n=len(rows),
        dense_counts=Counter(dense.classes),
        counts=Counter(other.classes),
    )
