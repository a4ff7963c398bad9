"""Bias-only models: what can be said of a row without understanding it. Features, out-of-fold predictions, their join by row id.

A bias-only model is a small classifier on features that a shortcut would use: word overlap of a pair, the claim alone; of tokens
a language model that counts what came after a few of them (`BIASED_LMS`). Its log-probabilities enter the losses of
`tombola.losses`. They are out-of-fold: of every train row by a model that has not seen it,
since a bias that has learnt its rows by heart is sure of all of them, and then nothing is left to learn from.
Source: Liu et al. 2022, section 2.3 of its appendix; the seven features of Clark, Yatskar, Zettlemoyer 2019 (chrisc36/debias);
claim-only: Schuster et al. 2019. Deviations: words are cut by a regular expression; released predictions were in-sample.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tombola.errors import DataError

Vectors = Callable[[str], np.ndarray | None]  # word → its vector; None where it has none
_WORDS = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words and single marks of punctuation, lower case."""
    return _WORDS.findall(text.lower())


# -------------------------------------------------------------------------------------------------------------- features


def nli_features(premise: str, hypothesis: str, vectors: Vectors) -> list[float]:
    """The seven features of an inference pair, by which alone many are answered right.

    Whether the hypothesis is a contiguous part of the premise; whether all its words are in the premise; the share of them that
    are; log(max(words of premise − words of hypothesis, 1)); mean, smallest and second smallest, over the hypothesis' words, of
    the largest cosine to a word of the premise. A cosine of a word without a vector is 0; the word itself has 1.
    """
    p, h = words(premise), words(hypothesis)
    there = set(p)
    nearest = sorted(_nearest(h, p, vectors)) or [0.0]
    return [
        float(_contains(p, h)),
        float(there.issuperset(h)),
        sum(word in there for word in h) / max(len(h), 1),
        math.log(max(len(p) - len(h), 1)),
        float(np.mean(nearest)),
        nearest[0],
        nearest[min(1, len(nearest) - 1)],
    ]


def paraphrase_features(one: str, other: str, vectors: Vectors) -> list[float]:
    """The same kind of features for a pair without a direction: what overlap says of two questions.

    Shares of words of each that are in the other, Jaccard of the two sets, whether they are the same bag of words, log ratio of
    lengths (absolute), mean nearest cosine both ways. The published feature code was never released: these are ours.
    """
    a, b = words(one), words(other)
    x, y = set(a), set(b)
    shared = len(x & y)
    return [
        sum(word in y for word in a) / max(len(a), 1),
        sum(word in x for word in b) / max(len(b), 1),
        shared / max(len(x | y), 1),
        float(sorted(a) == sorted(b)),
        abs(math.log(max(len(a), 1) / max(len(b), 1))),
        float(np.mean(_nearest(a, b, vectors) or [0.0])),
        float(np.mean(_nearest(b, a, vectors) or [0.0])),
    ]


def _contains(whole: Sequence[str], part: Sequence[str]) -> bool:
    return any(list(whole[at : at + len(part)]) == list(part) for at in range(len(whole) - len(part) + 1))


def _nearest(of: Sequence[str], among: Sequence[str], vectors: Vectors) -> list[float]:
    """For each word its largest cosine to a word of the other text; 1 for one that is there, 0 where nothing is known."""
    there = set(among)
    known = [vector for vector in (vectors(word) for word in there) if vector is not None]
    table = np.stack([v / max(float(np.linalg.norm(v)), 1e-12) for v in known]) if known else None
    found = []
    for word in of:
        vector = vectors(word)
        if word in there:
            found.append(1.0)
        elif vector is None or table is None:
            found.append(0.0)
        else:
            found.append(float((table @ (vector / max(float(np.linalg.norm(vector)), 1e-12))).max()))
    return found


def vectors_of_file(path: Path | str) -> Vectors:
    """Word vectors of a text file: a word and its numbers on each line, as GloVe and fastText write them.

    Raises: DataError naming the first line whose numbers are others in count, or no numbers.
    """
    table: dict[str, np.ndarray] = {}
    width = 0
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue  # fastText: rows and columns
            try:
                vector = np.array(values, dtype=np.float32)
            except ValueError:
                vector = np.zeros(0, dtype=np.float32)
            width = width or len(vector)
            if len(vector) != width or not width:
                raise DataError(
                    f"{path} is no file of word vectors",
                    got=f"line {number}: {line[:60]!r}",
                    expected=f"a word and {width} numbers",
                )
            table[word.lower()] = vector
    return table.get


