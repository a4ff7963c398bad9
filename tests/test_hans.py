"""HANS, MNLI of two classes and their mixtures: rows by name and not by number, halves, heuristics as subgroups."""

import random
from pathlib import Path
from typing import Any

import pytest

from conftest import WORDS, write_task
from test_prasanna2020 import FAST
from tombola.errors import DataError
from tombola.study.cells import Lab, read_rows
from tombola.study.data import rows_said, task_data
from tombola.study.jobs import open_lab
from tombola.study.plan import Study, plan_study
from tombola.study.results import collect
from tombola.tasks import TASKS, data_doubts, get_task, load_rows

HEURISTICS = ("lexical_overlap", "subsequence", "constituent")


def pairs(n: int, seed: int, classes: int, *, heuristic: bool = False) -> list[dict[str, Any]]:
    """Entailed rows have "good" in the hypothesis."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        label = i % classes
        word = "good" if label == 0 else rng.choice(["bad", "dull"])
        row = {"premise": " ".join(rng.sample(WORDS[:10], 4)), "hypothesis": f"the film was {word} {rng.choice(WORDS[2:7])}"}
        rows.append(row | {"label": label, "idx": i} | ({"heuristic": HEURISTICS[i // 2 % 3]} if heuristic else {}))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("nli")
    write_task(data, "mnli", "train", pairs(301, 1, 3))
    write_task(data, "mnli", "validation_matched", pairs(60, 2, 3))
    write_task(data, "hans_regen", "train", pairs(200, 3, 2, heuristic=True))
    write_task(data, "hans_regen", "validation", pairs(48, 4, 2, heuristic=True))
    return data


def test_mnli_of_two_classes_merges_neutral_and_contradiction(folder: Path) -> None:
    two, three = (load_rows(get_task(name), "train", data_dir=folder) for name in ("mnli2", "mnli"))
    assert two.texts == three.texts and two.ids[:2] == ("mnli:train:0", "mnli:train:1")
    assert [two.labels[i] for i in range(6)] == [0, 1, 1, 0, 1, 1] and [three.labels[i] for i in range(3)] == [0, 1, 2]
    assert TASKS["mnli2"].labels == ("entailment", "not_entailment") and two.groups is None


def test_halves_are_drawn_once_and_mixtures_have_both(folder: Path) -> None:
    whole, half, both = (load_rows(get_task(name), "train", data_dir=folder) for name in ("mnli2", "mnli2-half", "hans+mnli2"))
    assert len(half) == round(301 / 2) and set(half.ids) < set(whole.ids)
    assert [id for id in whole.ids if id in set(half.ids)] == list(half.ids), "in file order"
    assert len(both) == len(half) + 100 and both.ids[: len(half)] == half.ids and both.ids[-1].startswith("hans:train:")
    hans = load_rows(get_task("hans"), "train", data_dir=folder)
    by_id = {f"hans:{id}": label for id, label in zip(hans.ids, hans.labels, strict=True)}
    assert all(by_id[id] == label for id, label in zip(both.ids, both.labels, strict=True) if id in by_id)
    assert half.ids == load_rows(get_task("mnli2-half"), "train", data_dir=folder).ids


def test_the_challenge_of_all_mixtures_is_hans_by_heuristic(folder: Path) -> None:
    for name in ("mnli2", "mnli2-half", "hans+mnli2"):
        rows = load_rows(get_task(name), "challenge", data_dir=folder)
        assert len(rows) == 48 and rows.groups is not None and set(rows.groups) == set(HEURISTICS)
    own = load_rows(get_task("hans"), "report", data_dir=folder)
    assert own.groups == rows.groups and own.ids == tuple(id.removeprefix("hans:") for id in rows.ids)


def test_generated_rows_are_said_to_be_no_published_ones(folder: Path) -> None:
    rows = {role: load_rows(get_task("hans"), role, data_dir=folder) for role in ("train", "report")}
    assert any("48 rows here, officially 30,000" in one for one in data_doubts(get_task("hans"), rows))
    named = get_task("mnli2:train=train_from_dev")
    assert any("'train_from_dev', no official split of mnli" in one for one in data_doubts(named, rows))
    assert data_doubts(get_task("mnli2:challenge=none"), rows) == ()


def test_hans_without_a_folder_or_a_heuristic_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="read from a folder of data"):
        load_rows(get_task("hans"), "report", data_dir=None)
    write_task(tmp_path, "hans", "train", pairs(8, 0, 2))
    with pytest.raises(DataError, match="no column 'heuristic'"):
        load_rows(get_task("hans"), "train", data_dir=tmp_path)


def test_what_a_cell_says_of_rows_changes_with_any_of_their_files(folder: Path, tmp_path: Path) -> None:
    import shutil

    copied = tmp_path / "data"
    shutil.copytree(folder, copied)
    settings = {"selection_split": "held_out_from_train", "split_seed": 0, "train_rows": None, "selection_rows": None}
    before = rows_said(open_lab(tmp_path / "store", copied), "hans+mnli2", settings)
    assert before == rows_said(open_lab(tmp_path / "store", copied), "hans+mnli2", settings)
    write_task(copied, "hans_regen", "train", pairs(190, 3, 2, heuristic=True))
    after = rows_said(open_lab(tmp_path / "store", copied), "hans+mnli2", settings)
    changed = {role for role in before["rows"] if before["rows"][role] != after["rows"][role]}
    assert "train" in changed and "report" not in changed and "challenge" not in changed


def test_the_experiment_scores_full_and_masked_models_on_each_heuristic(folder: Path, tmp_path: Path, tiny_folder: Path) -> None:
    lab = open_lab(tmp_path / "store", folder)
    assert isinstance(lab, Lab)
    said: dict[str, Any] = {"name": "hans", "model": str(tiny_folder), "seeds": [0], "experiments": ["hans"]}
    fast = FAST | {"floor_rule": "fraction_above_baseline", "epochs": 6}
    study = Study(**said, tasks=["mnli:report=validation_matched,challenge=none"], settings=fast)
    plan = plan_study(lab, study)
    tasks = {one.settings["data"]["task"] for one in plan.cells.values() if one.step == "fine_tune"}
    assert tasks == {*(f"{name}:report=validation_matched" for name in ("mnli2", "mnli2-half", "hans+mnli2")), "hans"}
    wanted = [one for one in plan.cells.values() if one.settings.get("data", {}).get("task", "").startswith(("mnli2:", "hans"))]
    mnli2 = [one for one in wanted if one.step == "evaluate" and not one.settings["data"]["task"].startswith("hans+")]
    lab.run(mnli2)
    rows = collect(lab.store).subgroups
    for task, role in (("mnli2:report=validation_matched", "challenge"), ("hans", "report")):
        own = [row for row in rows if (row.task, row.role) == (task, role)]
        assert {(row.kind, row.stage, row.group) for row in own} == {
            (kind, stage, group) for kind, stage in (("full", "full"), ("good", "pruned")) for group in HEURISTICS
        }
        assert {row.n for row in own} == {16} and {row.metric for row in own} == {"accuracy"}
    dense = next(one for one in plan.cells.values() if one.step == "fine_tune" and one.settings["data"]["task"] == "hans")
    data = task_data(lab, "hans", dense.settings["data"])
    predicted = {row["id"]: row for row in read_rows(lab.folder(dense) / "predictions.jsonl") if row["role"] == "report"}
    groups = dict(zip(data.report.ids, data.report.groups or (), strict=True))
    right = [
        row["logits"].index(max(row["logits"])) == row["label"] for id, row in predicted.items() if groups[id] == "subsequence"
    ]
    (full,) = (row for row in rows if (row.task, row.kind, row.role, row.group) == ("hans", "full", "report", "subsequence"))
    assert full.value == pytest.approx(sum(right) / 16)


def test_other_tasks_have_no_part_in_it(data_folder: Path, tmp_path: Path, tiny_folder: Path) -> None:
    lab = open_lab(tmp_path / "store", data_folder)
    said: list[str] = []
    lab.reporter.say = said.append  # type: ignore[method-assign]
    study = Study(name="hans", model=(str(tiny_folder),), tasks=("sst2",), experiments=("hans",), settings=FAST)
    assert plan_study(lab, study).cells == {} and "hans has nothing to do on sst2" in said[0]


def test_a_study_without_hans_is_planned_and_says_so(tmp_path: Path, tiny_folder: Path) -> None:
    write_task(tmp_path / "data", "mnli", "train", pairs(60, 1, 3))
    write_task(tmp_path / "data", "mnli", "validation_matched", pairs(30, 2, 3))
    lab = open_lab(tmp_path / "store", tmp_path / "data")
    said: list[str] = []
    lab.reporter.say = said.append  # type: ignore[method-assign]
    study = Study(
        name="hans", model=(str(tiny_folder),), tasks=("mnli:challenge=none",), experiments=("hans", "s-prune"), settings=FAST
    )
    assert {one.step for one in plan_study(lab, study).cells.values()} == {"fine_tune", "search", "evaluate"}
    assert said[0].startswith("no HANS: it is read from --data alone, a folder hans or hans_regen")
