"""When masks can begin: overlap, rule and regret by hand."""

import pytest
import torch

from tombola.errors import DataError
from tombola.study.begin import Curve, begins_at, cost_of, fitted, leave_one_out, mask_overlap


def curve(task: str, scores: tuple[float, ...], overlaps: tuple[float, ...]) -> Curve:
    return Curve(task=task, shares=(0.0, 0.25, 0.5, 1.0), scores=scores, steps=(100, 200, 300, 500), overlaps=overlaps)


EARLY = curve("early", (0.5, 0.8, 0.8, 0.8), (0.7, 0.9, 0.95))  # 0.25 is enough
LATE = curve("late", (0.5, 0.6, 0.8, 0.8), (0.7, 0.9, 0.95))  # 0.5 is needed


def test_the_overlap_of_two_masks_of_the_largest_values() -> None:
    a, b = {"w": torch.tensor([4.0, -3.0, 2.0, 1.0])}, {"w": torch.tensor([4.0, 1.0, -3.0, 0.0])}
    assert mask_overlap(a, a, 0.5) == 1.0
    assert mask_overlap(a, b, 0.5) == pytest.approx(1 / 3), "one of three that either keeps"
    with pytest.raises(DataError, match="other parameters"):
        mask_overlap(a, {"v": a["w"]}, 0.5)


@pytest.mark.parametrize(
    ("threshold", "times", "share"), [(0.6, 1, 0.25), (0.9, 1, 0.5), (0.9, 2, 1.0), (0.6, 2, 0.5), (0.99, 1, 1.0)]
)
def test_the_rule_waits_for_overlaps_in_a_row(threshold: float, times: int, share: float) -> None:
    assert begins_at(EARLY, threshold, times) == share


def test_what_beginning_early_loses_and_saves() -> None:
    found = cost_of(LATE, 0.25)
    assert (found.share, found.regret, found.saved) == (0.25, pytest.approx(0.2), pytest.approx(0.6))
    assert cost_of(LATE, 0.55).share == 0.5 and cost_of(LATE, 0.375).share == 0.5, "of two as near the later"
    assert cost_of(EARLY, 1.0).regret == cost_of(EARLY, 1.0).saved == 0.0


def test_a_threshold_is_fitted_on_the_other_tasks_alone() -> None:
    thresholds = (0.6, 0.9, 0.99)
    assert fitted([EARLY], thresholds) == 0.6 and fitted([LATE], thresholds) == 0.9 and fitted([EARLY, LATE], thresholds) == 0.9
    early, late = leave_one_out([EARLY, LATE], thresholds)
    assert (early.threshold, early.rule.share, early.rule.regret) == (0.9, 0.5, 0.0)
    assert (late.threshold, late.rule.share, late.rule.regret) == (0.6, 0.25, pytest.approx(0.2)), (
        "what fits one may fail another"
    )
    assert late.fixed[0.55].regret == 0.0 and late.fixed[0.0].regret == pytest.approx(0.3)
    with pytest.raises(DataError, match="two tasks"):
        leave_one_out([EARLY], thresholds)


def test_a_curve_that_does_not_end_at_the_end_is_refused() -> None:
    with pytest.raises(DataError, match="rising, up to 1"):
        Curve(task="t", shares=(0.0, 0.5), scores=(0.1, 0.2), steps=(1, 2), overlaps=(0.5,))
