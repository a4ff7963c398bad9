"""Bias-only models: features worked out by hand, out-of-fold by a second way, and a join that drops nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from tombola.bias import (
    BIAS_MODELS,
    BiasPredictions,
    bias_predictions,
    ngram_log_probabilities,
    nli_features,
    no_vectors,
    paraphrase_features,
    vectors_of_file,
    vectors_of_model,
    words,
)
from tombola.errors import DataError

TABLE = {"cat": [1.0, 0.0], "dog": [1.0, 1.0], "car": [0.0, 1.0]}


def vectors(word: str) -> Any:
    return None if word not in TABLE else np.array(TABLE[word])


# --------------------------------------------------------------------------------------------------------------- features


def test_words_are_lower_case_and_marks_stand_alone() -> None:
    assert words("The doctor's cat, NEAR it.") == ["the", "doctor", "'", "s", "cat", ",", "near", "it", "."]


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        # a contiguous part
        ("the cat saw a dog", "saw a dog", [1, 1, 1, math.log(2), 1, 1, 1]),
        # the same words in another order; lengths are equal, and log(max(0, 1)) = 0
        ("the cat saw", "saw the cat", [0, 1, 1, 0, 1, 1, 1]),
        # cosines to {the, cat, saw}: dog 1/√2, car 0, and "flies", of which nothing is known, 0
        ("the cat saw", "dog car flies", [0, 0, 0, 0, (math.sqrt(0.5)) / 3, 0, 0]),
        ("the cat saw", "dog cat", [0, 0, 0.5, 0, (1 + math.sqrt(0.5)) / 2, math.sqrt(0.5), 1]),
        ("the cat saw", "cat", [1, 1, 1, math.log(2), 1, 1, 1]),  # a single word: the second smallest is the smallest
    ],
)
def test_the_seven_features_of_an_inference_pair(premise: str, hypothesis: str, expected: list[float]) -> None:
    assert nli_features(premise, hypothesis, vectors) == pytest.approx(expected)


def test_features_of_a_paraphrase_pair() -> None:
    found = paraphrase_features("the cat saw the dog", "the dog saw", vectors)
    a_in_b, b_in_a = 4 / 5, 1.0
    nearest = [1, math.sqrt(0.5), 1, 1, 1]  # cat to dog; all others are there
    assert found == pytest.approx([a_in_b, b_in_a, 3 / 4, 0, math.log(5 / 3), sum(nearest) / 5, 1])
    assert paraphrase_features("a dog runs", "runs a dog", no_vectors)[3] == 1


@pytest.mark.parametrize("pair", [("", ""), ("a", ""), ("", "a"), ("…", "?!")])
def test_empty_and_odd_texts_have_finite_features(pair: tuple[str, str]) -> None:
    for of in (nli_features, paraphrase_features):
        assert len(of(*pair, vectors)) == 7 and all(map(math.isfinite, of(*pair, vectors)))


def test_vectors_of_a_file_and_what_is_no_such_file(tmp_path: Path) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text("2 3\nThe 1 0 2\ncat 0.5 -1 0\n", encoding="utf-8")
    found = vectors_of_file(file)
    assert found("the").tolist() == [1, 0, 2] and found("cat").tolist() == [0.5, -1, 0] and found("dog") is None
    file.write_text("the 1 0 2\ncat 0.5 -1\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        vectors_of_file(file)


def test_vectors_of_a_model_are_means_of_its_pieces(tiny_folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
    word = next(w for w in tokenizer.get_vocab() if w.isalpha())
    (piece,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    found = vectors_of_model(model, tokenizer)
    assert torch.equal(torch.from_numpy(found(word)), model.get_input_embeddings().weight[piece].detach())
    assert found("zzqzzq") is None, "what the tokenizer does not know has no vector"


# ------------------------------------------------------------------------------------------------------------ predictions


def pairs(n: int, seed: int = 0) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """Rows of three classes in which overlap says "entailment" nine times in ten."""
    draw, vocabulary = np.random.default_rng(seed), [f"w{i}" for i in range(40)]
    texts, labels = [], []
    for _ in range(n):
        label = int(draw.integers(3))
        premise = draw.choice(vocabulary, 8, replace=False).tolist()
        overlaps = (label == 0) == (draw.random() < 0.9)
        texts.append((" ".join(premise), " ".join(premise[:3] if overlaps else draw.choice(vocabulary, 3).tolist())))
        labels.append(label)
    return [f"train:{i}" for i in range(n)], texts, labels


CLASSES = ("entailment", "neutral", "contradiction")


def test_every_row_is_predicted_by_a_model_that_has_not_seen_it() -> None:
    ids, texts, labels = pairs(90)
    found = bias_predictions("nli-overlap", ids, texts, labels, CLASSES, folds=3, seed=1)
    x, y = np.array([nli_features(*pair, no_vectors) for pair in texts]), np.array(labels)
    wanted = np.empty((90, 3))
    for train, held in StratifiedKFold(3, shuffle=True, random_state=1).split(x, y):
        model = LogisticRegression(C=100, solver="liblinear", class_weight="balanced").fit(x[train], y[train] == 0)
        p = model.predict_proba(x[held])[:, 1]
        wanted[held] = np.stack([p, (1 - p) / 2, (1 - p) / 2], axis=1)  # the two others share what is left
    assert np.allclose(found.log_probabilities.exp().numpy(), wanted, atol=1e-6)
    assert found.ids == tuple(ids) and found.classes == CLASSES
    right = (found.log_probabilities.argmax(1) == 0).numpy() == (y == 0)
    assert right.mean() > 0.8, "the planted bias is found"


def test_in_sample_is_surer_of_itself_than_out_of_fold() -> None:
    draw = np.random.default_rng(0)
    texts = [(" ".join(f"w{i}" for i in draw.integers(0, 300, 12)), "") for _ in range(120)]
    labels = draw.integers(0, 2, 120).tolist()  # nothing to learn
    gold = {
        folds: bias_predictions("first-text", [f"t:{i}" for i in range(120)], texts, labels, ("no", "yes"), folds=folds)
        .log_probabilities[range(120), labels]
        .exp()
        .mean()
        .item()
        for folds in (1, 5)
    }
    assert gold[1] > 0.6 > 0.55 > gold[5]


def test_other_rows_are_predicted_by_a_model_of_all() -> None:
    ids, texts, labels = pairs(60)
    more = {"dev:0": texts[0], "dev:1": texts[7]}
    found = bias_predictions("nli-overlap", ids, texts, labels, CLASSES, folds=3, more=more)
    x = np.array([nli_features(*pair, no_vectors) for pair in texts])
    model = LogisticRegression(C=100, solver="liblinear", class_weight="balanced").fit(x, np.array(labels) == 0)
    p = model.predict_proba(x[[0, 7]])[:, 1]
    assert found.of(["dev:0", "dev:1"], CLASSES)[:, 0].exp().tolist() == pytest.approx(p.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", BIAS_MODELS)
def test_every_bias_model_gives_probabilities_of_all_classes(name: str) -> None:
    ids, texts, labels = pairs(60)
    found = bias_predictions(name, ids, texts, labels, CLASSES, folds=3)
    assert found.log_probabilities.exp().sum(1).tolist() == pytest.approx([1.0] * 60, rel=1e-5)
    again = bias_predictions(name, ids, texts, labels, CLASSES, folds=3)
    assert torch.equal(found.log_probabilities, again.log_probabilities)


def test_rows_and_classes_are_joined_by_name() -> None:
    logs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]).log()
    found = BiasPredictions(("a", "b"), logs, ("x", "y", "z")).of(["b", "a"], ("z", "x", "y"))
    assert found.exp().flatten().tolist() == pytest.approx([0.7, 0.1, 0.2, 0.2, 0.5, 0.3])


def test_what_does_not_cover_the_rows_is_refused_by_name() -> None:
    logs = torch.tensor([[0.5, 0.5], [math.nan, 0.5]]).log()
    one = BiasPredictions(("a", "b"), logs, ("x", "y"))
    with pytest.raises(DataError, match="do not cover") as error:
        one.of(["a", "c", "d"], ("x", "y"))
    assert "2 of 3" in str(error.value) and "c, d" in str(error.value)
    with pytest.raises(DataError, match="other classes"):
        one.of(["a"], ("x", "w"))
    with pytest.raises(DataError, match="not numbers"):
        one.of(["a", "b"], ("x", "y"))


@pytest.mark.parametrize(
    ("name", "texts", "labels", "classes", "said"),
    [
        ("overlap", [("a", "b")] * 9, [0, 1, 2] * 3, CLASSES, "unknown bias model"),
        ("nli-overlap", [("a",)] * 9, [0, 1, 2] * 3, CLASSES, "reads two texts"),
        ("nli-overlap", [("a", "b")] * 9, [0, 1, 2] * 3, ("x", "y", "z"), "tells entailment from the rest"),
        ("paraphrase-overlap", [("a", "b")] * 9, [0] * 8 + [1], ("x", "y"), "too few rows"),
    ],
)
def test_what_cannot_be_predicted_is_refused(name: str, texts: Any, labels: Any, classes: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        bias_predictions(name, [str(i) for i in range(9)], texts, labels, classes)


# ---------------------------------------------------------------------------------------------------- biased language models


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("themselves", [True, False])
def test_an_ngram_model_counts_what_followed(order: int, themselves: bool) -> None:
    draw, vocabulary, smoothing = np.random.default_rng(0), 4, 0.5
    train = [draw.integers(0, vocabulary, n).tolist() for n in (5, 7, 6)]
    rows = train if themselves else [[0, 1, 2, 3], [3, 3]]
    found = ngram_log_probabilities(train, vocabulary, None if themselves else rows, order=order, smoothing=smoothing)
    for i, row in enumerate(rows):
        others = [other for j, other in enumerate(train) if not (themselves and i == j)]
        for at in range(len(row)):
            before = row[max(0, at + 2 - order) : at + 1] if order > 1 else []
            follow = [smoothing] * vocabulary
            for other in others:
                for place in range(1, len(other)):
                    if other[max(0, place + 1 - order) : place] == before if order > 1 else True:
                        follow[other[place]] += 1
            wanted = [math.log(n / sum(follow)) for n in follow]
            assert found[i][at].tolist() == pytest.approx(wanted, rel=1e-4)
