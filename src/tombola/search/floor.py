"""The floor: the score on the selection rows that a ticket must hold."""

from typing import Literal

from tombola.errors import SearchError
from tombola.evaluate import Score
from tombola.tasks.base import REGRESSION_METRICS

FloorRule = Literal["fraction_of_full", "fraction_above_baseline"]
UNSAID = {"unsaid": True}  # metadata of a setting that came later: see `Settings.search_in_use`
StopMetric = Literal["pearson", "mean_pearson_spearman"]  # what must hold the floor on a task whose metric is Pearson's r


def floor_score(full: Score, floor: float, rule: FloorRule) -> float:
    """The score a mask must hold.

    fraction_of_full: floor · full. fraction_above_baseline: base + floor · (full − base), base = the majority line; with
    nothing above the baseline to lose, the full score itself.

    Raises: SearchError under fraction_of_full when the full score is at or below the majority line, where a share of it
    means nothing: an empty network would hold it.
    """
    above = full.value - full.majority
    if rule == "fraction_above_baseline":
        return full.majority + floor * above if above > 0 else full.value
    if above <= 0:
        always = "one and the same value" if full.metric in REGRESSION_METRICS else "the most frequent class"
        raise SearchError(
            "the full model is not better than the majority line, so a share of its score means nothing",
            got=f"{full.metric} {full.value:.4f} on {full.n} selection rows",
            expected=f"more than {full.majority:.4f}, what always answering {always} scores",
            next="train more (--train-rows, --epochs, --learning-rate), or take --floor-rule fraction_above_baseline",
        )
    if full.value < 0:
        raise SearchError(
            "a share of a negative score means nothing",
            got=f"{full.metric} {full.value:.4f}",
            expected="a score above zero",
            next="take --floor-rule fraction_above_baseline",
        )
    return floor * full.value


def holds(score: Score, floor: float) -> bool:
    """Whether a score is at the floor or above. 72 right rows of 100 hold 0.9 of 80, though 0.9 * 0.8 > 0.72 in floats."""
    return score.value >= floor - 1e-9
