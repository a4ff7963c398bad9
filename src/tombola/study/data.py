"""What the cells of a study read: the rows of a task under its data settings, encoded, and the folder of the base.

Everything is read once a run and kept in the lab's cache; what a cell was planned for is checked against what is there now.
"""

import random
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tombola._version import __version__
from tombola.anatomy import Layout, read_anatomy
from tombola.canonical import fingerprint
from tombola.errors import DataError, TombolaError
from tombola.objective import Objective, load_weights
from tombola.scope import scope_parameters
from tombola.source import fingerprint_files, resolve_model
from tombola.study.cells import Cell, Lab, read_json, write_json
from tombola.tasks import (
    Folders,
    Grammar,
    Hub,
    Loaded,
    Marked,
    Mixed,
    Role,
    Rows,
    Task,
    bare_name,
    corpus_task,
    data_doubts,
    described_task,
    files_task,
    get_task,
    load_rows,
    shared_texts,
    spec_of,
    split_selection,
)
from tombola.tasks.encode import Encoded, encode

# The data settings that say which rows there are; the others say how they are encoded.
ROWS_DEPEND_ON = ("train_rows", "selection_rows", "report_rows", "selection_split", "split_seed")


@dataclass(frozen=True, slots=True)
class TaskData:
    """The rows of one task under one set of data settings, by what they are for."""

    task: Task
    train: Rows
    selection: Rows
    report: Rows
    challenge: Rows | None
    leaked: int  # train rows dropped because a selection row has the same texts
    selection_name: str = "selection"  # the split's own name where the mask is chosen on rows of one: the page says so
    doubts: tuple[str, ...] = ()  # what scores on these rows have to be read with

    def evaluated(self) -> dict[str, tuple[str, Rows]]:
        """Role → (name of the split, rows), for every set a model is scored on."""
        sets = {"selection": (self.selection_name, self.selection), "report": (self.task.splits["report"], self.report)}
        if self.challenge is not None:
            sets["challenge"] = (self.task.splits["challenge"], self.challenge)
        return sets

    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of each set of rows, so that a cell is known by its data and not by where that came from."""
        sets = {"train": self.train} | {role: rows for role, (_, rows) in self.evaluated().items()}
        return {role: fingerprint(_said_of(rows)) for role, rows in sets.items()}


def _said_of(rows: Rows) -> list[Any]:
    return [rows.ids, rows.texts, rows.labels, rows.groups, *([] if rows.answers is None else [rows.answers])]


def named(lab: Lab, task: str | Task) -> str:
    """What cells call a task: what the user calls it, or for rows the user brought a name made of what is in them.

    Such rows are kept for this run. Raises: DataError as `get_task` does.
    """
    if isinstance(task, str) and (not task.startswith("hub:") or "#" in task):
        return task
    if isinstance(task, str):
        task = get_task(task)
        for doubt in task.doubts:
            lab.reporter.say(doubt)
    if not isinstance(task.source, Loaded):
        raise DataError("a task that does not hold its rows goes by its name", got=task.name, next="pass its name")
    spec = spec_of(task)
    lab.cache["task", spec] = task
    return spec


def brought(said: Mapping[str, Any]) -> Task:
    """The task of files of the user's own, as a study says it: rows with labels, or with `corpus` running text to hide tokens of.

    Raises: as `files_task` and `corpus_task`.
    """
    given = {name: value for name, value in said.items() if name != "corpus"}
    return corpus_task(**given) if said.get("corpus") else files_task(**given)


def source_of(lab: Lab, spec: str) -> dict[str, Any]:
    """What a cell says of rows the user brought: {"source": …}; nothing for tasks that their name says all of."""
    task = lab.cache.get(("task", spec))
    return {} if task is None else {"source": dict(task.source.description)}


def task_of(lab: Lab, spec: str, source: Mapping[str, Any] | None) -> Task:
    """The task of a cell. Rows the user brought must have been named in this run; a Hub data set is read again.

    Raises: DataError when they were not, or are others now.
    """
    if source is None and "#" not in spec:
        return get_task(spec)
    if source is not None and "repo" in source and ("task", spec) not in lab.cache:
        named(lab, described_task(source))
    if ("task", spec) in lab.cache:
        task: Task = lab.cache["task", spec]
        return task
    others = [known[1] for known in lab.cache if known[0] == "task"]
    columns = "" if source is None else f" --text {','.join(source['text'])}"
    columns += "" if source is None or source["label"] is None else f" --label {source['label']}"
    raise DataError(
        f"the rows of {spec} are not here",
        got=f"rows that are others: {', '.join(others)}" if others else "no files",
        expected="the files this task was made of: it is named by what is in them",
        next=f"give them again: --train FILE --validation FILE [--test FILE]{columns}",
    )


def task_data(lab: Lab, spec: str, settings: Mapping[str, Any]) -> TaskData:
    """The rows of a task. Rows on which a mask is chosen are held out of train by seed, or are those of a split if so set.

    Raises: DataError as `load_rows` does, when a split to choose masks on is asked for that the task has not, and as
    `task_of` does.
    """
    known = ("data", spec, *(settings.get(name) for name in ROWS_DEPEND_ON))
    if known not in lab.cache:
        task = task_of(lab, spec, settings.get("source"))
        rows: dict[Role, Rows] = {role: load_rows(task, role, data_dir=lab.data_dir) for role in task.splits}
        full, report, own, name = rows["train"], rows["report"], None, "selection"
        if settings["selection_split"] == "validation":
            own, name = rows.get("selection"), task.splits.get("selection", "")
            if own is None:
                raise DataError(
                    f"{bare_name(spec)} has no rows of its own to choose a mask on",
                    got="selection_split=validation",
                    expected="held_out_from_train or dev, or a task with a selection split",
                    next="give files with --test, or name one: TASK:selection=SPLIT",
                )
        train, selection = split_selection(
            full,
            len(report),
            seed=settings["split_seed"],
            max_train=settings["train_rows"],
            max_selection=settings["selection_rows"],
            own=own,
        )
        leaked = len(shared_texts(full, selection)) - (len(selection) if own is None else 0)
        if settings["selection_split"] == "dev":
            cap = min(len(report), settings["selection_rows"] or len(report))
            selection, name = report.take(range(cap)), task.splits["report"]
        doubts, challenge = list(data_doubts(task, rows)), rows.get("challenge")
        if challenge is not None:
            doubts += _seen_in_train(bare_name(spec), train, challenge)
        if settings["selection_split"] == "train":  # as many as the report has; the model is trained on what it is otherwise
            cap = min(len(report), len(train), settings["selection_rows"] or len(report))
            selection, name = _drawn(train, cap, settings["split_seed"]), task.splits["train"]
            doubts.append("masks are chosen on rows that the model was trained on: the floor is held there, and elsewhere not")
        if cap := settings.get("report_rows"):
            doubts += [f"scores are on {cap:,} rows drawn of {len(report):,}"] if cap < len(report) else []
            report = _drawn(report, cap, settings["split_seed"])
            challenge = None if challenge is None else _drawn(challenge, cap, settings["split_seed"])
        lab.cache[known] = TaskData(task, train, selection, report, challenge, leaked, name, tuple(doubts))
    data: TaskData = lab.cache[known]
    return data


MOST_SEEN = 0.05  # share of challenge rows that may stand in train, too; with more it challenges nothing


def _seen_in_train(task: str, train: Rows, challenge: Rows) -> list[str]:
    """What is to be said of challenge rows that are trained on. Raises: DataError where they are more than `MOST_SEEN`."""
    seen = shared_texts(challenge, train)
    if len(seen) > MOST_SEEN * len(challenge):
        raise DataError(
            f"the challenge rows of {task} stand in its train rows",
            got=f"{len(seen)} of {len(challenge)}: {', '.join(seen[:5])}" + (", …" if len(seen) > 5 else ""),
            expected=f"none, and at most {MOST_SEEN:.0%}",
            next="name another split: TASK:challenge=SPLIT",
        )
    return [f"{len(seen)} of {len(challenge)} challenge rows stand in train, too"] if seen else []


def _drawn(rows: Rows, cap: int, seed: int) -> Rows:
    """At most `cap` of these rows, drawn by seed, in file order."""
    return rows.take(sorted(random.Random(seed).sample(range(len(rows)), min(cap, len(rows)))))


def rows_said(lab: Lab, spec: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell says of its rows: {"rows": role → fingerprint, "counts": role → number}.

    Hashed once for a store, as long as the data files keep their size and time: planning a study again need not read them.
    What is computed reads the rows themselves, see `same_data`.
    """
    chosen = {name: settings.get(name) for name in ROWS_DEPEND_ON}
    origin = _origin(lab, spec, settings.get("source"))
    known = ("rows said", spec, fingerprint(chosen))
    if known not in lab.cache:
        file = lab.store.root / "plans" / "rows" / f"{fingerprint([__version__, spec, chosen, origin])}.json"
        if origin is not None and file.is_file():
            lab.cache[known] = read_json(file)
        else:
            data = task_data(lab, spec, settings)
            counts = {"train": len(data.train)} | {role: len(rows) for role, (_, rows) in data.evaluated().items()}
            lab.cache[known] = {"rows": data.fingerprints(), "counts": counts}
            if origin is not None:
                lab.cache["rows to keep", file] = lab.cache[known]
    said: dict[str, Any] = lab.cache[known]
    return said


