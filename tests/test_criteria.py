"""Scores of single values against finite differences, a model worked by hand, and another library."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from conftest import TINY, tiny_model
from tombola.criteria import CRITERIA, Given, mean_gradients, parameters_of
from tombola.errors import DataError, MaskError
from tombola.prune import prune
from tombola.scores import REDUCTIONS
from tombola.tasks.encode import Encoded, batches, collate

N = 9
ROWS_NEEDED = sorted(name for name, criterion in CRITERIA.items() if criterion.needs_rows)


def random_rows(n: int = N, family: str = "bert", seed: int = 0) -> Encoded:
    """Rows of 3 to 14 random tokens with random labels."""
    rng = np.random.default_rng(seed)
    inputs = tuple({"input_ids": tuple(int(t) for t in rng.integers(5, 60, rng.integers(3, 15)))} for _ in range(n))
    labels = tuple(int(label) for label in rng.integers(0, 2, n))
    return Encoded(tuple(f"row:{i}" for i in range(n)), inputs, labels, 0, {"input_ids": TINY[family].get("pad_token_id", 0)})


def names_of(model: nn.Module, criterion: str = "") -> list[str]:
    """Projections of the layers: what is pruned in practice; of Wanda their matrices, since a bias multiplies no input."""
    found = [(name, p) for name, p in model.named_parameters() if ".layer." in name and "LayerNorm" not in name]
    return [name for name, p in found if p.ndim == 2 or (p.ndim == 1 and criterion != "wanda")]


def mean_loss(model: Any, rows: Encoded) -> float:
    """Mean of −log p(label), one row at a time, without padding."""
    total = 0.0
    for row, label in zip(rows.inputs, rows.labels, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        total += float(torch.logsumexp(logits, 0) - logits[label])
    return total / len(rows)


def in_groups(rows: Encoded, *numbers: Sequence[int]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    for group in numbers:
        yield torch.tensor(group), collate(rows, group)


def scored(
    criterion: str, model: nn.Module, names: Sequence[str], rows: Encoded | None = None, seed: int = 0
) -> dict[str, Tensor]:
    ready = None if rows is None else batches(rows, 40)
    return CRITERIA[criterion].scores(Given(model=model, names=names, batches=ready, seed=seed))


def picks(model: nn.Module, names: Sequence[str], n: int) -> list[tuple[str, int]]:
    """n single values, spread over the names."""
    rng, parameters = np.random.default_rng(1), parameters_of(model, names)
    return [(name, int(rng.integers(parameters[name].numel()))) for name in rng.choice(list(names), n)]


# the table


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_scores_every_value_of_the_names_and_touches_nothing(criterion: str) -> None:
    model = tiny_model("bert").train()
    names = names_of(model, criterion)[3:6]
    model.get_parameter(names[0]).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    scores = scored(criterion, model, names, random_rows())
    assert list(scores) == names
    assert {name: x.shape for name, x in scores.items()} == {name: model.get_parameter(name).shape for name in names}
    assert all(x.device.type == "cpu" and not x.requires_grad and bool(torch.isfinite(x).all()) for x in scores.values())
    assert all(len(x.unique()) > x.numel() / 2 for x in scores.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [names[0]]
    for x in scores.values():  # its own memory
        x.fill_(7.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_a_criterion_says_truly_whether_it_needs_rows(criterion: str) -> None:
    model = tiny_model("bert")
    if CRITERIA[criterion].needs_rows:
        with pytest.raises(DataError, match="needs rows"):
            scored(criterion, model, names_of(model, criterion))
    else:
        without, withal = (scored(criterion, model, names_of(model, criterion), rows) for rows in (None, random_rows()))
        assert all(torch.equal(without[name], withal[name]) for name in without)


@pytest.mark.parametrize("names", [[], ["nowhere.weight"], ["classifier.weight", "classifier.weight"], ["bert.encoder"]])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_names_that_are_unknown_repeated_or_none_are_refused(criterion: str, names: list[str]) -> None:
    with pytest.raises(MaskError, match="not the names of maskable parameters"):
        scored(criterion, tiny_model("bert"), names, random_rows())


def test_the_second_name_of_a_tied_parameter_is_refused() -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert list(scored("magnitude", tied, ["0.weight"])) == ["0.weight"]
    with pytest.raises(MaskError, match="not the names") as error:
        scored("magnitude", tied, ["0.weight", "1.weight"])
    assert error.value.got == "1.weight"


# magnitude and random


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_global_magnitude_removes_what_torch_removes(sparsity: float) -> None:
    model = tiny_model("bert")
    names = names_of(model)
    theirs = copy.deepcopy(model)
    pairs = [(theirs.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=sparsity)
    ours = prune(scored("magnitude", model, names), sparsity)
    for name, (module, kind) in zip(names, pairs, strict=True):
        assert torch.equal(ours[name], getattr(module, f"{kind}_mask").bool())


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.9])
def test_magnitude_in_each_matrix_removes_what_torch_removes(sparsity: float) -> None:
    model = tiny_model("bert")
    names = names_of(model)
    ours = prune(scored("magnitude", model, names), sparsity, granularity="per_matrix")
    for name in names:
        layer, kind = copy.deepcopy(model.get_submodule(name.rpartition(".")[0])), name.rpartition(".")[2]
        torch_prune.l1_unstructured(layer, kind, amount=sparsity)
        assert torch.equal(ours[name], getattr(layer, f"{kind}_mask").bool())


def test_random_scores_depend_on_seed_and_name_and_not_on_the_other_names() -> None:
    model = tiny_model("bert", layers=1)
    names = names_of(model)
    scores = scored("random", model, names, seed=3)
    backwards = scored("random", model, names[::-1], seed=3)
    assert all(torch.equal(scores[name], backwards[name]) for name in names)
    assert torch.equal(scored("random", model, names[2:3], seed=3)[names[2]], scores[names[2]])
    other = scored("random", model, names, seed=4)
    flat, moved = (torch.cat([x.flatten() for x in s.values()]).double() for s in (scores, other))
    assert abs(float(torch.corrcoef(torch.stack([flat, moved]))[0, 1])) < 4 / len(flat) ** 0.5
    assert kstest(flat.numpy(), "uniform").pvalue > 1e-3
    alike = [name for name in names if scores[name].shape == (24, 24)]
    assert len(alike) > 2
    assert len({tuple(scores[name].flatten().tolist()) for name in alike}) == len(alike)


# taylor: a model worked by hand


@dataclass
class Output:
    logits: Tensor


class TwoWeights(nn.Module):
    """Logits (a·x, b·x) of a number x: p(label 1) = σ((b − a)·x)."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([a, b]))
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Output:
        return Output(x[:, None] * self.w)


