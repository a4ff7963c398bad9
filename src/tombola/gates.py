"""A mask on a live model.

Where a mask acts: a head is removed from the **input of the output projection**, so that the projection's bias stays; an
MLP is removed by its **output, bias included, before the residual**; a neuron of an MLP from the **input of the MLP's out
projection**, whose bias stays. transformers 5 has no head masking any more and ignores `head_mask=` without a word; so gates
are our own hooks, they refuse `head_mask=`, and `prove_acts` shows on a probe that a mask does what it says.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tombola.anatomy import Anatomy, Layout, by_row, evaluating, probe_inputs, read_anatomy, same_anatomy
from tombola.errors import MaskError, TicketError
from tombola.held import HeldValues
from tombola.lesion import LESIONS, add_noise
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.ticket import Ticket, locate_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Gates:
    """Hooks that multiply each head, each MLP and each neuron of a live model by a gate; 1 = open, 0 = removed.

    Weights are not touched: `set` switches masks at run time, `remove` gives the model back as it was. Use it as a
    context manager or keep it. `per_example` opens gates that are leaves of autograd, one per row of the batch.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy | None = None, mask: Mask | None = None) -> None:
        self.model, self.anatomy = model, anatomy or read_anatomy(model)
        self._heads: list[Tensor | None] = [None] * self.anatomy.n_attentions  # None = all open, and no work done
        self._mlps: list[Tensor | None] = [None] * self.anatomy.n_layers
        self._neurons: list[Tensor | None] = [None] * self.anatomy.n_layers
        self.set(self.anatomy.full_mask() if mask is None else mask)  # first: a mask that does not fit leaves no hooks
        self.held: HeldValues | None = None  # single values that `hold` keeps at zero beside what is gated
        self._handles = [model.register_forward_pre_hook(refuse_head_mask, with_kwargs=True)]
        # Partial methods and no closures: a deep copy of the model then takes a copy of its gates along.
        for i, attention in enumerate(self.anatomy.attentions):
            o = model.get_submodule(attention.o.path)
            self._handles.append(o.register_forward_pre_hook(partial(self._gate_heads, i)))
        for i, mlp in enumerate(self.anatomy.mlps):
            out = model.get_submodule(mlp.out.path)
            self._handles.append(out.register_forward_pre_hook(partial(self._gate_neurons, i)))
            self._handles.append(out.register_forward_hook(partial(self._gate_mlp, i)))

    def set(self, mask: Mask) -> None:
        """From now on the model runs under `mask`. Raises: MaskError when it does not fit, or has single values: see `masked`."""
        self.anatomy.check(mask)
        if mask.values:
            raise MaskError(
                "gates open and close heads, MLPs and neurons; single values have none",
                got=f"a mask of {len(mask.values)} parameters",
                expected="heads, mlps and neurons",
                next="use tombola.masked(model, anatomy, mask), or tombola.load to hold a ticket's mask for good",
            )
        self.mask = self.anatomy.full_mask() & mask
        parameter = next(self.model.parameters())
        assert self.mask.heads is not None and self.mask.mlps is not None
        heads, mlps = self.mask.heads.to(parameter), self.mask.mlps.to(parameter)
        self._heads = [None if bool(row.all()) else row for row in heads]
        self._mlps = [None if bool(gate) else gate for gate in mlps]
        neurons = [None] * self.anatomy.n_layers if self.mask.neurons is None else self.mask.neurons.to(parameter)
        self._neurons = [None if row is None or bool(row.all()) else row for row in neurons]

    def per_example(self, batch: int) -> tuple[Float[Tensor, "attention batch head"], Float[Tensor, "layer batch"]]:
        """Gates of heads and MLPs at the current mask, expanded over the batch, that require gradients.

        The gradient of a *sum* of per-row losses with respect to them is exact per row: rows never mix in a transformer.
        """
        parameter = next(self.model.parameters())
        assert self.mask.heads is not None and self.mask.mlps is not None
        heads = self.mask.heads.to(parameter)[:, None, :].repeat(1, batch, 1).requires_grad_()
        mlps = self.mask.mlps.to(parameter)[:, None].repeat(1, batch).requires_grad_()
        self._heads, self._mlps = list(heads.unbind()), list(mlps.unbind())
        return heads, mlps

    def neurons_per_example(self, batch: int) -> Float[Tensor, "layer batch d_ffn"]:
        """As `per_example`, of neurons. Apart from it, because a backward pass that needs them keeps the inside of every MLP.

        Raises: MaskError for a model whose MLPs differ in width.
        """
        mask = (self.anatomy.full_mask("neurons") & self.mask).neurons
        assert mask is not None
        neurons = mask.to(next(self.model.parameters()))[:, None, :].repeat(1, batch, 1).requires_grad_()
        self._neurons = list(neurons.unbind())
        return neurons

    def zero(self) -> None:
        """Sets what the mask removes to zero in the weights, for good."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, kept in self.anatomy.as_values(self.mask).items():
                parameters[name][~kept.to(parameters[name].device)] = 0.0

    @property
    def attached(self) -> bool:
        """Whether its hooks are on the model: until `remove`."""
        return bool(self._handles)

    def remove(self) -> None:
        """Takes every hook off the model."""
        while self._handles:
            self._handles.pop().remove()
        if self.held is not None:
            self.held.remove()

    def __enter__(self) -> "Gates":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.remove()

    def _gate_heads(self, i: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gate = self._heads[i]
        if gate is None:
            return None
        gate = gate.to(args[0])  # the model may have moved, or be in half precision by now
        x = args[0].unflatten(-1, (self.anatomy.n_heads, -1))
        # [head] for one mask; [batch, head] for gates per example, with the positions in between
        gate = gate[:, None, :, None] if gate.ndim == 2 else gate[:, None]
        return ((x * gate).flatten(-2), *args[1:])

    def _gate_neurons(self, i: int, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gate = self._neurons[i]
        if gate is None:
            return None
        gate = gate.to(args[0])
        if gate.ndim == 1:
            return (args[0] * gate, *args[1:])
        rows = by_row(args[0], len(gate))
        assert rows is not None
        return ((rows * gate[:, None]).reshape(args[0].shape), *args[1:])

    def _gate_mlp(self, i: int, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
        gate = self._mlps[i]
        if gate is None:
            return None
        gate = gate.to(output)
        if gate.ndim == 0:
            return output * gate
        rows = by_row(output, len(gate))  # [batch, position, channel], also where a model flattens the first two
        assert rows is not None
        return (rows * gate[:, None, None]).reshape(output.shape)


def refuse_head_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook. Raises: MaskError when `head_mask` is passed, which transformers 5 would ignore in silence."""
    if kwargs.get("head_mask") is not None:
        raise MaskError(
            "head_mask= has no effect in transformers 5: it is ignored without a warning",
            got="head_mask given",
            expected="a tombola mask",
            next="use tombola.ablate(model, layer, head), or tombola.Gates(model, mask=…)",
        )


