"""A gate removes a part by definition: against layers written out by hand in fp64, heads and MLPs really left out."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import tiny_model
from tombola.anatomy import Anatomy, Layout, read_anatomy
from tombola.errors import AnatomyError, FingerprintError, MaskError, TicketError, TombolaError
from tombola.gates import Gates, ablate, first_tensor, hold, load, masked, prove_acts
from tombola.lesion import LESIONS
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.scope import scope_parameters
from tombola.source import fingerprint_folder, resolve_model
from tombola.ticket import Ticket, Weights

LAYERS, HEADS, D = 2, 4, 6
IDS = torch.tensor([[2, 17, 33, 9, 41], [2, 50, 8, 3, 3], [2, 11, 12, 13, 14]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])  # 0 = padding


def mask_of(heads: str, mlps: str) -> Mask:
    """`mask_of("1011 0000", "10")`: rows of heads, then MLPs."""
    return Mask(
        heads=torch.tensor([[char == "1" for char in row] for row in heads.split()]),
        mlps=torch.tensor([char == "1" for char in mlps]),
    )


HOLED = mask_of("1011 0100", "10")
NOTHING_LEFT = mask_of("0000 0000", "00")
FULL = mask_of("1111 1111", "11")


def masks() -> st.SearchStrategy[Mask]:
    bits = st.lists(st.sampled_from("01"), min_size=10, max_size=10).map("".join)
    return bits.map(lambda b: mask_of(f"{b[:4]} {b[4:8]}", b[8:]))


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, attention_mask=REAL, **more).logits
    return out


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------------------------------------- the oracle, by definition


def by_definition(model: Any, mask: Mask) -> Tensor:
    """Logits of BERT or DistilBERT without the parts that `mask` removes, from the weights alone.

    A removed head's slice never enters the output projection: its columns are left out of the product. A removed MLP is
    not computed: the residual goes to the LayerNorm alone.
    """
    w, distil = model.state_dict(), model.config.model_type == "distilbert"
    body, names = ("distilbert.", DISTILBERT) if distil else ("bert.", BERT)
    assert mask.heads is not None and mask.mlps is not None

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return w[f"{name}.weight"] * centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() + w[f"{name}.bias"]

    x = w[f"{body}embeddings.word_embeddings.weight"][IDS] + w[f"{body}embeddings.position_embeddings.weight"][: IDS.shape[1]]
    if not distil:
        x = x + w[f"{body}embeddings.token_type_embeddings.weight"][0]
    x = norm(f"{body}embeddings.LayerNorm", x)
    for i in range(LAYERS):
        q, k, v, o, norm_1, mlp_in, mlp_out, norm_2 = (f"{body}{name.format(i)}" for name in names)
        attended = w[f"{o}.bias"].expand_as(x)
        for head in range(HEADS):
            if mask.heads[i, head]:
                own = slice(head * D, (head + 1) * D)
                queries, keys, values = (linear(name, x)[..., own] for name in (q, k, v))
                scores = queries @ keys.mT / math.sqrt(D)
                scores = scores.masked_fill(REAL[:, None, :] == 0, -math.inf)
                attended = attended + scores.softmax(-1) @ values @ w[f"{o}.weight"][:, own].T
        x = norm(norm_1, x + attended)
        if mask.mlps[i]:
            inner = linear(mlp_in, x)
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            x = norm(norm_2, x + linear(mlp_out, inner))
        else:
            x = norm(norm_2, x)
    first = x[:, 0]
    if distil:
        return linear("classifier", linear("pre_classifier", first).clamp_min(0))
    return linear("classifier", linear("bert.pooler.dense", first).tanh())


BERT = (
    "encoder.layer.{}.attention.self.query",
    "encoder.layer.{}.attention.self.key",
    "encoder.layer.{}.attention.self.value",
    "encoder.layer.{}.attention.output.dense",
    "encoder.layer.{}.attention.output.LayerNorm",
    "encoder.layer.{}.intermediate.dense",
    "encoder.layer.{}.output.dense",
    "encoder.layer.{}.output.LayerNorm",
)
DISTILBERT = (
    "transformer.layer.{}.attention.q_lin",
    "transformer.layer.{}.attention.k_lin",
    "transformer.layer.{}.attention.v_lin",
    "transformer.layer.{}.attention.out_lin",
    "transformer.layer.{}.sa_layer_norm",
    "transformer.layer.{}.ffn.lin1",
    "transformer.layer.{}.ffn.lin2",
    "transformer.layer.{}.output_layer_norm",
)


@pytest.fixture(scope="module")
def doubles() -> dict[str, tuple[Any, Anatomy]]:
    models = {kind: tiny_model(kind).double() for kind in ("bert", "distilbert")}
    return {kind: (model, read_anatomy(model)) for kind, model in models.items()}


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@given(mask=masks())
@example(mask=FULL)
@example(mask=mask_of("0000 1111", "11"))  # a layer without heads
@example(mask=mask_of("1111 1111", "00"))  # no MLPs
@example(mask=mask_of("0000 1111", "01"))  # a layer that is gone
@example(mask=NOTHING_LEFT)
@settings(deadline=None, max_examples=40)
def test_a_gated_model_is_the_model_without_its_parts(kind: str, mask: Mask, doubles: dict[str, tuple[Any, Anatomy]]) -> None:
    model, anatomy = doubles[kind]
    with Gates(model, anatomy, mask):
        gated = logits(model)
    assert (gated - by_definition(model, mask)).abs().max() < 1e-9


def test_the_parts_matter_to_the_oracle(doubles: dict[str, tuple[Any, Anatomy]]) -> None:
    """Every single part, left out, moves the logits far more than the tolerance above: the comparison can fail."""
    for model, _ in doubles.values():
        whole = by_definition(model, FULL)
        for i in range(10):
            bits = "".join("0" if j == i else "1" for j in range(10))
            one_less = mask_of(f"{bits[:4]} {bits[4:8]}", bits[8:])
            assert (by_definition(model, one_less) - whole).abs().max() > 1e-4


def test_closing_the_gate_of_a_head_is_zeroing_its_columns_of_o(family: str) -> None:
    model = tiny_model(family).double()
    anatomy = read_anatomy(model)
    for layer in range(LAYERS):
        for head in range(HEADS):
            cut = copy.deepcopy(model)
            o = cut.get_submodule(anatomy.layers[layer].attention.o.path)
            with torch.no_grad():
                o.weight[:, head * D : (head + 1) * D] = 0
            with ablate(model, layer, head):
                assert (logits(model) - logits(cut)).abs().max() < 1e-12
            assert (logits(model) - logits(cut)).abs().max() > 1e-4


def test_closing_the_gate_of_an_mlp_is_zeroing_its_output(family: str) -> None:
    model = tiny_model(family).double()
    anatomy = read_anatomy(model)
    for i, layer in enumerate(anatomy.layers):
        cut = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in cut.get_submodule(layer.mlp.out.path).parameters():
                parameter.zero_()
        with ablate(model, i):
            assert (logits(model) - logits(cut)).abs().max() < 1e-12


# ------------------------------------------------------------------------------------------------------- a live model


def test_masks_are_switched_at_run_time_and_open_gates_change_no_bit(family: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    untouched, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    with Gates(model, anatomy) as gates:
        assert torch.equal(logits(model), untouched)
        seen = {}
        for mask in (HOLED, NOTHING_LEFT, HOLED, FULL):
            gates.set(mask)
            assert gates.mask == mask
            seen[mask] = (logits(model), *(() if mask not in seen else (seen[mask][0],)))
        assert torch.equal(*seen[HOLED])  # the same mask, later: the same bits
        assert not torch.equal(seen[HOLED][0], seen[NOTHING_LEFT][0])
        assert torch.equal(seen[FULL][0], untouched)
    assert torch.equal(logits(model), untouched)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_removing_gates_leaves_no_hooks_and_may_be_done_twice() -> None:
    model = tiny_model("bert")
    gates = Gates(model, mask=HOLED)
    assert hooks_of(model) == 1 + 3 * LAYERS
    gates.remove()
    gates.remove()
    assert hooks_of(model) == 0
    with pytest.raises(ZeroDivisionError), Gates(model):
        raise ZeroDivisionError
    assert hooks_of(model) == 0


def test_a_mask_with_one_kind_of_part_leaves_the_other_open() -> None:
    model = tiny_model("bert").double()
    with Gates(model, mask=Mask(mlps=torch.tensor([False, True]))) as gates:
        assert gates.mask == mask_of("1111 1111", "01")
        assert (logits(model) - by_definition(model, mask_of("1111 1111", "01"))).abs().max() < 1e-9


def test_a_mask_that_does_not_fit_is_refused_and_leaves_no_hooks() -> None:
    model = tiny_model("bert")
    wrong = Mask(heads=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(MaskError, match="does not fit this bert"):
        Gates(model, mask=wrong)
    assert hooks_of(model) == 0
    with Gates(model, mask=HOLED) as gates:
        before = logits(model)
        with pytest.raises(MaskError, match="does not fit this bert"):
            gates.set(wrong)
        assert torch.equal(logits(model), before) and gates.mask == HOLED


def test_two_sets_of_gates_on_one_model_remove_what_either_removes() -> None:
    model = tiny_model("bert").double()
    with ablate(model, 0, 1), ablate(model, 0, 2), ablate(model, 1):
        assert (logits(model) - by_definition(model, mask_of("1001 1111", "10"))).abs().max() < 1e-9
    assert hooks_of(model) == 0


def test_a_deep_copy_of_a_gated_model_has_gates_of_its_own() -> None:
    model = tiny_model("bert").double()
    model.gates = Gates(model, mask=HOLED)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    twin.gates.set(FULL)
    assert (logits(twin) - by_definition(model, FULL)).abs().max() < 1e-9
    assert (logits(model) - by_definition(model, HOLED)).abs().max() < 1e-9
    twin.gates.remove()
    assert hooks_of(twin) == 0 and hooks_of(model) == 1 + 3 * LAYERS


# ---------------------------------------------------------------------------------------------------- gates per example


def test_gates_per_example_start_at_the_mask_and_act_on_their_own_row_only() -> None:
    model = tiny_model("bert").double()
    with Gates(model, mask=HOLED) as gates:
        heads, mlps = gates.per_example(3)
        assert heads.shape == (LAYERS, 3, HEADS) and mlps.shape == (LAYERS, 3)
        assert heads.requires_grad and heads.is_leaf and mlps.requires_grad and mlps.is_leaf
        start = logits(model)
        assert (start - by_definition(model, HOLED)).abs().max() < 1e-9
        with torch.no_grad():
            heads[0, 1, 0] = 0  # row 1 loses a head, row 2 gets an MLP back
            mlps[1, 2] = 1
        after = logits(model)
        assert torch.equal(after[0], start[0])
        assert (after[1] - by_definition(model, mask_of("0011 0100", "10"))[1]).abs().max() < 1e-9
        assert (after[2] - by_definition(model, mask_of("1011 0100", "11"))[2]).abs().max() < 1e-9
        gates.set(HOLED)
        assert torch.equal(logits(model), logits(model)) and (logits(model) - start).abs().max() < 1e-12


def test_one_backward_pass_gives_each_rows_own_gradient(doubles: dict[str, tuple[Any, Anatomy]]) -> None:
    """Central differences of single rows, h = 1e-5 in fp64: exact to about 1e-9."""
    for model, anatomy in doubles.values():
        with Gates(model, anatomy) as gates:

            def first_logit(heads: Tensor, mlps: Tensor, gates: Gates = gates, model: Any = model) -> Tensor:
                gates._heads, gates._mlps = list(heads.unbind()), list(mlps.unbind())
                out: Tensor = model(input_ids=IDS, attention_mask=REAL).logits[:, 0]
                return out

            heads, mlps = gates.per_example(3)
            model(input_ids=IDS, attention_mask=REAL).logits[:, 0].sum().backward()
            assert heads.grad is not None and mlps.grad is not None
            h = 1e-5
            for layer in range(LAYERS):
                for row in range(3):
                    for head in range(HEADS):
                        ends = []
                        for step in (h, -h):
                            moved = torch.ones(LAYERS, 3, HEADS, dtype=torch.double)
                            moved[layer, row, head] += step
                            with torch.no_grad():
                                ends.append(first_logit(moved, torch.ones(LAYERS, 3, dtype=torch.double))[row])
                        assert float(heads.grad[layer, row, head]) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), abs=1e-8)
                    ends = []
                    for step in (h, -h):
                        moved = torch.ones(LAYERS, 3, dtype=torch.double)
                        moved[layer, row] += step
                        with torch.no_grad():
                            ends.append(first_logit(torch.ones(LAYERS, 3, HEADS, dtype=torch.double), moved)[row])
                    assert float(mlps.grad[layer, row]) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), abs=1e-8)


# -------------------------------------------------------------------------------------------------------------- head_mask


def test_plain_transformers_ignores_head_mask_without_a_word(family: str) -> None:
    """Why gates refuse it: all heads "masked", and not one bit of the output differs."""
    model = tiny_model(family)
    none = torch.zeros(LAYERS, HEADS)
    assert float((logits(model, head_mask=none) - logits(model)).abs().max()) == 0.0


def test_head_mask_is_refused_by_a_gated_model(family: str) -> None:
    model = tiny_model(family)
    with Gates(model):
        with pytest.raises(MaskError, match="head_mask= has no effect in transformers 5") as caught:
            logits(model, head_mask=torch.ones(LAYERS, HEADS))
        assert "tombola.ablate(model, layer, head)" in str(caught.value)
        assert logits(model, head_mask=None).shape == (3, 2)


# ----------------------------------------------------------------------------------------------------- ablate, by hand


def test_ablating_is_putting_on_the_mask_without_that_part() -> None:
    model = tiny_model("distilbert").double()
    with ablate(model, 1, 3) as gates:
        assert gates.mask == mask_of("1111 1110", "11")
        assert (logits(model) - by_definition(model, mask_of("1111 1110", "11"))).abs().max() < 1e-9
    gates = ablate(model, 0)
    assert (logits(model) - by_definition(model, mask_of("1111 1111", "01"))).abs().max() < 1e-9
    gates.remove()
    assert (logits(model) - by_definition(model, FULL)).abs().max() < 1e-9


@pytest.mark.parametrize(("layer", "head"), [(2, 0), (-1, 0), (0, 4), (0, -1), (2, None), (-1, None)])
def test_parts_that_do_not_exist_cannot_be_ablated(layer: int, head: int | None) -> None:
    model = tiny_model("bert")
    with pytest.raises(MaskError, match="no such part to ablate") as caught:
        ablate(model, layer, head)
    assert caught.value.got == (f"layer {layer}" if head is None else f"layer {layer}, head {head}")
    assert caught.value.expected == "layer in 0…1, head in 0…3 (or None for the MLP)"
    assert hooks_of(model) == 0


def test_ablating_with_a_layout_of_ones_own_and_with_a_wrong_one() -> None:
    model = tiny_model("distilbert")
    good = Layout(
        layers="distilbert.transformer.layer",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        mlp_in=("ffn.lin1",),
        mlp_out="ffn.lin2",
    )
    with ablate(model, 0, 0, layout=good) as gates:
        assert gates.mask == mask_of("0111 1111", "11")
    with pytest.raises(AnatomyError, match="did not move what it should"):
        ablate(model, 0, 0, layout=replace(good, q=good.v))


def test_a_part_that_is_gone_already_cannot_be_ablated_again() -> None:
    model = tiny_model("bert")
    with ablate(model, 1, 2), pytest.raises(MaskError, match="the mask did not act") as caught:
        ablate(model, 1, 2)
    assert caught.value.got == "heads of layer 1 change nothing in the output"


# ------------------------------------------------------------------------------------------------------ proof of acting


@pytest.mark.parametrize("mask", [HOLED, NOTHING_LEFT, mask_of("0111 1111", "11"), mask_of("1111 1111", "10")])
def test_masks_are_proved_to_act_in_every_family(family: str, mask: Mask) -> None:
    model = tiny_model(family)
    prove_acts(model, read_anatomy(model), mask)


def test_the_proof_takes_two_passes_and_none_for_a_mask_that_removes_nothing() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    prove_acts(model, anatomy, FULL)
    prove_acts(model, anatomy, Mask())
    assert seen == []
    prove_acts(model, anatomy, HOLED)
    assert seen == [1 + 3, 1 + 3]  # the untouched row, and one for each place: heads of two layers, one MLP


def test_the_proof_leaves_weights_modes_hooks_and_random_state_as_they_were(family: str) -> None:
    model = tiny_model(family).train()
    next(m for m in model.modules() if isinstance(m, nn.Embedding)).eval()
    anatomy, modes = read_anatomy(model), [m.training for m in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    prove_acts(model, anatomy, HOLED)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2
    assert hooks_of(model) == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_mask_whose_zeros_are_in_the_weights_already_is_proved_as_well(family: str) -> None:
    """As after training with a held mask: without random columns the removed heads could not be seen."""
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    hold(model, anatomy, HOLED).remove()
    prove_acts(model, anatomy, HOLED)
    with torch.no_grad():
        for layer in anatomy.layers:
            for part in (layer.attention.o, layer.mlp.out):
                for parameter in model.get_submodule(part.path).parameters():
                    parameter.zero_()
    prove_acts(model, anatomy, HOLED)
    prove_acts(model, anatomy, NOTHING_LEFT)


def around(dense: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The same computation, without calling the module: what fused kernels and compiled graphs do."""
    return lambda x: F.linear(x, dense.weight, dense.bias)


