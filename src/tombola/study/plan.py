"""A study: what is asked, in one file, and the cells it becomes, shared work once.

A study file is TOML; its fields are those of `Study`. `read_study` says everything that is wrong with it at once, and
`plan_study` describes its cells: it reads data and hashes the base, and computes nothing.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Len
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StringConstraints, ValidationError

from tombola.errors import DataError, SettingsError, TombolaError
from tombola.study.cells import Cell, Lab, read_json, write_json
from tombola.study.context import SEARCHED, SEED_NAMES, Context
from tombola.study.data import brought
from tombola.study.experiments import EXPERIMENTS, rungs_of
from tombola.study.kinds import CONTROL_KINDS
from tombola.study.presets import DEFAULT
from tombola.study.settings import options_of, resolve
from tombola.tasks import Task, get_task, spec_of


def _several(value: object) -> object:
    """One value for a list of one, as people write it."""
    return value if isinstance(value, list | tuple) else [value]


Several = BeforeValidator(_several)


class FilesOptions(BaseModel):
    """Rows of the user's own: a task made of files, paths taken from the study file's folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    train: str
    validation: str
    test: str | None = None
    text: str
    label: str
    regression: StrictBool = False
    metric: str | None = None


class CorpusOptions(BaseModel):
    """Running text of the user's own, for masked language modelling: .txt, or a column of CSV, TSV, JSON Lines, parquet."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    train: str
    validation: str
    text: str = "text"


class Study(BaseModel):
    """What is asked. Every field may stand in a study file, and be set by `--set NAME=VALUE`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
    about: str = ""
    model: Annotated[tuple[str, ...], Several, Len(1)]  # demo, local folders, Hub names
    tasks: Annotated[tuple[str, ...], Several, Len(1)]
    seeds: Annotated[tuple[Annotated[StrictInt, Ge(0)], ...], Several, Len(1)] = (0,)
    preset: str = DEFAULT
    ladder: str | None = None  # "A:B": every experiment on every rung, instead of one preset
    experiments: Annotated[tuple[str, ...], Several, Len(1)]  # rows of EXPERIMENTS
    settings: Mapping[str, Any] = Field(default_factory=dict)  # any setting by its name
    per_task: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)  # task → settings that hold for it alone
    options: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)  # experiment → its options
    files: Mapping[str, FilesOptions] = Field(default_factory=dict)  # name → a task made of files, to be named in tasks
    corpora: Mapping[str, CorpusOptions] = Field(default_factory=dict)  # name → masked language modelling on files, likewise
    # no rounds after a level that is certainly lost, by the chain of its own seed; what is left out is said
    stop_lost_chains: StrictBool = False
    threads: Annotated[StrictInt, Ge(1)] | None = None  # of each cell, part of its key; None: those of this process
    device: str | None = None  # "cpu" | "cuda", part of the key too; None: what is here
    ranks: Annotated[StrictInt, Ge(2)] | None = None  # processes of each cell, started by torchrun; part of the key
    slurm: Mapping[str, Any] = Field(default_factory=dict)  # of Slurm jobs, by the names of submitit; requeues

    def options_for(self, experiment: str) -> BaseModel:
        """The options of one experiment, defaults included."""
        return EXPERIMENTS[experiment].options(**self.options.get(experiment, {}))

    def methods(self) -> list[str]:
        """The methods of search its experiments use, each once."""
        used = (method for name in self.experiments for method in EXPERIMENTS[name].methods(self.options_for(name)))
        return list(dict.fromkeys(used))


# ------------------------------------------------------------------------------------------------------------- reading


def built_in(name: str) -> Mapping[str, Any] | None:
    """A study that comes with tombola, as a file would say it; None when there is none of this name."""
    from tombola.study import chen2020, liu2022, prasanna2020

    return {"prasanna2020": prasanna2020.STUDY, "chen2020": chen2020.STUDY, "liu2022": liu2022.STUDY}.get(name)


BUILT_IN = ("prasanna2020", "chen2020", "liu2022")


