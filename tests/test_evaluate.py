"""Predictions against one row at a time; metrics against their formulas; everything joined by row id."""

import math
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TINY, sentiment, tiny_model
from tombola.errors import DataError
from tombola.evaluate import METRICS, Predictions, agreement, mean_loss, predict, score, score_and_gradients, subgroup_scores
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.tasks.base import CLASS_METRICS, REGRESSION_METRICS
from tombola.tasks.encode import Encoded

N = 9
HOLED = Mask(heads=torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]).bool(), mlps=torch.tensor([True, False]))


def random_rows(n: int, family: str = "bert", seed: int = 0) -> Encoded:
    """Rows of 3 to 14 random tokens, no two of them alike, with random labels."""
    rng = np.random.default_rng(seed)
    inputs = tuple({"input_ids": tuple(int(t) for t in rng.integers(5, 60, rng.integers(3, 15)))} for _ in range(n))
    labels = tuple(int(label) for label in rng.integers(0, 2, n))
    return Encoded(tuple(f"row:{i}" for i in range(n)), inputs, labels, 0, {"input_ids": TINY[family].get("pad_token_id", 0)})


def answers(labels: Sequence[int], predicted: Sequence[int], ids: Sequence[str] | None = None, classes: int = 3) -> Predictions:
    """Predictions that answer `predicted`."""
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()
    return Predictions(tuple(ids or (f"dev:{i}" for i in range(len(labels)))), logits, tuple(labels))


# predict


def test_predictions_are_those_of_each_row_alone(family: str) -> None:
    model, rows = tiny_model(family), random_rows(N, family)
    found = predict(model, rows, tokens_per_batch=40)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows.inputs])
    torch.testing.assert_close(found.logits, alone, rtol=0, atol=1e-5)
    assert (found.ids, found.labels, found.classes) == (rows.ids, rows.labels, alone.argmax(-1).tolist())
    assert float(alone.std(0).min()) > 1e-3  # rows differ: a permutation would be seen


def test_order_of_rows_and_size_of_batches_play_no_part() -> None:
    model, rows = tiny_model("bert"), random_rows(N)
    order = random.Random(0).sample(range(N), N)
    moved = Encoded(*(tuple(column[i] for i in order) for column in (rows.ids, rows.inputs, rows.labels)), 0, rows.pad)
    first = predict(model, rows)
    for budget in (1, 33, 4096):
        other = predict(model, moved, tokens_per_batch=budget)
        assert other.ids == tuple(rows.ids[i] for i in order)
        assert other.labels == tuple(rows.labels[i] for i in order)
        torch.testing.assert_close(other.logits, first.logits[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_prediction_is_without_dropout_and_leaves_the_mode(training: bool) -> None:
    model, rows = tiny_model("bert"), random_rows(N)
    expected = predict(model, rows).logits
    found = predict(model.train(training), rows).logits
    assert torch.equal(found, expected)
    assert model.training is training
    assert not found.is_inference()  # an inference tensor could not be used in training later


def test_mode_is_left_when_the_model_fails() -> None:
    model = tiny_model("bert").train()
    too_long = Encoded(("a",), ({"input_ids": (5,) * 41},), (0,), 0, {"input_ids": 0})  # it has 40 positions
    with pytest.raises((IndexError, RuntimeError)):
        predict(model, too_long)
    assert model.training


def test_score_and_gradients_answer_as_predict_does_under_the_mask() -> None:
    model, rows = tiny_model("bert"), random_rows(N)
    with Gates(model, mask=HOLED) as gates:
        expected = predict(model, rows)
        found, gradients = score_and_gradients(gates, rows)
    assert (found.ids, found.labels) == (rows.ids, rows.labels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    assert (predict(model, rows).logits - expected.logits).abs().max() > 1e-3  # the mask acted
    assert (gradients.heads.shape, gradients.mlps.shape) == ((N, 2, 4), (N, 2))


# metrics

two_classes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)
three_classes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


@settings(deadline=None)  # the first call imports scikit-learn
@given(two_classes)
def test_metrics_of_two_classes_are_their_formulas(rows: list[tuple[int, int]]) -> None:
    tp, fp, fn, tn = (rows.count(cell) for cell in ((1, 1), (0, 1), (1, 0), (0, 0)))
    labels, predicted = zip(*rows, strict=True)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert METRICS["accuracy"](labels, predicted) == pytest.approx((tp + tn) / len(rows))
    assert METRICS["f1"](labels, predicted) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
    assert METRICS["matthews"](labels, predicted) == pytest.approx((tp * tn - fp * fn) / root if root else 0.0)


@settings(deadline=None)
@given(three_classes)
def test_matthews_of_many_classes_is_the_correlation_of_indicators(rows: list[tuple[int, int]]) -> None:
    # Gorodkin 2004: covariance of the one-hot matrices over the root of the product of their variances
    labels, predicted = (np.eye(3)[list(column)] for column in zip(*rows, strict=True))
    x, y = labels - labels.mean(0), predicted - predicted.mean(0)
    root = math.sqrt(float((x * x).sum() * (y * y).sum()))
    expected = float((x * y).sum()) / root if root > 1e-9 else 0.0
    assert METRICS["matthews"](*zip(*rows, strict=True)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("metric", "expected"), [("accuracy", 1.0), ("matthews", 0.0), ("f1", 0.0)])
def test_rows_of_one_class_have_a_score_and_no_warning(metric: str, expected: float) -> None:
    assert METRICS[metric]([0, 0, 0], [0, 0, 0]) == expected


def test_of_equal_logits_the_first_class_is_the_answer() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 2.0, 2.0]])
    assert Predictions(("a", "b"), logits, (0, 1)).classes == [0, 1]