def keep_rows_said(lab: Lab) -> None:
    """Writes what `rows_said` has hashed into the store, for the next plan: once a plan stands, a refused one leaves nothing."""
    for known in [known for known in lab.cache if known[0] == "rows to keep"]:
        said, file = lab.cache.pop(known), known[1]
        with suppress(OSError):  # a store that cannot be written can still be planned on
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(f".{secrets.token_hex(4)}")
            write_json(draft, said)
            draft.rename(file)


def _origin(lab: Lab, spec: str, source: Mapping[str, Any] | None) -> list[Any] | None:
    """What the rows of a task are written by or lie in, as JSON that changes when they do; None where only the rows tell."""
    task = task_of(lab, spec, source)
    if isinstance(task.source, Loaded):
        return None
    if isinstance(task.source, Grammar):
        return ["grammar", task.source.version]
    if isinstance(task.source, Mixed):
        parts = dict.fromkeys(part.task for several in task.source.parts.values() for part in several)
        return [_origin(lab, part, None) for part in parts]
    if isinstance(task.source, Marked):
        return ["marked", _origin(lab, task.source.of, None)]
    names = task.source.names if isinstance(task.source, Folders) else (task.folder or task.name,)
    if lab.data_dir is None:
        return [task.source.repo, task.source.config, task.source.revision] if isinstance(task.source, Hub) else [*names]
    files = sorted(file for name in names for file in (lab.data_dir / name).glob("*"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def same_data(cell: Cell, lab: Lab) -> TaskData:
    """The rows a cell was planned for. Raises: DataError when the data of today are others."""
    settings = cell.settings["data"]
    data = task_data(lab, settings["task"], settings)
    known = ("hashed", settings["task"], *(settings.get(name) for name in ROWS_DEPEND_ON))
    if known not in lab.cache:
        lab.cache[known] = data.fingerprints()
    found: dict[str, str] = lab.cache[known]
    if found != settings["rows"]:
        differing = [role for role in found if found[role] != settings["rows"].get(role)]
        raise DataError(
            f"the data of {settings['task']} are not those this run was made with",
            got=f"other rows in: {', '.join(differing)}",
            next="pass the --data folder the run was made with",
        )
    return data


def encoded_rows(lab: Lab, cell: Cell, role: str, rows: Rows) -> Encoded:
    """Rows as the base's tokenizer encodes them, once per run; `role` names them."""
    known = ("encoded", cell.settings["model"]["fingerprint"], role, fingerprint(cell.settings["data"]))
    if known not in lab.cache:
        data = cell.settings["data"]
        _check_length(lab, cell)
        objective = task_of(lab, data["task"], data.get("source")).objective
        more = {name: data[name] for name in ("mlm", "stride") if name in data}
        lab.cache[known] = encode(tokenizer_of(lab, cell), rows, data["max_length"], data["padding"], objective, **more)
    encoded: Encoded = lab.cache[known]
    return encoded


def _check_length(lab: Lab, cell: Cell) -> None:
    """Raises: DataError when rows are to be padded beyond what the model has positions for."""
    from transformers import AutoConfig

    data = cell.settings["data"]
    positions = getattr(AutoConfig.from_pretrained(base_folder(lab, cell.settings["model"])), "max_position_embeddings", None)
    filled = data["padding"] == "max_length" or "mlm" in data or "stride" in data  # to the last token
    if filled and isinstance(positions, int) and data["max_length"] > positions:
        raise DataError(
            "rows are to be padded to more tokens than the model has positions for",
            got=f"max_length {data['max_length']}, {positions} positions",
            expected=f"max_length up to {positions}",
            next=f"--set max_length={positions}, or --set padding=bucketed",
        )


def tokenizer_of(lab: Lab, cell: Cell) -> Any:
    """The tokenizer of a cell's base, see `base_tokenizer`."""
    return base_tokenizer(lab, cell.settings["model"])


def base_tokenizer(lab: Lab, model: Mapping[str, Any]) -> Any:
    """The tokenizer of a base, read once a run. Raises: TombolaError when there is none.

    Of a folder without one transformers makes a tokenizer that knows no word and says nothing: every text would be the same.
    """
    from transformers import AutoTokenizer

    folder = base_folder(lab, model)
    if ("tokenizer", folder) not in lab.cache:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            got = None if tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens) else "one that knows no words"
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
            tokenizer, got = None, f"{type(error).__name__}: {error}"
        if got is not None:
            raise TombolaError(
                f"{model['name']} has no tokenizer that can be used",
                got=got,
                expected=f"tokenizer.json, or the files of its vocabulary, in {folder}",
                next="write it there: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)",
            )
        lab.cache["tokenizer", folder] = tokenizer
    return lab.cache["tokenizer", folder]


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes the tokenizer, without the cut to a length that the last call left in it: the same cell gives the same bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)


