"""A mask → a model that is physically smaller and computes the same as the masked one.

`shrink` cuts: heads and kv-heads from q, k, v and o, neurons from the MLPs, whole attentions and MLPs, each layer on its own;
of an emptied attention the bias of o stays. `dead_parts` finds what single values leave of whole heads and neurons. `compare`
measures that nothing else changed: nobody saves a shrunk model without it. How a shrunk model is built is in `shrunk`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tombola.anatomy import Anatomy, Projection, evaluating, probe_inputs, read_anatomy
from tombola.errors import MaskError
from tombola.gates import first_tensor, masked
from tombola.mask import Mask
from tombola.shrunk import FIELD, FORMAT, MODEL_TYPE, Constant, Zeros, become_shrunk, resize, shrunk_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Linear maps besides q, k and v that have rows for each head: DeBERTa's of relative positions.
BESIDE_Q = ("pos_key_proj", "pos_query_proj")

Groups = Literal["refuse", "fill"]


# ------------------------------------------------------------------------------------------------------------- shrink


def shrink(
    model: nn.Module,
    mask: Mask | None = None,
    anatomy: Anatomy | None = None,
    *,
    groups: Groups = "refuse",
    dead: bool = True,
    share: bool = False,
) -> "PreTrainedModel":
    """A copy of `model` that lacks what `mask` removes, and computes what the masked model computes; `model` stays as it is.

    mask: None = the one that the model holds (`tombola.load`, `tombola.hold`). Its single values become zero; with `dead`,
    heads and neurons of which they leave nothing that could reach the output are cut as well (`dead_parts`).
    groups: where heads share keys and values, every group of a layer must lose as many heads. "refuse" says so; "fill" keeps as
    many heads in each as the fullest has, those that the mask removes with zeros in o: exact, and less is gained.

    share: weights that are not cut are those of `model` itself and no copies: for a model that is only run, and at once.

    The result is of a class of its own (`ShrunkBertFor…`), saves with save_pretrained and loads by every Auto class once tombola
    is imported. A model that is asked in words stays so.

    Raises: MaskError for a mask that does not fit, for groups that cannot be cut evenly, for layers that share their weights, and
    for a model class that is not of transformers, each with what can be done instead.
    """
    gates = getattr(model, "tombola_gates", None)
    if mask is None:
        if gates is None:
            raise MaskError("there is no mask to shrink by", expected="a mask, or a model that holds one (tombola.load)")
        anatomy, mask = gates.anatomy, gates.mask & Mask(values=gates.held.values if gates.held is not None else {})
    anatomy = anatomy or read_anatomy(model)
    anatomy.check(mask)
    _refuse_foreign(model)
    units = mask.structured()
    if mask.values and dead:
        units &= dead_parts(model, anatomy, mask)
        groups = "fill" if mask.heads is None else groups  # what is dead goes where it can; nobody asked for it
    kept = anatomy.full_mask() & units
    cut = cut_of(model, anatomy, kept, _filled(anatomy, kept, groups))
    _refuse_shared(model, cut)
    return _build(model, cut, mask.values, share)


@dataclass(frozen=True, slots=True)
class Cut:
    """What goes: by path of a module the channels that stay; `gone` and `attention` as in the plan of `shrunk`."""

    outputs: Mapping[str, Tensor]  # bool [out]
    inputs: Mapping[str, Tensor]  # int [kept]
    zeroed: Mapping[str, Tensor]  # bool [kept]: of the inputs that stay, those that are only there to fill a group are False
    gone: Mapping[str, tuple[int, str]]
    attention: Mapping[str, dict[str, Any]]

    @property
    def paths(self) -> set[str]:
        return self.outputs.keys() | self.inputs.keys() | self.gone.keys()


def cut_of(model: nn.Module, anatomy: Anatomy, mask: Mask, stays: Mask) -> Cut:
    """What goes where `stays` stays, which is what `mask` keeps and perhaps more; both have heads and MLPs, and may have neurons.

    Of heads that stay and are not kept the columns of o become zero; neurons and MLPs that stay are kept.
    """
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    zeroed: dict[str, Tensor] = {}
    gone: dict[str, tuple[int, str]] = {}
    owners: dict[str, dict[str, Any]] = {}
    assert mask.heads is not None and stays.heads is not None and stays.mlps is not None

    def keep_rows(path: str, projection: Projection, of: Tensor) -> None:
        if path not in outputs:
            weight = cast(Any, model.get_submodule(path)).weight
            outputs[path] = torch.ones(weight.shape[1 if projection.transposed else 0], dtype=torch.bool)
        outputs[path][projection.channels()] = of

    for attention, kept, here in zip(anatomy.attentions, mask.heads, stays.heads, strict=True):
        if bool(kept.all()):
            continue
        d, owner = attention.d_head, attention.q.path.rpartition(".")[0]
        said = {"of": attention.n_heads, "kv_of": attention.n_kv_heads, "d_head": d}
        beside = [f"{owner}.{name}" for name in BESIDE_Q if hasattr(model.get_submodule(owner), name)]
        if not bool(here.any()):  # one head of zeros stands in, see `shrunk.Zeros`
            for projection in (attention.q, attention.k, attention.v):
                gone[projection.path] = (gone.get(projection.path, (0,))[0] + d, "none")
            gone |= dict.fromkeys(beside, (d, "none"))
            gone[attention.o.path] = (attention.o.n_out, "bias" if attention.o.has_bias else "zero")
            owners[owner] = {"heads": [0], "kv_heads": 1, **said}
            continue
        rows = here.repeat_interleave(d)
        of_groups = here.view(attention.n_kv_heads, -1).any(1)
        kv_rows = of_groups.repeat_interleave(d)
        for projection, of in ((attention.q, rows), (attention.k, kv_rows), (attention.v, kv_rows)):
            keep_rows(projection.path, projection, of)
        for path in beside:
            keep_rows(path, attention.q, rows)
        inputs[attention.o.path] = torch.nonzero(rows).flatten()
        if not torch.equal(here, kept):
            zeroed[attention.o.path] = kept.repeat_interleave(d)[rows]
        owners[owner] = {"heads": torch.nonzero(here).flatten().tolist(), "kv_heads": int(of_groups.sum()), **said}

    for i, (mlp, is_kept) in enumerate(zip(anatomy.mlps, stays.mlps, strict=True)):
        neurons = torch.ones(mlp.d_ffn, dtype=torch.bool) if stays.neurons is None else stays.neurons[i]
        if not bool(is_kept) or not bool(neurons.any()):
            for projection in mlp.ins:
                gone[projection.path] = (gone.get(projection.path, (0,))[0] + 1, "none")
            gone[mlp.out.path] = (mlp.out.n_out, "bias" if bool(is_kept) and mlp.out.has_bias else "zero")
        elif not bool(neurons.all()):
            for projection in mlp.ins:
                keep_rows(projection.path, projection, neurons)
            inputs[mlp.out.path] = torch.nonzero(neurons).flatten()
    return Cut(outputs, inputs, zeroed, gone, owners)


def _filled(anatomy: Anatomy, mask: Mask, groups: Groups) -> Mask:
    """What stays: all that is kept, and of groups of heads that are less full than others as many more, lowest first."""
    assert mask.heads is not None
    stays = mask.heads.clone()
    for row, attention in enumerate(anatomy.attentions):
        by_group = stays[row].view(attention.n_kv_heads, -1)
        counts = by_group.sum(1).tolist()
        if set(counts) <= {0, max(counts)}:
            continue
        if groups == "refuse":
            raise MaskError(
                f"{attention.q.path}: its groups of heads cannot be cut evenly",
                got=f"heads kept in each group that shares keys and values: {counts}",
                expected="as many in each group of a layer, or none",
                next='groups="fill" (--groups fill) keeps the fullest group\'s number in each, zeros for removed heads, which is '
                "exact; or search a ticket of whole layers or neurons; or keep the mask on the dense model (tombola.load)",
            )
        for group, count in zip(by_group, counts, strict=True):
            if count > 0:
                group[torch.nonzero(~group).flatten()[: max(counts) - count]] = True
    return Mask(heads=stays, mlps=mask.mlps, neurons=mask.neurons)


def _refuse_foreign(model: nn.Module) -> None:
    import transformers

    if getattr(getattr(model, "config", None), "model_type", None) == MODEL_TYPE:
        raise MaskError(
            "the model is shrunk already", got=type(model).__name__, next="shrink the dense model by both masks: a & b"
        )
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise MaskError(
            f"{type(model).__name__} is not a class of transformers, so that nothing could load it shrunk",
            got=f"{type(model).__module__}.{type(model).__name__}",
            expected="a model class of transformers, unchanged",
            next="keep the mask on the model instead (tombola.hold, tombola.Gates), or shrink the transformers model inside it",
        )


def _refuse_shared(model: nn.Module, cut: Cut) -> None:
    """Raises: MaskError when a weight to be cut belongs to another module too: cut for one, it would be wrong for the other."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = [found for found in names.values() if len(found) > 1 and any(n.rpartition(".")[0] in cut.paths for n in found)]
    wrong = [f"{path}: {kind}" for path in sorted(cut.paths) if (kind := _kind_of(model.get_submodule(path))) is not None]
    if shared or wrong:
        raise MaskError(
            "what the mask removes cannot be cut out of this model",
            got="; ".join([*(" = ".join(found) for found in shared[:4]), *wrong[:4]]),
            expected="a weight of its own, in floating point, for each module that is cut",
            next="keep the mask on the model (tombola.load, tombola.hold): exact, and not smaller; or untie the layers first",
        )


