"""When masks can begin: probes, rules and regret by hand; and all of it on a study of a tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tombola.errors import DataError
from tombola.report.about_begin import begin_parts
from tombola.report.cases import study_of
from tombola.study.begin import (
    PROBES,
    Curve,
    Rule,
    begins_at,
    cost_of,
    fitted,
    leave_one_out,
    mask_overlap,
    pilot_loss,
    rank_correlation,
    slope,
    update_overlap,
)
from tombola.study.cells import read_json
from tombola.study.jobs import open_lab
from tombola.study.plan import plan_study, read_study
from tombola.study.results import collect


def curve(task: str, scores: tuple[float, ...], values: tuple[float | None, ...], seed: int = 0) -> Curve:
    return Curve(
        task=task, shares=(0.0, 0.25, 0.5, 1.0), scores=scores, steps=(100, 200, 300, 500), probes={"pilot": values}, seed=seed
    )


EARLY = curve("early", (0.5, 0.8, 0.8, 0.8), (None, 0.7, 0.9, 0.95))  # 0.25 is enough
LATE = curve("late", (0.5, 0.6, 0.8, 0.8), (None, 0.7, 0.9, 0.95))  # 0.5 is needed


def test_the_overlap_of_two_masks_of_the_largest_values() -> None:
    a, b = {"w": torch.tensor([4.0, -3.0, 2.0, 1.0])}, {"w": torch.tensor([4.0, 1.0, -3.0, 0.0])}
    assert mask_overlap(a, a, 0.5) == 1.0
    assert mask_overlap(a, b, 0.5) == pytest.approx(1 / 3), "one of three that either keeps"
    with pytest.raises(DataError, match="other parameters"):
        mask_overlap(a, {"v": a["w"]}, 0.5)


def test_two_first_steps_overlap_where_they_go_the_same_way() -> None:
    a = {"w": torch.tensor([1.0, -2.0, 0.0]), "v": torch.tensor([3.0])}
    b = {"w": torch.tensor([0.1, 5.0, 0.0]), "v": torch.tensor([-1.0])}
    assert update_overlap(a, a) == 1.0 and update_overlap(a, b) == 0.5, "the first and the one that stands still in both"
    with pytest.raises(DataError, match="other scores"):
        update_overlap(a, {"w": a["w"]})


def test_slope_and_pilot() -> None:
    assert slope((0.0, 0.5, 0.75), (1.0, 0.6, 0.7)) == (None, pytest.approx(0.8), pytest.approx(-0.4))
    losses = [(5, 3.0), (10, 2.0), (20, 1.0), (100, 0.5)]
    assert pilot_loss(losses, 0.15) == 2.0 and pilot_loss(losses, 0.2) == 1.0
    assert pilot_loss([(50, 3.0), (100, 2.0)], 0.15) == 3.0, "where nothing was logged so early, the first"
    assert pilot_loss([]) is None


@pytest.mark.parametrize(
    ("threshold", "above", "times", "share"),
    [
        *((0.6, True, 1, 0.25), (0.9, True, 1, 0.5), (0.9, True, 2, 1.0), (0.6, True, 2, 0.5), (0.99, True, 1, 1.0)),
        *((0.7, False, 1, 0.25), (0.5, False, 1, 1.0), (0.9, False, 2, 0.5)),
    ],
)
def test_the_rule_waits_for_a_probe_to_be_past_its_threshold(threshold: float, above: bool, times: int, share: float) -> None:
    assert begins_at(EARLY, Rule("pilot", threshold, above, times)) == share


def test_what_beginning_early_loses_and_saves() -> None:
    found = cost_of(LATE, 0.25)
    assert (found.share, found.regret, found.saved) == (0.25, pytest.approx(0.2), pytest.approx(0.6))
    assert cost_of(LATE, 0.55).share == 0.5 and cost_of(LATE, 0.375).share == 0.5, "of two as near the later"
    assert cost_of(EARLY, 1.0).regret == cost_of(EARLY, 1.0).saved == 0.0
    assert (EARLY.best, LATE.best) == (0.25, 0.5)


def test_a_rule_is_fitted_on_the_other_tasks_alone() -> None:
    assert fitted([EARLY], "pilot") == Rule("pilot", 0.7, True), "the first that begins at 0.25"
    # of both: only "at or above 0.9" begins late enough for one and saves something
    assert begins_at(EARLY, fitted([EARLY, LATE], "pilot")) == begins_at(LATE, fitted([EARLY, LATE], "pilot")) == 0.5
    early, late = leave_one_out([EARLY, LATE], "pilot")
    assert (early.predicted, early.cost.regret, early.cost.saved) == (0.5, 0.0, pytest.approx(0.4))
    assert late.predicted == 0.25 and late.cost.regret == pytest.approx(0.2), "what fits one may fail another"
    assert late.fixed[0.55].regret == 0.0 and late.fixed[0.0].regret == pytest.approx(0.3)
    assert late.random.regret == pytest.approx((0.3 + 0.2) / 4) and late.random.saved == pytest.approx((0.8 + 0.6 + 0.4) / 4)
    assert rank_correlation([early, late]) == pytest.approx(-1.0), "it begins late where early would do"
    assert rank_correlation([early]) is None
    with pytest.raises(DataError, match="two tasks"):
        leave_one_out([EARLY, curve("early", EARLY.scores, (None, 0.1, 0.2, 0.3), seed=1)], "pilot")
    with pytest.raises(DataError, match="no value of bias_gap"):
        fitted([EARLY], "bias_gap")


def test_where_every_rule_loses_the_one_that_loses_least_is_taken() -> None:
    hard = curve("hard", (0.1, 0.2, 0.3, 0.9), (0.4, 0.4, 0.4, 0.4))
    assert begins_at(hard, fitted([hard], "pilot")) in (0.0, 1.0)
    assert cost_of(hard, begins_at(hard, fitted([hard], "pilot"))).regret in (0.0, pytest.approx(0.8))


def test_a_curve_that_does_not_end_at_the_end_is_refused() -> None:
    with pytest.raises(DataError, match="rising, up to 1"):
        Curve(task="t", shares=(0.0, 0.5), scores=(0.1, 0.2), steps=(1, 2), probes={})


STUDY = """
name = "start"
model = "{model}"
tasks = ["nli-overlap:train_rows=240,report_rows=60,challenge_rows=60"]
seeds = [0]
experiments = ["start-point"]
[settings]
epochs = 1
learning_rate = 3e-3
batch_size = 16
train_rows = 160
selection_rows = 40
max_length = 24
mask_epochs = 1
mask_learning_rate = 1e-2
bias_model = "nli-overlap"
[options.start-point]
shares = [0.0, 0.5, 1.0]
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("start")
    (folder / "study.toml").write_text(STUDY.format(model=tiny_folder))
    lab = open_lab(folder / "store")
    plan = plan_study(lab, read_study(str(folder / "study.toml")))
    lab.run(list(plan.cells.values()))
    return folder / "store"


