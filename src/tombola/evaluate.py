"""Predictions keyed by row id → scores, subgroups, and agreement with the dense model.

Rows are joined by id, never by position. Each score comes with its majority line: what always answering the most frequent
class of that split would score. A regression has one output, floats as labels, and correlations as metrics: there any
constant answer scores 0, which is its line. Running text is predicted token by token: a row's output is its log-likelihood per
token, and the line that of the unigram model of the same rows. Of hidden tokens, of answers within a text and of replies to a
prompt a row's outputs are what it scores itself (`Predictions.measures`), and its line is what one and the same answer would.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tombola.errors import DataError
from tombola.gates import Gates
from tombola.scores import GateGradients, gate_gradients, row_outputs, summed_loss
from tombola.stats import Estimate, metric_over_rows
from tombola.tasks.base import MASKED_METRICS, REGRESSION_METRICS, REPLY_METRICS, SPAN_METRICS, TOKEN_METRICS, Answer
from tombola.tasks.encode import TOKENS_PER_BATCH, Encoded, batches
from tombola.tasks.mlm import lines_of
from tombola.tasks.squad import Spans, scored


@dataclass(frozen=True, slots=True)
class Predictions:
    """Logits by row id, with the true labels of the same rows; of running text log-likelihoods, see `row_outputs`.

    measures: names of the outputs where they are scores of the row; `lines` then has those of an answer that looks at no row.
    """

    ids: tuple[str, ...]
    logits: Float[Tensor, "row out"]
    labels: tuple[Answer, ...]
    weights: tuple[int, ...] | None = None  # of running text: how many tokens of each row were predicted
    measures: tuple[str, ...] = ()
    lines: tuple[tuple[float, ...], ...] | None = None  # [row][measure]

    @property
    def regression(self) -> bool:
        """Whether a row has a value, of a single output or as the first of its measures, and no class."""
        return self.logits.shape[-1] == 1 or bool(self.measures)

    @property
    def classes(self) -> list[int]:
        """The predicted class of each row; of equal logits the first. Raises: DataError for a regression, which has none."""
        if self.regression:
            raise DataError("a regression predicts no classes", got="1 output", next="read `values`")
        return [int(c) for c in self.logits.argmax(-1)]

    @property
    def values(self) -> list[float]:
        """The predicted value of each row of a regression, in units of the label. Raises: DataError where there are classes."""
        if not self.regression:
            raise DataError("a classifier predicts no values", got=f"{self.logits.shape[-1]} outputs", next="read `classes`")
        return [float(value) for value in self.logits[:, 0]]


def predict(model: torch.nn.Module, encoded: Encoded, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> Predictions:
    """Predictions of a model, in eval mode and without gradients; its mode is left as it was.

    Of hidden tokens a row is a block; of answers within a text it is a question, whatever its windows.
    """
    if encoded.spans is not None:
        return _predict_spans(model, encoded, encoded.spans, tokens_per_batch)
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    logits: Tensor | None = None
    try:
        with torch.inference_mode():
            for rows, inputs in batches(encoded, tokens_per_batch, device):
                features = {name: value for name, value in inputs.items() if name != "labels"}
                raw, labels = model(**features).logits, inputs["labels"]
                output = row_measures(encoded)(raw, labels).cpu()
                logits = torch.zeros(len(encoded), output.shape[-1]) if logits is None else logits
                logits[rows] = output
    finally:
        model.train(was_training)
    assert logits is not None  # encode refuses empty sets
    if encoded.masking is not None:
        hidden = [encoded.masking.fixed(id, row["input_ids"]) for id, row in zip(encoded.ids, encoded.inputs, strict=True)]
        padded = encoded.masking.weigh == "padded_tokens"
        weights = tuple(1 if padded else len(one.at) for one in hidden)
        return Predictions(encoded.ids, logits.clone(), encoded.labels, weights, MASKED_METRICS, lines_of(hidden))
    measures = () if encoded.replies is None else REPLY_METRICS[:2]
    return Predictions(encoded.ids, logits.clone(), encoded.labels, _weights(encoded), measures, encoded.lines)


def mean_loss(model: torch.nn.Module, encoded: Encoded, *, tokens_per_batch: int = TOKENS_PER_BATCH) -> float:
    """The mean over rows of each row's own loss, in eval mode (`summed_loss` says which, in nats or squared units)."""
    was_training, device, total = model.training, next(model.parameters()).device, 0.0
    model.eval()
    try:
        with torch.inference_mode():
            for _, inputs in batches(encoded, tokens_per_batch, device):
                logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
                total += float(summed_loss(logits, inputs["labels"]))
    finally:
        model.train(was_training)
    return total / len(encoded)


