"""The tasks a ticket can be found on: `TASKS` names them, `get_task` reads "name:option=value", `load_rows` gives rows.

A task with data of its own is one `Task(...)` value in `glue`; one that is written by a grammar stands in `generated`; your
own files and other data sets of the Hub are made tasks in `files`. All rows pass the one checker in `checks`.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tombola.errors import DataError
from tombola.tasks import generated, glue, marked, mixed, mlm, squad, text
from tombola.tasks.base import Folders, Grammar, Hub, Loaded, Marked, Mixed, Role, Rows, Task, shared_texts, split_selection
from tombola.tasks.files import described_task as _described
from tombola.tasks.files import files_task, hub_task, spec_of
from tombola.tasks.mlm import corpus_task
from tombola.tasks.prompts import PROMPTS, asked_in_words

__all__ = [
    "TASKS",
    "Folders",
    "Grammar",
    "Hub",
    "Loaded",
    "Marked",
    "Mixed",
    "Role",
    "Rows",
    "Task",
    "asked_in_words",
    "bare_name",
    "corpus_task",
    "data_doubts",
    "described_task",
    "files_task",
    "get_task",
    "hub_task",
    "load_rows",
    "shared_texts",
    "spec_of",
    "split_selection",
]

TASKS: dict[str, Task] = {
    "cola": glue.COLA,
    "sst2": glue.SST2,
    "mrpc": glue.MRPC,
    "qqp": glue.QQP,
    "stsb": glue.STSB,
    "mnli": glue.MNLI,
    "qnli": glue.QNLI,
    "rte": glue.RTE,
    "wnli": glue.WNLI,
    "hans": mixed.HANS,
    "mnli2": mixed.MNLI2,
    "mnli2-half": mixed.MNLI2_HALF,
    "hans+mnli2": mixed.HANS_MNLI2,
    "hans-subcases": mixed.HANS_SUBCASES,
    "paws-qqp": mixed.PAWS_QQP,
    "paws-wiki": mixed.PAWS_WIKI,
    "fever": mixed.FEVER,
    "fever-symmetric": mixed.FEVER_SYMMETRIC,
    "fm2": mixed.FM2,
    **mixed.ROBUST,
    "syn-mnli": marked.SYN_MNLI,
    "syn-qqp": marked.SYN_QQP,
    "syn-sst2": marked.SYN_SST2,
    "acceptability": generated.ACCEPTABILITY,
    "nli-overlap": generated.NLI_OVERLAP,
    "agreement": generated.AGREEMENT,
    "wikitext2": text.WIKITEXT2,
    "mlm-wikitext2": mlm.MLM_WIKITEXT2,
    "squad": squad.SQUAD,
}

ROLES: tuple[Role, ...] = ("train", "selection", "report", "challenge")
NO_SPLIT = "none"  # as the split of a role that a task can do without
IN_WORDS = "answer=words"  # asks a language model, see `asked_in_words`


def get_task(spec: str) -> Task:
    """The task of "name" or "name:option=value,option=value", all its options resolved.

    Options of a generated task are numbers. Those of a task with data are the roles of its splits, as in
    "qnli:train=train_from_dev,report=validation"; `challenge=none` leaves a role out. With `answer=words` a task with classes
    asks a language model for words instead of a head for classes. "hub:<name>[:config][@revision]" is any
    data set of the Hub, its columns guessed (`hub_task` names them); the task `files` is made by `files_task`.

    Raises: DataError for an unknown name, or saying every option that is unknown, repeated or out of range; as `hub_task`.
    """
    name, colon, rest = spec.partition(":")
    if name == "hub" and colon:
        return hub_task(spec)
    if name.partition("#")[0] == "files":
        raise DataError(
            "the task `files` is made of files",
            got=repr(spec),
            expected="--train FILE --validation FILE [--test FILE] --text COLUMN[,COLUMN] --label COLUMN",
            next="in Python: tombola.tasks.files_task(train=…, validation=…, text=…, label=…)",
        )
    if name not in TASKS:
        known = [*TASKS, "mlm", "files", "hub:<name>[:config]"]
        raise DataError(f"there is no task {name!r}", got=repr(spec), expected=", ".join(known), next=_nearest(name, TASKS))
    task = TASKS[name]
    written = isinstance(task.source, Grammar)
    parts = rest.split(",") if colon else []
    if IN_WORDS in parts and name in PROMPTS:
        parts.remove(IN_WORDS)
        task = asked_in_words(task)
    known = [*task.options, *(() if written else ROLES)]
    given: dict[str, Any] = {}
    problems: list[str] = []
    for part in parts:
        option, equals, said = part.partition("=")
        read = generated.parse_option if written else marked.parse_option if option in marked.OPTIONS else _split_name
        value = read(option, said) if option in known else None
        if not equals:
            problems.append(f"{part!r} is not option=value")
        elif option not in known:
            near = _nearest(option, known)
            problems.append(f"there is no option {option!r}" + (f"; {near}" if near else ""))
        elif option in given:
            problems.append(f"{option} is given twice")
        elif value is None:
            problems.append(f"{option}={said} is not {_wanted(option, written=written)}")
        else:
            given[option] = value
    options = {**task.options, **{option: value for option, value in given.items() if option in task.options}}
    named: dict[Any, str] = dict(task.splits) | {role: split for role, split in given.items() if role not in task.options}
    splits = {role: split for role, split in named.items() if split != NO_SPLIT}
    twice = sorted({split for split in splits.values() if list(splits.values()).count(split) > 1})
    problems += [f"the split {split} serves twice" for split in twice]
    if problems:
        if written:
            described = [f"{option} ({generated.option_range(option)}, default {v})" for option, v in task.options.items()]
        else:
            described = [f"{role} (a split, default {task.splits.get(role, NO_SPLIT)})" for role in ROLES]
        described += [f"{IN_WORDS} (of a language model, instead of a head)"] if name in PROMPTS else []
        raise DataError(f"wrong options of task {name}", got="\n            ".join(problems), expected=", ".join(described))
    return replace(task, options=options, splits=splits)


def _wanted(option: str, *, written: bool) -> str:
    if written:
        return generated.option_range(option)
    return "a number from 0 to 1" if option in marked.OPTIONS else "the name of a split"


def _split_name(role: str, text: str) -> str | None:
    """The name of a split given as text; None for what is none. Train and report rows there must be."""
    good = re.fullmatch(r"\w[\w.-]*", text) and (text != NO_SPLIT or role in ("selection", "challenge"))
    return text if good else None


def described_task(description: Mapping[str, Any]) -> Task:
    """The Hub data set that a cell or ticket describes, read again at its commit and asked as it was."""
    task, prompt = _described(description), description.get("prompt")
    return task if prompt is None else asked_in_words(task, prompt["template"], prompt["words"])


def bare_name(spec: str) -> str:
    """A task's name without what only tells it from others of its name: options of grammars, fingerprints of files.

    Which splits a task was read from stays: scores on others are other scores.
    """
    name = spec.partition("#")[0].partition(":")[0]
    if name in TASKS and isinstance(TASKS[name].source, Grammar):
        return f"{name}:{IN_WORDS}" if IN_WORDS in spec.split(":")[-1].split(",") else name
    return spec.partition("#")[0]


def data_doubts(task: Task, rows: Mapping[Role, Rows]) -> tuple[str, ...]:
    """What scores on these rows have to be read with: splits that are not official or not whole, and the task's own doubts."""
    said = list(task.doubts)
    if isinstance(task.source, Mixed):
        for role, parts in task.source.parts.items():
            split = parts[0].split or task.splits.get(role)
            if split is not None and split not in TASKS[parts[0].task].official:
                said.append(
                    f"the {role} rows are of {split!r}, no official split of {parts[0].task}: compare with no published score"
                )
    for role, split in task.splits.items() if task.official else ():
        if split not in task.official:
            said.append(f"the {role} rows are of {split!r}, no official split of {task.name}: compare with no published score")
        elif len(rows[role]) != task.official[split]:
            size = f"{split!r} has {len(rows[role]):,} rows here, officially {task.official[split]:,}"
            said.append(f"{size}: compare with no published score")
    return tuple(said)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


