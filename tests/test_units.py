"""Neurons and whole layers as units: sizes counted by hand, scores without gates, searches scored anew, controls, one store.

What holds for every family (a neuron is a column of out, a layer all its parts, gradients) stands in test_families.py.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import tombola
from conftest import sentiment, tiny_family, tiny_model, trained_on_sentiment
from tombola.anatomy import Anatomy, layers_of_heads, read_anatomy, size_of
from tombola.errors import MaskError, SearchError
from tombola.evaluate import predict, score
from tombola.gates import Gates, ablate, hold, prove_acts
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.report.build import build_page
from tombola.scope import scope_sizes
from tombola.scores import REDUCTIONS, ByRow, Importance, gate_gradients, sensitivity
from tombola.search import structured
from tombola.search.controls import CONTROLS, ControlSettings, control
from tombola.search.structured import PHASES, SPruneResult, SPruneSettings, remove_lowest, s_prune
from tombola.study import runs
from tombola.study.jobs import open_lab
from tombola.study.results import collect
from tombola.study.runs import Found, plan_controls, plan_find, plan_test
from tombola.study.settings import resolve
from tombola.study.steps.shared import ticket_of
from tombola.tasks.encode import Encoded, batches
from tombola.ticket import Ticket

WIDTH, D_FFN = 24, 40  # of tiny_model, with 2 layers of 4 heads
PER_NEURON = WIDTH + 1 + WIDTH  # a row of in with its bias, a column of out


def bits(*rows: str) -> Tensor:
    return torch.tensor([[one == "1" for one in row] for row in rows])


def without_neurons(anatomy: Anatomy, *gone: tuple[int, int]) -> Mask:
    kept = torch.ones(anatomy.n_layers, anatomy.mlps[0].d_ffn, dtype=torch.bool)
    for at in gone:
        kept[at] = False
    return Mask(neurons=kept)


@pytest.fixture(scope="module")
def uneven() -> Any:
    """A model whose MLPs differ in width: 40 neurons in the encoder, 48 in the decoder."""
    return tiny_family("bart", decoder_ffn_dim=48)


# ------------------------------------------------------------------------------------------------- anatomy and sizes


def test_sizes_are_those_counted_by_hand() -> None:
    anatomy = read_anatomy(tiny_model("bert"))
    three = without_neurons(anatomy, (0, 5), (1, 0), (1, 39))
    alone = anatomy.size(three)
    assert (alone.kept_values, alone.maskable_values) == (77 * PER_NEURON, 80 * PER_NEURON)
    assert alone.sparsity == pytest.approx(3 / 80, abs=1e-15)
    body = anatomy.size(anatomy.full_mask()).maskable_values
    # Beside heads and MLPs: the two neurons of layer 1 go with its MLP, and count once.
    both = anatomy.size(three & Mask(heads=bits("1111", "1101"), mlps=torch.tensor([True, False])))
    a_head, an_mlp = 3 * 6 * (WIDTH + 1) + 6 * WIDTH, 40 * PER_NEURON + WIDTH
    assert (both.kept_values, both.maskable_values) == (body - PER_NEURON - a_head - an_mlp, body)
    assert anatomy.size(three & anatomy.full_mask()).kept_values == body - 3 * PER_NEURON
    assert anatomy.summary()["values_per_neuron"] == [PER_NEURON] * 2


def test_a_mask_is_the_values_it_counts() -> None:
    """Gated and fused as well: what as_values names is what size subtracts, and the bias of out stays."""
    for kind, per_neuron in (("llama", 3 * 24), ("phi3", 3 * 32), ("gpt2", 24 + 1 + 24), ("albert", 24 + 1 + 24)):
        anatomy = read_anatomy(tiny_family(kind))
        mask = without_neurons(anatomy, (0, 3), (0, 39), (anatomy.n_layers - 1, 20))
        values = anatomy.as_values(mask)
        assert sum(int((~part).sum()) for part in values.values()) == 3 * per_neuron
        assert not any(name == f"{mlp.out.path}.bias" for mlp in anatomy.mlps for name in values)
        assert anatomy.size(mask).maskable_values - anatomy.size(mask).kept_values == 3 * per_neuron
        nothing = ~anatomy.full_mask("neurons")
        assert sum(int((~part).sum()) for part in anatomy.as_values(nothing).values()) == anatomy.size(nothing).maskable_values


def test_survival_is_the_share_of_an_mlps_neurons() -> None:
    anatomy = read_anatomy(tiny_model("bert"))
    mask = without_neurons(anatomy, *((0, j) for j in range(10)))
    heads, mlps = anatomy.survival(mask)
    assert bool((heads == 1).all()) and mlps.tolist() == [0.75, 1.0]
    assert anatomy.survival(mask & Mask(mlps=torch.tensor([True, False])))[1].tolist() == [0.75, 0.0]


def test_a_model_whose_mlps_differ_in_width_has_no_neurons_but_all_the_rest(uneven: Any) -> None:
    anatomy = read_anatomy(uneven)
    assert anatomy.d_ffn is None and read_anatomy(tiny_model("bert")).d_ffn == D_FFN
    with pytest.raises(MaskError, match="has no mask of neurons") as caught:
        anatomy.full_mask("neurons")
    assert caught.value.got == "MLPs of 40 to 48 neurons"
    with pytest.raises(MaskError, match="does not fit") as caught:
        anatomy.size(Mask(neurons=torch.ones(4, 40, dtype=torch.bool)))
    assert "differ in width" in str(caught.value.next)
    with pytest.raises(MaskError, match="has no mask of neurons"):
        ablate(uneven, 0, neuron=0)
    sizes = scope_sizes(uneven, anatomy)
    assert "neurons" not in sizes and sizes["layers"] == anatomy.size(anatomy.full_mask()).maskable_values
    prove_acts(uneven, anatomy, anatomy.whole_layers(torch.tensor([True, False, True, True])))


def test_rows_of_heads_belong_to_the_layers_of_their_mlps() -> None:
    bart, bert = read_anatomy(tiny_family("bart")), read_anatomy(tiny_model("bert", layers=3))
    assert bart.layer_of_attention.tolist() == [0, 1, 2, 2, 3, 3] == layers_of_heads(bart.summary()).tolist()
    assert bert.layer_of_attention.tolist() == [0, 1, 2] == layers_of_heads(bert.summary()).tolist()
    mask = bart.whole_layers(torch.tensor([True, False, False, True]))
    assert mask == Mask(heads=bits("1111", *["0000"] * 3, *["1111"] * 2), mlps=torch.tensor([True, False, False, True]))


# -------------------------------------------------------------------------------------------------------------- gates


def test_gates_of_neurons_are_switched_and_taken_off_and_cost_nothing_when_open() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    rows = {"input_ids": torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        whole = model(**rows).logits
        with Gates(model, anatomy, without_neurons(anatomy, (0, 1))) as gates:
            one = model(**rows).logits
            assert gates._neurons[1] is None
            gates.set(without_neurons(anatomy, (1, 1)))
            assert gates._neurons[0] is None and not torch.equal(model(**rows).logits, one)
            gates.set(anatomy.full_mask())
            assert gates._neurons == [None, None] and torch.equal(model(**rows).logits, whole)
            gates.set(without_neurons(anatomy, (0, 1)))
            assert torch.equal(model(**rows).logits, one)
        assert torch.equal(model(**rows).logits, whole) and not torch.equal(one, whole)


@pytest.mark.parametrize(("head", "neuron", "layer"), [(None, 40, 0), (None, -1, 0), (None, 0, 2), (1, 1, 0)])
def test_neurons_that_are_not_there_are_refused(head: int | None, neuron: int, layer: int) -> None:
    with pytest.raises(MaskError, match="no such part to ablate") as caught:
        ablate(tiny_model("bert"), layer, head, neuron=neuron)
    assert f"neuron {neuron}" in str(caught.value.got) and "neuron in 0…39" in str(caught.value.expected)


def test_a_mask_whose_gates_do_not_act_is_refused_for_neurons_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    monkeypatch.setattr(Gates, "_gate_neurons", lambda *_: None)
    with pytest.raises(MaskError, match="still reaches the output") as caught:
        prove_acts(model, anatomy, without_neurons(anatomy, (1, 7)))
    assert caught.value.got == "neurons of layer 1 leak"
    prove_acts(model, anatomy, Mask(heads=bits("0111", "1111")))


def test_a_held_mask_of_neurons_is_proved_again_on_its_own_zeros() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    mask = without_neurons(anatomy, (0, 0), (1, 7))
    gates = hold(model, anatomy, mask)
    assert (
        not model.bert.encoder.layer[1].output.dense.weight[:, 7].any()
        and not model.bert.encoder.layer[1].intermediate.dense.bias[7]
    )
    gates.remove()
    prove_acts(model, anatomy, mask)


# -------------------------------------------------------------------------------------------------------------- scores


def random_rows(n: int, seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    inputs = tuple({"input_ids": tuple(int(t) for t in rng.integers(5, 60, rng.integers(3, 15)))} for _ in range(n))
    return Encoded(tuple(map(str, range(n))), inputs, tuple(int(x) for x in rng.integers(0, 2, n)), 0, {"input_ids": 0})


def by_scaling(model: Any, mask: Mask, rows: Encoded) -> Tensor:
    """[row, layer, neuron] ∂L_i/∂ξ: each row alone and without padding, a gate being a factor on a column of out. No gates."""
    anatomy, weights = read_anatomy(model), {name: p.detach() for name, p in model.named_parameters()}
    gates = mask.parts()["neurons"].to(next(model.parameters()))

    def loss(at: Tensor, row: int) -> Tensor:
        scaled = {f"{mlp.out.path}.weight": weights[f"{mlp.out.path}.weight"] * at[i] for i, mlp in enumerate(anatomy.mlps)}
        alone = {name: torch.tensor([tokens]) for name, tokens in rows.inputs[row].items()}
        logits = functional_call(model, weights | scaled, kwargs=alone).logits
        return cross_entropy(logits.double(), torch.tensor([rows.labels[row]]))

    found = []
    for row in range(len(rows)):
        at = gates.clone().requires_grad_()
        found.append(torch.autograd.grad(loss(at, row), at)[0].double())
    return torch.stack(found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_importances_of_neurons_are_those_of_a_table_kept_whole(reduction: str, batch_size: int) -> None:
    """Whatever the batches of the pass: short and long ones, padded, in another order than the rows."""
    model, rows = tiny_model("bert").double(), random_rows(8)
    anatomy = read_anatomy(model)
    mask = without_neurons(anatomy, (0, 4), (1, 9))
    expected = REDUCTIONS[reduction](by_scaling(model, mask, rows), batch_size)
    assert float(expected.min()) > 0
    for tokens_per_batch in (15, 40, 1000):
        with Gates(model, anatomy, mask) as gates:
            found = gate_gradients(gates, batches(rows, tokens_per_batch), len(rows), neurons=(reduction, batch_size))
        importance = sensitivity(found, reduction, batch_size)
        assert importance.neurons is not None
        assert float(((importance.neurons - expected).abs() / expected).max()) < 1e-8


def test_neurons_are_scored_only_when_asked_for() -> None:
    model, rows = tiny_model("bert"), random_rows(4)
    with Gates(model, mask=without_neurons(read_anatomy(model), (0, 0))) as gates:
        plain = gate_gradients(gates, batches(rows, 1000), 4)
        with_neurons = gate_gradients(gates, batches(rows, 1000), 4, neurons=("fisher", 64))
    assert plain.neurons is None and with_neurons.neurons is not None
    assert torch.allclose(plain.heads, with_neurons.heads, rtol=1e-5, atol=1e-9)
    assert torch.allclose(plain.mlps, with_neurons.mlps, rtol=1e-5, atol=1e-9)


@given(st.data())
def test_rows_reduced_as_they_come_are_rows_reduced_at_once(data: Any) -> None:
    n, size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 14))
    table = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))).double()
    order = data.draw(st.permutations(range(n)))
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=4))})
    for name, reduce in REDUCTIONS.items():
        by_row = ByRow(name, size, n)
        for start, stop in itertools.pairwise(cuts):
            rows = torch.tensor(order[start:stop])
            by_row.add(rows, table[rows])
        assert torch.allclose(by_row.result(), reduce(table, size), rtol=1e-12, atol=1e-14), name


def test_the_importance_of_a_layer_is_that_of_one_gate_on_all_of_it() -> None:
    """Not the sum of importances: signs cancel within a row, and only there."""
    model, rows = tiny_family("bart").double(), random_rows(6, seed=3)
    rows = replace(rows, inputs=tuple({"input_ids": (*row["input_ids"], 2)} for row in rows.inputs))
    anatomy = read_anatomy(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    layer_of = [0, 1, 2, 2, 3, 3]

    def loss(at: Tensor, row: int) -> Tensor:
        scaled = {
            f"{a.o.path}.weight": weights[f"{a.o.path}.weight"] * at[i] for a, i in zip(anatomy.attentions, layer_of, strict=True)
        }
        for i, mlp in enumerate(anatomy.mlps):
            scaled |= {f"{mlp.out.path}.{part}": weights[f"{mlp.out.path}.{part}"] * at[i] for part in ("weight", "bias")}
        alone = {"input_ids": torch.tensor([rows.inputs[row]["input_ids"]])}
        logits = functional_call(model, weights | scaled, kwargs=alone).logits
        return cross_entropy(logits, torch.tensor([rows.labels[row]]))

    found = []
    for row in range(len(rows)):
        at = torch.ones(4, dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(loss(at, row), at)[0])
    by_hand = torch.stack(found)
    with Gates(model, anatomy) as gates:
        gradients = gate_gradients(gates, batches(rows, 30), len(rows))
    for reduction, reduce in REDUCTIONS.items():
        importance = sensitivity(gradients, reduction, 4, layer_of_attention=anatomy.layer_of_attention)
        assert importance.layers is not None
        assert torch.allclose(importance.layers, reduce(by_hand, 4), rtol=1e-6), reduction
        assert sensitivity(gradients, reduction, 4).layers is None


# -------------------------------------------------------------------------------------------------------------- search


def test_neurons_compete_over_layers_by_their_share_of_their_layers_norm() -> None:
    # shares: .6 and .8 in layer 0, .28 and .96 in layer 1
    importance = Importance(torch.ones(2, 2).double(), torch.ones(2).double(), torch.tensor([[3.0, 4.0], [28.0, 96.0]]).double())
    start = Mask(neurons=bits("11", "11"))
    assert remove_lowest(start, importance, {"neurons": 1}) == Mask(neurons=bits("11", "01"))
    # what is left of layer 1 is all of its norm now, unless removed neurons weigh in it
    assert remove_lowest(Mask(neurons=bits("11", "01")), importance, {"neurons": 5}) == Mask(neurons=bits("00", "00"))
    weak = replace(importance, neurons=torch.tensor([[3.0, 4.0], [96.0, 28.0]]).double())
    for members, left in (("remaining_heads", bits("01", "01")), ("all_heads", bits("11", "00"))):
        settings = SPruneSettings(importance_norm_members=members)
        assert remove_lowest(Mask(neurons=bits("11", "01")), weak, {"neurons": 1}, settings) == Mask(neurons=left)


def test_a_layer_takes_its_rows_of_heads_along() -> None:
    anatomy = read_anatomy(tiny_family("bart"))
    scores = torch.tensor([0.4, 0.3, 0.1, 0.2]).double()
    importance = Importance(torch.zeros(6, 4).double(), torch.zeros(4).double(), layers=scores)
    order = [{2}, {2, 3}, {2, 3, 1}, {0, 1, 2, 3}]
    mask = anatomy.full_mask()
    for gone in order:
        mask = remove_lowest(mask, importance, {"layers": 1}, layer_of_attention=anatomy.layer_of_attention)
        assert mask == anatomy.whole_layers(torch.tensor([i not in gone for i in range(4)]))
    assert remove_lowest(mask, importance, {"layers": 1}, layer_of_attention=anatomy.layer_of_attention) == mask
    by_row = Importance(torch.zeros(2, 2).double(), torch.zeros(2).double(), layers=scores[:2])
    start = Mask(heads=bits("11", "11"), mlps=bits("11")[0])
    assert remove_lowest(start, by_row, {"layers": 1}) == Mask(heads=bits("11", "00"), mlps=bits("10")[0])


@dataclass(frozen=True)
class Learned:
    model: Any
    selection: Encoded


@pytest.fixture(scope="module")
def learned(tiny_folder: Path) -> Learned:
    """Two layers of 4 heads and 48 neurons that know an easy task."""
    return Learned(trained_on_sentiment(tiny_folder), sentiment(tiny_folder, 60, 2))


def searched(learned: Learned, **settings: Any) -> SPruneResult:
    with Gates(learned.model) as gates:
        result = s_prune(gates, learned.selection, "accuracy", SPruneSettings(**settings))
        assert gates.mask == gates.anatomy.full_mask()
    return result


def anew(learned: Learned, mask: Mask) -> float:
    """The score of a copy in which what `mask` removes is zero in the weights."""
    twin = copy.deepcopy(learned.model)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, part in read_anatomy(twin).as_values(mask).items():
            parameters[name][~part] = 0
    return score(predict(twin, learned.selection), "accuracy").value


def test_a_search_over_neurons_removes_the_weakest_by_brute_force_while_the_score_holds(learned: Learned) -> None:
    result = searched(learned, procedure="neurons", s_neuron_step=0.25)
    masks = [trial.mask for trial in result.trials]
    assert [mask.counts() for mask in masks] == [{"neurons": (96 - 24 * t, 96)} for t in range(len(masks))]
    assert [trial.phase for trial in result.trials] == ["full", *["neurons"] * (len(masks) - 1)]
    for trial in result.trials:
        assert trial.score.value == anew(learned, trial.mask)
        assert trial.passed == (trial.score.value >= result.floor_score - 1e-9)
    assert all(trial.passed for trial in result.trials[:-1]) and len(masks) > 2
    assert result.mask == [trial.mask for trial in result.trials if trial.passed][-1]
    double = copy.deepcopy(learned.model).double()
    for before, after in itertools.pairwise(masks[:3]):
        scores = by_scaling(double, before, learned.selection).abs().mean(0)
        kept = before.parts()["neurons"]
        shares = (scores / (scores * kept).norm(dim=1, keepdim=True)).masked_fill(~kept, torch.inf)
        gone = kept & ~after.parts()["neurons"]
        assert float(shares[gone].max()) <= float(shares[after.parts()["neurons"]].min()) * (1 + 1e-5)


def test_a_search_over_layers_removes_whole_layers_while_the_score_holds(learned: Learned) -> None:
    result = searched(learned, procedure="layers")
    anatomy = read_anatomy(learned.model)
    first = result.trials[0].importance.layers
    assert first is not None
    gone = {int(first.argmin())}
    assert result.trials[1].mask == anatomy.whole_layers(torch.tensor([i not in gone for i in range(2)]))
    for trial in result.trials:
        mask = trial.mask.parts()
        assert torch.equal(mask["heads"], mask["mlps"][:, None].expand(2, 4))
        assert trial.score.value == anew(learned, trial.mask)
    assert result.mask == [trial.mask for trial in result.trials if trial.passed][-1]
    empty = searched(learned, procedure="layers", floor=0.5, floor_rule="fraction_of_full")
    assert len(empty.trials) <= 3  # two layers, one a step


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_reduction_searches_and_a_search_is_the_same_every_time(learned: Learned, reduction: Any) -> None:
    for procedure in ("neurons", "layers"):
        one, two = (searched(learned, procedure=procedure, importance_reduction=reduction, s_neuron_step=0.5) for _ in range(2))
        assert [trial.mask for trial in one.trials] == [trial.mask for trial in two.trials] and len(one.trials) > 1


def test_settings_that_came_with_a_procedure_are_in_no_cell_of_another() -> None:
    """The names by which searches were stored before there were neurons and layers."""
    before = {
        "procedure", "floor", "floor_rule", "importance_reduction", "importance_batch_size", "importance_norm_members",
        "importance_minmax", "mlp_importance_norm", "rollback_importance", "s_head_step", "s_head_step_base",
        "s_heads_only_phase_step", "s_mlp_step",
    }  # fmt: skip
    more = {"neurons": {"s_neuron_step"}, "heads+neurons": {"s_neuron_step"}, "layers": {"s_layer_step"}}
    for procedure in PHASES:
        settings = resolve({"procedure": procedure})
        assert settings.search_in_use.keys() == before | more.get(procedure, set()), procedure
        assert settings.search_in_use["procedure"] == procedure
    assert "sparsity" in resolve({}, method="one-shot").search_in_use


# ------------------------------------------------------------------------------------------------------------ controls


@given(st.integers(0, 10_000), st.integers(0, 24))
def test_controls_of_neurons_have_exactly_the_size_and_keep_to_their_rule(seed: int, kept: int) -> None:
    neurons = torch.zeros(24, dtype=torch.bool)
    neurons[torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    good = Mask(neurons=neurons.reshape(3, 8))
    found = {kind: control(good, kind, seed=seed, draw=1).parts()["neurons"] for kind in CONTROLS}
    per_layer = control(good, "random", seed=seed, draw=1, settings=ControlSettings(random_size="exact_per_layer"))
    assert {name: int(mask.sum()) for name, mask in found.items()} == {
        "random": kept, "bad": kept, "strict-bad": min(kept, 24 - kept)
    }  # fmt: skip
    assert per_layer.parts()["neurons"].sum(1).tolist() == neurons.reshape(3, 8).sum(1).tolist()
    assert int((found["bad"].flatten() & neurons).sum()) == max(0, 2 * kept - 24)
    assert not (found["strict-bad"].flatten() & neurons).any()
    scores = {"neurons": torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))}
    worst = control(good, "bad", seed=0, draw=0, settings=ControlSettings(bad_s_rule="lowest_importance"), scores=scores)
    lowest = scores["neurons"].flatten().argsort()[:kept]
    assert worst.flat("neurons").nonzero().flatten().tolist() == sorted(lowest.tolist())


def of_layers(kept: Sequence[int], layer_of: Tensor) -> Mask:
    mlps = torch.tensor(kept).bool()
    return Mask(heads=mlps[layer_of][:, None].expand(-1, 4), mlps=mlps)


def test_controls_of_layers_draw_layers() -> None:
    layer_of = torch.arange(6)
    good = of_layers([1, 0, 1, 1, 0, 0], layer_of)
    drawn = [control(good, "random", seed=0, draw=draw, layers=layer_of) for draw in range(200)]
    for mask in drawn:
        assert torch.equal(mask.parts()["heads"], mask.parts()["mlps"][:, None].expand(6, 4))
        assert int(mask.parts()["mlps"].sum()) == 3
    assert len(set(drawn)) == 20, "every choice of 3 of 6 comes"
    assert control(good, "bad", seed=0, draw=0, layers=layer_of) == of_layers([0, 1, 0, 0, 1, 1], layer_of)
    most = of_layers([1, 1, 1, 1, 0, 0], layer_of)
    assert control(most, "strict-bad", seed=0, draw=0, layers=layer_of) == of_layers([0, 0, 0, 0, 1, 1], layer_of)
    assert int((control(most, "bad", seed=0, draw=3, layers=layer_of).parts()["mlps"] & most.parts()["mlps"]).sum()) == 2
    scores = {"layers": torch.tensor([0.5, 0.1, 0.2, 0.9, 0.3, 0.8])}
    lowest = ControlSettings(bad_s_rule="lowest_importance")
    assert control(good, "bad", seed=0, draw=0, settings=lowest, scores=scores, layers=layer_of) == of_layers(
        [0, 1, 1, 0, 1, 0], layer_of
    )
    with pytest.raises(SearchError, match="needs a score for each"):
        control(good, "bad", seed=0, draw=0, settings=lowest, scores={"mlps": torch.ones(6)}, layers=layer_of)


def test_layers_with_cross_attention_are_drawn_among_themselves() -> None:
    """They are larger: two rows of heads. So the control has the ticket's size in heads as well."""
    layer_of = torch.tensor([0, 1, 2, 3, 3, 4, 4, 5, 5])
    good = of_layers([1, 1, 0, 1, 0, 0], layer_of)
    drawn = {control(good, "random", seed=1, draw=draw, layers=layer_of) for draw in range(200)}
    assert len(drawn) == 9
    assert {int(mask.parts()["mlps"][:3].sum()) for mask in drawn} == {2}
    assert {mask.counts()["heads"] for mask in drawn} == {(16, 36)} == {good.counts()["heads"]}


