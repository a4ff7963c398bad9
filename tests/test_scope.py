"""What is maskable, value by value: counts worked out by hand, on tiny models of every family and on BERT-base."""

from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_model
from tombola.anatomy import MLP, Anatomy, Attention, Layer, Projection, read_anatomy
from tombola.errors import MaskError
from tombola.scope import SCOPES, scope_parameters, scope_sizes

# The tiny models: width 24, MLP 40, two layers, 60 words, 40 positions, two classes.
SQUARE, UP, BIAS, BIAS_UP = 24 * 24, 24 * 40, 24, 40
MATRICES = 2 * (4 * SQUARE + 2 * UP)
BIASES = 2 * (5 * BIAS + BIAS_UP)
HEADS = {  # what the task adds: (weights, biases)
    "bert": (2 * 24, 2),
    "roberta": (SQUARE + 2 * 24, 24 + 2),
    "electra": (SQUARE + 2 * 24, 24 + 2),
    "distilbert": (SQUARE + 2 * 24, 24 + 2),
}
EMBEDDINGS = {  # words, positions, segments
    "bert": (60 + 40 + 2) * 24,
    "roberta": (60 + 40 + 2) * 24,
    "electra": (60 + 40 + 2) * 16,  # ELECTRA's are narrower than its body
    "distilbert": (60 + 40) * 24,  # no segments
}
POOLER = {"bert": (SQUARE, 24)}  # RoBERTa and ELECTRA classify without one, DistilBERT never had one


@pytest.fixture(scope="module")
def tiny() -> dict[str, tuple[Any, Anatomy]]:
    models = {kind: tiny_model(kind) for kind in HEADS}
    return {kind: (model, read_anatomy(model)) for kind, model in models.items()}


@pytest.fixture(scope="module")
def bert_base() -> tuple[Any, Anatomy]:
    """BERT-base without values; its anatomy by hand, since a proof would need some."""
    import transformers

    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2))
    layers = []
    for i in range(12):
        at = f"bert.encoder.layer.{i}"
        q, k, v = (Projection(f"{at}.attention.self.{name}", 768, 768, has_bias=True) for name in ("query", "key", "value"))
        o = Projection(f"{at}.attention.output.dense", 768, 768, has_bias=True)
        ins = Projection(f"{at}.intermediate.dense", 768, 3072, has_bias=True)
        out = Projection(f"{at}.output.dense", 3072, 768, has_bias=True)
        layers.append(Layer(at, Attention(q, k, v, o, 12, 12, 64), MLP((ins,), out, 3072)))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return model, Anatomy("bert", tuple(layers), shapes)


def size(model: nn.Module, anatomy: Anatomy, scope: str) -> int:
    return sum(parameter.numel() for parameter in scope_parameters(model, anatomy, scope).values())


# -------------------------------------------------------------------------------------------------------- named scopes


def test_scopes_of_every_family_have_the_values_one_counts(family: str, tiny: dict[str, tuple[Any, Anatomy]]) -> None:
    expected = {
        "body": MATRICES + BIASES,
        "embeddings": EMBEDDINGS[family],
        "head": sum(HEADS[family]),
        "prasanna2020": MATRICES + BIASES - 2 * BIAS,
        "chen2020": MATRICES + POOLER.get(family, (0, 0))[0],
        "liu2022": MATRICES + POOLER.get(family, (0, 0))[0] + HEADS[family][0],
        "body:weights": MATRICES,
        "body:biases": BIASES,
        "neurons": 2 * 40 * (24 + 1 + 24),
        "layers": MATRICES + BIASES - 2 * BIAS,
    }
    if family in POOLER:
        expected["pooler"] = sum(POOLER[family])
    assert scope_sizes(*tiny[family]) == expected


def test_prasanna_s_set_is_the_body_without_the_bias_of_mlp_out(family: str, tiny: dict[str, tuple[Any, Anatomy]]) -> None:
    model, anatomy = tiny[family]
    left_out = {f"{layer.mlp.out.path}.bias" for layer in anatomy.layers}
    body, theirs = (set(scope_parameters(model, anatomy, scope)) for scope in ("body", "prasanna2020"))
    assert body - theirs == left_out and len(left_out) == 2 and theirs < body


