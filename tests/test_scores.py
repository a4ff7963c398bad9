"""Gate gradients against what knows no gates: weights scaled by hand, one row at a time, no padding, fp64."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from conftest import TINY, tiny_model
from tombola.anatomy import read_anatomy
from tombola.criteria import Given, mean_gradients
from tombola.errors import DataError
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.scores import REDUCTIONS, GateGradients, gate_gradients, normalise, sensitivity
from tombola.tasks.encode import Encoded, batches, collate

N = 7
HOLED = Mask(heads=torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]).bool(), mlps=torch.tensor([True, False]))
FULL = Mask(heads=torch.ones(2, 4, dtype=torch.bool), mlps=torch.ones(2, dtype=torch.bool))


def random_rows(n: int, family: str = "bert", seed: int = 0) -> Encoded:
    """Rows of 3 to 14 random tokens, no two of them alike, with random labels."""
    rng = np.random.default_rng(seed)
    inputs = tuple({"input_ids": tuple(int(t) for t in rng.integers(5, 60, rng.integers(3, 15)))} for _ in range(n))
    labels = tuple(int(label) for label in rng.integers(0, 2, n))
    return Encoded(tuple(f"row:{i}" for i in range(n)), inputs, labels, 0, {"input_ids": TINY[family].get("pad_token_id", 0)})


def one_by_one(model: Any, mask: Mask, rows: Encoded) -> tuple[Tensor, Tensor, Callable[[int, Tensor, Tensor], Tensor]]:
    """(gates of heads, gates of MLPs, loss of one row at such gates), by scaling weights: a gate on a head is a factor on its
    columns of o, a gate on an MLP a factor on weight and bias of its last projection."""
    anatomy, weights = read_anatomy(model), {name: p.detach() for name, p in model.named_parameters()}
    assert mask.heads is not None and mask.mlps is not None

    def loss(row: int, heads: Tensor, mlps: Tensor) -> Tensor:
        scaled = dict(weights)
        for i, layer in enumerate(anatomy.layers):
            scaled[f"{layer.attention.o.path}.weight"] = weights[f"{layer.attention.o.path}.weight"] * (
                heads[i].repeat_interleave(layer.attention.d_head)
            )
            for part in ("weight", "bias"):
                scaled[f"{layer.mlp.out.path}.{part}"] = weights[f"{layer.mlp.out.path}.{part}"] * mlps[i]
        alone = {"input_ids": torch.tensor([rows.inputs[row]["input_ids"]])}
        logits = functional_call(model, scaled, kwargs=alone).logits[0]
        return torch.logsumexp(logits, 0) - logits[rows.labels[row]]

    return mask.heads.double(), mask.mlps.double(), loss


def by_autograd(model: Any, mask: Mask, rows: Encoded) -> tuple[Tensor, Tensor]:
    heads, mlps, loss = one_by_one(model, mask, rows)
    heads.requires_grad_()
    mlps.requires_grad_()
    pairs = [torch.autograd.grad(loss(row, heads, mlps), (heads, mlps)) for row in range(len(rows))]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def scored(model: Any, mask: Mask, rows: Encoded, tokens_per_batch: int = 40) -> GateGradients:
    with Gates(model, mask=mask) as gates:
        return gate_gradients(gates, batches(rows, tokens_per_batch), len(rows))


def largest_relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / b.abs()).max())


# gate_gradients: the right number


@pytest.mark.parametrize("mask", [FULL, HOLED], ids=["full", "holed"])
def test_gradients_are_the_central_differences_of_each_rows_own_loss(family: str, mask: Mask) -> None:
    model, rows, h = tiny_model(family).double(), random_rows(3, family), 1e-4
    heads, mlps, loss = one_by_one(model, mask, rows)
    found = scored(model, mask, rows)
    with torch.no_grad():
        for row in range(len(rows)):
            for gates, got in ((heads.view(-1), found.heads[row].view(-1)), (mlps, found.mlps[row])):
                for i in range(len(gates)):
                    at, ends = float(gates[i]), []
                    for step in (h, -h):
                        gates[i] = at + step
                        ends.append(float(loss(row, heads, mlps)))
                    gates[i] = at
                    assert float(got[i]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-8)
    assert found.heads.abs().min() > 1e-6  # nothing above compared zero with zero


@pytest.mark.parametrize("mask", [FULL, HOLED], ids=["full", "holed"])
def test_gradients_are_those_of_autograd_one_row_at_a_time_without_padding(family: str, mask: Mask) -> None:
    model, rows = tiny_model(family).double(), random_rows(N, family)
    found, (heads, mlps) = scored(model, mask, rows), by_autograd(model, mask, rows)
    assert found.heads.dtype == found.mlps.dtype == torch.float64
    assert largest_relative(found.heads, heads) < 1e-6
    assert largest_relative(found.mlps, mlps) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_the_model_is_sure_of_keeps_its_digits(dtype: torch.dtype) -> None:
    # p(label) is about 1 − 1e-7: in an fp32 loss, p − 1 is one of two or three numbers
    model, rows = tiny_model("bert").double(), random_rows(N)
    with torch.no_grad():
        model.classifier.weight.mul_(0.1)
        model.classifier.bias.copy_(torch.tensor([-8.0, 8.0]))
    sure = Encoded(rows.ids, rows.inputs, (1,) * N, 0, rows.pad)
    heads, _ = by_autograd(model, FULL, sure)
    found = scored(model.to(dtype), FULL, sure).heads
    assert float(heads.abs().max()) < 1e-7
    assert float((found - heads).abs().max() / heads.abs().max()) < (1e-7 if dtype == torch.float64 else 1e-5)


# gate_gradients: what it may not depend on


def unevenly(rows: Encoded, *groups: list[int], extra: int = 0) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The rows in these groups, each with `extra` more padding than it needs."""
    for group in groups:
        inputs = collate(rows, group)
        for name, value in (("input_ids", rows.pad["input_ids"]), ("attention_mask", 0)):
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, extra), value=value)
        yield torch.tensor(group), inputs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_batch_size_order_and_padding_play_no_part(family: str, dtype: torch.dtype, tolerance: float) -> None:
    # measured: 1e-12 in fp64 for every single gradient, 1e-6 in fp32 for the importance
    model, rows = tiny_model(family).to(dtype), random_rows(N, family)
    ways: list[tuple[list[list[int]], int]] = [
        ([[i] for i in range(N)], 0),
        ([list(range(N))], 0),
        ([[6, 0], [3, 5, 1], [4, 2]], 0),
        ([[6, 0], [3, 5, 1], [4, 2]], 9),
    ]
    with Gates(model, mask=HOLED) as gates:
        first, *others = [gate_gradients(gates, unevenly(rows, *groups, extra=extra), N) for groups, extra in ways]
    for other in others:
        for name in ("heads", "mlps"):
            a, b = getattr(other, name), getattr(first, name)
            assert largest_relative(a.abs().mean(0), b.abs().mean(0)) < tolerance
            if dtype == torch.float64:
                assert largest_relative(a, b) < tolerance


