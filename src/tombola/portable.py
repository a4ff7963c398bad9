"""A masked model as an ordinary smaller model of its family, which plain transformers loads: one width for all layers.

A config of transformers has one number of heads and one width of MLP for all layers, so the fullest layer decides; others are
filled up with parts that the mask removes, whose columns of o and `out` are zero: the result is exact, and less is gained than by
`shrink`. Layers that are removed whole, and through which everything passes unchanged, are left out.

What a family's config can say is tried out: a candidate is built, and taken when every weight fits it and it computes what the
masked model computes. Most configs of encoders (BERT's) tie the number of heads to the width of the model: there heads stay.
"""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tombola.anatomy import Anatomy, evaluating
from tombola.cut import Parity, check_rows, cut_of, outputs_of, parity, slices
from tombola.errors import MaskError
from tombola.gates import masked
from tombola.mask import Mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What configs call the numbers; one is changed where it is what the dense model has.
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
D_FFN = (
    *("intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "n_inner", "ffn_hidden_size"),
    *("encoder_ffn_dim", "decoder_ffn_dim"),
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")


def portable(model: nn.Module, anatomy: Anatomy, mask: Mask) -> "tuple[PreTrainedModel, Parity]":
    """A smaller model of the same class as `model`, equal to it under `mask`, and how equal; `model` stays as it is.

    Of all candidates (fewer layers, fewer heads, narrower MLPs) the smallest that is proved equal.
    Raises: MaskError when nothing of the mask can be said in a config of this family, or for single values.
    """
    mask = anatomy.full_mask() & mask
    if mask.values:
        raise MaskError(
            "single values have no width that a config could say",
            got=f"a mask of {len(mask.values)} parameters",
            expected="heads, MLPs, neurons or layers",
            next="ship it with --to hf (a dense file with zeros) or --to peft (the changed values alone)",
        )
    rows = check_rows(model)
    with masked(model, anatomy, mask):
        expected = outputs_of(model, rows)
        idle = _idle_layers(model, anatomy)
    zeroed = _zeroed(model, anatomy, mask)
    for heads, layers in ((True, True), (True, False), (False, True), (False, False)):
        if layers and not idle:
            continue
        stays = _uniform(anatomy, mask, heads, idle if layers else [])
        small = _candidate(zeroed, anatomy, stays, idle if layers else [])
        if small is None:
            continue
        try:
            found = parity(expected, outputs_of(small, rows), next(model.parameters()).dtype)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # widths that do not meet may raise any
            continue
        if found.holds:
            return cast("PreTrainedModel", small), found
    raise MaskError(
        f"nothing of this mask makes a plain {anatomy.model_type} smaller",
        got=", ".join(f"{kept} of {n} {part} kept" for part, (kept, n) in mask.counts().items()),
        expected="neurons removed in every layer, or heads where the config has a width of heads of its own",
        next="ship it with --to hf, which cuts each layer by itself (loads after `import tombola`, or with --with-code)",
    )


def _zeroed(model: nn.Module, anatomy: Anatomy, mask: Mask) -> nn.Module:
    """A copy in which what the mask removes is zero: whatever else stays in it then changes nothing."""
    twin = copy.deepcopy(model)
    gates = twin.__dict__.pop("tombola_gates", None)
    if gates is not None:
        gates.remove()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, kept in anatomy.as_values(mask).items():
            parameters[name][~kept.to(parameters[name].device)] = 0.0
    return twin


def _uniform(anatomy: Anatomy, mask: Mask, cut_heads: bool, without: list[int]) -> Mask:
    """What stays: in each layer as much as in the fullest of those that stay, what is kept first."""
    assert mask.heads is not None and mask.mlps is not None
    n_kv = anatomy.attentions[0].n_kv_heads
    heads = mask.heads.view(anatomy.n_attentions, n_kv, -1)
    rows = [i for i, layer in enumerate(anatomy.layer_of_attention.tolist()) if layer not in without]
    if cut_heads:
        n_groups = max(1, int(heads[rows].any(2).sum(1).max()))
        per_group = max(1, int(heads[rows].sum(2).max()))
        filled = torch.zeros_like(heads)
        for row, groups in zip(filled, heads, strict=True):
            for group in _first(groups.any(1), n_groups):
                row[group, _first(groups[group], per_group)] = True
    else:
        filled = torch.ones_like(heads)
    stays = Mask(heads=filled.flatten(1), mlps=torch.ones_like(mask.mlps))
    if anatomy.d_ffn is None:
        return stays
    neurons = torch.ones(anatomy.n_layers, anatomy.d_ffn, dtype=torch.bool) if mask.neurons is None else mask.neurons
    neurons = neurons & mask.mlps[:, None]
    most = max(1, max(int(neurons[i].sum()) for i in range(anatomy.n_layers) if i not in without))
    kept = torch.zeros_like(neurons)
    for row, of in zip(kept, neurons, strict=True):
        row[_first(of, most)] = True
    return stays & Mask(neurons=kept)


def _first(kept: Tensor, n: int) -> Tensor:
    """The positions of n entries, in order: those that are kept, then the lowest of the others."""
    order = torch.argsort((~kept).to(torch.uint8), stable=True)
    return order[:n].sort().values


def _idle_layers(model: nn.Module, anatomy: Anatomy) -> list[int]:
    """Layers whose output is their input bit for bit, on the rows of the check; never all of them."""
    seen: dict[int, bool] = {}

    def look(i: int, args: tuple[Any, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple | list) else output
        same = bool(args) and isinstance(after, Tensor) and after.shape == args[0].shape and torch.equal(after, args[0])
        seen[i] = seen.get(i, True) and same

    handles = [
        model.get_submodule(layer.path).register_forward_hook(lambda _, args, out, i=i: look(i, args, out))
        for i, layer in enumerate(anatomy.layers)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(**check_rows(model))
    finally:
        for handle in handles:
            handle.remove()
    idle = [i for i, same in seen.items() if same]
    return idle if len(idle) < anatomy.n_layers else idle[1:]


def _candidate(model: nn.Module, anatomy: Anatomy, stays: Mask, without: list[int]) -> nn.Module | None:
    """The plain smaller model, or None when its config cannot say these widths, or says nothing smaller."""
    assert stays.heads is not None
    n_kv = anatomy.attentions[0].n_kv_heads
    kept_heads, kept_groups = int(stays.heads[0].sum()), int(stays.heads[0].view(n_kv, -1).any(1).sum())
    config: Any = copy.deepcopy(model.config)
    _say(config, HEADS, anatomy.n_heads, kept_heads)
    _say(config, KV_HEADS, n_kv, kept_groups)
    if kept_heads < anatomy.n_heads and not isinstance(getattr(type(config), "head_dim", None), property):
        config.head_dim = anatomy.attentions[0].d_head  # where a config has such a number; else the shapes will not fit
    if stays.neurons is not None and anatomy.d_ffn is not None:
        _say(config, D_FFN, anatomy.d_ffn, int(stays.neurons[0].sum()))
        if getattr(config, "n_inner", 0) is None:
            config.n_inner = int(stays.neurons[0].sum())
    if without:
        _say(config, LAYERS, anatomy.n_layers, anatomy.n_layers - len(without))
        if isinstance(types := getattr(config, "layer_types", None), list):
            config.layer_types = [one for i, one in enumerate(types) if i not in without]
    cut = cut_of(model, anatomy, stays, stays)
    stand_ins = slices(model, cut, {})
    names = dict(_renamed(anatomy, without))
    state: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.state_dict().items():
        parameter = parameters.get(name)
        now = stand_ins.get(id(parameter), value) if parameter is not None else value
        block = next((path for path in names if name.startswith(path)), None)
        if block is None:
            state[name] = now.detach()
        elif names[block] is not None:
            state[f"{names[block]}{name.removeprefix(block)}"] = now.detach()
    try:
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in type(model)(config).state_dict().items()}
        if shapes != {name: value.shape for name, value in state.items()} or sum(map(_n, state.values())) >= sum(
            map(_n, model.state_dict().values())
        ):
            return None
        small = type(model)(config)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError, AttributeError):  # a config that says no
        return None
    small.to(next(model.parameters()).dtype).load_state_dict(state)
    words = getattr(model, "tombola_words", None)
    if words is not None:
        type(words)(small, words.ids)
    return small.eval()


def _n(value: Tensor) -> int:
    return value.numel()


def _say(config: Any, names: tuple[str, ...], was: int, now: int) -> None:
    for name in names:
        if getattr(config, name, None) == was:
            setattr(config, name, now)


def _renamed(anatomy: Anatomy, without: list[int]) -> Iterator[tuple[str, str | None]]:
    """Path of each layer and its path when some are left out, both with a dot at the end; None for those."""
    placed: Counter[str] = Counter()  # by list of layers: an encoder's, a decoder's
    for i, layer in enumerate(anatomy.layers):
        listed = layer.path.rpartition(".")[0]
        yield f"{layer.path}.", None if i in without else f"{listed}.{placed[listed]}."
        placed[listed] += i not in without