@pytest.mark.parametrize(
    ("scope", "values", "parameters"),
    [
        # 12 · (4·(768² + 768) + 768·3072 + 3072 + 3072·768), the published size of m-pruning
        ("prasanna2020", 85_008_384, 12 * 11),
        ("body", 85_008_384 + 12 * 768, 12 * 12),
        ("chen2020", 85_524_480, 73),  # 72 matrices of the body, 84,934,656, and the pooler's 768²
        ("liu2022", 85_524_480 + 2 * 768, 74),
        ("body:weights", 84_934_656, 72),
        ("body:biases", 12 * (5 * 768 + 3072), 72),
        ("pooler", 768 * 769, 2),
        ("embeddings", (30_522 + 512 + 2) * 768, 3),
        ("head", 2 * 769, 2),
        ("body:weights+pooler:weights", 85_524_480, 73),
        ("*", 109_483_778, 201),
    ],
)
def test_bert_base_has_the_published_numbers(scope: str, values: int, parameters: int, bert_base: tuple[Any, Anatomy]) -> None:
    assert size(*bert_base, scope) == values
    assert len(scope_parameters(*bert_base, scope)) == parameters


def test_the_heads_and_mlps_of_bert_base_are_as_many_values_as_prasanna_s_set(bert_base: tuple[Any, Anatomy]) -> None:
    """By chance of the same size: s-pruning leaves the bias of o and takes that of MLP out, m-pruning the other way."""
    model, anatomy = bert_base
    assert anatomy.size(anatomy.full_mask()).maskable_values == size(model, anatomy, "prasanna2020")


def test_chen_s_matrices_are_all_matrices_but_embeddings_and_classifier(bert_base: tuple[Any, Anatomy]) -> None:
    model, anatomy = bert_base
    by_shape = {n for n, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in n and "classifier" not in n}
    assert scope_parameters(model, anatomy, "chen2020").keys() == by_shape


def test_no_scope_touches_a_norm(family: str, tiny: dict[str, tuple[Any, Anatomy]]) -> None:
    model, anatomy = tiny[family]
    norms = {f"{at}.{n}" for at, m in model.named_modules() if isinstance(m, nn.LayerNorm) for n, _ in m.named_parameters()}
    assert len(norms) == 2 * (1 + 2 * 2)
    for scope in (*(scope_sizes(model, anatomy).keys() - {"neurons", "layers"}), "*:weights"):
        assert not norms & scope_parameters(model, anatomy, scope).keys(), scope


