"""Matching, winning, universal: against the paper's own table, other libraries, and simulated seeds."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tombola import stats
from tombola.errors import DataError
from tombola.stats.matching import RULES

# Chen et al. 2020, Table 2: task → (full mean, std, ticket mean, std) of five runs.
TABLE_2 = {
    "mnli": (82.4, 0.5, 82.6, 0.2), "qqp": (90.2, 0.5, 90.0, 0.2), "stsb": (88.4, 0.3, 88.2, 0.2), "wnli": (54.9, 1.2, 54.9, 1.2),
    "qnli": (89.1, 1.0, 88.9, 0.4), "mrpc": (85.2, 0.1, 84.9, 0.4), "rte": (66.2, 3.6, 66.0, 2.4), "sst2": (92.1, 0.1, 91.9, 0.5),
    "cola": (54.5, 0.4, 53.8, 0.9), "squad": (88.1, 0.6, 87.7, 0.5), "mlm": (63.5, 0.1, 63.2, 0.3),
}  # fmt: skip


def sample(mean: float, std: float, n: int = 5) -> list[float]:
    """n numbers of exactly this mean and standard deviation."""
    raw = np.linspace(-1.0, 1.0, n)
    return (mean + std * (raw - raw.mean()) / raw.std(ddof=1)).tolist()


def of_table(task: str) -> Any:
    full, std, ticket, own = TABLE_2[task]
    return stats.matching(sample(ticket, own), sample(full, std), margin=0.5)


def test_the_printed_rule_fails_on_four_tasks_of_the_papers_own_table_and_the_larger_std_on_none() -> None:
    found = {task: of_table(task) for task in TABLE_2}
    by_rule = {rule: {task for task, one in found.items() if one.verdicts[rule].matches} for rule in RULES}
    assert set(TABLE_2) - by_rule["literal_std"] == {"mrpc", "sst2", "cola", "mlm"}
    assert by_rule["max_std"] == set(TABLE_2)
    assert by_rule["strict"] == {"mnli", "wnli"}
    counted = stats.universal(found)
    assert counted.matching["max_std"] == counted.tasks == 11 and counted.holds("max_std") and not counted.holds("strict")
    assert set(counted.failing["literal_std"]) == {"mrpc", "sst2", "cola", "mlm"}


def test_non_inferiority_is_the_one_sided_test_of_welch() -> None:
    """scipy's t test against a reference moved down by the margin."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = rng.normal(0.80, 0.02, rng.integers(3, 8)), rng.normal(0.81, 0.03, rng.integers(3, 8))
        margin = float(rng.uniform(0, 0.06))
        better = scipy_stats.ttest_ind(a, b - margin, equal_var=False, alternative="greater").pvalue < 0.05
        worse = scipy_stats.ttest_ind(a, b - margin, equal_var=False, alternative="less").pvalue < 0.05
        said = stats.matching(a.tolist(), b.tolist(), margin=margin).verdicts["non_inferiority"].matches
        assert said is (True if better else False if worse else None)


@pytest.mark.slow
def test_a_ticket_that_loses_just_the_margin_is_called_as_good_one_time_in_twenty() -> None:
    rng, called, n = np.random.default_rng(1), 0, 4000
    for _ in range(n):
        a, b = rng.normal(0.79, 0.02, 5), rng.normal(0.80, 0.02, 5)
        called += bool(stats.matching(a.tolist(), b.tolist(), margin=0.01).verdicts["non_inferiority"].matches)
    assert abs(called / n - 0.05) < 4 * math.sqrt(0.05 * 0.95 / n)


def test_what_few_seeds_cannot_say_is_said() -> None:
    one = stats.matching([0.8], [0.81])
    assert one.verdicts["strict"].matches is False and one.detectable is None
    assert {one.verdicts[rule].matches for rule in ("literal_std", "max_std", "non_inferiority")} == {None}
    two = stats.matching([0.8, 0.8], [0.81, 0.82])
    assert two.verdicts["non_inferiority"].matches is None and two.verdicts["literal_std"].matches is False
    assert "2 seeds cannot give p < 0.05" in two.note
    assert stats.matching([], [0.8]).difference is None and "no seeds" in stats.matching([], [0.8]).note
    assert stats.matching([0.8, float("nan")], [0.8]).agreed is None
    with pytest.raises(DataError, match="margin"):
        stats.matching([0.8], [0.8], margin=-0.1)


