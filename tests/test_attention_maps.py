"""Attention maps: times f(x_j) they are the attention block's output, in every family; norms against the explicit tensor."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import tiny_family
from test_families import ALL, HEADS, SPLITS, attentions_of, exact, rows_for, weight_of
from tombola.anatomy import read_anatomy
from tombola.attention.maps import AttentionMap, _by_entries, attention_maps, batch_maps, eager, norm_factors
from tombola.errors import AnatomyError, SettingsError
from tombola.gates import Gates
from tombola.tasks.base import Rows
from tombola.tasks.encode import Encoded, encode

every_family = pytest.mark.parametrize("kind", ALL)


def bias_of(model: nn.Module, path: str) -> Tensor:
    module: Any = model.get_submodule(path)
    if getattr(module, "bias", None) is None:
        return torch.zeros(weight_of(model, path).shape[0], dtype=torch.float64)
    bias: Tensor = module.bias.detach()
    return bias


def explicit(model: nn.Module, kind: str, paths: tuple[str, ...], x: Tensor) -> Tensor:
    """f_h(x_j) as the tensor [batch, head, key, out], from what the module of v reads; slices as the family's source has them."""
    *_, v, o = paths
    weight, bias = weight_of(model, v), bias_of(model, v)
    columns = weight_of(model, o)
    d = columns.shape[1] // HEADS
    if len(paths) == 2:
        kv = _kv_heads(weight.shape[0], d)
        weights = list(SPLITS[kind](weight, kv, d)[2])
        biases = [x[:, 0] for x in SPLITS[kind](bias[:, None], kv, d)[2]]
    else:
        weights, biases = list(weight.split(d)), list(bias.split(d))
    per_kv = HEADS // len(weights)
    values = [x @ w.T + b for w, b in zip(weights, biases, strict=True)]
    return torch.stack([values[h // per_kv] @ columns[:, h * d : (h + 1) * d].T for h in range(HEADS)], dim=1)


def _kv_heads(rows: int, d: int) -> int:
    return (rows // d - HEADS) // 2


@every_family
def test_maps_times_f_plus_the_bias_are_the_output_of_attention(kind: str) -> None:
    model = exact(tiny_family(kind).double())
    anatomy, inputs, paths = read_anatomy(model), rows_for(model), attentions_of(kind)
    read, written = [], []
    for path in paths:
        model.get_submodule(path[-2]).register_forward_hook(lambda _, args, out, path=path: read.append((path, args[0])))
        model.get_submodule(path[-1]).register_forward_hook(lambda _, args, out, path=path: written.append((path, out)))
    maps = batch_maps(model, anatomy, inputs)
    read = [(path, x) for path, x in read if x.ndim == 3 and len(x) == 3]
    assert len(maps) == len(written) == len(read) >= len(paths)
    for one, (path, output) in zip(maps, written, strict=True):
        x = read.pop(next(i for i, (p, _) in enumerate(read) if p == path))[1]
        f = explicit(model, kind, path, x)
        total = torch.einsum("bhqk,bhko->bqo", one.raw, f) + bias_of(model, path[-1])
        assert paths[one.block] == path
        torch.testing.assert_close(total, output.reshape(total.shape), rtol=0, atol=1e-12 * float(total.abs().max()))
        torch.testing.assert_close(one.norms, f.norm(dim=-1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one.weighted, (one.raw[..., None] * f[:, :, None]).norm(dim=-1), rtol=1e-10, atol=1e-12)


@every_family
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = tiny_family(kind)
    anatomy, inputs = read_anatomy(model), rows_for(model)
    model.train()
    was = [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
    parts = [model.get_submodule(p.path) for one in anatomy.attentions for p in one.projections]
    batch_maps(model, anatomy, inputs)
    assert model.training
    assert was == [getattr(m.config, "_attn_implementation", None) for m in model.modules() if hasattr(m, "config")]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def test_attention_is_eager_inside_and_given_back_after_an_error() -> None:
    model = tiny_family("bert", attention="sdpa")
    with pytest.raises(RuntimeError, match="in the middle"), eager(model):
        assert model.config._attn_implementation == model.bert.config._attn_implementation == "eager"
        raise RuntimeError("in the middle")
    assert model.config._attn_implementation == "sdpa"


def test_a_model_without_maps_is_refused() -> None:
    model = tiny_family("bert")
    anatomy, inputs, computed = read_anatomy(model), rows_for(model), model.forward
    model.forward = lambda output_attentions=False, **rest: computed(**rest)
    with pytest.raises(AnatomyError, match="this model has no maps"):
        batch_maps(model, anatomy, inputs)


def test_maps_the_model_does_not_compute_with_are_refused() -> None:
    model = tiny_family("bert")
    anatomy, inputs, computed = read_anatomy(model), rows_for(model), model.forward

    def forward(**given: Any) -> Any:
        output = computed(**given)
        output.attentions = tuple(x.roll(1, 1) for x in output.attentions)  # heads in another order
        return output

    model.forward = forward
    with pytest.raises(AnatomyError, match=r"attention\.output\.dense are not what the model computes with"):
        batch_maps(model, anatomy, inputs)
    assert len(batch_maps(model, anatomy, inputs, prove=False)) == 2


def test_a_gated_head_keeps_its_maps_and_a_zeroed_one_weighs_nothing() -> None:
    model = tiny_family("bert")
    anatomy, inputs = read_anatomy(model), rows_for(model)
    mask = anatomy.full_mask()
    assert mask.heads is not None
    open_maps = batch_maps(model, anatomy, inputs)
    mask.heads[0, 1] = False
    with Gates(model, anatomy, mask):
        gated = batch_maps(model, anatomy, inputs)
    torch.testing.assert_close(gated[0].weighted, open_maps[0].weighted)
    assert not torch.allclose(gated[1].raw, open_maps[1].raw)  # the layer above sees the gate
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, 6:12] = 0
    zeroed = batch_maps(model, anatomy, inputs)
    assert float(zeroed[0].weighted[:, 1].abs().max()) == 0 < float(zeroed[0].weighted[:, 0].abs().max())


# ------------------------------------------------------------------------------------------------------- the released fault


def test_the_untransposed_weight_is_the_released_view_and_no_fault_for_conv1d() -> None:
    bert, gpt2 = tiny_family("bert").double(), tiny_family("gpt2").double()
    anatomy, inputs = read_anatomy(bert), rows_for(bert)
    right = batch_maps(bert, anatomy, inputs)
    wrong = batch_maps(bert, anatomy, inputs, norm_map_weight="untransposed")
    attention = bert.bert.encoder.layer[0].attention
    read: list[Tensor] = []
    hook = attention.self.value.register_forward_hook(lambda _, __, output: read.append(output))
    bert(**inputs)
    hook.remove()
    # as written there: dense.weight viewed as (heads, d_head, hidden), and each head's value times its part
    viewed = attention.output.dense.weight.detach().view(4, 6, 24)
    expected = torch.einsum("bkhd,hdo->bhko", read[0].unflatten(-1, (4, 6)), viewed).norm(dim=-1)
    torch.testing.assert_close(wrong[0].norms, expected.detach())
    torch.testing.assert_close(wrong[0].raw, right[0].raw)
    assert not torch.allclose(wrong[0].norms, right[0].norms, rtol=0.01)
    pair = [norm_factors(gpt2, read_anatomy(gpt2), option)[0].abs() for option in ("out_projection", "untransposed")]
    torch.testing.assert_close(*pair)


# ------------------------------------------------------------------------------------------------------------ rows of text


@pytest.fixture(scope="module")
def pairs(tiny_folder: Path) -> tuple[Any, Encoded]:
    """A tiny BERT and pairs of sentences of different length, two of one length."""
    from transformers import AutoTokenizer

    texts = [("the film was good", "a plot"), ("a bad plot and a dull actor", "the scene"), ("film", "scene"), ("a film", "plot")]
    rows = Rows(tuple(f"dev:{i}" for i in range(4)), tuple(texts), (0, 1, 0, 1))
    from conftest import tiny_model

    model = tiny_model("bert")
    return model, encode(AutoTokenizer.from_pretrained(tiny_folder), rows, 32)


def alone(model: Any, encoded: Encoded, row: int, names: tuple[str, ...] = ("input_ids", "token_type_ids")) -> Iterator[Tensor]:
    """The maps of one row without any padding, by the model's own hand."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        inputs = {name: torch.tensor([encoded.inputs[row][name]]) for name in names}
        maps = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return (x[0] for x in maps)


@pytest.mark.parametrize("entries", [1, 600, 10**6])
def test_rows_come_once_each_with_their_real_tokens_only(pairs: tuple[Any, Encoded], entries: int) -> None:
    model, encoded = pairs
    seen = {}
    for row in attention_maps(model, read_anatomy(model), encoded, entries_per_batch=entries):
        n = encoded.lengths[row.row]
        assert row.id == encoded.ids[row.row] and row.tokens == encoded.inputs[row.row]["input_ids"]
        for one, expected in zip(row.maps, alone(model, encoded, row.row), strict=True):
            assert one.raw.shape == (4, n, n) and one.norms.shape == (4, n)
            torch.testing.assert_close(one.raw, expected, rtol=0, atol=1e-6)
        seen[row.row] = row
    assert sorted(seen) == [0, 1, 2, 3]


def test_segment_ids_are_passed_and_the_released_option_drops_them_and_keeps_pads(pairs: tuple[Any, Encoded]) -> None:
    model, encoded = pairs
    anatomy, longest = read_anatomy(model), max(encoded.lengths)
    full = {row.row: row for row in attention_maps(model, anatomy, encoded)}
    padded = {row.row: row for row in attention_maps(model, anatomy, encoded, map_inputs="full")}
    released = {row.row: row for row in attention_maps(model, anatomy, encoded, map_inputs="no_segment_ids_with_pad")}
    for i in range(4):
        n = encoded.lengths[i]
        assert padded[i].maps[0].raw.shape == released[i].maps[0].raw.shape == (4, longest, longest)
        assert padded[i].tokens[n:] == (encoded.pad["input_ids"],) * (longest - n)
        torch.testing.assert_close(padded[i].maps[1].raw[:, :n, :n], full[i].maps[1].raw, rtol=0, atol=1e-6)
        without = list(alone(model, encoded, i, ("input_ids",)))
        torch.testing.assert_close(released[i].maps[1].raw[:, :n, :n], without[1], rtol=0, atol=1e-6)
        assert float((released[i].maps[1].raw[:, :n, :n] - full[i].maps[1].raw).abs().max()) > 1e-3


def test_a_row_keeps_nothing_of_its_batch_alive(pairs: tuple[Any, Encoded]) -> None:
    model, encoded = pairs
    row = next(iter(attention_maps(model, read_anatomy(model), encoded)))
    for one in row.maps:
        assert one.raw.untyped_storage().nbytes() == one.raw.numel() * 4
        assert one.norms.untyped_storage().nbytes() == one.norms.numel() * 4


def test_no_tensor_of_a_batch_is_as_large_as_head_query_key_d(pairs: tuple[Any, Encoded]) -> None:
    model, encoded = pairs
    anatomy, largest = read_anatomy(model), 0

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watching():
        rows = list(attention_maps(model, anatomy, encoded, entries_per_batch=1))
    gc.collect()
    longest, width = max(encoded.lengths), 24
    assert len(rows) == 4 and largest < 4 * longest * longest * width / 4


def test_unknown_options_are_refused_together(pairs: tuple[Any, Encoded]) -> None:
    model, encoded = pairs
    with pytest.raises(SettingsError, match="2 settings are wrong") as refused:
        given: dict[str, Any] = {"norm_map_weight": "gram", "map_inputs": "half"}
        attention_maps(model, read_anatomy(model), encoded, **given)
    assert "norm_map_weight" in str(refused.value) and "map_inputs" in str(refused.value)


def test_encoders_with_a_decoder_hand_out_cross_maps_too(tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    model = tiny_family("bart")
    rows = Rows(("a", "b"), (("the film was good",), ("a plot",)), (0, 1))
    encoded = encode(AutoTokenizer.from_pretrained(tiny_folder), rows, 32)
    inputs = tuple({"input_ids": (*row["input_ids"][:-1], 2)} for row in encoded.inputs)  # BART's own end of text
    encoded = Encoded(encoded.ids, inputs, encoded.labels, 0, {"input_ids": 0})
    for row in attention_maps(model, read_anatomy(model), encoded):
        assert [one.kind for one in row.maps] == ["self", "self", "self", "cross", "self", "cross"]
        for one in row.maps:
            torch.testing.assert_close(one.raw.sum(-1), torch.ones_like(one.raw.sum(-1)))


def test_weighted_maps_scale_columns() -> None:
    raw = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])
    one = AttentionMap(0, 0, "self", raw, torch.tensor([[2.0, 4.0]]))
    assert one.weighted.tolist() == [[[0.5, 3.0], [1.0, 2.0]]]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 50_000))
def test_batches_hold_no_more_than_they_may(sizes: list[int], n_maps: int, most: int) -> None:
    batches = list(_by_entries(sizes, n_maps, most))
    assert sorted(row for batch in batches for row in batch) == list(range(len(sizes)))
    for batch in batches:
        longest = max(sizes[row] for row in batch)
        assert len(batch) == 1 or len(batch) * n_maps * longest**2 <= most
