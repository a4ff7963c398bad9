"""The reading of a model equals the known truth of its family, a wrong reading is refused, and reading leaves no trace."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_family, tiny_model
from tombola.anatomy import MLP, Anatomy, Attention, Layer, Layout, Projection, prove, read_anatomy, same_anatomy, size_of
from tombola.errors import AnatomyError, MaskError
from tombola.gates import Gates, hold
from tombola.mask import Mask
from tombola.scope import scope_parameters

# What a reader of the families' source code knows: where the parts are, with the number of the layer as {}.
BERT = {
    "q": "encoder.layer.{}.attention.self.query",
    "k": "encoder.layer.{}.attention.self.key",
    "v": "encoder.layer.{}.attention.self.value",
    "o": "encoder.layer.{}.attention.output.dense",
    "in": "encoder.layer.{}.intermediate.dense",
    "out": "encoder.layer.{}.output.dense",
}
DISTILBERT = {
    "q": "transformer.layer.{}.attention.q_lin",
    "k": "transformer.layer.{}.attention.k_lin",
    "v": "transformer.layer.{}.attention.v_lin",
    "o": "transformer.layer.{}.attention.out_lin",
    "in": "transformer.layer.{}.ffn.lin1",
    "out": "transformer.layer.{}.ffn.lin2",
}
TRUTH = {"bert": BERT, "roberta": BERT, "electra": BERT, "distilbert": DISTILBERT}


def layout_of(family: str, **changed: Any) -> Layout:
    """The layout a user would write by hand for a family of TRUTH."""
    list_of_layers = "transformer.layer" if family == "distilbert" else "encoder.layer"
    inside = {role: path.split("{}.")[1] for role, path in TRUTH[family].items()}
    by_hand = Layout(
        layers=f"{family}.{list_of_layers}",
        q=inside["q"],
        k=inside["k"],
        v=inside["v"],
        o=inside["o"],
        mlp_in=(inside["in"],),
        mlp_out=inside["out"],
    )
    return replace(by_hand, **changed)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.fixture
def passes() -> Iterator[Callable[[nn.Module], list[int]]]:
    """`passes(model)` is a list that grows by one batch size with each forward pass of the model."""
    handles = []

    def count(model: nn.Module) -> list[int]:
        seen: list[int] = []
        handles.append(model.register_forward_pre_hook(lambda _, __, kw: seen.append(len(kw["input_ids"])), with_kwargs=True))
        return seen

    yield count
    for handle in handles:
        handle.remove()


# -------------------------------------------------------------------------------------------------------------- reading


def test_every_family_is_read_right(family: str) -> None:
    anatomy = read_anatomy(tiny_model(family))
    assert (anatomy.model_type, anatomy.n_layers, anatomy.n_heads) == (family, 2, 4)
    for i, layer in enumerate(anatomy.layers):
        truth = {role: f"{family}.{path.format(i)}" for role, path in TRUTH[family].items()}
        attention, mlp = layer.attention, layer.mlp
        found = {"q": attention.q, "k": attention.k, "v": attention.v, "o": attention.o, "in": mlp.ins[0], "out": mlp.out}
        assert {role: part.path for role, part in found.items()} == truth
        assert len(mlp.ins) == 1
        widths = {role: (part.n_in, part.n_out, part.has_bias) for role, part in found.items()}
        assert widths == dict.fromkeys("qkvo", (24, 24, True)) | {"in": (24, 40, True), "out": (40, 24, True)}
        assert (attention.n_heads, attention.n_kv_heads, attention.d_head, mlp.d_ffn) == (4, 4, 6, 40)


@pytest.mark.parametrize(
    ("kind", "kv_heads", "gated"),
    [("MPNet", None, False), ("XLMRoberta", None, False), ("Llama", 2, True), ("Qwen2", 2, True), ("Qwen3", 1, True)],
)
def test_relatives_are_read_with_grouped_kv_heads_and_gated_mlps(kind: str, kv_heads: int | None, gated: bool) -> None:
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 40, "vocab_size": 60}
    more = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 40}
    grouped = {} if kv_heads is None else {"num_key_value_heads": kv_heads, "head_dim": 6}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **more, **grouped)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    anatomy = read_anatomy(model)
    for layer in anatomy.layers:
        names = [part.path.rpartition(".")[2] for part in layer.mlp.ins]
        assert names == (["gate_proj", "up_proj"] if gated else ["dense"])
        assert (layer.attention.n_heads, layer.attention.n_kv_heads) == (4, kv_heads or 4)
        assert layer.attention.v.path.rpartition(".")[2] in ("v_proj", "v", "value")
        # All parameters of the projections, the biases of o excepted, are the heads' and the MLP's: none is lost or doubled.
        attention = [layer.attention.q, layer.attention.k, layer.attention.v, layer.attention.o]
        of_attention = sum(p.numel() for part in attention for p in model.get_submodule(part.path).parameters())
        bias_of_o = 24 * layer.attention.o.has_bias
        assert layer.attention.values_per_head * 4 == of_attention - bias_of_o
        assert layer.mlp.values == sum(
            p.numel() for part in (*layer.mlp.ins, layer.mlp.out) for p in model.get_submodule(part.path).parameters()
        )


class KeyFirst(nn.Module):
    """The self-attention of a BERT with its projections called in the order k, v, q, as the first releases of 5.x do in ViT."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.query, self.key, self.value, self.heads = attention.query, attention.key, attention.value, 4

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        k, v, q = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.key, self.value, self.query))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(-2), None


