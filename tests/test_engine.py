"""Studies: what a file says, which cells it becomes, that each runs once wherever it runs, and what becomes of failures."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tombola.errors import SettingsError, StoreError, TombolaError
from tombola.store import Store
from tombola.study.cells import Cell, Given, Lab, Step, read_json
from tombola.study.engine import (
    Ended,
    Order,
    Watch,
    drop_failure,
    failures,
    find_plan,
    note_failure,
    read_plan,
    run_cells,
    run_one,
    states,
    write_plans,
)
from tombola.study.executors import EXECUTORS, Executor, Local, Options, Serial, Submitted, executor_of
from tombola.study.experiments import EXPERIMENTS
from tombola.study.plan import BUILT_IN, Plan, Study, estimate, plan_study, read_study
from tombola.study.runs import implied
from tombola.study.steps import STEPS

FAST = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 60}
SMALL: dict[str, Any] = {"name": "small", "model": "demo", "tasks": ["sst2"], "experiments": ["s-prune"], "settings": FAST}
CONTROLS = {"kinds": ["random", "bad"], "draws": 2, "retrain": True}


def toml(folder: Path, text: str, name: str = "mine") -> str:
    file = folder / f"{name}.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def lab_in(store: Path, data: Path | None = None) -> Lab:
    return Lab(Store(store), data)


def tiny_study(tiny_folder: Path, **changed: Any) -> Study:
    return Study(**{**SMALL, "model": str(tiny_folder), **changed})


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_study_file_says_what_its_study_has(tmp_path: Path) -> None:
    name = toml(
        tmp_path,
        """
        about = "two tasks"
        model = "demo"
        tasks = ["acceptability", "nli-overlap:strength=0.9"]
        seeds = [3, 5]
        preset = "paper"
        experiments = ["s-prune", "controls"]
        [settings]
        epochs = 2
        [per_task."nli-overlap:strength=0.9"]
        epochs = 5
        [options.controls]
        kinds = ["bad"]
        draws = 4
        """,
    )
    study = read_study(name)
    assert (study.name, study.model, study.seeds, study.preset) == ("mine", ("demo",), (3, 5), "paper")
    assert study.settings == {"epochs": 2} and study.per_task == {"nli-overlap:strength=0.9": {"epochs": 5}}
    options = study.options_for("controls")
    assert (options.kinds, options.draws, options.retrain) == (("bad",), 4, True)  # type: ignore[attr-defined]


def test_everything_that_is_wrong_with_a_study_is_said_at_once(tmp_path: Path) -> None:
    name = toml(
        tmp_path,
        """
        model = "demo"
        tasks = ["acceptabilty"]
        seeds = [0, 0]
        preset = "correct"
        experiments = ["s-prun", "controls"]
        [settings]
        epoch = 2
        learning_rate = -1.0
        [per_task.rte]
        epochs = 1
        [options.controls]
        kinds = ["randm"]
        [options.m-prune]
        """,
    )
    with pytest.raises(SettingsError) as caught:
        read_study(name)
    said = str(caught.value)
    for wrong in (
        "acceptabilty",
        "s-prun'",
        "correct'",
        "'epoch'",
        "learning_rate",
        "'rte'",
        "randm",
        "m-prune",
        "seed is given twice",
    ):
        assert wrong in said, wrong
    for hint in ("did you mean 's-prune'", "did you mean 'corrected'", "did you mean 'epochs'", "did you mean 'random'"):
        assert hint in said, hint
    assert said.count("learning_rate is not valid") == 1, "one problem, whichever methods it concerns"


def test_unknown_fields_and_missing_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read_study(toml(tmp_path, 'task = ["rte"]\nseeds = ["1"]\nexperiments = ["s-prune"]'))
    said = str(caught.value)
    assert "no field 'task'" in said and "did you mean 'tasks'" in said
    assert "does not say its model" in said and "does not say its tasks" in said and "seeds.0" in said


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("epochs", 7, lambda study: study.settings["epochs"]),
        ("settings.epochs", 7, lambda study: study.settings["epochs"]),
        ("controls.draws", 7, lambda study: study.options["controls"]["draws"]),
        ("per_task.sst2.epochs", 7, lambda study: study.per_task["sst2"]["epochs"]),
        ("slurm.mem_gb", 7, lambda study: study.slurm["mem_gb"]),
        ("threads", 7, lambda study: study.threads),
    ],
)
def test_set_reaches_every_place_of_a_study(path: str, value: int, where: Any) -> None:
    study = read_study("prasanna2020", {"tasks": ["sst2"]}, [(path, value)])
    assert where(study) == 7


def test_options_of_the_command_line_take_the_place_of_the_files(tmp_path: Path) -> None:
    file = toml(tmp_path, 'model = "demo"\ntasks = "rte"\nseeds = 4\npreset = "paper"\nexperiments = "s-prune"')
    study = read_study(file, {"model": None, "tasks": ["wnli", "rte"], "seeds": [1], "ladder": "released:corrected"})
    assert (study.tasks, study.seeds, study.model, study.ladder) == (("wnli", "rte"), (1,), ("demo",), "released:corrected")
    with pytest.raises(SettingsError, match="a preset or a ladder"):
        read_study(toml(tmp_path, Path(file).read_text() + '\nladder = "paper:corrected"', "both"))


def test_a_study_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(TombolaError, match="no study 'prasana2020'") as caught:
        read_study("prasana2020")
    assert "did you mean 'prasanna2020'" in str(caught.value)
    with pytest.raises(TombolaError, match="cannot be read as a study"):
        read_study(toml(tmp_path, "model = "))


def test_what_an_experiment_sets_itself_cannot_be_set() -> None:
    with pytest.raises(SettingsError, match="procedure is set by the experiments themselves"):
        read_study("prasanna2020", None, [("procedure", "heads")])


def test_built_in_studies_are_sound_and_the_tables_have_no_loose_ends() -> None:
    for name in BUILT_IN:
        study = read_study(name)
        assert study.name == name and set(study.experiments) <= EXPERIMENTS.keys()
    for name in EXECUTORS:
        assert name in ("local", "serial", "slurm", "submitit", "ray")
    with pytest.raises(SettingsError, match="no executor 'cloud'"):
        executor_of("cloud", Options())


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "studies").glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_of_the_repository_are_sound(file: Path) -> None:
    study = read_study(str(file))
    assert study.name == file.stem and study.tasks and set(study.experiments) <= EXPERIMENTS.keys()


# ------------------------------------------------------------------------------------------------------------ planning


def planned(tiny_folder: Path, data_folder: Path, store: Path, **changed: Any) -> tuple[Lab, Plan]:
    lab = lab_in(store, data_folder)
    return lab, plan_study(lab, tiny_study(tiny_folder, **changed))


def test_shared_work_is_one_cell(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """By hand: a find has 3 cells. Controls of it: dense, search, pruned, retrained; and for each of 2 kinds × 2 draws the
    ticket, its score as pruned, and retrained."""
    changed = {"experiments": ["s-prune", "controls"], "options": {"controls": CONTROLS}, "seeds": [0, 1]}
    _, plan = planned(tiny_folder, data_folder, tmp_path / "s", **changed)
    assert plan.asked == 2 * (3 + (4 + 4 * 3))
    assert len(plan.cells) == 2 * (4 + 4 * 3)
    assert sum(cell.step == "fine_tune" for cell in plan.cells.values()) == 2
    order = list(plan.cells)
    for key, cell in plan.cells.items():
        assert all(order.index(taken.key) < order.index(key) for taken in cell.inputs.values()), "inputs first"


def test_heads_only_is_another_search_on_the_same_dense_model(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    _, plan = planned(
        tiny_folder, data_folder, tmp_path / "s", experiments=["s-prune", "s-prune-heads", "s-prune-mlps", "m-prune"]
    )
    searches = [cell for cell in plan.cells.values() if cell.step == "search"]
    assert sorted(str(cell.settings["search"].get("procedure")) for cell in searches) == ["None", "heads", "joint", "mlps"]
    assert len({cell.inputs["model"].key for cell in searches}) == 1


def test_settings_of_one_task_hold_for_it_alone(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    task = "acceptability:train_rows=60,report_rows=20"
    changed = {"tasks": ["sst2", task], "per_task": {task: {"epochs": 1, "train_rows": 40, "selection_rows": 10}}}
    _, plan = planned(tiny_folder, data_folder, tmp_path / "s", **changed)
    epochs = {c.settings["data"]["task"]: c.settings["train"]["epochs"] for c in plan.cells.values() if c.step == "fine_tune"}
    assert epochs == {"sst2": 4, task: 1}


def test_a_ladder_runs_every_experiment_on_its_rungs(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """A rung for each preset, and one for each option that differs and that the method has (m-prune has fewer)."""
    from tombola.study.presets import ladder
    from tombola.study.settings import options_of

    changed = {"experiments": ["s-prune-heads", "m-prune"], "ladder": "released:corrected"}
    _, plan = planned(tiny_folder, data_folder, tmp_path / "s", **changed)
    for part, method in zip(plan.parts, ("s-prune", "m-prune"), strict=True):
        rungs = ladder("released:corrected", options_of(method) - implied("sst2", method).keys())
        assert len(part.cells) == 3 * len(rungs)
    assert len(ladder("released:corrected", options_of("m-prune"))) < len(ladder("released:corrected", options_of("s-prune")))


def test_a_planned_study_is_planned_again_to_the_same_keys_without_reading_its_data(
    tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, first = planned(tiny_folder, data_folder, tmp_path / "s", seeds=[0, 1])
    assert not (tmp_path / "s" / "plans" / "rows").exists(), "a plan that is not written down leaves nothing"
    write_plans(lab, first.cells.values())

    def unread(*_: Any, **__: Any) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr("tombola.study.data.load_rows", unread)
    _, again = planned(tiny_folder, data_folder, tmp_path / "s", seeds=[0, 1])
    assert again.cells.keys() == first.cells.keys()
    os.utime(data_folder / "sst2" / "train.jsonl", ns=(1, 1))  # as an edit does
    with pytest.raises(AssertionError, match="rows were read"):
        planned(tiny_folder, data_folder, tmp_path / "s", seeds=[0, 1])


def test_an_estimate_adds_up_and_no_number_of_workers_beats_the_longest_chain(
    tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, plan = planned(tiny_folder, data_folder, tmp_path / "s")
    monkeypatch.setattr("tombola.study.jobs.seconds_per_row_pass", lambda lab, cell: 0.5)
    found = estimate(lab, list(plan.cells.values()))
    work = {cell.step: STEPS[cell.step].work(cell) for cell in plan.cells.values()}
    assert found.seconds == pytest.approx(0.5 * sum(work.values()))
    assert found.chain == found.wall(1000) == pytest.approx(found.seconds), "three cells that stand on each other"
    weights = (tiny_folder / "model.safetensors").stat().st_size
    assert weights < found.bytes < weights + 200_000


def test_a_task_made_of_files_is_read_again_by_another_process(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_bytes((data_folder / "sst2" / f"{split}.jsonl").read_bytes())
    text = f"""
    model = "{tiny_folder}"
    tasks = "mine"
    experiments = "s-prune"
    settings = {{train_rows = 60, selection_rows = 20, epochs = 1}}
    [files.mine]
    train = "train.jsonl"
    validation = "validation.jsonl"
    text = "sentence"
    label = "label"
    """
    lab = lab_in(tmp_path / "s")
    plan = plan_study(lab, read_study(toml(tmp_path, text)))
    write_plans(lab, plan.cells.values())
    key = next(key for key, cell in plan.cells.items() if cell.step == "fine_tune")
    assert run_one(Order(key, str(tmp_path / "s")), lab=lab_in(tmp_path / "s")).error is None


# ------------------------------------------------------------------------------------------------------- planned cells


def test_a_written_plan_is_read_back_as_the_same_cell(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    changed = {"experiments": ["controls"], "options": {"controls": CONTROLS}}
    lab, plan = planned(tiny_folder, data_folder, tmp_path / "s", **changed)
    assert write_plans(lab, plan.cells.values()) == len(plan.cells)
    assert write_plans(lab, plan.cells.values()) == 0, "what is there is not written again"
    other = lab_in(tmp_path / "s")
    for key, cell in plan.cells.items():
        read = read_plan(other, key)
        assert (read.key, read.describe()) == (key, json.loads(json.dumps(cell.describe())))
    assert other.data_dir == data_folder
    assert find_plan(other.store, key[:8]) == key


def test_a_given_input_keeps_its_folder(tmp_path: Path) -> None:
    lab = lab_in(tmp_path / "s")
    cell = Cell("evaluate", 1, {"x": 1}, {"ticket": Given("a" * 32, tmp_path / "there", "ticket")})
    write_plans(lab, [cell])
    read = read_plan(lab, cell.key)
    assert read.inputs["ticket"] == Given("a" * 32, tmp_path / "there", "ticket") and read.key == cell.key


def test_a_damaged_or_absent_plan_is_refused(tmp_path: Path) -> None:
    lab, cell = lab_in(tmp_path / "s"), Cell("search", 1, {"floor": 0.9})
    write_plans(lab, [cell])
    file = tmp_path / "s" / "plans" / f"{cell.key}.json"
    whole = file.read_text()
    for damaged, match in ((whole.replace("0.9", "0.8"), "not of this cell"), (whole[:20], "cannot be read")):
        file.write_text(damaged)
        with pytest.raises(StoreError, match=match):
            read_plan(lab, cell.key)
    with pytest.raises(StoreError, match="no planned cell"):
        read_plan(lab, "0" * 32)
    with pytest.raises(StoreError, match="no planned cells start with 'ffff'"):
        find_plan(lab.store, "ffff")


# ---------------------------------------------------------------------------------------------------------- scheduling


class Fake:
    """An executor that computes nothing: cells end in any order, those named in `bad` with an error."""

    def __init__(self, rooms: int, bad: set[str], seed: int) -> None:
        self.rooms, self.bad, self.rng = rooms, bad, random.Random(seed)
        self.running: list[str] = []
        self.started: list[str] = []
        self.over: list[str] = []
        self.closed = 0
        self.seen: list[tuple[str, frozenset[str]]] = []  # each start, with what was over by then

    def room(self) -> int:
        return self.rooms - len(self.running)

    def start(self, orders: Sequence[Order]) -> None:
        assert len(orders) <= self.room()
        for order in orders:
            self.seen.append((order.key, frozenset(self.over)))
            self.running.append(order.key)
            self.started.append(order.key)

    def ended(self, watch: Any) -> list[Ended]:
        key = self.running.pop(self.rng.randrange(len(self.running)))
        if key in self.bad:
            return [Ended(key, "it is bad")]
        self.over.append(key)
        return [Ended(key)]

    def close(self) -> None:
        self.closed += 1


def graph(edges: list[list[int]]) -> list[Cell]:
    """Cells, the i-th of which takes those of `edges[i]` that come before it."""
    cells: list[Cell] = []
    for number, taken in enumerate(edges):
        inputs = {f"in{one}": cells[one] for one in sorted(set(taken)) if one < number}
        cells.append(Cell("evaluate", 1, {"number": number, "data": {"task": "t", "counts": {}}}, inputs))
    return cells


@settings(max_examples=60)
@given(
    edges=st.lists(st.lists(st.integers(0, 8), max_size=3), min_size=1, max_size=9),
    rooms=st.integers(1, 4),
    bad=st.sets(st.integers(0, 8), max_size=2),
    seed=st.integers(0, 99),
)
def test_inputs_come_first_and_failures_stop_only_what_stands_on_them(
    edges: list[list[int]], rooms: int, bad: set[int], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cells = graph(edges)
    lab = lab_in(tmp_path_factory.mktemp("graph") / "s")
    fake = Fake(rooms, {cells[one].key for one in bad if one < len(cells)}, seed)
    executor: Executor = fake
    tally = run_cells(lab, cells, executor)
    # by brute force: whatever can be reached from a bad cell cannot run
    reached = set(fake.bad)
    for cell in cells:
        if any(taken.key in reached for taken in cell.inputs.values()):
            reached.add(cell.key)
    all_keys = {cell.key for cell in cells}
    assert set(tally.computed) == all_keys - reached
    assert fake.closed == 1 and len(fake.started) == len(set(fake.started))
    by_key = {cell.key: cell for cell in cells}
    for key, over in fake.seen:
        assert all(taken.key in over for taken in by_key[key].inputs.values())
    assert set(tally.failed) | set(tally.blocked) == reached
    for key, cause in tally.blocked.items():
        assert cause in tally.failed and cause in {one.key for one in by_key[key].needed()}


def test_what_another_run_is_computing_comes_last(tmp_path: Path) -> None:
    cells, lab = graph([[], [], []]), lab_in(tmp_path / "s")
    held, release = threading.Event(), threading.Event()

    def work(out: Path) -> None:
        held.set()
        release.wait(20)

    other = threading.Thread(target=lambda: Store(tmp_path / "s").compute(cells[0].key, {}, work))
    other.start()
    assert held.wait(20)
    try:
        assert states(lab.store, [cell.key for cell in cells]) == {
            cells[0].key: "running", cells[1].key: "to do", cells[2].key: "to do"
        }  # fmt: skip
        fake = Fake(1, set(), 0)
        run_cells(lab, cells, fake)
        assert fake.started == [cells[1].key, cells[2].key, cells[0].key]
    finally:
        release.set()
        other.join()


def test_an_interrupt_closes_the_executor(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def ended(self, watch: Any) -> list[Ended]:
            raise KeyboardInterrupt

    fake = Interrupted(2, set(), 0)
    with pytest.raises(KeyboardInterrupt):
        run_cells(lab_in(tmp_path / "s"), graph([[], [0]]), fake)
    assert fake.closed == 1


# ------------------------------------------------------------------------------------------------------------ failures


def stepped(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(STEPS, "evaluate", Step(1, run, lambda cell: 1.0, lambda cell: f"cell {cell.settings['number']}"))
    monkeypatch.setattr("tombola.study.cost.flops", lambda cell, lab, out: 0.0)


def test_a_failed_cell_is_noted_with_its_reason_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = True

    def run(cell: Cell, lab: Lab, out: Path, progress: Any) -> None:
        if broken and cell.settings["number"] == 1:
            raise ValueError("the disk ate it")
        (out / "result.txt").write_text(str(cell.settings["number"]))

    stepped(monkeypatch, run)
    cells, lab = graph([[], [], [1], [0]]), lab_in(tmp_path / "s")
    tally = run_cells(lab, cells, Serial(lab=lab))
    assert tally.failed == {cells[1].key: "ValueError: the disk ate it"} and tally.blocked == {cells[2].key: cells[1].key}
    assert set(tally.computed) == {cells[0].key, cells[3].key}
    keys = [cell.key for cell in cells]
    assert [states(lab.store, keys)[key] for key in keys] == ["done", "failed", "to do", "done"]
    (failure,) = failures(lab.store, keys).values()
    assert failure.title == "cell 1" and failure.attempts == 1
    assert failure.traceback is not None and "raise ValueError" in Path(failure.traceback).read_text()
    assert list(lab.store.entries()) and not lab.store.verify(), "a failure is no result"

    run_cells(lab, cells, Serial(lab=lab))
    assert failures(lab.store, keys)[cells[1].key].attempts == 2
    broken = False
    again = run_cells(lab, cells, Serial(lab=lab))
    assert set(again.computed) == {cells[1].key, cells[2].key} and not again.failed
    assert failures(lab.store, keys) == {} and list((tmp_path / "s" / "failed").iterdir()) == []


def test_a_failure_of_a_finished_cell_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    note_failure(store, "a" * 32, "it", "why")
    assert failures(store, ["a" * 32, "b" * 32])["a" * 32].error == "why"
    store.compute("a" * 32, {}, lambda out: (out / "x").write_text("x") and None)
    assert failures(store, ["a" * 32]) == {}
    drop_failure(store, "a" * 32)


def test_run_one_computes_absent_inputs_first_and_refuses_those_that_somebody_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []

    def run(cell: Cell, lab: Lab, out: Path, progress: Any) -> None:
        order.append(cell.settings["number"])
        (out / "result.txt").write_text("x")

    stepped(monkeypatch, run)
    cells, lab = graph([[], [0], [1]]), lab_in(tmp_path / "s")
    write_plans(lab, cells)
    held, release = threading.Event(), threading.Event()

    def work(out: Path) -> None:
        held.set()
        release.wait(20)
        (out / "result.txt").write_text("x")

    other = threading.Thread(target=lambda: Store(tmp_path / "s").compute(cells[1].key, cells[1].describe(), work))
    other.start()
    assert held.wait(20)
    try:
        ended = run_one(Order(cells[2].key, str(tmp_path / "s")), lab=lab)
        assert ended.error is not None and f"pid {os.getpid()}" in ended.error and order == [0]
    finally:
        release.set()
        other.join()
    assert run_one(Order(cells[2].key, str(tmp_path / "s")), lab=lab).error is None
    assert order == [0, 2], "what is there by now is not computed again"


def test_a_cell_is_computed_with_the_threads_it_was_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(cell: Cell, lab: Lab, out: Path, progress: Any) -> None:
        seen.append(torch.get_num_threads())
        (out / "result.txt").write_text("x")

    stepped(monkeypatch, run)
    before = torch.get_num_threads()
    cell = Cell("evaluate", 1, {"number": 0, "machine": {"device": "cpu", "threads": before + 1}})
    standing = Cell("evaluate", 1, {"number": 1}, {"on": cell})
    lab = lab_in(tmp_path / "s")
    assert not run_cells(lab, [standing], Serial(lab=lab)).failed
    assert seen == [before + 1, before + 1] and torch.get_num_threads() == before


def test_a_cell_of_a_gpu_fails_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped(monkeypatch, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cell, lab = Cell("evaluate", 1, {"number": 0, "machine": {"device": "cuda", "threads": 1}}), lab_in(tmp_path / "s")
    assert "planned for a GPU" in run_cells(lab, [cell], Serial(lab=lab)).failed[cell.key]


# ---------------------------------------------------------------------------------------------------------------- cost


def test_flops_are_two_for_each_matrix_weight_and_token(tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """By hand: 2 layers, each 4 square matrices of 32 and two of 32 × 48; tokens counted by splitting at spaces."""
    from tombola.study.cost import total_cost

    lab, plan = planned(tiny_folder, data_folder, tmp_path / "s")
    run_cells(lab, list(plan.cells.values()), Serial(lab=lab))
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 48)
    texts = {}
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (data_folder / "sst2" / f"{split}.jsonl").read_text().splitlines()]
        texts |= {f"{split}:{row['idx']}": row["sentence"] for row in rows}
    by_step = {}
    for key, cell in plan.cells.items():
        said = read_json(lab.store.root / "cells" / key / "provenance.json")["cost"]
        by_step[cell.step] = (said, lab.store.root / "cells" / key)
    evaluated = [json.loads(line)["id"] for line in (by_step["evaluate"][1] / "predictions.jsonl").read_text().splitlines()]
    tokens = sum(2 + len(texts[one].split()) for one in evaluated)  # [CLS] and [SEP]
    assert by_step["evaluate"][0]["flops"] == 2 * weights * tokens
    trained = read_json(by_step["fine_tune"][1] / "train.json")["padded_tokens"]
    assert by_step["fine_tune"][0]["flops"] == 2 * weights * (3 * trained + tokens)
    for said, _ in by_step.values():
        assert said["device"] == "cpu" and said["seconds"] > 0 and said["energy"]["how"] == "estimated"
        assert said["energy"]["kwh"] == pytest.approx(10.0 * said["cpu_seconds"] / 3.6e6, rel=0.05, abs=1e-8)
    total = total_cost(lab.store, plan.cells)
    assert total.cells == 3 and total.flops == sum(said["flops"] for said, _ in by_step.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # codecarbon's own
def test_codecarbon_reads_what_a_cell_takes_and_says_whether_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("codecarbon")

    def run(cell: Cell, lab: Lab, out: Path, progress: Any) -> None:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            pass
        (out / "result.txt").write_text("x")

    stepped(monkeypatch, run)
    lab, cell = lab_in(tmp_path / "s"), graph([[]])[0]
    lab.energy = True
    assert lab.compute(cell)
    said = read_json(tmp_path / "s" / "cells" / cell.key / "provenance.json")["cost"]["energy"]
    assert said["kwh"] > 0 and said["by"].startswith("codecarbon")
    rapl = any(Path("/sys/class/powercap").glob("intel-rapl*/energy_uj")) if Path("/sys/class/powercap").exists() else False
    assert said["how"] == "estimated" or rapl, "without counters nothing is measured"


def test_what_a_cell_took_is_no_part_of_what_duplicates_must_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that both believe they hold the lock: the second finds a cell whose cost differs, and that is fine."""

    def run(cell: Cell, lab: Lab, out: Path, progress: Any) -> None:
        if not (tmp_path / "twice").exists():
            (tmp_path / "twice").touch()
            inner = tmp_path / "s" / "locks" / cell.key
            inner.rename(tmp_path / "lock")  # as if it were taken over
            Lab(Store(tmp_path / "s")).compute(cell)
        (out / "result.txt").write_text("same")

    stepped(monkeypatch, run)
    lab, cell = lab_in(tmp_path / "s"), graph([[]])[0]
    lab.compute(cell)
    assert lab.store.load(cell.key) is not None