def layout_of(model: Mapping[str, Any]) -> tuple[Layout, ...] | None:
    """Where the parts of a cell's model are, when that was said by hand; None when they are found by structure."""
    return None if "layout" not in model else Layout.from_plain(model["layout"], "the layout of the cell")


def check_parts(lab: Lab, model: Mapping[str, Any], objective: Objective, scope: str | None) -> None:
    """Reads a model's tokenizer and parts before anything is computed, and looks a scope up in them; once a run.

    What is read does not depend on the weights, so that the base stands for what it is trained to. Costs loading it and two
    forward passes of a short batch. Raises: AnatomyError for a model that cannot be read, or not by its layout; MaskError for a
    scope that is unknown or matches nothing; TombolaError for a model without a tokenizer.
    """
    known = ("parts", model["fingerprint"], fingerprint(model.get("layout")), objective.kind, objective.prompt, scope)
    if known in lab.cache:
        return
    base_tokenizer(lab, model)
    loaded = load_weights(base_folder(lab, model), objective, head_seed=0)
    anatomy = read_anatomy(loaded, layout_of(model))
    if scope is not None:
        scope_parameters(loaded, anatomy, scope)
    lab.cache[known] = True


def base_folder(lab: Lab, model: Mapping[str, Any]) -> Path:
    """The folder of a base by its settings. Raises: TombolaError when its weights are no longer those of the plan."""
    known = ("base", model["name"], model["revision"])
    if known not in lab.cache:
        lab.cache[known] = resolve_model(model["name"], model["revision"])
    source = lab.cache[known]
    found = {"fingerprint": source.fingerprint, "files": fingerprint_files(source.folder)}
    if differing := [what for what in found if found[what] != model[what]]:
        raise TombolaError(
            f"{'the weights' if 'fingerprint' in differing else 'config or tokenizer'} of {model['name']} changed since this "
            "run was planned",
            got="; ".join(found[what] for what in differing),
            expected="; ".join(model[what] for what in differing),
            next="pin the revision it was made with",
        )
    folder: Path = source.folder
    return folder
