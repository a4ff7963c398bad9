"""Runs the cells of a study, here or in other processes: each once, inputs first, one failure never stopping the others.

    <store>/plans/<key>.json        a cell that was planned: all another process needs to compute it
    <store>/failed/<key>.json .txt  why it could not be computed, and the traceback; gone when it could

`run_cells` is the scheduler: it knows what is ready, executors (`tombola.study.executors`) know where it runs. All of them
end in `run_one`, so that a cell has the same bits wherever it was computed: it sets the threads the cell was planned with.

Nothing here imports torch before a cell is computed: worker processes set their threads first.
"""

import json
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tombola.errors import StoreError, TombolaError
from tombola.store import Store
from tombola.study import ranks
from tombola.study.cells import Cell, Given, Lab, Reporter

if TYPE_CHECKING:
    from tombola.study.executors import Executor

FORMAT = 1
State = Literal["done", "running", "failed", "to do"]


@dataclass(frozen=True, slots=True)
class Order:
    """What another process is told: which cell, and where things lie."""

    key: str
    store: str
    data: str | None = None
    budget: int | None = None  # bytes
    energy: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """A cell that was worked on: finished, or the reason why not."""

    key: str
    error: str | None = None
    seconds: float = 0.0
    computed: bool = True  # here; False when another process had published it by then


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a cell could not be computed the last time."""

    key: str
    title: str
    error: str
    when: str  # ISO 8601, UTC
    where: str  # "pid 12 on host"
    attempts: int
    traceback: str | None  # the file with it


@dataclass(frozen=True, slots=True)
class Tally:
    """How a run ended."""

    asked: int  # different cells, inputs included
    computed: tuple[str, ...]  # keys of those computed by this run, not by another on the same store
    failed: Mapping[str, str]  # key → reason
    blocked: Mapping[str, str]  # key → key of the failed cell it would have needed
    stopped: Mapping[str, str] = field(default_factory=dict)  # key → why it was not worth computing


class Watch:
    """Who is told how far a study is; this one does nothing with it. Work is counted in row passes."""

    def begin(self, titles: Mapping[str, str], work: Mapping[str, float], asked: int) -> None: ...
    def started(self, key: str) -> None: ...
    def share(self, key: str, done: float) -> None: ...
    def ended(self, ended: Ended) -> None: ...
    def say(self, message: str) -> None: ...
    def end(self) -> None: ...


# ------------------------------------------------------------------------------------------------------- planned cells


def write_plans(lab: Lab, cells: Iterable[Cell]) -> int:
    """Writes each of these cells and all they stand on to <store>/plans; how many files were written.

    A file has the cell's key as its name, so that studies on one store never get in each other's way.
    """
    from tombola.study.data import keep_rows_said

    folder, written = lab.store.root / "plans", 0
    wanted = {one.key: one for cell in cells for one in cell.needed()}
    folder.mkdir(exist_ok=True)
    keep_rows_said(lab)
    files: Mapping[str, Any] = lab.cache.get("files of tasks", {})
    for key, cell in wanted.items():
        spec = str(cell.settings.get("data", {}).get("task", ""))
        text = json.dumps(
            {
                "format": FORMAT,
                "cell": {"step": cell.step, "version": cell.version, "settings": cell.settings}
                | {"inputs": {role: _said_of(taken) for role, taken in cell.inputs.items()}},
                "data": None if lab.data_dir is None else str(lab.data_dir.absolute()),
                "files": {spec: files[spec]} if spec in files else {},
            },
            sort_keys=True,
        )
        file = folder / f"{key}.json"
        if not file.exists() or file.read_text("utf-8") != text:
            _write(file, text)
            written += 1
    return written


def _said_of(taken: "Cell | Given") -> dict[str, Any]:
    if isinstance(taken, Given):
        return {"given": taken.what, "key": taken.key, "folder": str(taken.folder.absolute())}
    return {"key": taken.key}


def read_plan(lab: Lab, key: str) -> Cell:
    """The planned cell of this key, its inputs read too. Notes in `lab` where its data lie, where nobody said so.

    Raises: StoreError when there is no such plan, or when what it says does not have this key.
    """
    file = lab.store.root / "plans" / f"{key}.json"
    try:
        said = json.loads(file.read_text("utf-8"))
        cell = said["cell"]
        inputs: dict[str, Cell | Given] = {
            role: Given(one["key"], Path(one["folder"]), one["given"]) if "given" in one else read_plan(lab, one["key"])
            for role, one in cell["inputs"].items()
        }
        planned = Cell(cell["step"], cell["version"], cell["settings"], inputs)
    except FileNotFoundError:
        next = "`tombola study plan` with the study's own options writes it; `tombola study status` lists keys"
        raise StoreError(f"no planned cell has the key {key!r}", got=str(file), next=next) from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} cannot be read", got=str(error), next="remove it and plan the study again") from error
    if planned.key != key:
        raise StoreError(f"{file} is not of this cell", got=planned.key, expected=key, next="remove it and plan the study again")
    if lab.data_dir is None and said["data"] is not None:
        lab.data_dir = Path(said["data"])
    lab.cache.setdefault("files of tasks", {}).update(said["files"])
    return planned


def find_plan(store: Store, prefix: str) -> str:
    """The one planned key that starts with `prefix`. Raises: StoreError listing candidates when there is not one."""
    keys = sorted(file.stem for file in (store.root / "plans").glob("*.json"))
    matches = [key for key in keys if key.startswith(prefix)]
    if len(matches) == 1:
        return matches[0]
    shown = matches or keys
    got = ", ".join(key[:12] for key in shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
    what = f"{len(matches) or 'no'} planned cells start with {prefix!r}"
    next = "`tombola study plan` writes them"
    raise StoreError(what, got=got or "no plans", expected="the start of exactly one key", next=next)


# ------------------------------------------------------------------------------------------------------------ failures


def note_failure(store: Store, key: str, title: str, error: BaseException | str) -> Failure:
    """Writes down why a cell could not be computed, beside the results and never among them."""
    folder = store.root / "failed"
    folder.mkdir(exist_ok=True)
    before = failures(store, [key]).get(key)
    trace = None
    if isinstance(error, BaseException):
        trace = str(folder / f"{key}.txt")
        _write(Path(trace), "".join(traceback.format_exception(error)))
    reason = error if isinstance(error, str) else said_of_error(error)
    now, where = datetime.now(UTC).isoformat(timespec="seconds"), f"pid {os.getpid()} on {socket.gethostname()}"
    failure = Failure(key, title, reason, now, where, 1 + (before.attempts if before else 0), trace)
    _write(folder / f"{key}.json", json.dumps(asdict(failure), indent=1))
    return failure


def said_of_error(error: BaseException) -> str:
    """An error as its reason reads: ours as they are, others with their class."""
    return str(error) if isinstance(error, TombolaError) else f"{type(error).__name__}: {error}"


def drop_failure(store: Store, key: str) -> None:
    """Forgets why a cell failed: it is finished now."""
    for ending in ("json", "txt"):
        (store.root / "failed" / f"{key}.{ending}").unlink(missing_ok=True)


def failures(store: Store, keys: Iterable[str]) -> dict[str, Failure]:
    """Key → failure, of those of these cells that failed when they were last tried and are not finished since."""
    found = {}
    there = {file.stem: file for file in (store.root / "failed").glob("*.json")}
    for key in keys:
        if key in there and not store.has(key):
            try:
                found[key] = Failure(**json.loads(there[key].read_text("utf-8")))
            except (FileNotFoundError, ValueError, TypeError):  # just dropped, or not whole
                continue
    return found


def _write(file: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    draft.write_text(text, "utf-8")
    draft.rename(file)


# ------------------------------------------------------------------------------------------------------------- one cell


@lru_cache(maxsize=4)
def lab_of(store: str, data: str | None, budget: int | None) -> Lab:
    """The lab of this process for a store: rows and models read for one cell serve the next."""
    return Lab(Store(store, create=False, budget=budget), None if data is None else Path(data))


def run_one(order: Order, *, lab: Lab | None = None, cell: Cell | None = None) -> Ended:
    """Computes one cell, inputs that are absent first, and says how it ended; never raises but on an interrupt.

    An input that another process is computing makes it end with an error that says who: whoever ordered this cell was
    too early. The cell itself being computed elsewhere is waited for. A failure is noted in the store.
    """
    started, at, title, ran = time.monotonic(), order.key, order.key, False
    lab = lab or lab_of(order.store, order.data, order.budget)
    lab.energy = order.energy
    try:
        cell = cell or read_plan(lab, order.key)
        for one in lab.missing([cell]):
            at, title = one.key, title_of(one)
            if one is not cell and (owner := lab.store.running(one.key)):
                who = f"{owner} is computing the input {title} ({one.key[:12]})"
                raise StoreError(f"{title_of(cell)} needs what is not finished", got=who, next="wait for it and try again")
            with as_planned(one):
                _bring_rows(lab, one)
                ran = lab.compute(one)
            drop_failure(lab.store, one.key)
    except Exception as error:
        failure = note_failure(lab.store, at, title, error)
        reason = failure.error if at == order.key else f"its input {title} failed: {failure.error}"
        return Ended(order.key, reason, time.monotonic() - started)
    return Ended(order.key, None, time.monotonic() - started, ran)


class as_planned:
    """Within it torch has the threads a cell was planned with. Raises: TombolaError when its device or ranks are not here."""

    def __init__(self, cell: Cell) -> None:
        from tombola.study.cost import device_of, ranks_of, threads_of

        self.threads, self.device, self.ranks = threads_of(cell), device_of(cell), ranks_of(cell)
        self.before: int | None = None

    def __enter__(self) -> None:
        if self.threads is None:
            return
        if self.ranks != ranks.size():
            next = "torchrun --nproc-per-node N -m tombola study run … --executor serial, N being the ranks of the study"
            raise TombolaError(
                "this cell was planned for another number of ranks", got=ranks.size(), expected=self.ranks, next=next
            )
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise TombolaError("this cell was planned for a GPU", got="a computer without one", next="run it where there is one")
        self.before = torch.get_num_threads()
        if self.before != self.threads:
            torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        if self.before is not None and self.before != self.threads:
            import torch

            torch.set_num_threads(self.before)


def _bring_rows(lab: Lab, cell: Cell) -> None:
    """Reads the files of a task of the user's own, where the plan says which those are."""
    files: Mapping[str, Any] = lab.cache.get("files of tasks", {})
    for one in cell.needed():
        spec = one.settings.get("data", {}).get("task")
        if spec in files and ("task", spec) not in lab.cache:
            from tombola.study.data import brought, named

            named(lab, brought(files[spec]))


