"""Losses against a bias and learned masks as cells, end to end on a tiny model: what is trained, on what, and what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tombola.bias import BIAS_MODELS
from tombola.errors import DataError, SettingsError, TombolaError
from tombola.losses import LossSettings
from tombola.study.cells import Lab, read_json
from tombola.study.data import same_data
from tombola.study.jobs import find, open_lab
from tombola.study.runs import Found, plan_find, plan_retrain
from tombola.study.settings import resolve
from tombola.study.steps.losses import loss_of, read_bias

TASK = "nli-overlap:train_rows=240,report_rows=60,challenge_rows=60"
FAST = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 40, "max_length": 24}
MASK = {"sparsity": 0.5, "mask_epochs": 1, "mask_learning_rate": 1e-2, "bias_model": "nli-overlap"}


def planned(lab: Lab, folder: Path, **more: Any) -> Found:
    (found,) = plan_find(lab, str(folder), TASK, resolve({**FAST, **MASK, **more}, method="learned"), (0,))
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return open_lab(tmp_path_factory.mktemp("robust") / "store")


def test_a_mask_learned_against_a_bias_is_a_ticket_like_any_other(lab: Lab, tiny_folder: Path) -> None:
    found = planned(lab, tiny_folder, mask_loss="poe")
    lab.run(list(found.cells))
    assert found.search.inputs.keys() == {"model", "bias"} and found.dense.inputs == {}, "the dense model knows of no bias"
    result = read_json(lab.folder(found.search) / "result.json")
    assert result["train"]["steps"] == 10
    ticket = tombola_ticket(lab, found)
    for part in ticket.mask.values.values():
        assert part.numel() - int(part.sum()) == round(0.5 * part.numel())
    assert ticket.settings["search"]["mask_loss"] == "poe" and ticket.scope == "liu2022"


def tombola_ticket(lab: Lab, found: Found) -> Any:
    from tombola.study.steps.shared import ticket_of

    return ticket_of(lab, found.search)


def test_bias_predictions_are_of_every_train_row_and_one_cell_serves_all_seeds(lab: Lab, tiny_folder: Path) -> None:
    settings = resolve({**FAST, **MASK, "mask_loss": "poe"}, (0, 1), method="learned")
    one, two = plan_find(lab, str(tiny_folder), TASK, settings, (0, 1))
    assert one.search.inputs["bias"].key == two.search.inputs["bias"].key and one.dense.key != two.dense.key
    bias = one.search.inputs["bias"]
    lab.run([bias])
    data, found = same_data(one.dense, lab), read_bias(lab.folder(bias))
    assert found.ids == data.train.ids and found.classes == data.task.labels
    said = read_json(lab.folder(bias) / "result.json")
    answers = found.log_probabilities.argmax(1).tolist()
    assert said["accuracy"] == pytest.approx(sum(map(int.__eq__, answers, data.train.labels)) / len(answers))
    assert said["accuracy"] > said["majority"] + 0.1 and said["warnings"] == [], "the planted shortcut is found"


def test_cells_without_another_loss_keep_the_names_they_had(lab: Lab, tiny_folder: Path) -> None:
    (of_s_prune,) = plan_find(lab, str(tiny_folder), TASK, resolve(FAST), (0,))
    found = planned(lab, tiny_folder, mask_loss="poe")
    assert found.dense.key == of_s_prune.dense.key and "loss" not in found.dense.settings
    assert "loss" not in planned(lab, tiny_folder).search.settings


@pytest.mark.parametrize("loss", ["poe", "reweight", "conf-reg"])
def test_a_dense_model_trained_against_a_bias_is_another_and_its_tickets_are_retrained_as_it_was(
    lab: Lab, tiny_folder: Path, loss: str
) -> None:
    found, plain = planned(lab, tiny_folder, loss=loss), planned(lab, tiny_folder)
    assert found.dense.key != plain.dense.key
    assert found.dense.inputs.keys() == ({"bias", "teacher"} if loss == "conf-reg" else {"bias"})
    if loss == "conf-reg":
        assert found.dense.inputs["teacher"].key == plain.dense.key, "the teacher is the model trained without"
    again = plan_retrain(found.search, found.dense)
    assert again.settings["loss"] == found.dense.settings["loss"] and again.inputs["bias"] == found.dense.inputs["bias"]
    other = plan_retrain(plain.search, plain.dense, loss=LossSettings(loss=loss, bias_model="nli-overlap"))
    assert (
        other.settings["loss"] == found.dense.settings["loss"] and "loss" not in plan_retrain(plain.search, plain.dense).settings
    )
    lab.run([found.dense, plain.dense])
    weights = [read_json(lab.folder(one.dense) / "train.json")["weights_fingerprint"] for one in (found, plain)]
    assert weights[0] != weights[1]


def test_the_loss_of_a_cell_is_that_of_the_rows_it_is_given(lab: Lab, tiny_folder: Path) -> None:
    found = planned(lab, tiny_folder, loss="poe")
    lab.run([found.dense.inputs["bias"]])
    data = same_data(found.dense, lab)
    recipe = loss_of(found.dense, lab, data)
    assert recipe is not None and recipe.loss is not None and recipe.said["bias"] == found.dense.inputs["bias"].key
    bias = read_bias(lab.folder(found.dense.inputs["bias"])).log_probabilities
    torch.manual_seed(0)
    rows, logits = torch.tensor([7, 3, 11]), torch.randn(3, bias.shape[1])
    labels = torch.tensor([data.train.labels[i] for i in rows])
    wanted = torch.nn.functional.cross_entropy(logits.log_softmax(-1) + bias[rows], labels)
    assert recipe.loss(logits, labels, rows, 0.0).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_what_cannot_be_trained_against_a_bias_is_refused(lab: Lab, tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs a bias_model") as error:
        planned(lab, tiny_folder, mask_loss="poe", bias_model=None)
    assert all(name in str(error.value) for name in BIAS_MODELS)
    with pytest.raises(SettingsError):
        resolve({"mask_loss": "pie"}, method="learned")
    single = {**FAST, **MASK, "mask_loss": "poe", "store": tmp_path / "s", "data": data_folder}
    with pytest.raises(DataError, match="reads two texts"):
        find(str(tiny_folder), "sst2", method="learned", **single)
    with pytest.raises(TombolaError, match="weights as they are"):
        find(str(tiny_folder), "sst2", method="learned", **{**single, "mask_loss": "ce", "train_weights": True})


@pytest.mark.parametrize("unit", ["heads", "neurons"])
def test_parts_are_learned_as_cells_too(lab: Lab, tiny_folder: Path, unit: str) -> None:
    found = planned(lab, tiny_folder, unit=unit, granularity="global")
    lab.run(list(found.cells))
    (part,) = tombola_ticket(lab, found).mask.parts().values()
    assert part.numel() - int(part.sum()) == round(0.5 * part.numel())
