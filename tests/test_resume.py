"""A run that was interrupted, by an error or by kill -9, ends as if it had never been: bit for bit, or it says why not."""

import copy
import inspect
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import tiny_model
from test_train import SEEDS, N, random_rows, rows_seen, same_weights
from tombola import checkpoint
from tombola.anatomy import read_anatomy
from tombola.errors import CheckpointError, StoreError, TombolaError
from tombola.gates import hold
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.store import Store
from tombola.train import TrainLog, TrainSettings, fine_tune

HOW = TrainSettings(learning_rate=1e-3, epochs=3, batch_size=2, warmup_steps=3, weight_decay=0.1)  # 45 steps, a log every 2
SHORT = TrainSettings(learning_rate=1e-3, epochs=3, batch_size=8)  # 12 steps, a log each


class Interrupted(Exception):
    pass


def interrupted(step: int, steps: int) -> Callable[[float], None]:
    """For `progress`: raises at the end of a step, before anything of that step is saved."""

    def told(share: float) -> None:
        if round(share * steps) >= step:
            raise Interrupted

    return told


def stopped_at(step: int, folder: Path, start: Any, how: TrainSettings, every_seconds: float = 0.0) -> None:
    steps = -(-N // how.batch_size) * how.epochs
    with pytest.raises(Interrupted):
        fine_tune(
            copy.deepcopy(start), random_rows(), how, SEEDS,
            checkpoints=folder, every_seconds=every_seconds, progress=interrupted(step, steps),
        )  # fmt: skip


def resumed(folder: Path, start: Any, how: TrainSettings = SHORT) -> tuple[Any, TrainLog]:
    model = copy.deepcopy(start)
    return model, fine_tune(model, random_rows(), how, SEEDS, checkpoints=folder, every_seconds=0.0)


@pytest.fixture(scope="module")
def start() -> Any:
    """A model with dropout."""
    model = tiny_model("bert")
    assert model.config.hidden_dropout_prob > 0
    return model


@pytest.fixture(scope="module")
def whole(start: Any) -> tuple[Any, TrainLog]:
    """The run of HOW that nothing interrupts and that keeps no checkpoints."""
    model = copy.deepcopy(start)
    return model, fine_tune(model, random_rows(), HOW, SEEDS)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, start: Any) -> Path:
    stopped_at(7, folder := tmp_path_factory.mktemp("half"), start, SHORT)
    return folder


@pytest.fixture
def half(halves: Path, tmp_path: Path) -> Path:
    """The checkpoints of a run of SHORT that was interrupted in its second epoch."""
    return shutil.copytree(halves, tmp_path / "half")


# ------------------------------------------------------------------------------------------------------- the same bits


def quick_and_slow(quick: tuple[Any, ...], slow: tuple[Any, ...]) -> list[Any]:
    return [*quick, *(pytest.param(one, marks=pytest.mark.slow) for one in slow)]


@pytest.mark.parametrize("step", quick_and_slow((16, 32), (1, 3, 14, 15, 17, 24, 30, 31, 45)))  # saves: at even ones
def test_run_stopped_at_any_step_ends_with_the_same_bits(
    step: int, tmp_path: Path, start: Any, whole: tuple[Any, TrainLog]
) -> None:
    stopped_at(step, tmp_path / "c", start, HOW)
    kept = sorted(path.name for path in (tmp_path / "c").glob("checkpoint-*"))
    assert kept == ([] if step < 3 else [f"checkpoint-{(step - 1) // 2 * 2}"])
    with rows_seen(model := copy.deepcopy(start), random_rows()) as seen:
        log = fine_tune(model, random_rows(), HOW, SEEDS, checkpoints=tmp_path / "c", every_seconds=0.0)
    assert len(seen) == 45 - (step - 1) // 2 * 2, "it went on from the last log, and not from the start"
    assert same_weights(model, whole[0])
    assert log == whole[1]


def test_run_stopped_again_and_again_ends_with_the_same_bits(tmp_path: Path, start: Any, whole: tuple[Any, TrainLog]) -> None:
    for step in (5, 18, 44):
        stopped_at(step, tmp_path / "c", start, HOW)
    model, log = resumed(tmp_path / "c", start, HOW)
    assert same_weights(model, whole[0])
    assert log == whole[1]
    with rows_seen(again := copy.deepcopy(start), random_rows()) as seen:  # killed after the training, before it was of use
        log = fine_tune(again, random_rows(), HOW, SEEDS, checkpoints=tmp_path / "c")
    assert len(seen) == 1, "the last log is at step 44"
    assert same_weights(again, whole[0])
    assert log == whole[1]


