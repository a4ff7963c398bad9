"""The reading of a model equals the known truth of its family, a wrong reading is refused, and reading leaves no trace."""

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