def test_projections_that_run_in_another_order_are_told_apart_by_the_proof() -> None:
    model = tiny_model("bert")
    expected = read_anatomy(model)
    for layer in model.bert.encoder.layer:
        layer.attention.self = KeyFirst(layer.attention.self)
    assert read_anatomy(model) == expected


def test_sizes_of_bert_base_are_those_of_the_literature() -> None:
    """196,800 = 64·(3·(768+1) + 768); 4,722,432 = 768·3072 + 3072 + 3072·768 + 768; Devlin et al. call the sum 110M."""
    import transformers

    with torch.device("meta"):  # sizes need no values; the proof does, so the parts are put together by hand
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
    wide, narrow = {"n_in": 768, "n_out": 3072, "has_bias": True}, {"n_in": 3072, "n_out": 768, "has_bias": True}
    square = Projection("x", 768, 768, has_bias=True)
    layer = Layer(
        "x",
        Attention(square, square, square, square, n_heads=12, n_kv_heads=12, d_head=64),
        MLP((Projection("x", **wide),), Projection("x", **narrow), 3072),
    )
    anatomy = Anatomy("bert", (layer,) * 12, {name: tuple(p.shape) for name, p in model.named_parameters()})
    assert layer.attention.values_per_head == 196_800
    assert layer.mlp.values == 4_722_432
    assert anatomy.total_parameters == 109_483_778
    full = anatomy.size(anatomy.full_mask())
    assert full.maskable_values == full.kept_values == 144 * 196_800 + 12 * 4_722_432 == 85_008_384
    assert (full.sparsity, full.body_share, full.total_share) == (0.0, 1.0, 1.0)
    heads, mlps = torch.ones(12, 12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)
    heads[3, 5:8] = False
    mlps[11] = False
    size = anatomy.size(Mask(heads=heads, mlps=mlps))
    removed = 3 * 196_800 + 4_722_432
    assert size.maskable_values - size.kept_values == removed
    assert size.sparsity == pytest.approx(removed / 85_008_384, abs=1e-12)
    assert size.total_share == pytest.approx((109_483_778 - removed) / 109_483_778, abs=1e-12)


def test_values_of_a_model_are_the_parameters_that_it_has(family: str) -> None:
    """Heads and MLPs of a whole layer, plus what the anatomy leaves out (bias of o, LayerNorms), are the layer."""
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    for layer in anatomy.layers:
        all_of_it = sum(p.numel() for p in model.get_submodule(layer.path).parameters())
        bias_of_o, norms = 24, 2 * (24 + 24)
        assert layer.attention.values_per_head * 4 + layer.mlp.values + bias_of_o + norms == all_of_it
    assert anatomy.total_parameters == sum(p.numel() for p in model.parameters())


def test_size_reads_a_mask_of_heads_only_as_keeping_all_mlps() -> None:
    anatomy = read_anatomy(tiny_model("bert"))
    per_head, per_mlp = 6 * (3 * 25 + 24), 25 * 40 + 41 * 24
    heads = torch.tensor([[True, False, False, True], [False] * 4])
    size = anatomy.size(Mask(heads=heads))
    assert size.kept_values == 2 * per_head + 2 * per_mlp
    assert size.maskable_values == 8 * per_head + 2 * per_mlp
    assert size == size_of(anatomy.summary(), Mask(heads=heads, mlps=torch.ones(2, dtype=torch.bool)))


