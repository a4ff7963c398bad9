"""What a cell is, and the lab that runs it.

A `Cell` is a description: a step, its fully resolved settings, and the cells it takes as inputs. Its key is the fingerprint
of all three, so that the same work has the same name wherever it is asked for, and runs once. A `Lab` brings a description
to life: what is in the store is loaded, what is not is computed and published whole.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tombola.canonical import fingerprint
from tombola.errors import StoreError
from tombola.store import PROVENANCE, Entry, Store


@dataclass(frozen=True, slots=True)
class Given:
    """An input the user brought: a folder, known by the fingerprint of what is in it."""

    key: str
    folder: Path
    what: str  # "ticket" | "weights"

    def describe(self) -> dict[str, Any]:
        return {"given": self.what, "key": self.key}


@dataclass(frozen=True, slots=True)
class Cell:
    """One stored run: which step, with which settings (defaults included), on which inputs."""

    step: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, "Cell | Given"] = field(default_factory=dict)
    # The name of its folder in any store: the same description, the same key. Made once, since a study asks for it often.
    key: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        inputs = {role: taken.key for role, taken in self.inputs.items()}
        said = {"step": self.step, "version": self.version, "settings": self.settings, "inputs": inputs}
        object.__setattr__(self, "key", fingerprint(said))

    def describe(self) -> dict[str, Any]:
        """The whole description as JSON, inputs included: what `cell.json` holds, and `from_description` reads."""
        inputs = {role: taken.describe() | {"key": taken.key} for role, taken in self.inputs.items()}
        return {"step": self.step, "version": self.version, "settings": self.settings, "inputs": inputs}

    @staticmethod
    def from_description(said: Mapping[str, Any]) -> "Cell":
        """The cell that `describe` was called on. Raises: StoreError when a key does not fit what is described."""
        inputs: dict[str, Cell | Given] = {}
        for role, one in said["inputs"].items():
            taken = Given(one["key"], Path(), one["given"]) if "given" in one else Cell.from_description(one)
            if taken.key != one["key"]:
                raise StoreError(f"the description of input {role} does not fit its key", got=taken.key, expected=one["key"])
            inputs[role] = taken
        return Cell(said["step"], said["version"], said["settings"], inputs)

    @property
    def without_weights(self) -> str:
        """The key of the same training, its weights not kept."""
        return Cell(self.step, self.version, {**self.settings, "keep_weights": False}, self.inputs).key

    def needed(self) -> Iterator["Cell"]:
        """This cell and every cell below it, inputs first; one that is taken twice comes twice."""
        for taken in self.inputs.values():
            if isinstance(taken, Cell):
                yield from taken.needed()
        yield self

    @property
    def run(self) -> "Cell | None":
        """The first cell below this one, or this one, that says a model, its rows and its machine; None for one without."""
        return next((one for one in self.needed() if {"model", "data", "machine"} <= one.settings.keys()), None)


class Reporter:
    """Where the lab says how far it is; this one says nothing. Work is counted in row passes (one row once through the model)."""

    def start(self, cells: int, work: float) -> None: ...
    def cell(self, title: str, work: float) -> None: ...
    def share(self, done: float) -> None: ...
    def say(self, message: str) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """A kind of cell. `run(cell, lab, out, progress)` writes its files into `out`; `work` is its cost in row passes."""

    version: int  # rises whenever the same settings and inputs give another result
    run: Callable[[Cell, "Lab", Path, Callable[[float], None]], None]
    work: Callable[[Cell], float]
    title: Callable[[Cell], str]


class Lab:
    """A store, the place of the data, and someone to report to."""

    def __init__(self, store: Store, data_dir: Path | None = None, reporter: Reporter | None = None) -> None:
        self.store, self.data_dir, self.reporter = store, data_dir, reporter or Reporter()
        self.checkpoint_seconds = 60.0  # how often a training run writes what a killed one goes on from
        self.machine: Mapping[str, Any] | None = None  # device and threads that cells are planned for; None: those here
        self.energy = False  # whether codecarbon measures what a cell takes
        self.cache: dict[Any, Any] = {}  # rows and models that several steps of one run read

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that would have to be computed, inputs first, each once."""
        wanted = {one.key: one for cell in cells for one in cell.needed()}
        done = {key for key in wanted if self.store.load(key) is not None}
        # A finished cell needs nothing below it: what only finished cells take is not asked for.
        asked: dict[str, Cell] = {}

        def ask(cell: Cell) -> None:
            if cell.key in done or cell.key in asked:
                return
            for taken in cell.inputs.values():
                if isinstance(taken, Cell):
                    ask(taken)
            asked[cell.key] = cell

        for cell in cells:
            ask(cell)
        return list(asked.values())

    def run(self, cells: Iterable[Cell]) -> list[Path]:
        """The folders of these cells, in order; what is missing is computed first, shared work once."""
        from tombola.study.steps import STEPS

        cells = list(cells)
        missing = self.missing(cells)
        if missing:
            work = [STEPS[cell.step].work(cell) for cell in missing]
            self.reporter.start(len(missing), sum(work))
            try:
                for cell, cost in zip(missing, work, strict=True):
                    title = STEPS[cell.step].title(cell)
                    self.reporter.cell(title, cost)
                    try:
                        self.compute(cell)
                    except Exception:
                        self.reporter.say(f"stopped at: {title}")
                        raise
            finally:
                self.reporter.end()
        return [self.folder(cell) for cell in cells]

    def folder(self, cell: "Cell | Given") -> Path:
        """Where the result of a finished cell lies. Raises: StoreError when it is not there."""
        if isinstance(cell, Given):
            return cell.folder
        folder = self.store.load(cell.key)
        if folder is None:
            raise StoreError(f"the {cell.step} cell {cell.key} is not in the store", next="run the command that made it again")
        return folder

    def compute(self, cell: Cell) -> bool:
        """Computes and publishes one cell whose inputs are there; False when somebody else had done so by the time it could."""
        from tombola.study import ranks
        from tombola.study.cost import metered
        from tombola.study.steps import STEPS

        def work(out: Path) -> None:
            started = time.time()
            with metered(cell, self, out) as cost:
                STEPS[cell.step].run(cell, self, out, self.reporter.share)
            facts = provenance() | {"started": round(started, 3), "seconds": cost["seconds"], "cost": cost}
            write_json(out / PROVENANCE, facts)

        def compute(work: Callable[[Path], None]) -> bool:
            return self.store.compute(cell.key, cell.describe(), work)[1]

        if ranks.size() == 1:
            return compute(work)
        ran = ranks.together(compute, work)
        ranks.wait_for_all()
        return ran


def cell_of(entry: Entry) -> Cell:
    """The cell a stored entry holds. Raises: StoreError when it is none, as of another program's store."""
    try:
        return Cell.from_description(entry.describe)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        what, got = f"cell {entry.key} does not say what it is", f"{type(error).__name__}: {error}"
        raise StoreError(what, got=got, expected="a step, its version, settings and inputs") from error


def provenance() -> dict[str, Any]:
    """With what a cell was made: versions and machine. No part of any identity."""
    import platform
    from importlib.metadata import version

    packages = ("tombola", "torch", "transformers", "accelerate", "safetensors", "numpy", "scikit-learn")
    return {
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": {"system": platform.system(), "processor": platform.machine()},
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