def vectors_of_model(model: Any, tokenizer: Any) -> Vectors:
    """Word vectors of a model itself: the mean of the input embeddings of a word's pieces. Remembered, word by word."""
    table = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    known: dict[str, np.ndarray | None] = {}

    def vector(word: str) -> np.ndarray | None:
        if word not in known:
            pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
            known[word] = table[pieces].mean(0) if pieces and tokenizer.unk_token_id not in pieces else None
        return known[word]

    return vector


def no_vectors(word: str) -> None:
    """For features without word vectors: every cosine but that of a word with itself is 0."""


# ------------------------------------------------------------------------------------------------------------ bias models


@dataclass(frozen=True, slots=True)
class BiasModel:
    """One row of `BIAS_MODELS`."""

    about: str
    features: Callable[[Sequence[Sequence[str]], Vectors], Any]  # texts of each row → matrix, or texts for an n-gram model
    pipeline: Callable[[], Any]  # an sklearn classifier of these
    merged: str | None = None  # the class that is told from all others, which then share what is left
    texts: int = 2  # that a row must have


def _pairs(of: Callable[[str, str, Vectors], list[float]]) -> Callable[[Sequence[Sequence[str]], Vectors], Any]:
    return lambda texts, vectors: np.array([of(row[0], row[1], vectors) for row in texts])


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=100, solver="liblinear", class_weight="balanced")


def _multinomial() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=100, max_iter=1000))


def _ngrams() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(analyzer=_uni_and_bigrams, min_df=2), LogisticRegression(C=1.0, max_iter=1000))


def _uni_and_bigrams(text: str) -> list[str]:
    found = words(text)
    return found + [" ".join(pair) for pair in pairwise(found)]


BIAS_MODELS: Mapping[str, BiasModel] = {
    "nli-overlap": BiasModel("seven overlap features, entailment or not", _pairs(nli_features), _logistic, merged="entailment"),
    "paraphrase-overlap": BiasModel("overlap of the two texts", _pairs(paraphrase_features), _multinomial),
    "first-text": BiasModel(
        "n-grams of the first text alone (a claim)", lambda texts, _: [row[0] for row in texts], _ngrams, texts=1
    ),
    "first-word": BiasModel(
        "the first word of the last text alone (a mark)",
        lambda texts, _: [" ".join(words(row[-1])[:1]) for row in texts],
        _ngrams,
        texts=1,
    ),
    "second-text": BiasModel(
        "n-grams of the second text alone (a hypothesis)", lambda texts, _: [row[1] for row in texts], _ngrams
    ),
}


# ------------------------------------------------------------------------------------------------------------ predictions


@dataclass(frozen=True, slots=True)
class BiasPredictions:
    """Log-probabilities of a bias-only model (or a teacher), a row each, keyed by row id; columns are `classes`, by name."""

    ids: tuple[str, ...]
    log_probabilities: Float[Tensor, "row cls"]
    classes: tuple[str, ...]

    def of(self, ids: Sequence[str], classes: Sequence[str]) -> Float[Tensor, "row cls"]:
        """The rows of these ids, in this order, with the columns of these classes.

        Raises: DataError for ids that are not there (naming them), for classes of other names, for values that are not numbers.
        """
        at = {name: i for i, name in enumerate(self.ids)}
        missing = [name for name in ids if name not in at]
        if missing:
            raise DataError(
                "bias predictions do not cover the rows",
                got=f"{len(missing)} of {len(ids)} rows without one: {', '.join(missing[:5])}"
                + (", …" if len(missing) > 5 else ""),
                expected="a prediction for every row, keyed by its id",
                next="predict them from these very rows; none is left out in silence",
            )
        if sorted(self.classes) != sorted(classes):
            raise DataError("bias predictions are of other classes", got=", ".join(self.classes), expected=", ".join(classes))
        found = self.log_probabilities[[at[name] for name in ids]][:, [self.classes.index(name) for name in classes]]
        bad = [name for name, row in zip(ids, found, strict=True) if bool(row.isnan().any()) or not bool(row.isfinite().any())]
        if bad:
            raise DataError("bias predictions are not numbers", got=f"{len(bad)} rows: {', '.join(bad[:5])}")
        return found