# ----------------------------------------------------------------------------------------------------------- executors


def results(store: Path) -> dict[str, bytes]:
    """Every file of every cell but its own note of when and where; tickets say when nothing."""
    said = ("provenance.json", "done.json")
    return {
        str(file.relative_to(store)): file.read_bytes()
        for file in sorted((store / "cells").rglob("*"))
        if file.is_file() and file.name not in said
    }


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> tuple[Path, Study]:
    """A small study run one cell after the other in this process: what all executors are held against."""
    changed = {"experiments": ["s-prune", "controls"], "options": {"controls": {"kinds": ["bad"], "retrain": True}}}
    study, store = tiny_study(tiny_folder, **changed), tmp_path_factory.mktemp("serial") / "s"
    lab = lab_in(store, data_folder)
    plan = plan_study(lab, study)
    tally = run_cells(lab, list(plan.cells.values()), Serial(lab=lab))
    assert not tally.failed and len(tally.computed) == len(plan.cells) == 4 + 3
    return store, study


def run_with(name: str, store: Path, data_folder: Path, study: Study, **options: Any) -> Plan:
    lab = lab_in(store, data_folder)
    plan = plan_study(lab, study)
    made = executor_of(name, Options(threads=torch.get_num_threads(), folder=store / "jobs", **options))
    tally = run_cells(lab, list(plan.cells.values()), made)
    assert not tally.failed and len(tally.computed) == len(plan.cells)
    return plan


