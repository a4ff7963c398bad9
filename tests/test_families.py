"""One contract, kept by every family of transformers that is read: what the anatomy says is where it says, and how much it says.

Where things are comes from the families' own source code (`WHERE`, `SPLITS`), not from tombola; what a gate does, from copies of
the model in which weights are zero.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from transformers.models.vit import modeling_vit

import tombola
from conftest import FAMILIES, TINY, tiny_family
from tombola.anatomy import Anatomy, Layout, read_anatomy, same_anatomy
from tombola.errors import AnatomyError, MaskError
from tombola.gates import Gates, ablate, hold, masked, prove_acts
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.prune import prune
from tombola.scope import scope_parameters, scope_sizes
from tombola.scores import gate_gradients
from tombola.source import fingerprint_folder
from tombola.ticket import Ticket, Weights

HEADS = 4


@dataclass(frozen=True)
class Where:
    """One list of layers, as its source code has it; "qkv" is one name where they are fused."""

    layers: str  # with {} for the number of the layer
    qkv: tuple[str, ...]
    o: str
    ins: tuple[str, ...]
    out: str
    cross: tuple[str, ...] = ()  # q, k, v, o
    n: int = 2
    kv: int = 4
    d_head: int = 6
    d_ffn: int = 40
    fused_mlp: bool = False  # gate and up in one module


_BERT = Where(
    "bert.encoder.layer.{}.",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
)
_DEBERTA = replace(
    _BERT,
    layers="deberta.encoder.layer.{}.",
    qkv=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
)
_LLAMA = Where(
    "model.layers.{}.",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    kv=2,
)
_OPT = Where(
    "model.decoder.layers.{}.",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.out_proj",
    ("fc1",),
    "fc2",
)
_NEOX = Where(
    "gpt_neox.layers.{}.",
    ("attention.query_key_value",),
    "attention.dense",
    ("mlp.dense_h_to_4h",),
    "mlp.dense_4h_to_h",
    d_head=8,
)
_GPT2 = Where("transformer.h.{}.", ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj")
_FALCON = replace(_NEOX, layers="transformer.h.{}.", qkv=("self_attention.query_key_value",), o="self_attention.dense")


def _bart() -> tuple[Where, ...]:
    encoder = replace(_OPT, layers="model.encoder.layers.{}.")
    cross = tuple(f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out"))
    return (encoder, replace(encoder, layers="model.decoder.layers.{}.", cross=cross))


def _t5(*ins: str) -> tuple[Where, ...]:
    def stack(name: str, last: int) -> Where:
        mlp = f"layer.{last}.DenseReluDense."
        return Where(
            f"transformer.{name}.block.{{}}.",
            tuple(f"layer.0.SelfAttention.{role}" for role in "qkv"),
            "layer.0.SelfAttention.o",
            tuple(mlp + one for one in ins),
            mlp + "wo",
            d_head=8,
        )

    cross = tuple(f"layer.1.EncDecAttention.{role}" for role in "qkvo")
    return (stack("encoder", 1), replace(stack("decoder", 2), cross=cross))


_VIT = Where(
    "vit.layers.{}.", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj", ("mlp.fc1",), "mlp.fc2"
)
_EARLY_VIT = Where(  # of the first releases of transformers 5, which call k, v, q in this order
    "vit.encoder.layer.{}.",
    ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
)

WHERE: dict[str, tuple[Where, ...]] = {
    "bert": (_BERT,),
    "roberta": (replace(_BERT, layers="roberta.encoder.layer.{}."),),
    "electra": (replace(_BERT, layers="electra.encoder.layer.{}."),),
    "distilbert": (
        Where(
            "distilbert.transformer.layer.{}.",
            ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "attention.out_lin",
            ("ffn.lin1",),
            "ffn.lin2",
        ),
    ),
    "albert": (
        Where(
            "albert.encoder.albert_layer_groups.{}.",
            tuple(f"albert_layers.0.attention.{name}" for name in ("query", "key", "value")),
            "albert_layers.0.attention.dense",
            ("albert_layers.0.ffn",),
            "albert_layers.0.ffn_output",
            n=1,  # three layers run it
        ),
    ),
    "mpnet": (
        replace(
            _BERT,
            layers="mpnet.encoder.layer.{}.",
            qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
            o="attention.attn.o",
        ),
    ),
    "deberta-v2": (_DEBERTA,),
    "deberta-v2-own": (_DEBERTA,),
    "modernbert": (Where("model.layers.{}.", ("attn.Wqkv",), "attn.Wo", ("mlp.Wi",), "mlp.Wo", n=3, fused_mlp=True),),
    "gpt2": (_GPT2,),
    "gpt_neox": (_NEOX,),
    "opt": (_OPT,),
    "opt-post": (_OPT,),
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_LLAMA,),
    "qwen3": (replace(_LLAMA, d_head=8),),
    "gemma3": (replace(_LLAMA, d_head=8),),
    "phi3": (replace(_LLAMA, qkv=("self_attn.qkv_proj",), ins=("mlp.gate_up_proj",), d_head=8, fused_mlp=True),),
    "bart": _bart(),
    "t5": _t5("wi"),
    "t5-gated": _t5("wi_0", "wi_1"),
    "vit": (_EARLY_VIT if hasattr(modeling_vit, "ViTEncoder") else _VIT,),
    "falcon": (replace(_FALCON, kv=2),),
    "falcon-mq": (replace(_FALCON, kv=1),),
    "bloom": (replace(_FALCON, d_ffn=128),),
    "gptj": (
        Where(
            "transformer.h.{}.",
            ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "attn.out_proj",
            ("mlp.fc_in",),
            "mlp.fc_out",
            d_head=8,
        ),
    ),
    "bigcode": (_GPT2,),
    "bigcode-mq": (replace(_GPT2, kv=1),),
}

# How the source of a family cuts the fused weight [out, in] into the rows of q, k and v of each head: views, not copies.
Split = Callable[[Tensor, int, int], tuple[list[Tensor], list[Tensor], list[Tensor]]]


def one_after_the_other(weight: Tensor, kv: int, d: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """GPT-2: `c_attn(x).split(width)`; Phi-3 and GPTBigCode: the same by positions; ModernBERT: `view(…, 3, heads, d)`."""
    q, k, v = weight.split([HEADS * d, kv * d, kv * d])
    return list(q.split(d)), list(k.split(d)), list(v.split(d))


def head_by_head(weight: Tensor, kv: int, d: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """GPT-NeoX: `view(…, heads, 3 · d).chunk(3)`; BLOOM and GPTBigCode likewise."""
    of_heads = weight.unflatten(0, (HEADS, 3, d))
    return list(of_heads[:, 0]), list(of_heads[:, 1]), list(of_heads[:, 2])


def group_by_group(weight: Tensor, kv: int, d: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Falcon 40B: `view(…, kv-heads, heads / kv-heads + 2, d)`, of which the last two are k and v."""
    groups = weight.unflatten(0, (kv, HEADS // kv + 2, d))
    return [head for group in groups for head in group[:-2]], list(groups[:, -2]), list(groups[:, -1])


def with_k_and_v_at_the_end(weight: Tensor, kv: int, d: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Falcon 7B: `view(…, heads + 2, d)`."""
    of_heads = list(weight.unflatten(0, (HEADS + 2, d)))
    return of_heads[:-2], of_heads[-2:-1], of_heads[-1:]


SPLITS: dict[str, Split] = {
    "gpt2": one_after_the_other,
    "phi3": one_after_the_other,
    "modernbert": one_after_the_other,
    "bigcode-mq": one_after_the_other,
    "gpt_neox": head_by_head,
    "bloom": head_by_head,
    "bigcode": head_by_head,
    "falcon": group_by_group,
    "falcon-mq": with_k_and_v_at_the_end,
}

ALL = [*TINY, *FAMILIES]
every_family = pytest.mark.parametrize("kind", ALL)


def where_of(kind: str) -> list[tuple[Where, str]]:
    """(place, prefix) of each layer, in the order in which they run."""
    return [(where, where.layers.format(i)) for where in WHERE[kind] for i in range(where.n)]


def attentions_of(kind: str) -> list[tuple[str, ...]]:
    """Full paths of (q, k, v, o) or (qkv, o) of each row of heads: in a decoder layer itself, then the encoder."""
    found = []
    for where, prefix in where_of(kind):
        found.append(tuple(prefix + name for name in (*where.qkv, where.o)))
        found += [tuple(prefix + name for name in where.cross)] if where.cross else []
    return found


def body_of(kind: str) -> list[str]:
    """Full paths of the modules of attention and MLPs."""
    mlps = [prefix + name for where, prefix in where_of(kind) for name in (*where.ins, where.out)]
    return [path for attention in attentions_of(kind) for path in attention] + mlps


def weight_of(model: nn.Module, path: str) -> Tensor:
    """[out, in], a view."""
    module: Any = model.get_submodule(path)
    weight: Tensor = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


@functools.cache
def known(kind: str) -> tuple[Any, Anatomy]:
    """A model in fp64 and its anatomy, for tests that leave it as it is."""
    model = tiny_family(kind).double()
    return model, read_anatomy(model)


class Exact(TorchFunctionMode):
    """No step down to fp32: many norms, and softmax in eager attention, take one whatever the model is in."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype"))):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                del kwargs["dtype"]
        if func is Tensor.matmul and len({one.dtype for one in args}) > 1:  # of early releases: fp32 frequencies @ positions
            args = tuple(one.double() for one in args)
        return func(*args, **kwargs)