@pytest.mark.parametrize(
    "mask",
    [
        Mask(heads=bits("11", "10"), mlps=bits("11")[0]),
        Mask(heads=bits("11", "00"), mlps=bits("11")[0]),
        Mask(mlps=bits("10")[0]),
        Mask(neurons=bits("11", "00")),
    ],
)
def test_layers_are_not_drawn_for_a_mask_of_other_parts(mask: Mask) -> None:
    with pytest.raises(SearchError, match="not one of whole layers"):
        control(mask, "random", seed=0, draw=0, layers=torch.arange(2))


# ----------------------------------------------------------------------------------------------------- tickets, stores


def test_neurons_of_other_code_are_imported(tiny_folder: Path, tmp_path: Path) -> None:
    kept = torch.rand(2, 48, generator=torch.Generator().manual_seed(0)) > 0.3
    np.save(tmp_path / "neurons.npy", kept.float().numpy())
    ticket = tombola.import_ticket(str(tiny_folder), neurons=tmp_path / "neurons.npy", labels=("a", "b"))
    assert ticket.mask == Mask(neurons=kept) and ticket.scope == "neurons"
    assert ticket.sparsity == pytest.approx(float((~kept).float().mean()), abs=1e-6)
    np.save(tmp_path / "turned.npy", kept.T.float().numpy())
    with pytest.raises(MaskError, match="wrong shape"):
        tombola.import_ticket(str(tiny_folder), neurons=tmp_path / "turned.npy")
    anatomy = read_anatomy(load_weights(tiny_folder, ("a", "b"), head_seed=0))
    heads = np.ones((2, 4), dtype=np.float32)
    np.save(tmp_path / "heads.npy", heads)
    both = tombola.import_mask(anatomy, heads=tmp_path / "heads.npy", neurons=tmp_path / "neurons.npy")
    assert both == Mask(heads=torch.ones(2, 4, dtype=torch.bool), neurons=kept)


