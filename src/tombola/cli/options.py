"""The options of the verbs, each written once, and how what was given is read.

A verb takes options that several verbs share as one parameter, whose type is a dataclass: a group. `grouped` shows typer the
fields of the group instead, so that help, defaults and types are those of the fields.
"""

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tombola.errors import SettingsError, TombolaError
from tombola.terminal import Progress, say

if TYPE_CHECKING:
    from tombola.study.cells import Lab
    from tombola.tasks import Task

STORE = Path("tombola-store")

StoreOption = Annotated[Path, typer.Option("--store", help="Folder of results.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder with <task>/<split>.jsonl.gz; without it, the Hub is read.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would run and about how long; compute nothing.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting by name, NAME=VALUE; repeatable. `tombola find --help` has the common ones."),
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="paper, released or corrected: all settings not given.  [default: corrected]")
]
BudgetOption = Annotated[
    float | None, typer.Option("--disk-budget", help="Start nothing more when the store holds so many GB.", min=0)
]
SeedsOption = Annotated[str, typer.Option("--seeds", help="Run seeds, separated by commas.")]
LayoutOption = Annotated[
    Path | None, typer.Option("--layout", help="YAML file that says where the parts of a layer are; proved like what is found.")
]
TicketArgument = Annotated[str, typer.Argument(help="A ticket's folder, or the start of its cell's key.")]
OtherTaskArgument = Annotated[str | None, typer.Argument(help="The task; without it, the ticket's own.")]


# --------------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRows:
    """Rows of the user's own, for the tasks `files` and `hub:NAME`; of a Hub data set the first three name splits."""

    train: Annotated[str | None, typer.Option(help="files: rows to train on: csv, tsv, jsonl, parquet, or .gz.")] = None
    validation: Annotated[str | None, typer.Option(help="files: rows to report on.")] = None
    test: Annotated[str | None, typer.Option(help="files: report on these instead, and choose masks on the validation rows.")] = (
        None
    )
    text: Annotated[str | None, typer.Option(help="files: column the model reads, or two: a,b.")] = None
    label: Annotated[str | None, typer.Option(help="files: column of the answer.")] = None
    regression: Annotated[bool, typer.Option("--regression", help="files: answers are numbers, not classes.")] = False
    metric: Annotated[str | None, typer.Option(help="files: accuracy, matthews, f1; with --regression pearson, spearman.")] = None
    words: Annotated[
        str | None, typer.Option(help="files: ask a language model, one word a class in the order of their names: no,yes.")
    ] = None
    template: Annotated[
        str | None, typer.Option(help="files, with --words: what it reads; {0} and {1} are the texts.  [default: {0} Answer:]")
    ] = None

    def given(self) -> dict[str, Any]:
        """What was said of them, by the name of each option."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    def again(self) -> str:
        """The options that a later verb on the same rows has to be given."""
        said = self.given()
        return "".join(f" --{which} {said[which]}" for which in ("train", "validation", "test") if which in said)

    def task(self, name: str) -> "str | Task":
        """The task a user names, its own rows read where it has such. Raises: TombolaError when the two do not go together."""
        return _task(name, self.given())

    def other_task(self, lab: "Lab", ticket: str, name: str | None) -> "str | Task | None":
        """The task named after a ticket; None for the ticket's own, its rows brought where they were given."""
        if name is not None:
            return self.task(name)
        self.bring(lab, ticket)
        return None

    def bring(self, lab: "Lab", ticket: str) -> None:
        """Reads the files of a ticket's own task, whose columns and metric the ticket remembers."""
        from tombola.study.data import named
        from tombola.study.jobs import read_ticket

        if not self.given():
            return
        known = read_ticket(lab, ticket).settings.get("data", {}).get("source")
        if known is not None and known.get("form") == "masked":
            named(lab, _task("mlm", {"text": ",".join(known["text"]), **self.given()}))
            return
        if known is None or "repo" in known:
            raise TombolaError("this ticket is of no files of your own", got=ticket, next="leave --train, --validation … out")
        said = {"text": known["text"], "label": known["label"], "metric": known["metric"]}
        regression = {"regression": True} if len(known["labels"]) == 1 else {}
        prompt = known.get("prompt") or {}
        asked = {"words": ",".join(prompt["words"]), "template": prompt["template"]} if prompt else {}
        named(lab, _task("files", {**said, **regression, **asked, **self.given()}))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """The settings of rows and training that are most often given, each by its own name."""

    train_rows: Annotated[int | None, typer.Option(help="Train on at most so many rows.")] = None
    selection_rows: Annotated[int | None, typer.Option(help="Choose the mask on at most so many rows.")] = None
    epochs: Annotated[int | None, typer.Option(help="[default: 3]")] = None
    learning_rate: Annotated[float | None, typer.Option(help="[default: 2e-5]")] = None
    batch_size: Annotated[int | None, typer.Option(help="[default: 32]")] = None

    def given(self) -> dict[str, Any]:
        """Setting → value, of those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How cells run: with which settings, on which data, into which store, and what is shown."""

    setting: SetOption = None
    data: DataOption = None
    store: StoreOption = STORE
    budget: BudgetOption = None
    dry_run: DryRunOption = False
    as_json: JsonOption = False

    def settings(self) -> dict[str, Any]:
        """What --set says. Raises: SettingsError with everything that is not NAME=VALUE."""
        return assignments(self.setting)

    def lab(self) -> "Lab":
        """The lab of this verb."""
        return make_lab(self.store, self.data, budget=self.budget)


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb as typer is to see it: each parameter that is a group becomes the fields of the group.

    Raises: ValueError when two of them have the same name.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters = inspect.signature(verb).parameters
    groups = {name: hints[name] for name in parameters if is_dataclass(hints[name])}
    shown: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        if name not in groups:
            shown.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        kinds = get_type_hints(groups[name], include_extras=True)
        shown += [
            inspect.Parameter(one.name, parameter.KEYWORD_ONLY, default=one.default, annotation=kinds[one.name])
            for one in fields(groups[name])
        ]

    @functools.wraps(verb)
    def call(**given: Any) -> None:
        taken = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        verb(**given, **taken)

    call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in shown}
    return call