def row_measures(encoded: Encoded) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits, labels) → what is kept of each row: [row, out]."""
    if encoded.masking is not None:
        return _of_hidden
    return row_outputs if encoded.replies is None else _of_replies


def _of_replies(logits: Float[Tensor, "row position vocabulary"], labels: Tensor) -> Float[Tensor, "row 2"]:
    """Of each row whether every token of the reply is the likeliest after those before it, and their mean log-likelihood in nats.

    That is what greedy decoding would write for so many tokens: it goes wrong at the first token that is not the likeliest.
    """
    wrong = (logits[:, :-1].argmax(-1) != labels[:, 1:]) & (labels[:, 1:] != -100)
    return torch.stack([1.0 - wrong.any(1).float(), row_outputs(logits, labels)[:, 0]], 1)


def _of_hidden(logits: Float[Tensor, "row asked vocabulary"], labels: Tensor) -> Float[Tensor, "row 2"]:
    """Of each row the share of hidden tokens that are answered right, and their mean log-likelihood in nats."""
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean(1)
    return torch.stack([right, row_outputs(logits, labels)[:, 0]], 1)


def _predict_spans(model: torch.nn.Module, encoded: Encoded, spans: Spans, tokens_per_batch: int) -> Predictions:
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    found: dict[int, np.ndarray] = {}
    try:
        with torch.inference_mode():
            for rows, inputs in batches(encoded, tokens_per_batch, device):
                logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
                found |= dict(zip(rows.tolist(), logits[:, :2].float().cpu().numpy(), strict=True))
    finally:
        model.train(was_training)
    answers = spans.answers([found[i] for i in range(len(encoded))])
    values = torch.tensor([scored(answer, golds) for answer, golds in zip(answers, spans.golds, strict=True)])
    return Predictions(spans.ids, values, (None,) * len(spans.ids), None, SPAN_METRICS, spans.lines())


def score_and_gradients(
    gates: Gates, encoded: Encoded, *, tokens_per_batch: int = TOKENS_PER_BATCH, neurons: tuple[str, int] | None = None
) -> tuple[Predictions, GateGradients]:
    """Predictions and gate gradients under the current mask, from the same forward pass; `neurons`: see `gate_gradients`."""
    device = next(gates.model.parameters()).device
    gradients = gate_gradients(gates, batches(encoded, tokens_per_batch, device), len(encoded), neurons=neurons)
    return Predictions(encoded.ids, gradients.logits, encoded.labels, _weights(encoded)), gradients


def _weights(encoded: Encoded) -> tuple[int, ...] | None:
    if encoded.replies is not None:
        return encoded.replies
    return tuple(length - 1 for length in encoded.lengths) if encoded.tokens else None


# ------------------------------------------------------------------------------------------------------------- metrics


def _accuracy(labels: Sequence[Answer], predicted: Sequence[Answer]) -> float:
    return float(np.mean(np.asarray(labels) == np.asarray(predicted)))


def _matthews(labels: Sequence[Answer], predicted: Sequence[Answer]) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len({*labels, *predicted}) == 1:  # sklearn says 0 too, with a warning
        return 0.0
    return float(matthews_corrcoef(labels, predicted))  # 0 for a constant answer: no information, as GLUE has it


def _f1(labels: Sequence[Answer], predicted: Sequence[Answer]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, pos_label=1, zero_division=0.0))


def _f1_of_0(labels: Sequence[Answer], predicted: Sequence[Answer]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, pos_label=0, zero_division=0.0))


def _f1_weighted(labels: Sequence[Answer], predicted: Sequence[Answer]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="weighted", zero_division=0.0))


# Values that differ by less than this share of the largest are one answer in fp32, and their differences rounding: an
# emptied network would else score whatever the shapes of its batches left in the last digits.
CONSTANT = 1e-6


def _pearson(labels: Sequence[Answer], predicted: Sequence[Answer]) -> float:
    if _is_constant(labels) or _is_constant(predicted):
        return 0.0  # undefined; 0 as Matthews has it: a constant answer says nothing about the rows
    x, y = (np.asarray(column, dtype=np.float64) for column in (labels, predicted))
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny values would vanish
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def _spearman(labels: Sequence[Answer], predicted: Sequence[Answer]) -> float:
    from scipy.stats import rankdata

    if _is_constant(labels) or _is_constant(predicted):
        return 0.0
    return _pearson(*(rankdata(column).tolist() for column in (labels, predicted)))  # of ties the mean rank


def _is_constant(values: Sequence[Answer]) -> bool:
    numbers = np.asarray(values, dtype=np.float64)
    return float(np.ptp(numbers)) <= CONSTANT * float(np.max(np.abs(numbers)))


METRICS: dict[str, Callable[[Sequence[Answer], Sequence[Answer]], float]] = {
    "accuracy": _accuracy,
    "matthews": _matthews,
    "f1": _f1,
    "f1_of_0": _f1_of_0,
    "f1_weighted": _f1_weighted,
    "pearson": _pearson,
    "spearman": _spearman,
    "mean_pearson_spearman": lambda labels, predicted: (_pearson(labels, predicted) + _spearman(labels, predicted)) / 2,
}


@dataclass(frozen=True, slots=True)
class Score:
    """One metric on one set of rows. Higher is better, but for perplexity; a fraction or a correlation, not a percentage.

    log_likelihood is in nats per token, minus the loss; perplexity its exp(−x). Both weigh tokens alike, whatever row they
    are of; n counts rows.
    """

    metric: str
    value: float
    n: int
    # The same metric for an answer that looks at no row: the most frequent class of these rows, one and the same value, or of
    # running text the frequencies of its tokens.
    majority: float

    @property
    def at_or_below_majority(self) -> bool:
        return self.value <= self.majority


def score(predictions: Predictions, metric: str) -> Score:
    """The metric of these predictions, beside its majority line.

    A correlation that is undefined because the answers (or the labels) are constant is 0, and so is the line of every
    correlation. Constant: all within 1e-6 of the largest, below which fp32 cannot tell rows apart.

    Raises: DataError for an unknown metric, one of the other kind of answers, or predicted values that are not finite.
    """
    if predictions.measures:
        return _measured_score(predictions, metric)
    if metric not in METRICS and metric not in TOKEN_METRICS:
        raise DataError(f"unknown metric {metric!r}", expected=sorted({*METRICS, *TOKEN_METRICS}))
    if (metric in TOKEN_METRICS) != (predictions.weights is not None):
        kind = "running text" if predictions.weights is not None else "rows with answers"
        raise DataError(f"{metric} is no metric of {kind}", expected=", ".join(TOKEN_METRICS if predictions.weights else METRICS))
    if predictions.weights is not None:
        return _token_score(predictions, metric)
    if (metric in REGRESSION_METRICS) != predictions.regression:
        kind = "a regression" if predictions.regression else "a classifier"
        raise DataError(f"{metric} is no metric of {kind}", got=f"{predictions.logits.shape[-1]} outputs")
    labels = predictions.labels
    if predictions.regression:
        if not bool(predictions.logits.isfinite().all()):
            raise DataError("predicted values are not finite", next="training diverged: try a smaller --learning-rate")
        return Score(metric, METRICS[metric](labels, predictions.values), len(labels), 0.0)
    counts = Counter(labels)
    # of equally frequent classes the one that scores higher: under F1 they differ, and row order may not decide
    majority = max(METRICS[metric](labels, [c] * len(labels)) for c, n in counts.items() if n == max(counts.values()))
    return Score(metric, METRICS[metric](labels, predictions.classes), len(labels), majority)


def over_rows(predictions: Sequence[Predictions], metric: str) -> Estimate:
    """The mean of a metric over models (seeds, draws) that answered the same rows, with its interval over rows.

    Raises: DataError when they answered other rows, and as `score`.
    """
    first, *others = predictions
    if any(one.ids != first.ids for one in others):
        raise DataError("models to average have answered other rows", got=f"{len({one.ids for one in predictions})} sets of rows")
    values = [score(one, metric).value for one in predictions]
    if metric not in METRICS or first.measures or first.weights is not None:
        std = stdev(values) if others else None
        return Estimate(fmean(values), None, None, std, len(values), f"no interval over rows of {metric}")
    return metric_over_rows(METRICS[metric], first.labels, [one.values if one.regression else one.classes for one in predictions])


def _measured_score(predictions: Predictions, metric: str) -> Score:
    """The mean over rows, by their weights, of what each scores; and of its lines. A reply matches or not, however long it is."""
    known = "log_likelihood" if metric == "perplexity" else metric
    if known not in predictions.measures or predictions.lines is None:
        raise DataError(f"{metric} is no metric of these rows", expected=", ".join(predictions.measures))
    if not bool(predictions.logits.isfinite().all()):
        raise DataError("predicted values are not finite", next="training diverged: try a smaller --learning-rate")
    at, weights = predictions.measures.index(known), None if metric == "exact_match" else predictions.weights
    columns = predictions.logits[:, at].double().numpy(), np.asarray(predictions.lines, dtype=np.float64)[:, at]
    value, line = (float(np.average(column, weights=weights)) for column in columns)
    if metric == "perplexity":
        value, line = math.exp(-value), math.exp(-line)
    return Score(metric, value, len(predictions.ids), line)


def _token_score(predictions: Predictions, metric: str) -> Score:
    both = [np.asarray(column, dtype=np.float64) for column in (predictions.values, predictions.labels)]
    if not np.isfinite(both[0]).all():
        raise DataError("log-likelihoods are not finite", next="training diverged: try a smaller --learning-rate")
    value, line = (float(np.average(column, weights=predictions.weights)) for column in both)
    if metric == "perplexity":
        value, line = math.exp(-value), math.exp(-line)
    return Score(metric, value, len(predictions.ids), line)


Merge = Literal["after_argmax", "sum_probability"]


def merged(predictions: Predictions, into: Sequence[int], how: Merge) -> Predictions:
    """The same predictions in fewer classes: class i of the model counts as class `into[i]` of these rows' labels.

    after_argmax: as if each row's first class were renamed. sum_probability: by the summed probability of the classes that count
    as one. They differ where two classes that count alike share what the third has less than both together have.
    Source: HANS of a model of three classes; McCoy et al. 2019 do the first.
    """
    logs, target = predictions.logits.log_softmax(-1), torch.tensor(into)
    columns = [logs[:, target == c] for c in range(max(into) + 1)]
    joined = [column.amax(-1) if how == "after_argmax" else column.logsumexp(-1) for column in columns]
    return Predictions(predictions.ids, torch.stack(joined, -1), predictions.labels)


def calibration_error(predictions: Predictions, bins: int = 15) -> float:
    """Expected calibration error, in [0, 1]: over bins of the first class's probability, the mean distance between that and how
    often it is right, each bin by its rows. 0 = probabilities mean what they say.

    Source: Naeini, Cooper, Hauskrecht 2015, as Guo et al. 2017 use it: bins of equal width.
    """
    sure, answer = predictions.logits.double().softmax(-1).max(-1)
    right = answer == torch.tensor(predictions.labels)
    bin_of = (sure * bins).ceil().long().clamp(1, bins)
    gaps = [
        float((right[here].double().mean() - sure[here].mean()).abs()) * int(here.sum())
        for here in (bin_of == b for b in range(1, bins + 1))
        if bool(here.any())
    ]
    return sum(gaps) / len(sure)


def subgroup_scores(predictions: Predictions, groups: Mapping[str, str], metric: str = "accuracy") -> dict[str, Score]:
    """The score of each subgroup, by name; `groups` maps row ids to subgroups. Raises: DataError for rows without one."""
    without = [row for row in predictions.ids if row not in groups]
    if without:
        raise DataError("rows without a subgroup", got=without[:5], expected="a subgroup for every row id")
    members: dict[str, list[int]] = {}
    for position, row in enumerate(predictions.ids):
        members.setdefault(groups[row], []).append(position)
    return {name: score(_some(predictions, rows), metric) for name, rows in sorted(members.items())}


def _some(predictions: Predictions, rows: Sequence[int]) -> Predictions:
    """The predictions of these rows, by position."""
    return Predictions(
        tuple(predictions.ids[i] for i in rows),
        predictions.logits[list(rows)],
        tuple(predictions.labels[i] for i in rows),
        None if predictions.weights is None else tuple(predictions.weights[i] for i in rows),
        predictions.measures,
        None if predictions.lines is None else tuple(predictions.lines[i] for i in rows),
    )


@dataclass(frozen=True, slots=True)
class Flips:
    """How predictions differ from the dense model's on the same rows; counts by class number.

    Values do not flip: of a regression there is the mean difference alone, of classes everything else.
    """

    flips: int | None  # rows answered otherwise
    lost: int | None  # rows the dense model has right and this one wrong
    gained: int | None  # rows this one has right and the dense model wrong
    n: int
    dense_counts: Mapping[int, int] | None
    counts: Mapping[int, int] | None
    mean_difference: float | None = None  # mean over rows of |value − value of the dense model|, in units of the label


def agreement(dense: Predictions, other: Predictions) -> Flips:
    """How `other` answers differently from `dense`, joined by row id.

    Raises: DataError when the rows differ, or when one predicts classes and the other values.
    """
    if dense.regression != other.regression:
        raise DataError("predictions to compare are of a classifier and of a regression")
    if dense.ids != other.ids and (missing := sorted({*dense.ids} ^ {*other.ids})[:5]):
        raise DataError("predictions to compare are of different rows", got=f"only on one side: {missing}")
    if dense.regression:
        values = dict(zip(dense.ids, dense.values, strict=True))
        apart = [abs(value - values[row]) for row, value in zip(other.ids, other.values, strict=True)]
        return Flips(None, None, None, len(apart), None, None, float(np.mean(apart)))
    by_id = dict(zip(dense.ids, dense.classes, strict=True))
    rows = [(by_id[row], answer, label) for row, answer, label in zip(other.ids, other.classes, other.labels, strict=True)]
    return Flips(
        flips=sum(before != answer for before, answer, _ in rows),
        lost=sum(before == label != answer for before, answer, label in rows),
        gained=sum(before != label == answer for before, answer, label in rows),
        n=len(rows),
        dense_counts=Counter(dense.classes),
        counts=Counter(other.classes),
    )