FAST = {"epochs": 4, "learning_rate": 5e-3, "batch_size": 16, "train_rows": 128, "selection_rows": 60}
KINDS = ("random", "random-per-layer", "bad", "bad-lowest", "strict-bad", "reinit-body")


@dataclass(frozen=True)
class World:
    folder: Path
    data: Path
    found: Mapping[str, Found]
    tested: Mapping[str, list[runs.Tested]]

    def ticket(self, cell: Any) -> Ticket:
        return ticket_of(open_lab(self.folder, self.data), cell)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> World:
    """A store with a ticket of neurons and one of layers, both under every kind of control, the first retrained."""
    lab = open_lab(tmp_path_factory.mktemp("units") / "store", data_folder)
    found, tested, cells = {}, {}, []
    for procedure in ("neurons", "layers"):
        settings = resolve({**FAST, "procedure": procedure, "s_neuron_step": 0.3, "floor": 0.8})
        (found[procedure],) = plan_find(lab, str(tiny_folder), "sst2", settings, (0,))
        one = found[procedure]
        tested[procedure] = plan_controls(one.search, one.dense, KINDS, 1, settings, retrain=False)
        cells += [*one.cells, *(cell for each in tested[procedure] for cell in each.cells)]
    tested["retrained"] = [plan_test(found["neurons"].search, found["neurons"].dense, retrain=True)]
    with pytest.MonkeyPatch.context() as patch:  # the task is so easy that no neuron is needed: the third step is made to fail
        verdicts = iter([True, True, True, False])
        patch.setattr(structured, "holds", lambda *_: next(verdicts))
        lab.run([found["neurons"].search])
    lab.run([*cells, *tested["retrained"][0].cells])
    return World(lab.store.root, data_folder, found, tested)