def load_rows(task: Task, role: Role, *, data_dir: Path | None, seed: int = 0) -> Rows:
    """The rows of the split that plays `role`.

    Generated tasks read no data and draw their rows by `seed`; the others ignore it, and read `data_dir` or the Hub, or
    hold their rows themselves.

    Raises: DataError if the task has no such role or its data is absent or bad.
    """
    if role not in task.splits:
        raise DataError(
            f"task {task.name} has no {role} split",
            expected=", ".join(f"{role} ({split})" for role, split in task.splits.items()),
        )
    if isinstance(task.source, Grammar):
        return generated.write(task, role, seed=seed)
    if isinstance(task.source, Loaded):
        return task.source.rows[task.splits[role]]
    if isinstance(task.source, Folders):
        return mixed.load_folder(task, task.splits[role], data_dir)
    if isinstance(task.source, Marked):
        return marked.load(task, role, lambda name, split: (TASKS[name], _rows_of(TASKS[name], split, data_dir)))
    if isinstance(task.source, Mixed):
        return mixed.load(task, role, lambda name, split: (TASKS[name], _rows_of(TASKS[name], split, data_dir)))
    if task.form == "span":
        return squad.load(task, task.splits[role], data_dir=data_dir)
    if not task.labels:
        return text.load(task, task.splits[role], data_dir=data_dir)
    return glue.load(task, task.splits[role], data_dir=data_dir)


def _rows_of(task: Task, split: str, data_dir: Path | None) -> Rows:
    return load_rows(replace(task, splits={"train": split}), "train", data_dir=data_dir)