# -------------------------------------------------------------------------------------------------------------- reading


def _task(name: str, own_rows: Mapping[str, Any]) -> "str | Task":
    from tombola.tasks import asked_in_words, corpus_task, files_task, hub_task

    own_rows = dict(own_rows)
    if name == "mlm":
        taken = {"train", "validation", "text"}
        if not {"train", "validation"} <= own_rows.keys() <= taken:
            raise TombolaError(
                "the task `mlm` is running text of your own",
                got=", ".join(f"--{option}" for option in own_rows) or "none of its options",
                expected="--train FILE --validation FILE [--text COLUMN]; plain text needs no column",
                next="mlm-wikitext2 is a corpus by name",
            )
        return corpus_task(**own_rows)
    prompt = {option: own_rows.pop(option) for option in ("words", "template") if option in own_rows}
    if name.startswith("hub:") and "#" not in name:
        quiet()
        task = hub_task(name, **own_rows)
    elif name == "files":
        lacking = [f"--{option}" for option in ("train", "validation", "text", "label") if option not in own_rows]
        if lacking:
            raise TombolaError(
                "the task `files` needs to know its files and columns",
                got=", ".join(f"--{option}" for option in own_rows) or "none of its options",
                expected="--train FILE --validation FILE [--test FILE] --text COLUMN[,COLUMN] --label COLUMN",
                next=f"add {' '.join(lacking)}",
            )
        task = files_task(**own_rows)
    elif own_rows or prompt:
        raise TombolaError(
            f"task {name} has rows and columns of its own",
            got=", ".join(f"--{option}" for option in [*own_rows, *prompt]),
            expected="these options with the task files or hub:NAME",
            next=f"{name}:answer=words asks a language model in words of its own" if prompt else None,
        )
    else:
        return name
    if prompt:  # most tokenizers have a word within a text as another token than one that begins it: with its blank
        spoken = [word if word.startswith(" ") else f" {word}" for word in prompt.get("words", "").split(",") if word.strip()]
        task = asked_in_words(task, prompt.get("template"), spoken or None)
    for doubt in task.doubts:
        say(doubt)
    return task


def numbers(text: str) -> list[int]:
    """Run seeds of "0,1,2". Raises: SettingsError when one is not a whole number."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsError([TombolaError("seeds are not whole numbers", got=text, expected="for example 0,1,2")]) from None


def words(text: str) -> list[str]:
    """The words of "a, b"."""
    return [word.strip() for word in text.split(",") if word.strip()]


def assignments(given: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE as a mapping; a value that reads as JSON is taken as such, else as text. Raises: SettingsError."""
    values: dict[str, Any] = {}
    problems: list[TombolaError] = []
    for one in given or ():
        name, equals, text = one.partition("=")
        if not equals or not name:
            problems.append(TombolaError("--set takes NAME=VALUE", got=one, expected="for example --set epochs=2"))
            continue
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values[name.strip().replace("-", "_")] = value
    if problems:
        raise SettingsError(problems)
    return values


def split_seeds(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings, and the four own seeds (`--set head_seed=3`) apart from them. Raises: SettingsError for other than numbers."""
    four = {f"{name}_seed": name for name in ("head", "data", "dropout", "mask")}
    wrong = {name: value for name, value in values.items() if name in four and type(value) is not int}
    if wrong:
        problems = [TombolaError(f"{name} is not valid", got=repr(v), expected="a whole number") for name, v in wrong.items()]
        raise SettingsError(problems)
    return {n: v for n, v in values.items() if n not in four}, {four[n]: v for n, v in values.items() if n in four}


def refuse_filled(folder: Path | None, but: str = "") -> None:
    """Raises: TombolaError when the folder to write has something in it; with a file named `but` it may be written again."""
    if folder is None or not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (but and (folder / but).is_file())):
        raise TombolaError(f"{folder} is not empty", expected="a new or empty folder", next="name another folder with --out")


def make_lab(
    store: Path, data: Path | None = None, *, reads: bool = False, late: bool = True, budget: float | None = None
) -> "Lab":
    """The lab of one verb: a store, the data, progress on stderr. A verb that only reads refuses a store that is not there.

    late: the store is made with the first result, so that a call that is refused leaves nothing.
    """
    from tombola.store import Store
    from tombola.study.cells import Lab

    quiet()
    if budget is not None and not math.isfinite(budget):
        raise TombolaError("the disk budget is no number of GB", got=budget, expected="a number, 0 or more")
    if data is not None and not data.is_dir():
        raise TombolaError("there is no such data folder", got=str(data), expected="a folder with <task>/<split>.jsonl.gz")
    if reads and not store.is_dir():
        raise TombolaError(
            "there is no such store", got=str(store), expected="a folder of results", next="tombola find makes one"
        )
    progress = Progress()
    most = None if budget is None else round(budget * 1e9)
    return Lab(Store(store, late=late, on_message=progress.say, budget=most), data, progress)


def quiet() -> None:
    """transformers' own bars and notes off: what matters is said here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
