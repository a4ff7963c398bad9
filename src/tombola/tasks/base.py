"""What a task and its rows are: the two values that every other file of this room makes or reads.

Read `Rows` first: labels and predictions are joined by its ids, never by position. `split_selection` then keeps the
rows on which a search chooses its ticket apart from those that train it and those that are reported.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from tombola.errors import DataError

Role = Literal["train", "report", "challenge"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one split, in file order, column by column."""

    ids: tuple[str, ...]  # "{split}:{idx}", unique and stable
    texts: tuple[tuple[str, ...], ...]  # one or two texts a row
    labels: tuple[int, ...]  # index into Task.labels
    groups: tuple[str, ...] | None = None  # the subgroup of each row, for splits that have any

    def __post_init__(self) -> None:
        columns = (self.ids, self.texts, self.labels, *(() if self.groups is None else (self.groups,)))
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
class Task:
    """What is asked, of which texts, and how answers are scored; the rows themselves come from `load_rows`."""

    name: str  # also the folder of the task under --data
    text: tuple[str, ...]  # columns the model reads, in this order
    labels: tuple[str, ...]  # class names in the order of their ids
    metric: str  # both the reported one and the one that stops a search
    splits: Mapping[Role, str]  # role -> name of the split that plays it
    source: Hub | Grammar
    extra_metrics: tuple[str, ...] = ()  # reported beside `metric`
    options: Mapping[str, int | float] = field(default_factory=dict)  # resolved; generated tasks only


def shared_texts(rows: Rows, other: Rows) -> tuple[str, ...]:
    """Ids of the rows whose texts, all of them and letter for letter, also stand in `other`; any is a leak."""
    elsewhere = set(other.texts)
    return tuple(id for id, texts in zip(rows.ids, rows.texts, strict=True) if texts in elsewhere)


def split_selection(
    train: Rows, report_rows: int, *, seed: int, max_train: int | None = None, max_selection: int | None = None
) -> tuple[Rows, Rows]:
    """(train, selection): disjoint parts of `train`, both in file order; the second is for choosing a ticket.

    The selection has as many rows as the report split, but at most 15 % of `train` and at most `max_selection`,
    drawn uniformly (not stratified) by `seed`. Rows of `train` with the same texts as a selection row are dropped:
    `len(shared_texts(train, selection)) - len(selection)` says how many. What is left is cut to `max_train` rows,
    drawn by the same seed; a smaller cap gives a subset of what a larger one gives.

    Raises: DataError if a cap or a part is empty, or a part holds a single class.
    """
    caps = {"report_rows": report_rows, "max_train": max_train, "max_selection": max_selection}
    if bad := {name: cap for name, cap in caps.items() if cap is not None and cap < 1}:
        raise DataError("a number of rows is not positive", got=bad, expected="1 or more, or None for no cap")
    size = min(report_rows, 15 * len(train) // 100, len(train) if max_selection is None else max_selection)
    if size == 0:
        raise DataError(
            "too few train rows to hold any out for selection",
            got=f"{len(train)} rows, of which 15 % is less than one",
            expected="7 rows or more",
        )
    # One permutation decides all: selection from its head, train from its tail, so that neither cap moves the other.
    order = random.Random(seed).sample(range(len(train)), len(train))
    selection = train.take(sorted(order[:size]))
    held_out = set(selection.texts)
    rest = [i for i in reversed(order[size:]) if train.texts[i] not in held_out]
    parts = {"train": train.take(sorted(rest[:max_train])), "selection": selection}
    if single := {name: len(part) for name, part in parts.items() if len(set(part.labels)) < 2}:
        raise DataError(
            f"{' and '.join(single)} would hold fewer than two classes",
            got=", ".join(f"{rows} {name} rows" for name, rows in single.items()),
            expected="two classes or more in each part",
            next="raise max_train or max_selection, or take another seed",
        )
    return parts["train"], parts["selection"]
