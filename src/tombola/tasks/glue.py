"""GLUE tasks as they are: from a folder of JSON Lines (`--data DIR`) or from the Hub, checked row by row.

A folder holds `<task>/<split>.jsonl.gz` (or `.jsonl`), UTF-8, one object a line, with the columns of the Hub's `glue`
and its integers as labels. Read `load`; all that can be wrong with a file is said at once.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tombola.errors import DataError
from tombola.tasks.base import Hub, Role, Rows, Task

_REPO, _COMMIT = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
_SPLITS: Mapping[Role, str] = {"train": "train", "report": "validation"}  # the official test labels are not public

COLA = Task(
    name="cola",
    text=("sentence",),
    labels=("unacceptable", "acceptable"),
    metric="matthews",
    splits=_SPLITS,
    source=Hub(_REPO, "cola", _COMMIT),
)
SST2 = Task(
    name="sst2",
    text=("sentence",),
    labels=("negative", "positive"),
    metric="accuracy",
    splits=_SPLITS,
    source=Hub(_REPO, "sst2", _COMMIT),
)
MRPC = Task(
    name="mrpc",
    text=("sentence1", "sentence2"),
    labels=("not_equivalent", "equivalent"),
    metric="accuracy",
    splits=_SPLITS,
    source=Hub(_REPO, "mrpc", _COMMIT),
    extra_metrics=("f1",),
)
RTE = Task(
    name="rte",
    text=("sentence1", "sentence2"),
    labels=("entailment", "not_entailment"),
    metric="accuracy",
    splits=_SPLITS,
    source=Hub(_REPO, "rte", _COMMIT),
)

_SHOWN = 5  # row numbers shown of each kind of problem
_KINDS_SHOWN = 12

Problems = dict[str, list[int]]  # what is wrong -> numbers of the rows it is wrong in, from 1; none: the whole split
Numbered = Iterable[tuple[int, dict[str, object]]]  # (row number from 1, row)


def load(task: Task, split: str, *, data_dir: Path | None) -> Rows:
    """The checked rows of one split, from `data_dir` or, without it, from the Hub.

    Raises: DataError if the split is absent or unreadable, or any row is bad; says every kind of problem, with rows.
    """
    problems: Problems = {}
    if data_dir is None:
        where, numbered = f"split {split!r} of {task.name} from the Hub", _from_hub(task, split)
    else:
        path = _find(data_dir, task.name, split)
        where, numbered = str(path), _from_file(path, problems)
    rows = _good_rows(task, split, numbered, problems)
    if problems:
        told = [_told(what, at) for what, at in problems.items()]
        if len(told) > _KINDS_SHOWN:
            told[_KINDS_SHOWN:] = [f"and {len(told) - _KINDS_SHOWN} more kinds of problem"]
        classes = ", ".join(f"{i} = {name}" for i, name in enumerate(task.labels))
        raise DataError(
            f"bad data in {where}",
            got="\n            ".join(told),
            expected=f"columns {', '.join(task.text)}, label ({classes}) and a unique integer idx in every row",
            next="repair or replace the data; rows are never dropped silently",
        )
    return rows


def _told(what: str, at: list[int]) -> str:
    if not at:
        return what
    more = f" and {len(at) - _SHOWN} more" if len(at) > _SHOWN else ""
    return f"{what}: row{'s' if len(at) > 1 else ''} {', '.join(map(str, at[:_SHOWN]))}{more}"


def _good_rows(task: Task, split: str, numbered: Numbered, problems: Problems) -> Rows:
    """The rows without a fault; the faults of the others go into `problems`."""
    ids: dict[object, None] = {}
    texts: list[tuple[str, ...]] = []
    labels: list[int] = []
    for number, row in numbered:
        faults = list(_faults(task, row))
        if not faults and row["idx"] in ids:
            faults.append("idx repeats that of an earlier row")
        for fault in faults:
            problems.setdefault(fault, []).append(number)
        if not faults:
            ids[row["idx"]] = None
            texts.append(tuple(str(row[column]) for column in task.text))
            labels.append(_class_id(task, row["label"]))
    if not labels and not problems:
        problems["no rows"] = []
    if len(set(labels)) == 1:
        problems[f"every good row is of one class, {task.labels[labels[0]]}"] = []
    return Rows(ids=tuple(f"{split}:{idx}" for idx in ids), texts=tuple(texts), labels=tuple(labels))


def _faults(task: Task, row: Mapping[str, object]) -> Iterator[str]:
    """What is wrong with one row by itself. "NA", "null" and "None" are texts like any other."""
    for column in (*task.text, "label", "idx"):
        value = row.get(column)
        if column not in row:
            yield f"no column {column!r} (columns there: {', '.join(row) or 'none'})"
        elif value is None or value != value:  # NaN alone differs from itself
            yield f"{column} is null or NaN"
        elif column == "label":
            if _class_id(task, value) < 0:
                yield f"label {value!r} is none of the classes"
        elif column == "idx":
            if type(value) is not int:
                yield f"idx is no integer but of type {type(value).__name__}"
        elif not isinstance(value, str):
            yield f"{column} is no text but of type {type(value).__name__}"
        elif not value.strip():
            yield f"{column} is empty"


def _class_id(task: Task, label: object) -> int:
    """The id of a class given by name or by id; -1 for anything else, `True` and `1.0` included."""
    if isinstance(label, str) and label in task.labels:
        return task.labels.index(label)
    return label if type(label) is int and 0 <= label < len(task.labels) else -1


def _find(data_dir: Path, task: str, split: str) -> Path:
    folder = data_dir / task
    for place in (data_dir, folder):
        if not place.is_dir():
            raise DataError(
                f"there is no data folder {place}",
                got=_listing(place.parent),
                expected=f"a folder with {task}/{split}.jsonl.gz in it",
                next="give --data the folder that holds one folder a task",
            )
    there = [path for path in (folder / f"{split}.jsonl.gz", folder / f"{split}.jsonl") if path.is_file()]
    if len(there) != 1:
        raise DataError(
            f"{'two files' if there else 'no file'} for split {split!r} of {task}",
            got=_listing(folder),
            expected=f"either {split}.jsonl.gz or {split}.jsonl",
            next="keep the one that is meant" if there else f"put the file into {folder}",
        )
    return there[0]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return f"{folder} holds {', '.join(names) or 'nothing'}"


def _from_file(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, object]]]:
    """The lines of the file that are objects; the others go into `problems`."""
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: damaged, cut short or no gzip file",
            got=f"{type(error).__name__}: {error}",
            next="fetch the file again",
        ) from error
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n") if content else (), start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            fault = "not UTF-8"
        except json.JSONDecodeError as error:
            fault = f"not valid JSON ({error.msg})"
        else:
            if isinstance(row, dict):
                yield number, row
                continue
            fault = "not a JSON object"
        problems.setdefault(fault, []).append(number)


def _from_hub(task: Task, split: str) -> Numbered:
    from datasets import load_dataset

    assert isinstance(task.source, Hub)
    source = task.source
    try:
        data = load_dataset(source.repo, source.config, split=split, revision=source.revision)
    except (OSError, ValueError) as error:  # unreachable, unknown or gated; or a configuration that is not cached
        raise DataError(
            f"{task.name} could not be loaded from the Hub",
            got=f"{type(error).__name__}: {error}",
            expected=f"{source.repo}, configuration {source.config}, commit {source.revision}",
            next=f"pass --data DIR with {task.name}/{split}.jsonl.gz in it, or go online",
        ) from error
    names = getattr(data.features.get("label"), "names", None)
    if names is None:
        return enumerate(data, start=1)
    if set(names) != set(task.labels):
        raise DataError(
            f"{source.repo} has other classes for {task.name}",
            got=", ".join(names),
            expected=", ".join(task.labels),
        )
    # Ids are the Hub's own, so classes go by name; -1, its sign for "no label", has none and stays as it is.
    by_id = dict(enumerate(names))
    return enumerate(({**row, "label": by_id.get(row["label"], row["label"])} for row in data), start=1)
