"""s-pruning against traces worked by hand on a scripted pass, and a real search scored anew by other means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import sentiment, tiny_model, trained_on_sentiment
from tombola.errors import MaskError, SearchError
from tombola.evaluate import Predictions, Score, predict, score
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.scores import GateGradients, Importance
from tombola.search import SEARCHES, structured
from tombola.search.structured import SPruneResult, SPruneSettings, floor_score, remove_lowest, s_prune
from tombola.tasks.encode import TOKENS_PER_BATCH, Encoded, by_length

ROWS = 100  # of a scripted pass: one row is one hundredth of accuracy
NOTHING = Encoded(("a",), ({"input_ids": (5,)},), (0,), 0, {"input_ids": 0})


@dataclass
class Script:
    """Stands in for `score_and_gradients`: pass t scores `scores[t]` (the last for ever) and finds the parts in
    `weak[t]` least important, the first named the weakest. Says under which masks it was called."""

    scores: Sequence[float]
    weak: Sequence[Sequence[tuple[int, int] | int]] = ((),)  # a pair is a head, a number an MLP
    masks: list[Mask] = field(default_factory=list)

    def __call__(self, gates: Gates, encoded: Encoded) -> tuple[Predictions, GateGradients]:
        t = len(self.masks)
        self.masks.append(gates.mask)
        heads, mlps = (
            torch.ones(gates.anatomy.n_layers, gates.anatomy.n_heads).double(),
            torch.ones(gates.anatomy.n_layers).double(),
        )
        for rank, part in enumerate(self.weak[min(t, len(self.weak) - 1)]):
            if isinstance(part, tuple):
                heads[part] = 1e-6 * (rank + 1)
            else:
                mlps[part] = 1e-6 * (rank + 1)
        right = round(self.scores[min(t, len(self.scores) - 1)] * ROWS)
        labels = [0, 1] * (ROWS // 2)
        answered = torch.tensor([label if i < right else 1 - label for i, label in enumerate(labels)])
        logits = torch.nn.functional.one_hot(answered, 2).float()
        ids = tuple(map(str, range(ROWS)))
        return Predictions(ids, logits, tuple(labels)), GateGradients(
            heads.expand(ROWS, -1, -1).clone(), mlps.expand(ROWS, -1).clone(), logits
        )


@pytest.fixture(scope="module")
def gates() -> Gates:
    """Of 3 layers × 4 heads: 12 heads and 3 MLPs."""
    return Gates(tiny_model("bert", layers=3))


Play = Callable[..., tuple[SPruneResult, list[Mask]]]


@pytest.fixture
def play(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> Play:
    def run(script: Script, settings: SPruneSettings, on: Gates = gates) -> tuple[SPruneResult, list[Mask]]:
        monkeypatch.setattr(structured, "score_and_gradients", script)
        return s_prune(on, NOTHING, "accuracy", settings), script.masks

    return run


def without(*parts: tuple[int, int] | int, layers: int = 3, heads: int = 4) -> Mask:
    kept_heads, kept_mlps = torch.ones(layers, heads, dtype=torch.bool), torch.ones(layers, dtype=torch.bool)
    for part in parts:
        (kept_heads if isinstance(part, tuple) else kept_mlps)[part] = False
    return Mask(heads=kept_heads, mlps=kept_mlps)


def kept(mask: Mask) -> tuple[int, int]:
    counts = mask.counts()
    return counts["heads"][0], counts["mlps"][0]


# Steps of 3 heads (a quarter) and 1 MLP, then 1 head (a twelfth), then 1 MLP.
STEPS = SPruneSettings(s_head_step=0.25, s_heads_only_phase_step=1 / 12)


# the procedure


def test_joint_procedure_follows_the_trace_worked_by_hand(play: Play) -> None:
    script = Script(
        #        full  joint joint heads heads heads mlps  mlps
        scores=(1.00, 0.95, 0.80, 0.92, 0.91, 0.89, 0.90, 0.50),
        weak=(
            ((0, 0), (1, 1), (2, 2), 1),
            ((0, 1), (1, 0), (2, 3), 0),
            ((2, 0), 2),  # a failed pass: its scores may not be used
            ((1, 0), 0),
            ((1, 2), 0),
            ((2, 3), 2),  # failed
            (2,),
        ),
    )
    result, masks = play(script, STEPS)
    one = ((0, 0), (1, 1), (2, 2), 1)
    assert masks == [
        without(),
        without(*one),
        without(*one, (0, 1), (1, 0), (2, 3), 0),  # fails
        without(*one, (0, 1)),  # heads only, from the first joint step and by its scores
        without(*one, (0, 1), (1, 0)),
        without(*one, (0, 1), (1, 0), (1, 2)),  # fails
        without(*one, (0, 1), (1, 0), 0),  # MLPs only; 0.90 holds a floor of 0.90
        without(*one, (0, 1), (1, 0), 0, 2),  # fails
    ]
    assert result.mask == masks[6]
    assert [trial.mask for trial in result.trials] == masks
    assert [trial.phase for trial in result.trials] == ["full", "joint", "joint", *["heads"] * 3, *["mlps"] * 2]
    assert [trial.passed for trial in result.trials] == [True, True, False, True, True, False, True, False]
    assert [trial.score.value for trial in result.trials] == pytest.approx([*script.scores])
    assert result.floor_score == 0.9
    assert float(result.trials[1].importance.heads[0, 1]) == pytest.approx(1e-6)


def test_keep_failed_starts_each_phase_from_the_scores_of_the_mask_that_failed(play: Play) -> None:
    script = Script(
        #        full  joint heads heads mlps  mlps
        scores=(1.00, 0.80, 0.95, 0.80, 0.95, 0.80),
        weak=(
            ((0, 0), (1, 1), (2, 2), 1),
            ((0, 3), 0),  # joint, failed
            ((1, 0), 1),  # heads
            ((1, 2), 2),  # heads, failed
            (0,),
        ),
    )
    for rule, head, mlp in (("recompute", (0, 0), 1), ("keep_failed", (0, 3), 2)):
        result, masks = play(replace(script, masks=[]), replace(STEPS, rollback_importance=rule))
        assert masks[2:] == [
            without(head),
            without(head, (1, 0)),  # fails
            without(head, mlp),
            without(head, mlp, 0),  # fails
        ]
        assert result.mask == without(head, mlp)


@pytest.mark.parametrize(
    ("procedure", "steps"),
    [
        ("joint", [(12, 3), (9, 2), (6, 1), (3, 0), (0, 0)]),
        ("heads", [(12, 3), (9, 3), (6, 3), (3, 3), (0, 3)]),
        ("mlps", [(12, 3), (12, 2), (12, 1), (12, 0)]),
    ],
)
def test_when_everything_passes_the_search_ends_with_nothing_left(
    play: Play, procedure: Any, steps: list[tuple[int, int]]
) -> None:
    result, masks = play(Script(scores=(0.9,)), replace(STEPS, procedure=procedure))
    assert [kept(mask) for mask in masks] == steps
    assert result.mask == masks[-1]
    assert result.mask.is_empty == (procedure == "joint")


def test_the_last_heads_go_even_when_fewer_than_a_step_are_left(play: Play) -> None:
    _, masks = play(Script(scores=(0.9,)), replace(STEPS, s_head_step=5 / 12))
    assert [kept(mask) for mask in masks] == [(12, 3), (7, 2), (2, 1), (0, 0)]


def test_when_nothing_passes_the_full_mask_is_the_answer_after_one_try_a_phase(play: Play) -> None:
    result, masks = play(Script(scores=(1.0, 0.5)), STEPS)
    assert [kept(mask) for mask in masks] == [(12, 3), (9, 2), (11, 3), (12, 2)]
    assert result.mask == without()
    assert [trial.passed for trial in result.trials] == [True, False, False, False]


def test_a_score_of_exactly_the_floor_holds_it_in_floating_point_too(play: Play) -> None:
    assert 0.9 * 0.8 > 0.72  # the trap: 72 of 100 rows are nine tenths of 80
    result, _ = play(Script(scores=(0.80, 0.72, 0.71)), STEPS)
    assert [trial.passed for trial in result.trials[:3]] == [True, True, False]


@pytest.mark.parametrize(("layers", "heads", "steps"), [(12, 12, (14, 7)), (6, 12, (7, 3)), (3, 4, (1, 1))])
def test_default_steps_are_14_7_and_1_for_bert_base_and_7_3_and_1_for_half_of_it(
    play: Play, layers: int, heads: int, steps: tuple[int, int]
) -> None:
    n = layers * heads
    with Gates(tiny_model("bert", layers=layers, heads=heads)) as gates:
        _, masks = play(Script(scores=(1.0, 1.0, 1.0, 0.5, 1.0, 0.5)), SPruneSettings(), gates)
    assert [kept(mask) for mask in masks] == [
        (n, layers),
        (n - steps[0], layers - 1),
        (n - 2 * steps[0], layers - 2),
        (n - 3 * steps[0], layers - 3),  # fails
        (n - 2 * steps[0] - steps[1], layers - 2),
        (n - 2 * steps[0] - 2 * steps[1], layers - 2),  # fails
        (n - 2 * steps[0] - steps[1], layers - 3),  # fails
    ]


def test_whether_removed_heads_weigh_in_the_norm_is_the_settings_choice(play: Play) -> None:
    # Of layer 0 a strong head is gone, and the rest are weak: over their own norm they are large, over all of it the smallest.
    weak = (((0, 0),), ((0, 1), (0, 2), (0, 3), (1, 0)))
    heads_only = SPruneSettings(procedure="heads", s_head_step=1 / 12)
    for members, second in (("remaining_heads", (1, 0)), ("all_heads", (0, 1))):
        _, masks = play(Script((1.0, 1.0, 0.5), weak), replace(heads_only, importance_norm_members=members))
        assert masks[1:] == [without((0, 0)), without((0, 0), second)]


@pytest.mark.parametrize(
    ("reduction", "batch_size", "first"),
    # Head (1, 2) has gradients 2, −2, 2, … and all others 1. Row by row it is strong, so that its neighbours have the
    # smallest shares of their layer; in pairs it is nothing; summed up batch by batch its 2, 0, 2, … falls behind 1, 2, 3, …
    [("per_example", 2, (1, 0)), ("per_batch", 1, (1, 0)), ("per_batch", 2, (1, 2)), ("accumulated", 1, (1, 2))],
)
def test_rows_are_reduced_as_the_settings_say(
    gates: Gates, monkeypatch: pytest.MonkeyPatch, reduction: Any, batch_size: int, first: tuple[int, int]
) -> None:
    script = Script(scores=(1.0, 0.5))

    def with_signs(gates: Gates, encoded: Encoded) -> tuple[Predictions, GateGradients]:
        predictions, gradients = script(gates, encoded)
        gradients.heads[:, 1, 2] = 2.0
        gradients.heads[1::2, 1, 2] = -2.0
        return predictions, gradients

    monkeypatch.setattr(structured, "score_and_gradients", with_signs)
    options = SPruneSettings(procedure="heads", importance_reduction=reduction, importance_batch_size=batch_size)
    assert s_prune(gates, NOTHING, "accuracy", options).trials[1].mask == without(first)


def test_gates_are_open_after_a_search_that_ends_and_after_one_that_cannot_start(play: Play, gates: Gates) -> None:
    play(Script(scores=(1.0, 0.95, 0.5)), STEPS)
    assert gates.mask == without()
    gates.set(without((0, 0)))
    with pytest.raises(SearchError):
        play(Script(scores=(0.5,)), STEPS)
    assert gates.mask == without()


def test_progress_hears_of_every_trial_in_order(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "score_and_gradients", Script(scores=(1.0, 0.95, 0.5)))
    told: list[Any] = []
    assert s_prune(gates, NOTHING, "accuracy", STEPS, told.append).trials == tuple(told)


def test_the_search_is_found_by_its_name_on_the_command_line() -> None:
    assert SEARCHES["s-prune"] == (s_prune, SPruneSettings)


# remove_lowest


def test_heads_compete_over_layers_by_their_share_of_their_layers_norm() -> None:
    # layer 0: norm 5, shares .6 and .8; layer 1: norm 100, shares .28 and .96: the smallest share is layer 1's 28
    importance = Importance(torch.tensor([[3.0, 4.0], [28.0, 96.0]]).double(), torch.tensor([0.2, 0.1]).double())
    start = without(layers=2, heads=2)
    assert remove_lowest(start, importance, {"heads": 1, "mlps": 0}) == without((1, 0), layers=2, heads=2)
    assert remove_lowest(start, importance, {"heads": 2, "mlps": 1}) == without((1, 0), (0, 0), 1, layers=2, heads=2)


def test_removed_heads_weigh_in_the_norm_only_when_all_heads_are_members() -> None:
    # layer 0 lost a head of 24; what is left is 7 of 7, or 7 of 25. Layer 1: 3 and 4 of 5
    importance = Importance(torch.tensor([[24.0, 7.0], [3.0, 4.0]]).double(), torch.ones(2).double())
    start = without((0, 0), layers=2, heads=2)
    assert remove_lowest(start, importance, {"heads": 1}, SPruneSettings(importance_norm_members="remaining_heads")) == without(
        (0, 0), (1, 0), layers=2, heads=2
    )
    assert remove_lowest(start, importance, {"heads": 1}, SPruneSettings(importance_norm_members="all_heads")) == without(
        (0, 0), (0, 1), layers=2, heads=2
    )


def test_equal_heads_and_mlps_go_in_order_of_position() -> None:
    importance = Importance(torch.ones(2, 2).double(), torch.ones(2).double())
    assert remove_lowest(without(layers=2, heads=2), importance, {"heads": 3, "mlps": 1}) == without(
        (0, 0), (0, 1), (1, 0), 0, layers=2, heads=2
    )


def test_a_score_that_is_no_number_stops_the_search() -> None:
    importance = Importance(torch.tensor([[1.0, float("nan")], [1.0, 1.0]]).double(), torch.ones(2).double())
    with pytest.raises(MaskError, match="NaN"):
        remove_lowest(without(layers=2, heads=2), importance, {"heads": 1})


# floor_score


def accuracy(value: float, majority: float) -> Score:
    return Score("accuracy", value, 200, majority)


def test_floors_are_those_worked_by_hand() -> None:
    assert floor_score(accuracy(0.8, 0.5), 0.9, "fraction_of_full") == pytest.approx(0.72)
    assert floor_score(accuracy(0.8, 0.5), 0.9, "fraction_above_baseline") == pytest.approx(0.5 + 0.9 * 0.3)
    assert floor_score(Score("matthews", 0.4, 200, 0.0), 0.9, "fraction_above_baseline") == pytest.approx(0.36)
    for rule in ("fraction_of_full", "fraction_above_baseline"):
        assert floor_score(accuracy(0.8, 0.5), 1.0, rule) == pytest.approx(0.8)


@pytest.mark.parametrize("value", [0.34, 0.56])
def test_a_model_no_better_than_the_majority_line_is_refused_and_the_other_rule_offered(value: float) -> None:
    with pytest.raises(SearchError, match="not better than the majority line") as error:
        floor_score(accuracy(value, 0.56), 0.9, "fraction_of_full")
    assert "fraction_above_baseline" in str(error.value)
    assert "0.5600" in str(error.value)
    assert f"{value:.4f} on 200 selection rows" in str(error.value)


@pytest.mark.parametrize(("metric", "answer"), [("accuracy", "the most frequent class"), ("pearson", "one and the same value")])
def test_a_refused_floor_says_what_the_majority_line_is_of(metric: str, answer: str) -> None:
    with pytest.raises(SearchError) as error:
        floor_score(Score(metric, -0.1, 50, 0.0), 0.9, "fraction_of_full")
    assert f"what always answering {answer} scores" in str(error.value)


def test_with_nothing_above_the_baseline_the_full_score_itself_is_the_floor() -> None:
    # 0.56 + 0.9 · (0.34 − 0.56) = 0.362 would be more than the full model has
    assert floor_score(accuracy(0.34, 0.56), 0.9, "fraction_above_baseline") == 0.34


# a real model


@dataclass(frozen=True)
class Learned:
    model: Any
    selection: Encoded


@pytest.fixture(scope="module")
def learned(tiny_folder: Path) -> Learned:
    return Learned(trained_on_sentiment(tiny_folder), sentiment(tiny_folder, 90, 2))


def scaled(model: Any, mask: Mask) -> Any:
    """The model with what `mask` removes set to zero in the weights of a copy: no gates."""
    import copy

    from tombola.anatomy import read_anatomy

    anatomy, copied = read_anatomy(model), copy.deepcopy(model)
    assert mask.heads is not None and mask.mlps is not None
    with torch.no_grad():
        for layer, heads, mlp in zip(anatomy.layers, mask.heads, mask.mlps, strict=True):
            columns: Tensor = heads.repeat_interleave(layer.attention.d_head)
            copied.get_submodule(layer.attention.o.path).weight.mul_(columns)
            for parameter in copied.get_submodule(layer.mlp.out.path).parameters():
                parameter.mul_(mlp)
    return copied


@pytest.mark.parametrize("procedure", ["joint", "heads", "mlps"])
def test_the_ticket_of_a_trained_model_holds_the_floor_when_scored_anew(learned: Learned, procedure: Any) -> None:
    before = {name: value.clone() for name, value in learned.model.state_dict().items()}
    with Gates(learned.model) as gates:
        result = s_prune(gates, learned.selection, "accuracy", SPruneSettings(procedure=procedure))
        assert gates.mask == gates.anatomy.full_mask()
    full = score(predict(learned.model, learned.selection), "accuracy").value
    assert full > 0.9
    assert result.floor_score == pytest.approx(0.9 * full)
    for trial in result.trials:
        with Gates(learned.model, mask=trial.mask):
            found = score(predict(learned.model, learned.selection), "accuracy").value
        assert found == trial.score.value
        assert found == score(predict(scaled(learned.model, trial.mask), learned.selection), "accuracy").value
        assert trial.passed == (found >= result.floor_score - 1e-9)
    assert result.mask == [trial.mask for trial in result.trials if trial.passed][-1]
    assert not result.mask.removes_nothing
    assert all(torch.equal(value, before[name]) for name, value in learned.model.state_dict().items())


def test_a_trial_costs_one_pass_over_the_selection_rows(learned: Learned) -> None:
    calls: list[int] = []
    handle = learned.model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    with Gates(learned.model) as gates:
        calls.clear()  # reading the anatomy probed the model
        result = s_prune(gates, learned.selection, "accuracy", SPruneSettings())
    handle.remove()
    lengths = learned.selection.lengths
    batches = by_length(learned.selection, TOKENS_PER_BATCH)
    tokens = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert len(calls) == len(result.trials) * len(batches)
    assert sum(calls) == len(result.trials) * tokens


def test_a_search_is_the_same_every_time(learned: Learned) -> None:
    with Gates(learned.model) as gates:
        first, second = (s_prune(gates, learned.selection, "accuracy", SPruneSettings()) for _ in range(2))
    assert [trial.mask for trial in first.trials] == [trial.mask for trial in second.trials]
    assert all(torch.equal(a.importance.heads, b.importance.heads) for a, b in zip(first.trials, second.trials, strict=True))
