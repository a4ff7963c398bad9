"""What a study costs beside what its cells compute: CPU time a cell, planning, loading what is finished.

Cells here compute nothing: every step writes one small file. All else is as in a study: plans, locks, synced files, one
rename a cell, hashes checked on loading. Seconds, not ratios: nothing else does this, and the targets are in seconds.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import Figure, Setup
from tombola.store import Store
from tombola.study import cost
from tombola.study.cells import Cell, Lab
from tombola.study.engine import run_cells
from tombola.study.executors import Serial
from tombola.study.plan import Study, plan_study
from tombola.study.prasanna2020 import STUDY
from tombola.study.steps import STEPS

SEEDS, KINDS, DRAWS = 7, ("random", "random-per-layer", "bad", "bad-lowest", "strict-bad"), 10
FINISHED = SEEDS * (4 + 3 * len(KINDS) * DRAWS)  # dense, search, pruned, retrained; ticket, pruned, retrained of each control
BYTES = 20_000  # of the file a cell keeps; weights take their time to hash, about a second a gigabyte, and are not here


def glue(data: Path) -> tuple[str, ...]:
    """The nine tasks of GLUE as far as they are in `data`, each with splits that are there."""
    named = []
    for task in STUDY["tasks"]:
        splits = sorted({file.name.partition(".")[0] for file in (data / task).glob("*.jsonl*")})
        train = next((name for name in splits if name.startswith("train")), None)
        report = next((name for name in splits if name.startswith("validation")), None)
        if train and report:
            named.append(f"{task}:train={train},report={report},challenge=none")
    return (*named, *GENERATED[len(named) :])


GENERATED = [f"acceptability:train_rows={200 + number}" for number in range(9)]


def study(setup: Setup, task: str) -> list[Figure]:
    """One study of more than 1,000 cells, computed, then planned and loaded; and the plan of nine tasks × five seeds."""
    controls = {"kinds": KINDS, "draws": DRAWS, "retrain": True}
    asked = Study(
        name="bench", model=("demo",), tasks=(GENERATED[0],), seeds=tuple(range(SEEDS)), experiments=("controls",),
        options={"controls": controls},
    )  # fmt: skip
    nine = glue(setup.data) if setup.data is not None else tuple(GENERATED)
    paper = Study(**{**STUDY, "model": "demo", "tasks": nine})
    a_cell, loaded, first, again = list[float](), list[float](), list[float](), list[float]()
    with _computing_nothing():
        for _ in range(setup.rounds):
            with tempfile.TemporaryDirectory() as folder:
                lab = Lab(Store(Path(folder) / "one"))
                plan = plan_study(lab, asked)
                cells = list(plan.cells.values())
                assert len(cells) == FINISHED
                begun = time.process_time()
                tally = run_cells(lab, cells, Serial(lab=lab))
                a_cell.append((time.process_time() - begun) / len(cells))
                assert len(tally.computed) == len(cells)

                def finished(folder: str = folder) -> None:
                    lab = Lab(Store(Path(folder) / "one"))
                    assert lab.missing(plan_study(lab, asked).cells.values()) == []

                loaded.append(_seconds(finished))

                def planned(folder: str = folder) -> None:
                    plan = plan_study(Lab(Store(Path(folder) / "nine"), setup.data), paper)
                    assert len(plan.parts) == 9 * len(paper.experiments)

                first.append(_seconds(planned))
                again.append(_seconds(planned))
    said = f"seconds; {FINISHED} cells that compute nothing and keep {BYTES // 1000} kB, one after the other"
    rows = f"{sum(':train=' in one and ',report=' in one for one in nine)} of GLUE" if setup.data is not None else "generated"
    noted = f"seconds; {rows}, {9 * 5} × {len(paper.experiments)} experiments; again: rows unchanged, so not read"
    return [
        Figure("study", task, "CPU a cell", a_cell, said),
        Figure("study", task, "load 1,000", [one * 1000 / FINISHED for one in loaded], said),
        Figure("study", task, "plan 9 × 5", again, noted),
        Figure("study", task, "plan, first", first, noted),
    ]


def _seconds(run: Callable[[], None]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


@contextmanager
def _computing_nothing() -> Iterator[None]:
    def nothing(cell: Cell, lab: Lab, out: Path, progress: Any) -> None:
        (out / "result.txt").write_text(cell.key[0] * BYTES)

    def free(cell: Cell, lab: Lab, out: Path) -> float:
        return 0.0

    steps: Mapping[str, Any] = dict(STEPS)
    counted = cost.flops
    try:
        STEPS.update({name: replace(step, run=nothing) for name, step in steps.items()})
        cost.flops = free
        yield
    finally:
        STEPS.update(steps)
        cost.flops = counted
