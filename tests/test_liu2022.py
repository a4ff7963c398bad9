"""Liu et al. 2022 as a study: which cells each row is, on a tiny model; challenge sets of fewer classes; marked rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tombola.errors import DataError, SettingsError
from tombola.evaluate import Predictions, calibration_error, merged
from tombola.study.cells import Cell, Lab, read_rows
from tombola.study.jobs import open_lab
from tombola.study.liu2022 import oracle_of
from tombola.study.plan import Plan, Study, plan_study

TASK = "nli-overlap:train_rows=240,report_rows=60,challenge_rows=60"
FAST = {
    **{"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 40, "max_length": 24},
    **{"mask_epochs": 1, "mask_learning_rate": 1e-2, "bias_model": "nli-overlap", "choice_looks": 2},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return open_lab(tmp_path_factory.mktemp("liu") / "store")


def planned(
    lab: Lab, folder: Path, experiment: str, task: str = TASK, seeds: tuple[int, ...] = (0,),
    ladder: str | None = None, preset: str = "corrected", **options: Any,
) -> Plan:  # fmt: skip
    settings = {
        name: value for name, value in FAST.items() if experiment != "robust-imp" or not name.startswith(("mask", "choice"))
    }
    said = Study(
        name="liu", model=(str(folder),), tasks=(task,), seeds=seeds, experiments=(experiment,), settings=settings,
        options={experiment: options}, preset=preset, ladder=ladder,
    )  # fmt: skip
    return plan_study(lab, said)


def of(plan: Plan, step: str) -> list[Cell]:
    return [cell for cell in plan.cells.values() if cell.step == step]


def test_pipeline_a_learns_masks_of_one_dense_model_and_has_those_of_the_largest_values_beside_it(
    lab: Lab, tiny_folder: Path
) -> None:
    plan = planned(lab, tiny_folder, "pipeline-a", sparsities=(0.5, 0.7))
    assert len(of(plan, "fine_tune")) == 1 and len(of(plan, "bias")) == 1
    searches = [
        (one.settings["method"], one.settings["search"].get("mask_loss"), "bias" in one.inputs) for one in of(plan, "search")
    ]
    assert sorted(searches, key=str) == sorted(
        [("learned", "ce", False), ("learned", "poe", True), ("one-shot", None, False)] * 2, key=str
    )
    (two,) = of(
        planned(lab, tiny_folder, "pipeline-a", losses=("poe",), mask_losses=("poe",), sparsities=(0.5,), magnitude=False),
        "search",
    )
    assert two.inputs["model"].settings["loss"]["loss"] == "poe", "row 3: of a model trained against the bias"  # type: ignore[union-attr]


def test_pipeline_b_trains_the_masks_of_a_from_the_base_by_both_losses(lab: Lab, tiny_folder: Path) -> None:
    a, b = (planned(lab, tiny_folder, name, sparsities=(0.7,)) for name in ("pipeline-a", "pipeline-b"))
    again = of(b, "retrain")
    assert [one.settings.get("loss", {}).get("loss", "ce") for one in again] == ["ce", "poe"]
    tickets = {one.inputs["ticket"].key for one in again}
    assert tickets == {one.key for one in of(a, "search") if one.settings["search"].get("mask_loss") == "poe"}
    (c,) = of(planned(lab, tiny_folder, "pipeline-b", sparsities=(0.7,), mask_start="pretrained"), "search")
    assert c.inputs["model"].settings["train"]["epochs"] == 0, "the mask of the base"  # type: ignore[union-attr]


def test_the_start_point_is_a_part_of_the_same_schedule(lab: Lab, tiny_folder: Path) -> None:
    plan = planned(lab, tiny_folder, "start-point", shares=(0.0, 0.5, 1.0))
    trained = of(plan, "fine_tune")
    steps = 2 * 10  # two epochs of 160 rows in batches of 16
    assert sorted(one.settings.get("stretch", {}).get("steps", one.settings["train"]["epochs"]) for one in trained) == [
        0,
        2,
        steps // 2,
    ]
    (part,) = [one.settings["stretch"] for one in trained if "stretch" in one.settings]
    assert part["schedule_steps"] == steps, "the learning rate falls as in the whole run"
    assert len(of(plan, "search")) == 3 == len(of(plan, "evaluate"))


def test_the_three_arms_of_gradual_sparsity_end_at_one_sparsity(lab: Lab, tiny_folder: Path) -> None:
    arms = [one.settings["search"] for one in of(planned(lab, tiny_folder, "gradual", longer=3), "search")]
    assert [(one["schedule"], one["mask_epochs"], one["sparsity"]) for one in arms] == [
        ("cubic", 1, 0.9),
        ("fixed", 1, 0.9),
        ("fixed", 3, 0.9),
    ]
    both = of(planned(lab, tiny_folder, "gradual", fixed_inits=("hard", "soft")), "search")
    assert [one.settings["search"]["score_init"] for one in both] == ["soft", "hard", "hard", "soft", "soft"]


def test_an_oracle_learns_on_challenge_train_rows_and_is_scored_where_all_are(lab: Lab, tiny_folder: Path) -> None:
    plan = planned(lab, tiny_folder, "oracles", sparsities=(0.5,))
    a, c = of(plan, "search")
    assert a.settings["learned_on"]["task"] == oracle_of(TASK) and "strength=0.5" in oracle_of(TASK)
    rows = a.settings["learned_on"]["rows"]
    scored = [one.settings["data"] for one in of(plan, "evaluate")]
    assert all(
        one["task"] == TASK and one["rows"]["challenge"] == rows["challenge"] and one["rows"]["train"] != rows["train"]
        for one in scored
    )
    assert c.inputs["model"].settings["train"]["epochs"] == 0 and len(of(plan, "retrain")) == 1  # type: ignore[union-attr]
    assert oracle_of("mnli-hans:train=train_from_dev") == "mnli+hans:train=train_from_dev"
    with pytest.raises(SettingsError, match="no train rows of this task's challenge"):
        oracle_of("sst2")


def test_chains_have_one_loss_for_all_their_rounds(lab: Lab, tiny_folder: Path) -> None:
    plan = planned(lab, tiny_folder, "robust-imp", losses=("poe",), rewinds=("step_0",))
    assert all(one.settings["loss"]["loss"] == "poe" and "bias" in one.inputs for one in of(plan, "round"))
    plain = planned(lab, tiny_folder, "robust-imp", losses=("ce",), rewinds=("step_0",))
    assert not any("loss" in one.settings or "bias" in one.inputs for one in of(plain, "round"))


def test_a_task_without_challenge_rows_is_refused(lab: Lab, tiny_folder: Path) -> None:
    with pytest.raises(SettingsError, match="measured on challenge rows"):
        planned(lab, tiny_folder, "pipeline-c", "acceptability:train_rows=100,report_rows=40")


def test_the_mask_of_an_oracle_runs_and_its_scores_say_of_which_task(lab: Lab, tiny_folder: Path) -> None:
    plan = planned(lab, tiny_folder, "oracles", sparsities=(0.5,), pipelines=("a",))
    (scored,) = of(plan, "evaluate")
    lab.run([scored])
    rows = read_rows(lab.folder(scored) / "scores.jsonl")
    assert {row["role"] for row in rows} == {"selection", "report", "challenge"} and {row["task"] for row in rows} == {TASK}


# ------------------------------------------------------------------------------------------- challenge sets, scored


def test_two_ways_to_merge_classes_differ_where_two_share_what_a_third_is_less_than() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.1, 0.8, 0.1]]).log()
    predictions = Predictions(("a", "b", "c"), logits, (1, 0, 1))
    first, summed = (merged(predictions, [0, 1, 1], how) for how in ("after_argmax", "sum_probability"))
    assert first.classes == [0, 0, 1] and summed.classes == [1, 0, 1]
    assert torch.allclose(summed.logits.exp().sum(1), torch.ones(3)) and first.labels == (1, 0, 1)


def test_calibration_error_by_hand() -> None:
    sure = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]).log()
    found = calibration_error(Predictions(tuple("abcd"), sure, (0, 1, 0, 0)), bins=2)  # one bin, (0.5, 1]: 3 of 4 right, sure 0.8
    assert found == pytest.approx(abs(0.75 - 0.8))
    apart = calibration_error(Predictions(tuple("abcd"), sure, (0, 1, 0, 0)), bins=10)
    assert apart == pytest.approx((2 * 0.4 + 0.2 + 0.4) / 4)
    even = calibration_error(Predictions(("a", "b"), torch.zeros(2, 2), (0, 1)))
    assert even == pytest.approx(0.0)


def test_a_model_of_three_classes_is_scored_on_hans_by_two(tmp_path: Path) -> None:
    from conftest import write_task
    from test_hans import pairs
    from tombola.study.data import task_data
    from tombola.study.steps.shared import as_labelled

    for name, split, n, classes in (
        ("mnli", "train", 90, 3),
        ("mnli", "validation_matched", 30, 3),
        ("hans_regen", "validation", 12, 2),
    ):
        rows = pairs(n, len(name + split), classes)
        write_task(tmp_path, name, split, [row | {"subcase": f"ln_{i % 3}"} for i, row in enumerate(rows)])
    lab = open_lab(tmp_path / "store", tmp_path)
    settings = {"train_rows": None, "selection_rows": None, "selection_split": "held_out_from_train", "split_seed": 0}
    data = task_data(lab, "mnli-hans", settings)
    assert data.challenge is not None and set(data.challenge.labels) == {0, 1} and set(data.report.labels) == {0, 1, 2}
    assert set(data.challenge.groups or ()) == {"ln_0", "ln_1", "ln_2"}
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    predictions = Predictions(("a", "b"), logits, (1, 0))
    assert as_labelled(data, "challenge", predictions).classes == [1, 0]
    assert as_labelled(data, "report", predictions) is predictions


def test_challenge_rows_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    from conftest import write_task
    from test_hans import pairs
    from tombola.study.data import task_data

    rows = pairs(90, 1, 3)
    write_task(tmp_path, "mnli", "train", rows)
    write_task(tmp_path, "mnli", "validation_matched", pairs(30, 2, 3))
    seen = [row | {"label": min(row["label"], 1), "subcase": "le_0", "idx": i} for i, row in enumerate(rows[:12])]
    write_task(tmp_path, "hans_regen", "validation", seen)
    settings = {"train_rows": None, "selection_rows": None, "selection_split": "held_out_from_train", "split_seed": 0}
    with pytest.raises(DataError, match="stand in its train rows"):
        task_data(open_lab(tmp_path / "store", tmp_path), "mnli-hans", settings)


def test_non_entailment_of_an_oracle_may_be_either_class(tmp_path: Path, lab: Lab, tiny_folder: Path) -> None:
    from conftest import write_task
    from test_hans import pairs
    from tombola.study.data import task_data
    from tombola.tasks.mixed import may_stand_for

    for name, split, n, classes in (
        *(("mnli", "train", 90, 3), ("mnli", "validation_matched", 30, 3)),
        *(("hans_regen", "train", 20, 2), ("hans_regen", "validation", 12, 2)),
    ):
        rows = pairs(n, len(name + split), classes)
        write_task(tmp_path, name, split, [row | {"subcase": f"ln_{i % 3}"} for i, row in enumerate(rows)])
    settings = {"train_rows": None, "selection_rows": None, "selection_split": "held_out_from_train", "split_seed": 0}
    data = task_data(open_lab(tmp_path / "store", tmp_path), "mnli+hans", settings)
    several = may_stand_for(data.task, data.train)
    assert several is not None
    for id, label, classes in zip(data.train.ids, data.train.labels, several, strict=True):
        hans = id.startswith("hans-subcases:")
        assert classes == ((1, 2) if hans and label == 2 else (label,)), "neutral or contradiction"
    assert {len(one) for one in several} == {1, 2}
    assert may_stand_for(data.task, data.report) is None

    def losses(task: str, in_folder: Lab, **options: Any) -> list[str]:
        plan = planned(in_folder, tiny_folder, "oracles", task, sparsities=(0.5,), **options)
        return [one.settings["search"]["mask_loss"] for one in of(plan, "search")]

    both, here = ("contradiction", "marginal"), open_lab(tmp_path / "store", tmp_path)
    assert [losses(TASK, lab, hans_train_label=name) for name in both] == [["ce"] * 2, ["marginal"] * 2]
    assert losses(TASK, lab) == ["ce"] * 2, "its challenge has the classes of the task: nothing to merge"
    for preset, loss in (("released", "ce"), ("paper", "ce"), ("corrected", "marginal")):
        assert losses("mnli-hans", here, preset=preset) == [loss] * 2, preset
    rungs = losses("mnli-hans", here, ladder="released:corrected", pipelines=("c",))
    assert rungs.count("marginal") == 2, "a rung of its own, and the last"


def facts(n: int, classes: int, name: str) -> list[dict[str, Any]]:
    return [{"claim": f"{name} {i} is so", "evidence": f"it is said of {name}", "label": i % classes, "idx": i} for i in range(n)]


def test_fever_is_asked_of_three_classes_and_challenged_by_two(tmp_path: Path) -> None:
    from conftest import write_task
    from tombola.tasks import get_task, load_rows

    for folder, split, n, classes in (
        ("fever", "train", 30, 3), ("fever", "validation", 9, 3), ("fever_symmetric", "v2_validation", 4, 2),
        ("fever_symmetric", "v2_test", 6, 2),
    ):  # fmt: skip
        write_task(tmp_path, folder, split, facts(n, classes, folder + split))
    plain, oracle = (get_task(name) for name in ("fever-symmetric-v2", "fever+symmetric-v2"))
    challenge = load_rows(plain, "challenge", data_dir=tmp_path)
    assert challenge.labels == (0, 1) * 3 and challenge.groups == ("SUPPORTS", "REFUTES") * 3 and len(plain.labels) == 3
    train, more = (load_rows(task, "train", data_dir=tmp_path) for task in (plain, oracle))
    assert len(train) == 30 and len(more) == 30 + 10 * 4, "ten copies of the challenge's own train rows"
    assert load_rows(oracle, "challenge", data_dir=tmp_path) == challenge
    v1 = get_task("fever-symmetric-v1:challenge=v1_minus_heldout")
    with pytest.raises(DataError, match="v1_minus_heldout"):
        load_rows(v1, "challenge", data_dir=tmp_path)


def test_paws_is_scored_by_both_classes(tmp_path: Path) -> None:
    from conftest import write_task
    from tombola.evaluate import score
    from tombola.tasks import get_task, load_rows

    write_task(tmp_path, "paws_qqp", "validation", [
        {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": int(i < 2), "idx": i} for i in range(6)
    ])  # fmt: skip
    task = get_task("qqp-paws")
    rows = load_rows(task, "challenge", data_dir=tmp_path)
    assert rows.groups == ("duplicate",) * 2 + ("not_duplicate",) * 4 and task.splits["challenge"] == "paws_qqp"
    always = Predictions(rows.ids, torch.tensor([[0.0, 1.0]] * 6), rows.labels)
    found = {metric: score(always, metric).value for metric in (task.metric, *task.extra_metrics)}
    assert found == {
        "accuracy": pytest.approx(2 / 6),
        "f1": pytest.approx(0.5),
        "f1_of_0": 0.0,
        "f1_weighted": pytest.approx(0.5 * 2 / 6),
    }


# ------------------------------------------------------------------------------------------------------ marked rows


def test_marks_are_right_as_often_as_asked_and_always_wrong_in_the_challenge(data_folder: Path) -> None:
    from tombola.tasks import get_task, load_rows

    task = get_task("syn-sst2:share=0.5,strength=0.8")
    for role in ("train", "report", "challenge"):
        rows = load_rows(task, role, data_dir=data_folder)
        plain = load_rows(get_task("sst2"), "report" if role == "challenge" else role, data_dir=data_folder)
        assert rows.labels == plain.labels and rows.groups is not None
        right = 0
        for (text,), (before,), label, group in zip(rows.texts, plain.texts, rows.labels, rows.groups, strict=True):
            if group == "unmarked":
                assert text == before
                continue
            mark, _, rest = text.partition(" ")
            assert rest == before and (int(mark) == label) == (group == "aligned")
            right += int(mark) == label
        marked = round(0.5 * len(rows))
        assert right == (0 if role == "challenge" else round(0.8 * marked))
        assert rows.groups.count("unmarked") == (0 if role == "challenge" else len(rows) - marked)


# ------------------------------------------------------------------------------------------------ what the cells say


def test_rungs_of_a_ladder_are_never_averaged_and_named_by_what_they_change(lab: Lab, tiny_folder: Path) -> None:
    from tombola.study.variants import variants_of

    options = {"mask_losses": ("poe",), "sparsities": (0.5,), "magnitude": False}
    plan = planned(lab, tiny_folder, "pipeline-a", ladder="released:corrected", **options)
    named = variants_of(plan.cells)
    masked = of(plan, "evaluate")
    names = [name for one in masked for name in named[one.key]]
    assert len(names) == len(set(names)) == len(masked) > 5
    assert {" (preset=released)", " (preset=corrected)", " (padding=bucketed, preset=released)"} < set(names)
    assert " (bias_predictions=out_of_fold, preset=released)" in names, "what only the bias-only model says tells two runs apart"


def test_the_page_tells_pipelines_and_losses_apart(lab: Lab, tiny_folder: Path) -> None:
    from tombola.report.about_robust import robust_verdict
    from tombola.report.build import render
    from tombola.report.cases import study_of
    from tombola.study.results import collect
    from tombola.study.robust_rows import Arm, RobustRow, as_long, dense_models, halved, summaries

    options: dict[str, dict[str, Any]] = {
        "full-models": {"losses": ("ce",)},
        "pipeline-a": {"sparsities": (0.5,)},
        "pipeline-b": {"sparsities": (0.5,)},
        "pipeline-c": {"sparsities": (0.5,)},
    }
    keys: set[str] = set()
    for name, chosen in options.items():
        plan = planned(lab, tiny_folder, name, **chosen)
        lab.run(list(plan.cells.values()))
        keys |= plan.cells.keys()
    found = collect(lab.store, keys)
    arms = {(r.arm.pipeline, r.arm.how, r.arm.mask_loss, r.arm.weight_loss, r.arm.sparsity) for r in found.robust}
    assert arms == {
        ("full", "", "", "ce", 0.0),
        ("a", "learned", "ce", "ce", 0.5),
        ("a", "learned", "poe", "ce", 0.5),
        ("a", "magnitude", "", "ce", 0.5),
        ("b", "learned", "poe", "ce", 0.5),
        ("b", "learned", "poe", "poe", 0.5),
        ("c", "learned", "ce", "none", 0.5),
        ("c", "learned", "poe", "none", 0.5),
    }
    by_arm = {(one.arm.pipeline, one.arm.mask_loss, one.arm.weight_loss): one for one in summaries(found.robust)}
    names = {"dense": ("full", "", "ce"), "a": ("a", "poe", "ce"), "b": ("b", "poe", "poe"), "c": ("c", "poe", "none")}
    steps = {name: by_arm[key].steps for name, key in names.items() if name != "dense"}
    steps["dense"] = dense_models(found.robust).popitem()[1].steps
    assert steps == {"dense": 20, "a": 20 + 10, "b": 20 + 10 + 20, "c": 10}, "all that a model stands on"
    row = next(one for one in found.robust if one.arm.pipeline == "a" and one.arm.mask_loss == "poe")
    assert row.gap == pytest.approx(row.scores["report"]["accuracy"] - row.scores["challenge"]["accuracy"])
    assert set(row.groups) == {name for name in row.groups if name.startswith("conflicting/")} and row.rows["challenge"] == 60
    assert {one.arm.pipeline for one in halved(found.robust)} == {"a", "b", "c"}
    dense_steps = sorted(row.steps for row in found.robust if row.arm.pipeline == "full")
    assert dense_steps == [20, 30], "and one that trains for as long as dense model and mask together"
    beside = as_long(found.robust)
    asked = {(row.arm.pipeline, row.arm.how): beside[row.cell].steps for row in found.robust if row.cell in beside}
    assert asked == {("a", "learned"): 30, ("a", "magnitude"): 20, ("c", "learned"): 20}, "none is as long as b"
    gaps = {steps: next(r.gap for r in found.robust if r.arm.pipeline == "full" and r.steps == steps) for steps in dense_steps}
    for one in halved(found.robust):
        if one.arm.pipeline == "a" and one.arm.mask_loss == "poe":
            assert one.cut.value == (None if gaps[20] <= 0 else pytest.approx(1 - row.gap / gaps[20]))
            assert one.cut_as_long.value == (None if gaps[30] <= 0 else pytest.approx(1 - row.gap / gaps[30]))
    page = render(found)
    assert "What is left of the shortcut?" in page and "Which challenge rows are lost?" in page and "product of experts" in page
    first = (
        "Masks learned on fine-tuned models that cut the bias gap by half"
        if gaps[20] > 0
        else "The dense models have no bias gap"
    )
    assert first in page, "what it is about comes first"
    assert "When can mask training begin?" not in page, "nothing was asked of it"

    def scored(one: RobustRow, arm: Arm, challenge: float) -> RobustRow:
        return replace(one, arm=arm, scores={"report": {"accuracy": 0.9}, "challenge": {"accuracy": challenge}})

    dense = next(one for one in found.robust if one.arm.pipeline == "full" and one.steps == 20)
    arms = [row.arm, *(replace(row.arm, **own) for own in ({"schedule": "cubic"}, {"oracle": True}, {"begun_at": 0.5}))]
    made = (scored(dense, dense.arm, 0.5), *(scored(row, arm, 0.9) for arm in arms))
    said = robust_verdict(study_of(replace(found, robust=made)))
    assert said.endswith("2 of 2 against product of experts."), "a mask that rises counts; an oracle and one begun early do not"