def test_rows_come_back_in_the_order_of_their_numbers_with_the_logits_of_the_mask() -> None:
    model, rows = tiny_model("bert"), random_rows(N)
    found = scored(model, HOLED, rows, tokens_per_batch=30)
    with Gates(model, mask=HOLED), torch.no_grad():
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows.inputs]
    torch.testing.assert_close(found.logits, torch.stack(alone), rtol=0, atol=1e-5)
    assert len({round(float(logit), 4) for logit in found.logits[:, 0]}) == N  # rows differ: a permutation would be seen


# gate_gradients: what it leaves behind


@pytest.mark.parametrize("fails", [False, True], ids=["done", "interrupted"])
def test_model_and_gates_are_left_as_they_were(fails: bool) -> None:
    model, rows = tiny_model("bert").train(), random_rows(N)
    frozen = {name for name, p in model.named_parameters() if "embeddings" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)

    def until_failure() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for i, batch in enumerate(unevenly(rows, [0, 1], [2, 3], [4, 5, 6])):
            if fails and i == 2:
                raise KeyboardInterrupt
            yield batch

    with Gates(model, mask=HOLED) as gates:
        before = model.eval()(**collate(rows, [0, 1, 2, 3])).logits
        model.train()
        if fails:
            with pytest.raises(KeyboardInterrupt):
                gate_gradients(gates, until_failure(), N)
        else:
            gate_gradients(gates, until_failure(), N)
        assert gates.mask == HOLED
        assert model.training and all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
        assert torch.equal(model.eval()(**collate(rows, [0, 1, 2, 3])).logits, before)  # a batch of another size


