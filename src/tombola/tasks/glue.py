"""The nine GLUE tasks: from a folder of JSON Lines (`--data DIR`) or from the Hub, checked row by row.

A folder holds `<task>/<split>.jsonl.gz` (or `.jsonl`), UTF-8, one object a line, with the columns of the Hub's `glue`
and its integers as labels. Read `load`; all that can be wrong with a file is said at once. Classes are joined by name: RTE,
QNLI and MNLI have 0 = entailment, WNLI has 1 = entailment.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tombola.errors import DataError
from tombola.tasks.base import Hub, Role, Rows, Task
from tombola.tasks.checks import Numbered, Problems, good_rows, told
from tombola.tasks.readers import read_rows, shortest


def _task(
    name: str, text: tuple[str, ...], labels: tuple[str, ...], rows: tuple[int, int], metric: str = "accuracy", *extra: str
) -> Task:
    """A task of the Hub's `glue`; `rows` are those of its train and validation split."""
    return Task(
        name=name,
        text=text,
        labels=labels,
        metric=metric,
        splits={"train": "train", "report": "validation"},  # the official test labels are not public
        source=Hub("nyu-mll/glue", name, "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"),
        extra_metrics=extra,
        official=dict(zip(("train", "validation"), rows, strict=True)),
    )


PAIR = ("sentence1", "sentence2")
COLA = _task("cola", ("sentence",), ("unacceptable", "acceptable"), (8551, 1043), "matthews")
SST2 = _task("sst2", ("sentence",), ("negative", "positive"), (67349, 872))
MRPC = _task("mrpc", PAIR, ("not_equivalent", "equivalent"), (3668, 408), "accuracy", "f1")
QQP = _task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), (363846, 40430), "accuracy", "f1")
STSB = _task("stsb", PAIR, ("score",), (5749, 1500), "pearson", "spearman")
QNLI = _task("qnli", ("question", "sentence"), ("entailment", "not_entailment"), (104743, 5463))
RTE = _task("rte", PAIR, ("entailment", "not_entailment"), (2490, 277))
# The mismatched rows are of genres that train has none of: another distribution, which is what a challenge set is. The
# verdict stands on the matched rows, as the GLUE score of most papers does.
_SPLITS: Mapping[Role, str] = {"train": "train", "report": "validation_matched", "challenge": "validation_mismatched"}
MNLI = replace(
    _task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), (392702, 9815)),
    splits=_SPLITS,
    official=dict(zip(_SPLITS.values(), (392702, 9815, 9832), strict=True)),
)
WNLI = replace(
    _task("wnli", PAIR, ("not_entailment", "entailment"), (635, 71)),
    doubts=(
        "WNLI is degenerate: 65 of its 71 validation rows share their first sentence with train rows and mostly have the other "
        "answer, so that full models score at or below the majority line (40 of 71); a ticket of it shows nothing",
    ),
)


def load(task: Task, split: str, *, data_dir: Path | None) -> Rows:
    """The checked rows of one split, from `data_dir` or, without it, from the Hub.

    Raises: DataError if the split is absent or unreadable, or any row is bad; says every kind of problem, with rows.
    """
    problems: Problems = {}
    if data_dir is None:
        where, numbered = f"split {split!r} of {task.name} from the Hub", _from_hub(task, split)
    else:
        path = find_file(data_dir, task.name, split)
        where, numbered = str(path), read_rows(path, _columns(task), problems)
    rows = good_rows(task, split, numbered, problems)
    if problems:
        classes = "a number" if task.regression else ", ".join(f"{i} = {name}" for i, name in enumerate(task.labels))
        raise DataError(
            f"bad data in {where}",
            got="\n            ".join(told(problems)),
            expected=f"columns {', '.join(task.text)}, label ({classes}) and a unique integer idx in every row",
            next="repair or replace the data; rows are never dropped silently",
        )
    return rows


def _columns(task: Task) -> tuple[str, ...]:
    return (*task.text, "label", "idx", *(() if task.group_column is None else (task.group_column,)))


def find_file(data_dir: Path, task: str, split: str) -> Path:
    """The file of a split in a folder of data. Raises: DataError saying what is there instead."""
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
            next="keep the one that is meant"
            if there
            else f"put the file into {folder}, or name a split that is there: {task}:train=SPLIT,report=SPLIT",
        )
    return there[0]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return f"{folder} holds {', '.join(names) or 'nothing'}"


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
        single = getattr(data.features.get("label"), "dtype", None) == "float32"
        return enumerate(({**row, "label": shortest(row["label"])} if single else row for row in data), start=1)
    if set(names) != set(task.labels):
        raise DataError(
            f"{source.repo} has other classes for {task.name}",
            got=", ".join(names),
            expected=", ".join(task.labels),
        )
    # Ids are the Hub's own, so classes go by name; -1, its sign for "no label", has none and stays as it is.
    by_id = dict(enumerate(names))
    return enumerate(({**row, "label": by_id.get(row["label"], row["label"])} for row in data), start=1)