def bias_predictions(
    name: str,
    ids: Sequence[str],
    texts: Sequence[Sequence[str]],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    vectors: Vectors = no_vectors,
    folds: int = 5,
    seed: int = 0,
    more: Mapping[str, Sequence[str]] | None = None,
) -> BiasPredictions:
    """The bias-only model's opinion of every train row, out-of-fold, and of `more` rows (id → texts), by one fitted on all.

    name      of `BIAS_MODELS`
    folds     each row is predicted by a model trained on the other folds, stratified by class, drawn by `seed`; 1 = in-sample,
              as released
    Raises: DataError for an unknown model, a class with fewer rows than folds, a pair model on single texts, a merged class that
    the task does not have.
    """
    from sklearn.model_selection import StratifiedKFold

    if name not in BIAS_MODELS:
        raise DataError(f"unknown bias model {name!r}", expected=", ".join(BIAS_MODELS))
    model, y = BIAS_MODELS[name], np.asarray(labels)
    if min(map(len, texts)) < model.texts:
        raise DataError(f"the bias model {name} reads two texts", got="rows of one text", expected="pairs")
    if model.merged is not None and model.merged not in classes:
        raise DataError(f"the bias model {name} tells {model.merged} from the rest", got=", ".join(classes))
    counts = np.bincount(y, minlength=len(classes))
    if folds > 1 and counts.min() < folds:
        few = ", ".join(f"{classes[i]} ({n})" for i, n in enumerate(counts) if n < folds)
        raise DataError("too few rows of a class for so many folds", got=few, expected=f"at least {folds} of each")
    target = y if model.merged is None else (y == classes.index(model.merged)).astype(int)
    x, found = model.features(texts, vectors), np.empty((len(y), len(classes)))
    if folds == 1:
        found[:] = _logs(model, model.pipeline().fit(x, target), x, classes)
    else:
        for train, held in StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(y)), y):
            fitted = model.pipeline().fit(_take(x, train), target[train])
            found[held] = _logs(model, fitted, _take(x, held), classes)
    names = list(ids)
    if more:
        fitted = model.pipeline().fit(x, target)
        found = np.concatenate([found, _logs(model, fitted, model.features(list(more.values()), vectors), classes)])
        names += list(more)
    return BiasPredictions(tuple(names), torch.from_numpy(found).float(), tuple(classes))


def _take(x: Any, rows: np.ndarray) -> Any:
    return x[rows] if isinstance(x, np.ndarray) else [x[i] for i in rows]


def _logs(model: BiasModel, fitted: Any, x: Any, classes: Sequence[str]) -> np.ndarray:
    """Log-probabilities of all classes; where one was told from the rest, the rest share theirs alike (− log of their number)."""
    logs = fitted.predict_log_proba(x)
    if model.merged is None:
        return np.asarray(logs)
    rest = logs[:, 0] - math.log(len(classes) - 1)
    return np.stack([logs[:, 1] if name == model.merged else rest for name in classes], axis=1)


# ---------------------------------------------------------------------------------------------------- biased language models

Context = Callable[[Sequence[int], int, int], tuple[int, ...]]  # (tokens of a row, place, where its reply begins) → what is read


def last_tokens(n: int) -> Context:
    """An n-gram model's: the `n` tokens before the place, fewer at the start of a row."""
    return lambda row, at, begin: tuple(row[max(0, at - n) : at])


def _cue(row: Sequence[int], at: int, begin: int) -> tuple[int, ...]:
    return (row[0], at - begin)


def _place(row: Sequence[int], at: int, begin: int) -> tuple[int, ...]:
    return (at - begin,)


@dataclass(frozen=True, slots=True)
class BiasedLM:
    """One row of `BIASED_LMS`: what it reads, and what a model would that does not see the shortcut."""

    context: Context
    prior: Context


BIASED_LMS: Mapping[str, BiasedLM] = {
    "bigram": BiasedLM(last_tokens(1), last_tokens(0)),
    "trigram": BiasedLM(last_tokens(2), last_tokens(0)),
    # the first token of the row (a header), and how far the reply has come; of nothing else in it
    "cue": BiasedLM(_cue, _place),
}