def test_dropout_is_off_and_the_callers_no_grad_is_no_obstacle() -> None:
    model, rows = tiny_model("bert"), random_rows(N)
    calm = scored(model, FULL, rows)
    assert model.config.hidden_dropout_prob > 0
    with torch.no_grad():
        assert torch.equal(scored(model.train(), FULL, rows).heads, calm.heads)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([[0, 1], [2, 3]], "3 missing, 0 twice"),
        ([[0, 1], [2, 3], [4, 5, 6], [1]], "0 missing, 1 twice"),
        ([[0, 1, 1], [2, 2, 3], [4, 5]], "1 missing, 2 twice"),  # twice within a batch
        ([], "7 missing, 0 twice"),
    ],
)
def test_rows_that_are_missing_or_come_twice_are_refused(groups: list[list[int]], said: str) -> None:
    with Gates(tiny_model("bert")) as gates, pytest.raises(DataError, match="exactly once") as error:
        gate_gradients(gates, unevenly(random_rows(N), *groups), N)
    assert error.value.got == said


# reductions


def test_reductions_of_three_rows_are_those_worked_by_hand() -> None:
    # batches of two: means −0.5 and 3; the sums so far −0.5 and 2.5
    rows = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    assert {name: float(reduce(rows, 2)) for name, reduce in REDUCTIONS.items()} == {
        "per_example": 2.0,
        "fisher": 14 / 3,
        "per_batch": 3.5,
        "accumulated": 3.0,
    }


def test_order_and_batch_size_matter_in_the_released_code_and_never_per_example() -> None:
    rows = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    other = rows[[0, 2, 1]]  # batches of two: means 2 and −2, sums so far 2 and 0
    assert [float(REDUCTIONS["accumulated"](x, 2)) for x in (rows, other)] == [3.0, 2.0]
    assert [float(REDUCTIONS["per_batch"](x, 2)) for x in (rows, other)] == [3.5, 4.0]
    # batches of one: sums so far 1, −1, 2; of three: 2/3
    assert [float(REDUCTIONS["accumulated"](rows, size)) for size in (1, 3)] == pytest.approx([4.0, 2 / 3])
    assert [float(REDUCTIONS["per_batch"](rows, size)) for size in (1, 3)] == pytest.approx([6.0, 2 / 3])
    assert {float(REDUCTIONS["per_example"](x, size)) for x in (rows, other) for size in (1, 2, 3)} == {2.0}


@pytest.mark.parametrize("zeroed", [True, False], ids=["per_batch", "accumulated"])
def test_reductions_are_what_backward_leaves_on_a_gate_with_and_without_zeroing(zeroed: bool) -> None:
    # the released loop: backward of the mean loss of each batch, importance += |grad|, the gradient never zeroed
    model, rows = tiny_model("bert").double(), random_rows(N)
    heads, mlps, loss = one_by_one(model, HOLED, rows)
    heads.requires_grad_()
    mlps.requires_grad_()
    summed = [torch.zeros_like(heads), torch.zeros_like(mlps)]
    for start in range(0, N, 3):
        batch = range(start, min(start + 3, N))
        torch.stack([loss(row, heads, mlps) for row in batch]).mean().backward()
        for gate, total in zip((heads, mlps), summed, strict=True):
            assert gate.grad is not None
            total += gate.grad.abs()
            if zeroed:
                gate.grad = None
    found = sensitivity(scored(model, HOLED, rows), "per_batch" if zeroed else "accumulated", batch_size=3)
    torch.testing.assert_close(found.heads, summed[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mlps, summed[1], rtol=1e-6, atol=0)


def test_sensitivity_reduces_over_rows_only_and_per_example_by_default() -> None:
    heads = torch.tensor([[[1.0, -4.0]], [[-3.0, 2.0]]], dtype=torch.float64)  # 2 rows, 1 layer, 2 heads
    found = sensitivity(GateGradients(heads, torch.tensor([[-1.0], [2.0]], dtype=torch.float64), torch.zeros(2, 2)))
    assert found.heads.tolist() == [[2.0, 3.0]]
    assert found.mlps.tolist() == [1.5]


# normalise


def test_head_scores_are_over_the_l2_norm_of_their_layer() -> None:
    scores = torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]], dtype=torch.float64)
    everyone = torch.ones(3, 2, dtype=torch.bool)
    assert torch.allclose(normalise(scores, everyone), torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]).double(), atol=1e-15)