def test_the_head_of_roberta_and_distilbert_is_all_that_the_base_lacks(tiny: dict[str, tuple[Any, Anatomy]]) -> None:
    head = {kind: list(scope_parameters(*tiny[kind], "head")) for kind in tiny}
    assert head["bert"] == ["classifier.weight", "classifier.bias"]
    dense_first = [f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")]
    assert head["roberta"] == head["electra"] == dense_first
    assert head["distilbert"] == [f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")]


def test_a_base_alone_has_no_head() -> None:
    base = tiny_model("bert").bert
    anatomy = read_anatomy(base)
    assert "head" not in scope_sizes(base, anatomy)
    assert scope_sizes(base, anatomy)["body"] == MATRICES + BIASES
    with pytest.raises(MaskError, match="'head' matches nothing in this BertModel"):
        scope_parameters(base, anatomy, "head")


# -------------------------------------------------------------------------------------------------- terms and patterns


def test_terms_add_up_each_parameter_once(family: str, tiny: dict[str, tuple[Any, Anatomy]]) -> None:
    model, anatomy = tiny[family]
    assert size(model, anatomy, "body+embeddings") == MATRICES + BIASES + EMBEDDINGS[family]
    assert size(model, anatomy, "body:weights+body:biases") == size(model, anatomy, "body")
    assert size(model, anatomy, "body + prasanna2020+ chen2020 +body") == MATRICES + BIASES + POOLER.get(family, (0,))[0]


def test_names_come_in_the_order_of_the_model_whatever_the_order_of_terms(
    family: str, tiny: dict[str, tuple[Any, Anatomy]]
) -> None:
    """Ties between scores are broken by position: another order would be another mask."""
    model, anatomy = tiny[family]
    own = [name for name, _ in model.named_parameters()]
    for scope in ("head+body+embeddings", "embeddings+head+body", "liu2022", "*bias+*weight"):
        found = scope_parameters(model, anatomy, scope)
        assert list(found) == [name for name in own if name in found]
        assert all(parameter is model.get_parameter(name) for name, parameter in found.items())
    assert list(scope_parameters(model, anatomy, "*")) == own
    assert scope_parameters(model, anatomy, "head+body").keys() == scope_parameters(model, anatomy, "body+head").keys()


def test_patterns_and_plain_names_pick_parameters_by_name(tiny: dict[str, tuple[Any, Anatomy]]) -> None:
    model, anatomy = tiny["bert"]
    query = "bert.encoder.layer.{}.attention.self.query.{}"

    def names(scope: str) -> list[str]:
        return list(scope_parameters(model, anatomy, scope))

    assert names("*.query.*") == [query.format(i, kind) for i in range(2) for kind in ("weight", "bias")]
    assert names("*.query.*:weights") == [query.format(i, "weight") for i in range(2)]
    assert names("*.layer.1.*query*:biases") == [query.format(1, "bias")]
    assert names("classifier.bias") == ["classifier.bias"]
    assert names("classifier.bias+" + query.format(0, "bias")) == [query.format(0, "bias"), "classifier.bias"]
    # a bias is what has one axis: the weight of a norm is no weight here
    assert names("bert.embeddings.*:weights") == [
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    ]
    assert names("bert.embeddings.*:biases") == ["bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.bias"]


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("bodi", "did you mean 'body'?"),
        ("prasana2020", "did you mean 'prasanna2020'?"),
        ("body+embedings", "did you mean 'embeddings'?"),
        ("clasifier.weight", "did you mean 'classifier.weight'?"),
        ("body:weight", "did you mean 'body:weights'?"),
        ("chen2020:matrices", "each may end in :weights or :biases"),
        ("", "terms joined by +"),
        ("body+", "terms joined by +"),
        (":weights", "terms joined by +"),
        ("zzzzqq", "expected: terms joined by +: body, pooler, embeddings, head"),
        ("body:weights:biases", "each may end in :weights or :biases"),
        ("Body", "did you mean 'body'?"),
    ],
)
def test_an_unknown_term_is_refused_and_the_nearest_offered(scope: str, said: str, tiny: dict[str, tuple[Any, Anatomy]]) -> None:
    with pytest.raises(MaskError, match="there is no scope") as caught:
        scope_parameters(*tiny["bert"], scope)
    assert said in " ".join(str(caught.value).split()) and caught.value.got == scope


@pytest.mark.parametrize(
    ("kind", "scope", "term"),
    [
        ("roberta", "pooler", "pooler"),
        ("distilbert", "body+pooler:weights", "pooler:weights"),
        ("bert", "*.no-such-part.*", "*.no-such-part.*"),
        ("bert", "embeddings:biases", "embeddings:biases"),
        ("bert", "classifier.weight:biases", "classifier.weight:biases"),
    ],
)
def test_a_term_that_matches_nothing_is_refused_not_skipped(
    kind: str, scope: str, term: str, tiny: dict[str, tuple[Any, Anatomy]]
) -> None:
    with pytest.raises(MaskError, match="matches nothing in this") as caught:
        scope_parameters(*tiny[kind], scope)
    assert repr(term) in caught.value.what and "tombola inspect MODEL" in str(caught.value)


# --------------------------------------------------------------------------------------------------------- tied values


def test_the_table_of_a_tied_language_model_counts_once() -> None:
    """Its decoder reads the table of words: one parameter, that of the embeddings, under the first of its two names."""
    import transformers

    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=40)).eval()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    anatomy = read_anatomy(model)
    assert size(model, anatomy, "embeddings") == (60 + 40 + 2) * 24
    head = scope_parameters(model, anatomy, "head")
    assert sum(p.numel() for p in head.values()) == SQUARE + 24 + 2 * 24 + 60  # transform, its norm, the bias of the output
    assert not {id(p) for p in head.values()} & {id(p) for p in scope_parameters(model, anatomy, "embeddings").values()}
    assert size(model, anatomy, "*") == sum(p.numel() for p in model.parameters()) == anatomy.total_parameters
    with pytest.raises(MaskError, match="there is no scope"):
        scope_parameters(model, anatomy, "cls.predictions.decoder.weight")


def test_every_named_scope_is_one_that_is_tested_here(bert_base: tuple[Any, Anatomy]) -> None:
    assert set(SCOPES) == {"body", "pooler", "embeddings", "head", "prasanna2020", "chen2020", "liu2022"}
    assert scope_sizes(*bert_base).keys() == SCOPES.keys() | {"body:weights", "body:biases", "neurons", "layers"}
