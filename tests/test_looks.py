"""What a level reports: the state its training ended with, or the best of looks at the ends of epochs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tombola.anatomy import read_anatomy
from tombola.evaluate import predict, score
from tombola.gates import hold
from tombola.objective import load_weights
from tombola.order import Stretch
from tombola.search.imp import order_seed
from tombola.study.cells import Cell, Lab, read_json, read_rows
from tombola.study.chains import Chain, plan_chains
from tombola.study.data import encoded_rows, task_data
from tombola.study.jobs import open_lab
from tombola.study.joint import plan_joint
from tombola.study.results import collect
from tombola.study.runs import plan_retrain
from tombola.study.settings import resolve
from tombola.study.steps import imp as steps
from tombola.study.steps.looks import BEST, epoch_ends
from tombola.study.steps.shared import ticket_of
from tombola.train import RunSeeds, TrainSettings, fine_tune

FAST: dict[str, Any] = {"epochs": 3, "learning_rate": 5e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 40}
FAST |= {"report_rows": 40, "imp_last_level": 0.1, "max_length": 32}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Lab:
    return open_lab(tmp_path_factory.mktemp("looks") / "store", data_folder)


def chain_of(lab: Lab, model: Path, **changes: Any) -> Chain:
    return plan_chains(lab, str(model), "sst2", resolve({**FAST, **changes}, (0,), method="imp"), (0,))[0]


@pytest.fixture(scope="module")
def best(lab: Lab, tiny_folder: Path) -> Chain:
    planned = chain_of(lab, tiny_folder, report_checkpoint="best")
    lab.run(planned.cells)
    return planned


def reported(lab: Lab, cell: Cell, role: str = "report") -> float:
    return float(next(row["value"] for row in read_rows(lab.folder(cell) / "scores.jsonl") if row["role"] == role))


def test_looks_come_at_the_ends_of_epochs() -> None:
    assert epoch_ends(64, 16, 12) == {4, 8}  # the end is no look: the state there is asked anyway
    assert epoch_ends(65, 16, 12) == {5, 10} and epoch_ends(64, 16, 4) == frozenset()
    assert epoch_ends(64, 16, 9, rows_from=3) == {1, 5}


def test_a_level_reports_the_best_state_of_its_training_and_keeps_the_last(lab: Lab, best: Chain, tiny_folder: Path) -> None:
    """Each prefix of the round is trained anew from the base, and its model asked."""
    ticket, one, said = ticket_of(lab, best.levels[0]), best.plan[1], read_json(lab.folder(best.last) / "train.json")
    data = task_data(lab, "sst2", best.dense.settings["data"])
    seeds = RunSeeds(head=0, data=order_seed(0, one.data_round), dropout=0, mask=0)
    found: dict[int, tuple[float, float]] = {}
    for n in (10, 20, 30):
        model = load_weights(tiny_folder, data.task.objective, head_seed=0)
        hold(model, read_anatomy(model), ticket.mask)
        rows = encoded_rows(lab, best.dense, "train", data.train)
        how = TrainSettings(learning_rate=5e-3, batch_size=16, epochs=3)
        fine_tune(model, rows, how, seeds, stretch=Stretch(steps=n, schedule_steps=30))
        asked = [predict(model, encoded_rows(lab, best.dense, role, of)) for role, (_, of) in data.evaluated().items()]
        found[n] = (score(asked[0], "accuracy").value, score(asked[1], "accuracy").value)
    assert said["looks"] == [[n, selection] for n, (selection, _) in found.items()]
    top = max(found, key=lambda n: (found[n][0], n))
    assert said["reported_step"] == top and said["steps"] == 30
    assert (reported(lab, best.last, "selection"), reported(lab, best.last)) == found[top]
    assert len({selection for selection, _ in found.values()}) > 1, "looks must differ, or this shows nothing"


def test_masks_are_those_of_the_chain_that_reports_the_last_state(lab: Lab, best: Chain, tiny_folder: Path) -> None:
    last = chain_of(lab, tiny_folder)
    assert not {cell.key for cell in last.cells} & {cell.key for cell in best.cells}
    assert not any("report_checkpoint" in repr(cell.settings) for cell in last.cells), "the last state is not said"
    lab.run(last.cells)
    assert ticket_of(lab, last.levels[0]).mask == ticket_of(lab, best.levels[0]).mask
    weights = [lab.folder(one.dense) / "weights" / "model.safetensors" for one in (last, best)]
    assert weights[0].read_bytes() == weights[1].read_bytes(), "to look changes nothing"
    for a, b in ((last.dense, best.dense), (last.last, best.last)):
        looks = read_json(lab.folder(b) / "train.json")
        assert reported(lab, a, "selection") == looks["looks"][-1][1]
        assert reported(lab, b, "selection") == max(value for _, value in looks["looks"])
        assert "looks" not in read_json(lab.folder(a) / "train.json")
    again = plan_retrain(best.levels[0], best.dense)
    assert (
        again.settings["report_checkpoint"] == "best"
        and "report_checkpoint" not in plan_retrain(last.levels[0], last.dense).settings
    )
    lab.run([again])
    assert read_json(lab.folder(again) / "train.json")["reported_step"] in (10, 20, 30)


def test_the_best_is_never_without_its_name(lab: Lab, best: Chain, tiny_folder: Path) -> None:
    results = collect(lab.store, {cell.key for cell in best.cells})
    assert {row.chain for row in results.chains.levels} == {"report_checkpoint=best"}
    assert f"sst2: {BEST}" in results.warnings
    last = chain_of(lab, tiny_folder)
    lab.run(last.cells)
    both = collect(lab.store, {cell.key for one in (best, last) for cell in one.cells})
    assert {row.chain for row in both.chains.levels} == {"report_checkpoint=best", "report_checkpoint=last"}
    assert all("report_checkpoint=" in row.task for row in both.scores), "never averaged with each other"


def test_looks_of_a_round_that_is_stopped_are_not_lost(
    lab: Lab, best: Chain, tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_lab(tmp_path / "other", data_folder)
    other.checkpoint_seconds = 0.0
    planned = chain_of(other, tiny_folder, report_checkpoint="best")
    other.run([planned.levels[0]])
    real, stops = steps.fine_tune, [24, 14]

    def stopped(*arguments: Any, progress: Callable[[float], None], **named: Any) -> Any:
        at = stops.pop() if stops else 99

        def told(share: float) -> None:
            progress(share)
            if round(share * 30) >= at:
                raise KeyboardInterrupt

        return real(*arguments, progress=told, **named)

    monkeypatch.setattr(steps, "fine_tune", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            other.run([planned.last])
    other.run([planned.last])
    assert not stops
    for file in ("scores.jsonl", "predictions.jsonl", "train.json"):
        assert (other.folder(planned.last) / file).read_bytes() == (lab.folder(best.last) / file).read_bytes(), file


def test_of_several_tasks_each_has_its_own_best_look(lab: Lab, tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(data_folder / "sst2", tmp_path / "data" / "sst2")
    shutil.copytree(data_folder / "sst2", tmp_path / "data" / "cola")
    own = open_lab(tmp_path / "store", tmp_path / "data")
    asked = [
        (task, resolve({**FAST, "epochs": 2, "train_rows": rows, "report_checkpoint": "best"}, (0,), method="imp"))
        for task, rows in (("sst2", 64), ("cola", 48))
    ]
    (chain,) = plan_joint(own, str(tiny_folder), asked, (0,))
    own.run([chain.last])
    said = read_json(own.folder(chain.last) / "train.json")["looks"]
    assert {task: [step for step, _ in one["looks"]] for task, one in said.items()} == {"sst2": [4, 8], "cola": [3, 6, 8]}
    for i, task in enumerate(("sst2", "cola")):
        one, rows = said[task], read_rows(own.folder(chain.last) / f"task-{i}" / "scores.jsonl")
        assert next(row["value"] for row in rows if row["role"] == "selection") == max(value for _, value in one["looks"])