def test_taylor_scores_of_two_weights_are_those_worked_by_hand() -> None:
    # x = 2 with label 1 and x = −1 with label 0, a = ln 3, b = 0: p(label 1) = σ(−2 ln 3) = 1/10 and σ(ln 3) = 3/4.
    # ∂L/∂b = mean of (p − label)·x = ((1/10 − 1)·2 + (3/4 − 0)·(−1)) / 2 = −1.275, ∂L/∂a = 1.275
    model = TwoWeights(float(np.log(3)), 0.5)
    model.w.data[1] = 0.0
    batch = [(torch.tensor([0, 1]), {"x": torch.tensor([2.0, -1.0]).double(), "labels": torch.tensor([1, 0])})]
    signed = CRITERIA["taylor-signed"].scores(Given(model=model, names=["w", "idle"], batches=batch))
    # without a the model would be better: the loss falls by its first-order 1.275 · ln 3
    assert signed["w"].tolist() == pytest.approx([-1.275 * np.log(3), 0.0])
    assert signed["idle"].tolist() == [0.0, 0.0, 0.0]  # it cannot reach the loss
    absolute = CRITERIA["taylor"].scores(Given(model=model, names=["w"], batches=batch))
    assert absolute["w"].tolist() == pytest.approx([1.275 * np.log(3), 0.0])
    assert mean_gradients(Given(model=model, names=["w"], batches=batch))["w"].tolist() == pytest.approx([1.275, -1.275])