def read_study(name: str, given: Mapping[str, Any] | None = None, assigned: Sequence[tuple[str, Any]] = ()) -> Study:
    """The study of a TOML file or a built-in name, with fields set otherwise.

    given      fields by name, None = not given
    assigned   (path, value) as `--set` has them: "epochs", "controls.draws", "slurm.mem_gb", "per_task.rte.epochs"

    Raises: TombolaError when there is no such study or it is no TOML; SettingsError with everything that is wrong in it:
    unknown fields and settings (the nearest is offered), values out of range, unknown experiments, presets, kinds.
    """
    document, folder = _document(name)
    for field, value in (given or {}).items():
        if value is not None:
            document[field] = value
            if field == "ladder":  # on the command line one takes the place of the other
                document.pop("preset", None)
            elif field == "preset":
                document.pop("ladder", None)
    problems: list[TombolaError] = []
    for path, value in assigned:
        try:
            _assign(document, path, value)
        except TombolaError as error:
            problems.append(error)
    if "preset" in document and "ladder" in document:
        problems.append(
            TombolaError("a study has a preset or a ladder", got="both", expected="one of them; a ladder has presets of its own")
        )
    study = None
    try:
        study = Study(**document)
    except ValidationError as error:
        problems += _said(error, Study, "the study")
    else:
        problems += list(_problems(study))
    if problems or study is None:
        raise SettingsError(problems)
    own = {field: {name: _rooted(one, folder) for name, one in getattr(study, field).items()} for field in ("files", "corpora")}
    return study.model_copy(update=own)


def _rooted(files: BaseModel, folder: Path) -> BaseModel:
    """The same files by paths that hold anywhere."""
    paths = {split: getattr(files, split, None) for split in ("train", "validation", "test")}
    return files.model_copy(update={split: str((folder / path).absolute()) for split, path in paths.items() if path is not None})


def _document(name: str) -> tuple[dict[str, Any], Path]:
    """A study as plain values that may be changed, and the folder its paths start from."""
    import copy

    file = Path(name)
    if not file.is_file():
        known = built_in(name)
        if known is not None:
            return copy.deepcopy(dict(known)), Path()
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise TombolaError(
            f"there is no study {name!r}",
            expected=f"a TOML file, or one of {', '.join(BUILT_IN)}",
            next=f"did you mean {near[0]!r}?" if near else None,
        )
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise TombolaError(f"{file} cannot be read as a study", got=str(error), expected="a TOML file, UTF-8") from error
    return {"name": file.stem} | document, file.parent


def _assign(document: dict[str, Any], path: str, value: Any) -> None:
    """Sets one value by its path; a name that is no field of a study is a setting, that of an experiment its options."""
    first, *rest = path.split(".")
    first = first.replace("-", "_") if first not in EXPERIMENTS else first
    if first in EXPERIMENTS:
        parts = ["options", first, *rest]
    elif first in Study.model_fields:
        parts = [first, *rest]
    else:
        parts = ["settings", first, *rest]
    if parts[0] == "settings" and len(parts) != 2:
        raise TombolaError("--set has a path to nowhere", got=path, expected="a setting, EXPERIMENT.option or FIELD.name")
    at = document
    for part in parts[:-1]:
        inner = at.get(part)
        at[part] = dict(inner) if isinstance(inner, Mapping) else {}
        at = at[part]
    at[parts[-1]] = value


def _said(error: ValidationError, kind: type[BaseModel], what: str) -> list[TombolaError]:
    """What pydantic found, each as one of ours."""
    problems = []
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(one["loc"][-1]), kind.model_fields, n=1)
            problems.append(
                TombolaError(
                    f"{what} has no field {where!r}",
                    expected=", ".join(kind.model_fields),
                    next=f"did you mean {near[0]!r}?" if near else None,
                )
            )
        elif one["type"] == "missing":
            problems.append(TombolaError(f"{what} does not say its {where}"))
        else:
            problems.append(TombolaError(f"{where} of {what} is not valid", got=repr(one["input"]), expected=one["msg"]))
    return problems


