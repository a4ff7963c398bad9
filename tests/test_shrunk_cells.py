"""Cells that run shrunk: evaluation of structured tickets, whose scores are those of the mask, and retraining when asked for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import Run
from tombola.anatomy import read_anatomy
from tombola.errors import MaskError, TombolaError
from tombola.gates import masked
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.store import Store
from tombola.study import runs
from tombola.study.cells import Lab, read_rows
from tombola.study.results import collect
from tombola.study.runs import Found, plan_find, plan_retrain, plan_test, plan_tuned
from tombola.study.settings import RetrainSettings, resolve
from tombola.study.steps import scoring
from tombola.study.steps.shared import ticket_of
from tombola.study.steps.training import _prepare_retraining
from tombola.tuned import fold

LABELS = ("negative", "positive")


@dataclass(frozen=True)
class World:
    lab: Lab
    data: Path
    found: Found
    tested: runs.Tested
    shrunk: Any  # the cell of retraining shrunk


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> World:
    lab = Lab(Store(tmp_path_factory.mktemp("shrunk") / "store"), data_folder)
    settings = resolve({"epochs": 4, "learning_rate": 4e-3, "batch_size": 16, "train_rows": 128, "selection_rows": 60})
    (found,) = plan_find(lab, str(tiny_folder), "sst2", settings, (0,))
    tested = plan_test(found.search, found.dense, retrain=True)
    shrunk = plan_retrain(found.search, found.dense, RetrainSettings(retrain_shrunk=True), keep_weights=True)
    lab.run([*found.cells, *tested.cells, shrunk])
    return World(lab, data_folder, found, tested, shrunk)


def test_the_score_of_a_structured_ticket_is_that_of_its_mask_row_by_row(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, ticket = world.lab, ticket_of(world.lab, world.found.search)
    assert not ticket.mask.removes_nothing
    model: Any = load_weights(lab.folder(world.found.dense) / "weights", LABELS, head_seed=0)
    anatomy = read_anatomy(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.folder(world.found.dense) / "weights")
    stored = [row for row in read_rows(lab.folder(world.tested.pruned) / "predictions.jsonl") if row["role"] == "report"]
    sentences = [json.loads(line)["sentence"] for line in (world.data / "sst2" / "validation.jsonl").read_text().splitlines()]
    with masked(model, anatomy, ticket.mask), torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in sentences])
    assert torch.allclose(torch.tensor([row["logits"] for row in stored]), logits, atol=1e-5)
    with scoring.as_small_as_it_gets(model, anatomy, ticket.mask) as small:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_what_cannot_be_cut_is_scored_with_its_mask_on(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_weights(tiny_folder, LABELS, head_seed=0)
    anatomy = read_anatomy(model)
    full = anatomy.full_mask()
    assert full.heads is not None
    heads = full.heads.clone()
    heads[0, 1] = False

    def no(*_: object, **__: object) -> None:
        raise MaskError("no")

    monkeypatch.setattr(scoring, "prove_same", no)
    with scoring.as_small_as_it_gets(model, anatomy, Mask(heads=heads)) as same:
        assert same is model and model._forward_pre_hooks
    assert not model._forward_pre_hooks
    with pytest.raises(RuntimeError, match="inside"), scoring.as_small_as_it_gets(model, anatomy, Mask(heads=heads)):
        raise RuntimeError("inside")
    values = {name: torch.rand(p.shape) > 0.5 for name, p in model.named_parameters() if "query.weight" in name}
    with scoring.as_small_as_it_gets(model, anatomy, Mask(values=values)) as same:
        assert same is model


def test_retraining_shrunk_is_a_cell_of_its_own_and_leaves_a_shrunk_model(world: World) -> None:
    assert world.tested.retrained is not None and world.shrunk.key != world.tested.retrained.key
    assert "retrain_shrunk" not in world.tested.retrained.settings["retrain"], "cells that were stored before keep their names"
    folder = world.lab.folder(world.shrunk)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "weights")
    assert type(model).__name__ == "ShrunkBertForSequenceClassification"
    size = ticket_of(world.lab, world.found.search)
    dense = load_weights(world.lab.folder(world.found.dense) / "weights", LABELS, head_seed=0)
    gone = sum(int((~part).sum()) for part in read_anatomy(dense).as_values(size.mask).values())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dense.parameters()) - gone
    assert {row["stage"] for row in read_rows(folder / "scores.jsonl")} == {"retrained"}


def test_single_values_cannot_be_trained_shrunk(world: World, tiny_folder: Path) -> None:
    from dataclasses import replace

    model: Any = load_weights(tiny_folder, LABELS, head_seed=0)
    anatomy = read_anatomy(model)
    ticket = ticket_of(world.lab, world.found.search)
    values = {name: torch.rand(p.shape) > 0.5 for name, p in model.named_parameters() if "query.weight" in name}
    with pytest.raises(TombolaError, match="cannot be trained shrunk"):
        _prepare_retraining(world.shrunk, world.lab, model, anatomy, replace(ticket, mask=Mask(values=values)))


# mask tuning


def test_a_tuned_ticket_is_a_cell_whose_scores_are_those_of_the_folded_model(world: World, tmp_path: Path, run: Run) -> None:
    lab, found = world.lab, world.found
    cell = plan_tuned(found.search, found.dense)
    lab.run([cell])
    factors = load_file(lab.folder(cell) / "factors.safetensors")
    said = json.loads((lab.folder(cell) / "result.json").read_text())["tuning"]
    assert said["loss"][1] <= said["loss"][0] and (factors or said["left"])
    model: Any = load_weights(lab.folder(found.dense) / "weights", LABELS, head_seed=0)
    anatomy, ticket = read_anatomy(model), ticket_of(lab, found.search)
    fold(model, factors)
    stored = [row for row in read_rows(lab.folder(cell) / "predictions.jsonl") if row["role"] == "report"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.folder(found.dense) / "weights")
    sentences = [json.loads(line)["sentence"] for line in (world.data / "sst2" / "validation.jsonl").read_text().splitlines()]
    with masked(model, anatomy, ticket.mask), torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in sentences])
    assert torch.allclose(torch.tensor([row["logits"] for row in stored]), logits, atol=1e-4)
    # shipped: the tuned model, in a card that has what the store knows of the ticket
    given = ["ship", found.search.key[:12], tmp_path / "out", "--store", lab.store.root, "--data", world.data]
    code, _, err = run(*given, "--tune-masks")
    assert code == 0, err
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        shipped = torch.cat([back(**tokenizer(text, return_tensors="pt")).logits for text in sentences])
    assert torch.allclose(shipped, logits, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| full | validation | accuracy |" in card and "| pruned | validation | accuracy |" in card and " to " in card
    code, _, err = run(*given[:2], tmp_path / "bad", *given[3:], "--tune-masks", "--weights", "base")
    assert code == 2 and "tuned" in err and not (tmp_path / "bad").exists()
    # and never averaged with what is not tuned
    rows = [row for row in collect(lab.store).scores if row.kind == "good" and row.stage == "pruned" and row.role == "report"]
    assert len(rows) == 2 and len({row.task for row in rows}) == 2 and any("mask_tuning=True" in row.task for row in rows)