def ablate(
    model: nn.Module, layer: int, head: int | None = None, *, neuron: int | None = None, layout: Layout | None = None
) -> Gates:
    """The model without one head, one neuron of an MLP, or else the MLP of that layer, until `.remove()` or the end of `with`.

    The removal is proved to act first. Layers, heads and neurons count from 0; of heads, a layer is a row of a mask's `heads`.
    Raises: MaskError for a part the model does not have, for a head and a neuron at once, or when the removal had no effect.
    """
    anatomy = read_anatomy(model, layout)
    unit, index = ("mlps", 0) if head is neuron is None else ("heads", head) if neuron is None else ("neurons", neuron)
    full = anatomy.full_mask(unit)
    kept = full.parts()[unit].clone()
    rows, width = kept.shape if kept.ndim == 2 else (len(kept), 1)
    if None not in (head, neuron) or index is None or not (0 <= layer < rows and 0 <= index < width):
        asked = [f"{name} {at}" for name, at in (("layer", layer), ("head", head), ("neuron", neuron)) if at is not None]
        raise MaskError(
            "there is no such part to ablate",
            got=", ".join(asked),
            expected=f"layer in 0…{rows - 1}, head in 0…{anatomy.n_heads - 1} (or None for the MLP)"
            if neuron is None
            else f"layer in 0…{rows - 1}, neuron in 0…{width - 1}, without a head",
        )
    kept[layer if unit == "mlps" else (layer, index)] = False
    mask = Mask(**{unit: kept}, values={})
    prove_acts(model, anatomy, mask)
    return Gates(model, anatomy, mask)