def _problems(study: Study) -> Iterable[TombolaError]:
    """What is wrong with a study whose fields are of the right kinds."""

    def unknown(what: str, names: Iterable[str], known: Iterable[str]) -> Iterable[TombolaError]:
        known = list(known)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else None
                yield TombolaError(f"there is no {what} {name!r}", expected=", ".join(known), next=hint)

    yield from unknown("experiment", study.experiments, EXPERIMENTS)
    yield from unknown("asked experiment with options", study.options, study.experiments)
    yield from unknown("task of this study with settings of its own", study.per_task, study.tasks)
    yield from unknown("task of this study made of files", (*study.files, *study.corpora), study.tasks)
    if both := sorted(study.files.keys() & study.corpora.keys()):
        yield TombolaError("a name is of files and of a corpus", got=", ".join(both), expected="a name of its own for each")
    for field in ("model", "tasks", "experiments"):
        values = getattr(study, field)
        if twice := sorted({value for value in values if values.count(value) > 1}):
            yield TombolaError(f"{field} names the same twice", got=", ".join(twice))
    for task in study.tasks:
        if task not in study.files and task not in study.corpora and not task.startswith("hub:"):
            try:
                get_task(task)
            except DataError as error:
                yield error
    if study.device not in (None, "cpu", "cuda"):
        yield TombolaError("there is no such device", got=study.device, expected="cpu or cuda")
    try:
        rungs_of(study.preset, study.ladder)
    except SettingsError as error:
        yield from error.problems
    methods: list[str] = []
    fixed: dict[str, str] = {}
    for name in (name for name in study.experiments if name in EXPERIMENTS):
        try:
            options = study.options_for(name)
        except ValidationError as error:
            yield from _said(error, EXPERIMENTS[name].options, f"the experiment {name}")
            continue
        searched = getattr(options, "of", (name,) if name in SEARCHED else ())
        yield from unknown(f"search (of {name})", searched, SEARCHED)
        yield from unknown(f"kind of control (of {name})", getattr(options, "kinds", ()), CONTROL_KINDS)
        fixed |= {setting: one for one in searched if one in SEARCHED for setting in SEARCHED[one][1]}
        fixed |= dict.fromkeys(EXPERIMENTS[name].fixed, name)
        methods += EXPERIMENTS[name].methods(options)
    yield from _wrong_settings(study, list(dict.fromkeys(methods)), fixed)


def _wrong_settings(study: Study, methods: Sequence[str], fixed: Mapping[str, str]) -> Iterable[TombolaError]:
    """What is wrong with settings, each problem once, whichever methods and tasks it concerns."""
    known = {name for method in methods for name in options_of(method)} | SEED_NAMES.keys()
    seen: set[str] = set()
    for where in ({}, *study.per_task.values()):
        values = {**study.settings, **where}
        for name in values.keys() & fixed.keys():
            if name not in seen:
                yield TombolaError(
                    f"{name} is set by the experiments themselves", got=fixed[name], next="ask for experiments by name"
                )
            seen.add(name)
        for name in values.keys() - known - seen:
            seen.add(name)
            near = difflib.get_close_matches(name, known, n=1)
            yield TombolaError(
                f"there is no setting {name!r} of {' or '.join(methods) or 'any experiment asked for'}",
                expected=", ".join(sorted(known)),
                next=f"did you mean {near[0]!r}?" if near else None,
            )
        own = {SEED_NAMES[name]: value for name, value in values.items() if name in SEED_NAMES}
        for method in methods:
            try:
                resolve({n: v for n, v in values.items() if n in options_of(method)}, study.seeds, own, method=method)
            except SettingsError as error:
                for problem in error.problems:
                    if str(problem) not in seen:
                        seen.add(str(problem))
                        yield problem


# ------------------------------------------------------------------------------------------------------------ planning


@dataclass(frozen=True, slots=True)
class Part:
    """The cells that one experiment asks for on one task with one model."""

    experiment: str
    model: str
    task: str
    cells: tuple[Cell, ...]

    def needed(self) -> dict[str, Cell]:
        """Key → cell, of all it takes to have them, inputs first."""
        return {one.key: one for cell in self.cells for one in cell.needed()}


@dataclass(frozen=True, slots=True)
class Plan:
    """A study as cells."""

    study: Study
    parts: tuple[Part, ...]
    cells: Mapping[str, Cell]  # key → cell, each once, inputs first
    asked: int  # runs if every experiment were run by itself


def plan_study(lab: Lab, study: Study) -> Plan:
    """The cells of a study. Reads data, hashes the bases, computes nothing.

    Raises: SettingsError; DataError for data that are not there; TombolaError for a model that is not.
    """
    from tombola.study.runs import machine

    asked = {name: getattr(study, name) for name in ("device", "threads", "ranks")}
    lab.machine = machine() | {name: value for name, value in asked.items() if value is not None}
    rungs = rungs_of(study.preset, study.ladder)
    parts = []
    tasks = {name: (_task(lab, study, name), {**study.settings, **study.per_task.get(name, {})}) for name in study.tasks}
    for model in study.model:
        for name, (task, values) in tasks.items():
            context = Context(lab, model, task, study.seeds, rungs, values, tasks)
            for experiment in study.experiments:
                cells = EXPERIMENTS[experiment].cells(context, study.options_for(experiment))
                parts.append(Part(experiment, model, name, tuple(cells)))
    for experiment in study.experiments:
        if not any(part.cells for part in parts if part.experiment == experiment):
            lab.reporter.say(f"{experiment} has nothing to do on {', '.join(study.tasks)}: {EXPERIMENTS[experiment].about}")
    parts = _trained_once(parts)
    needed = [part.needed() for part in parts]
    return Plan(study, tuple(parts), {k: c for one in needed for k, c in one.items()}, sum(map(len, needed)))


