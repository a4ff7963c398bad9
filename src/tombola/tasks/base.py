"""What a task and its rows are: the two values that every other file of this room makes or reads.

Read `Rows` first: labels and predictions are joined by its ids, never by position. `split_selection` then keeps the
rows on which a search chooses its ticket apart from those that train it and those that are reported.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tombola.errors import DataError
from tombola.objective import Form, Objective, Prompt

# selection: rows for choosing a mask, where a task has such; else they are held out of train
Role = Literal["train", "selection", "report", "challenge"]

# int: a class, as an index into Task.labels; float: the value of a regression; None: of running text, which is its own answer
Answer = int | float | None

# Which metrics there are, and for what kind of answer; `tombola.evaluate` computes them.
CLASS_METRICS = ("accuracy", "f1", "f1_of_0", "f1_weighted", "matthews")
REGRESSION_METRICS = ("pearson", "spearman", "mean_pearson_spearman")
TOKEN_METRICS = ("log_likelihood", "perplexity")
LOWER_IS_BETTER = ("perplexity",)
REPLY_METRICS = ("exact_match", "log_likelihood", "perplexity")  # of how a text goes on: the likeliest tokens are its own
MASKED_METRICS = ("masked_accuracy", "log_likelihood")  # of hidden tokens
SPAN_METRICS = ("answer_f1", "exact_match")  # of answers as text, by the official normalisation of SQuAD


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one split, in file order, column by column."""

    ids: tuple[str, ...]  # "{split}:{idx}", unique and stable
    texts: tuple[tuple[str, ...], ...]  # one or two texts a row
    labels: tuple[Answer, ...]
    groups: tuple[str, ...] | None = None  # the subgroup of each row, for splits that have any
    answers: tuple[tuple[tuple[int, str], ...], ...] | None = None  # of spans: (first character in the last text, text) of each

    def __post_init__(self) -> None:
        columns = (self.ids, self.texts, self.labels, *(one for one in (self.groups, self.answers) if one is not None))
        if len({len(column) for column in columns}) > 1:
            raise DataError("the columns of Rows differ in length", got=[len(column) for column in columns])
        if len(set(self.ids)) < len(self.ids):
            raise DataError(
                "row ids repeat, so labels cannot be joined by them",
                got=f"{len(self.ids)} rows with {len(set(self.ids))} different ids",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Iterable[int]) -> "Rows":
        """The rows at these positions, in the order of the positions."""
        at = tuple(indices)
        return Rows(
            ids=tuple(self.ids[i] for i in at),
            texts=tuple(self.texts[i] for i in at),
            labels=tuple(self.labels[i] for i in at),
            groups=None if self.groups is None else tuple(self.groups[i] for i in at),
            answers=None if self.answers is None else tuple(self.answers[i] for i in at),
        )


@dataclass(frozen=True, slots=True)
class Hub:
    """A data set on the Hugging Face Hub, pinned to a commit."""

    repo: str
    config: str
    revision: str


@dataclass(frozen=True, slots=True)
class Grammar:
    """A data set that tombola writes itself; `version` rises whenever the same options and seed give other rows."""

    version: int


@dataclass(frozen=True, slots=True)
class Folders:
    """A data set that is read from a folder of data alone; the first of these names that is there."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of another task."""

    task: str  # its name
    share: float = 1.0  # of its rows, drawn
    times: int = 1  # each row so often
    by_class: bool = False  # its rows have their own class as subgroup
    split: str | None = None  # None: as the role's split is called


@dataclass(frozen=True, slots=True)
class Mixed:
    """Rows of other tasks, under classes of their own."""

    parts: Mapping[Role, tuple[Part, ...]]
    merged: Mapping[str, str]  # class of a part → class


@dataclass(frozen=True, slots=True)
class Marked:
    """Rows of another task with a planted shortcut."""

    of: str  # the name of that task