def prove_acts(model: nn.Module, anatomy: Anatomy, mask: Mask) -> None:
    """Proves that `mask` removes what it says and that what it removes can be seen in the output.

    Rows of one batch are the experiments: row r feeds random values into the r-th layer's removed heads or neurons (or its
    removed MLP), just before the gate; what comes through the gate of a head or neuron meets random columns of the projection
    besides its own, which a held mask has made zero. Under the mask every row must equal the untouched row 0 (nothing leaks
    through); with the gates open every row must differ from it (the part is really used). Two forward passes.

    Single values are proved beside them, see `_prove_values_act`.

    Raises: MaskError naming the layers where either fails. A mask that removes nothing is proved at once.
    """
    anatomy.check(mask)
    if mask.values:
        _prove_values_act(model, mask)
    mask = anatomy.full_mask() & mask.structured()
    sites = _sites(anatomy, mask)
    if not sites:
        return
    batch, generator = len(sites) + 1, torch.Generator().manual_seed(2)

    def random_like(x: Tensor, *shape: int) -> Tensor:
        return (10 * x.abs().amax() + 1) * torch.randn(shape, generator=generator).to(x)

    def rows_of(x: Tensor) -> Tensor:
        rows = by_row(x, batch)  # a view, of what a model flattens too
        assert rows is not None
        return rows

    def feed(row: int, columns: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        rows = rows_of(x)
        rows[row, :, columns] = random_like(x, *rows[row, :, columns].shape)
        return (x, *args[1:])

    def show(row: int, columns: Tensor, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        through = rows_of(args[0])[row, :, columns]
        output = output.clone()
        rows_of(output)[row] += through @ random_like(output, through.shape[-1], output.shape[-1])
        return output

    def replace(row: int, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output.clone()
        rows_of(output)[row] = random_like(output, *rows_of(output).shape[1:])
        return output

    def outputs(under: Mask) -> Tensor:
        generator.manual_seed(2)
        handles = []
        for row, (_, _, path, columns) in enumerate(sites, start=1):
            module = model.get_submodule(path)
            if columns is None:
                handles.append(module.register_forward_hook(partial(replace, row), prepend=True))
            else:
                handles.append(module.register_forward_pre_hook(partial(feed, row, columns), prepend=True))
                handles.append(module.register_forward_hook(partial(show, row, columns)))
        try:
            with Gates(model, anatomy, under), torch.no_grad():
                return first_tensor(model(**probe_inputs(model, batch))).float().flatten(1)
        finally:
            for handle in handles:
                handle.remove()

    with evaluating(model):
        masked, opened = outputs(mask), outputs(anatomy.full_mask())
    tolerance = 1e-4 * masked[0].abs().amax().clamp_min(1e-6)
    leaks = [s for s, row in zip(sites, masked[1:], strict=True) if (row - masked[0]).abs().amax() > tolerance]
    idle = [s for s, row in zip(sites, opened[1:], strict=True) if not (row - opened[0]).abs().amax() > tolerance]
    if leaks or idle:
        where = [f"{unit} of layer {i}" for unit, i, *_ in (leaks or idle)]
        raise MaskError(
            "the mask did not act" if idle else "what the mask removes still reaches the output",
            got=", ".join(where) + (" change nothing in the output" if idle else " leak"),
            expected="removed parts change the output when they are open, and never when they are removed",
            next="the model may compute around its modules (fused kernels, a compiled graph): load it anew, uncompiled",
        )


def _sites(anatomy: Anatomy, mask: Mask) -> list[tuple[str, int, str, Tensor | None]]:
    """Where a mask removes something: unit, row of the mask, the module, and which columns of its input; None = its output."""
    assert mask.heads is not None and mask.mlps is not None
    sites: list[tuple[str, int, str, Tensor | None]] = []
    for i, (attention, heads) in enumerate(zip(anatomy.attentions, mask.heads, strict=True)):
        columns = torch.nonzero((~heads).repeat_interleave(attention.d_head)).flatten()
        sites += [("heads", i, attention.o.path, columns)] if len(columns) else []
    for i, mlp in enumerate(anatomy.mlps):
        if not bool(mask.mlps[i]):
            sites.append(("mlps", i, mlp.out.path, None))
        elif mask.neurons is not None and not bool(mask.neurons[i].all()):  # those of a removed MLP cannot be seen
            sites.append(("neurons", i, mlp.out.path, torch.nonzero(~mask.neurons[i]).flatten()))
    return sites


def first_tensor(output: Any) -> Tensor:
    """The logits, or else the first tensor, of a transformers output."""
    logits = getattr(output, "logits", None)
    tensors = output if isinstance(output, tuple) else output.to_tuple()
    return logits if isinstance(logits, Tensor) else next(x for x in tensors if isinstance(x, Tensor))


FILLED = 256  # removed values of a parameter that a proof fills


def _prove_values_act(model: nn.Module, mask: Mask) -> None:
    """Every parameter that loses values is read by the model, and filling them with random numbers moves the output.

    One forward pass for the first, two for the second (two more, of a copy in fp64, where they do not decide). Of each parameter
    at most `FILLED` removed values are filled, and they alone are copied: the proof takes no memory to speak of. Weights are
    given back bit for bit.
    Raises: MaskError. A mask of key biases alone is refused too: a bias of all keys moves no softmax.
    """
    parameters = dict(model.named_parameters())
    unread = getattr(model, "tombola_idle", ())  # of a pooler that is there for the mask's sake, see `load_weights`
    losing = {name: part for name, part in mask.values.items() if not bool(part.all()) and name not in unread}
    if not losing:
        return
    probe, wanted = probe_inputs(model, batch=2), [p for p in model.parameters() if p.requires_grad]
    with evaluating(model), torch.enable_grad():
        model.requires_grad_(False)
        try:
            for name in losing:
                parameters[name].requires_grad_(True)
            read = _reached(first_tensor(model(**probe)))
        finally:
            model.requires_grad_(False)
            for parameter in wanted:
                parameter.requires_grad_(True)
    idle = [name for name in losing if id(parameters[name]) not in read]
    # Rounding alone moves the output by 1e-6 of it. What moves it no further is asked again where rounding is 1e-15, of a
    # copy: a bias of all keys still does nothing there, and a single weight of the last layer does.
    if idle or not (_moves(model, losing, 1e-4) or _moves(copy.deepcopy(model).double(), losing, 1e-10)):
        raise MaskError(
            "the mask did not act",
            got=f"the model never reads {', '.join(idle[:6])}" if idle else "what it removes does not move the output",
            expected="removed values that the output depends on",
            next="choose another scope: the pooler of a model whose head does not read it, or key biases alone, do nothing",
        )


def _reached(output: Tensor) -> set[int]:
    """Identities of the leaves that require gradients and that `output` was computed from; nothing is differentiated."""
    found, seen, ahead = set[int](), set[Any](), [output.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        ahead += [after for after, _ in node.next_functions]
    return found


def _moves(model: nn.Module, losing: Mapping[str, Tensor], tolerance: float) -> bool:
    """Whether random numbers in place of removed values move the output, by more than `tolerance` of its largest entry."""
    parameters, generator, outputs = dict(model.named_parameters()), torch.Generator().manual_seed(2), []
    filled: list[tuple[nn.Parameter, tuple[Tensor, ...], Tensor, Tensor]] = []  # parameter, where, what was there, and noise
    for name, part in losing.items():
        where = torch.nonzero(~part.flatten()).flatten()
        if len(where) > FILLED:  # spread over the parameter
            where = where[torch.linspace(0, len(where) - 1, FILLED, dtype=torch.float64).long()]
        parameter = parameters[name]
        at = torch.unravel_index(where.to(parameter.device), parameter.shape)
        spread = parameter.detach().std() if parameter.numel() > 1 else parameter.detach().abs().amax()
        noise = (spread + 0.01) * torch.randn(len(where), generator=generator).to(parameter)
        filled.append((parameter, at, parameter.detach()[at].clone(), noise))
    with evaluating(model), torch.no_grad():
        try:
            for fill in (0.0, 1.0):
                for parameter, at, _, noise in filled:
                    parameter[at] = fill * noise
                outputs.append(first_tensor(model(**probe_inputs(model, batch=2))).double())
        finally:
            for parameter, at, before, _ in filled:
                parameter[at] = before
    return bool((outputs[0] - outputs[1]).abs().amax() > tolerance * outputs[0].abs().amax().clamp_min(1e-6))


@contextmanager
def restored(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These parameters get their present values back at the end, bit for bit, whatever happens in between."""
    before = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


@contextmanager
def masked(model: nn.Module, anatomy: Anatomy, mask: Mask) -> Iterator[None]:
    """The model under `mask`: heads, MLPs and neurons gated, single values zero. Afterwards it is as it was, bit for bit.

    Costs one copy of the parameters that the mask names. Raises: MaskError when it does not fit.
    """
    anatomy.check(mask)
    parameters = dict(model.named_parameters())
    with Gates(model, anatomy, mask.structured()), restored([parameters[name] for name in mask.values]):
        with torch.no_grad():
            for name, part in mask.values.items():
                parameters[name].mul_(part.to(parameters[name]))
        yield


def hold(model: nn.Module, anatomy: Anatomy, mask: Mask) -> Gates:
    """Puts `mask` on `model` for good and returns the gates: what is removed is zero in the weights, and stays zero.

    Zero are the columns of o of a removed head, the column of `out` of a removed neuron, weight and bias of a removed MLP's
    `out`, and single values that the mask removes: the saved model computes the same without gates. While it trains, closed
    gates give exactly these values a gradient of zero, and `HeldValues` does for single values. q, k, v and MLP-in values of
    removed parts can no longer reach the output; they are zeroed as well, so that they cannot be taken for alive.
    """
    anatomy.check(mask)
    if mask.values and HeldValues.on(model) is not None:
        raise MaskError("the model holds other values already", next="take them off first: HeldValues.on(model).remove()")
    gates = Gates(model, anatomy, mask.structured())
    gates.zero()
    if mask.values:
        gates.held = HeldValues(model, mask.values, copy=False)
    model.tombola_gates = gates  # type: ignore[assignment]
    return gates


def load(ticket: "Ticket | Path | str", weights: str | Path = "base", *, layout: Layout | None = None) -> "PreTrainedModel":
    """An ordinary `PreTrainedModel` in eval mode with the ticket's mask held, also while it is trained further.

    weights: "base" (the pre-trained weights, with a head drawn from the ticket's seed), "found_on" (the weights the mask was
    found on), or a folder of your own. The lesion of a control is done to base and found_on; weights of your own are taken as
    they are, since those trained again from a lesion must not be destroyed again. `model.tombola_gates` switches or removes the
    gates; `model.tombola_weights` says which weights it has. The mask is proved to act before the model is returned.
    layout: where the parts of the model are; None = as the ticket was found with, by structure or with a layout of its own.

    Raises: FingerprintError when the weights are not those the ticket was made for; TicketError, MaskError, AnatomyError.
    """
    ticket = ticket if isinstance(ticket, Ticket) else Ticket.from_pretrained(ticket)
    place, fingerprint = locate_weights(ticket, weights)
    model = load_weights(place, ticket.objective, head_seed=ticket.seeds.get("head", 0))
    anatomy = read_anatomy(model, ticket.layout if layout is None else layout)
    differing = same_anatomy(ticket.anatomy, anatomy.summary())
    if differing:
        raise MaskError(
            f"the ticket was made for another architecture than {place}",
            got={name: anatomy.summary().get(name) for name in differing},
            expected={name: ticket.anatomy[name] for name in differing},
            next="use weights of the base it was found on",
        )
    if weights in ("base", "found_on"):
        lesion_of(ticket)(model, anatomy)
    prove_acts(model, anatomy, ticket.mask)
    hold(model, anatomy, ticket.mask)
    model.tombola_weights = {"weights": str(weights), "folder": str(place), "fingerprint": fingerprint}
    return model


def lesion_of(ticket: Ticket) -> Callable[[nn.Module, Anatomy], None]:
    """What a control of weights does to them, in place, before its mask is put on; nothing for all other tickets.

    Raises: TicketError when the ticket names a lesion that this version does not know.
    """
    said = ticket.details.get("lesion")
    if said is None:
        return lambda model, anatomy: None
    if said["name"] == "noise":  # added to the values that the mask is over
        return lambda model, anatomy: add_noise(model, list(ticket.mask.values), said["std"], said["seed"])
    if said["name"] not in LESIONS:
        raise TicketError("the ticket is of an unknown lesion", got=said["name"], expected=", ".join(LESIONS))
    return lambda model, anatomy: LESIONS[said["name"]](model, anatomy, said["seed"])