@pytest.mark.slow
def test_the_scheduler_gives_what_a_lab_gives(serial: tuple[Path, Study], data_folder: Path, tmp_path: Path) -> None:
    store, study = serial
    lab = lab_in(tmp_path / "s", data_folder)
    lab.run(plan_study(lab, study).cells.values())
    assert results(tmp_path / "s") == results(store)


def test_worker_processes_give_the_same_bits(serial: tuple[Path, Study], data_folder: Path, tmp_path: Path) -> None:
    store, study = serial
    run_with("local", tmp_path / "s", data_folder, study, workers=2)
    assert results(tmp_path / "s") == results(store)
    assert {folder.name for folder in (tmp_path / "s").iterdir()} >= {"cells", "plans"}
    assert list((tmp_path / "s" / "tmp").iterdir()) == [] and list((tmp_path / "s" / "locks").iterdir()) == []


@pytest.mark.parametrize(("name", "module", "extra"), [("submitit", "submitit", "slurm"), ("ray", "ray", "ray")])
def test_an_extra_that_is_missing_is_said(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TombolaError, match=f"needs {module}") as caught:
        executor_of(name, Options())
    assert f"tombola[{extra}]" in str(caught.value)


def test_energy_without_codecarbon_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tombola.study.cost import require_energy

    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(TombolaError, match="energy cannot be read here"):
        require_energy()


