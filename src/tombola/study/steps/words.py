"""The step bag_of_words: a linear model of words and pairs of words, which knows no order beyond two and nothing beforehand.

It stands beside every score as the majority line does: what a network with destroyed weights reaches may be no more than this.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tombola.errors import DataError
from tombola.evaluate import Predictions, score
from tombola.study.cells import Cell, Lab, write_json
from tombola.study.data import TaskData, same_data
from tombola.study.steps.shared import write_scores
from tombola.tasks import Rows

Progress = Callable[[float], None]
STRENGTHS = (0.1, 1.0, 10.0)  # inverse regularisation, chosen on the selection rows
FEATURES = 300_000  # the most frequent ones


def run_bag_of_words(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """Logistic regression, or ridge for a regression, of the train rows; the scores of a dense model of kind bag-of-words.

    Features: tf-idf of lower-cased words and pairs of neighbours that stand in two rows or more; of pairs of texts those of
    either side apart, the words that both have, and four numbers of how much they overlap (`overlap_features`).
    """
    data = same_data(cell, lab)
    fitted = [_fitted(data, strength) for strength in STRENGTHS]
    progress(0.8)
    on_selection = [score(model(data.selection), data.task.metric).value for model in fitted]
    best = max(range(len(fitted)), key=on_selection.__getitem__)
    predictions = {role: fitted[best](rows) for role, (_, rows) in data.evaluated().items()}
    write_scores(cell, out, data, predictions, None, None, stage="full", kind="bag-of-words")
    tried = dict(zip(map(str, STRENGTHS), on_selection, strict=True))
    write_json(out / "words.json", {"strength": STRENGTHS[best], "selection": tried})
    write_json(out / "result.json", {"warnings": []})


def tokens(texts: Sequence[str]) -> list[str]:
    """The words and pairs of neighbouring words of one row, each with the side it is of; of pairs also the words both have."""
    sides = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in texts]
    found = []
    for i, words in enumerate(sides):
        found += [f"{i} {word}" for word in words] + [f"{i} {a} {b}" for a, b in pairwise(words)]
    return found + ([f"both {word}" for word in dict.fromkeys(sides[0]) if word in sides[1]] if len(sides) == 2 else [])


def overlap_features(texts: Sequence[str]) -> list[float]:
    """Of two texts: Jaccard index of their words, share of the first's in the second, of the second's in the first, and the log
    ratio of their lengths; nothing of one text."""
    if len(texts) < 2:
        return []
    first, second = (re.findall(r"\w+", text.lower()) for text in texts[:2])
    a, b, both = set(first), set(second), set(first) & set(second)
    shares = [len(both) / max(len(of), 1) for of in (a | b, a, b)]
    return [*shares, math.log((1 + len(first)) / (1 + len(second)))]


def _fitted(data: TaskData, strength: float) -> Callable[[Rows], Predictions]:
    """A model of the train rows, as a function of rows."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge

    task, labels = data.task, list(data.train.labels)
    if not task.labels:
        raise DataError("there is no bag of words of running text", got=task.name, expected="a task with labels")
    counted = TfidfVectorizer(analyzer=tokens, min_df=2, max_features=FEATURES, sublinear_tf=True)

    def features(texts: Sequence[Sequence[str]], of: Callable[[Any], Any]) -> Any:
        beside = csr_matrix([overlap_features(one) for one in texts]) if len(texts[0]) == 2 else None
        return of(texts) if beside is None else hstack([of(texts), beside]).tocsr()

    x = features(data.train.texts, counted.fit_transform)
    if task.regression:
        ridge = Ridge(alpha=1 / strength).fit(x, labels)
    else:
        logistic = LogisticRegression(C=strength, max_iter=1000).fit(x, labels)

    def predict(rows: Rows) -> Predictions:
        found = features(rows.texts, counted.transform)
        if task.regression:
            return Predictions(rows.ids, torch.tensor(ridge.predict(found))[:, None], rows.labels)
        logits = torch.full((len(rows), len(task.labels)), -30.0, dtype=torch.float64)  # of a class no train row has
        logits[:, torch.tensor(logistic.classes_)] = torch.tensor(logistic.predict_log_proba(found)).clamp_min(-30.0)
        return Predictions(rows.ids, logits, rows.labels)

    return predict