def title_of(cell: Cell) -> str:
    """A cell in words: step, what, task, seed."""
    from tombola.study.steps import STEPS

    return STEPS[cell.step].title(cell)


# ---------------------------------------------------------------------------------------------------------- many cells


@dataclass
class _Front:
    """What is ready, what waits for what, and what can no longer be reached."""

    waiting: dict[str, set[str]]  # key → inputs that are not there yet
    takers: dict[str, list[str]] = field(default_factory=dict)
    ready: list[str] = field(default_factory=list)

    def finished(self, key: str) -> None:
        for taker in self.takers.get(key, ()):
            if taker in self.waiting:
                self.waiting[taker].discard(key)
                if not self.waiting[taker]:
                    del self.waiting[taker]
                    self.ready.append(taker)

    def lost(self, key: str) -> list[str]:
        """Those that stand on `key`, directly or not: they leave the queue."""
        gone: list[str] = []
        for taker in self.takers.get(key, ()):
            if self.waiting.pop(taker, None) is not None:
                gone += [taker, *self.lost(taker)]
        return gone


def run_cells(
    lab: Lab,
    cells: Sequence[Cell],
    executor: "Executor",
    watch: Watch | None = None,
    *,
    budget: int | None = None,
    stop: Callable[[Cell], str | None] = lambda cell: None,
) -> Tally:
    """Computes what is missing of these cells, inputs first, as many at a time as the executor has room for.

    stop: asked of a cell when all it needs is there: why it is not worth computing, or None. Neither it nor what stands on it is
    then tried, and the tally says so.

    A cell that fails is noted and those that need it are not tried; all others are. What another `study run` on the same
    store is computing comes last, and is then waited for and loaded. Raises: what planning raises; KeyboardInterrupt.
    """
    from tombola.study.steps import STEPS

    watch = watch or Watch()
    asked = {one.key for cell in cells for one in cell.needed()}
    missing = {cell.key: cell for cell in lab.missing(cells)}
    write_plans(lab, missing.values())
    data = None if lab.data_dir is None else str(lab.data_dir.absolute())
    orders = {key: Order(key, str(lab.store.root), data, budget, lab.energy) for key in missing}
    front = _Front({})
    for key, cell in missing.items():
        inputs = {taken.key for taken in cell.inputs.values() if taken.key in missing}
        for one in inputs:
            front.takers.setdefault(one, []).append(key)
        if inputs:
            front.waiting[key] = inputs
        else:
            front.ready.append(key)
    place = {key: number for number, key in enumerate(missing)}
    computed: list[str] = []
    failed: dict[str, str] = {}
    blocked: dict[str, str] = {}
    stopped: dict[str, str] = {}
    titles = {key: STEPS[cell.step].title(cell) for key, cell in missing.items()}
    watch.begin(titles, {key: STEPS[cell.step].work(cell) for key, cell in missing.items()}, len(asked))
    running: set[str] = set()
    asked_of: set[str] = set()
    try:
        while front.ready or running:
            for key in [one for one in front.ready if one not in asked_of]:
                asked_of.add(key)
                if (reason := stop(missing[key])) is not None:
                    front.ready.remove(key)
                    left_out = [key, *front.lost(key)]
                    stopped |= dict.fromkeys(left_out, reason)
                    watch.say(f"{titles[key]}, and {len(left_out) - 1} cells after it, left out: {reason}")
            if not (front.ready or running):
                break  # what was left is left out
            if room := min(executor.room(), len(front.ready)):
                if ranks.size() > 1:  # all ranks have to choose the same
                    front.ready.sort(key=place.__getitem__)
                elif len(front.ready) > room:  # only a choice asks who is at work on what
                    front.ready.sort(key=lambda key: (lab.store.running(key) is not None, place[key]))
                batch, front.ready = front.ready[:room], front.ready[room:]
                for key in batch:
                    watch.started(key)
                running |= set(batch)
                executor.start([orders[key] for key in batch])
            for ended in executor.ended(watch):
                running.discard(ended.key)
                if ended.error is None:
                    computed += [ended.key] if ended.computed else []
                    front.finished(ended.key)
                else:
                    if ranks.size() > 1:  # the other ranks may be in the middle of it: nothing goes on but all of them
                        raise TombolaError(
                            f"{titles[ended.key]} failed on rank {ranks.rank()}, so all ranks stop", got=ended.error
                        )
                    failed[ended.key] = ended.error
                    blocked |= dict.fromkeys(front.lost(ended.key), ended.key)
                watch.ended(ended)
    finally:
        executor.close()
        watch.end()
    return Tally(len(asked), tuple(computed), failed, blocked, stopped)


# -------------------------------------------------------------------------------------------------------------- status


def states(store: Store, keys: Collection[str]) -> dict[str, State]:
    """Key → done, running, failed or to do. A glance: files of finished cells are not hashed."""
    bad, found = failures(store, keys), dict[str, State]()
    locked = {folder.name for folder in (store.root / "locks").glob("*")}
    for key in keys:
        if store.has(key):
            found[key] = "done"
        elif key in locked and store.running(key) is not None:
            found[key] = "running"
        else:
            found[key] = "failed" if key in bad else "to do"
    return found


class Relay(Reporter):
    """A lab's reporter that passes on the share of the cell at work, at most every `every` seconds, and what is said."""

    def __init__(self, watch: Watch, every: float = 1.0) -> None:
        self.watch, self.every, self.key, self.last = watch, every, "", 0.0

    def share(self, done: float) -> None:
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self.watch.share(self.key, done)

    def say(self, message: str) -> None:
        self.watch.say(message)