def test_parameters_that_submitit_does_not_know_are_refused_before_anything_runs(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(SettingsError, match="cannot be set up") as caught:
        executor_of("submitit", Options(folder=tmp_path, parameters={"memory": 8}))
    assert "memory" in str(caught.value)


@pytest.mark.slow
def test_jobs_of_submitit_give_the_same_bits(serial: tuple[Path, Study], data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    store, study = serial
    run_with("submitit", tmp_path / "s", data_folder, study, parameters={"timeout_min": 5})
    assert results(tmp_path / "s") == results(store)


@pytest.mark.ray
def test_ray_gives_the_same_bits(serial: tuple[Path, Study], data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    store, study = serial
    run_with("ray", tmp_path / "s", data_folder, study, workers=2)
    assert results(tmp_path / "s") == results(store)


def dies(order: Order, lab: Lab | None = None) -> Ended:
    """`run_one` in a worker that is killed in the middle of drawing a control, with half a file written."""
    marker = Path(order.store).parent / "killed"

    def killed(cell: Cell, lab: Lab, out: Path, progress: Any) -> None:
        if cell.step == "control" and not marker.exists():
            marker.touch()
            (out / "ticket.json").write_text("{")
            os.kill(os.getpid(), signal.SIGKILL)
        original(cell, lab, out, progress)

    original = STEPS["control"].run
    STEPS["control"] = dataclasses.replace(STEPS["control"], run=killed)
    try:
        return run_one(order, lab=lab)
    finally:
        STEPS["control"] = dataclasses.replace(STEPS["control"], run=original)


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_cell_and_no_other(
    serial: tuple[Path, Study], data_folder: Path, tmp_path: Path
) -> None:
    store, study = serial
    lab = lab_in(tmp_path / "s", data_folder)
    plan = plan_study(lab, study)
    tally = run_cells(lab, list(plan.cells.values()), Local(Options(workers=1, call=dies)))
    ((key, reason),) = tally.failed.items()
    assert plan.cells[key].step == "control" and "SIGKILL" in reason
    assert len(tally.computed) == 4 and len(tally.blocked) == 2, "all but the control, its score and its retraining"
    assert states(lab.store, [key]) == {key: "failed"} and "SIGKILL" in failures(lab.store, [key])[key].error
    assert failures(lab.store, [key])[key].title == "control · bad 0 · sst2 · seed 0"
    again = run_cells(lab, list(plan.cells.values()), Serial(lab=lab))
    assert not again.failed and set(again.computed) == {key, *tally.blocked}
    assert results(tmp_path / "s") == results(store)


# -------------------------------------------------------------------------------------------------------- command line


def command(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tombola", "study", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell put in the background
        **options,
    )  # fmt: skip


def study_file(folder: Path, tiny_folder: Path, **more: Any) -> str:
    settings = ", ".join(f"{name} = {value}" for name, value in {**FAST, **more}.items())
    text = f'model = "{tiny_folder}"\ntasks = "sst2"\nseeds = [0, 1]\nexperiments = "s-prune"\nsettings = {{{settings}}}\n'
    return toml(folder, text)


@pytest.mark.slow
def test_two_runs_on_one_store_share_the_work(
    tmp_path: Path, tiny_folder: Path, data_folder: Path, serial: tuple[Path, Study]
) -> None:
    file = study_file(tmp_path, tiny_folder)
    there = ("--store", str(tmp_path / "s"), "--data", str(data_folder), "--executor", "serial", "--json")
    both = [command("run", file, *there) for _ in range(2)]
    said = [json.loads(one.communicate(timeout=240)[0]) for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert said[0]["computed"] + said[1]["computed"] == 6 == said[0]["cells"], "each cell was computed by one of them"
    ours, theirs = results(tmp_path / "s"), results(serial[0])
    shared = ours.keys() & theirs.keys()
    assert len({name.split("/")[1] for name in shared}) == 3 and all(ours[name] == theirs[name] for name in shared)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupt_leaves_nothing_half_written_and_no_process(
    sent: signal.Signals, code: int, tmp_path: Path, tiny_folder: Path, data_folder: Path
) -> None:
    file, store = study_file(tmp_path, tiny_folder, epochs=400), tmp_path / "s"
    ran = command("run", file, "--store", str(store), "--data", str(data_folder), "--workers", "2")
    deadline = time.monotonic() + 120
    while len(list((store / "locks").glob("*"))) < 2:
        assert time.monotonic() < deadline and ran.poll() is None
        time.sleep(0.1)
    owners = [read_json(lock / "owner.json")["pid"] for lock in (store / "locks").iterdir()]
    if sent == signal.SIGINT:
        os.killpg(ran.pid, sent)  # as Ctrl-C does: everybody gets it
    else:
        ran.send_signal(sent)
    _, said = ran.communicate(timeout=60)
    assert ran.returncode == code and ("interrupted" in said) == (sent == signal.SIGINT)
    for pid in owners:
        while sent == signal.SIGKILL and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # they have to notice by themselves
        assert not Path(f"/proc/{pid}").exists()
    assert list((store / "locks").iterdir()) == [] and list((store / "tmp").iterdir()) == []
    assert not list((store / "cells").glob("*")) and not list((store / "failed").glob("*")), "an interrupt is no failure"


@pytest.mark.slow
def test_a_job_that_times_out_goes_back_to_the_queue_and_goes_on(
    serial: tuple[Path, Study], data_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("submitit")
    store, study = serial
    lab = lab_in(tmp_path / "s", data_folder)
    plan = plan_study(lab, study)
    jobs = Submitted(Options(folder=tmp_path / "jobs", parameters={"timeout_min": 5, "requeues": 2}), cluster="local")
    key = next(key for key, cell in plan.cells.items() if cell.step == "fine_tune")

    class Impatient(Watch):
        """Tells the job of the fine-tune that its time is over, once, as soon as it is at work."""

        def started(self, of: str) -> None:
            if of == key:
                threading.Thread(target=tell, daemon=True).start()

    told = []

    def tell() -> None:
        while lab.store.running(key) is None and not lab.store.has(key):
            time.sleep(0.02)
        told.append(read_json(lab.store.root / "locks" / key / "owner.json")["pid"])
        os.kill(told[0], signal.SIGUSR2)  # as Slurm does, a minute before the end

    assert not run_cells(lab, [plan.cells[key]], jobs, Impatient()).failed
    said = "".join(file.read_text() for file in (tmp_path / "jobs").rglob("*.out"))
    assert len(told) == 1 and "Requeued" in said, "else the job was over before it was told"
    ours = results(tmp_path / "s")
    assert ours and all(results(store)[name] == content for name, content in ours.items())


# --------------------------------------------------------------------------------------------------------------- ranks


def torchrun(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_ranks_that_come_to_different_masks_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        """
import sys
from pathlib import Path
from tombola.errors import SearchError
from tombola.study import ranks
from tombola.store import Store

def work(out, same):
    (out / "ticket").mkdir()
    (out / "ticket" / "mask.safetensors").write_bytes(b"one" if same else bytes([ranks.rank()]))

store = Store(sys.argv[1])
for same, key in ((True, "a" * 32), (True, "a" * 32), (False, "b" * 32)):
    try:
        ran = ranks.together(lambda work: store.compute(key, {}, work)[1], lambda out: work(out, same))
        Path(sys.argv[2], f"{key[0]}{ranks.rank()}").open("a").write(f"{ran} ")
        ranks.wait_for_all()
    except SearchError:
        Path(sys.argv[2], f"{key[0]}{ranks.rank()}").write_text("refused")
""",
        encoding="utf-8",
    )
    ran = torchrun(str(script), str(tmp_path / "s"), str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    said = {file.name: file.read_text() for file in tmp_path.iterdir() if len(file.name) == 2}
    assert said == {"a0": "True False ", "a1": "True False ", "b0": "refused", "b1": "refused"}
    assert [entry.key for entry in Store(tmp_path / "s").entries()] == ["a" * 32]


@pytest.mark.slow
def test_a_study_under_torchrun_has_one_mask_and_says_its_ranks(tmp_path: Path, tiny_folder: Path, data_folder: Path) -> None:
    """Both ranks search; a mask that differs on one of them fails the cell (above). Rows are shared out in training."""
    file, there = study_file(tmp_path, tiny_folder), ("--store", str(tmp_path / "s"), "--data", str(data_folder))
    arguments = ("-m", "tombola", "study", "run", file, *there, "--seeds", "0", "--executor", "serial", "--set", "batch_size=8")
    ran = torchrun(*arguments, "--set", "ranks=2")
    assert ran.returncode == 0, ran.stderr
    assert "3 of 3 cells there, 3 computed now" in ran.stdout
    store = Store(tmp_path / "s")
    assert sorted(entry.step for entry in store.entries()) == ["evaluate", "fine_tune", "search"]
    (dense,) = (entry for entry in store.entries() if entry.step == "fine_tune")
    assert dense.describe["settings"]["machine"]["ranks"] == 2  # type: ignore[index,call-overload]
    assert read_json(dense.folder / "train.json")["steps"] == FAST["epochs"] * FAST["train_rows"] // (8 * 2)
    lab = lab_in(tmp_path / "s", data_folder)
    plan = plan_study(lab, read_study(file, {"seeds": [0]}, [("batch_size", 8), ("ranks", 2), ("floor", 0.5)]))
    ended = run_cells(lab, list(plan.cells.values()), Serial(lab=lab))
    assert "planned for another number of ranks" in next(iter(ended.failed.values()))


@pytest.mark.slow
def test_the_verbs_from_plan_to_page(tmp_path: Path, tiny_folder: Path, data_folder: Path) -> None:
    file = study_file(tmp_path, tiny_folder)
    there = ("--store", str(tmp_path / "s"), "--data", str(data_folder))

    def said(*arguments: str) -> tuple[int, str, str]:
        ran = command(*arguments)
        out, err = ran.communicate(timeout=240)
        return ran.returncode, out, err

    code, out, _ = said("plan", file, *there, "--json")
    plan = json.loads(out)
    assert code == 0 and (plan["asked"], plan["to_run"]) == (6, 6) and plan["estimate"]["seconds"] > 0
    one = next(cell["key"] for cell in plan["missing"] if cell["title"].startswith("search"))
    code, out, err = said("run-one", one[:10], *there)
    assert code == 0 and one[:12] in out, err
    # a floor that a dense model cannot hold more than: the search of the other seed is refused, and said
    code, out, err = said("run", file, *there, "--executor", "serial", "--set", "epochs=1", "--set", "learning_rate=1e-9")
    assert code == 1 and "so could not run: evaluate" in err and "2 of 6 cells there" in out
    code, out, _ = said("status", file, *there, "--set", "epochs=1", "--set", "learning_rate=1e-9")
    assert code == 0 and "2 done, 0 running, 2 failed, 2 to do, of 6 cells" in out and "majority line" in out
    code, out, _ = said("status", file, *there, "--json")
    counts = json.loads(out)
    assert (counts["done"], counts["to do"], counts["failed"]) == (2, 4, 0)
    code, out, err = said("report", file, *there, "--out", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "4 of the 6 cells" in page and "FLOPs by formula" in page
    code, _, err = said("plan", file, *there, "--set", "epoch=1")
    assert code == 2 and "did you mean 'epochs'" in err