def test_tickets_say_what_they_are_of_and_load_again(world: World) -> None:
    for procedure, parts in (("neurons", {"neurons"}), ("layers", {"heads", "mlps"})):
        ticket = world.ticket(world.found[procedure].search)
        assert ticket.scope == procedure == ticket.settings["search"]["procedure"]
        assert ticket.mask.parts().keys() == parts and not ticket.mask.removes_nothing and not ticket.mask.is_empty
        assert ticket.sparsity == size_of(ticket.anatomy, ticket.mask).sparsity
        assert ticket.details["path"][0]["kept"] == {procedure: 96 if procedure == "neurons" else 2}
        assert ticket.details["path"][0]["phase"] == "full" and ticket.details["path"][1]["phase"] == procedure
        model: Any = tombola.load(ticket, "found_on")
        for name, part in read_anatomy(model).as_values(ticket.mask).items():
            assert not dict(model.named_parameters())[name][~part].any()
    share = world.ticket(world.found["neurons"].search)
    assert share.details["survival"]["mlps"] == pytest.approx(share.mask.parts()["neurons"].double().mean(1).tolist())


def test_steps_hold_what_was_measured_at_each_trial(world: World) -> None:
    lab = open_lab(world.folder, world.data)
    for procedure, name in (("neurons", "neuron_importance"), ("layers", "layer_importance")):
        search = world.found[procedure].search
        steps, trials = load_file(lab.folder(search) / "steps.safetensors"), len(world.ticket(search).details["path"])
        assert steps[name].shape == ((trials, 2, 48) if procedure == "neurons" else (trials, 2))
        assert {"head_importance", "mlp_importance"} <= steps.keys()
        assert set(world.ticket(search).mask.parts()) <= steps.keys()