def test_checkpoints_alone_change_nothing(tmp_path: Path, start: Any, whole: tuple[Any, TrainLog]) -> None:
    model, log = resumed(tmp_path / "c", start, HOW)
    assert same_weights(model, whole[0])
    assert log == whole[1]


def test_dropout_plays_a_part_in_these_runs(start: Any, whole: tuple[Any, TrainLog]) -> None:
    other = copy.deepcopy(start)
    fine_tune(other, random_rows(), HOW, replace(SEEDS, dropout=99))
    assert not same_weights(other, whole[0])


@pytest.mark.slow
def test_every_family_resumes(family: str, tmp_path: Path) -> None:
    start, rows = tiny_model(family), random_rows(N, family)
    straight, model = copy.deepcopy(start), copy.deepcopy(start)
    expected = fine_tune(straight, rows, SHORT, SEEDS)
    run = partial(fine_tune, train=rows, settings=SHORT, seeds=SEEDS, checkpoints=tmp_path / "c", every_seconds=0.0)
    with pytest.raises(Interrupted):
        run(copy.deepcopy(start), progress=interrupted(6, 12))
    assert run(model) == expected
    assert same_weights(model, straight)


def test_weights_of_old_names_are_not_lost_on_the_way(tiny_folder: Path, tmp_path: Path) -> None:
    """The names of 2018 (LayerNorm.gamma): `save_pretrained` gives them back, and Trainer passes over what it cannot load."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    shutil.copytree(tiny_folder, tmp_path / "old")
    weights = load_file(tiny_folder / "model.safetensors")
    for new, name in old.items():
        weights = {key.replace(new, name): value for key, value in weights.items()}
    assert any("gamma" in name for name in weights)
    save_file(weights, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})

    def load() -> Any:
        return load_weights(tmp_path / "old", ("no", "yes"), head_seed=0)

    rows = random_rows()
    rows = replace(rows, inputs=tuple({"input_ids": tuple(t % 25 for t in row["input_ids"])} for row in rows.inputs))
    straight, model = load(), load()
    expected = fine_tune(straight, rows, SHORT, SEEDS)
    with pytest.raises(Interrupted):
        fine_tune(load(), rows, SHORT, SEEDS, checkpoints=tmp_path / "c", every_seconds=0.0, progress=interrupted(6, 12))
    assert fine_tune(model, rows, SHORT, SEEDS, checkpoints=tmp_path / "c", every_seconds=0.0) == expected
    assert same_weights(model, straight)


def test_held_values_are_zero_after_a_resume_and_the_others_the_same(tmp_path: Path) -> None:
    heads, mlps = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool(), torch.tensor([True, False])

    def held() -> Any:
        model = tiny_model("bert")
        hold(model, read_anatomy(model), Mask(heads=heads, mlps=mlps))
        return model

    rows, straight, model = random_rows(), held(), held()
    expected = fine_tune(straight, rows, SHORT, SEEDS)
    with pytest.raises(Interrupted):
        fine_tune(held(), rows, SHORT, SEEDS, checkpoints=tmp_path / "c", every_seconds=0.0, progress=interrupted(7, 12))
    assert fine_tune(model, rows, SHORT, SEEDS, checkpoints=tmp_path / "c", every_seconds=0.0) == expected
    assert same_weights(model, straight)
    for layer, kept, mlp in zip(read_anatomy(model).layers, heads, mlps, strict=True):
        gone = (~kept).repeat_interleave(layer.attention.d_head)
        assert gone.any()
        assert not model.get_submodule(layer.attention.o.path).weight[:, gone].any()
        assert bool(model.get_submodule(layer.mlp.out.path).weight.any()) == bool(mlp)


def test_config_is_that_of_any_training_even_when_killed_after_the_last_step(tmp_path: Path, start: Any) -> None:
    """transformers writes into it in the first forward pass: a resume that made none would store another config.json."""
    straight = copy.deepcopy(start)
    fine_tune(straight, random_rows(), SHORT, SEEDS)
    assert straight.config.to_dict() != start.config.to_dict()
    for _ in range(2):  # the second goes on from what the first left
        model, _ = resumed(tmp_path / "c", start)
        assert model.config.to_dict() == straight.config.to_dict()
        assert same_weights(model, straight)


def test_callers_random_state_is_left_alone_by_a_resume(half: Path, start: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    resumed(half, start)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------- what is kept, and when


def test_there_is_never_a_pile_of_checkpoints_nor_none(tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, remove, seen = checkpoint.seal, checkpoint._discard, []

    def marked() -> int:
        return sum((one / "tombola.json").exists() for one in (tmp_path / "c").iterdir())

    def removed(path: Path) -> None:
        assert marked() == 2, "an older one goes when a newer one is marked"
        remove(path)

    def watched(path: Path, run: Any, *ours: Any) -> None:
        before = (len([*path.parent.iterdir()]), marked())
        real(path, run, *ours)
        seen.append((*before, [*path.parent.iterdir()] == [path]))

    monkeypatch.setattr(checkpoint, "seal", watched)
    monkeypatch.setattr(checkpoint, "_discard", removed)
    resumed(tmp_path / "c", start)
    assert seen == [(1, 0, True)] + [(2, 1, True)] * 10


def test_marker_vouches_for_every_file(half: Path) -> None:
    (folder,) = half.iterdir()
    marker = json.loads((folder / "tombola.json").read_text())
    assert (marker["format"], marker["step"]) == (1, 6)
    assert marker["files"].keys() == {path.name for path in folder.iterdir()} - {"tombola.json"}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= marker["files"].keys()
    for name, said in marker["files"].items():
        out = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout
        assert (said["sha256"], said["bytes"]) == (out.split()[0], (folder / name).stat().st_size)
    assert marker["run"]["settings"]["epochs"] == 3 and marker["run"]["seeds"]["dropout"] == SEEDS.dropout
    assert marker["run"]["versions"]["torch"] == version("torch")


def test_a_save_is_due_when_the_seconds_have_passed(tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, saved, real = iter(range(0, 10_000, 10)), [], checkpoint.seal  # 10 s between any two looks at the clock
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(checkpoint, "seal", lambda path, *how: (saved.append(int(path.name[11:])), real(path, *how)))
    fine_tune(copy.deepcopy(start), random_rows(), SHORT, SEEDS, checkpoints=tmp_path / "c", every_seconds=30.0)
    assert saved == [3, 6, 9]  # looked at once at each log, and once at each save; 12 is the last step
    monkeypatch.undo()
    fine_tune(copy.deepcopy(start), random_rows(), SHORT, SEEDS, checkpoints=tmp_path / "d")
    assert list((tmp_path / "d").iterdir()) == []  # 60 s are more than this takes


def test_rows_already_trained_on_are_not_read_again(half: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tombola import order

    real, read = order.collate, []
    monkeypatch.setattr(
        order, "collate", lambda rows, numbers, **more: (read.append(len(numbers)), real(rows, numbers, **more))[1]
    )
    resumed(half, start)
    assert len(read) == 6


# -------------------------------------------------------------------------------------------- what is not gone on from


def refused(half: Path, start: Any, match: str, **changes: Any) -> TombolaError:
    """The error of going on; nothing may have been touched."""
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    arguments = {"model": copy.deepcopy(start), "train": random_rows(), "settings": SHORT, "seeds": SEEDS} | changes
    with pytest.raises(TombolaError, match=match) as caught:
        fine_tune(**arguments, checkpoints=half)
    assert {path: path.read_bytes() for path in half.rglob("*") if path.is_file()} == before
    assert same_weights(arguments["model"], changes.get("model", start))
    return caught.value


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_checkpoint_is_refused_by_name(half: Path, start: Any, file: str, damage: str) -> None:
    path = half / "checkpoint-6" / file
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:middle])
    else:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    error = refused(half, start, "checkpoint-6 is damaged")
    said = {"missing": "missing", "truncated": f"changed: {len(content) // 2} bytes", "flipped": "changed: sha256"}[damage]
    assert str(error.got).startswith(f"{file}: {said}")
    assert error.next == f"remove {half} to start anew"


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "one setting": ({"settings": replace(SHORT, learning_rate=2e-3)}, "settings.learning_rate: 0.001 → 0.002"),
    "three": (
        {"settings": replace(SHORT, epochs=4, clip_norm=0.5), "seeds": replace(SEEDS, dropout=9)},
        "seeds.dropout: 3 → 9; settings.clip_norm: 1.0 → 0.5; settings.epochs: 3 → 4",
    ),
    "order": ({"seeds": replace(SEEDS, data=8)}, "seeds.data: 2 → 8"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_run_with_other_settings_is_refused_naming_each(half: Path, start: Any, what: str) -> None:
    changes, said = CHANGES[what]
    error = refused(half, start, "are of another run", **changes)
    assert error.got == said
    assert f"or remove {half} to start anew" in str(error.next)


def test_run_on_other_rows_or_other_weights_is_refused(half: Path, start: Any) -> None:
    rows = random_rows()
    for other in (
        replace(rows, labels=(1 - rows.labels[0], *rows.labels[1:])),
        replace(rows, inputs=({"input_ids": (5, 6)}, *rows.inputs[1:])),
        replace(rows, ids=("other", *rows.ids[1:])),
    ):
        assert str(refused(half, start, "another run", train=other).got).startswith("rows: ")
    moved = copy.deepcopy(start)
    with torch.no_grad():
        moved.classifier.bias[0] += 1e-6
    assert str(refused(half, start, "another run", model=moved).got).startswith("starting weights: ")


def test_run_with_other_threads_or_versions_is_refused(half: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tombola import train

    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        assert refused(half, start, "another run").got == f"threads: {threads} → 77"
    with monkeypatch.context() as patch:
        patch.setattr(train, "version", lambda name: "9.9")
        got = refused(half, start, "another run").got
        assert f"versions.torch: {version('torch')} → 9.9" in str(got) and "versions.transformers" in str(got)
    resumed(half, start)


def test_marker_of_a_newer_format_or_of_nonsense_is_refused(half: Path, start: Any) -> None:
    marker = half / "checkpoint-6" / "tombola.json"
    said = json.loads(marker.read_text())
    marker.write_text(json.dumps(said | {"format": 2}))
    error = refused(half, start, "cannot be read by this tombola")
    assert (error.got, error.expected) == ("tombola.json with format 2", "format 1")
    for nonsense in ("", "[]", '{"format": 1}', json.dumps(said | {"files": ["a"]}), json.dumps(said)[:-40]):
        marker.write_text(nonsense)
        assert str(marker) in str(refused(half, start, "cannot be read"))


def test_checkpoint_without_marker_is_removed_and_the_one_before_is_used(half: Path, start: Any) -> None:
    straight = copy.deepcopy(start)
    expected = fine_tune(straight, random_rows(), SHORT, SEEDS)
    shutil.copytree(half / "checkpoint-6", half / "checkpoint-9")
    (half / "checkpoint-9" / "tombola.json").rename(half / "checkpoint-9" / "tombola.json.draft")  # killed inside the marking
    shutil.copytree(half / "checkpoint-6", half / "checkpoint-3")  # marked, but not yet removed
    (half / "checkpoint-3" / "optimizer.pt").unlink()
    (half / "checkpoint-7").mkdir()
    (half / "notes").mkdir()  # none of our business
    model, log = resumed(half, start)
    assert same_weights(model, straight)
    assert log == expected
    assert sorted(path.name for path in half.iterdir()) == ["checkpoint-11", "notes"]


@pytest.mark.parametrize("file", ["config.json", "training_args.bin"])
def test_somebody_elses_checkpoints_are_refused_and_left(tmp_path: Path, start: Any, file: str) -> None:
    (tmp_path / "c" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "c" / "checkpoint-500" / file).write_text("{}")
    assert refused(tmp_path / "c", start, "not of tombola").got == "checkpoint-500"


def test_checkpoint_removed_while_it_is_read_is_not_half_read(half: Path, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that lost its lock while it was stopped, say. Trainer goes on without an optimizer that is not there."""
    import transformers

    real = transformers.Trainer._load_from_checkpoint

    def removed(self: Any, folder: str, *rest: Any) -> None:
        real(self, folder, *rest)
        checkpoint._discard(Path(folder))
        Path(folder).mkdir()
        (Path(folder) / "trainer_state.json").write_text(state)

    state = (half / "checkpoint-6" / "trainer_state.json").read_text()
    monkeypatch.setattr(transformers.Trainer, "_load_from_checkpoint", removed)
    with pytest.raises(TombolaError, match="was removed while it was being read"):
        resumed(half, start)