def test_summary_tells_models_apart_but_not_their_heads() -> None:
    import json

    base = read_anatomy(tiny_model("bert")).summary()
    assert json.loads(json.dumps(base)) == base
    assert same_anatomy(base, base | {"total_parameters": 1}) == []
    other = read_anatomy(tiny_model("roberta", heads=2, d_ffn=48)).summary()
    assert same_anatomy(base, other) == [
        "model_type",
        "heads",
        "kv_heads",
        "d_head",
        "d_ffn",
        "values_per_head",
        "values_per_mlp",
    ]
    assert same_anatomy(base, {}) == [name for name in base if name != "total_parameters"]


def test_a_mask_of_another_shape_is_refused_naming_every_part() -> None:
    anatomy = read_anatomy(tiny_model("bert"))
    wrong = Mask(heads=torch.ones(3, 4, dtype=torch.bool), values={"w": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(MaskError, match="does not fit this bert") as caught:
        anatomy.size(wrong)
    assert caught.value.got == "heads (3, 4); w (2,)"
    assert caught.value.expected == "heads (2, 4); w is no part of this model"


# ------------------------------------------------------------------------------------------------------ wrong readings


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 24])
def test_a_wrong_number_of_heads_is_refused(family: str, heads: int) -> None:
    """The model has 4; the others divide its width, so that only the numbers can tell."""
    model = tiny_model(family)
    model.config.num_attention_heads = heads
    with pytest.raises(AnatomyError, match="perturbing q 0 did not move what it should") as caught:
        read_anatomy(model)
    d_true, d_said = 6, 24 // heads
    assert caught.value.expected == f"{d_said} channels 0…{d_said - 1}"
    assert caught.value.got == f"{d_true} channels 0…{d_true - 1}"
    assert "number of heads in the config" in str(caught.value)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    model = tiny_model("bert")
    model.config.num_attention_heads = 5
    with pytest.raises(AnatomyError, match="does not divide into heads") as caught:
        read_anatomy(model)
    assert caught.value.got == "24 channels, 5 heads"


def test_a_good_layout_gives_the_same_anatomy_as_the_search(family: str) -> None:
    model = tiny_model(family)
    assert read_anatomy(model, layout_of(family)) == read_anatomy(model)


def swapped(a: str, b: str) -> Callable[[str], Layout]:
    def layout(family: str) -> Layout:
        good = layout_of(family)
        return replace(good, **{a: getattr(good, b), b: getattr(good, a)})

    return layout


WRONG: dict[str, tuple[Callable[[str], Layout], str]] = {
    "q and v": (swapped("q", "v"), "perturbing q 0 did not move what it should"),
    "k and v": (swapped("k", "v"), "perturbing k 0 did not move what it should"),
    "q and k": (swapped("q", "k"), "is not the query projection"),
    "v for k": (lambda f: layout_of(f, k=layout_of(f).v), "perturbing k 0 did not move what it should"),
    "q for k": (lambda f: layout_of(f, k=layout_of(f).q), "is given two roles"),
    "v for o": (lambda f: layout_of(f, o=layout_of(f).v), "did not move what it should"),
    "mlp out for o": (lambda f: layout_of(f, o=layout_of(f).mlp_out), "widths of its projections do not fit together"),
    "in and out of the mlp": (
        lambda f: layout_of(f, mlp_in=(layout_of(f).mlp_out,), mlp_out=layout_of(f).mlp_in[0]),
        "widths of its projections do not fit together",
    ),
    "o for mlp in": (lambda f: layout_of(f, mlp_in=(layout_of(f).o,)), "widths of its projections do not fit together"),
    "no mlp in": (lambda f: layout_of(f, mlp_in=()), "widths of its projections do not fit together"),
}


@pytest.mark.parametrize("swap", WRONG)
def test_a_wrong_layout_is_refused(family: str, swap: str) -> None:
    model = tiny_model(family)
    layout, said = WRONG[swap]
    with pytest.raises(AnatomyError, match=said):
        read_anatomy(model, layout(family))
    assert hooks_of(model) == 0


def test_an_mlp_whose_widths_fit_but_whose_neurons_do_not_is_refused() -> None:
    """d_ffn = d_model: only the numbers can tell that `o` is no way into the MLP."""
    model = tiny_model("bert", d_ffn=24)
    with pytest.raises(AnatomyError, match="perturbing mlp in 0 did not move what it should"):
        read_anatomy(model, layout_of("bert", mlp_in=("attention.output.dense",)))


