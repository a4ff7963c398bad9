"""Shrunk models: for every family the masked model, smaller; caches, files, other processes; what cannot be cut.

The oracle is the dense model under gates; sizes come from masks of single values, and of one family from a copy cut by hand.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tombola
from conftest import FAMILIES, _as_if_trained, tiny_family
from test_families import ALL, HEADS, exact, furthest, known, logits, mask_without, rows_for, some_masks
from tombola.anatomy import Anatomy, read_anatomy
from tombola.cut import check_rows, dead_parts, outputs_of, parity, prove_same, shrink
from tombola.errors import MaskError
from tombola.gates import Gates, hold, masked
from tombola.mask import Mask

every_family = pytest.mark.parametrize("kind", ALL)
DECODERS = [kind for kind in FAMILIES if kind not in ("albert", "mpnet", "deberta-v2", "deberta-v2-own", "modernbert", "vit")]


def under(model: Any, anatomy: Anatomy, mask: Mask) -> Tensor:
    with Gates(model, anatomy, mask):
        return logits(model)


def n_values(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def is_even(anatomy: Anatomy, mask: Mask) -> bool:
    heads = (anatomy.full_mask() & mask).heads
    assert heads is not None
    counts = heads.view(len(heads), anatomy.attentions[0].n_kv_heads, -1).sum(2)
    return all(len(set(row.tolist()) - {0}) <= 1 for row in counts)


# ----------------------------------------------------------------------------------------- the same, and smaller


@every_family
def test_a_shrunk_model_computes_what_the_masked_one_does_and_has_no_more_than_is_left(kind: str) -> None:
    _, anatomy = known(kind)
    model = exact(tiny_family(kind).double())
    masks = some_masks(anatomy)
    for name in ("first head", "a whole group", "an emptied layer", "some of all", "nothing left"):
        mask = masks[name]
        small = shrink(model, mask, anatomy, groups="fill")
        expected = under(model, anatomy, mask)
        assert furthest(logits(exact(small)), expected) <= 1e-9 * float(expected.abs().max()), name
        assert torch.equal(logits(small).argmax(-1), expected.argmax(-1)), name
        gone = sum(int((~part).sum()) for part in anatomy.as_values(mask).values())
        if is_even(anatomy, mask) and kind != "deberta-v2-own":  # whose positions have rows of heads beside the anatomy's
            assert n_values(small) == anatomy.total_parameters - gone, name
        else:
            assert n_values(small) < anatomy.total_parameters or "group" in name or "head" in name


@every_family
def test_in_fp32_it_is_proved_the_same_with_padding(kind: str) -> None:
    model, anatomy = tiny_family(kind), known(kind)[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("some of all",):
        mask = some_masks(anatomy)[name]
        found = prove_same(model, anatomy, mask, shrink(model, mask, anatomy, groups="fill"))
        assert found.holds and found.rows > 1, name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", DECODERS)
def test_generation_with_a_cache_is_that_of_the_masked_model_without(kind: str) -> None:
    if kind == "phi3" and transformers.__version__.startswith("5.0."):
        pytest.skip("Phi-3 of transformers 5.0 cannot generate without a cache, dense or not")
    family, sizes = FAMILIES[kind]
    config = getattr(transformers, f"{family}Config")(**sizes)
    both = config.is_encoder_decoder
    torch.manual_seed(0)
    auto = transformers.AutoModelForSeq2SeqLM if both else transformers.AutoModelForCausalLM
    model = exact(_as_if_trained(auto.from_config(config)).double())
    anatomy, rows = read_anatomy(model), rows_for(model)
    if not both:  # a decoder goes on where the text ends
        rows = {name: value.flip(1) for name, value in rows.items()}
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    for name in ("some of all", "nothing left"):
        mask = some_masks(anatomy)[name]
        small: Any = exact(shrink(model, mask, anatomy, groups="fill"))
        with Gates(model, anatomy, mask):
            expected = model.generate(**rows, use_cache=False, return_dict_in_generate=True, **asked)
        for kind_of_cache in (None, "static"):
            if kind_of_cache is not None and (kind.startswith("opt") or name != "nothing left"):
                continue  # OPT has no static cache, dense or not
            found = small.generate(
                **rows, use_cache=True, cache_implementation=kind_of_cache, return_dict_in_generate=True, **asked
            )
            assert torch.equal(found.sequences, expected.sequences), (name, kind_of_cache)
            for a, b in zip(found.logits, expected.logits, strict=True):
                assert furthest(a, b) <= 1e-9 * float(b.abs().max()), (name, kind_of_cache)


def test_weights_are_the_rows_and_columns_that_stay() -> None:
    """By hand, of BERT: head 1 of four (width 6) and neuron 2 of layer 0 go."""
    model, anatomy = known("bert")
    neurons = torch.ones(2, 40, dtype=torch.bool)
    neurons[0, 2] = False
    small = shrink(model, mask_without(anatomy, [(0, 1)]) & Mask(neurons=neurons), anatomy)
    stays = [*range(6), *range(12, 24)]
    was, now = (one.get_submodule("bert.encoder.layer.0") for one in (model, small))
    for name in ("query", "key", "value"):
        dense, cut = (one.attention.self.get_submodule(name) for one in (was, now))
        assert torch.equal(cut.weight, dense.weight[stays]) and torch.equal(cut.bias, dense.bias[stays])
        assert (cut.in_features, cut.out_features) == (24, 18)
    assert torch.equal(now.attention.output.dense.weight, was.attention.output.dense.weight[:, stays])
    assert torch.equal(now.attention.output.dense.bias, was.attention.output.dense.bias)
    left = [i for i in range(40) if i != 2]
    assert torch.equal(now.intermediate.dense.weight, was.intermediate.dense.weight[left])
    assert torch.equal(now.output.dense.weight, was.output.dense.weight[:, left])
    assert now.attention.self.num_attention_heads == 3 and was.attention.self.num_attention_heads == 4


def test_it_can_be_trained_and_copied_and_stays_in_its_mode() -> None:
    model, anatomy = tiny_family("t5").train(), known("t5")[1]
    small: Any = shrink(model, some_masks(anatomy)["some of all"], anatomy)
    assert small.training and all(module.training for module in small.modules())
    twin = copy.deepcopy(small)
    twin(**rows_for(twin), labels=torch.tensor([0, 1, 1])).loss.backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    assert furthest(logits(twin.eval()), logits(small.eval())) > 1e-4
    frozen = tiny_family("bert").requires_grad_(False)
    assert not any(p.requires_grad for p in shrink(frozen, some_masks(known("bert")[1])["some of all"]).parameters())


@pytest.mark.parametrize("kind", ["bert", "llama", "falcon", "t5"])
def test_half_precision_and_other_kernels(kind: str) -> None:
    model, anatomy = tiny_family(kind), known(kind)[1]
    mask = some_masks(anatomy)["some of all"]
    small = shrink(model, mask, anatomy, groups="fill").to(torch.bfloat16)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    wanted = under(model, anatomy, mask)
    assert furthest(logits(small).float(), wanted) < 0.1 * float(wanted.abs().max())
    assert logits(small).dtype == torch.bfloat16
    eager = shrink(tiny_family(kind, attention="eager"), mask, anatomy, groups="fill")
    assert furthest(logits(eager), wanted) < 1e-5 * float(wanted.abs().max())


# ------------------------------------------------------------------------------------------------ single values


def test_what_single_values_leave_of_nothing_is_cut_exactly() -> None:
    """Of BERT, by hand: neurons without column, without row and bias, with a bias left; heads without v, without o."""
    model, anatomy = tiny_family("bert").double(), known("bert")[1]
    values = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if "encoder" in name}
    at = "bert.encoder.layer.0."
    values[at + "output.dense.weight"][:, 3] = False  # dead: no way out
    values[at + "intermediate.dense.weight"][4] = False
    values[at + "intermediate.dense.bias"][4] = False  # dead: gelu(0) = 0
    values[at + "intermediate.dense.weight"][5] = False  # alive: its bias is left
    values[at + "attention.self.value.weight"][6:12] = False
    values[at + "attention.self.value.bias"][6:12] = False  # head 1 is dead
    values[at + "attention.self.query.weight"][12:18] = False
    values[at + "attention.self.key.weight"][12:18] = False  # head 2 attends evenly, and lives
    values[at + "attention.output.dense.weight"][:, 18:] = False  # head 3 is dead
    values["bert.encoder.layer.1.output.dense.weight"][:] = False
    values["bert.encoder.layer.1.output.dense.bias"][:] = False  # the whole MLP
    mask = Mask(values=values)
    found = dead_parts(model, anatomy, mask)
    assert found.heads is not None and found.neurons is not None and found.mlps is not None
    assert found.heads.tolist() == [[True, False, True, False], [True] * 4]
    assert torch.nonzero(~found.neurons[0]).flatten().tolist() == [3, 4]
    assert found.mlps.tolist() == [True, False]
    with masked(model, anatomy, mask):
        expected = logits(model)
    small, whole = shrink(model, mask, anatomy), shrink(model, mask, anatomy, dead=False)
    assert furthest(logits(small), expected) < 1e-12 and furthest(logits(whole), expected) < 1e-12
    assert n_values(small) < n_values(whole) == n_values(model)


def test_a_neuron_whose_activation_of_zero_is_not_zero_lives() -> None:
    import math

    config = {"hidden_act": "sigmoid"}
    model = tiny_family("bert", **config).double()
    anatomy = read_anatomy(model)
    values = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if "intermediate" in name}
    for part in values.values():
        part[7] = False
    mask = Mask(values=values)
    found = dead_parts(model, anatomy, mask)
    assert found.removes_nothing and math.isclose(float(torch.sigmoid(torch.tensor(0.0))), 0.5)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "t5-gated", "modernbert"])
def test_dead_parts_of_gated_and_fused_families_are_those_that_were_emptied(kind: str) -> None:
    model, anatomy = tiny_family(kind).double(), known(kind)[1]
    mask = some_masks(anatomy)["some of all"]
    as_values = Mask(values=anatomy.as_values(mask))
    found = dead_parts(model, anatomy, as_values)
    full = anatomy.full_mask("heads", "mlps", "neurons") & mask
    assert found.heads is not None and full.heads is not None
    assert torch.equal(found.heads, full.heads) and torch.equal(found.mlps, full.mlps)  # type: ignore[arg-type]
    with masked(model, anatomy, as_values):
        expected = logits(model)
    assert furthest(logits(shrink(model, as_values, anatomy, groups="fill")), expected) < 1e-7 * float(expected.abs().max())


def test_dead_heads_that_leave_groups_uneven_refuse_nothing() -> None:
    model, anatomy = tiny_family("llama").double(), known("llama")[1]
    values = Mask(values=anatomy.as_values(mask_without(anatomy, [(0, 1), (1, 2), (1, 3)])))
    small: Any = shrink(model, values, anatomy)
    with masked(model, anatomy, values):
        assert furthest(logits(small), logits(model)) < 1e-7
    assert small.model.layers[0].self_attn.q_proj.out_features == 24 and small.model.layers[1].self_attn.q_proj.out_features == 12


def test_a_held_model_is_shrunk_by_what_it_holds() -> None:
    model, anatomy = tiny_family("bert").double(), known("bert")[1]
    mask = some_masks(anatomy)["some of all"]
    expected = under(model, anatomy, mask)
    hold(model, anatomy, mask)
    small = shrink(model)
    assert furthest(logits(small), expected) < 1e-12
    assert n_values(small) == n_values(shrink(tiny_family("bert"), mask))
    assert not hasattr(small, "tombola_gates") and not small._forward_pre_hooks
    assert model.tombola_gates.attached
    with pytest.raises(MaskError, match="no mask to shrink by"):
        shrink(tiny_family("bert"))


# --------------------------------------------------------------------------------------------- files, other processes


@every_family
def test_it_is_saved_loaded_and_saved_again(kind: str, tmp_path: Path) -> None:
    model, anatomy = tiny_family(kind), known(kind)[1]
    small: Any = shrink(model, some_masks(anatomy)["some of all"], anatomy, groups="fill")
    small.save_pretrained(tmp_path / "once")
    auto = transformers.AutoModelForImageClassification if kind == "vit" else transformers.AutoModelForSequenceClassification
    back, said = auto.from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not any(said.values())
    assert type(back) is type(small) and type(back).__name__ == f"Shrunk{type(model).__name__}"
    assert torch.equal(logits(back), logits(small))
    back.save_pretrained(tmp_path / "twice")
    files = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "twice").iterdir())
    if transformers.__version__.startswith("5.0."):  # saves what it has loaded in another order, LayerNorms as gamma and beta
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "twice")), logits(small))
    else:
        assert all((tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes() for name in files)


def test_without_its_head_and_as_a_pipeline(tmp_path: Path, tiny_folder: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_folder)
    anatomy = read_anatomy(model)
    small = shrink(model, mask_without(anatomy, [(0, 1), (1, 0), (1, 2)], (1,)), anatomy)
    small.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    headless = transformers.AutoModel.from_pretrained(tmp_path)
    rows = check_rows(small)
    hidden = small(**rows, output_hidden_states=True).hidden_states
    assert type(headless).__name__ == "ShrunkBertModel" and len(hidden) == 3
    assert torch.equal(headless(**rows).last_hidden_state, hidden[-1])
    pipe = transformers.pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert pipe("the film was good")[0]["label"] in ("LABEL_0", "LABEL_1")


LOAD = """
import sys
{first}
import torch, transformers
{second}
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]{more}).eval()
inputs = torch.load(sys.argv[1] + "/rows.pt", weights_only=True)
torch.save(model(**inputs).logits.detach(), sys.argv[1] + "/found.pt")
print(type(model).__name__, "tombola" in sys.modules)
"""


def in_another_process(folder: Path, model: Any, code: str, isolated: bool = False) -> tuple[str, Tensor]:
    torch.save(rows_for(model), folder / "rows.pt")
    blocked = "import sys; sys.modules['tombola'] = None\n" if isolated else ""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked + code, str(folder)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: Tensor = torch.load(folder / "found.pt", weights_only=True)
    return ran.stdout.strip().splitlines()[-1], found


@pytest.mark.parametrize(("first", "second"), [("import tombola", ""), ("", "import tombola")])
def test_another_process_loads_it_after_importing_tombola(first: str, second: str, tmp_path: Path) -> None:
    model, anatomy = tiny_family("t5"), known("t5")[1]
    small: Any = shrink(model, some_masks(anatomy)["an emptied layer"], anatomy)
    small.save_pretrained(tmp_path)
    said, found = in_another_process(tmp_path, model, LOAD.format(first=first, second=second, more=""))
    assert said == "ShrunkT5ForSequenceClassification True"
    assert furthest(found, logits(small)) < 1e-6


def test_the_first_use_of_transformers_is_what_loads_it() -> None:
    code = "import tombola, sys; before = 'torch' in sys.modules; from transformers import AutoConfig; print(before)"
    code += "; from transformers.models.auto.configuration_auto import CONFIG_MAPPING; print(CONFIG_MAPPING['tombola'].__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "ShrunkConfig"]


def test_whoever_has_no_tombola_is_told_so_and_nothing_runs_unasked(tmp_path: Path) -> None:
    from tombola.shrunk import carry_code

    model, anatomy = tiny_family("bloom"), known("bloom")[1]
    small: Any = shrink(model, some_masks(anatomy)["some of all"], anatomy)
    small.save_pretrained(tmp_path / "plain")
    assert "modeling_tombola.py" not in {path.name for path in (tmp_path / "plain").iterdir()}
    small.config.auto_map = carry_code()
    small.save_pretrained(tmp_path / "code")
    code = LOAD.format(first="", second="", more=", trust_remote_code=True")
    said, found = in_another_process(tmp_path / "code", model, code, isolated=True)
    assert said.startswith("ShrunkBloomForSequenceClassification") and furthest(found, logits(small)) < 1e-6
    for folder, expected in (("plain", "does not recognize this architecture"), ("code", "trust_remote_code=True")):
        ran = subprocess.run(
            [sys.executable, "-c", "import sys; sys.modules['tombola'] = None\n" + LOAD.format(first="", second="", more=""),
             str(tmp_path / folder)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert ran.returncode != 0 and expected in ran.stderr
    # with tombola the file beside the weights is not run unasked, and is carried along
    (tmp_path / "code" / "modeling_tombola.py").write_text("raise SystemExit('ran')")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "code")
    assert type(back) is type(small)
    back.save_pretrained(tmp_path / "again")
    assert "ShrunkConfig" in (tmp_path / "again" / "modeling_tombola.py").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": 2}, "of format 2"),
        ({"base": "nothing"}, "a family that this transformers knows"),
        ({"base": "tombola"}, "of no family"),
        ({"base": "roberta"}, "names"),
        ({"linear": {"bert.encoder.layer.0.attention.self.query": [24, 999]}}, "widens"),
        ({"gone": {"bert.nothing": [24, "zero"]}}, "bert.nothing"),
    ],
)
def test_plans_that_make_no_sense_are_refused(change: dict[str, Any], expected: str, tmp_path: Path) -> None:
    model, anatomy = tiny_family("bert"), known("bert")[1]
    small: Any = shrink(model, some_masks(anatomy)["some of all"], anatomy)
    small.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["tombola"] |= change
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=expected):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------- what cannot be cut


def test_groups_that_cannot_be_cut_evenly_are_refused_with_the_alternatives() -> None:
    model, anatomy = known("llama")
    mask = mask_without(anatomy, [(1, 1)])
    with pytest.raises(MaskError, match="cannot be cut evenly") as caught:
        shrink(model, mask, anatomy)
    assert "[1, 2]" in str(caught.value.got) and 'groups="fill"' in str(caught.value.next)
    small: Any = shrink(model, mask_without(anatomy, [(1, 1), (1, 3)]), anatomy)
    assert small.model.layers[1].self_attn.num_key_value_groups == 1
    filled: Any = shrink(model, mask_without(anatomy, [(0, 0), (0, 1), (0, 3), (1, 1), (1, 2), (1, 3)]), anatomy)
    assert filled.model.layers[0].self_attn.k_proj.out_features == 6  # one kv-head is left, and one head that reads it
    assert filled.model.layers[1].self_attn.q_proj.out_features == 6


def test_layers_that_share_their_weights_are_refused() -> None:
    model = tiny_family("bert")
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    anatomy = known("bert")[1]
    with pytest.raises(MaskError, match="cannot be cut out") as caught:
        shrink(model, mask_without(anatomy, [(0, 1)]), anatomy)
    assert "encoder.layer.1" in str(caught.value.got) and "untie" in str(caught.value.next)
    tied = tiny_family("bert")
    tied.bert.pooler.dense.weight = tied.bert.encoder.layer[0].attention.self.query.weight
    with pytest.raises(MaskError, match="cannot be cut out"):
        shrink(tied, mask_without(anatomy, [(0, 1)]), anatomy)
    shrink(tied, mask_without(anatomy, [(1, 1)]), anatomy)  # what is cut is its own


def test_custom_models_are_refused() -> None:
    class Mine(transformers.BertForSequenceClassification):  # type: ignore[misc]
        pass

    model, anatomy = tiny_family("bert"), known("bert")[1]
    model.__class__ = Mine
    with pytest.raises(MaskError, match="Mine is not a class of transformers"):
        shrink(model, mask_without(anatomy, [(0, 1)]), anatomy)
    small = shrink(tiny_family("bert"), mask_without(anatomy, [(0, 1)]), anatomy)
    with pytest.raises(MaskError, match="shrunk already"):
        shrink(small, mask_without(anatomy, [(0, 2)]), anatomy)
    with pytest.raises(MaskError, match="does not fit"):
        shrink(tiny_family("bert"), Mask(heads=torch.ones(3, HEADS, dtype=torch.bool)), anatomy)


def test_a_family_that_is_not_known_well_enough_is_refused_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing were known of where attention keeps its number of heads."""
    from tombola import shrunk

    monkeypatch.setattr(shrunk, "_COUNTS", {})
    monkeypatch.setattr(shrunk, "_PER_HEAD", ())
    for kind in ("opt", "mpnet", "bloom"):
        model, anatomy = tiny_family(kind), known(kind)[1]
        mask = mask_without(anatomy, [(0, 0), (0, 2)])
        with pytest.raises(MaskError, match="does not compute what the masked model computes"):
            prove_same(model, anatomy, mask, shrink(model, mask, anatomy))