def test_the_smallest_detectable_difference_is_found_four_times_in_five() -> None:
    """By simulation of the test it is of: a paired t test over as many seeds."""
    mine, theirs = sample(0.8, 0.02), sample(0.8, 0.03)
    found = stats.matching(mine, theirs).detectable
    assert found is not None
    rng, n = np.random.default_rng(2), 4000
    shown = sum(scipy_stats.ttest_1samp(rng.normal(found, math.hypot(0.02, 0.03), 5), 0.0).pvalue < 0.05 for _ in range(n))
    assert abs(shown / n - 0.8) < 0.03


def test_scores_at_the_majority_line_are_said_to_mean_nothing() -> None:
    wnli = stats.matching([0.549] * 5, [0.549] * 5, majority=40 / 71)
    assert "says nothing" in wnli.note and wnli.agreed is True
    assert "held against is at or below" in stats.matching([0.7] * 5, [0.5] * 5, majority=0.5).note
    assert stats.matching(sample(0.7, 0.1), sample(0.7, 0.1), majority=0.5).note.startswith("5 seeds cannot")


def test_rules_that_differ_do_not_agree_and_the_text_shows_all() -> None:
    one = of_table("cola")
    assert one.agreed is None
    assert one.text.startswith("−0.700 against dense: literal_std no, max_std yes, strict no, non_inferiority")
    assert "could not be shown" in one.text


def test_the_highest_sparsity_that_matches_by_each_rule() -> None:
    dense = sample(0.90, 0.01)
    levels = {0.3: sample(0.905, 0.01), 0.5: sample(0.895, 0.01), 0.7: sample(0.885, 0.02), 0.9: sample(0.70, 0.02)}
    assert stats.highest_matching(levels, dense) == {"literal_std": 0.5, "max_std": 0.7, "strict": 0.3, "non_inferiority": 0.3}
    assert set(stats.highest_matching({0.9: [0.1] * 5}, dense).values()) == {None}


def test_transfer_gives_both_verdicts_and_counts_without_the_diagonal() -> None:
    """By hand: three sources, two targets. The mask of c is as good as each target's own, and worse than the dense models."""
    dense = {"a": sample(0.90, 0.001), "b": sample(0.80, 0.001)}
    scores = {
        ("a", "a"): sample(0.88, 0.001), ("a", "b"): sample(0.70, 0.001),
        ("b", "a"): sample(0.80, 0.001), ("b", "b"): sample(0.78, 0.001),
        ("c", "a"): sample(0.885, 0.001), ("c", "b"): sample(0.785, 0.001),
    }  # fmt: skip
    found = stats.transfers(scores, dense, majority={"a": 0.5, "b": 0.5})
    assert stats.dark_counts(found) == {"a": 0, "b": 0, "c": 2}
    of_c = {one.target: one for one in found if one.source == "c"}
    for one in of_c.values():
        assert one.vs_same_task is not None and one.vs_same_task.verdicts["strict"].matches
        assert not one.vs_dense.verdicts["max_std"].matches
        assert (one.vs_dense.against, one.vs_same_task.against) == ("dense", "same-task ticket")
    with pytest.raises(DataError, match="one mask is held against one thing"):
        stats.universal({"a": of_c["a"].vs_dense, "b": of_c["b"].vs_same_task})
    with pytest.raises(DataError, match="no dense model"):
        stats.transfers({("a", "z"): [0.5]}, dense)
    assert stats.transfers({("c", "a"): [0.5]}, dense)[0].vs_same_task is None


@pytest.mark.parametrize(
    ("level", "rows", "lost"), [(0.80, 1000, True), (0.88, 1000, False), (0.80, 50, False), (0.55, 50, True)]
)
def test_a_chain_is_given_up_only_when_it_is_certain(level: float, rows: int, lost: bool) -> None:
    assert stats.certainly_lost([level], [0.9], rows) is lost
    assert not stats.certainly_lost([], [0.9], rows)


def test_a_wide_spread_keeps_a_chain_going() -> None:
    assert stats.certainly_lost(sample(0.5, 0.01), sample(0.9, 0.01), 1000)
    assert not stats.certainly_lost(sample(0.5, 0.3), sample(0.9, 0.3), 1000)


def test_without_a_standard_deviation_the_rules_that_need_one_say_nothing() -> None:
    found = stats.matching([0.8, 0.81, 0.82], [0.8, 0.8, 0.83], std_kind="none")
    assert {name for name, one in found.verdicts.items() if one.matches is None} >= {"literal_std", "max_std"}
    assert found.verdicts["strict"].matches is True
    assert stats.highest_matching({0.5: [0.8, 0.8]}, [0.8, 0.8], std_kind="none")["max_std"] is None