def _trained_once(parts: Sequence[Part]) -> list[Part]:
    """The same parts, with no training asked for twice, with its weights kept and without: kept, it serves both."""
    retrained = [cell for part in parts for cell in part.cells if cell.step == "retrain" and cell.settings["keep_weights"]]
    keeping = {cell.without_weights: cell for cell in retrained}
    return [replace(part, cells=tuple(keeping.get(cell.key, cell) for cell in part.cells)) for part in parts]


def _task(lab: Lab, study: Study, name: str) -> "str | Task":
    """A task of the study; one made of files is read, and where they lie is kept for other processes."""
    if name in study.corpora:
        said = study.corpora[name].model_dump() | {"corpus": True}
    elif name in study.files:
        said = study.files[name].model_dump(exclude_none=True)
    else:
        return name
    task = brought(said)
    lab.cache.setdefault("files of tasks", {})[spec_of(task)] = said
    return task


# ----------------------------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True, slots=True)
class Estimate:
    """About what the missing cells of a plan will take on a computer like this one."""

    seconds: float  # of one worker
    chain: float  # seconds of the longest chain of cells that stand on each other: no number of workers is faster
    bytes: int

    def wall(self, workers: int) -> float:
        """Seconds with so many workers."""
        return max(self.chain, self.seconds / workers)


def estimate(lab: Lab, missing: Sequence[Cell]) -> Estimate:
    """Row passes × the time of one, measured on a few rows of each task; bytes by what each step keeps.

    Measured once for a base, task and machine, and kept in the store. Raises: as `load_weights` and `load_rows` do.
    """
    from tombola.study.steps import STEPS

    seconds = {cell.key: STEPS[cell.step].work(cell) * _speed(lab, cell) for cell in missing}
    chain: dict[str, float] = {}
    for cell in missing:  # inputs first
        chain[cell.key] = seconds[cell.key] + max((chain.get(taken.key, 0.0) for taken in cell.inputs.values()), default=0.0)
    return Estimate(sum(seconds.values()), max(chain.values(), default=0.0), sum(_bytes(lab, cell) for cell in missing))


def _speed(lab: Lab, cell: Cell) -> float:
    """Seconds of one row pass of the task a cell goes back to."""
    import platform

    from tombola.canonical import fingerprint
    from tombola.study.jobs import seconds_per_row_pass

    base = cell.run
    if base is None:
        return 0.0
    data = {name: value for name, value in base.settings["data"].items() if name != "rows"}
    here = [platform.node(), base.settings["machine"], base.settings["model"]["fingerprint"], data]
    known = ("speed", fingerprint(here))
    if known not in lab.cache:
        file = lab.store.root / "plans" / "speed" / f"{known[1]}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {"seconds_per_row_pass": seconds_per_row_pass(lab, base)})
        lab.cache[known] = float(read_json(file)["seconds_per_row_pass"])
    return float(lab.cache[known])


def _bytes(lab: Lab, cell: Cell) -> int:
    """About what a cell keeps: weights like the base's, a line a prediction, a bit a maskable value."""
    from tombola.study.data import base_folder

    base = cell.run
    if base is None:
        return 0
    known = ("weights bytes", base.settings["model"]["fingerprint"])
    if known not in lab.cache:
        folder = base_folder(lab, base.settings["model"])
        lab.cache[known] = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
    weights: int = lab.cache[known]
    counts = base.settings["data"]["counts"]
    predictions = 150 * sum(counts.get(role, 0) for role in ("selection", "report", "challenge"))
    searches = [one.settings.get("method") for one in cell.needed() if one.step == "search"]
    ticket = 20_000 + (0 if searches[-1:] == ["s-prune"] else weights // 32)
    kept = ticket if cell.step in ("search", "control", "derive", "base_mask") else predictions
    if cell.step == "round":  # the level it holds within the one before, and the scores of the one it trains
        kept += ticket // 2
    return int(kept + (weights if cell.settings.get("keep_weights") else 0) + 4_000)