def test_controls_in_a_store_are_of_the_same_unit_and_size(world: World) -> None:
    lab = open_lab(world.folder, world.data)
    for procedure in ("neurons", "layers"):
        good = world.ticket(world.found[procedure].search)
        first = load_file(lab.folder(world.found[procedure].search) / "steps.safetensors")
        for one in world.tested[procedure]:
            ticket = world.ticket(one.ticket)
            assert ticket.scope == procedure and ticket.parents == (good.identity,)
            if ticket.kind != "strict-bad":
                assert ticket.mask.counts() == good.mask.counts() and ticket.sparsity == good.sparsity, ticket.kind
            if ticket.kind == "reinit-body":
                assert ticket.mask == good.mask
            shared = {part: it.shared for part, it in good.mask.overlap_by_type(ticket.mask).items()}
            assert ticket.details["shared_with_good"] == shared
            if procedure == "layers":
                assert torch.equal(ticket.mask.parts()["heads"], ticket.mask.parts()["mlps"][:, None].expand(2, 4))
            elif ticket.kind == "random-per-layer":
                assert ticket.details["survival"]["mlps"] == good.details["survival"]["mlps"]
            elif ticket.kind == "bad-lowest":
                scores, kept = first["neuron_importance"][0], ticket.mask.parts()["neurons"]
                assert float(scores[kept].max()) <= float(scores[~kept].min())