@dataclass(frozen=True, slots=True)
class TokenOpinions:
    """What a biased language model says after each token of some rows: counts of what came next, by context, and smoothing.

    Counts and no probabilities, which would take a vocabulary's worth of numbers for each token: `log_probabilities` spreads
    them out for a batch. With `left_out` a row's own tokens are never among the counts that it is predicted by: out of fold,
    each row a fold of its own.
    """

    ids: tuple[str, ...]
    # [row][place]: which context a token is predicted from, that after the last included; −1: one that was never met
    places: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]  # [row][place]: the token that is there
    begins: tuple[int, ...]  # [row]: the place in the row of the first of these
    counts: tuple[Mapping[int, int], ...]  # [context]: token → how often it came next
    left_out: bool = True
    smoothing: float = 0.1  # added to the count of every token of the vocabulary

    def as_json(self) -> dict[str, Any]:
        """All of it, as `from_json` reads it."""
        return asdict(self) | {"counts": [sorted(one.items()) for one in self.counts]}

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> "TokenOpinions":
        """What `as_json` was called on."""
        rows = {name: tuple(map(tuple, said[name])) for name in ("places", "answers")}
        counts = tuple(dict(one) for one in said["counts"])
        return TokenOpinions(tuple(said["ids"]), **rows, begins=tuple(said["begins"]), counts=counts,
                             left_out=said["left_out"], smoothing=said["smoothing"])  # fmt: skip

    def at(self, ids: Sequence[str], lengths: Sequence[int]) -> list[int]:
        """The numbers of the rows of these ids, of so many tokens each.

        Raises: DataError for ids that are not there, or rows that were cut into other tokens.
        """
        known = {
            name: (i, begin + len(of))
            for i, (name, begin, of) in enumerate(zip(self.ids, self.begins, self.answers, strict=True))
        }
        if missing := [name for name in ids if name not in known]:
            raise DataError(
                "bias predictions do not cover the rows",
                got=f"{len(missing)} of {len(ids)} rows without one: {', '.join(missing[:5])}",
                expected="a prediction for every row, keyed by its id",
            )
        if other := [name for name, length in zip(ids, lengths, strict=True) if known[name][1] != length]:
            raise DataError("bias predictions are of rows that were cut into other tokens", got=", ".join(other[:5]))
        return [known[name][0] for name in ids]

    def of_answers(self, row: int) -> float:
        """The log-likelihood of a row's own tokens, but for what the size of the vocabulary adds to each."""
        longest = self.begins[row] + len(self.answers[row])
        vocabulary = 1 + max(max(self.answers[row]), *(max(one, default=0) for one in self.counts))
        table = self.log_probabilities([row], vocabulary, longest)[0]
        return float(sum(table[self.begins[row] - 1 + j, token] for j, token in enumerate(self.answers[row])))

    def log_probabilities(self, rows: Sequence[int], vocabulary: int, longest: int) -> Float[Tensor, "row position cls"]:
        """Of the rows of these numbers, at position j what it says of the token at j + 1; elsewhere all tokens are alike."""
        table = torch.full((len(rows), longest, vocabulary), self.smoothing)
        where, counts = list[tuple[int, int, int]](), list[float]()
        for i, row in enumerate(rows):
            own: Counter[tuple[int, int]] = Counter()
            if self.left_out:
                own.update(zip(self.places[row], self.answers[row], strict=False))  # after the last there is none
            for j, context in enumerate(self.places[row], start=self.begins[row] - 1):
                seen = self.counts[context] if context >= 0 else {}
                where += [(i, j, token) for token in seen]
                counts += [n - own[context, token] for token, n in seen.items()]
        if where:
            table.index_put_(tuple(torch.tensor(where).T), torch.tensor(counts, dtype=table.dtype), accumulate=True)
        return table.log() - table.sum(-1, keepdim=True).log()


def token_opinions(
    ids: Sequence[str],
    rows: Sequence[Sequence[int]],
    context: Context,
    *,
    begins: Sequence[int] | None = None,
    train: Sequence[Sequence[int]] | None = None,
    smoothing: float = 0.1,
    left_out: bool = True,
) -> TokenOpinions:
    """What a biased language model that reads `context` (of `BIASED_LMS`) says of these rows of tokens.

    begins: where the reply of each row begins, before which nothing is predicted or counted; without it at the second token.
    train: other rows, all of whose tokens but the first are counted instead.
    """
    begun = [1] * len(rows) if begins is None else list(begins)
    known: dict[tuple[int, ...], int] = {}
    counts: list[Counter[int]] = []
    counted = zip(rows, begun, strict=True) if train is None else ((row, 1) for row in train)
    for row, begin in counted:
        for at in range(begin, len(row)):
            number = known.setdefault(context(row, at, begin), len(known))
            if number == len(counts):
                counts.append(Counter())
            counts[number][row[at]] += 1
    places = tuple(
        tuple(known.get(context(row, at, begin), -1) for at in range(begin, len(row) + 1))
        for row, begin in zip(rows, begun, strict=True)
    )
    answers = tuple(tuple(row[begin:]) for row, begin in zip(rows, begun, strict=True))
    return TokenOpinions(tuple(ids), places, answers, tuple(begun), tuple(counts), left_out and train is None, smoothing)


def ngram_log_probabilities(
    train: Sequence[Sequence[int]],
    vocabulary: int,
    rows: Sequence[Sequence[int]] | None = None,
    *,
    order: int = 2,
    smoothing: float = 0.1,
) -> list[Float[Tensor, "_ token"]]:
    """What an n-gram model of the train rows says of each row: log-probabilities of the token after each position.

    Counts of what followed the last `order` − 1 tokens (fewer at the start of a row), plus `smoothing` for every token of the
    vocabulary; after a context never seen all are alike. Without `rows`: of the train rows, each without its own counts.
    """
    of = train if rows is None else rows
    found = token_opinions(
        [str(i) for i in range(len(of))], of, last_tokens(order - 1), train=None if rows is None else train, smoothing=smoothing
    )
    return [found.log_probabilities([i], vocabulary, len(row))[0] for i, row in enumerate(of)]
