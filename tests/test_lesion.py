"""Lesions: what they reach and what they leave, the law of what is drawn, and that nothing but the seed decides it."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import permutations
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor, nn

from tombola.anatomy import Anatomy, read_anatomy
from tombola.errors import AnatomyError
from tombola.gates import Gates
from tombola.lesion import (
    LESIONS,
    PARTS,
    copy_values,
    head_values,
    part_values,
    reinitialise,
    shuffle_layers,
    shuffle_values,
    without_residual,
    zero_values,
)
from tombola.mask import Mask

MakeTiny = Callable[..., Any]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, now in model.named_parameters() if not torch.equal(before[name], now)}


def multiset(x: Tensor) -> list[float]:
    return sorted(x.flatten().tolist())


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Anatomy]:
    """A BERT large enough for statistics; tests work on copies."""
    from conftest import tiny_model

    model = tiny_model("bert", layers=3, width=96, d_ffn=160)
    return model, read_anatomy(model)


@pytest.fixture
def copy_of(bert: tuple[Any, Anatomy]) -> Any:
    return deepcopy(bert[0])


# By hand, for a BERT classifier: what is in the body, beside it, and in the head.
MATRICES = [
    f"bert.encoder.layer.{i}.{part}.weight"
    for i in range(3)
    for part in (
        *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
        *("intermediate.dense", "output.dense"),
    )
]
BIASES = [name.replace(".weight", ".bias") for name in MATRICES]
EMBEDDINGS = [f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
NORMS = [
    f"bert.{path}.LayerNorm.{kind}"
    for path in ("embeddings", *(f"encoder.layer.{i}.{part}" for i in range(3) for part in ("attention.output", "output")))
    for kind in ("weight", "bias")
]
POOLER = ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]

REACHED = {
    "reinit-body": {*MATRICES, *BIASES},
    "reinit-body-embeddings": {*MATRICES, *BIASES, *EMBEDDINGS},
    "random-init": {*MATRICES, *BIASES, *EMBEDDINGS, *NORMS, *POOLER},
    "shuffle-values": set(MATRICES),
    "shuffle-layers": set(MATRICES),
}


def test_the_list_of_lesions_is_the_one_that_is_tested() -> None:
    assert LESIONS.keys() == REACHED.keys()


@pytest.mark.parametrize("name", REACHED)
def test_each_lesion_reaches_what_it_says_and_leaves_the_rest_bit_for_bit(
    name: str, bert: tuple[Any, Anatomy], copy_of: Any
) -> None:
    before = values(copy_of)
    buffers = {key: buffer.clone() for key, buffer in copy_of.named_buffers()}
    LESIONS[name](copy_of, bert[1], 1)
    reached = changed(before, copy_of)
    # where one permutation moves three layers, one of them may stay in its place
    assert reached <= REACHED[name] if name == "shuffle-layers" else reached == REACHED[name]
    assert len(reached) >= len(REACHED[name]) * 2 / 3
    assert all(torch.equal(buffers[key], buffer) for key, buffer in copy_of.named_buffers())
    assert {"classifier.weight", "classifier.bias"} <= before.keys() - reached


@pytest.mark.parametrize("name", REACHED)
def test_each_lesion_runs_on_every_family_and_is_seen_in_the_output(name: str, family: str, make_tiny: MakeTiny) -> None:
    model = make_tiny(family)
    anatomy = read_anatomy(model)
    before = values(model)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        LESIONS[name](model, anatomy, 0)
        hurt = model(input_ids=ids).logits
    assert bool(torch.isfinite(hurt).all()) and not torch.allclose(whole, hurt)
    head = {key for key in before if key.startswith(("classifier.", "pre_classifier."))}
    assert head and not head & changed(before, model)
    read_anatomy(model)  # the wiring is what it was


# ------------------------------------------------------------------------------------------------------------ reinitialise


def test_a_random_init_is_what_the_architecture_itself_would_draw(family: str, make_tiny: MakeTiny) -> None:
    # the oracle is transformers: a new model from the same config, never touched by us
    from transformers import AutoModelForSequenceClassification

    trained = make_tiny(family, width=96, d_ffn=160)
    trained.config.initializer_range = 0.05
    torch.manual_seed(3)
    own = dict(AutoModelForSequenceClassification.from_config(trained.config).named_parameters())
    before = values(trained)
    LESIONS["random-init"](trained, read_anatomy(trained), 0)
    drawn = changed(before, trained)
    assert len(drawn) > 30
    for name, parameter in trained.named_parameters():
        if name not in drawn:
            continue
        assert torch.equal(parameter == 0, own[name] == 0), name
        assert torch.equal(parameter == 1, own[name] == 1), name
        if parameter.ndim == 2:
            ratio = float(parameter.detach().std() / own[name].detach().std())
            assert ratio == pytest.approx(1.0, abs=5 / parameter.numel() ** 0.5), name  # 5 standard errors


def test_weights_are_drawn_from_the_normal_of_the_config(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    for std in (0.02, 0.5):
        copy_of.config.initializer_range = std
        reinitialise(copy_of, [*MATRICES, *EMBEDDINGS], 0)
        parameters = dict(copy_of.named_parameters())
        drawn = torch.cat([parameters[name].flatten() for name in MATRICES]).detach()
        assert kstest(drawn.numpy(), "norm", args=(0, std)).pvalue > 1e-3
        words = parameters["bert.embeddings.word_embeddings.weight"].detach()
        assert bool((words[0] == 0).all()) and bool((words[1:] != 0).all())  # [PAD] is row 0
        assert kstest(words[1:].flatten().numpy(), "norm", args=(0, std)).pvalue > 1e-3


def test_the_padding_row_of_another_vocabulary_is_found(make_tiny: MakeTiny) -> None:
    model = make_tiny("roberta")
    LESIONS["reinit-body-embeddings"](model, read_anatomy(model), 0)
    words = model.roberta.embeddings.word_embeddings.weight
    assert torch.nonzero((words == 0).all(1)).flatten().tolist() == [1]


def test_parameters_are_drawn_independently_of_each_other(copy_of: Any) -> None:
    reinitialise(copy_of, MATRICES, 0)
    square = [p.detach().flatten() for n, p in copy_of.named_parameters() if n in MATRICES and p.shape == (96, 96)]
    correlations = torch.corrcoef(torch.stack(square)).fill_diagonal_(0)
    assert correlations.abs().max() < 5 / 96  # of 66 pairs; one has a standard error of 1/96


def test_what_a_parameter_becomes_does_not_depend_on_the_others_named(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    alone, before = deepcopy(copy_of), values(copy_of)
    reinitialise(copy_of, MATRICES, 4)
    for name in (MATRICES[7], MATRICES[2]):
        reinitialise(alone, [name], 4)
    assert changed(before, alone) == {MATRICES[7], MATRICES[2]}
    for name in (MATRICES[7], MATRICES[2]):
        assert torch.equal(alone.get_parameter(name), copy_of.get_parameter(name))
    shuffle_values(alone, [MATRICES[5]], 4)
    again = deepcopy(bert[0])
    shuffle_values(again, MATRICES, 4)
    assert torch.equal(alone.get_parameter(MATRICES[5]), again.get_parameter(MATRICES[5]))


def test_a_reinitialised_model_forgets_what_it_was(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    with torch.no_grad():
        for parameter in copy_of.parameters():
            parameter.fill_(float("nan"))
    LESIONS["random-init"](copy_of, bert[1], 0)
    left = {name for name, parameter in copy_of.named_parameters() if bool(parameter.isnan().any())}
    assert left == {"classifier.weight", "classifier.bias"}


# ----------------------------------------------------------------------------------------------------------------- shuffles


def test_shuffled_values_are_the_same_values_elsewhere(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    before = values(copy_of)
    LESIONS["shuffle-values"](copy_of, bert[1], 0)
    for name in MATRICES:
        now = copy_of.get_parameter(name)
        assert multiset(now) == multiset(before[name])
        stayed = int((now == before[name]).sum())
        assert stayed < 12  # of any number of values, 1 stays on average


def test_every_order_of_values_is_equally_likely() -> None:
    model = nn.Module()
    model.bias = nn.Parameter(torch.zeros(3))
    orders = []
    for seed in range(1200):
        with torch.no_grad():
            model.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        shuffle_values(model, ["bias"], seed)
        orders.append(tuple(model.bias.tolist()))
    counts = Counter(orders)
    assert set(counts) == set(permutations((0.0, 1.0, 2.0)))
    assert chisquare(list(counts.values())).pvalue > 1e-3


def test_shuffled_layers_move_whole_and_their_biases_stay(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    before = values(copy_of)
    order = shuffle_layers(copy_of, bert[1], 3)
    assert sorted(order) == [0, 1, 2] and order != (0, 1, 2)
    for name, now in copy_of.named_parameters():
        layer = next((i for i in range(3) if f".layer.{i}." in name), None)
        if name in MATRICES and layer is not None:
            assert torch.equal(now, before[name.replace(f".layer.{layer}.", f".layer.{order[layer]}.")]), name
        else:
            assert torch.equal(now, before[name]), name


def test_the_order_of_layers_is_never_the_old_one_and_any_other_is_equally_likely(make_tiny: MakeTiny) -> None:
    model = make_tiny("bert", layers=3, width=8, heads=2, d_ffn=8)
    anatomy = read_anatomy(model)
    counts = Counter(shuffle_layers(model, anatomy, seed) for seed in range(600))
    assert set(counts) == set(permutations(range(3))) - {(0, 1, 2)}
    assert chisquare(list(counts.values())).pvalue > 1e-3
    two = make_tiny("bert", layers=2, width=8, heads=2, d_ffn=8)
    assert {shuffle_layers(two, read_anatomy(two), seed) for seed in range(20)} == {(1, 0)}


def test_layers_that_cannot_be_shuffled_are_refused_untouched(make_tiny: MakeTiny) -> None:
    one = make_tiny("bert", layers=1)
    with pytest.raises(AnatomyError, match="no layers to shuffle"):
        shuffle_layers(one, read_anatomy(one), 0)
    uneven = make_tiny("bert")
    uneven.bert.encoder.layer[1].intermediate.dense = nn.Linear(24, 30)
    uneven.bert.encoder.layer[1].output.dense = nn.Linear(30, 24)
    before = values(uneven)
    with pytest.raises(AnatomyError, match="of different shape"):
        shuffle_layers(uneven, read_anatomy(uneven), 0)
    assert not changed(before, uneven)


# -------------------------------------------------------------------------------------------- nothing but the seed decides


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", REACHED)
def test_the_seed_decides_alone(name: str, bert: tuple[Any, Anatomy], threads: Callable[[int], None]) -> None:
    found = []
    for ambient, n in ((0, 1), (1, 4)):
        torch.manual_seed(ambient)
        threads(n)
        state = torch.get_rng_state()
        model = deepcopy(bert[0]).train(bool(ambient))
        LESIONS[name](model, bert[1], 11)
        assert torch.equal(torch.get_rng_state(), state) and model.training == bool(ambient)
        found.append(values(model))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    seeds = set()
    for seed in range(6):
        model = deepcopy(bert[0])
        LESIONS[name](model, bert[1], seed)
        seeds.add(tuple(model.get_parameter(MATRICES[0]).flatten()[:8].tolist()))
    assert len(seeds) > 1


@pytest.mark.parametrize("name", ["random-init", "shuffle-values", "shuffle-layers"])
def test_the_same_in_every_precision(name: str, bert: tuple[Any, Anatomy]) -> None:
    in_half = deepcopy(bert[0]).bfloat16()  # the start must be the same numbers
    models = [in_half, deepcopy(in_half).float(), deepcopy(in_half).double()]
    for model in models:
        LESIONS[name](model, bert[1], 5)
    half, single, double = map(values, models)
    for key, value in single.items():
        assert torch.equal(double[key].float(), value) and torch.equal(value.bfloat16(), half[key]), key


# ------------------------------------------------------------------------------------------------------------------ refusals


def test_a_name_that_is_not_there_is_refused_with_the_nearest(copy_of: Any) -> None:
    before = values(copy_of)
    for lesion in (reinitialise, shuffle_values):
        with pytest.raises(AnatomyError, match="does not have these parameters") as error:
            lesion(copy_of, [MATRICES[0], "bert.encoder.layer.0.attention.self.query.weights"], 0)
        assert error.value.got == "bert.encoder.layer.0.attention.self.query.weights"
        assert error.value.next == f"did you mean {MATRICES[0]!r}?"
    assert not changed(before, copy_of)


def test_what_has_no_known_start_is_refused_and_nothing_is_changed(copy_of: Any) -> None:
    class ScaleRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 0.5))
            self.scale = nn.Parameter(torch.ones(1))

    copy_of.bert.extra = ScaleRMSNorm()
    before = values(copy_of)
    with pytest.raises(AnatomyError, match="not known how these parameters are initialised") as error:
        reinitialise(copy_of, before, 0)
    assert error.value.got == "bert.extra.scale of ScaleRMSNorm, bert.extra.weight of ScaleRMSNorm"
    assert not changed(before, copy_of)


def test_a_table_of_sinusoids_is_computed_not_drawn(make_tiny: MakeTiny) -> None:
    model = make_tiny("distilbert")
    model.config.sinusoidal_pos_embds = True
    with pytest.raises(AnatomyError) as error:
        LESIONS["random-init"](model, read_anatomy(model), 0)
    assert error.value.got == "distilbert.embeddings.position_embeddings.weight of Embedding"
    LESIONS["reinit-body"](model, read_anatomy(model), 0)


@pytest.mark.parametrize("std", [None, 0.0, -0.02, "0.02", float("nan")])
def test_a_config_that_does_not_say_the_spread_is_refused(std: object, copy_of: Any) -> None:
    copy_of.config.__dict__["initializer_range"] = std
    before = values(copy_of)
    with pytest.raises(AnatomyError, match="does not say how its weights are drawn"):
        reinitialise(copy_of, MATRICES, 0)
    assert not changed(before, copy_of)
    reinitialise(copy_of, [*BIASES, *NORMS], 0)  # these need no spread


# ---------------------------------------------------------------------------------------------------- parts of a model

BY_HAND = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "in": "intermediate.dense",
    "out": "output.dense",
}


@pytest.mark.parametrize("what", BY_HAND)
def test_a_part_is_its_weight_and_bias_in_the_layers_asked_for(what: str, bert: tuple[Any, Anatomy]) -> None:
    found = part_values(*bert, what, (0, 2))
    assert found.keys() == {f"bert.encoder.layer.{i}.{BY_HAND[what]}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert all(bool(of.all()) for of in found.values())


def test_words_are_one_table_and_a_layer_everything_in_it(bert: tuple[Any, Anatomy]) -> None:
    assert part_values(*bert, "words", (0,)).keys() == {"bert.embeddings.word_embeddings.weight"}
    inside = {name for name, _ in bert[0].named_parameters() if name.startswith("bert.encoder.layer.1.")}
    assert part_values(*bert, "layer", (1,)).keys() == inside and len(inside) == 16
    assert {*BY_HAND, "words", "layer"} == PARTS.keys()


def test_of_fused_projections_each_part_is_a_slice_and_together_they_are_all() -> None:
    """GPT-2 has q, k and v side by side in one transposed matrix."""
    from conftest import tiny_family

    model = tiny_family("gpt2")
    anatomy = read_anatomy(model)
    name = next(n for n in anatomy.shapes if n.endswith("h.0.attn.c_attn.weight"))
    width = anatomy.shapes[name][0]
    for i, what in enumerate("qkv"):
        of = part_values(model, anatomy, what, (0,))[name]
        columns = [width * i <= c < width * (i + 1) for c in range(3 * width)]
        assert of.tolist() == [columns] * width
    assert bool(part_values(model, anatomy, "q+k+v", (0,))[name].all())


@pytest.mark.parametrize(("what", "layers"), [("qq", (0,)), ("q", (3,)), ("q", (-1,)), ("", (0,))])
def test_parts_that_are_not_there_are_refused(what: str, layers: tuple[int, ...], bert: tuple[Any, Anatomy]) -> None:
    with pytest.raises(AnatomyError, match="no such parts"):
        part_values(*bert, what, layers)


def test_only_the_values_asked_for_are_drawn_and_they_are_those_of_a_whole_draw(copy_of: Any) -> None:
    name = MATRICES[0]
    only = {name: torch.rand(copy_of.get_parameter(name).shape, generator=torch.Generator().manual_seed(0)) < 0.3}
    before = copy_of.get_parameter(name).detach().clone()
    whole = deepcopy(copy_of)
    reinitialise(whole, [name], 5)
    reinitialise(copy_of, [name], 5, only)
    now = copy_of.get_parameter(name)
    assert torch.equal(now[only[name]], whole.get_parameter(name)[only[name]])
    assert torch.equal(now[~only[name]], before[~only[name]])


def test_zeroing_leaves_biases_and_values_not_asked_for(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    before = values(copy_of)
    zero_values(copy_of, part_values(*bert, "q", (1,)))
    name = "bert.encoder.layer.1.attention.self.query.weight"
    assert changed(before, copy_of) == {name} and not copy_of.get_parameter(name).any()


def test_rotated_rows_are_those_of_the_row_before(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    table = bert[0].get_parameter(name)
    copy_values(copy_of, bert[0], [name], rotated=True)
    for row, now in enumerate(copy_of.get_parameter(name)):
        assert torch.equal(now, table[row - 1])


def test_values_of_heads_are_exactly_what_decides_their_output(bert: tuple[Any, Anatomy], copy_of: Any) -> None:
    """Other values there leave the model under the mask as it is; one other value beside them does not."""
    model, anatomy = bert
    kept = torch.ones(3, 4, dtype=torch.bool)
    kept[0, 1] = kept[2, 3] = False
    ids = torch.arange(10).reshape(1, 10)
    with Gates(model, anatomy, Mask(heads=kept)), torch.no_grad():
        wanted = model(input_ids=ids).logits
    for which in ("all", "o"):
        own = head_values(anatomy, kept, which)
        changed_model = deepcopy(model)
        reinitialise(changed_model, own, 3, own)
        with Gates(changed_model, anatomy, Mask(heads=kept)), torch.no_grad():
            assert torch.equal(changed_model(input_ids=ids).logits, wanted), which
        assert not torch.equal(changed_model(input_ids=ids).logits, model(input_ids=ids).logits), which
    sizes = {which: sum(int(of.sum()) for of in head_values(anatomy, kept, which).values()) for which in ("all", "o", "o-rows")}
    assert sizes == {"all": 2 * anatomy.attentions[0].values_per_head, "o": 2 * 24 * 96, "o-rows": 2 * 24 * 96}
    rows = head_values(anatomy, kept, "o-rows")
    reinitialise(copy_of, rows, 3, rows)
    with Gates(copy_of, anatomy, Mask(heads=kept)), torch.no_grad():
        assert not torch.equal(copy_of(input_ids=ids).logits, wanted), "the released rows belong to other heads too"
    with pytest.raises(AnatomyError, match="no values"):
        head_values(anatomy, kept, "rows")


def test_values_of_heads_that_are_all_kept_are_none(bert: tuple[Any, Anatomy]) -> None:
    for which in ("all", "o", "o-rows"):
        assert head_values(bert[1], torch.ones(3, 4, dtype=torch.bool), which) == {}


@pytest.mark.parametrize("form", ["drop", "double"])
def test_a_residual_is_left_out_in_every_family_with_a_norm_behind_it(form: Any, family: str) -> None:
    """By hand: what the last norm of the last layer gives, from the MLP's output alone."""
    from conftest import tiny_model

    model = tiny_model(family)
    anatomy = read_anatomy(model)
    ids = torch.arange(3, 13).reshape(2, 5)
    seen: dict[str, Tensor] = {}
    last = anatomy.layers[-1]
    out, layer = model.get_submodule(last.mlp.out.path), model.get_submodule(last.path)
    norm = layer.output_layer_norm if family == "distilbert" else layer.output.LayerNorm
    handles = [
        out.register_forward_hook(lambda _, __, y: seen.__setitem__("branch", y)),
        norm.register_forward_hook(lambda _, __, y: seen.__setitem__("normed", y)),
    ]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with without_residual(model, anatomy, [1], form):
            without = model(input_ids=ids).logits
            assert torch.equal(seen["normed"], norm(seen["branch"] * (1 if form == "drop" else 2)))
        assert torch.equal(model(input_ids=ids).logits, before) and not torch.equal(without, before)
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "nothing stays behind"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_residual_of_a_pre_norm_model_is_refused(family: str) -> None:
    from conftest import tiny_family

    model = tiny_family(family)
    with pytest.raises(AnatomyError, match="not added right before"), without_residual(model, read_anatomy(model), [0]):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(AnatomyError, match="no such layers"), without_residual(model, read_anatomy(model), [2]):
        pass
