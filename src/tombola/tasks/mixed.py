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
from typing import Any, cast

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


# ------------------------------------------------------------------------- a task and its challenge, of Liu et al. 2022


def _pairs(name: str, text: tuple[str, str], labels: tuple[str, ...], *folders: str, **more: Any) -> Task:
    """A task that is read from a folder of data alone."""
    splits: dict[Role, str] = {"train": "train", "report": "validation"}
    return Task(name, text, labels, "accuracy", splits, Folders(folders or (name,)), **more)


PAIR, CLAIM = ("sentence1", "sentence2"), ("claim", "evidence")
FACTS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
HANS_SUBCASES = replace(HANS, name="hans-subcases", group_column="subcase")  # thirty, of which the name says heuristic and class
# Published sizes: 677 rows of PAWS-QQP, dev and test; 8,000 of PAWS-Wiki, test.
PAWS_QQP = _pairs("paws-qqp", PAIR, ("not_duplicate", "duplicate"), "paws_qqp", official={"validation": 677})
PAWS_WIKI = _pairs("paws-wiki", PAIR, ("not_duplicate", "duplicate"), "paws_wiki", official={"test": 8000})
FEVER = _pairs("fever", CLAIM, FACTS, official={"train": 242_911, "validation": 16_664})
FEVER_SYMMETRIC = _pairs(
    "fever-symmetric",
    CLAIM,
    FACTS[:2],
    "fever_symmetric",
    official={"v1_generated": 717, "v1_full": 956, "v2_validation": 708, "v2_test": 712},
)
FM2 = _pairs("fm2", CLAIM, FACTS[:2], official={"validation": 1169})


def _robust(name: str, of: Task, challenge: Part, split: str, *train: Part, **more: Any) -> Task:
    """`of`, with another data set as its challenge, of which `split`; `train` are train rows besides its own (an oracle)."""
    source = Mixed(
        {"train": (Part(of.name), *train), "report": (Part(of.name),), "challenge": (challenge,)},
        {label: label for label in of.labels} | {"non-entailment": "contradiction"},
    )
    splits: dict[Role, str] = {"train": of.splits["train"], "report": of.splits["report"]}
    splits |= {"challenge": split}
    return Task(name, of.text, of.labels, of.metric, splits, source, of.extra_metrics, **more)


_THREE: Mapping[str, Any] = {
    "challenge_labels": HANS.labels,
    "merges": {"entailment": "entailment", "neutral": "non-entailment", "contradiction": "non-entailment"},
}
_QQP = replace(glue.QQP, extra_metrics=("f1", "f1_of_0", "f1_weighted"))
_HANS, _PAWS, _WIKI, _FACTS = (
    Part("hans-subcases"),
    Part("paws-qqp", split="validation", by_class=True),  # QQP's own is called so too
    Part("paws-wiki", by_class=True),
    Part("fever-symmetric", by_class=True),
)
# The challenge of a task of the paper, and with "+" the oracle that also trains on the challenge's own train rows.
ROBUST: Mapping[str, Task] = {
    task.name: task
    for task in (
        _robust("mnli-hans", glue.MNLI, _HANS, "validation", **_THREE),
        _robust("mnli+hans", glue.MNLI, _HANS, "validation", Part("hans-subcases", split="train"), **_THREE),
        _robust("qqp-paws", _QQP, _PAWS, "paws_qqp"),
        _robust("qqp+paws", _QQP, _PAWS, "paws_qqp", Part("paws-qqp", split="train")),
        _robust("qqp-paws-wiki", _QQP, _WIKI, "test"),
        _robust("qqp+paws-wiki", _QQP, _WIKI, "test", Part("paws-wiki", split="train")),
        _robust("fever-symmetric-v1", FEVER, _FACTS, "v1_generated"),
        _robust("fever-symmetric-v2", FEVER, _FACTS, "v2_test"),
        _robust("fever+symmetric-v2", FEVER, _FACTS, "v2_test", Part("fever-symmetric", split="v2_validation", times=10)),
    )
}


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
        own = task.challenge_labels if role == "challenge" and task.challenge_labels else task.labels
        names = [of.labels[int(label or 0)] for label in rows.labels]
        labels = tuple(own.index(name if own is task.challenge_labels else source.merged[name]) for name in names)
        groups = tuple(names) if part.by_class else rows.groups
        for time in range(1, part.times + 1):
            again = f"#{time}" if time > 1 else ""
            found.append(replace(rows, ids=tuple(f"{part.task}:{id}{again}" for id in rows.ids), labels=labels, groups=groups))
    of_rows = [group for rows in found for group in rows.groups or ()]
    return Rows(
        tuple(id for rows in found for id in rows.ids),
        tuple(texts for rows in found for texts in rows.texts),
        tuple(label for rows in found for label in rows.labels),
        tuple(of_rows) if all(rows.groups for rows in found) else None,
    )


def may_stand_for(task: Task, rows: Rows) -> list[tuple[int, ...]] | None:
    """Of each train row the classes that its label may stand for: of one that comes from a data set with fewer classes than the
    task (HANS among rows of MNLI) all that count as its own there. None where every label stands for itself.
    """
    if not isinstance(task.source, Mixed) or not task.merges:
        return None
    own = {part.task for part in task.source.parts["report"]}
    fewer = tuple({f"{part.task}:" for part in task.source.parts["train"]} - {f"{name}:" for name in own})
    several = {
        task.labels.index(name): tuple(i for i, other in enumerate(task.labels) if task.merges[other] == task.merges[name])
        for name in task.labels
    }
    labels = cast(tuple[int, ...], rows.labels)
    found = [several[label] if id.startswith(fewer) else (label,) for id, label in zip(rows.ids, labels, strict=True)]
    return found if any(len(one) > 1 for one in found) else None


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