def exact(model: Any) -> Any:
    """The model, which from now on computes in fp64 throughout."""
    computed = model.forward

    def forward(**inputs: Any) -> Any:
        with Exact():
            return computed(**inputs)

    model.forward = forward
    return model


def rows_for(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Three rows, two of them padded; for an encoder-decoder with one end of text in each."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator).to(next(model.parameters()))}
    ids = torch.randint(5, 60, (3, 6), generator=generator)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    if model.config.is_encoder_decoder:
        ids[torch.arange(3), real.sum(1) - 1] = model.config.eos_token_id
    return {"input_ids": torch.where(real == 1, ids, model.config.pad_token_id), "attention_mask": real}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**rows_for(model)).logits
    return out


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def mask_without(anatomy: Anatomy, heads: list[tuple[int, int]], mlps: tuple[int, ...] = ()) -> Mask:
    full = anatomy.full_mask()
    assert full.heads is not None and full.mlps is not None
    of_heads, of_mlps = full.heads.clone(), full.mlps.clone()
    for row, head in heads:
        of_heads[row, head] = False
    of_mlps[list(mlps)] = False
    return Mask(heads=of_heads, mlps=of_mlps)


def every_third_neuron(anatomy: Anatomy) -> Mask:
    """Of each layer another third."""
    kept = torch.ones(anatomy.n_layers, anatomy.mlps[0].d_ffn, dtype=torch.bool)
    for layer in range(anatomy.n_layers):
        kept[layer, layer % 3 :: 3] = False
    return Mask(neurons=kept)