def test_a_model_that_computes_around_its_modules_is_found_out() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    attention, mlp = model.bert.encoder.layer[1].attention.output, model.bert.encoder.layer[1].output
    before = logits(model)
    attention.forward = lambda h, x: attention.LayerNorm(around(attention.dense)(h) + x)
    with Gates(model, anatomy, mask_of("1111 0000", "11")):
        assert torch.equal(logits(model), before)  # the gates never run, and nothing says so
    with pytest.raises(MaskError, match="the mask did not act") as caught:
        prove_acts(model, anatomy, mask_of("0111 1110", "00"))
    assert caught.value.got == "heads of layer 1 change nothing in the output"
    assert "load it anew, uncompiled" in str(caught.value)
    mlp.forward = lambda h, x: mlp.LayerNorm(around(mlp.dense)(h) + x)
    with pytest.raises(MaskError, match="the mask did not act") as caught:
        prove_acts(model, anatomy, mask_of("0111 1110", "00"))
    assert caught.value.got == "heads of layer 1, mlps of layer 1 change nothing in the output"
    assert hooks_of(model) == 0


def test_a_part_whose_output_nobody_reads_is_found_out() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    layer = model.bert.encoder.layer[0]
    computed = layer.forward

    def in_vain(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        computed(x, *args, **kwargs)
        return x

    layer.forward = in_vain
    prove_acts(model, anatomy, mask_of("1111 1010", "10"))
    with pytest.raises(MaskError, match="the mask did not act") as caught:
        prove_acts(model, anatomy, mask_of("1110 1010", "00"))
    assert caught.value.got == "heads of layer 0, mlps of layer 0 change nothing in the output"


def test_gates_that_let_through_what_they_should_remove_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    right = Gates._gate_heads

    def next_head(self: Gates, i: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gate, self._heads[i] = self._heads[i], None if self._heads[i] is None else self._heads[i].roll(1)  # type: ignore[union-attr]
        try:
            return right(self, i, module, args)
        finally:
            self._heads[i] = gate

    for wrong in (next_head, lambda *_: None):
        monkeypatch.setattr(Gates, "_gate_heads", wrong)
        with pytest.raises(MaskError, match="what the mask removes still reaches the output") as caught:
            prove_acts(model, anatomy, mask_of("1111 1011", "11"))
        assert caught.value.got == "heads of layer 1 leak"
    monkeypatch.undo()
    monkeypatch.setattr(Gates, "_gate_mlp", lambda *_: None)
    with pytest.raises(MaskError, match="what the mask removes still reaches the output") as caught:
        prove_acts(model, anatomy, mask_of("1111 1011", "10"))
    assert caught.value.got == "mlps of layer 1 leak"


@pytest.mark.parametrize("as_tuple", [False, True])
def test_models_without_logits_are_proved_by_their_hidden_states(as_tuple: bool) -> None:
    model = tiny_model("bert").bert
    model.config.return_dict = not as_tuple
    prove_acts(model, read_anatomy(model), HOLED)
    with torch.no_grad():
        assert first_tensor(model(IDS)).shape == (3, 5, 24)


# ------------------------------------------------------------------------------------------------------------------ hold


def removed_values(model: Any, anatomy: Anatomy, mask: Mask) -> list[tuple[nn.Parameter, Tensor]]:
    """(parameter, where it is removed), written out for models with as many kv-heads as heads."""
    assert mask.heads is not None and mask.mlps is not None
    found = []
    for layer, heads, mlp in zip(anatomy.layers, mask.heads.tolist(), mask.mlps.tolist(), strict=True):
        for role in ("q", "k", "v", "o"):
            module = model.get_submodule(getattr(layer.attention, role).path)
            weight, bias = torch.zeros_like(module.weight, dtype=torch.bool), torch.zeros_like(module.bias, dtype=torch.bool)
            for head, kept in enumerate(heads):
                own = slice(head * D, (head + 1) * D)
                if not kept and role == "o":
                    weight[:, own] = True
                elif not kept:
                    weight[own], bias[own] = True, True
            found += [(module.weight, weight), (module.bias, bias)]
        for part in (*layer.mlp.ins, layer.mlp.out):
            found += [(p, torch.full_like(p, not mlp, dtype=torch.bool)) for p in model.get_submodule(part.path).parameters()]
    return found


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_held_values_are_zero_and_stay_zero_while_the_rest_learns(family: str, optimiser: str, tmp_path: Path) -> None:
    import transformers

    model = tiny_model(family)
    anatomy = read_anatomy(model)
    with Gates(model, anatomy, HOLED):
        gated = logits(model)
    gates = hold(model, anatomy, HOLED)
    assert gates.mask == HOLED
    assert (logits(model) - gated).abs().max() < 1e-6
    held = removed_values(model, anatomy, HOLED)
    assert (
        sum(int(where.sum()) for _, where in held)
        == 4 * anatomy.layers[0].attention.values_per_head + anatomy.layers[1].mlp.values
    )
    before = [parameter.detach().clone() for parameter, _ in held]

    if optimiser == "adamw":
        step: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    else:
        step = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=True)
    model.train()  # dropout included
    torch.manual_seed(0)
    for _ in range(5):
        step.zero_grad()
        model(input_ids=IDS, attention_mask=REAL, labels=torch.tensor([0, 1, 1])).loss.backward()
        for parameter, where in held:
            assert parameter.grad is not None and not parameter.grad[where].any()  # before clipping: no part of the norm
        step.step()
        for parameter, where in held:
            assert not parameter[where].any()
            assert not any(value[where].any() for value in step.state[parameter].values() if value is not None and value.ndim)
    learnt = [(p.detach() != old)[~where] for (p, where), old in zip(held, before, strict=True)]
    assert torch.cat(learnt).float().mean() > 0.9

    model.eval().save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert hooks_of(plain) == 0
    assert (logits(plain) - logits(model)).abs().max() < 1e-6
    assert read_anatomy(plain) == anatomy


def test_kept_values_are_not_touched_by_holding(family: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gone = {id(parameter): where for parameter, where in removed_values(model, anatomy, HOLED)}
    hold(model, anatomy, HOLED)
    for name, parameter in model.named_parameters():
        where = gone.get(id(parameter), torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[~where], before[name][~where]), name
        assert not parameter[where].any()


def test_a_shared_kv_head_is_held_only_when_all_heads_that_read_it_are_gone() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
        pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config).double().eval()
    anatomy = read_anatomy(model)
    mask = mask_of("0111 0011", "01")  # layer 0 loses half a pair, layer 1 a whole one
    prove_acts(model, anatomy, mask)
    with Gates(model, anatomy, mask):
        gated = logits(model)
    hold(model, anatomy, mask).remove()
    assert (logits(model) - gated).abs().max() < 1e-9
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.k_proj.weight.all() and first.v_proj.weight.all()
    assert not second.k_proj.weight[:D].any() and not second.v_proj.weight[:D].any()
    assert second.k_proj.weight[D:].all() and second.v_proj.weight[D:].all()
    assert not first.q_proj.weight[:D].any() and first.q_proj.weight[D:].all()
    assert not any(p.any() for p in model.model.layers[0].mlp.parameters())


# ------------------------------------------------------------------------------------------------------------------ load

LABELS = ("bad", "good")


@pytest.fixture(scope="module")
def places(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, a model fine-tuned from it (its weights moved a little), and a ticket found on that."""
    root = tmp_path_factory.mktemp("places")
    tuned: Any = load_weights(tiny_folder, LABELS, head_seed=3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(root / "tuned")
    anatomy = read_anatomy(tuned)
    ticket = Ticket(
        mask=HOLED,
        base=Weights(str(tiny_folder), fingerprint_folder(tiny_folder)),
        found_on=Weights("tuned", fingerprint_folder(root / "tuned"), path="../tuned"),
        anatomy=anatomy.summary(),
        kind="good",
        scope="heads+mlps",
        sparsity=anatomy.size(HOLED).sparsity,
        labels=LABELS,
        seeds={"head": 5},
    )
    return {"base": tiny_folder, "tuned": root / "tuned", "ticket": ticket.save_pretrained(root / "ticket")}


def reference(weights: Path, head_seed: int = 0) -> Tensor:
    model: Any = load_weights(weights, LABELS, head_seed=head_seed)
    with Gates(model, mask=HOLED), torch.no_grad():
        out: Tensor = model(input_ids=IDS % 30, attention_mask=REAL).logits
    return out


def output(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS % 30, attention_mask=REAL).logits
    return out


def test_a_ticket_loads_on_base_on_found_on_and_on_ones_own_weights(places: dict[str, Path]) -> None:
    for weights, folder, head_seed in (("base", "base", 5), ("found_on", "tuned", 0), (places["tuned"], "tuned", 0)):
        model: Any = load(places["ticket"], weights)
        assert model.tombola_weights == {
            "weights": str(weights),
            "folder": str(places[folder].resolve()),
            "fingerprint": fingerprint_folder(places[folder]),
        }
        assert not model.training and model.config.id2label == dict(enumerate(LABELS))
        assert model.tombola_gates.mask == HOLED
        assert (output(model) - reference(places[folder], head_seed)).abs().max() < 1e-6
    assert (output(load(places["ticket"], "base")) - output(load(places["ticket"], "found_on"))).abs().max() > 1e-3


def test_a_path_a_name_and_a_ticket_all_load(places: dict[str, Path]) -> None:
    outputs = [
        output(load(ticket)) for ticket in (places["ticket"], str(places["ticket"]), Ticket.from_pretrained(places["ticket"]))
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_held_model_that_was_trained_and_saved_loads_again_under_its_ticket(places: dict[str, Path], tmp_path: Path) -> None:
    model: Any = load(places["ticket"], "base")
    step = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=IDS % 30, attention_mask=REAL, labels=torch.tensor([0, 1, 1])).loss.backward()
    step.step()
    model.save_pretrained(tmp_path)
    again: Any = load(places["ticket"], tmp_path)
    assert (output(again) - output(model)).abs().max() < 1e-6
    assert again.tombola_weights["fingerprint"] == fingerprint_folder(tmp_path) != fingerprint_folder(places["base"])


def test_loading_proves_that_the_mask_acts(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gates, "_gate_mlp", lambda *_: None)
    with pytest.raises(MaskError, match="what the mask removes still reaches the output"):
        load(places["ticket"])


def test_a_loaded_model_refuses_head_mask_and_can_be_copied(places: dict[str, Path]) -> None:
    model: Any = load(places["ticket"], "found_on")
    twin = copy.deepcopy(model)
    with pytest.raises(MaskError, match="head_mask="):
        twin(input_ids=IDS % 30, head_mask=torch.ones(2, 4))
    assert torch.equal(output(twin), output(model))
    model.tombola_gates.remove()
    assert hooks_of(model) == 0 and hooks_of(twin) == 1 + 3 * LAYERS


def test_weights_the_ticket_was_not_made_for_are_refused(places: dict[str, Path]) -> None:
    ticket = Ticket.from_pretrained(places["ticket"])
    wrong_base = replace(ticket, base=replace(ticket.base, name=str(places["tuned"])))
    with pytest.raises(FingerprintError, match="does not belong to the weights of") as caught:
        load(wrong_base)
    assert caught.value.expected == f"fingerprint {ticket.base.fingerprint}"
    wrong_place = replace(ticket, found_on=replace(ticket.found_on, path=str(places["base"])))
    with pytest.raises(FingerprintError, match="does not belong to the weights of tuned"):
        load(wrong_place, "found_on")
    with pytest.raises(TicketError, match="found on are not here"):
        load(replace(ticket, found_on=replace(ticket.found_on, path=None)), "found_on")


def test_weights_of_another_architecture_are_refused_naming_what_differs(places: dict[str, Path], tmp_path: Path) -> None:
    tiny_model("roberta", width=32, d_ffn=64).save_pretrained(tmp_path)
    with pytest.raises(MaskError, match="made for another architecture") as caught:
        load(places["ticket"], tmp_path)
    one_mlp = 33 * 64 + 65 * 32
    assert caught.value.got == {"model_type": "roberta", "d_ffn": 64, "values_per_mlp": [one_mlp] * 2}
    assert caught.value.expected == {"model_type": "bert", "d_ffn": 48, "values_per_mlp": [33 * 48 + 49 * 32] * 2}
    with pytest.raises(TombolaError, match="unknown model"):
        load(places["ticket"], "neither/here")


# -------------------------------------------------------------------------------------------------------- single values


def half_of(model: nn.Module, names: list[str], seed: int = 0) -> dict[str, Tensor]:
    """About half of the values of each of these parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(model.get_parameter(name).shape, generator=generator) < 0.5 for name in names}


def in_scope(model: Any, anatomy: Anatomy, scope: str, seed: int = 0) -> Mask:
    return Mask(values=half_of(model, list(scope_parameters(model, anatomy, scope)), seed))


def with_zeros(model: Any, mask: Mask) -> Any:
    """A copy whose removed single values are zero, set one parameter at a time."""
    cut = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in mask.values.items():
            cut.get_parameter(name).masked_fill_(~kept, 0.0)
    return cut


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: value.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, value in model.state_dict().items()}


