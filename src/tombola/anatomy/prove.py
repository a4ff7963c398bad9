"""Numbers → proof: that each projection has the role and the slices the anatomy says, shown on the live model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tombola.anatomy.parts import MLP, Anatomy, Attention, Projection
from tombola.anatomy.probe import by_row, run_probe
from tombola.errors import AnatomyError


def prove(model: nn.Module, anatomy: Anatomy) -> None:
    """Proves, in one forward pass, that each projection has the role and the slices the anatomy says.

    The rows of one batch are the experiments; row 0 is untouched. In all rows q, k, v and MLP-in put out the same random
    numbers instead of their own: the proof is about the wiring, and stands where a mask has zeroed weights. In a q or k row
    the first channel of one (kv-)head is perturbed: of the input of o, that head's slice must move *everywhere* and nothing
    else at all. A head that is assumed too wide fails the first half, one too narrow the second. A query perturbed at one
    position moves no other, which tells q from k. In a v row exactly that one channel moves; with v set to zero, nothing is
    left. In the MLP, channel j of `in` moves channel j of `out`'s input only. Cross-attention has rows of its own, and its keys
    do not read what its queries read. After each look every row is set back to row 0, so that no layer sees the experiments of
    another. Roles that share a channel would be moved together, and are refused.

    Raises: AnatomyError naming the layer, the role and what moved, or the modules the model computes around.
    """
    first = anatomy.layers[0].attention
    n_kv, per_kv = first.n_kv_heads, first.n_heads // first.n_kv_heads
    experiments: list[tuple[str, int]] = [("none", 0)]
    for kind in dict.fromkeys(attention.kind for attention in anatomy.attentions):
        experiments += [(_role("q", kind), head) for head in range(first.n_heads)]
        experiments += [(_role(role, kind), head) for role in "kv" for head in range(n_kv)]
    experiments += [("one query", 0), ("v = 0", 0)]
    generator = torch.Generator().manual_seed(1)
    batch = len(experiments)
    inputs: dict[str, Tensor] = {}  # of q and k of cross-attention
    unseen = {attention.o.path for attention in anatomy.attentions} | {mlp.out.path for mlp in anatomy.mlps}
    handles = []

    def perturb(roles: Sequence[tuple[str, Projection, int]]) -> Any:
        """A hook on a module that holds these (role, projection, width of one slice): one, or several that are fused."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
            rows = by_row(output, batch)
            if rows is None:
                return None
            # The same for all rows, and small, so that no softmax saturates. What is perturbed moves far, at each position
            # by another length, and in both directions, so that no ReLU and no saturated head swallows it.
            changed = torch.rand(rows.shape[1:], generator=generator).to(rows).expand_as(rows).clone()
            for role, projection, width in roles:
                channels = projection.channels()
                for row, (of, index) in enumerate(experiments):
                    if of == role:
                        noise = 10 + 40 * torch.rand(rows.shape[1], generator=generator)
                        noise[1::2] *= -1
                        changed[row, :, channels[index * width % len(channels)]] += noise.to(rows)  # an MLP may be that narrow
                if role in ("q", "cross q"):
                    changed[-2, 0, channels] += 5
                if role in ("v", "cross v"):
                    changed[-1, :, channels] = 0
            return changed.reshape(output.shape)

        return hook

    def look_at_heads(where: str, attention: Attention) -> Any:
        d = attention.d_head

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            unseen.discard(attention.o.path)
            x = _rows(args[0], batch, attention.o)
            moved = _moved(x)
            for row, (role, head) in enumerate(experiments[1:-2], start=1):
                expected = torch.zeros_like(moved[row])  # of what belongs to the layer's other attention nothing may be seen
                if role == _role("q", attention.kind):
                    expected[head * d : (head + 1) * d] = True
                elif role == _role("k", attention.kind):
                    expected[head * per_kv * d : (head + 1) * per_kv * d] = True
                elif role == _role("v", attention.kind):
                    expected.view(-1, d)[head * per_kv : (head + 1) * per_kv, 0] = True
                _expect(where, role, head, moved[row], expected)
            if bool(_moved(x[:, 1:])[-2].any()):
                raise AnatomyError(
                    f"{where}: {attention.q.path} is not the query projection",
                    got="perturbed at one position, it moves others",
                    expected="a query decides its own position only",
                    next="pass a layout by hand",
                )
            if bool(x[-1].any()):
                raise AnatomyError(
                    f"{where}: {attention.v.path} is not the value projection",
                    got="o still has an input when v is zero",
                    expected="the input of o is a mixture of v only",
                    next="pass a layout by hand",
                )
            return (x[:1].expand_as(x).reshape(args[0].shape).contiguous(), *args[1:])

        return hook

    def look_at_neurons(where: str, mlp: MLP) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            unseen.discard(mlp.out.path)
            x = _rows(args[0], batch, mlp.out)
            moved = _moved(x)
            for row in [row for row, (role, _) in enumerate(experiments) if role == "q"]:
                expected = torch.zeros_like(moved[row])
                neuron = experiments[row][1] % mlp.d_ffn
                expected[neuron] = True
                _expect(where, "mlp in", neuron, moved[row], expected)
            return (x[:1].expand_as(x).reshape(args[0].shape).contiguous(), *args[1:])

        return hook

    modules: dict[str, list[tuple[str, Projection, int]]] = {}
    for attention in anatomy.attentions:
        for role, projection in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            modules.setdefault(projection.path, []).append((_role(role, attention.kind), projection, attention.d_head))
    for mlp in anatomy.mlps:
        *gates, last = mlp.ins
        # The q rows double as the rows of the MLP experiment: o has set them back to row 0 by then.
        for role, projection in (*(("gate", gate) for gate in gates), ("q", last)):
            modules.setdefault(projection.path, []).append((role, projection, 1))
    handles += [model.get_submodule(path).register_forward_hook(perturb(roles)) for path, roles in modules.items()]
    # Before every other hook: what gates on a live model close is there all the same.
    looks = [(one.o, look_at_heads(layer.path, one)) for layer in anatomy.layers for one in layer.attentions]
    looks += [(layer.mlp.out, look_at_neurons(layer.path, layer.mlp)) for layer in anatomy.layers]
    for projection, look in looks:
        handles.append(model.get_submodule(projection.path).register_forward_pre_hook(look, prepend=True))
    for cross in (layer.cross for layer in anatomy.layers if layer.cross is not None):
        for path in (cross.q.path, cross.k.path):
            handles.append(model.get_submodule(path).register_forward_pre_hook(partial(_note, inputs, path)))
    try:
        run_probe(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for layer in anatomy.layers:
        if layer.cross is not None and inputs.get(layer.cross.q.path) is inputs.get(layer.cross.k.path, ...):
            raise AnatomyError(
                f"{layer.path}: {layer.cross.k.path} is not of cross-attention",
                got="it reads what the queries read",
                expected="keys of an encoder",
                next="pass a layout by hand",
            )
    if unseen:
        raise AnatomyError(
            "the model does not run all modules of its anatomy",
            got=f"never called: {', '.join(sorted(unseen))}",
            expected="a forward pass through each",
            next="load the model anew, uncompiled and without fused kernels, or pass another layout",
        )
    _each_has_one_role(anatomy)


def _role(role: str, kind: str) -> str:
    """What the experiments on a projection are called: those of self- and of cross-attention have rows of their own."""
    return role if kind == "self" else f"cross {role}"


def _note(inputs: dict[str, Tensor], path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs[path] = args[0]


def _each_has_one_role(anatomy: Anatomy) -> None:
    """Raises: AnatomyError when two roles share a channel: each would be moved with the other, and both seem to be proved."""
    taken: dict[str, list[tuple[str, Tensor]]] = {}
    for layer in anatomy.layers:
        roles = [(role, one) for role, one in zip("qkvo", layer.attention.projections, strict=True)]
        if layer.cross is not None:
            roles += [(f"cross {role}", one) for role, one in zip("qkvo", layer.cross.projections, strict=True)]
        roles += [*(("mlp in", one) for one in layer.mlp.ins), ("mlp out", layer.mlp.out)]
        for role, projection in roles:
            channels, others = projection.channels(), taken.setdefault(projection.path, [])
            twice = next((other for other, theirs in others if bool(torch.isin(channels, theirs).any())), None)
            if twice is not None:
                raise AnatomyError(
                    f"{layer.path}: {projection.path} is given two roles",
                    got=f"{twice} and {role}",
                    expected="output channels of its own for each role",
                    next="pass a layout by hand",
                )
            others.append((role, channels))


def _rows(x: Tensor, batch: int, of: Projection) -> Tensor:
    rows = by_row(x, batch)
    if rows is None:
        raise AnatomyError(
            f"{of.path} does not see the rows of the batch",
            got=f"an input of shape {tuple(x.shape)}",
            expected=f"[{batch}, position, {of.n_in}]",
            next="pass a layout by hand",
        )
    return rows


def _moved(x: Tensor) -> Tensor:
    """[row, channel] bool: whether the channel differs from row 0 at any position, beyond rounding."""
    tolerance = 64 * torch.finfo(x.dtype).eps * x[0].abs().amax()
    return ((x - x[:1]).abs() > tolerance).any(1)


def _expect(where: str, role: str, index: int, moved: Tensor, expected: Tensor) -> None:
    if not torch.equal(moved, expected):
        channels = torch.nonzero(moved).flatten().tolist()
        wanted = torch.nonzero(expected).flatten().tolist()
        raise AnatomyError(
            f"{where}: perturbing {role} {index} did not move what it should",
            got=f"{len(channels)} channels {_span(channels)}",
            expected=f"{len(wanted)} channels {_span(wanted)}",
            next="check the number of heads in the config, or pass a layout by hand",
        )


def _span(channels: Sequence[int]) -> str:
    return f"{channels[0]}…{channels[-1]}" if channels else "(none)"