def some_masks(anatomy: Anatomy) -> dict[str, Mask]:
    last = anatomy.n_attentions - 1
    whole = [(0, head) for head in range(HEADS)]
    neurons = every_third_neuron(anatomy)
    return {
        "first head": mask_without(anatomy, [(0, 0)]),
        "last head of the last row": mask_without(anatomy, [(last, 3)]),
        "half a group": mask_without(anatomy, [(last, 1)]),
        "a whole group": mask_without(anatomy, [(last, 2), (last, 3)]),
        "a row of heads": mask_without(anatomy, whole),
        "an MLP": mask_without(anatomy, [], (anatomy.n_layers - 1,)),
        "an emptied layer": mask_without(anatomy, whole, (0,)),
        "neurons": neurons,
        "a last layer": anatomy.whole_layers(torch.arange(anatomy.n_layers) < anatomy.n_layers - 1),
        "some of all": mask_without(anatomy, [(row, row % HEADS) for row in range(last + 1)] + [(0, 2)], (0,)) & neurons,
        "nothing left": ~anatomy.full_mask(),
    }


def zeroed(model: Any, kept: Mapping[str, Tensor]) -> Any:
    """A copy of the model in which what is not kept is zero."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, part in kept.items():
            parameters[name][~part] = 0
    return twin


@contextmanager
def seen_inputs(model: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """The inputs of a module, as it runs."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------- where, and how much


@every_family
def test_numbers_and_places_are_those_of_the_family(kind: str) -> None:
    model, anatomy = known(kind)
    layers = where_of(kind)
    assert (anatomy.n_layers, anatomy.n_heads, anatomy.n_attentions) == (len(layers), HEADS, len(attentions_of(kind)))
    assert anatomy.model_type == model.config.model_type
    for layer, (where, prefix) in zip(anatomy.layers, layers, strict=True):
        assert layer.path + "." == prefix
        assert [one.kind for one in layer.attentions] == ["self", "cross"][: 1 + bool(where.cross)]
        for attention in layer.attentions:
            assert (attention.n_heads, attention.n_kv_heads, attention.d_head) == (HEADS, where.kv, where.d_head)
            assert attention.o.n_in == HEADS * where.d_head == attention.q.n_out
            assert attention.k.n_out == attention.v.n_out == where.kv * where.d_head
        assert layer.mlp.d_ffn == where.d_ffn
        assert len(layer.mlp.ins) == (2 if where.fused_mlp else len(where.ins))
        assert tuple(dict.fromkeys(one.path for one in layer.mlp.ins)) == tuple(prefix + name for name in where.ins)
        assert layer.mlp.out.path == prefix + where.out
    for attention, paths in zip(anatomy.attentions, attentions_of(kind), strict=True):
        assert tuple(dict.fromkeys(one.path for one in attention.projections)) == paths
    text = model.config.get_text_config()
    assert text.num_attention_heads == HEADS
    if WHERE[kind][0].kv not in (HEADS, 1):
        assert WHERE[kind][0].kv == getattr(text, "num_key_value_heads", None) or text.num_kv_heads


@every_family
def test_values_of_a_part_are_the_parameters_that_go_with_it(kind: str) -> None:
    """Counted in the mask of single values; and all parts, with the biases of o, are all of their modules."""
    model, anatomy = known(kind)

    def gone(mask: Mask) -> int:
        return sum(int((~part).sum()) for part in anatomy.as_values(mask).values())

    per_kv = HEADS // anatomy.attentions[0].n_kv_heads
    for row, attention in enumerate(anatomy.attentions):
        group = [(row, head) for head in range(HEADS - per_kv, HEADS)]
        assert gone(mask_without(anatomy, group)) == per_kv * attention.values_per_head
        if per_kv > 1:  # k and v stay for the others
            d, d_in, d_out = attention.d_head, attention.q.n_in, attention.o.n_out
            assert gone(mask_without(anatomy, group[:1])) == d * (d_in + attention.q.has_bias) + d * d_out
    for i, mlp in enumerate(anatomy.mlps):
        assert gone(mask_without(anatomy, [], (i,))) == mlp.values

    everything = sum(p.numel() for path in body_of(kind) for p in model.get_submodule(path).parameters())
    biases = [getattr(model.get_submodule(paths[-1]), "bias", None) for paths in attentions_of(kind)]
    left = sum(bias.numel() for bias in biases if bias is not None)
    assert anatomy.size(anatomy.full_mask()).maskable_values == everything - left == gone(~anatomy.full_mask())
    assert anatomy.total_parameters == sum(p.numel() for p in model.parameters())


