"""Structure → anatomy: which module is what, told by one traced forward pass, or by hand; the proof decides.

Order of reading: `read_anatomy`, `_trace`, the table `PATTERNS`, `_layer`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tombola.anatomy.parts import MLP, Anatomy, Attention, Layer, Layout, Projection
from tombola.anatomy.probe import by_row, evaluating, run_probe
from tombola.anatomy.prove import prove
from tombola.errors import AnatomyError

KEY_FIRST = "k, v, q"  # the order in which ViT calls its projections in the first releases of transformers 5
TRACED = 2  # rows of the traced pass: enough to tell a batch from a table of positions


@dataclass(frozen=True, slots=True)
class _Call:
    """A projection as it ran: of a module that runs several times (ALBERT), the first."""

    path: str
    source: Tensor  # its input: "same input" is "same object"


@dataclass(frozen=True, slots=True)
class _Roles:
    """Paths of one layer: attention is (q, k, v, o), or (qkv, o) where they are fused."""

    attention: tuple[str, ...]
    ins: tuple[str, ...]
    out: str
    cross: tuple[str, ...] | None = None
    fused: str | None = None  # "concat" | "grouped" when known


# How many consecutive projections read one input, over a layer → the roles these have. A gated MLP has two ins.
PATTERNS: dict[tuple[int, ...], tuple[int, int, int]] = {  # → projections of attention, of cross-attention, MLP ins
    (3, 1, 1, 1): (4, 0, 1),
    (3, 1, 2, 1): (4, 0, 2),
    (1, 1, 1, 1): (2, 0, 1),
    (1, 1, 2, 1): (2, 0, 2),
    (3, 1, 1, 2, 1, 1, 1): (4, 4, 1),
    (3, 1, 1, 2, 1, 2, 1): (4, 4, 2),
}


def read_anatomy(model: nn.Module, layout: Layout | Sequence[Layout] | None = None) -> Anatomy:
    """The anatomy of `model`, found by structure (or taken from `layout`) and proved numerically.

    Costs two forward passes of a short batch (one with a layout; one more where q, k and v are fused, or run, in an order that
    the first guess missed); weights, modes and hooks of the model, and the caller's random state, are left as they were. The
    model may be under gates, and may hold a mask.
    Raises: AnatomyError saying what was looked for, what was found, and how to pass a layout by hand.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and torch.finfo(p.dtype).bits < 32}
    if kinds:
        raise AnatomyError(
            f"the structure of this {type(model).__name__} cannot be proved in half precision",
            got=", ".join(map(str, kinds)),
            expected="torch.float32 or torch.float64, in which small movements can be told from rounding",
            next="read the anatomy of the model in float32, and pass it on: tombola.Gates(model, anatomy)",
        )
    with evaluating(model):
        if layout is None:
            roles = _by_structure(model)
        else:
            layouts = [layout] if isinstance(layout, Layout) else layout
            roles = {path: one for each in layouts for path, one in _by_hand(model, each)}
        if not roles:
            raise AnatomyError("there is no layer to read", got=layout, expected="a layout for each list of layers, or None")
        refused: AnatomyError | None = None
        for order in _orders(roles, by_hand=layout is not None):
            try:
                layers = tuple(_layer(model, path, _ordered(role, order), role.fused or order) for path, role in roles.items())
                anatomy = _whole(model, layers)
                prove(model, anatomy)
            except AnatomyError as error:
                refused = refused or error
            else:
                return anatomy
    assert refused is not None
    raise refused


def _orders(roles: dict[str, _Roles], *, by_hand: bool) -> Sequence[str]:
    """In which order fused projections may lie, or others may have run, likely ones first; the proof decides."""
    fused = [role.attention[0] for role in roles.values() if len(role.attention) == 2 and role.fused is None]
    if not fused:
        return ("concat",) if by_hand else ("concat", KEY_FIRST)
    return ("grouped", "concat") if "query_key_value" in fused[0] else ("concat", "grouped")


def _ordered(role: _Roles, order: str) -> _Roles:
    """The roles of a layer whose projections ran in this order."""
    if order != KEY_FIRST or len(role.attention) != 4:
        return role
    k, v, q, o = role.attention
    return replace(role, attention=(q, k, v, o))


def _whole(model: nn.Module, layers: tuple[Layer, ...]) -> Anatomy:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    anatomy = Anatomy(getattr(model.config, "model_type", type(model).__name__), layers, shapes)
    for what in ("n_heads", "n_kv_heads"):
        found = [getattr(attention, what) for attention in anatomy.attentions]
        if len(set(found)) > 1:
            raise AnatomyError(f"layers have different numbers of {what.removeprefix('n_').replace('_', '-')}", got=found)
    return anatomy