def test_gates_refuse_single_values_and_leave_no_hooks() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    values = in_scope(model, anatomy, "body")
    for mask in (values, values & HOLED):
        with pytest.raises(MaskError, match="single values have none") as caught:
            Gates(model, anatomy, mask)
        assert "tombola.masked" in str(caught.value)
        assert hooks_of(model) == 0
    with Gates(model, anatomy, HOLED) as gates:
        with pytest.raises(MaskError, match="single values have none"):
            gates.set(values)
        assert gates.mask == HOLED


@pytest.mark.parametrize("scope", ["prasanna2020", "body+embeddings+head"])
def test_a_masked_model_is_the_copy_with_zeros_under_gates(family: str, scope: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    values, before, dense = in_scope(model, anatomy, scope), state(model), logits(model)
    cut = with_zeros(model, values)
    expected, gated = logits(cut), HOLED & values
    assert (expected - dense).abs().max() > 1e-3, "the mask must matter, or this test shows nothing"
    with masked(model, anatomy, values):
        assert torch.equal(logits(model), expected)
    with masked(model, anatomy, gated), Gates(cut, anatomy, HOLED):
        assert torch.equal(logits(model), logits(cut))
        assert hooks_of(model) == hooks_of(cut)
    assert state(model) == before and torch.equal(logits(model), dense) and hooks_of(model) == 0


def test_a_masked_model_of_heads_and_values_is_the_model_by_definition(doubles: dict[str, tuple[Any, Anatomy]]) -> None:
    for model, anatomy in doubles.values():
        values = in_scope(model, anatomy, "prasanna2020")
        with masked(model, anatomy, HOLED & values):
            assert (logits(model) - by_definition(with_zeros(model, values), HOLED)).abs().max() < 1e-9
        with masked(model, anatomy, HOLED):  # without single values it is gates alone
            assert (logits(model) - by_definition(model, HOLED)).abs().max() < 1e-9


def test_masked_gives_the_weights_back_after_an_error_too() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    with torch.no_grad():  # what a multiplication by zero would not bring back
        model.get_parameter("classifier.weight")[0, :3] = torch.tensor([-0.0, float("inf"), 1e-45])
    before, mask = state(model), HOLED & in_scope(model, anatomy, "*")
    with pytest.raises(ZeroDivisionError), masked(model, anatomy, mask):
        assert state(model) != before
        raise ZeroDivisionError
    assert state(model) == before and hooks_of(model) == 0
    wrong = Mask(values={"classifier.weight": torch.ones(2, 23, dtype=torch.bool)})
    with pytest.raises(MaskError, match="does not fit this bert"), masked(model, anatomy, wrong):
        raise AssertionError("unreachable")
    assert state(model) == before and hooks_of(model) == 0


def test_masked_works_within_itself_and_undoes_what_happened_inside() -> None:
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    a, b, before = in_scope(model, anatomy, "body", 1), in_scope(model, anatomy, "body", 2), state(model)
    with masked(model, anatomy, a):
        inside = state(model)
        with masked(model, anatomy, b):
            both = with_zeros(tiny_model("bert"), a & b).state_dict()
            assert all(torch.equal(value, both[name]) for name, value in model.state_dict().items())
            with torch.no_grad():
                model.get_parameter(next(iter(b.values))).add_(1.0)
        assert state(model) == inside
    assert state(model) == before


@pytest.mark.parametrize("scope", ["body", "prasanna2020", "body:weights", "embeddings", "head", "*.0.*", "*out*:biases"])
def test_masks_of_single_values_are_proved_to_act(family: str, scope: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    scope = "body:biases" if scope == "*out*:biases" and family != "bert" else scope
    prove_acts(model, anatomy, in_scope(model, anatomy, scope))
    prove_acts(model, anatomy, in_scope(model, anatomy, scope) & HOLED)
    everything = {name: torch.zeros_like(part) for name, part in in_scope(model, anatomy, scope).values.items()}
    prove_acts(model, anatomy, Mask(values=everything))


def test_one_value_of_the_last_layer_is_enough_to_be_proved() -> None:
    """The demo model says little with an untrained head: removing one of its values moves it by less than rounding does."""
    model = load_weights(resolve_model("demo").folder, LABELS, head_seed=0)
    anatomy = read_anatomy(model)
    for projection in (anatomy.layers[-1].attention.q, anatomy.layers[-1].mlp.out):
        kept = torch.ones(anatomy.shapes[f"{projection.path}.weight"], dtype=torch.bool)
        kept[0, 0] = False
        prove_acts(model, anatomy, Mask(values={f"{projection.path}.weight": kept}))


def key_biases(anatomy: Anatomy) -> Mask:
    names = [f"{layer.attention.k.path}.bias" for layer in anatomy.layers]
    return Mask(values={name: torch.zeros(anatomy.shapes[name], dtype=torch.bool) for name in names})


def test_key_biases_alone_move_no_softmax_and_are_refused(family: str) -> None:
    for seed in range(3):
        model = tiny_model(family, seed=seed)
        anatomy, before = read_anatomy(model), state(model)
        with pytest.raises(MaskError, match="the mask did not act") as caught:
            prove_acts(model, anatomy, key_biases(anatomy))
        assert caught.value.got == "what it removes does not move the output" and "key biases" in str(caught.value)
        assert state(model) == before
        query = f"{anatomy.layers[0].attention.q.path}.bias"
        prove_acts(model, anatomy, key_biases(anatomy) & Mask(values={query: torch.zeros(24, dtype=torch.bool)}))


def test_rounding_in_a_deep_and_wide_model_is_not_taken_for_an_effect() -> None:
    """Twelve layers of 384: removing all key biases moves the logits of a float32 model, but by rounding alone."""
    model = tiny_model("bert", layers=12, heads=12, width=384, d_ffn=64)
    anatomy = read_anatomy(model)
    with masked(model, anatomy, key_biases(anatomy)):
        without = logits(model)
    assert 0 < (without - logits(model)).abs().max() < 1e-3
    with pytest.raises(MaskError, match="the mask did not act"):
        prove_acts(model, anatomy, key_biases(anatomy))


def test_a_parameter_that_the_model_never_reads_is_refused_by_name() -> None:
    import transformers

    model = tiny_model("bert")
    model.extra = nn.Linear(3, 3)
    anatomy = read_anatomy(model)
    unread = Mask(values={"extra.weight": torch.eye(3) > 0})
    for mask in (unread, unread & in_scope(model, anatomy, "body")):
        with pytest.raises(MaskError, match="the mask did not act") as caught:
            prove_acts(model, anatomy, mask)
        assert caught.value.got == "the model never reads extra.weight"
    prove_acts(model, anatomy, Mask(values={"extra.weight": torch.ones(3, 3, dtype=torch.bool)}))  # loses nothing

    class FirstToken(transformers.BertPreTrainedModel):  # type: ignore[misc]
        """A head that reads the first token itself, and the base has its pooler all the same."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.bert, self.classifier = transformers.BertModel(config), nn.Linear(config.hidden_size, 2)
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.classifier(hidden[:, 0]))

    model = FirstToken(tiny_model("bert").config).eval()
    anatomy = read_anatomy(model)
    prove_acts(model, anatomy, in_scope(model, anatomy, "body:weights"))
    with pytest.raises(MaskError, match="the mask did not act") as caught:
        prove_acts(model, anatomy, in_scope(model, anatomy, "chen2020"))
    assert caught.value.got == "the model never reads bert.pooler.dense.weight"


def test_the_proof_of_values_leaves_weights_gradients_modes_and_random_state_as_they_were(family: str) -> None:
    model = tiny_model(family).train()
    next(m for m in model.modules() if isinstance(m, nn.Embedding)).eval()
    anatomy = read_anatomy(model)
    mask = in_scope(model, anatomy, "body+embeddings")
    frozen = list(mask.values)[::3]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    (kept_gradient, *_) = (p for p in model.parameters() if p.requires_grad)
    kept_gradient.grad = torch.ones_like(kept_gradient)
    modes, before = [m.training for m in model.modules()], state(model)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    for candidate in (mask, mask & HOLED, key_biases(anatomy)):
        try:
            prove_acts(model, anatomy, candidate)
        except MaskError:
            assert candidate == key_biases(anatomy)
        assert state(model) == before
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)
        assert [m.training for m in model.modules()] == modes and len(set(modes)) == 2
        assert torch.equal(torch.get_rng_state(), random_state) and hooks_of(model) == 0
        assert torch.equal(kept_gradient.grad, torch.ones_like(kept_gradient))
        assert sum(p.grad is not None for p in model.parameters()) == 1


def test_a_proof_that_breaks_off_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert").requires_grad_(False)
    anatomy = read_anatomy(model)
    before, calls = state(model), []

    def fail(_: nn.Module, __: tuple[Any, ...]) -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise ZeroDivisionError

    fails_at = 0
    handle = model.register_forward_pre_hook(fail)
    for at in (1, 2, 3):
        fails_at = at
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            prove_acts(model, anatomy, in_scope(model, anatomy, "body"))
        assert state(model) == before and not any(p.requires_grad for p in model.parameters()) and not model.training
    handle.remove()


def test_values_and_heads_are_held_together_while_the_rest_learns(family: str, tmp_path: Path) -> None:
    import transformers

    model = tiny_model(family)
    anatomy = read_anatomy(model)
    values = in_scope(model, anatomy, "body+embeddings")
    with masked(model, anatomy, HOLED & values):
        expected = logits(model)
    gates = hold(model, anatomy, HOLED & values)
    assert (logits(model) - expected).abs().max() < 1e-6
    structured = {id(parameter): where for parameter, where in removed_values(model, anatomy, HOLED)}

    def gone(name: str, parameter: nn.Parameter) -> Tensor:
        where = structured.get(id(parameter), torch.zeros_like(parameter, dtype=torch.bool))
        return where | ~values.values[name] if name in values.values else where

    step = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        step.zero_grad()
        model.train()(input_ids=IDS, attention_mask=REAL, labels=torch.tensor([0, 1, 1])).loss.backward()
        step.step()
        assert not any(bool(p[gone(name, p)].any()) for name, p in model.named_parameters())
    read = [name for name, p in model.named_parameters() if p.grad is not None and "embeddings" not in name]
    moved = torch.cat([(p != start[n])[~gone(n, p)] for n, p in model.named_parameters() if n in read])
    assert moved.float().mean() > 0.9
    model.eval().save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert hooks_of(plain) == 0 and (logits(plain) - logits(model)).abs().max() < 1e-6
    gates.remove()
    assert hooks_of(model) == 0


# --------------------------------------------------------------------------------------------- tickets of values, lesions


@pytest.fixture(scope="module")
def value_ticket(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket of single values for the base and the tuned model of `places`."""
    model: Any = load_weights(places["tuned"], LABELS, head_seed=0)
    anatomy = read_anatomy(model)
    mask = in_scope(model, anatomy, "chen2020")
    before = Ticket.from_pretrained(places["ticket"])
    ticket = replace(
        before,
        mask=mask,
        scope="chen2020",
        sparsity=anatomy.size(mask).sparsity,
        found_on=replace(before.found_on, path="../tuned"),
    )
    return ticket.save_pretrained(places["tuned"].parent / "value-ticket")


def test_a_ticket_of_values_loads_and_holds_exactly_its_zeros(value_ticket: Path, places: dict[str, Path]) -> None:
    mask = Ticket.from_pretrained(value_ticket).mask
    for weights, folder, head_seed in (("base", "base", 5), ("found_on", "tuned", 0), (places["tuned"], "tuned", 0)):
        plain: Any = load_weights(places[folder], LABELS, head_seed=head_seed)
        model: Any = load(value_ticket, weights)
        assert state(model) == state(with_zeros(plain, mask))
        assert torch.equal(output(model), output(with_zeros(plain, mask)))
    step = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model.train()(input_ids=IDS % 30, attention_mask=REAL, labels=torch.tensor([0, 1, 1])).loss.backward()
        step.step()
    for name, kept in mask.values.items():
        assert not model.get_parameter(name)[~kept].any() and model.get_parameter(name)[kept].all()
    twin = copy.deepcopy(model.eval())
    assert torch.equal(output(twin), output(model))
    model.tombola_gates.remove()
    assert hooks_of(model) == 0 and hooks_of(twin) > 0


def test_a_ticket_of_values_of_another_model_is_refused(value_ticket: Path, tmp_path: Path) -> None:
    """The same numbers of everything, as a ticket sums a model up, but other parameters."""
    tiny_model("bert", width=32, d_ffn=48).save_pretrained(tmp_path / "same")
    ticket = Ticket.from_pretrained(value_ticket)
    values = dict(ticket.mask.values)
    renamed = Mask(values={name.replace("query", "kweri"): part for name, part in values.items()})
    with pytest.raises(MaskError, match="does not fit this bert") as caught:
        load(replace(ticket, mask=renamed), tmp_path / "same")
    assert "kweri.weight" in str(caught.value) and "no part of this model" in str(caught.value)
    tiny_model("bert", width=32, d_ffn=40).save_pretrained(tmp_path / "other")
    with pytest.raises(MaskError, match="made for another architecture"):
        load(ticket, tmp_path / "other")


@pytest.mark.parametrize("name", sorted(LESIONS))
def test_the_lesion_of_a_control_is_done_before_its_mask_is_put_on(
    name: str, value_ticket: Path, places: dict[str, Path]
) -> None:
    ticket = replace(Ticket.from_pretrained(value_ticket), details={"lesion": {"name": name, "seed": 11}})
    for weights, folder, head_seed in (("base", "base", 5), ("found_on", "tuned", 0)):
        plain: Any = load_weights(places[folder], LABELS, head_seed=head_seed)
        untouched = state(plain)
        LESIONS[name](plain, read_anatomy(plain), 11)
        model: Any = load(ticket, weights)
        assert state(model) == state(with_zeros(plain, ticket.mask)) != untouched
    other = replace(ticket, details={"lesion": {"name": name, "seed": 12}})
    if name != "shuffle-layers":  # of two layers there is one order but the old one
        assert state(load(other)) != state(load(ticket))


def test_weights_of_ones_own_are_not_destroyed_by_the_lesion_they_were_trained_from(
    value_ticket: Path, places: dict[str, Path]
) -> None:
    """Retrained weights of a re-initialised control: a second re-initialisation would throw the training away."""
    plain = Ticket.from_pretrained(value_ticket)
    control = replace(plain, details={"lesion": {"name": "reinit-body", "seed": 11}})
    assert state(load(control, places["tuned"])) == state(load(plain, places["tuned"]))


def test_an_unknown_lesion_is_refused(value_ticket: Path) -> None:
    ticket = replace(Ticket.from_pretrained(value_ticket), details={"lesion": {"name": "amputation", "seed": 1}})
    with pytest.raises(TicketError, match="unknown lesion") as caught:
        load(ticket)
    assert caught.value.got == "amputation" and "reinit-body" in str(caught.value.expected)


def test_a_control_that_keeps_everything_loads_with_its_lesion(value_ticket: Path, places: dict[str, Path]) -> None:
    ticket = Ticket.from_pretrained(value_ticket)
    full = Mask(values={name: torch.ones_like(part) for name, part in ticket.mask.values.items()})
    control = replace(ticket, mask=full, sparsity=0.0, details={"lesion": {"name": "random-init", "seed": 3}})
    plain: Any = load_weights(places["base"], LABELS, head_seed=5)
    LESIONS["random-init"](plain, read_anatomy(plain), 3)
    assert state(load(control)) == state(plain)