def _kind_of(module: nn.Module) -> str | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return f"{type(module).__name__} without plain weights"
    return None


def slices(model: nn.Module, cut: Cut, values: Mapping[str, Tensor]) -> dict[int, nn.Parameter]:
    """The parameters that change, by the id of what they stand in for: cut, and zero where single values are removed."""
    stand_ins: dict[int, nn.Parameter] = {}
    parameters = dict(model.named_parameters())
    for name, part in values.items():
        weight = parameters[name]
        stand_ins[id(weight)] = _like(weight, weight.detach() * part.to(weight))

    def sliced(weight: nn.Parameter, dim: int, index: Tensor) -> nn.Parameter:
        now = stand_ins.get(id(weight), weight)
        return _like(weight, now.detach().index_select(dim, index.to(weight.device)))

    for path in sorted(cut.outputs.keys() | cut.inputs.keys()):
        module: Any = model.get_submodule(path)
        out, into = (1, 0) if hasattr(module, "nf") else (0, 1)  # GPT-2's Conv1D is [in, out]
        full: nn.Parameter = module.weight
        if path in cut.outputs:
            rows = torch.nonzero(cut.outputs[path]).flatten()
            stand_ins[id(full)] = sliced(full, out, rows)
            if module.bias is not None:
                stand_ins[id(module.bias)] = sliced(module.bias, 0, rows)
        if path in cut.inputs:
            small = sliced(full, into, cut.inputs[path])
            if path in cut.zeroed:
                with torch.no_grad():
                    zero = ~cut.zeroed[path].to(full.device)
                    small[zero if into == 0 else (slice(None), zero)] = 0.0
            stand_ins[id(full)] = small
    return stand_ins


