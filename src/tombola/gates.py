"""A mask on a live model.

Where a mask acts: a head is removed from the **input of the output projection**, so that the projection's bias stays; an
MLP is removed by its **output, bias included, before the residual**. transformers 5 has no head masking any more and
ignores `head_mask=` without a word; so gates are our own hooks, they refuse `head_mask=`, and `prove_acts` shows on a
probe that a mask does what it says.
"""

from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tombola.anatomy import Anatomy, Layout, evaluating, probe_inputs, read_anatomy, same_anatomy
from tombola.errors import MaskError
from tombola.mask import Mask
from tombola.ticket import Ticket, load_weights, locate_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gates:
    """Hooks that multiply each head and each MLP of a live model by a gate; 1 = open, 0 = removed.

    Weights are not touched: `set` switches masks at run time, `remove` gives the model back as it was. Use it as a
    context manager or keep it. `per_example` opens gates that are leaves of autograd, one per row of the batch.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy | None = None, mask: Mask | None = None) -> None:
        self.model, self.anatomy = model, anatomy or read_anatomy(model)
        self._heads: list[Tensor | None] = [None] * self.anatomy.n_layers  # None = all open, and no work done
        self._mlps: list[Tensor | None] = [None] * self.anatomy.n_layers
        self.set(self.anatomy.full_mask() if mask is None else mask)  # first: a mask that does not fit leaves no hooks
        self._handles = [model.register_forward_pre_hook(refuse_head_mask, with_kwargs=True)]
        for i, layer in enumerate(self.anatomy.layers):
            o, out = (model.get_submodule(p.path) for p in (layer.attention.o, layer.mlp.out))
            # Partial methods and no closures: a deep copy of the model then takes a copy of its gates along.
            self._handles.append(o.register_forward_pre_hook(partial(self._gate_heads, i)))
            self._handles.append(out.register_forward_hook(partial(self._gate_mlp, i)))

    def set(self, mask: Mask) -> None:
        """From now on the model runs under `mask`. Raises: MaskError when it does not fit."""
        self.anatomy.check(mask)
        self.mask = self.anatomy.full_mask() & mask
        parameter = next(self.model.parameters())
        assert self.mask.heads is not None and self.mask.mlps is not None
        heads, mlps = self.mask.heads.to(parameter), self.mask.mlps.to(parameter)
        self._heads = [None if bool(row.all()) else row for row in heads]
        self._mlps = [None if bool(gate) else gate for gate in mlps]

    def per_example(self, batch: int) -> tuple[Float[Tensor, "layer batch head"], Float[Tensor, "layer batch"]]:
        """Gates at the current mask, expanded over the batch, that require gradients.

        The gradient of a *sum* of per-row losses with respect to them is exact per row: rows never mix in a transformer.
        """
        parameter = next(self.model.parameters())
        assert self.mask.heads is not None and self.mask.mlps is not None
        heads = self.mask.heads.to(parameter)[:, None, :].repeat(1, batch, 1).requires_grad_()
        mlps = self.mask.mlps.to(parameter)[:, None].repeat(1, batch).requires_grad_()
        self._heads, self._mlps = list(heads.unbind()), list(mlps.unbind())
        return heads, mlps

    def remove(self) -> None:
        """Takes every hook off the model."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> "Gates":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.remove()

    def _gate_heads(self, i: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gate = self._heads[i]
        if gate is None:
            return None
        x = args[0].unflatten(-1, (self.anatomy.layers[i].attention.n_heads, -1))
        # [head] for one mask; [batch, head] for gates per example, with the positions in between
        gate = gate[:, None, :, None] if gate.ndim == 2 else gate[:, None]
        return ((x * gate).flatten(-2), *args[1:])

    def _gate_mlp(self, i: int, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        gate = self._mlps[i]
        if gate is None:
            return None
        return output * (gate[:, None, None] if gate.ndim == 1 else gate)


def refuse_head_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook. Raises: MaskError when `head_mask` is passed, which transformers 5 would ignore in silence."""
    if kwargs.get("head_mask") is not None:
        raise MaskError(
            "head_mask= has no effect in transformers 5: it is ignored without a warning",
            got="head_mask given",
            expected="a tombola mask",
            next="use tombola.ablate(model, layer, head), or tombola.Gates(model, mask=…)",
        )


def ablate(model: nn.Module, layer: int, head: int | None = None, *, layout: Layout | None = None) -> Gates:
    """The model without one head (or, with head=None, without the MLP of that layer), until `.remove()` or the end of `with`.

    The removal is proved to act first. Layers and heads count from 0.
    Raises: MaskError for a layer or head the model does not have, or when the removal had no effect.
    """
    anatomy = read_anatomy(model, layout)
    full = anatomy.full_mask()
    assert full.heads is not None and full.mlps is not None
    if not 0 <= layer < anatomy.n_layers or not (head is None or 0 <= head < anatomy.n_heads):
        raise MaskError(
            "there is no such part to ablate",
            got=f"layer {layer}" + ("" if head is None else f", head {head}"),
            expected=f"layer in 0…{anatomy.n_layers - 1}, head in 0…{anatomy.n_heads - 1} (or None for the MLP)",
        )
    heads, mlps = full.heads.clone(), full.mlps.clone()
    if head is None:
        mlps[layer] = False
    else:
        heads[layer, head] = False
    mask = Mask(heads=heads, mlps=mlps)
    prove_acts(model, anatomy, mask)
    return Gates(model, anatomy, mask)


def prove_acts(model: nn.Module, anatomy: Anatomy, mask: Mask) -> None:
    """Proves that `mask` removes what it says and that what it removes can be seen in the output.

    Rows of one batch are the experiments: row r feeds random values into the r-th layer's removed heads (or its removed
    MLP), just before the gate; what comes through the gate of a head meets random columns of o besides its own, which a
    held mask has made zero. Under the mask every row must equal the untouched row 0 (nothing leaks through); with the gates
    open every row must differ from it (the part is really used). Two forward passes.

    Raises: MaskError naming the layers where either fails. A mask that removes nothing is proved at once.
    """
    anatomy.check(mask)
    mask = anatomy.full_mask() & mask
    assert mask.heads is not None and mask.mlps is not None
    sites = [("heads", i) for i in range(anatomy.n_layers) if not bool(mask.heads[i].all())]
    sites += [("mlps", i) for i in range(anatomy.n_layers) if not bool(mask.mlps[i])]
    if not sites:
        return
    heads, generator = mask.heads, torch.Generator().manual_seed(2)

    def random_like(x: Tensor, *shape: int) -> Tensor:
        return (10 * x.abs().amax() + 1) * torch.randn(shape, generator=generator).to(x)

    def feed(row: int, columns: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[row, :, columns] = random_like(x, *x[row, :, columns].shape)
        return (x, *args[1:])

    def show(row: int, columns: Tensor, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        through = args[0][row, :, columns]
        output = output.clone()
        output[row] += through @ random_like(output, through.shape[-1], output.shape[-1])
        return output

    def replace(row: int, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        output[row] = random_like(output, *output.shape[1:])
        return output

    def outputs(under: Mask) -> Tensor:
        generator.manual_seed(2)
        handles = []
        for row, (unit, i) in enumerate(sites, start=1):
            o, out = (model.get_submodule(p.path) for p in (anatomy.layers[i].attention.o, anatomy.layers[i].mlp.out))
            if unit == "heads":
                columns = torch.nonzero((~heads[i]).repeat_interleave(anatomy.layers[i].attention.d_head)).flatten()
                handles.append(o.register_forward_pre_hook(partial(feed, row, columns), prepend=True))
                handles.append(o.register_forward_hook(partial(show, row, columns)))
            else:
                handles.append(out.register_forward_hook(partial(replace, row), prepend=True))
        try:
            with Gates(model, anatomy, under), torch.no_grad():
                return first_tensor(model(**probe_inputs(model, batch=len(sites) + 1))).float().flatten(1)
        finally:
            for handle in handles:
                handle.remove()

    with evaluating(model):
        masked, opened = outputs(mask), outputs(anatomy.full_mask())
    tolerance = 1e-4 * masked[0].abs().amax().clamp_min(1e-6)
    leaks = [s for s, row in zip(sites, masked[1:], strict=True) if (row - masked[0]).abs().amax() > tolerance]
    idle = [s for s, row in zip(sites, opened[1:], strict=True) if not (row - opened[0]).abs().amax() > tolerance]
    if leaks or idle:
        where = [f"{unit} of layer {i}" for unit, i in (leaks or idle)]
        raise MaskError(
            "the mask did not act" if idle else "what the mask removes still reaches the output",
            got=", ".join(where) + (" change nothing in the output" if idle else " leak"),
            expected="removed parts change the output when they are open, and never when they are removed",
            next="the model may compute around its modules (fused kernels, a compiled graph): load it anew, uncompiled",
        )


def first_tensor(output: Any) -> Tensor:
    """The logits, or else the first tensor, of a transformers output."""
    logits = getattr(output, "logits", None)
    tensors = output if isinstance(output, tuple) else output.to_tuple()
    return logits if isinstance(logits, Tensor) else next(x for x in tensors if isinstance(x, Tensor))


def hold(model: nn.Module, anatomy: Anatomy, mask: Mask) -> Gates:
    """Puts `mask` on `model` for good and returns the gates: what is removed is zero in the weights, and stays zero.

    Zero are the columns of o of a removed head, and weight and bias of a removed MLP's `out`: the saved model computes the
    same without gates. While it trains, closed gates give exactly these values a gradient of zero. q, k, v and MLP-in
    values of removed parts can no longer reach the output; they are zeroed as well, so that they cannot be taken for alive.
    """
    gates = Gates(model, anatomy, mask)
    assert gates.mask.heads is not None and gates.mask.mlps is not None
    with torch.no_grad():
        for layer, heads, mlp in zip(anatomy.layers, gates.mask.heads, gates.mask.mlps, strict=True):
            attention = layer.attention
            gone = (~heads).repeat_interleave(attention.d_head).to(next(model.parameters()).device)
            o: Any = model.get_submodule(attention.o.path)
            o.weight[:, gone] = 0.0
            if attention.n_kv_heads == attention.n_heads:
                kv_gone = gone
            else:  # a kv-head goes when all heads that read it are gone
                kv_gone = ~heads.view(attention.n_kv_heads, -1).any(1).repeat_interleave(attention.d_head)
            for projection, rows in ((attention.q, gone), (attention.k, kv_gone), (attention.v, kv_gone)):
                module: Any = model.get_submodule(projection.path)
                module.weight[rows] = 0.0
                if projection.has_bias:
                    module.bias[rows] = 0.0
            if not bool(mlp):
                for projection in (*layer.mlp.ins, layer.mlp.out):
                    for parameter in model.get_submodule(projection.path).parameters():
                        parameter.zero_()
    return gates


def load(ticket: "Ticket | Path | str", weights: str | Path = "base", *, layout: Layout | None = None) -> "PreTrainedModel":
    """An ordinary `PreTrainedModel` in eval mode with the ticket's mask held, also while it is trained further.

    weights: "base" (the pre-trained weights, with a head drawn from the ticket's seed), "found_on" (the weights the mask was
    found on), or a folder of your own. `model.tombola_gates` switches or removes the gates; `model.tombola_weights` says
    which weights it has. The mask is proved to act before the model is returned.

    Raises: FingerprintError when the weights are not those the ticket was made for; TicketError, MaskError, AnatomyError.
    """
    ticket = ticket if isinstance(ticket, Ticket) else Ticket.from_pretrained(ticket)
    place, fingerprint = locate_weights(ticket, weights)
    model = load_weights(place, ticket.labels, head_seed=ticket.seeds.get("head", 0))
    anatomy = read_anatomy(model, layout)
    differing = same_anatomy(ticket.anatomy, anatomy.summary())
    if differing:
        raise MaskError(
            f"the ticket was made for another architecture than {place}",
            got={name: anatomy.summary().get(name) for name in differing},
            expected={name: ticket.anatomy[name] for name in differing},
            next="use weights of the base it was found on",
        )
    prove_acts(model, anatomy, ticket.mask)
    model.tombola_gates = hold(model, anatomy, ticket.mask)
    model.tombola_weights = {"weights": str(weights), "folder": str(place), "fingerprint": fingerprint}
    return model
