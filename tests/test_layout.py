"""A layout by hand, for a model that cannot be read by structure: it travels from `find` to all that is done with the ticket."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tombola
from conftest import Run
from tombola import cli
from tombola.anatomy import Layout, read
from tombola.errors import AnatomyError
from tombola.study import steps
from tombola.study.jobs import open_lab
from tombola.study.runs import plan_find
from tombola.study.settings import resolve
from tombola.ticket import Ticket

BERT = {
    "layers": "bert.encoder.layer",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "mlp_in": ["intermediate.dense"],
    "mlp_out": "output.dense",
}
HOW = {"epochs": 1, "learning_rate": 3e-3, "train_rows": 64, "selection_rows": 40, "floor_rule": "fraction_above_baseline"}
FAST = [part for name, value in HOW.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def unreadable() -> Iterator[None]:
    """No model can be read by structure while this holds."""
    with pytest.MonkeyPatch.context() as patch:
        blind(patch)
        yield


def blind(patch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> Any:
        raise AnatomyError("the structure of this model could not be read")

    patch.setattr(read, "_by_structure", refuse)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout of BERT as somebody would write it."""
    file = tmp_path_factory.mktemp("layout") / "bert.yaml"
    file.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in BERT.items()))
    return file


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path, file: Path) -> dict[str, Any]:
    """One find of a model that cannot be read, with a layout, in this process."""
    folder = tmp_path_factory.mktemp("found")
    with pytest.MonkeyPatch.context() as patch:
        blind(patch)
        patch.setattr(
            sys, "argv",
            ["tombola", "find", str(tiny_folder), "sst2", "--data", str(data_folder), "--store", str(folder / "store"), *FAST,
             "--layout", str(file), "--out", str(folder / "ticket")],
        )  # fmt: skip
        with pytest.raises(SystemExit) as left:
            cli.main()
            sys.exit(0)
        assert not left.value.code
    return {"ticket": folder / "ticket", "common": ("--data", data_folder, "--store", folder / "store")}


def test_without_a_layout_it_is_refused_before_anything_is_computed(
    unreadable: None, run: Run, tmp_path: Path, tiny_folder: Path, data_folder: Path
) -> None:
    arguments = ("find", tiny_folder, "sst2", "--data", data_folder, "--store", tmp_path / "store", *FAST)
    for more in ((), ("--dry-run",)):
        code, _, err = run(*arguments, *more)
        assert code == 2 and "could not be read" in err
        assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("unreadable")
def test_the_ticket_says_the_layout_and_everything_later_uses_it(found: dict[str, Any], run: Run, tmp_path: Path) -> None:
    ticket, common = Ticket.from_pretrained(found["ticket"]), found["common"]
    assert ticket.settings["layout"] == [BERT]
    assert ticket.layout == (Layout(**{**BERT, "mlp_in": ("intermediate.dense",)}),)  # type: ignore[arg-type]
    code, _, err = run("controls", found["ticket"], "--kinds", "shuffle-layers", "--draws", "1", "--retrain", *common)
    assert code == 0, err
    code, _, err = run("retrain", found["ticket"], *common, "--out", tmp_path / "weights")
    assert code == 0, err
    for weights in ("base", tmp_path / "weights"):
        code, _, err = run("evaluate", found["ticket"], "--weights", weights, *common)
        assert code == 0, err
    # by the folder of the ticket alone, into a store that has never heard of it
    other = (*common[:3], tmp_path / "other")
    code, _, err = run("retrain", found["ticket"], "sst2", *other)
    assert code == 0, err
    model = tombola.load(ticket, weights=str(tmp_path / "weights"))
    assert model.tombola_gates.mask == ticket.mask


@pytest.mark.usefixtures("unreadable")
def test_a_trainer_of_ones_own_holds_the_ticket_too(found: dict[str, Any], tiny_folder: Path) -> None:
    from tombola.callback import HoldMask, _put
    from tombola.objective import load_weights

    hold = HoldMask(Ticket.from_pretrained(found["ticket"]))
    _put(load_weights(tiny_folder, ("a", "b"), head_seed=0), hold.mask, hold._layout)


def test_the_layout_makes_no_other_ticket(found: dict[str, Any], tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    """By hand or by structure the parts are the same, and so is what is found; but the cells are others."""
    (read_by_structure,) = tombola.find(str(tiny_folder), "sst2", data=data_folder, store=tmp_path / "store", **HOW)
    by_hand = Ticket.from_pretrained(found["ticket"])
    assert read_by_structure.mask == by_hand.mask and read_by_structure.metrics == by_hand.metrics
    assert read_by_structure.identity != by_hand.identity and read_by_structure.cell != by_hand.cell
    assert read_by_structure.layout is None and "layout" not in read_by_structure.settings


def test_cells_without_a_layout_say_nothing_of_one_and_python_takes_it_in_any_form(
    tmp_path: Path, tiny_folder: Path, data_folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, settings = open_lab(tmp_path / "store", data_folder), resolve({"epochs": 1})
    (plain,) = plan_find(lab, str(tiny_folder), "sst2", settings, (0,))
    assert "layout" not in json.dumps(plain.pruned.describe())
    assert set(plain.dense.settings["model"]) == {"name", "revision", "fingerprint", "files"}

    planned: list[Any] = []
    real = plan_find

    def watched(*arguments: Any) -> Any:
        planned.append(real(*arguments)[0].search.key)
        raise KeyboardInterrupt

    monkeypatch.setattr("tombola.study.jobs.plan_find", watched)
    (layout,) = Layout.from_yaml(file)
    for one in (layout, [layout], file, str(file)):
        with pytest.raises(KeyboardInterrupt):
            tombola.find(str(tiny_folder), "sst2", store=tmp_path / "store", data=data_folder, layout=one, epochs=1)
    assert len(set(planned)) == 1 and planned[0] != plain.search.key


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_computed(
    run: Run, tmp_path: Path, tiny_folder: Path, data_folder: Path
) -> None:
    (tmp_path / "absent.yaml").write_text(json.dumps(BERT | {"q": "attention.self.nothing"}))
    (tmp_path / "swapped.yaml").write_text(json.dumps(BERT | {"q": BERT["v"], "v": BERT["q"]}))
    (tmp_path / "no.yaml").write_text(json.dumps({"layers": "bert.encoder.layer"}))
    said = {"absent.yaml": "attention.self.nothing", "swapped.yaml": "did not move", "no.yaml": "mlp_in is missing"}
    said |= {"nowhere.yaml": "nowhere.yaml"}
    for name, word in said.items():
        store = ("--data", data_folder, "--store", tmp_path / "store")
        code, _, err = run("find", tiny_folder, "sst2", *store, *FAST, "--layout", tmp_path / name)
        assert code == 2 and word in err, err
    assert not (tmp_path / "store").exists()


def test_parts_are_read_once_a_run(tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tombola.study import data

    read_from: list[object] = []
    real = data.load_weights
    monkeypatch.setattr(data, "load_weights", lambda *how, **more: (read_from.append(how), real(*how, **more))[1])
    lab = open_lab(tmp_path / "store", data_folder)
    for epochs in (1, 2):
        plan_find(lab, str(tiny_folder), "sst2", resolve({"epochs": epochs}, (0, 1)), (0, 1))
    assert len(read_from) == 1
    assert steps.STEPS["search"].version == 1, "the results of searches without a layout are what they were"