def test_removed_heads_weigh_in_the_norm_only_as_members() -> None:
    scores = torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
    remaining = torch.tensor([[True, False, True]])
    assert normalise(scores, remaining).tolist() == [pytest.approx([1.0, 4 / 3, 0.0])]
    assert normalise(scores, torch.ones_like(remaining)).tolist() == [pytest.approx([0.6, 0.8, 0.0])]


# regression


def with_one_output(n: int = 6) -> tuple[Any, Encoded]:
    model, rows = tiny_model("bert"), random_rows(n)
    torch.manual_seed(5)
    model.classifier = torch.nn.Linear(24, 1)
    rng = np.random.default_rng(9)
    return model, dataclasses.replace(rows, labels=tuple(float(x) for x in rng.normal(size=n)))


def test_gate_gradients_of_a_regression_are_central_differences_of_the_squared_error() -> None:
    model, rows = with_one_output()
    model = model.double()
    with Gates(model) as gates:
        found = gate_gradients(gates, batches(rows, 40), len(rows))
    assert float(found.heads.abs().max()) > 1e-4 and found.logits.shape == (6, 1)
    anatomy = read_anatomy(model)

    def squared_error(row: int, layer: int, head: int, gate: float) -> float:
        o = model.get_submodule(anatomy.layers[layer].attention.o.path)
        columns = slice(head * 6, head * 6 + 6)
        before = o.weight.detach().clone()
        with torch.no_grad():
            o.weight[:, columns] *= gate
            value = model(input_ids=torch.tensor([rows.inputs[row]["input_ids"]])).logits[0, 0]
            o.weight.copy_(before)
        return (float(value) - float(torch.tensor(rows.labels[row]))) ** 2  # the label as the float32 a batch holds

    for row, layer, head in ((0, 0, 1), (3, 1, 2), (5, 1, 0)):
        difference = (squared_error(row, layer, head, 1 + 1e-5) - squared_error(row, layer, head, 1 - 1e-5)) / 2e-5
        assert float(found.heads[row, layer, head]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_classes_for_one_output_have_no_gradient_instead_of_a_silent_zero() -> None:
    model, rows = with_one_output()
    whole = dataclasses.replace(rows, labels=(0, 1, 0, 1, 0, 1))
    with Gates(model) as gates, pytest.raises(DataError, match="labels and outputs") as error:
        gate_gradients(gates, batches(whole), 6)
    assert error.value.got == "classes for 1 output"
    with Gates(tiny_model("bert")) as gates, pytest.raises(DataError, match="labels and outputs") as error:
        gate_gradients(gates, batches(rows), 6)
    assert error.value.got == "values for 2 outputs"


def test_mean_gradients_of_a_regression_are_those_of_its_mean_squared_error() -> None:
    model, rows = with_one_output()
    found = mean_gradients(Given(model=model, names=["classifier.weight"], batches=batches(rows, 40)))["classifier.weight"]
    copied = copy.deepcopy(model).double()
    errors = [
        (copied(input_ids=torch.tensor([row["input_ids"]])).logits[0, 0] - float(torch.tensor(label))) ** 2
        for row, label in zip(rows.inputs, rows.labels, strict=True)
    ]
    (expected,) = torch.autograd.grad(torch.stack(errors).mean(), copied.classifier.weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