@every_family
def test_heads_lie_where_the_family_itself_cuts_them(kind: str) -> None:
    """A weight of one head is moved, through the family's own cut; of the input of o, the slices of its readers move."""
    untouched, anatomy = known(kind)
    where = WHERE[kind][-1]
    row = anatomy.n_attentions - 1 - bool(where.cross)  # self-attention of the last layer
    attention, paths = anatomy.attentions[row], attentions_of(kind)[row]
    model = copy.deepcopy(untouched)
    if len(paths) == 2:
        cut = SPLITS[kind](weight_of(model, paths[0]), where.kv, where.d_head)
    else:
        cut = tuple(list(weight_of(model, path).split(where.d_head)) for path in paths[:3])  # type: ignore[assignment]
    for projection, of_heads in zip((attention.q, attention.k, attention.v), cut, strict=True):
        assert torch.equal(projection.rows(model.get_submodule(projection.path).weight), torch.cat(of_heads))

    with seen_inputs(model, paths[-1]) as seen:
        logits(model)
        before = seen[0]  # in the first of several uses
        for role, of_heads in zip("qkv", cut, strict=True):
            assert len(of_heads) == (HEADS if role == "q" else where.kv)
            for head, rows in enumerate(of_heads):
                was = rows.clone()
                rows += 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(head)).double()
                seen.clear()
                logits(model)
                rows.copy_(was)
                moved = (seen[0] - before).abs().flatten(0, -2).amax(0).unflatten(0, (HEADS, where.d_head)) > 1e-9
                readers = [head] if role == "q" else [one for one in range(HEADS) if one // (HEADS // where.kv) == head]
                assert moved.all(1).nonzero().flatten().tolist() == readers, (role, head)
                assert moved.any(1).nonzero().flatten().tolist() == readers, (role, head)


@every_family
def test_reading_does_not_depend_on_the_weights(kind: str) -> None:
    """Zeros, as a held mask leaves them, and weights so large that every softmax saturates."""
    _, anatomy = known(kind)
    for factor in (0.0, 1e3):
        model = tiny_family(kind)
        with torch.no_grad():
            for path in body_of(kind):
                for parameter in model.get_submodule(path).parameters():
                    parameter.mul_(factor)
        assert read_anatomy(model) == anatomy


@pytest.mark.parametrize("kind", [kind for kind in ALL if WHERE[kind][0].fused_mlp])
def test_gate_and_up_in_one_module_are_its_two_halves(kind: str) -> None:
    model, anatomy = known(kind)
    for layer, (where, prefix) in zip(anatomy.layers, where_of(kind), strict=True):
        halves = weight_of(model, prefix + where.ins[0]).chunk(2)
        for projection, half in zip(layer.mlp.ins, halves, strict=True):
            assert torch.equal(projection.rows(model.get_submodule(projection.path).weight), half)


# ------------------------------------------------------------------------------------------------------------- gates


@every_family
def test_a_gated_model_is_the_model_without_the_values_of_its_parts(kind: str) -> None:
    model, anatomy = known(kind)
    whole = logits(model)
    with Gates(model, anatomy) as gates:
        for name, mask in some_masks(anatomy).items():
            gates.set(mask)
            gated = logits(model)
            assert furthest(gated, logits(zeroed(model, anatomy.as_values(mask)))) < 1e-9, name
            assert furthest(gated, whole) > 1e-5, name
    assert torch.equal(logits(model), whole)


@every_family
def test_an_ablated_head_is_a_slice_that_never_reaches_o(kind: str) -> None:
    """By a hook of the test's own, at a place and a width that the test knows."""
    model, anatomy = known(kind)
    where = WHERE[kind][-1]
    for row, head in ((0, 1), (anatomy.n_attentions - 1, 3)):

        def without(_: nn.Module, args: tuple[Tensor], head: int = head) -> tuple[Tensor]:
            x = args[0].clone()
            x[..., head * where.d_head : (head + 1) * where.d_head] = 0
            return (x,)

        handle = model.get_submodule(attentions_of(kind)[row][-1]).register_forward_pre_hook(without)
        expected = logits(model)
        handle.remove()
        with ablate(model, row, head):
            assert furthest(logits(model), expected) < 1e-12
        assert furthest(logits(model), expected) > 1e-5
    with ablate(model, anatomy.n_layers - 1) as gates:
        assert gates.mask == mask_without(anatomy, [], (anatomy.n_layers - 1,))
        where, prefix = where_of(kind)[-1]
        without_mlp = zeroed(model, {f"{prefix}{where.out}.{name}": torch.zeros_like(p, dtype=torch.bool)
                                     for name, p in model.get_submodule(prefix + where.out).named_parameters()})  # fmt: skip
        assert furthest(logits(model), logits(without_mlp)) < 1e-9
    with pytest.raises(MaskError, match="no such part to ablate"):
        ablate(model, anatomy.n_attentions, 0)


@every_family
def test_masks_are_proved_to_act(kind: str) -> None:
    model, anatomy = known(kind)
    for name in ("first head", "neurons", "some of all", "nothing left"):
        prove_acts(model, anatomy, some_masks(anatomy)[name])


@every_family
def test_gradients_of_gates_are_the_differences_of_each_rows_own_loss(kind: str) -> None:
    """Where a module runs several times (ALBERT) the gate is of all its uses."""
    model, anatomy = exact(tiny_family(kind).double()), known(kind)[1]
    features, labels = rows_for(model), torch.tensor([1, 0, 1])
    generator = torch.Generator().manual_seed(ALL.index(kind))
    mask = some_masks(anatomy)["half a group"]
    assert mask.heads is not None and mask.mlps is not None
    with Gates(model, anatomy, mask) as gates:
        found = gate_gradients(gates, [(torch.arange(3), {**features, "labels": labels})], 3)

        def losses(unit: str, at: tuple[int, ...], step: float) -> Tensor:
            heads, mlps = mask.heads[:, None].repeat(1, 3, 1).double(), mask.mlps[:, None].repeat(1, 3).double()
            gate = {"heads": heads, "mlps": mlps}[unit]
            gate[(at[0], slice(None), *at[1:])] += step
            gates._heads, gates._mlps = list(heads.unbind()), list(mlps.unbind())
            with torch.no_grad():
                return cross_entropy(model(**features).logits, labels, reduction="none")

        h = 1e-5
        for unit, shape in (("heads", (anatomy.n_attentions, HEADS)), ("mlps", (anatomy.n_layers,))):
            for _ in range(3 if unit == "heads" else 1):
                at = tuple(int(torch.randint(n, (1,), generator=generator)) for n in shape)
                rows = getattr(found, unit)[(slice(None), *at)]
                assert furthest(rows, (losses(unit, at, h) - losses(unit, at, -h)) / (2 * h)) < 1e-8, (unit, at)
                assert float(rows.abs().max()) > 1e-4, (unit, at)


@every_family
def test_a_removed_neuron_is_a_column_of_out_and_a_removed_layer_all_its_parts(kind: str) -> None:
    """The neuron that says most, since one behind a ReLU may say nothing."""
    model, anatomy = known(kind)
    whole, places = logits(model), where_of(kind)
    for layer in {0, anatomy.n_layers - 1}:
        where, prefix = places[layer]
        with seen_inputs(model, prefix + where.out) as seen:
            logits(model)
        neuron = int(seen[0].abs().flatten(0, -2).sum(0).argmax())
        column = torch.ones(weight_of(model, prefix + where.out).shape, dtype=torch.bool)
        column[:, neuron] = False
        stored: Any = model.get_submodule(prefix + where.out)
        without = zeroed(model, {f"{prefix}{where.out}.weight": column.T if column.shape != stored.weight.shape else column})
        with ablate(model, layer, neuron=neuron) as gates:
            assert furthest(logits(model), logits(without)) < 1e-9
            assert int((~gates.mask.parts()["neurons"]).sum()) == 1
        assert furthest(logits(without), whole) > 1e-6
        rows = [row for row, at in enumerate(anatomy.layer_of_attention) if at == layer]
        kept = torch.arange(anatomy.n_layers) != layer
        heads = [(row, head) for row in rows for head in range(HEADS)]
        assert anatomy.whole_layers(kept) == mask_without(anatomy, heads, (layer,))
        assert [attentions_of(kind)[row][-1].startswith(prefix) for row in range(anatomy.n_attentions)] == [
            row in rows for row in range(anatomy.n_attentions)
        ]
    with pytest.raises(MaskError, match="no such part to ablate"):
        ablate(model, 0, neuron=anatomy.mlps[0].d_ffn)


@every_family
def test_gradients_of_neurons_and_layers_are_the_differences_of_each_rows_own_loss(kind: str) -> None:
    """By factors on weights, without gates: of a neuron on its column of out, of a layer on every o and on all of out."""
    model, anatomy = exact(tiny_family(kind).double()), known(kind)[1]
    features, labels = rows_for(model), torch.tensor([1, 0, 1])
    generator = torch.Generator().manual_seed(ALL.index(kind))
    with Gates(model, anatomy) as gates:
        batch = [(torch.arange(3), {**features, "labels": labels})]
        found = gate_gradients(gates, batch, 3, neurons=("per_example", 64))
        opened = gates.neurons_per_example(3)
        loss = cross_entropy(model(**features).logits, labels, reduction="sum")
        (of_neurons,) = torch.autograd.grad(loss, opened)
    assert found.neurons is not None and furthest(found.neurons, of_neurons.abs().mean(1)) < 1e-12
    of_layers = found.layers(anatomy.layer_of_attention)

    def slope(scaled: list[Tensor]) -> Tensor:
        losses = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            before = [view.clone() for view in scaled]
            with torch.no_grad():
                for view in scaled:
                    view.mul_(factor)
                losses.append(cross_entropy(model(**features).logits, labels, reduction="none"))
                for view, was in zip(scaled, before, strict=True):
                    view.copy_(was)
        return (losses[0] - losses[1]) / 2e-5

    for _ in range(3):
        layer = int(torch.randint(anatomy.n_layers, (1,), generator=generator))
        where, prefix = where_of(kind)[layer]
        neuron = int(of_neurons[layer].abs().amax(0).topk(6).indices[int(torch.randint(6, (1,), generator=generator))])
        by_hand = slope([weight_of(model, prefix + where.out)[:, neuron]])
        assert furthest(of_neurons[layer, :, neuron], by_hand) < 1e-8
        assert float(by_hand.abs().max()) > 1e-6
    for layer, (where, prefix) in enumerate(where_of(kind)):
        paths = [paths[-1] for paths in attentions_of(kind) if paths[-1].startswith(prefix)]
        out = [p.detach() for p in model.get_submodule(prefix + where.out).parameters()]
        by_hand = slope([weight_of(model, path) for path in paths] + out)
        assert furthest(of_layers[:, layer], by_hand) < 1e-8
        assert float(by_hand.abs().max()) > 1e-5


@every_family
def test_each_kernel_of_attention_gives_the_same_under_gates(kind: str) -> None:
    model, anatomy = known(kind)
    outputs = []
    for attention in ("eager", "sdpa"):
        try:
            twin = tiny_family(kind, attention=attention)
        except ValueError as error:
            pytest.skip(f"transformers has no {attention} for it: {str(error)[:60]}")
        twin = exact(twin.double())
        twin.load_state_dict(model.state_dict())
        assert twin.config._attn_implementation == attention
        with Gates(twin, anatomy, some_masks(anatomy)["some of all"]):
            outputs.append(logits(twin))
    assert furthest(*outputs) < 1e-9


# -------------------------------------------------------------------------------------------------- tickets, training


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Two models of which at most one is of the family in hand."""
    root = tmp_path_factory.mktemp("strangers")
    for kind in ("electra", "llama"):
        tiny_family(kind).save_pretrained(root / kind)
    return {kind: root / kind for kind in ("electra", "llama")}


@every_family
def test_a_ticket_goes_through_a_folder(kind: str, tmp_path: Path, strangers: Mapping[str, Path]) -> None:
    if kind == "vit":
        pytest.skip("tombola.load makes classifiers of text")
    tiny_family(kind).save_pretrained(tmp_path / "model")
    model: Any = load_weights(tmp_path / "model", ("bad", "good"), head_seed=0)
    anatomy = read_anatomy(model)
    mask = some_masks(anatomy)["some of all"]
    weights = Weights(str(tmp_path / "model"), fingerprint_folder(tmp_path / "model"))
    size = anatomy.size(mask)
    made = Ticket(
        mask=mask, base=weights, found_on=weights, anatomy=anatomy.summary(), kind="good", scope="heads+mlps",
        sparsity=size.sparsity, labels=("bad", "good"), seeds={"head": 0},
    )  # fmt: skip
    made.save_pretrained(tmp_path / "ticket")
    ticket = Ticket.from_pretrained(tmp_path / "ticket")
    assert ticket.mask == mask and same_anatomy(ticket.anatomy, anatomy.summary()) == []
    loaded: Any = tombola.load(ticket, "base")
    assert loaded.tombola_gates.mask == mask
    with Gates(model, anatomy, mask):
        gated = logits(model)
    assert furthest(logits(loaded), gated) < 1e-6 * max(1.0, float(gated.abs().max()))
    stranger = "electra" if kind in ("llama", "mistral") else "llama"
    with pytest.raises(MaskError, match="made for another architecture") as caught:
        tombola.load(ticket, strangers[stranger])
    assert caught.value.got["model_type"] == stranger


@every_family
def test_held_values_stay_zero_in_a_training_step_and_the_saved_model_needs_no_gates(kind: str, tmp_path: Path) -> None:
    import transformers

    model = tiny_family(kind)
    anatomy = read_anatomy(model)
    mask = some_masks(anatomy)["some of all"]
    hold(model, anatomy, mask)
    kept = anatomy.as_values(mask)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model.train()
    torch.manual_seed(0)
    model(**rows_for(model), labels=torch.tensor([1, 0, 1])).loss.backward()
    parameters = dict(model.named_parameters())
    assert not any(parameters[name].grad[~part].any() for name, part in kept.items())
    step.step()
    assert not any(parameters[name][~part].any() for name, part in kept.items())
    learnt = [(parameters[name].detach() != before[name])[part] for name, part in kept.items()]
    assert torch.cat(learnt).float().mean() > 0.9

    trained = logits(model.eval())
    model.save_pretrained(tmp_path)
    plain: Any = type(model).from_pretrained(tmp_path).eval()
    assert isinstance(plain, transformers.PreTrainedModel) and not plain._forward_pre_hooks
    assert furthest(logits(plain), trained) < 1e-5 * float(trained.abs().max())
    assert read_anatomy(plain) == anatomy


@every_family
def test_scopes_are_of_the_same_parts_and_single_values_are_masked(kind: str) -> None:
    model, anatomy = known(kind)
    body = {f"{path}.{name}" for path in body_of(kind) for name, _ in model.get_submodule(path).named_parameters()}
    assert set(scope_parameters(model, anatomy, "body")) == body
    pooler = {name for name, _ in model.named_parameters() if ".pooler." in f".{name}" and name.endswith("weight")}
    assert set(scope_parameters(model, anatomy, "chen2020")) == {name for name in body if name.endswith("weight")} | pooler
    sizes = scope_sizes(model, anatomy)
    parameters = dict(model.named_parameters())
    assert sizes["body"] == sizes["body:weights"] + sizes.get("body:biases", 0) == sum(parameters[n].numel() for n in body)
    biases = {f"{prefix}{where.out}.bias" for where, prefix in where_of(kind)} & body
    assert set(scope_parameters(model, anatomy, "prasanna2020")) == body - biases
    assert sizes["head"] > 0 and sizes["embeddings" if kind != "vit" else "head"] > 0

    scope = scope_parameters(model, anatomy, "body:weights")
    values = prune({name: p.detach().abs() for name, p in scope.items()}, 0.3)
    n = sum(p.numel() for p in scope.values())
    assert sum(int((~part).sum()) for part in values.values()) == round(0.3 * n)
    removed = torch.cat([scope[name].detach().abs()[~part] for name, part in values.items()])
    assert removed.max() <= torch.cat([scope[name].detach().abs()[part] for name, part in values.items()]).min()
    mask, whole = Mask(values=values), logits(model)
    with masked(model, anatomy, mask):
        assert furthest(logits(model), logits(zeroed(model, values))) == 0.0
        assert furthest(logits(model), whole) > 1e-5
    assert torch.equal(logits(model), whole)
    assert anatomy.size(mask).sparsity == pytest.approx(round(0.3 * n) / n, abs=1e-12)
    prove_acts(model, anatomy, mask)
    heads, mlps = anatomy.survival(Mask(values=anatomy.as_values(some_masks(anatomy)["a whole group"])))
    whole_group = heads[-1, 2:] if anatomy.attentions[-1].n_kv_heads > 1 else heads[-1, 2:] * 0
    assert not whole_group.any() and bool((mlps == 1).all())


# ------------------------------------------------------------------------------------------------------- wrong readings


FUSED = ["gpt2", "gpt_neox", "modernbert", "phi3", "falcon", "bloom", "bigcode"]


def layouts_of(kind: str, **changed: Any) -> tuple[Layout, ...]:
    """What a user would write by hand for the layers in `WHERE`."""
    layouts = []
    for where in WHERE[kind]:
        qkv = dict(zip(("qkv",) if len(where.qkv) == 1 else "qkv", where.qkv, strict=True))
        cross = dict(zip(("cross_q", "cross_k", "cross_v", "cross_o"), where.cross, strict=True)) if where.cross else {}
        parts = {"layers": where.layers.removesuffix(".{}."), **qkv, "o": where.o, "mlp_in": where.ins, "mlp_out": where.out}
        layouts.append(Layout(**{**parts, **cross, **changed}))
    return tuple(layouts)


def as_yaml(layouts: tuple[Layout, ...]) -> str:
    """As a user would write it, by hand: nothing that is not given."""
    text = []
    for layout in layouts:
        said = {field.name: getattr(layout, field.name) for field in fields(layout)}
        lines = [
            f"{name}: [{', '.join(value)}]" if isinstance(value, tuple) else f"{name}: {value}"
            for name, value in said.items()
            if value is not None
        ]
        text.append("- " + "\n  ".join(lines))
    return "\n".join(text) + "\n"


@every_family
def test_a_layout_by_hand_and_one_from_a_file_give_the_same_anatomy(kind: str, tmp_path: Path) -> None:
    """A decoder with its encoder is two lists of layers, one of them with cross-attention."""
    model, anatomy = known(kind)
    layouts = layouts_of(kind)
    assert read_anatomy(model, layouts) == anatomy
    (tmp_path / "layout.yaml").write_text(as_yaml(layouts), encoding="utf-8")
    assert Layout.from_yaml(tmp_path / "layout.yaml") == layouts


@pytest.mark.parametrize("kind", FUSED)
def test_a_fused_order_that_is_not_the_models_own_is_refused(kind: str) -> None:
    model, anatomy = known(kind)
    right = "concat" if SPLITS[kind] is one_after_the_other else "grouped"
    wrong = {"concat": "grouped", "grouped": "concat"}[right]
    assert read_anatomy(model, layouts_of(kind, fused=right)) == anatomy
    with pytest.raises(AnatomyError, match="did not move what it should"):
        read_anatomy(model, layouts_of(kind, fused=wrong))


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("kind", FUSED)
def test_a_wrong_number_of_heads_is_refused_where_they_are_fused(kind: str, heads: int) -> None:
    model = tiny_family(kind)
    model.config.num_attention_heads = heads
    # Phi-3 reads its config while it runs, and breaks before anything is perturbed.
    said = "did not run on a probe" if kind == "phi3" else r"did not move what it should|does not divide into"
    with pytest.raises(AnatomyError, match=said):
        read_anatomy(model)


@pytest.mark.parametrize("kind", [kind for kind in ALL if len(WHERE[kind][0].qkv) == 3])
def test_roles_swapped_by_hand_are_refused(kind: str) -> None:
    model, _ = known(kind)
    first, *others = layouts_of(kind)
    for a, b in ("qk", "qv", "kv"):
        swapped = replace(first, **{a: getattr(first, b), b: getattr(first, a)})
        with pytest.raises(AnatomyError, match=r"did not move what it should|is not the|widths of its projections"):
            read_anatomy(model, (swapped, *others))
    with pytest.raises(AnatomyError, match=r"is given two roles|did not move what it should|widths of its projections"):
        read_anatomy(model, (replace(first, k=first.q), *others))


@pytest.mark.parametrize("kind", ["bart", "t5", "t5-gated"])
def test_attention_to_itself_and_to_the_encoder_are_told_apart(kind: str) -> None:
    model, _ = known(kind)
    encoder, decoder = layouts_of(kind)
    names = [("q", "cross_q"), ("k", "cross_k"), ("v", "cross_v"), ("o", "cross_o")]
    swapped = replace(decoder, **{a: getattr(decoder, b) for pair in names for a, b in (pair, pair[::-1])})
    with pytest.raises(AnatomyError, match="is not of cross-attention"):
        read_anatomy(model, (encoder, swapped))
    for one, other in names:
        half = replace(decoder, **{one: getattr(decoder, other), other: getattr(decoder, one)})
        with pytest.raises(AnatomyError, match="did not move what it should"):
            read_anatomy(model, (encoder, half))


GOOD = {"layers": "h", "qkv": "a", "o": "b", "mlp_in": ["c"], "mlp_out": "d"}
APART = {**GOOD, "qkv": None, "q": "a", "k": "e", "v": "f"}
BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "None is not a mapping"),
    "text": ("bert", "'bert' is not a mapping"),
    "a list of text": (["bert", GOOD], "'bert' is not a mapping"),
    "an empty list": ([], "an empty list"),
    "a field too many": ({**GOOD, "query": "a"}, "there is no field 'query'"),
    "fields too few": ({"o": "b"}, "layers is missing; mlp_in is missing; mlp_out is missing; q is missing, and there is no qkv; "
                                   "k is missing, and there is no qkv; v is missing, and there is no qkv"),
    "qkv and q": ({**GOOD, "q": "a"}, "q is given, and qkv"),
    "an order of nothing": ({**APART, "fused": "concat"}, "fused is given, and there is no qkv"),
    "an unknown order": ({**GOOD, "fused": "interleaved"}, "fused is 'interleaved', neither concat nor grouped"),
    "half of cross-attention": ({**GOOD, "cross_q": "g"}, "cross_k is missing; cross_v is missing; cross_o is missing"),
    "a number for a path": ({**GOOD, "o": 3}, "o is 3, which is not a path"),
    "a number for paths": ({**GOOD, "mlp_in": 3}, "mlp_in is 3, which is not a list of paths"),
    "numbers for paths": ({**GOOD, "mlp_in": [3]}, "mlp_in is [3], which is not a list of paths"),
    "two at once": ([{**GOOD, "o": 3}, {**APART, "v": None}], "o is 3, which is not a path; v is missing, and there is no qkv"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_describes_no_layout_is_refused_saying_all_that_is_wrong(bad: str, tmp_path: Path) -> None:
    said, problems = BAD[bad]
    (tmp_path / "layout.yaml").write_text(json.dumps(said), encoding="utf-8")  # JSON is YAML
    with pytest.raises(AnatomyError, match="does not describe a layout") as caught:
        Layout.from_yaml(tmp_path / "layout.yaml")
    assert caught.value.got == problems


def test_good_files_in_all_their_forms(tmp_path: Path) -> None:
    file, layout = tmp_path / "layout.yaml", Layout(layers="h", qkv="a", o="b", mlp_in=("c",), mlp_out="d")
    for said, expected in (
        (GOOD, (layout,)),
        ([GOOD], (layout,)),
        ({**GOOD, "mlp_in": "c", "q": None}, (layout,)),
        ([GOOD, {**GOOD, "layers": "g", "fused": "grouped"}], (layout, replace(layout, layers="g", fused="grouped"))),
    ):
        file.write_text(json.dumps(said), encoding="utf-8")
        assert Layout.from_yaml(file) == expected


@pytest.mark.parametrize(("name", "content"), [("is not there", None), ("no YAML", b"a: [1"), ("no text", b"\xff\xfe\x00\xd8")])
def test_a_file_that_cannot_be_read_is_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "layout.yaml").write_bytes(content)
    with pytest.raises(AnatomyError, match="is no YAML file that can be read"):
        Layout.from_yaml(tmp_path / "layout.yaml")


def test_a_layout_that_is_none_is_refused_when_it_is_made() -> None:
    with pytest.raises(AnatomyError, match="this is no layout") as caught:
        Layout(layers="h", o="b", mlp_in=("c",), mlp_out="d", q="a", cross_o="e")
    assert caught.value.got == (
        "k is missing, and there is no qkv; v is missing, and there is no qkv; "
        "cross_q is missing; cross_k is missing; cross_v is missing"
    )
    with pytest.raises(AnatomyError, match="there is no layer to read"):
        read_anatomy(known("bert")[0], ())