def _build(model: nn.Module, cut: Cut, values: Mapping[str, Tensor], share: bool) -> "PreTrainedModel":
    """A copy in which cut weights are copied cut: `copy.deepcopy` is told beforehand what stands in for what."""
    stand_ins: dict[int, Any] = dict(slices(model, cut, values))
    linear: dict[str, list[int]] = {}
    for path in sorted(cut.outputs.keys() | cut.inputs.keys()):
        module: Any = model.get_submodule(path)
        shape = list(stand_ins[id(module.weight)].shape)
        linear[path] = shape if hasattr(module, "nf") else shape[::-1]
    for path, (n_out, bias) in cut.gone.items():
        module = model.get_submodule(path)
        if bias == "none":
            stub: nn.Module = Zeros(n_out)
        else:
            stub = Constant(n_out, bias == "bias")
            if bias == "bias":
                kept = stand_ins.get(id(module.bias), module.bias)
                stub.bias = _like(module.bias, kept.detach().clone())
        stub.to(module.weight.device, module.weight.dtype)
        stand_ins[id(module)] = stub.train(module.training)
    if share:
        kept = {id(one): one for one in (*model.parameters(), *model.buffers())}
        stand_ins = kept | stand_ins
    small: Any = copy.deepcopy(model, stand_ins)
    small.__dict__.pop("forward", None)  # a wrapper of Trainer or accelerate, which would go on calling the dense model
    gates = small.__dict__.pop("tombola_gates", None)
    if gates is not None:
        gates.remove()
    if not cut.paths:  # of single values alone, which leave every shape as it is
        return cast("PreTrainedModel", small)
    plan = {
        "format": FORMAT,
        "base": model.config.model_type,  # type: ignore[union-attr]
        "linear": linear,
        "gone": {path: list(one) for path, one in cut.gone.items()},
        "attention": dict(cut.attention),
    }
    family: Any = type(small.config)
    small.config.__class__ = shrunk_config(family)  # in place: its modules hold the same config
    small.config.model_type = MODEL_TYPE  # one that was read from a file has its own
    setattr(small.config, FIELD, plan)
    become_shrunk(small)
    resize(small, plan)
    return cast("PreTrainedModel", small)


