"""Losses: each against its formula worked out in plain numbers, row by row; limits; gradients by finite differences."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tombola.errors import SettingsError, TombolaError
from tombola.losses import (
    LOSSES,
    SMALLEST,
    Calibrated,
    Known,
    LearnedMixin,
    RowLosses,
    annealed,
    check_loss,
    marginal,
    reduce,
    sequence_reweight,
    teacher_as_bias,
    token_confidence_regularisation,
    tokens_of,
)

P, B, Q, C = [0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.1, 0.3], 1  # one row: model, bias, teacher, gold class


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def one_row() -> tuple[Tensor, Known]:
    # logits are log-probabilities up to a constant, which must not matter
    return logs(P) + 3.0, Known(labels=torch.tensor([C]), bias=logs(B), teacher=logs(Q))


def power(q: list[float], exponent: float) -> list[float]:
    raised = [x**exponent for x in q]
    return [x / sum(raised) for x in raised]


def cross(target: list[float], p: list[float]) -> float:
    return -sum(t * math.log(x) for t, x in zip(target, p, strict=True))


SCALED = power(Q, 1 - B[C])
# loss → (value, weight or None), by the formulas of the paper's appendix and code, in plain numbers
BY_HAND: dict[str, tuple[float, float | None]] = {
    "ce": (-math.log(0.2), None),
    "poe": (-math.log(0.2 * 0.3 / (0.7 * 0.5 + 0.2 * 0.3 + 0.1 * 0.2)), None),
    "reweight": (-math.log(0.2), 0.7),
    "conf-reg": (cross(SCALED, P), None),
    "focal": (-math.log(0.2), 0.8),
    "distillation": (cross(Q, P), None),
    "label-smoothing": (cross([0.1, 0.7 + 0.1, 0.1], P), None),
    "smoothed-reweight": (-math.log(0.2), SCALED[C]),
    "smoothed-distillation": (cross(power(Q, 0.7 + 0.5), P), None),
    "permuted-distillation": (cross([SCALED[0], SCALED[2], SCALED[1]], P), None),
    "marginal": (-math.log(0.2), None),  # a label that stands for itself
}


def test_every_loss_is_worked_out_by_hand() -> None:
    assert BY_HAND.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", BY_HAND)
def test_a_row_costs_what_its_formula_says(name: str) -> None:
    logits, known = one_row()
    value, weight = BY_HAND[name]
    found = LOSSES[name].of(logits, known)
    assert found.values.tolist() == pytest.approx([value], rel=1e-12)
    assert (found.weights is None) if weight is None else found.weights.tolist() == pytest.approx([weight], rel=1e-12)


def test_a_label_that_may_stand_for_several_classes_costs_their_summed_probability() -> None:
    logits, known = one_row()
    both = LOSSES["marginal"].of(logits, replace(known, allowed=torch.tensor([[False, True, True]])))
    assert both.values.tolist() == pytest.approx([-math.log(0.2 + 0.1)], rel=1e-12)


def test_permuted_distillation_exchanges_the_two_smaller_wherever_the_largest_is() -> None:
    for largest in range(3):
        q = [0.1, 0.1, 0.1]
        q[largest], q[(largest + 1) % 3] = 0.7, 0.2
        swapped = list(q)
        one, two = (k for k in range(3) if k != largest)
        swapped[one], swapped[two] = q[two], q[one]
        known = Known(labels=torch.tensor([0]), bias=logs([SMALLEST, 0.5, 0.5]), teacher=logs(q))  # exponent 1 − b_c ≈ 1
        found = LOSSES["permuted-distillation"].of(logs(P), known)
        assert found.values.item() == pytest.approx(cross(swapped, P), rel=1e-4)
    with pytest.raises(TombolaError, match="three classes"):
        LOSSES["permuted-distillation"].of(
            logs([0.5, 0.5]), Known(labels=torch.tensor([0]), bias=logs([0.5, 0.5]), teacher=logs([0.5, 0.5]))
        )


rows_of_logits = st.integers(2, 5).flatmap(
    lambda k: st.tuples(*[st.lists(st.floats(-4, 4), min_size=k, max_size=k) for _ in range(3)], st.integers(0, k - 1))
)


@given(rows_of_logits)
def test_losses_in_plain_numbers_for_any_row(row: tuple[list[float], list[float], list[float], int]) -> None:
    *columns, c = row
    p, b, q = (power([math.exp(x) for x in column], 1.0) for column in columns)
    known = Known(labels=torch.tensor([c]), bias=logs(b), teacher=logs(q))
    found = {name: loss.of(logs(p), known) for name, loss in LOSSES.items() if name != "permuted-distillation"}
    joint = power([x * y for x, y in zip(p, b, strict=True)], 1.0)
    assert found["poe"].values.item() == pytest.approx(-math.log(joint[c]), rel=1e-9, abs=1e-9)
    assert found["conf-reg"].values.item() == pytest.approx(cross(power(q, 1 - b[c]), p), rel=1e-9)
    smooth = [(1 - b[c]) * (j == c) + b[c] / len(p) for j in range(len(p))]
    assert found["label-smoothing"].values.item() == pytest.approx(cross(smooth, p), rel=1e-9)


def by_differences(f: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    found = torch.zeros_like(at)
    for i in range(at.numel()):
        one = torch.zeros_like(at).flatten()
        one[i] = step
        one = one.reshape(at.shape)
        found.view(-1)[i] = (f(at + one) - f(at - one)) / (2 * step)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_central_differences_and_none_reach_bias_teacher_or_weights(name: str) -> None:
    torch.manual_seed(0)
    logits, bias, teacher = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    known = Known(labels=torch.tensor([0, 1, 2, 1]), bias=bias.log_softmax(-1), teacher=teacher.log_softmax(-1))
    weights = LOSSES[name].of(logits, known).weights

    def loss(x: Tensor) -> Tensor:  # weights are constants, also focal's, which are made of p
        return reduce(RowLosses(LOSSES[name].of(x, known).values, weights))

    moved = logits.clone().requires_grad_()
    reduce(LOSSES[name].of(moved, known)).backward()
    assert torch.allclose(moved.grad, by_differences(loss, logits), atol=1e-8)


def test_a_bias_that_is_indifferent_changes_nothing_and_one_that_is_sure_takes_the_row_away() -> None:
    logits, labels = logs(P, P), torch.tensor([1, 1])
    flat = Known(labels=labels, bias=logs([1 / 3] * 3, [1 / 3] * 3), teacher=logs(Q, Q))
    assert LOSSES["poe"].of(logits, flat).values == pytest.approx(LOSSES["ce"].of(logits, flat).values)
    sure = Known(labels=labels, bias=logs([0.0, 1.0, 0.0], [0.0, 1.0, 0.0]), teacher=logs(Q, Q))
    assert LOSSES["poe"].of(logits, sure).values.max() < 1e-4
    assert LOSSES["reweight"].of(logits, sure).weights.max() < 1e-5
    uniform = LOSSES["conf-reg"].of(logits, sure).values[0].item()
    assert uniform == pytest.approx(cross([1 / 3] * 3, P), rel=1e-4)


def test_a_bias_of_probability_zero_costs_much_and_not_infinitely_much() -> None:
    known = Known(labels=torch.tensor([1]), bias=logs([0.5, 0.0, 0.5]))
    value = LOSSES["poe"].of(logs(P), known).values
    assert math.isfinite(value.item()) and value.item() == pytest.approx(-math.log(0.2 * SMALLEST / (0.8 * 0.5)), rel=1e-3)


def test_when_all_weights_are_zero_the_loss_and_its_gradients_are_zero() -> None:
    logits = logs(P, P).requires_grad_()
    loss = reduce(
        RowLosses(LOSSES["ce"].of(logits, Known(labels=torch.tensor([0, 1]))).values, torch.zeros(2, dtype=torch.float64))
    )
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_the_three_ways_to_average() -> None:
    rows = RowLosses(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.25]))
    assert reduce(rows).item() == pytest.approx((0.5 + 0.75) / 0.75)
    assert reduce(rows, "none").item() == pytest.approx((0.5 + 0.75) / 2)
    assert reduce(rows, "dataset_mean", 0.4).item() == pytest.approx((0.5 + 0.75) / 2 / 0.4)
    assert reduce(RowLosses(torch.tensor([1.0, 3.0]))).item() == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_rows(bad: float) -> None:
    with pytest.raises(TombolaError, match="not a finite number") as error:
        reduce(RowLosses(torch.tensor([1.0, bad, 2.0, bad])))
    assert "rows 1, 3" in str(error.value)


def test_annealing_goes_from_the_bias_to_its_power() -> None:
    for share, theta in ((0.0, 1.0), (0.5, 0.9), (1.0, 0.8)):
        assert annealed(logs(B), share).exp()[0].tolist() == pytest.approx(power(B, theta))


def test_a_teacher_can_stand_in_for_the_bias() -> None:
    logits, known = one_row()
    found = LOSSES["reweight"].of(logits, teacher_as_bias(known))
    assert found.weights.item() == pytest.approx(1 - Q[C])


def test_the_marginal_loss_sums_over_what_is_allowed() -> None:
    allowed = torch.tensor([[False, True, True], [True, False, False]])
    assert marginal(logs(P, P), allowed).values.tolist() == pytest.approx([-math.log(0.3), -math.log(0.7)])


def test_learned_mixin_and_its_entropy() -> None:
    mixin = LearnedMixin(2, penalty=0.5).double()
    with torch.no_grad():
        mixin.gate.weight.copy_(torch.tensor([[1.0, -2.0]]))
        mixin.gate.bias.fill_(0.25)
    hidden = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    logits, known = one_row()
    g = math.log1p(math.exp(0.5 - 0.2 + 0.25))
    joint, scaled = power([p * b**g for p, b in zip(P, B, strict=True)], 1.0), power(B, g)
    wanted = -math.log(joint[C]) + 0.5 * cross(scaled, scaled)
    known = Known(labels=known.labels, bias=known.bias, hidden=hidden)
    assert mixin(logits, known).values.item() == pytest.approx(wanted, rel=1e-9)
    mixin.penalty = 0.0
    assert mixin(logits, known).values.item() == pytest.approx(-math.log(joint[C]), rel=1e-9)
    with pytest.raises(TombolaError, match="no hidden state"):
        mixin(logits, one_row()[1])


def test_a_temperature_is_learned_from_one() -> None:
    calibrated = Calibrated().double()
    logits, known = one_row()
    assert calibrated(logits, known).values.item() == pytest.approx(-math.log(0.2))
    with torch.no_grad():
        calibrated.log_temperature.fill_(math.log(2.0))
    assert calibrated(logits, known).values.item() == pytest.approx(-math.log(power(P, 0.5)[C]))


def test_tokens_are_rows() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, -100], [4, 0, -100, -100]])
    bias = torch.randn(2, 4, 5).log_softmax(-1)
    found, known, rows = tokens_of(logits, labels, bias)
    assert rows.tolist() == [0, 0, 1] and known.labels.tolist() == [2, 3, 0]
    assert torch.equal(found, torch.stack([logits[0, 0], logits[0, 1], logits[1, 0]]))
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1))
    assert reduce(LOSSES["ce"].of(found, known)).item() == pytest.approx(whole.item())
    weights = sequence_reweight(found, known, rows).weights
    first = (bias[0, 0, 2] + bias[0, 1, 3]) / 2
    assert weights.tolist() == pytest.approx([1 - math.exp(x) for x in (first, first, bias[1, 0, 0])], rel=1e-5)


def test_token_confidence_regularisation_takes_the_likeliest_alone() -> None:
    logits, known = one_row()
    best = {0: SCALED[0], 2: SCALED[2]}
    total = sum(best.values())
    wanted = -sum(x / total * math.log(P[j]) for j, x in best.items())
    assert token_confidence_regularisation(logits, known, top=2).values.item() == pytest.approx(wanted)
    everything = token_confidence_regularisation(logits, known, top=50).values
    assert everything.item() == pytest.approx(LOSSES["conf-reg"].of(logits, known).values.item())


def test_what_a_loss_needs_is_asked_for_before_it_runs() -> None:
    assert check_loss("conf-reg", ("bias", "teacher")) is LOSSES["conf-reg"]
    with pytest.raises(SettingsError, match="bias-only model") as error:
        check_loss("conf-reg", ())
    assert len(error.value.problems) == 2
    with pytest.raises(SettingsError, match="unknown loss 'pie'"):
        check_loss("pie", ("bias",))
    for name, loss in LOSSES.items():
        if loss.needs:
            with pytest.raises(TombolaError, match="needs the log-probabilities"):
                loss.of(logs(P), Known(labels=torch.tensor([0])))
        else:
            assert loss.of(logs(P), Known(labels=torch.tensor([0]))).values.isfinite().all(), name
