"""The tasks a ticket can be found on: `TASKS` names them, `get_task` reads "name:option=value", `load_rows` gives rows.

A task with data of its own is one `Task(...)` value in `glue`; one that is written by a grammar stands in `generated`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tombola.errors import DataError
from tombola.tasks import generated, glue
from tombola.tasks.base import Grammar, Hub, Role, Rows, Task, shared_texts, split_selection

__all__ = [
    "TASKS",
    "Grammar",
    "Hub",
    "Role",
    "Rows",
    "Task",
    "get_task",
    "load_rows",
    "shared_texts",
    "split_selection",
]

TASKS: dict[str, Task] = {
    "cola": glue.COLA,
    "sst2": glue.SST2,
    "mrpc": glue.MRPC,
    "rte": glue.RTE,
    "acceptability": generated.ACCEPTABILITY,
    "nli-overlap": generated.NLI_OVERLAP,
}


def get_task(spec: str) -> Task:
    """The task of "name" or "name:option=value,option=value", all its options resolved.

    Raises: DataError for an unknown name, or saying every option that is unknown, repeated or out of range.
    """
    name, colon, rest = spec.partition(":")
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}", got=repr(spec), expected=", ".join(TASKS), next=_nearest(name, TASKS))
    task = TASKS[name]
    given: dict[str, int | float] = {}
    problems: list[str] = []
    for part in rest.split(",") if colon else ():
        option, equals, text = part.partition("=")
        value = generated.parse_option(option, text) if option in task.options else None
        if not equals:
            problems.append(f"{part!r} is not option=value")
        elif option not in task.options:
            near = _nearest(option, task.options)
            problems.append(f"there is no option {option!r}" + (f"; {near}" if near else ""))
        elif option in given:
            problems.append(f"{option} is given twice")
        elif value is None:
            problems.append(f"{option}={text} is not {generated.option_range(option)}")
        else:
            given[option] = value
    if problems:
        described = [f"{option} ({generated.option_range(option)}, default {v})" for option, v in task.options.items()]
        raise DataError(
            f"wrong options of task {name}",
            got="\n            ".join(problems),
            expected=", ".join(described) or f"no options: {name} has data of its own",
        )
    return replace(task, options={**task.options, **given})


def _nearest(word: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


def load_rows(task: Task, role: Role, *, data_dir: Path | None, seed: int = 0) -> Rows:
    """The rows of the split that plays `role`.

    Generated tasks read no data and draw their rows by `seed`; the others ignore it, and read `data_dir` or the Hub.

    Raises: DataError if the task has no such role or its data is absent or bad.
    """
    if role not in task.splits:
        raise DataError(
            f"task {task.name} has no {role} split",
            expected=", ".join(f"{role} ({split})" for role, split in task.splits.items()),
        )
    if isinstance(task.source, Grammar):
        return generated.write(task, role, seed=seed)
    return glue.load(task, task.splits[role], data_dir=data_dir)
