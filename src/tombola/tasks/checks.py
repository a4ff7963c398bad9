"""The one checker of rows: what is wrong with each, all of it at once, and the rows that are good.

Readers (`tombola.tasks.readers`) and the Hub give numbered rows; `good_rows` turns them into `Rows` and notes every fault
beside the numbers of the rows that have it; `told` says them.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping

from tombola.tasks.base import Answer, Rows, Task

SHOWN = 5  # row numbers shown of each kind of problem
KINDS_SHOWN = 12
LARGEST = 3.4e38  # what float32, the type of every model, can hold

Problems = dict[str, list[int]]  # what is wrong -> numbers of the rows it is wrong in, from 1; none: the whole split
Numbered = Iterable[tuple[int, Mapping[str, object]]]  # (row number from 1, row)

NOT_YET = "token-level and multi-label tasks are not supported yet"


def good_rows(task: Task, split: str, numbered: Numbered, problems: Problems) -> Rows:
    """The rows without a fault; the faults of the others go into `problems`."""
    ids: dict[object, None] = {}
    texts: list[tuple[str, ...]] = []
    labels: list[Answer] = []
    groups: list[str] = []
    for number, row in numbered:
        faults = list(_faults(task, row))
        id = number if task.id_column is None else row.get(task.id_column)
        if not faults and id in ids:
            faults.append(f"{task.id_column} repeats that of an earlier row")
        for fault in faults:
            problems.setdefault(fault, []).append(number)
        if not faults:
            label = row[task.label_column]
            ids[id] = None
            groups.append(str(row[task.group_column]) if task.group_column else "")
            texts.append(tuple(str(row[column]) for column in task.text))
            labels.append(float(label) if task.regression else class_id(task, label))  # type: ignore[arg-type]
    if not labels and not problems:
        problems["no rows"] = []
    if len(set(labels)) == 1:
        same = f"has the same value, {labels[0]:g}" if task.regression else f"is of one class, {task.labels[int(labels[0] or 0)]}"
        problems[f"every good row {same}"] = []
    named = tuple(f"{split}:{id}" for id in ids)
    return Rows(named, tuple(texts), tuple(labels), tuple(groups) if task.group_column else None)


def _faults(task: Task, row: Mapping[str, object]) -> Iterator[str]:
    """What is wrong with one row by itself. "NA", "null" and "None" are texts like any other."""
    needed = (*task.text, task.label_column, *(one for one in (task.id_column, task.group_column) if one is not None))
    for column in needed:
        value = row.get(column)
        if column not in row:
            yield f"no column {column!r} (columns there: {', '.join(map(str, row)) or 'none'})" + near(column, row)
        elif value is None or (isinstance(value, float) and value != value):  # NaN alone differs from itself
            yield f"{column} is null or NaN"
        elif isinstance(value, str) and not _is_unicode(value):
            yield f"{column} holds half a character (a lone surrogate)"
        elif isinstance(value, list | tuple | dict) and column != task.id_column:
            yield f"{column} is a {type(value).__name__}: {NOT_YET}"
        elif column == task.label_column:
            yield from _label_faults(task, column, value)
        elif column == task.id_column:
            if type(value) is not int:
                yield f"{column} is no integer but of type {type(value).__name__}"
        elif not isinstance(value, str):
            yield f"{column} is no text but of type {type(value).__name__}"
        elif not value.strip():
            yield f"{column} is empty"


def _label_faults(task: Task, column: str, value: object) -> Iterator[str]:
    if isinstance(value, str) and not value.strip():
        yield f"{column} is empty"
    elif task.regression:
        if type(value) not in (int, float):
            yield f"{column} {_short(value)} is no number"
        elif not abs(value) <= LARGEST:  # type: ignore[arg-type]
            yield f"{column} {_short(value)} is no finite number"
    elif class_id(task, value) < 0:
        yield f"{column} {_short(value)} is none of the classes" + (near(value, task.labels) if isinstance(value, str) else "")


def class_id(task: Task, label: object) -> int:
    """The id of a class given by name or by id; -1 for anything else, `True` and `1.0` included."""
    if isinstance(label, str) and label in task.labels:
        return task.labels.index(label)
    return label if type(label) is int and 0 <= label < len(task.labels) else -1


def told(problems: Problems) -> list[str]:
    """Each kind of problem with the numbers of its first rows; at most `KINDS_SHOWN` kinds."""
    lines = []
    for what, at in problems.items():
        more = f" and {len(at) - SHOWN} more" if len(at) > SHOWN else ""
        lines.append(f"{what}: row{'s' if len(at) > 1 else ''} {', '.join(map(str, at[:SHOWN]))}{more}" if at else what)
    return lines if len(lines) <= KINDS_SHOWN else [*lines[:KINDS_SHOWN], f"and {len(lines) - KINDS_SHOWN} more kinds of problem"]


def near(word: object, known: Iterable[object]) -> str:
    """ "; did you mean 'x'?", or nothing where no known word is near."""
    found = difflib.get_close_matches(str(word), [str(one) for one in known], n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no repr
        return f"of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
