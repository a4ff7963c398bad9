"""Several tasks that share a body: what a step of them is, and their chain as cells, each held against another way."""

from pathlib import Path
from typing import Any

import pytest

from conftest import sentiment_rows, write_task
from tombola.study.cells import Cell, Lab
from tombola.study.jobs import open_lab
from tombola.study.plan import Study, plan_study

FAST: dict[str, Any] = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 64, "selection_rows": 30}
FAST |= {"report_rows": 30, "imp_last_level": 0.2}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Two tasks: sentences decided by a word, and the same kind of sentences with the other answer, fewer of them."""
    folder = tmp_path_factory.mktemp("multi")
    for task, turn, n in (("sst2", 0, 200), ("cola", 1, 90)):
        for split, rows, seed in (("train", n, 1 + turn), ("validation", 60, 3 + turn)):
            write_task(folder / "data", task, split, [row | {"label": row["label"] ^ turn} for row in sentiment_rows(rows, seed)])
    return open_lab(folder / "store", folder / "data")


def planned(lab: Lab, model: Path, tasks: tuple[str, ...] = ("sst2", "cola"), seeds: tuple[int, ...] = (0,), **changes: Any) -> Any:
    said = {"name": "m", "model": str(model), "tasks": ["sst2", "cola"], "seeds": list(seeds), "settings": {**FAST, **changes}}
    study = Study(**said, experiments=["multi-task"], options={"multi-task": {"tasks": [list(tasks)]}})
    return list(plan_study(lab, study).cells.values())


def test_runs(lab: Lab, tiny_folder: Path) -> None:
    cells = planned(lab, tiny_folder)
    lab.run(cells)
    for c in cells:
        print(c.step, sorted(str(p.relative_to(lab.folder(c))) for p in lab.folder(c).rglob("*")))
    assert isinstance(cells[0], Cell)
