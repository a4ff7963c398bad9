"""Rows of another task with a planted shortcut: the number of a class, as a word before the last text.

Of train and report rows a share is marked, and of those most with the right class; of challenge rows, which are the report rows
again, all with a wrong one. A model that reads the mark instead of the text is right on the first and wrong on the second.
Source: the synthetic bias of the released code of Liu et al. 2022 (30 % of rows, 90 % of them right). Deviations: its report rows
have no marks that are right; draws here are exact shares, and by row id.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from tombola.tasks import glue
from tombola.tasks.base import Marked, Role, Rows, Task


def _marked(of: Task) -> Task:
    return replace(
        of,
        name=f"syn-{of.name}",
        splits={"train": of.splits["train"], "report": of.splits["report"], "challenge": "conflicting"},
        source=Marked(of.name),
        options={"share": 0.3, "strength": 0.9},
        official={},
        doubts=("some of its rows have a planted mark: compare with no published score",),
    )


SYN_MNLI, SYN_QQP, SYN_SST2 = _marked(glue.MNLI), _marked(glue.QQP), _marked(glue.SST2)
OPTIONS: Mapping[str, tuple[float, float]] = {"share": (0.0, 1.0), "strength": (0.0, 1.0)}  # least, greatest


@dataclass(frozen=True, slots=True)
class _Mark:
    """What stands before the last text of a row; None = nothing."""

    label: int | None
    aligned: bool


def parse_option(name: str, text: str) -> float | None:
    """The value of an option given as text; None if it is no number or out of range."""
    least, greatest = OPTIONS[name]
    try:
        value = float(text)
    except ValueError:
        return None
    return value if least <= value <= greatest else None


def load(task: Task, role: Role, read: Callable[[str, str], tuple[Task, Rows]]) -> Rows:
    """The rows of one role; `read(task, split)` gives all rows of the task that is marked. Groups: aligned, conflicting or
    unmarked.

    Raises: as `read`.
    """
    assert isinstance(task.source, Marked)
    _, rows = read(task.source.of, task.splits["report" if role == "challenge" else role])
    marks = _marks(task, role, rows)
    texts = tuple(
        row if mark.label is None else (*row[:-1], f"{mark.label} {row[-1]}") for row, mark in zip(rows.texts, marks, strict=True)
    )
    groups = tuple("unmarked" if mark.label is None else "aligned" if mark.aligned else "conflicting" for mark in marks)
    ids = tuple(f"{task.splits[role]}:{id.partition(':')[2]}" for id in rows.ids)
    return replace(rows, ids=ids, texts=texts, groups=groups)


def _marks(task: Task, role: Role, rows: Rows) -> list[_Mark]:
    """The mark of each row: exact shares, drawn by role alone, so that every seed and every cap of rows has the same."""
    rng, classes = random.Random(f"marks/{role}/{len(rows)}"), range(len(task.labels))
    wrong = [rng.choice([c for c in classes if c != label]) for label in rows.labels]
    if role == "challenge":
        return [_Mark(other, False) for other in wrong]
    n = round(float(task.options["share"]) * len(rows))
    order = rng.sample(range(len(rows)), n)
    right = set(order[: round(float(task.options["strength"]) * n)])
    marks = [_Mark(None, False)] * len(rows)
    for i in order:
        label = rows.labels[i]
        assert isinstance(label, int)
        marks[i] = _Mark(label if i in right else wrong[i], i in right)
    return marks