@dataclass(frozen=True, slots=True)
class Loaded:
    """Rows that were read when the task was named: a user's files, or a Hub data set that tombola does not know.

    `description` is what a cell and a ticket say of it, as JSON: columns, class names, metric, and of a Hub data set
    repository, configuration and commit. Paths are no part of it: files are known by what is in them.
    """

    rows: Mapping[str, Rows]  # split -> its rows
    description: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked, of which texts, and how answers are scored; the rows themselves come from `load_rows`."""

    name: str  # also the folder of the task under --data
    text: tuple[str, ...]  # columns the model reads, in this order
    # class names in the order of their ids; a single name is that of a value: a regression; none: the text itself is asked for
    labels: tuple[str, ...]
    metric: str  # both the reported one and the one that stops a search
    splits: Mapping[Role, str]  # role -> name of the split that plays it
    source: Hub | Grammar | Loaded | Folders | Mixed | Marked
    extra_metrics: tuple[str, ...] = ()  # reported beside `metric`
    options: Mapping[str, int | float] = field(default_factory=dict)  # resolved; of tasks that are written or marked
    official: Mapping[str, int] = field(default_factory=dict)  # official splits with public labels -> their rows
    doubts: tuple[str, ...] = ()  # what every result on this task has to be read with
    label_column: str = "label"
    id_column: str | None = "idx"  # None: rows are named by their number
    group_column: str | None = None  # the subgroup of each row
    prompt: Prompt | None = None  # with it a language model is asked for words, without it any model by a head
    folder: str = ""  # under --data, where it is not the name
    challenge_labels: tuple[str, ...] = ()  # classes of challenge rows, where they are not those that a model is asked for
    merges: Mapping[str, str] = field(default_factory=dict)  # class of a model → the class of challenge rows it counts as
    form: Form = ""  # of a task without classes: hidden tokens, or answers within a text; else the next token

    @property
    def regression(self) -> bool:
        """Whether the answer is a number instead of a class."""
        return len(self.labels) == 1

    @property
    def objective(self) -> Objective:
        """What a model is asked."""
        return Objective(self.labels, self.prompt, tokens=not self.labels and not self.form, form=self.form)


def shared_texts(rows: Rows, other: Rows) -> tuple[str, ...]:
    """Ids of the rows whose texts, all of them and letter for letter, also stand in `other`; any is a leak."""
    elsewhere = set(other.texts)
    return tuple(id for id, texts in zip(rows.ids, rows.texts, strict=True) if texts in elsewhere)


def split_selection(
    train: Rows,
    report_rows: int,
    *,
    seed: int,
    max_train: int | None = None,
    max_selection: int | None = None,
    own: Rows | None = None,
) -> tuple[Rows, Rows]:
    """(train, selection): rows to train on and other rows for choosing a ticket, each in file order.

    The selection is held out of `train`: as many rows as the report split, but at most 15 % of `train` and at most
    `max_selection`, drawn uniformly (not stratified) by `seed`. With `own` it is drawn from those rows instead: all of
    them, or `max_selection`. Rows of `train` with the same texts as a selection row are dropped:
    `len(shared_texts(train, selection))`, less the selection where that was held out, says how many. What is left is cut
    to `max_train` rows, drawn by the same seed; a smaller cap gives a subset of what a larger one gives.

    Raises: DataError if a cap or a part is empty, or a part holds a single class (of a regression: a single value).
    """
    caps = {"report_rows": report_rows, "max_train": max_train, "max_selection": max_selection}
    if bad := {name: cap for name, cap in caps.items() if cap is not None and cap < 1}:
        raise DataError("a number of rows is not positive", got=bad, expected="1 or more, or None for no cap")
    # One permutation decides all: selection from its head, train from its tail, so that neither cap moves the other.
    order = random.Random(seed).sample(range(len(train)), len(train))
    if own is None:
        size = min(report_rows, 15 * len(train) // 100, len(train) if max_selection is None else max_selection)
        if size == 0:
            raise DataError(
                "too few train rows to hold any out for selection",
                got=f"{len(train)} rows, of which 15 % is less than one",
                expected="7 rows or more",
            )
        selection, order = train.take(sorted(order[:size])), order[size:]
    else:
        drawn = random.Random(seed).sample(range(len(own)), len(own))
        selection = own.take(sorted(drawn[:max_selection]))
    held_out = set(selection.texts)
    rest = [i for i in reversed(order) if train.texts[i] not in held_out]
    parts = {"train": train.take(sorted(rest[:max_train])), "selection": selection}
    if single := {
        name: len(part)
        for name, part in parts.items()
        if len(set(part.labels) - {None}) < 2 and part.labels != (None,) * len(part)
    }:
        different = "different values" if all(isinstance(label, float) for label in train.labels) else "classes"
        raise DataError(
            f"{' and '.join(single)} would hold fewer than two {different}",
            got=", ".join(f"{rows} {name} rows" for name, rows in single.items()),
            expected=f"two {different} or more in each part",
            next="raise max_train or max_selection, or take another seed",
        )
    return parts["train"], parts["selection"]