def test_a_retrained_ticket_of_neurons_holds_its_zeros_and_has_its_scores(world: World) -> None:
    rows = [row for row in collect(open_lab(world.folder, world.data).store).scores if row.stage == "retrained"]
    assert {row.kind for row in rows} == {"good"} and all(row.agreement is not None and row.agreement.n for row in rows)


def test_the_page_shows_neurons_and_layers(world: World, tmp_path: Path) -> None:
    results = collect(open_lab(world.folder, world.data).store)
    assert {ticket.task for ticket in results.tickets} == {"sst2 (procedure=neurons)", "sst2 (procedure=layers)"}
    by_scope = {ticket.scope: ticket for ticket in results.tickets if ticket.kind == "good"}
    neurons, layers = by_scope["neurons"], by_scope["layers"]
    assert len(neurons.neurons) == 96 and layers.neurons == ()
    assert neurons.head_importance is None and neurons.mlp_importance is not None and len(neurons.mlp_importance) == 2
    html = build_page(results, tmp_path / "page.html").read_text(encoding="utf-8")
    for said in (
        "Which neurons survive", "Which layers survive", "Neurons of 96", "Layers of 2", "Share of neurons", "Share of body",
        "a layer&#39;s neurons that is kept", 'data-column="neurons"', 'data-column="layer"',
    ):  # fmt: skip
        assert said in html or said.replace("&#39;", "'") in html, said
    share = sum(neurons.neurons) / 96
    assert f"{share:.3f}" in html
    assert "two studies are mixed" not in html
    assert "differ from good in size" not in html.replace("strict-bad controls differ", "")