def _by_structure(model: nn.Module) -> dict[str, _Roles]:
    blocks = _repeated_blocks(model)
    if not blocks:
        raise _unreadable(model, "a list of repeated blocks with linear projections", [n for n, _ in model.named_children()])
    return {block: _roles(model, block, calls) for block, calls in _trace(model, blocks).items()}


def _trace(model: nn.Module, blocks: list[str]) -> dict[str, list[_Call]]:
    """The projections of each block in the order in which they first ran on the rows of the batch."""
    calls: dict[str, list[_Call]] = {}

    def record(block: str, path: str, args: tuple[Any, ...]) -> None:
        known = calls.setdefault(block, [])
        # The inputs are kept alive until the pass is over: identity tells "same input", and ids are reused.
        if by_row(args[0], TRACED) is not None and all(call.path != path for call in known):
            known.append(_Call(path, args[0]))

    handles = [
        module.register_forward_pre_hook(lambda _, args, block=block, path=f"{block}.{path}": record(block, path, args))
        for block in blocks
        for path, module in model.get_submodule(block).named_modules()
        if _is_projection(module)
    ]
    try:
        run_probe(model, batch=TRACED)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _roles(model: nn.Module, block: str, calls: Sequence[_Call]) -> _Roles:
    """Roles from the order of calls and from who reads the same input, by `PATTERNS`."""
    names = [call.path for call in calls]
    runs = tuple(len(list(run)) for _, run in groupby(calls, key=lambda call: id(call.source)))
    if runs not in PATTERNS:
        looked_for = (
            f"{block}: q, k and v of one input (or one fused projection), then o; in a decoder behind an encoder the same "
            "again for cross-attention; then MLP in (one, or two when gated), MLP out"
        )
        raise _unreadable(model, looked_for, names)
    of_attention, of_cross, _ = PATTERNS[runs]
    attention, rest = names[:of_attention], names[of_attention:]
    cross, (*ins, out) = rest[:of_cross], rest[of_cross:]
    return _Roles(tuple(attention), tuple(ins), out, tuple(cross) or None)


def _by_hand(model: nn.Module, layout: Layout) -> Iterator[tuple[str, _Roles]]:
    found = dict(model.named_modules())
    listed = found.get(layout.layers)
    blocks = [f"{layout.layers}.{i}" for i in range(len(listed))] if isinstance(listed, nn.ModuleList) else []
    attention = [layout.qkv, layout.o] if layout.qkv else [layout.q, layout.k, layout.v, layout.o]
    cross = [layout.cross_q, layout.cross_k, layout.cross_v, layout.cross_o]
    wanted = [*attention, *(cross if any(cross) else ()), *layout.mlp_in, layout.mlp_out]
    paths = [f"{block}.{part}" for block in blocks for part in wanted]
    missing = [layout.layers] if not blocks else [path for path in paths if not _is_projection(found.get(path))]
    if missing:
        raise AnatomyError(
            "the layout names modules that this model does not have, or not as a list of layers with linear projections",
            got=missing[:6],
            expected=[name for name in found if name][:12],
            next="compare with `model.named_modules()`",
        )
    for block in blocks:
        yield (
            block,
            _Roles(
                attention=tuple(f"{block}.{part}" for part in attention),
                ins=tuple(f"{block}.{part}" for part in layout.mlp_in),
                out=f"{block}.{layout.mlp_out}",
                cross=tuple(f"{block}.{part}" for part in cross) if any(cross) else None,
                fused=layout.fused,
            ),
        )


def _layer(model: nn.Module, path: str, role: _Roles, fused: str) -> Layer:
    attention = _attention(model, path, role.attention, fused, "self")
    cross = None if role.cross is None else _attention(model, path, role.cross, fused, "cross")
    out = _projection(model, role.out)
    ins = tuple(_projection(model, name) for name in role.ins)
    if len(ins) == 1 and ins[0].n_out == 2 * out.n_in:  # gate and up in one module, one after the other
        ins = tuple(_slice(ins[0], out.n_in, start=i * out.n_in) for i in (0, 1))
    if not (ins and out.n_out == attention.o.n_out and all(part.n_out == out.n_in for part in ins)):
        raise _misfit(path, (*ins, out), "MLP in as wide as the input of MLP out, which is as wide as o")
    return Layer(path, attention, MLP(ins, out, out.n_in), cross)