# taylor: real models


def test_taylor_gradients_are_finite_differences_of_the_loss(family: str) -> None:
    model, rows, h = tiny_model(family).double(), random_rows(family=family), 1e-5
    names = names_of(model)
    gradients = mean_gradients(Given(model=model, names=names, batches=batches(rows, 40)))
    largest = max(float(x.abs().max()) for x in gradients.values())
    for name, i in picks(model, names, 12):
        value, ends = model.get_parameter(name).data.view(-1), []
        at = float(value[i])
        for step in (h, -h):
            value[i] = at + step
            ends.append(mean_loss(model, rows))
        value[i] = at
        assert float(gradients[name].view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-6 * largest)


def test_signed_taylor_predicts_what_the_loss_does_when_a_value_goes() -> None:
    # to first order: with weights ε times as large, what is left out is ε times as small beside the prediction
    rows, errors = random_rows(), {}
    for size in (1e-1, 1e-3):
        model = tiny_model("bert").double()
        names = names_of(model)
        chosen = picks(model, names, 12)
        for name, i in chosen:
            model.get_parameter(name).data.view(-1)[i] *= size
        predicted, dense = scored("taylor-signed", model, names, rows), mean_loss(model, rows)
        errors[size] = []
        for name, i in chosen:
            value = model.get_parameter(name).data.view(-1)
            at = float(value[i])
            value[i] = 0.0
            rise, value[i] = mean_loss(model, rows) - dense, at
            said = float(predicted[name].view(-1)[i])
            errors[size].append(abs(rise - said) / abs(said))
    assert np.median(errors[1e-1]) < 0.05
    assert np.median(errors[1e-3]) < 5e-4
    assert np.median(errors[1e-3]) < np.median(errors[1e-1]) / 30


@pytest.mark.parametrize("criterion", ROWS_NEEDED)
def test_scores_depend_on_neither_batch_size_nor_order(criterion: str, family: str) -> None:
    model, rows = tiny_model(family), random_rows(family=family)
    names, ready = names_of(model, criterion), CRITERIA[criterion].scores
    cut = ([[*range(N)]], [[i] for i in range(N)], [[8, 0, 5], [7], [3, 1, 6, 2], [4]])
    whole, *others = (ready(Given(model=model, names=names, batches=in_groups(rows, *groups))) for groups in cut)
    for other in others:
        for name in names:
            # a key bias moves no softmax: its gradient is zero but for rounding in fp64
            torch.testing.assert_close(other[name], whole[name], rtol=1e-6, atol=1e-15)
    assert max(float(x.abs().max()) for x in whole.values()) > 1e-5


@pytest.mark.parametrize("criterion", ROWS_NEEDED)
def test_dropout_is_off_and_the_callers_no_grad_is_no_obstacle(criterion: str) -> None:
    model, rows = tiny_model("bert"), random_rows()
    names = names_of(model, criterion)
    calm = scored(criterion, model, names, rows)
    with torch.no_grad():
        assert all(torch.equal(x, calm[name]) for name, x in scored(criterion, model.train(), names, rows).items())


def test_absolute_and_signed_taylor_differ_by_the_sign_alone() -> None:
    model, rows = tiny_model("bert"), random_rows()
    absolute, signed = (scored(kind, model, names_of(model), rows) for kind in ("taylor", "taylor-signed"))
    assert all(torch.equal(absolute[name], signed[name].abs()) for name in absolute)
    assert 0.2 < torch.cat([(x < 0).flatten().float() for x in signed.values()]).mean() < 0.8