# to a sparsity


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_a_search_to_a_sparsity_ends_there_to_the_part_whatever_the_score(learned: Learned, sparsity: float) -> None:
    anatomy = read_anatomy(learned.model)
    by_neurons = searched(learned, procedure="neurons", sparsity=sparsity)
    assert by_neurons.mask.counts() == {"neurons": (96 - round(96 * sparsity), 96)}
    both = searched(learned, procedure="heads+neurons", sparsity=sparsity)
    assert both.mask.parts().keys() == {"heads", "neurons"} and both.floor_score is None
    sizes = [anatomy.size(trial.mask).sparsity for trial in both.trials]
    a_part = max(1 / 8, 1 / 96)
    assert sizes == sorted(sizes) and sizes[-2] < sparsity <= sizes[-1] + structured.NEAR and sizes[-1] < sparsity + a_part
    assert all(trial.passed for trial in both.trials) and both.mask == both.trials[-1].mask
    for before, after in itertools.pairwise(both.trials):
        assert (before.mask & after.mask) == after.mask, "the path is nested"


def test_a_sparsity_beyond_the_parts_of_a_procedure_is_refused_before_a_pass(learned: Learned) -> None:
    with pytest.raises(SearchError, match="cannot remove so much") as caught:
        searched(learned, procedure="heads", sparsity=0.9)
    assert "at most" in str(caught.value.expected)


def test_the_first_steps_towards_a_sparsity_are_those_towards_a_floor(learned: Learned) -> None:
    down, floor = searched(learned, procedure="neurons", sparsity=0.5), searched(learned, procedure="neurons", floor=0.01)
    *before, last = [trial.mask for trial in down.trials]  # the last step is cut short at the sparsity
    assert before == [trial.mask for trial in floor.trials][: len(before)] and len(before) > 2
    assert last.counts() == {"neurons": (48, 96)}