@pytest.mark.parametrize("asked", [1, 2], ids=["stalled before a save", "stalled inside a save"])
def test_process_that_lost_its_lock_does_not_touch_what_its_successor_saved(
    tmp_path: Path, start: Any, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """The lock changes hands just before our `asked`-th look at it; the successor has saved step 500 by then."""
    key, store, looks, before = "a" * 32, Store(tmp_path / "store"), list[object](), dict[Path, bytes]()
    folder = store.root / "unfinished" / key / "training"

    def saved() -> dict[Path, bytes]:
        marked = [marker.parent for marker in folder.glob("*/tombola.json")]
        return {path: path.read_bytes() for one in marked for path in one.iterdir()}

    def ours() -> None:
        looks.append(None)
        if len(looks) == asked + 4:  # two looks a save: the first two saves are sealed
            owner = store.root / "locks" / key / "owner.json"
            owner.write_text(json.dumps(json.loads(owner.read_text()) | {"pid": 1, "started": "1", "attempt": "another"}))
            (newest,) = [marker.parent for marker in folder.glob("*/tombola.json")]
            newest.rename(folder / "checkpoint-500")
            before.update(saved())
        store.scratch(key)

    def work(out: Path) -> None:
        store.scratch(key)
        fine_tune(copy.deepcopy(start), random_rows(), SHORT, SEEDS, checkpoints=folder, every_seconds=0.0, ours=ours)

    with pytest.raises(StoreError, match="belongs to whoever computes it"):
        store.compute(key, {}, work)
    assert len(before) > 5 and saved() == before
    assert len(looks) == asked + 4, "it stops at once"


def test_cell_that_lost_its_lock_while_it_started_anew_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cell cannot go on from it removes, but only while that is its own."""
    from types import SimpleNamespace

    from tombola.study.steps import training

    key, store = "b" * 32, Store(tmp_path / "store")

    def lost(*_: Any) -> None:
        (theirs := store.root / "unfinished" / key / "training").mkdir()
        (theirs / "checkpoint-9").mkdir()
        owner = store.root / "locks" / key / "owner.json"
        owner.write_text(json.dumps(json.loads(owner.read_text()) | {"pid": 1, "started": "1"}))
        raise CheckpointError("removed while it was being read")

    monkeypatch.setattr(training, "_trained", lost)
    monkeypatch.setattr(training, "same_data", lambda *_: None)
    monkeypatch.setattr(training, "taken_ticket", lambda *_: None)
    monkeypatch.setattr(training, "resumable", inspect.unwrap(training.resumable))
    cell: Any = SimpleNamespace(key=key, settings={}, inputs={})
    lab: Any = SimpleNamespace(store=store, reporter=SimpleNamespace(say=lambda _: None))
    bare = inspect.unwrap(training.run_training)  # not asking for a real Cell and Lab
    with pytest.raises(StoreError, match="belongs to whoever computes it"):
        store.compute(key, {}, lambda out: bare(cell, lab, out, lambda share: None))
    assert (store.root / "unfinished" / key / "training" / "checkpoint-9").is_dir()


# ------------------------------------------------------------------------------------------------------------- kill -9

# Starting Python and torch takes seconds, so one process has imported everything and forks for each run. A run counts the
# changes it makes below its store, and kills itself just before the n-th; or in the middle of the n-th, if that writes.
FORKING = """
import json, os, signal, sys, time
from pathlib import Path
import safetensors.torch, torch
import tombola
from transformers import BertForSequenceClassification, Trainer, TrainingArguments  # lazily loaded: now, once
from tombola.store import Store
from tombola.study import cells
from tombola.study.steps import training
torch.set_num_threads(1)

def child(store, model, data, settings, log, at, torn):
    events = []

    def event(name, path):
        if not str(path).startswith(store):
            return False
        events.append(f"{name} {os.path.relpath(path, store)}")
        if at is not None and len(events) > at and not torn:
            os.kill(os.getpid(), signal.SIGKILL)
        return at is not None and len(events) > at

    def audit(name, arguments):
        if name == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            event("write", arguments[0])
        elif name == "os.rename":
            event(name, arguments[1])
        elif name in ("os.mkdir", "os.remove", "os.rmdir") and isinstance(arguments[0], (str, Path)):
            inside = f"/proc/self/fd/{arguments[-1]}"  # within rmtree names are relative to an open folder
            event(name, arguments[0] if arguments[-1] == -1 else os.path.join(os.readlink(inside), arguments[0]))

    def writes(module, name, place):
        real = getattr(module, name)

        def watched(*arguments, **named):
            die = event(name, arguments[place])
            result = real(*arguments, **named)
            if die and torn:
                os.truncate(arguments[place], os.path.getsize(arguments[place]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, watched)

    sync = os.fsync

    def fsync(handle):
        event("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    os.fsync = fsync
    writes(torch, "save", 1)
    writes(safetensors.torch, "save_model", 1)
    writes(safetensors.torch, "save_file", 1)
    sys.addaudithook(audit)
    trained, real = [], training.fine_tune

    def counted(*arguments, progress, **named):
        return real(*arguments, progress=lambda share: (trained.append(share), progress(share)), **named)

    training.fine_tune = counted
    lab = cells.Lab(Store(store, on_message=lambda message: None), Path(data))
    lab.checkpoint_seconds = 0.0  # a save at every log
    (ticket,) = tombola.find(model, "sst2", lab=lab, **settings)
    Path(log).write_text(json.dumps({"events": events, "steps": len(trained), "ticket": ticket.identity}))

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    seconds = order.pop("seconds")
    pid = os.fork()
    if pid == 0:
        try:
            child(**order)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    until = time.monotonic() + (seconds or 100)
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
        time.sleep(0.002)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
    print(done[1], flush=True)
"""
SETTINGS = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 60}
STEPS = 40


class World:
    """Runs `find` in a process of its own, to its end or to its kill."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data, self.n = folder, model, data, 0
        command = [sys.executable, "-c", FORKING]
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=self.errors, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n", (folder / "errors").read_text()
        self.store = self.new()
        self.whole = self.run(self.store)
        assert self.whole is not None and self.whole["steps"] == STEPS
        self.cells = cells_of(self.store)

    def new(self) -> Path:
        self.n += 1
        return self.folder / f"store-{self.n}"

    def run(self, store: Path, at: int | None = None, torn: bool = False, seconds: float | None = None) -> Any:
        """What it made of itself; None when it was killed. Raises AssertionError when it failed."""
        log = self.folder / "log.json"
        log.unlink(missing_ok=True)
        order = {"store": str(store), "model": str(self.model), "data": str(self.data), "settings": SETTINGS, "log": str(log)}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order | {"at": at, "torn": torn, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), (self.folder / "errors").read_text()
        return json.loads(log.read_text()) if status == 0 else None

    def survives(self, *kills: dict[str, Any]) -> int:
        """Kills a run again and again and then gives the command once more; returns the steps that were trained by that."""
        store = self.new()
        for kill in kills:
            assert self.run(store, **kill) is None or "seconds" in kill, "it was not killed"
            if (store / "store.json").exists():
                said: list[str] = []
                half = Store(store, on_message=said.append)
                assert half.verify() == []
                assert [entry.key for entry in half.entries()] == sorted(path.name for path in (store / "cells").glob("*"))
                assert said == [], "something in cells/ is not finished"
        again = self.run(store)
        assert cells_of(store) == self.cells
        assert again["ticket"] == self.whole["ticket"]
        Store(store, stale_after=1e-9).gc(dry_run=False)
        assert [path for name in ("tmp", "locks", "unfinished", "damaged") for path in (store / name).glob("*")] == []
        shutil.rmtree(store)
        return int(again["steps"])

    def left_to_train(self, at: int) -> int:
        """How many steps a run killed just before change `at` has still to make: those after its last sealed checkpoint."""
        done = self.whole["events"][:at]
        if any(line.startswith("os.rename cells/") for line in done):
            return 0
        sealed = [line for line in done if line.startswith("os.rename unfinished/") and line.endswith("/tombola.json")]
        return STEPS - (int(Path(sealed[-1]).parent.name[11:]) if sealed else 0)


def cells_of(store: Path) -> dict[str, bytes]:
    """All that is finished, without when and by whom; done.json is about these files and was verified."""
    assert Store(store).verify() == []
    files = {path.relative_to(store / "cells").as_posix(): path for path in (store / "cells").rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name not in ("provenance.json", "done.json")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("kills"), tiny_folder, data_folder)
    yield made
    assert made.process.stdin is not None
    assert made.process.stdout is not None
    made.process.stdin.close()
    made.process.wait(timeout=30)
    made.process.stdout.close()
    made.errors.close()


# name of the moment → (how its line in the order of changes starts and ends, whether the file is left torn)
MOMENTS: dict[str, tuple[str, str, bool]] = {
    "making the store": ("write store.json", "", False),
    "before the first checkpoint": ("os.mkdir unfinished/", "/checkpoint-2", False),
    "inside the first model": ("save_model unfinished/", "/checkpoint-2/model.safetensors", True),
    "before the first marker": ("os.rename unfinished/", "/checkpoint-2/tombola.json", False),
    "inside a model": ("save_model unfinished/", "/checkpoint-4/model.safetensors", True),
    "after a model": ("save unfinished/", "/checkpoint-4/optimizer.pt", False),
    "inside an optimizer": ("save unfinished/", "/checkpoint-4/optimizer.pt", True),
    "before a schedule": ("save unfinished/", "/checkpoint-4/scheduler.pt", False),
    "inside a random state": ("save unfinished/", "/checkpoint-4/rng_state.pth", True),
    "before a state": ("write unfinished/", "/checkpoint-4/trainer_state.json", False),
    "inside the syncing": ("fsync unfinished/", "/checkpoint-24/optimizer.pt", False),
    "before a marker is written": ("write unfinished/", "/checkpoint-24/tombola.json.draft", False),
    "before a marker is in place": ("os.rename unfinished/", "/checkpoint-24/tombola.json", False),
    "after a marker": ("fsync unfinished/", "/checkpoint-24", False),
    "before an older one goes": ("os.remove unfinished/", "/checkpoint-22/tombola.json", False),
    "while an older one goes": ("os.remove unfinished/", "/checkpoint-22/optimizer.pt", False),
    "before the folder of an older one goes": ("os.rmdir unfinished/", "/checkpoint-22", False),
    "after the last checkpoint": ("write tmp/", "/cell/scores.jsonl", False),
    "before the publishing": ("os.rename cells/", "", False),
    "before the unfinished work goes": ("os.rename tmp/", "/gone.unfinished", False),
    "while the unfinished work goes": ("os.remove tmp/", "/checkpoint-38/optimizer.pt", False),
    "inside the search": ("os.rename tmp/", "/cell/ticket/ticket.json", False),
    "at the very last change": ("", "", False),
}
QUICK = ("inside an optimizer", "before a marker is in place", "before the unfinished work goes")


@pytest.mark.parametrize("moment", quick_and_slow(QUICK, tuple(name for name in MOMENTS if name not in QUICK)))
def test_kill_at_any_moment_ends_with_the_same_bits(world: World, moment: str) -> None:
    starts, ends, torn = MOMENTS[moment]
    at = [n for n, line in enumerate(world.whole["events"]) if line.startswith(starts) and line.endswith(ends)]
    chosen = at[0] if starts else at[-1]
    assert world.survives({"at": chosen, "torn": torn}) == world.left_to_train(chosen)


def test_run_killed_again_and_again_ends_with_the_same_bits(world: World) -> None:
    kills: list[dict[str, Any]] = [{"at": 150}, {"at": 90}, {"at": 70, "torn": True}]
    assert world.survives(*kills) < world.left_to_train(150), "every run went on from the one before"


@pytest.mark.slow
@pytest.mark.parametrize("share", [n / 12 for n in range(12)])
def test_kill_at_a_twelfth_of_all_changes_ends_with_the_same_bits(world: World, share: float) -> None:
    at = int(share * len(world.whole["events"]))
    assert world.survives({"at": at}) == world.left_to_train(at)


@pytest.mark.parametrize("seconds", quick_and_slow((0.9,), (0.05, 0.3, 0.5, 0.7, 1.1, 1.3, 1.5, 2.0)))
def test_kill_from_outside_ends_with_the_same_bits(world: World, seconds: float) -> None:
    world.survives({"seconds": seconds})


def test_runs_compared_have_something_to_compare(world: World) -> None:
    names = {name.partition("/")[2] for name in world.cells}
    assert {"weights/model.safetensors", "train.json", "scores.jsonl", "ticket/mask.safetensors", "steps.safetensors"} <= names