def test_a_value_of_zero_scores_zero() -> None:
    model, rows = tiny_model("bert"), random_rows()
    name = names_of(model)[0]
    model.get_parameter(name).data.view(-1)[5] = 0.0
    assert all(
        float(scored(criterion, model, [name], rows)[name].view(-1)[5]) == 0.0 for criterion in ("magnitude", *ROWS_NEEDED)
    )


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([[0, 1], [1, 2]], "4 rows, 1 of them again, 0 left out"),
        ([[0, 1], [4, 5]], "4 rows, 0 of them again, 2 left out"),
        ([], "0 rows, 0 of them again, 0 left out"),
    ],
)
def test_rows_that_are_missing_or_come_twice_are_refused(groups: list[list[int]], said: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(DataError, match="exactly once") as error:
        mean_gradients(Given(model=model, names=names_of(model), batches=in_groups(random_rows(), *groups)))
    assert error.value.got == said


def test_classes_have_no_taylor_score_on_a_single_output() -> None:
    model = tiny_model("bert")
    model.classifier = nn.Linear(24, 1)
    with pytest.raises(DataError, match="labels and outputs of the model do not fit"):
        scored("taylor", model, ["classifier.weight"], random_rows())


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.text(min_size=1, max_size=12))
def test_random_scores_are_uniform_for_any_seed_and_name(seed: int, name: str) -> None:
    model = nn.Module()
    own = name.replace(".", "_")
    model.register_parameter(own, nn.Parameter(torch.zeros(40, 50)))
    drawn = CRITERIA["random"].scores(Given(model=model, names=[own], seed=seed))[own]
    assert float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert abs(float(drawn.mean()) - 0.5) < 6 * (1 / 12 / 2000) ** 0.5


# ---------------------------------------------------------------------------------------------- Fisher, SNIP, Wanda


def fp64_gradients(model: Any, rows: Encoded, name: str) -> list[Tensor]:
    """∂L_i/∂w of each row by a loop of one's own."""
    found = []
    double = copy.deepcopy(model).double()
    for i in range(len(rows)):
        batch = collate(rows, [i])
        double.zero_grad()
        torch.nn.functional.cross_entropy(
            double(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
        ).backward()
        found.append(double.get_parameter(name).grad.clone())
    return found


def test_fisher_is_half_the_square_of_the_value_times_the_mean_square_of_row_gradients() -> None:
    model, rows = tiny_model("bert"), random_rows(7)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    squares = torch.stack(fp64_gradients(model, rows, name)).square().mean(0)
    expected = 0.5 * model.get_parameter(name).detach().double().square() * squares
    given = [
        CRITERIA["fisher"].scores(Given(model=model, names=[name], batches=batches(rows, tokens)))[name] for tokens in (8, 4096)
    ]
    for one in given:
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-12)


def test_snip_is_the_share_of_taylor() -> None:
    model, rows = tiny_model("bert"), random_rows(6)
    names = ["bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.1.output.dense.bias"]
    snip, taylor = (CRITERIA[name].scores(Given(model=model, names=names, batches=batches(rows))) for name in ("snip", "taylor"))
    assert abs(sum(float(score.double().sum()) for score in snip.values()) - 1) < 1e-5
    ratio = [float((snip[name].double() / taylor[name].double())[taylor[name] > 0].median()) for name in names]
    assert abs(ratio[0] / ratio[1] - 1) < 1e-4


def test_wanda_is_the_value_times_the_norm_of_its_input_over_real_tokens() -> None:
    model, rows = tiny_model("bert"), random_rows(9)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    seen = []
    handle = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for i in range(len(rows)):  # alone, a row has no padding
            batch = collate(rows, [i])
            model(**{k: v for k, v in batch.items() if k != "labels"})
    handle.remove()
    norms = torch.linalg.vector_norm(torch.cat(seen).double(), dim=0)
    expected = model.get_parameter(name).detach().double().abs() * norms
    found = CRITERIA["wanda"].scores(Given(model=model, names=[name], batches=batches(rows, 4096)))[name]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)


def test_wanda_refuses_what_multiplies_no_input() -> None:
    model, rows = tiny_model("bert"), random_rows(3)
    for name in ("bert.encoder.layer.0.output.dense.bias", "bert.embeddings.word_embeddings.weight"):
        with pytest.raises(MaskError, match="linear maps only"):
            CRITERIA["wanda"].scores(Given(model=model, names=[name], batches=batches(rows)))


def test_fisher_of_gates_is_the_mean_square() -> None:
    gradients = torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.float64)
    assert REDUCTIONS["fisher"](gradients, 1).tolist() == [5.0, 2.0]
