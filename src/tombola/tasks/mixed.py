"""HANS, MNLI merged to two classes, and mixtures of the two: tasks whose rows come from those of others.

HANS has three heuristics, and each is a subgroup of its rows: a model that follows one has nearly all of its entailed rows right
and nearly none of the others. Published scores are of 30,000 rows; rows that were generated again with the published templates
are of the same distribution and are not those rows.
Source: McCoy et al. 2019; the mixtures are those of the released code of Prasanna et al. 2020, whose exact cut is not known.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from tombola.errors import DataError
from tombola.tasks import glue
from tombola.tasks.base import Folders, Mixed, Part, Role, Rows, Task

HANS = Task(
    name="hans",
    text=("premise", "hypothesis"),
    labels=("entailment", "non-entailment"),
    metric="accuracy",
    splits={"train": "train", "report": "validation"},
    source=Folders(("hans", "hans_regen")),
    official={"train": 30_000, "validation": 30_000},
    group_column="heuristic",
)
TWO = ("entailment", "not_entailment")
_MERGED = {"entailment": "entailment", "neutral": TWO[1], "contradiction": TWO[1], "non-entailment": TWO[1]}
# On the matched rows of MNLI, as MNLI itself; what is asked of HANS is its challenge.
_SPLITS: Mapping[Role, str] = {"train": "train", "report": "validation_matched", "challenge": "validation"}
_SCORED: Mapping[Role, tuple[Part, ...]] = {"report": (Part("mnli"),), "challenge": (Part("hans"),)}


def _mixed(name: str, *train: Part) -> Task:
    source = Mixed({"train": train, **_SCORED}, _MERGED)
    return Task(name, ("premise", "hypothesis"), TWO, "accuracy", _SPLITS, source)


MNLI2 = _mixed("mnli2", Part("mnli"))
MNLI2_HALF = _mixed("mnli2-half", Part("mnli", share=0.5))
HANS_MNLI2 = _mixed("hans+mnli2", Part("mnli", share=0.5), Part("hans", share=0.5, split="train"))


def load(task: Task, role: Role, read: Callable[[str, str], tuple[Task, Rows]]) -> Rows:
    """The rows of one role, part after part; `read(task, split)` gives a part's task and all of its rows.

    Of a part with a share, so many of its rows are drawn, the same each time, in file order. Ids begin with the part's task.
    Raises: as `read`.
    """
    source, found = task.source, list[Rows]()
    assert isinstance(source, Mixed)
    for part in source.parts[role]:
        of, rows = read(part.task, part.split or task.splits[role])
        if part.share < 1:
            draw = random.Random(f"{part.task} {part.share}")
            rows = rows.take(sorted(draw.sample(range(len(rows)), round(part.share * len(rows)))))
        labels = tuple(task.labels.index(source.merged[of.labels[int(label or 0)]]) for label in rows.labels)
        found.append(replace(rows, ids=tuple(f"{part.task}:{id}" for id in rows.ids), labels=labels))
    groups = [group for rows in found for group in rows.groups or ()]
    return Rows(
        tuple(id for rows in found for id in rows.ids),
        tuple(texts for rows in found for texts in rows.texts),
        tuple(label for rows in found for label in rows.labels),
        tuple(groups) if all(rows.groups for rows in found) else None,
    )


def load_folder(task: Task, split: str, data_dir: Path | None) -> Rows:
    """The rows of a task that is read from a folder of data alone. Raises: DataError as `glue.load`, and without a folder."""
    assert isinstance(task.source, Folders)
    names = task.source.names
    if data_dir is None:
        raise DataError(
            f"{task.name} is read from a folder of data",
            got="none",
            expected=f"--data DIR with {' or '.join(f'{name}/{split}.jsonl.gz' for name in names)} in it",
            next="the data set's authors give it as text files; their columns are kept, classes by name",
        )
    there = next((name for name in names if (data_dir / name).is_dir()), names[0])
    return glue.load(replace(task, name=there), split, data_dir=data_dir)