def test_the_start_point_experiment_has_every_probe_at_every_point(started: Path) -> None:
    lab = open_lab(started)
    (found,) = collect(lab.store).begin
    assert found.shares == (0.0, 0.5, 1.0) and found.steps == (10, 15, 20)
    assert found.probes.keys() == PROBES.keys()
    for name in ("mask_overlap", "update_overlap", "dev_slope"):
        first, *others = found.probes[name]
        assert first is None and None not in others
    assert all(0.0 < value < 1.0 for name in ("mask_overlap", "update_overlap") for value in found.probes[name][1:] if value)
    assert None not in found.probes["bias_gap"] + found.probes["pilot"]


def test_mask_overlaps_of_the_experiment_are_those_of_the_weights_themselves(started: Path) -> None:
    from safetensors.torch import load_file

    from tombola.study.cells import Cell, cell_of

    lab = open_lab(started)
    probes = [cell for entry in lab.store.entries() if (cell := cell_of(entry)).step == "probe" and "before" in cell.inputs]
    assert len(probes) == 2
    for probe in probes:
        before = probe.inputs["before"]
        assert isinstance(before, Cell)
        kept = load_file(lab.folder(probe) / "kept.safetensors")
        models = [load_file(lab.folder(one.inputs["model"]) / "weights" / "model.safetensors") for one in (before, probe)]
        weights = [{name: model[name] for name in kept} for model in models]
        said = read_json(lab.folder(probe) / "result.json")
        assert said["mask_overlap"] == pytest.approx(mask_overlap(*weights, 0.7))
        assert said["dev_loss"] > 0


def test_the_page_has_the_probes_and_with_two_tasks_the_rules(started: Path) -> None:
    results = collect(open_lab(started).store)
    (part,) = begin_parts("groups", study_of(results))
    assert [len(line) for line in part.figures] == [len(PROBES)] and all("<svg" in one.svg for one in part.figures[0])
    (points,) = part.tables
    assert [row[1] for row in points.rows] == ["0%", "50%", "100%"] and "no rule is scored" in part.lead
    (both,) = begin_parts("groups", study_of(replace(results, begin=(EARLY, LATE))))
    rules, _ = both.tables
    said = {row[0]: row[1:] for row in rules.rows}
    assert said["rule on pilot"] == ("0.100", "0.200", "50%", "−1.00")
    assert said["always at 100%"][:3] == ("0.000", "0.000", "0%")
    assert begin_parts("groups", study_of(replace(results, begin=()))) == ()