def _attention(model: nn.Module, path: str, names: tuple[str, ...], fused: str, kind: Any) -> Attention:
    o = _projection(model, names[-1])
    n_heads = _n_heads(model, path)
    if n_heads is None or o.n_in % n_heads:
        raise AnatomyError(
            f"{o.path}: its input does not divide into heads",
            got=f"{o.n_in} channels, {n_heads} heads",
            expected="a multiple of config.num_attention_heads",
            next="check the number of heads in the config, or pass a layout by hand",
        )
    d_head = o.n_in // n_heads
    if len(names) == 2:
        q, k, v = _fused(_projection(model, names[0]), n_heads, d_head, fused)
    else:
        q, k, v = (_projection(model, name) for name in names[:3])
    if not (q.n_out == o.n_in and k.n_out == v.n_out and k.n_out % d_head == 0 and k.n_out and q.n_out % k.n_out == 0):
        raise _misfit(path, (q, k, v, o), "q as wide as the input of o, k and v a whole share of it in heads")
    return Attention(q, k, v, o, n_heads, k.n_out // d_head, d_head, kind)


def _fused(whole: Projection, n_heads: int, d_head: int, order: str) -> tuple[Projection, Projection, Projection]:
    """q, k and v of one module: "concat" (q, then k, then v), or "grouped" (the heads of a group, their k, their v, …)."""
    n_kv, rest = divmod(whole.n_out - n_heads * d_head, 2 * d_head)
    if rest or n_kv < 1 or n_heads % n_kv:
        raise AnatomyError(
            f"{whole.path}: it does not divide into q, k and v",
            got=f"{whole.n_out} channels",
            expected=f"{n_heads} heads of {d_head}, and k and v for a number of heads that divides {n_heads}",
        )
    wide, narrow = n_heads * d_head, n_kv * d_head
    if order == "concat":
        return _slice(whole, wide), _slice(whole, narrow, wide), _slice(whole, narrow, wide + narrow)
    per = n_heads // n_kv
    stride = (per + 2) * d_head
    return (
        _slice(whole, wide, 0, per * d_head, stride),
        _slice(whole, narrow, per * d_head, d_head, stride),
        _slice(whole, narrow, (per + 1) * d_head, d_head, stride),
    )


def _slice(whole: Projection, n_out: int, start: int = 0, block: int = 0, stride: int = 0) -> Projection:
    return Projection(whole.path, whole.n_in, n_out, whole.has_bias, whole.transposed, start, block, stride)


def _n_heads(model: nn.Module, path: str) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("decoder_attention_heads", "num_attention_heads") if "decoder" in path else ("num_attention_heads",)
    found = (getattr(one, name, None) for name in (*names, "encoder_attention_heads") for one in (config, text))
    return next((n for n in found if isinstance(n, int) and n > 0), None)


def _repeated_blocks(model: nn.Module) -> list[str]:
    """Paths of the items of every outermost list of modules that hold at least four projections each."""
    blocks: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(block + ".") for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside:
            items = [sum(map(_is_projection, item.modules())) for item in module]
            if items and min(items) >= 4:
                blocks += [f"{path}.{i}" for i in range(len(module))]
    return blocks


def _is_projection(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _projection(model: nn.Module, path: str) -> Projection:
    module: Any = model.get_submodule(path)
    has_bias = getattr(module, "bias", None) is not None
    if _is_conv1d(module):
        return Projection(path, module.nx, module.nf, has_bias, transposed=True)
    return Projection(path, module.in_features, module.out_features, has_bias)


def _misfit(path: str, parts: Sequence[Projection], expected: str) -> AnatomyError:
    return AnatomyError(
        f"{path}: the widths of its projections do not fit together",
        got=", ".join(f"{part.path} {part.n_in} → {part.n_out}" for part in parts),
        expected=expected,
        next="check the number of heads in the config, or pass a layout by hand",
    )


def _unreadable(model: nn.Module, looked_for: str, found: Sequence[object]) -> AnatomyError:
    return AnatomyError(
        f"the structure of this {type(model).__name__} could not be read",
        got=f"{list(found)[:12]}",
        expected=looked_for,
        next="pass layout=tombola.Layout(layers=…, q=…, k=…, v=…, o=…, mlp_in=(…,), mlp_out=…), or the same as YAML "
        "(tombola inspect --layout FILE); it is proved like any other",
    )