def test_all_modules_that_a_layout_names_in_vain_are_listed() -> None:
    wrong = layout_of("bert", q="attention.self.queri", o="attention.output.dropout")
    with pytest.raises(AnatomyError, match="modules that this model does not have") as caught:
        read_anatomy(tiny_model("bert"), wrong)
    assert caught.value.got == [
        f"bert.encoder.layer.{i}.{part}" for i in range(2) for part in ("attention.self.queri", "attention.output.dropout")
    ]
    assert "model.named_modules()" in str(caught.value)
    with pytest.raises(AnatomyError, match="modules that this model does not have") as caught:
        read_anatomy(tiny_model("bert"), layout_of("bert", layers="bert.encoder.layers"))
    assert caught.value.got == ["bert.encoder.layers"]


def test_a_projection_that_the_model_computes_around_is_not_proved() -> None:
    """The module is there and has the right weights, but forward never calls it: no hook on it would ever act."""
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    for layer in model.bert.encoder.layer:
        dense = layer.output.dense
        layer.output.forward = lambda h, x, layer=layer, dense=dense: layer.output.LayerNorm(
            nn.functional.linear(h, dense.weight, dense.bias) + x
        )
    with pytest.raises(AnatomyError, match="does not run all modules of its anatomy") as caught:
        prove(model, anatomy)
    assert caught.value.got == "never called: bert.encoder.layer.0.output.dense, bert.encoder.layer.1.output.dense"
    with pytest.raises(AnatomyError, match="could not be read"):
        read_anatomy(model)


def test_an_output_projection_that_reads_more_than_the_values_is_refused() -> None:
    """Heads that add a constant: a removed one would take that along, which no slice of v shows."""
    model = tiny_model("bert")
    for layer in model.bert.encoder.layer:
        layer.attention.self.register_forward_hook(lambda _, __, output: (output[0] + 1, *output[1:]))
    with pytest.raises(AnatomyError, match=r"attention\.self\.value is not the value projection") as caught:
        read_anatomy(model)
    assert caught.value.got == "o still has an input when v is zero"


# ------------------------------------------------------------------------------------------ models that are something else


SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24, "intermediate_size": 40, "vocab_size": 60}
NO_BLOCKS = "expected: a list of repeated blocks with linear projections"
NO_ATTENTION = "q, k and v of one input (or one fused projection), then o;"


def other_models() -> dict[str, tuple[Callable[[], nn.Module], str, list[str]]]:
    """How to make one, what was looked for, and the last words of what was found instead."""
    import transformers as t

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def cnn() -> nn.Module:
        return t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))

    def fourier() -> nn.Module:
        sizes = {name: size for name, size in SIZES.items() if name != "num_attention_heads"}
        return t.FNetForSequenceClassification(t.FNetConfig(**sizes))

    def state_space() -> nn.Module:
        return t.MambaForCausalLM(t.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=60, **special))

    def experts() -> nn.Module:
        return t.MixtralForSequenceClassification(t.MixtralConfig(**SIZES, **special, num_key_value_heads=2, num_local_experts=2))

    def two_in_a_group() -> nn.Module:
        return t.AlbertModel(t.AlbertConfig(**SIZES, **special, embedding_size=8, inner_group_num=2))

    def pictures_and_text() -> nn.Module:
        text, vision = {**SIZES, **special}, {**SIZES, "image_size": 8, "patch_size": 4}
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))

    mixer, attention = "backbone.layers.0.mixer.", "model.layers.0.self_attn."
    return {
        "plain": (plain, NO_BLOCKS, ["0", "1", "2"]),
        "cnn": (cnn, NO_BLOCKS, ["resnet", "classifier"]),
        "fourier": (fourier, NO_BLOCKS, ["fnet", "dropout", "classifier"]),
        "state_space": (state_space, NO_ATTENTION, [mixer + part for part in ("in_proj", "x_proj", "out_proj")]),
        "experts": (experts, NO_ATTENTION, [attention + part for part in ("q_proj", "k_proj", "v_proj", "o_proj")]),
        "two_in_a_group": (two_in_a_group, NO_ATTENTION, []),
        "pictures_and_text": (pictures_and_text, "a model that takes input_ids and attention_mask (or pixel_values)", []),
    }


@pytest.mark.parametrize("kind", ["plain", "cnn", "fourier", "state_space", "experts", "two_in_a_group", "pictures_and_text"])
@pytest.mark.filterwarnings("ignore")  # of kernels that are not installed
def test_a_model_of_another_kind_is_refused_saying_what_was_looked_for(kind: str) -> None:
    make, looked_for, found = other_models()[kind]
    torch.manual_seed(0)
    model = make().eval()
    with pytest.raises(AnatomyError) as caught:
        read_anatomy(model)
    if kind == "state_space" and "does not divide into heads" in str(caught.value):
        return  # in early releases it runs four projections one after the other, as fused attention does
    assert looked_for in str(caught.value)
    if found:
        assert caught.value.got == str(found)
    assert "tombola.Layout(" in (caught.value.next or "") or kind == "pictures_and_text"
    assert hooks_of(model) == 0