# score


def test_score_stands_beside_what_the_most_frequent_class_would_score() -> None:
    labels, predicted = (2, 2, 2, 0, 1), (2, 0, 2, 0, 2)
    found = score(answers(labels, predicted), "accuracy")
    assert (found.metric, found.value, found.n, found.majority) == ("accuracy", 0.6, 5, 0.6)
    assert found.at_or_below_majority
    assert not score(answers(labels, (2, 2, 2, 0, 0)), "accuracy").at_or_below_majority


def test_majority_lines_of_the_other_metrics_are_those_worked_by_hand() -> None:
    # three of four positive: always answering 1 has precision 3/4 and recall 1; a constant says nothing about the rows
    found = {metric: score(answers((1, 1, 0, 1), (0, 1, 0, 1), classes=2), metric).majority for metric in ("f1", "matthews")}
    assert found == {"f1": pytest.approx(6 / 7), "matthews": 0.0}
    assert score(answers((0, 0, 0, 1), (0, 1, 0, 1), classes=2), "f1").majority == 0.0


def test_majority_line_of_equally_frequent_classes_does_not_hang_on_row_order() -> None:
    lines = [score(answers(labels, labels, classes=2), "f1").majority for labels in ((0, 1, 0, 1), (1, 0, 0, 1))]
    assert lines == pytest.approx([2 / 3, 2 / 3])


def test_unknown_metric_is_refused_with_those_there_are() -> None:
    with pytest.raises(DataError, match="unknown metric 'bleu'") as error:
        score(answers((0, 1), (0, 1)), "bleu")
    assert error.value.expected == [
        "accuracy",
        "f1",
        "f1_of_0",
        "f1_weighted",
        "log_likelihood",
        "matthews",
        "mean_pearson_spearman",
        "pearson",
        "perplexity",
        "spearman",
    ]


def test_the_tables_of_metrics_and_of_their_kinds_name_the_same() -> None:
    assert sorted(METRICS) == sorted(CLASS_METRICS + REGRESSION_METRICS)


# regression