def _like(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


# ------------------------------------------------------------------------------------- what single values leave of parts


def dead_parts(model: nn.Module, anatomy: Anatomy, mask: Mask) -> Mask:
    """Heads, neurons and MLPs that the single values of `mask` leave without any way to the output, as a mask: True = kept.

    A head is dead when its slice of v (with bias) is all zero, or its columns of o; a neuron when its column of `out` is, or its
    row of an `in` with bias is and the activation of zero is zero (which a probe shows); an MLP when all its neurons are and
    `out` has no bias left. Removing them is exact. One forward pass. Of MLPs that differ in width neurons are not looked at.
    """
    heads, neurons, mlps = [], [], []
    with evaluating(model), torch.no_grad(), masked(model, anatomy, Mask(values=mask.values)):
        silent = _silent_neurons(model, anatomy)

        def alive(projection: Projection) -> Tensor:
            """For each of its output channels whether a weight or the bias is left."""
            module: Any = model.get_submodule(projection.path)
            found = projection.rows(module.weight).ne(0).any(1)
            return found if module.bias is None else found | module.bias[projection.channels()].ne(0)

        def reaches(projection: Projection) -> Tensor:
            """For each of its input channels whether a weight is left."""
            return projection.rows(cast(Any, model.get_submodule(projection.path)).weight).ne(0).any(0)

        for attention in anatomy.attentions:
            of_kv = alive(attention.v).view(attention.n_kv_heads, -1).any(1)
            of_v = of_kv.repeat_interleave(attention.n_heads // attention.n_kv_heads)
            heads.append(of_v & reaches(attention.o).view(attention.n_heads, -1).any(1))
        for mlp, quiet in zip(anatomy.mlps, silent, strict=True):
            fed = torch.stack([alive(projection) for projection in mlp.ins]).all(0)
            neurons.append(reaches(mlp.out) & (fed | ~quiet.to(fed.device)))
            bias = cast(Any, model.get_submodule(mlp.out.path)).bias
            mlps.append(neurons[-1].any() | (bias is not None and bool(bias.ne(0).any())))
    found = {"heads": torch.stack(heads), "mlps": torch.stack(mlps)}
    if anatomy.d_ffn is not None:
        found["neurons"] = torch.stack(neurons)
    return Mask(**{name: part.cpu() for name, part in found.items()}, values={})


def _silent_neurons(model: nn.Module, anatomy: Anatomy) -> list[Bool[Tensor, " d_ffn"]]:
    """For each MLP, the neurons that are exactly zero at every position of a probe."""
    loudest: dict[str, Tensor] = {}

    def note(path: str, args: tuple[Tensor, ...]) -> None:
        now = args[0].flatten(0, -2).abs().amax(0)
        loudest[path] = torch.maximum(loudest[path], now) if path in loudest else now

    handles = [
        model.get_submodule(mlp.out.path).register_forward_pre_hook(lambda _, args, path=mlp.out.path: note(path, args))
        for mlp in anatomy.mlps
    ]
    try:
        model(**probe_inputs(model, batch=2))
    finally:
        for handle in handles:
            handle.remove()
    return [loudest[mlp.out.path].eq(0) for mlp in anatomy.mlps]


# ------------------------------------------------------------------------------------------------------------- parity


@dataclass(frozen=True, slots=True)
class Parity:
    """How far two models are apart on the same rows. `apart` is a share of the largest logit."""

    apart: float
    tolerance: float
    same_answers: bool  # the same argmax wherever the first model's two best logits are further apart than the tolerance
    rows: int

    @property
    def holds(self) -> bool:
        return self.apart <= self.tolerance and self.same_answers

    def __str__(self) -> str:
        answers = "the same answers" if self.same_answers else "other answers"
        return f"{self.apart:.1e} of the largest logit apart on {self.rows} rows (at most {self.tolerance:.0e}), {answers}"


# By type of the weights: a family may step down to fp32 within (norms, softmax), so that fp64 is checked like fp32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def check_rows(model: nn.Module, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Random rows of different lengths, padded at the end; images for a model of pixels. The same for the same model.

    Without a pad token, as GPT-2 comes, one row without padding: such a model takes no batches.
    """
    probe = probe_inputs(model, 1, length)
    generator = torch.Generator().manual_seed(3)
    if "pixel_values" in probe:
        noise = torch.rand((rows, *probe["pixel_values"].shape[1:]), generator=generator)
        return {"pixel_values": noise.to(probe["pixel_values"])}
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pad = getattr(text, "pad_token_id", None)
    if not isinstance(pad, int) or pad < 0:
        return probe
    device, ids = probe["input_ids"].device, probe["input_ids"][0].cpu()
    turned = torch.stack([ids.roll(i) for i in range(rows)])
    real = (torch.arange(length) < torch.tensor([length - (i * (length - 2)) // rows for i in range(rows)])[:, None]).long()
    if getattr(config, "is_encoder_decoder", False) and isinstance(text.eos_token_id, int):
        turned[turned == text.eos_token_id] = ids[0]
        turned[torch.arange(rows), real.sum(1) - 1] = (
            text.eos_token_id
        )  # such a model classifies there, and wants one in each row
    inputs = {"input_ids": torch.where(real == 1, turned, pad), "attention_mask": real}
    if "decoder_input_ids" in probe:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return {name: value.to(device) for name, value in inputs.items()}


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits, or the first tensor, of these rows in eval mode, with what is padding set to zero, in fp64 on the CPU."""
    with evaluating(model), torch.no_grad():
        found = first_tensor(model(**inputs)).double().cpu()
    real = inputs.get("attention_mask")
    return found * real.cpu()[..., None] if real is not None and found.ndim == 3 and found.shape[1] == real.shape[1] else found


def parity(expected: Tensor, found: Tensor, dtype: torch.dtype = torch.float32) -> Parity:
    """How far `found` is from `expected`, both [row, …, class]. Not finite counts as infinitely far."""
    tolerance = TOLERANCE.get(dtype, 1e-5)
    if expected.shape != found.shape or not bool(found.isfinite().all()):
        return Parity(float("inf"), tolerance, False, len(expected))
    largest = float(expected.abs().amax().clamp_min(1e-12))
    best = expected.topk(2).values if expected.shape[-1] > 1 else expected
    clear = (best[..., 0] - best[..., -1]) > 2 * tolerance * largest
    same = bool((expected.argmax(-1) == found.argmax(-1))[clear].all())
    return Parity(float((expected - found).abs().amax()) / largest, tolerance, same, len(expected))


def prove_same(dense: nn.Module, anatomy: Anatomy, mask: Mask, small: nn.Module) -> Parity:
    """How far `small` is from `dense` under `mask`, on padded rows. Raises: MaskError when that is further than rounding goes."""
    inputs = check_rows(dense)
    with masked(dense, anatomy, mask):
        expected = outputs_of(dense, inputs)
    dtype = next(dense.parameters()).dtype
    try:
        found = parity(expected, outputs_of(small, inputs), dtype)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:  # widths that do not meet may raise any
        raise _uncuttable(small, f"{type(error).__name__}: {error}") from error
    if not found.holds:
        raise _uncuttable(small, str(found))
    return found


def _uncuttable(small: nn.Module, got: str) -> MaskError:
    return MaskError(
        f"the {type(small).__name__} does not compute what the masked model computes, and was not saved",
        got=got,
        expected="the same, up to rounding",
        next="this family may compute with all heads at once (norms over q and k): cut neurons or whole MLPs, or keep the mask "
        "on the model (tombola.load)",
    )