def test_heads_whose_slices_are_interleaved_otherwise_are_refused() -> None:
    """CodeGen fuses q, v and k in shards of several heads: neither order fits, and the numbers say so."""
    import transformers as t

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 40, "vocab_size": 60}
    torch.manual_seed(0)
    with pytest.raises(AnatomyError, match="did not move what it should"):
        read_anatomy(t.CodeGenForCausalLM(t.CodeGenConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval())


def test_a_refusal_shows_how_to_pass_a_layout() -> None:
    with pytest.raises(AnatomyError, match="structure of this Sequential could not be read") as caught:
        read_anatomy(nn.Sequential(nn.Linear(2, 2)))
    assert caught.value.got == "['0']"
    assert "pass layout=tombola.Layout(layers=…" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_name_and_not_taken_for_a_wrong_number_of_heads(dtype: torch.dtype) -> None:
    with pytest.raises(AnatomyError, match="cannot be proved in half precision") as caught:
        read_anatomy(tiny_model("bert").to(dtype))
    assert caught.value.got == str(dtype)
    anatomy = read_anatomy(tiny_model("bert"))
    model = tiny_model("bert").to(dtype)
    with Gates(model, anatomy, ~anatomy.full_mask()), torch.no_grad():  # what the message says to do
        assert model(input_ids=torch.tensor([[7, 8]])).logits.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ no traces


def test_reading_costs_at_most_two_passes(family: str, passes: Callable[[nn.Module], list[int]]) -> None:
    model = tiny_model(family)
    seen = passes(model)
    read_anatomy(model)
    n_experiments = 1 + 3 * 4 + 2  # untouched; q, k, v of each head; one query; v = 0
    assert seen == [2, n_experiments]  # two rows are traced: a table of positions has none
    read_anatomy(model, layout_of(family))
    assert seen == [2, n_experiments, n_experiments]


@pytest.mark.parametrize(
    ("kind", "n_kv", "tries"), [("gpt2", 4, 1), ("gpt_neox", 4, 1), ("falcon", 2, 1), ("bigcode", 4, 2), ("bigcode-mq", 1, 1)]
)
def test_fused_projections_cost_one_pass_more_where_their_order_was_guessed_wrong(
    kind: str, n_kv: int, tries: int, passes: Callable[[nn.Module], list[int]]
) -> None:
    """GPTBigCode calls it c_attn as GPT-2 does, and lays it head by head as GPT-NeoX does."""
    model = tiny_family(kind)
    seen = passes(model)
    read_anatomy(model)
    assert seen == [2] + [1 + 4 + 2 * n_kv + 2] * tries


def test_reading_leaves_weights_gradients_hooks_modes_and_random_state_as_they_were(family: str) -> None:
    model = tiny_model(family).train()
    next(m for m in model.modules() if isinstance(m, nn.Embedding)).eval()  # as one does to freeze a part
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    read_anatomy(model)
    with pytest.raises(AnatomyError):
        read_anatomy(model, layout_of(family, q=layout_of(family).v))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_reading_does_not_depend_on_the_weights(family: str, activation: str) -> None:
    """Zeros (a held mask saved and loaded), and weights so large that every softmax saturates."""
    import transformers

    config = tiny_model(family).config
    setattr(config, "activation" if family == "distilbert" else "hidden_act", activation)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    known = read_anatomy(model)
    for factor in (0.0, 1e3):
        with torch.no_grad():
            for layer in known.layers:
                for part in (layer.attention.q, layer.attention.k, layer.attention.v, layer.attention.o, *layer.mlp.ins):
                    for parameter in model.get_submodule(part.path).parameters():
                        parameter.fill_(0.0) if factor == 0 else parameter.normal_().mul_(factor)
        assert read_anatomy(model) == known


def test_a_model_under_gates_and_a_held_one_are_read_like_any_other(family: str) -> None:
    model = tiny_model(family)
    known = read_anatomy(model)
    none_left = ~known.full_mask()
    with Gates(model, known, none_left):
        assert read_anatomy(model) == known
    hold(model, known, none_left)
    assert read_anatomy(model) == known


# -------------------------------------------------------------------------------------------------------- single values

IDS = torch.tensor([[2, 17, 33, 9, 41], [2, 50, 8, 3, 3], [2, 11, 12, 13, 14]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
STRUCTURED = {
    "some of both": ("1011 0100", "10"),
    "a layer without heads": ("0000 1111", "11"),
    "no mlps": ("1111 1111", "00"),
    "one head": ("1101 1111", "11"),
    "nothing left": ("0000 0000", "00"),
}


def bits(rows: str) -> torch.Tensor:
    """`bits("110 001")` is a boolean tensor of two rows."""
    return torch.tensor([[char == "1" for char in row] for row in rows.split()])


def structured(name: str) -> Mask:
    heads, mlps = STRUCTURED[name]
    return Mask(heads=bits(heads), mlps=bits(mlps)[0])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, attention_mask=REAL).logits
    return out


def llama(kv_heads: int = 2) -> Any:
    """Four heads of six channels that share kv-heads, and a gated MLP, without biases."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=40, pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config).eval()


def zeroed(model: nn.Module, values: dict[str, torch.Tensor]) -> Any:
    """A copy with exactly these values set to zero."""
    cut = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in values.items():
            cut.get_parameter(name)[~kept] = 0.0
    return cut


@pytest.mark.parametrize("name", STRUCTURED)
def test_zeroing_the_values_of_heads_and_mlps_is_closing_their_gates(family: str, name: str) -> None:
    model = tiny_model(family).double()
    anatomy = read_anatomy(model)
    mask = structured(name)
    with Gates(model, anatomy, mask):
        gated = logits(model)
    assert (logits(zeroed(model, anatomy.as_values(mask))) - gated).abs().max() < 1e-12
    assert (logits(model) - gated).abs().max() > 1e-4, "the mask must matter, or this test shows nothing"


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_zeroing_values_is_closing_gates_where_heads_share_keys_and_values_too(kv_heads: int, name: str) -> None:
    model = llama(kv_heads).double()
    anatomy, mask = read_anatomy(model), structured(name)
    with Gates(model, anatomy, mask):
        gated = logits(model)
    assert (logits(zeroed(model, anatomy.as_values(mask))) - gated).abs().max() < 1e-12


def test_values_of_removed_parts_are_those_one_lists_by_hand() -> None:
    """Head 1 of layer 0 owns channels 6 to 11; of the MLP of layer 1 everything goes; nothing else is named."""
    model = tiny_model("bert")
    anatomy = read_anatomy(model)
    values = anatomy.as_values(Mask(heads=bits("1011 1111"), mlps=bits("10")[0]))
    attention, mlp = "bert.encoder.layer.0.attention", "bert.encoder.layer.1"
    qkv = [f"{attention}.self.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
    of_mlp = [f"{mlp}.{part}.dense.{kind}" for part in ("intermediate", "output") for kind in ("weight", "bias")]
    assert values.keys() == {*qkv, f"{attention}.output.dense.weight", *of_mlp}
    for name in qkv:
        assert not values[name][6:12].any() and values[name][:6].all() and values[name][12:].all()
    columns = values[f"{attention}.output.dense.weight"]
    assert not columns[:, 6:12].any() and columns[:, :6].all() and columns[:, 12:].all()
    assert not any(values[name].any() for name in of_mlp)
    assert all(part.shape == model.get_parameter(name).shape and part.dtype == torch.bool for name, part in values.items())


@pytest.mark.parametrize("name", STRUCTURED)
def test_as_many_values_go_as_the_size_of_the_mask_says(family: str, name: str) -> None:
    anatomy, mask = read_anatomy(tiny_model(family)), structured(name)
    size, values = anatomy.size(mask), anatomy.as_values(mask)
    assert sum(int((~part).sum()) for part in values.values()) == size.maskable_values - size.kept_values
    assert all(not part.all() for part in values.values()), "what loses nothing is left out"
    assert anatomy.as_values(Mask(values=values)) == {} == anatomy.as_values(anatomy.full_mask()) == anatomy.as_values(Mask())


def test_a_kv_head_goes_when_no_head_reads_it_any_more() -> None:
    anatomy = read_anatomy(llama())
    values = anatomy.as_values(Mask(heads=bits("0111 0010")))
    # layer 0 loses one head of a pair: q and o only; layer 1 loses the first pair whole, and one of the second
    first, second = "model.layers.0.self_attn", "model.layers.1.self_attn"
    assert {name for name in values if name.startswith(first)} == {f"{first}.q_proj.weight", f"{first}.o_proj.weight"}
    for part in ("k_proj", "v_proj"):
        assert not values[f"{second}.{part}.weight"][:6].any() and values[f"{second}.{part}.weight"][6:].all()
    assert values[f"{second}.q_proj.weight"].any(1).tolist() == [False] * 12 + [True] * 6 + [False] * 6


def by_counting(model: nn.Module, anatomy: Anatomy, mask: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Surviving shares, value by value: each is looked up and given to its head or MLP. Heads and MLPs of the mask as well."""
    heads, mlps = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for i, layer in enumerate(anatomy.layers):
        tally: dict[object, list[int]] = {}

        def count(owner: object, name: str, index: tuple[int, ...], tally: dict[object, list[int]] = tally) -> None:
            kept_and_all = tally.setdefault(owner, [0, 0])
            kept_and_all[0] += bool(mask.values[name][index])
            kept_and_all[1] += 1

        a, per_kv = layer.attention, layer.attention.n_heads // layer.attention.n_kv_heads
        for role, projection in (("q", a.q), ("k", a.k), ("v", a.v), ("o", a.o)):
            for kind in ("weight", "bias"):
                name = f"{projection.path}.{kind}"
                if name not in mask.values or (role, kind) == ("o", "bias"):  # the bias of o is no head's
                    continue
                for index in torch.cartesian_prod(*map(torch.arange, mask.values[name].shape)).reshape(
                    -1, mask.values[name].ndim
                ):
                    channel = int(index[1] if role == "o" else index[0])
                    readers = [channel // 6] if role in "qo" else [channel // 6 * per_kv + j for j in range(per_kv)]
                    for head in readers:
                        count(head, name, tuple(index.tolist()))
        for projection in layer.mlp.projections:
            for kind in ("weight", "bias"):
                name = f"{projection.path}.{kind}"
                if name in mask.values:
                    kept = mask.values[name].flatten().tolist()
                    total = tally.setdefault("mlp", [0, 0])
                    tally["mlp"] = [total[0] + sum(kept), total[1] + len(kept)]
        for head in range(4):
            of = tally.get(head)
            heads[i, head] = (of[0] / of[1] if of else 1.0) * (mask.heads is None or bool(mask.heads[i, head]))
        of = tally.get("mlp")
        mlps[i] = (of[0] / of[1] if of else 1.0) * (mask.mlps is None or bool(mask.mlps[i]))
    return heads, mlps


def random_values(model: nn.Module, names: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Masks of very different density for each parameter and row, so that no two parts survive alike."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        parameter = model.get_parameter(name)
        density = torch.rand(parameter.shape[:1] + (1,) * (parameter.ndim - 1), generator=generator)
        density = density * torch.rand(parameter.shape[-1:], generator=generator)
        found[name] = torch.rand(parameter.shape, generator=generator) < density
    return found


@pytest.mark.parametrize("named", ["body", "prasanna2020", "body:weights", "keys", "out", "everything"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
def test_survival_is_what_one_counts_value_by_value(kind: str, named: str) -> None:
    model = llama() if kind == "llama" else tiny_model(kind)
    anatomy = read_anatomy(model)
    ends = {"keys": (".key.weight", ".key.bias", ".k_lin.weight", ".k_proj.weight"), "out": ("out_lin.weight", "o_proj.weight"),
            "everything": ("",)}  # fmt: skip
    if named in ends:
        names = [name for name, _ in model.named_parameters() if name.endswith(ends[named])]
    else:
        names = list(scope_parameters(model, anatomy, named))
    mask = Mask(values=random_values(model, names))
    expected_heads, expected_mlps = by_counting(model, anatomy, mask)
    heads, mlps = anatomy.survival(mask)
    assert torch.allclose(heads, expected_heads, rtol=0, atol=1e-12) and torch.allclose(mlps, expected_mlps, rtol=0, atol=1e-12)
    assert heads.dtype == mlps.dtype == torch.float64
    if named == "body":
        assert len(set(heads.flatten().tolist() + mlps.tolist())) > 8, "they differ, so that none can stand for another"


def test_survival_of_whole_parts_is_one_or_zero(family: str) -> None:
    anatomy = read_anatomy(tiny_model(family))
    for name in STRUCTURED:
        mask = structured(name)
        heads, mlps = anatomy.survival(mask)
        assert torch.equal(heads, mask.parts()["heads"].double()) and torch.equal(mlps, mask.parts()["mlps"].double())
    heads, mlps = anatomy.survival(Mask())
    assert bool((heads == 1).all()) and bool((mlps == 1).all())
    heads, mlps = anatomy.survival(Mask(mlps=bits("01")[0]))
    assert bool((heads == 1).all()) and mlps.tolist() == [0, 1]


def test_survival_of_heads_in_single_values_is_that_of_the_heads(family: str) -> None:
    anatomy = read_anatomy(tiny_model(family))
    for name in STRUCTURED:
        values = Mask(values=anatomy.as_values(structured(name)))
        for a, b in zip(anatomy.survival(values), anatomy.survival(structured(name)), strict=True):
            assert torch.equal(a, b)


def test_survival_of_a_mixed_mask_is_the_product(family: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    values = random_values(model, list(scope_parameters(model, anatomy, "body")))
    mask = Mask(values=values) & structured("some of both")
    for found, expected in zip(anatomy.survival(mask), by_counting(model, anatomy, mask), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_a_parameter_that_is_not_named_survives_and_the_bias_of_o_is_no_head_s() -> None:
    anatomy = read_anatomy(tiny_model("bert"))
    at = "bert.encoder.layer.1"
    none = {
        name: torch.zeros(anatomy.shapes[name], dtype=torch.bool)
        for name in (f"{at}.attention.output.dense.bias", "classifier.bias")
    }
    heads, mlps = anatomy.survival(Mask(values=none))
    assert bool((heads == 1).all()) and bool((mlps == 1).all())
    half = torch.arange(40) < 10  # of the one parameter of this MLP that is named
    heads, mlps = anatomy.survival(Mask(values={f"{at}.intermediate.dense.bias": half}))
    assert mlps.tolist() == [1.0, 0.25] and bool((heads == 1).all())


def test_the_size_of_single_values_is_of_the_parameters_that_are_named(family: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    names = list(scope_parameters(model, anatomy, "body+head"))[3:9]
    values = random_values(model, names)
    kept, maskable = sum(int(v.sum()) for v in values.values()), sum(model.get_parameter(name).numel() for name in names)
    total = sum(p.numel() for p in model.parameters())
    size = anatomy.size(Mask(values=values))
    assert (size.kept_values, size.maskable_values, size.total_parameters) == (kept, maskable, total)
    assert size.sparsity == pytest.approx((maskable - kept) / maskable, abs=1e-12) and size.body_share == kept / maskable
    assert size.total_share == pytest.approx((total - maskable + kept) / total, abs=1e-12)
    assert size == size_of(anatomy.summary(), Mask(values=values)), "a ticket knows its size without its model"


def test_a_mask_of_both_has_no_one_size(family: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    values = random_values(model, ["classifier.weight" if family in ("bert", "distilbert") else "classifier.dense.weight"])
    for mask in (Mask(values=values, mlps=bits("10")[0]), Mask(values=values, heads=bits("1111 1111"))):
        with pytest.raises(MaskError, match="has no one size") as caught:
            anatomy.size(mask)
        assert "Anatomy.as_values" in str(caught.value)
        with pytest.raises(MaskError, match="has no one size"):
            size_of(anatomy.summary(), mask)


def test_values_of_unknown_parameters_and_of_wrong_shapes_are_all_named(family: str) -> None:
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    (name, *others) = [name for name, p in model.named_parameters() if p.shape == (24, 24)]
    wrong = {name: torch.ones(24, 23, dtype=torch.bool), "zz.weight": torch.ones(3, dtype=torch.bool)}
    right = {others[0]: torch.ones(24, 24, dtype=torch.bool)}
    calls = (anatomy.check, anatomy.size, anatomy.survival)
    for call in calls:
        with pytest.raises(MaskError, match=f"does not fit this {family}") as caught:
            call(Mask(values=wrong | right))
        assert caught.value.got == f"{name} (24, 23); zz.weight (3,)"
        assert caught.value.expected == f"{name} (24, 24); zz.weight is no part of this model"
    anatomy.check(Mask(values=right))
    many = {f"w{i:02}": torch.ones(1, dtype=torch.bool) for i in range(9)}
    with pytest.raises(MaskError) as caught:
        anatomy.check(Mask(values=many))
    assert str(caught.value.got).endswith("w05 (1,) and 3 more"), "a model has hundreds of parameters; a few names are enough"


def test_the_mask_of_another_family_does_not_fit() -> None:
    """Same widths, other names: what a ticket of values can be mistaken for."""
    bert, distil = tiny_model("bert"), tiny_model("distilbert")
    values = random_values(bert, list(scope_parameters(bert, read_anatomy(bert), "chen2020")))
    with pytest.raises(MaskError, match="does not fit this distilbert") as caught:
        read_anatomy(distil).check(Mask(values=values))
    assert "and 7 more" in str(caught.value.got), "13 matrices, of which six are named"