def of_values(labels: Sequence[float], predicted: Sequence[float], ids: Sequence[str] | None = None) -> Predictions:
    """Predictions of a regression that answers `predicted`."""
    named = tuple(ids or (f"dev:{i}" for i in range(len(labels))))
    return Predictions(named, torch.tensor(predicted, dtype=torch.float32)[:, None], tuple(map(float, labels)))


values = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(values, values), min_size=3, max_size=40))
def test_correlations_are_those_of_scipy(rows: list[tuple[float, float]]) -> None:
    labels, predicted = zip(*rows, strict=True)
    spread_out = all(np.ptp(column) > 1e-3 * max(map(abs, column)) for column in (labels, predicted))
    expected = (scipy.stats.pearsonr(labels, predicted)[0], scipy.stats.spearmanr(labels, predicted)[0]) if spread_out else None
    found = METRICS["pearson"](labels, predicted), METRICS["spearman"](labels, predicted)
    assert all(-1 <= one <= 1 for one in found)
    assert METRICS["mean_pearson_spearman"](labels, predicted) == pytest.approx(sum(found) / 2, abs=1e-12)
    if expected:
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        ((1.0, 2.0, 3.0), (2.5, 2.5, 2.5)),
        ((2.0, 2.0, 2.0), (1.0, 2.0, 3.0)),
        ((1.0, 2.0, 3.0), (0.3, 0.3 + 6e-8, 0.3 + 9e-8)),  # what batches of other shapes leave of one value in fp32
        ((0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_a_constant_answer_has_no_correlation_and_scores_zero_its_own_line(
    metric: str, labels: Sequence[float], predicted: Sequence[float]
) -> None:
    found = score(of_values(labels, predicted), metric)
    assert (found.value, found.majority, found.n) == (0.0, 0.0, len(labels)) and found.at_or_below_majority


def test_correlations_worked_by_hand() -> None:
    predictions = of_values((1, 2, 3, 4), (10, 9, 100, 1000))
    assert score(predictions, "spearman").value == pytest.approx(0.8)  # 1 − 6·2 / (4·15)
    assert score(of_values((1, 2, 3), (3, 2, 1)), "pearson").value == pytest.approx(-1.0)
    assert METRICS["pearson"]((1e-200, 2e-200, 4e-200), (1, 2, 4)) == pytest.approx(1.0)


def test_metrics_of_one_kind_are_refused_for_the_other_and_so_are_values_that_are_no_numbers() -> None:
    with pytest.raises(DataError, match="accuracy is no metric of a regression"):
        score(of_values((1, 2), (1, 2)), "accuracy")
    with pytest.raises(DataError, match="pearson is no metric of a classifier"):
        score(answers((0, 1), (0, 1)), "pearson")
    with pytest.raises(DataError, match="not finite"):
        score(of_values((1, 2), (1, float("nan"))), "pearson")
    with pytest.raises(DataError, match="predicts no classes"):
        _ = of_values((1, 2), (1, 2)).classes
    with pytest.raises(DataError, match="predicts no values"):
        _ = answers((0, 1), (0, 1)).values


def test_values_do_not_flip_their_agreement_is_the_mean_difference_by_row_id() -> None:
    dense, other = of_values((0, 0, 0), (1, 2, 3), ids="abc"), of_values((0, 0, 0), (3, 1, 2.5), ids="cab")
    found = agreement(dense, other)
    assert found.mean_difference == pytest.approx((0 + 0 + 0.5) / 3)  # c: 3 and 3; a: 1 and 1; b: 2 and 2.5
    assert (found.flips, found.lost, found.gained, found.n) == (None, None, None, 3)
    assert found.counts is None and found.dense_counts is None
    assert agreement(answers((0, 1), (0, 1)), answers((0, 1), (1, 1))).mean_difference is None
    with pytest.raises(DataError, match="of a classifier and of a regression"):
        agreement(dense, answers((0, 1, 2), (0, 1, 2), ids="abc"))


def test_subgroups_of_values_are_scored_by_their_metric() -> None:
    groups = {"a": "x", "b": "x", "c": "y", "d": "y"}
    found = subgroup_scores(of_values((1, 2, 1, 2), (1, 2, 2, 1), ids="abcd"), groups, "pearson")
    assert (found["x"].value, found["y"].value) == (pytest.approx(1.0), pytest.approx(-1.0))


# subgroup_scores


def test_subgroups_are_joined_by_id_and_scored_alone() -> None:
    groups = {"d": "overlap", "a": "plain", "c": "overlap", "b": "plain", "e": "overlap", "unused": "other"}
    found = subgroup_scores(answers((0, 1, 1, 1, 0), (0, 0, 1, 1, 1), ids="abcde"), groups)
    assert list(found) == ["overlap", "plain"]
    assert (found["plain"].value, found["plain"].n, found["plain"].majority) == (0.5, 2, 0.5)
    assert (found["overlap"].value, found["overlap"].n, found["overlap"].majority) == pytest.approx((2 / 3, 3, 2 / 3))


def test_rows_without_a_subgroup_are_named() -> None:
    with pytest.raises(DataError, match="rows without a subgroup") as error:
        subgroup_scores(answers((0, 1), (0, 1), ids=("dev:0", "dev:1")), {"dev:0": "plain"})
    assert error.value.got == ["dev:1"]


# agreement


def test_agreement_is_joined_by_row_id_not_by_position() -> None:
    dense = answers((0, 1, 2, 0, 1), (0, 1, 1, 2, 1), ids="abcde")
    other = answers((1, 1, 0, 0, 2), (0, 0, 1, 1, 2), ids="ebadc")
    # a 0→1 where 0 is right: lost; b 1→0, 1 right: lost; c 1→2, 2 right: gained; d 2→1, 0 right: neither; e 1→0, 1 right: lost
    found = agreement(dense, other)
    assert (found.flips, found.lost, found.gained, found.n) == (5, 3, 1, 5)
    assert (dict(found.dense_counts), dict(found.counts)) == ({0: 1, 1: 3, 2: 1}, {0: 2, 1: 2, 2: 1})


def test_shuffling_rows_changes_no_agreement() -> None:
    labels, before, after = zip(*product((0, 1, 2), repeat=3), strict=True)
    ids = [f"dev:{i}" for i in range(27)]
    order = random.Random(3).sample(range(27), 27)
    dense = answers(labels, before, ids)
    shuffled = answers([labels[i] for i in order], [after[i] for i in order], [ids[i] for i in order])
    # of every 9 rows with a label: 6 flip; dense right in 3, of which 2 go wrong; wrong in 6, of which 2 come right
    assert agreement(dense, answers(labels, after, ids)) == agreement(dense, shuffled)
    found = agreement(dense, shuffled)
    assert (found.flips, found.lost, found.gained, found.n) == (18, 6, 6, 27)
    assert agreement(dense, dense).flips == 0


@pytest.mark.parametrize("ids", [("a", "b"), ("a", "b", "x"), ("a", "b", "c", "x")])
def test_predictions_of_different_rows_are_not_compared(ids: tuple[str, ...]) -> None:
    dense = answers((0, 1, 0), (0, 1, 0), ids="abc")
    other = answers((0,) * len(ids), (0,) * len(ids), ids)
    with pytest.raises(DataError, match="different rows") as error:
        agreement(dense, other)
    assert all(id in str(error.value.got) for id in set("abc") ^ set(ids))


def test_mean_loss_is_that_of_torch_over_rows_of_any_length(tiny_folder: Path) -> None:
    from tombola.objective import load_weights
    from tombola.tasks.encode import collate

    model, rows = load_weights(tiny_folder, ("negative", "positive"), head_seed=0), sentiment(tiny_folder, 21, 3)
    model.train()
    found = mean_loss(model, rows, tokens_per_batch=40)
    assert model.training, "given back as it was"
    model.eval()
    with torch.no_grad():
        each = [model(**collate(rows, [row])).loss.item() for row in range(21)]
    assert found == pytest.approx(sum(each) / 21, rel=1e-5)
