"""Faults that a review found, each kept from coming back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from tombola.anatomy import probe_inputs, read_anatomy
from tombola.canonical import fingerprint
from tombola.errors import CheckpointError, MaskError, StoreError
from tombola.gates import hold
from tombola.mask import Mask
from tombola.source import fingerprint_files
from tombola.store import Store
from tombola.study.jobs import open_lab
from tombola.study.runs import plan_find
from tombola.study.settings import resolve
from tombola.study.steps import training


def without_a_head() -> Mask:
    heads = torch.ones(2, 4, dtype=torch.bool)
    heads[0, 1] = False
    return Mask(heads=heads)


def test_gates_follow_a_model_into_half_precision() -> None:
    model = tiny_model("bert")
    hold(model, read_anatomy(model), without_a_head())
    assert model.to(torch.bfloat16)(**probe_inputs(model, batch=2)).logits.dtype == torch.bfloat16


def test_a_second_hold_leaves_the_first_as_it_was() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    kept = torch.rand(model.get_parameter(name).shape) > 0.5
    hold(model, anatomy, Mask(values={name: kept}))
    hooks, weights = len(model._forward_pre_hooks), {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(MaskError, match="holds other values"):
        hold(model, anatomy, without_a_head() & Mask(values={name: ~kept}))
    assert len(model._forward_pre_hooks) == hooks
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_config_and_vocabulary_are_part_of_a_models_files_and_weights_are_not(tmp_path: Path) -> None:
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        (tmp_path / name).write_text("1")
    before = fingerprint_files(tmp_path)
    (tmp_path / "model.safetensors").write_text("2")
    assert fingerprint_files(tmp_path) == before
    for name in ("config.json", "vocab.txt"):
        (tmp_path / name).write_text("2")
        assert fingerprint_files(tmp_path) != before
        (tmp_path / name).write_text("1")


@pytest.mark.parametrize(
    "said", ["I/O error: No space left on device (os error 28)", "PytorchStreamWriter failed: file write failed"]
)
def test_a_disk_that_a_library_says_is_full_is_explained(said: str, tmp_path: Path) -> None:
    def work(out: Path) -> None:
        raise RuntimeError(said)

    with pytest.raises(StoreError, match="the disk is full"):
        Store(tmp_path / "s").compute(fingerprint("x"), {}, work)


def test_what_a_kill_after_publishing_left_goes_when_the_cell_is_loaded(tmp_path: Path) -> None:
    store, key = Store(tmp_path / "s"), fingerprint("x")
    store.compute(key, {}, lambda out: (out / "a").write_text("1") and None)
    left = store.root / "unfinished" / key
    left.mkdir(parents=True)
    assert store.load(key) is not None
    assert not left.exists()


def test_a_checkpoint_refused_after_its_weights_were_read_starts_from_the_base(
    tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on from what a refused checkpoint left in the model, the cell would hold another result than its key says."""
    fast = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 60, "selection_rows": 40}
    settings, weights = resolve(fast, (0,)), []
    real, calls = training.fine_tune, list[int]()

    def fails_once(model: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            more["checkpoints"].mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                model.get_parameter("classifier.weight").add_(1.0)
            raise CheckpointError("a marker is gone")
        return real(model, *args, **more)

    for name, trained in (("clean", real), ("refused", fails_once)):
        monkeypatch.setattr(training, "fine_tune", trained)
        lab = open_lab(tmp_path / name, data_folder)
        (folder,) = lab.run([plan_find(lab, str(tiny_folder), "sst2", settings, (0,))[0].dense])
        weights.append((folder / "weights" / "model.safetensors").read_bytes())
    assert len(calls) == 2
    assert weights[0] == weights[1]