def test_parity_says_when_two_models_differ() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    assert parity(a, a).holds and parity(a, a + 1e-6).holds
    assert not parity(a, a + 1e-3).holds
    assert not parity(a, a * float("nan")).holds and not parity(a, a[:1]).holds
    close = torch.tensor([[1.0, 1.0 + 1e-6]])
    assert parity(close, close.flip(1)).holds  # too close to call
    swapped = parity(torch.tensor([[1.0, 1.001]]), torch.tensor([[1.001, 1.0]]))
    assert not swapped.same_answers
    model, anatomy = tiny_family("bert"), known("bert")[1]
    mask = mask_without(anatomy, [(0, 1)])
    small = shrink(model, mask, anatomy)
    with torch.no_grad():
        small.classifier.weight.add_(0.01)
    with pytest.raises(MaskError, match="of the largest logit apart"):
        prove_same(model, anatomy, mask, small)
    padded = outputs_of(model, check_rows(model))
    assert padded.shape == (4, 2)


def test_names_of_classes_can_be_asked_for() -> None:
    from tombola import shrunk

    assert shrunk.ShrunkBertModel is shrunk.shrunk_class(transformers.BertModel)
    assert shrunk.ShrunkBertConfig is shrunk.shrunk_config(transformers.BertConfig)
    with pytest.raises(AttributeError):
        shrunk.ShrunkNothing  # noqa: B018
    with pytest.raises(AttributeError):
        shrunk.nothing  # noqa: B018
    assert tombola.shrink is shrink
