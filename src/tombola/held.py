"""Single values of a live model that are zero and stay zero while it trains.

The gradient is masked by a hook on the parameter itself, which runs before the gradient is added up: so before it is
averaged over processes, before it is clipped, and before an optimizer that steps within the backward pass (which a hook
after the adding up would come too late for). A gradient of zero keeps a value of zero and its moments exactly where they
are in AdamW, with weight decay or without; what moves values by other ways is undone by `enforce`.

What it costs: one byte a value, and two multiplications by the mask a step, of the gradient and of the values. The masks
are kept as uint8: on a CPU a multiplication by bool takes two to five times as long, and `masked_fill` seven to twenty.
"""

import copy
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tombola.errors import MaskError


class HeldValues:
    """Holds single values of named parameters at zero, from now on until `remove`.

    values: parameter name (of `model.named_parameters()`) -> mask of its shape, True = kept. They are copied, as one byte a
    value (with copy=False they are those of a `Mask`, which nobody writes to); a parameter that loses nothing costs nothing.
    Values and their gradients are zeroed at once.

    Follows the model to other devices and types, and to a deep copy, which then holds on its own. A model has at most one:
    for another mask, `remove` the first. An infinite gradient of a removed value becomes NaN and not 0, so that a scaler
    still sees the overflow. Whether a model is in train mode makes no difference.

    Raises: MaskError when a name or shape does not fit, all of them at once; when parameters are sharded; when the model
    holds values already.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], *, copy: bool = True) -> None:
        if HeldValues.on(model) is not None:
            raise MaskError(
                "the model holds values already",
                got="a second mask",
                expected="one mask a model",
                next="take the first off with .remove() (HeldValues.on(model) finds it), or hold the two as one: a & b",
            )
        check_fits(model, values)
        self.model = model
        # Shared with the hooks, which find a mask here that has moved to another device.
        held = {name: part for name, part in values.items() if not bool(part.all())}
        self._masks = {name: part.to(torch.uint8, copy=True) if copy else part.view(torch.uint8) for name, part in held.items()}
        self._armed: dict[str, tuple[nn.Parameter, RemovableHandle]] = {}
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(self._before_forward)
        with torch.no_grad():
            for parameter, mask in self._current():
                _zero_removed(parameter, mask)

    @staticmethod
    def on(model: nn.Module) -> "HeldValues | None":
        """What holds values on this model, if anything does."""
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, HeldValues)), None)

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Parameter name -> mask of its shape (True = kept), of the parameters that lose something. Not to be written to."""
        return MappingProxyType({name: mask.view(torch.bool) for name, mask in self._masks.items()})

    def enforce(self) -> None:
        """Sets the removed values to zero again: after whatever may move them, such as an optimizer step.

        One multiplication; a value that has become infinite or NaN stays NaN, since that run is lost.
        """
        with torch.no_grad():
            for parameter, mask in self._current():
                parameter.mul_(mask)

    def clean(self, optimizer: torch.optim.Optimizer) -> None:
        """Zeroes the removed values, and what `optimizer` remembers of them: every state tensor of the parameter's shape.

        For an optimizer that has run before; one that starts under the mask never remembers anything but zeros.
        Raises: MaskError when it keeps such a state quantised, where zero is not the number 0.
        """
        with torch.no_grad():
            for parameter, mask in self._current():
                _zero_removed(parameter, mask)
        forget(optimizer, self.model, self.values)

    def remove(self) -> None:
        """Takes all hooks off; the values stay zero until something moves them."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        for _, handle in self._armed.values():
            handle.remove()
        self._armed.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "HeldValues":
        """Called when the model is copied, of which this is a part. Masks are shared: nobody writes to them."""
        twin = HeldValues.__new__(HeldValues)
        memo[id(self)] = twin
        twin.model, twin._handle = copy.deepcopy(self.model, memo), copy.deepcopy(self._handle, memo)
        twin._masks, twin._armed = dict(self._masks), {}
        # The copied model may be without its parameters still; each copies itself, once, and silently drops its hooks.
        for name, (parameter, _) in self._armed.items():
            twin._arm(name, copy.deepcopy(parameter, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """To be pickled, as a part of the model: parameters lose their hooks, and get new ones before the next forward pass."""
        return self.__dict__ | {"_armed": {}}

    def _before_forward(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        # A compiled graph does not see the hooks of parameters, nor undo them: they are there from the start.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._current()

    def _current(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each held parameter as the model has it now, hooked, with the mask on its device.

        Parameters are replaced, hooks and all, by `load_state_dict(assign=True)`, by unpickling, by some conversions.
        """
        if self._handle is None:
            raise MaskError("these values are held no longer", got=".remove() was called", next="make a new HeldValues")
        current = []
        for name in self._masks:
            try:
                parameter = self.model.get_parameter(name)
            except AttributeError:
                check_fits(self.model, self.values)
                continue  # a plain tensor in its place for this one call, as torch.func has it: the caller's, not ours
            if name not in self._armed or parameter is not self._armed[name][0]:
                if parameter.shape != self._masks[name].shape:
                    check_fits(self.model, self.values)
                self._arm(name, parameter)
            current.append((parameter, _mask_on(self._masks, name, parameter.device)))
        return current

    def _arm(self, name: str, parameter: nn.Parameter) -> None:
        if name in self._armed:
            self._armed.pop(name)[1].remove()
        if parameter.requires_grad:  # one that is frozen has no gradient, and takes no hook until it is thawed
            handle = parameter.register_hook(partial(_mask_gradient, self._masks, name))  # type: ignore[no-untyped-call]
            self._armed[name] = (parameter, handle)
            if parameter.grad is not None:
                parameter.grad.mul_(_mask_on(self._masks, name, parameter.device))


def _mask_gradient(masks: dict[str, Tensor], name: str, gradient: Tensor) -> Tensor:
    # Not in place: the same tensor may be the gradient of another parameter.
    return gradient * _mask_on(masks, name, gradient.device)


def _mask_on(masks: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
    mask = masks[name]
    if mask.device != device:
        mask = masks[name] = mask.to(device)
    return mask


def _zero_removed(x: Tensor, mask: Tensor) -> None:
    x.masked_fill_(mask == 0, 0)  # slower than to multiply, but gives +0 whatever was there: for once, not for every step


def forget(optimizer: torch.optim.Optimizer, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Zeroes what `optimizer` remembers of removed values: every state tensor that has the shape of a parameter in `values`.

    values: parameter name -> mask of its shape, True = kept. A preconditioner of a square matrix that has the shape of the
    matrix itself cannot be told from a moment: start such an optimizer anew.
    Raises: MaskError when such a state is quantised, where zero is not the number 0.
    """
    for name, kept in values.items():
        parameter = model.get_parameter(name)
        for key, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                if not state.is_floating_point():
                    raise MaskError(
                        "this optimizer keeps its moments quantised, so that those of removed values cannot be zeroed",
                        got=f"{key} of {name}: {state.dtype}",
                        expected="floating-point moments",
                        next="start with a new optimizer, or with one that is not quantised",
                    )
                _zero_removed(state, kept.to(state.device))


def check_fits(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raises: MaskError naming every entry of `values` that is no whole floating-point parameter of its name and shape."""
    parameters = dict(model.named_parameters())
    aliases = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name not in parameters}
    parts, wrong = sharded(model), {}
    for name, part in values.items():
        parameter = parameters.get(name)
        if parameter is None:
            same = [first for first, p in parameters.items() if p is aliases.get(name)]
            wrong[name] = f"is tied: use {same[0]}" if same else "is no parameter of this model"
        elif name in parts:
            wrong[name] = f"is sharded: {type(parameter).__name__} of shape {tuple(parameter.shape)} here"
        elif part.dtype != torch.bool:
            wrong[name] = f"mask of {part.dtype} and not of torch.bool"
        elif parameter.shape != part.shape:
            wrong[name] = f"mask of shape {tuple(part.shape)} for a parameter of shape {tuple(parameter.shape)}"
        elif not parameter.is_floating_point():
            wrong[name] = f"is quantised: {parameter.dtype}"
    if wrong:
        few = [f"{name} {problem}" for name, problem in list(wrong.items())[:6]]
        raise MaskError(
            f"{len(wrong)} of {len(values)} masks of values do not fit this {type(model).__name__}",
            got="; ".join(few) + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""),
            expected="names, shapes and floating-point values of model.named_parameters(), torch.bool, True = kept",
            next="hold the mask with every parameter whole: DistributedDataParallel, without FSDP or DeepSpeed"
            if parts
            else "compare with model.named_parameters()",
        )


def sharded(model: nn.Module) -> list[str]:
    """Names of the parameters of which this process has only a part: by FSDP 1 and 2, tensor parallelism, DeepSpeed ZeRO 3."""
    marks = ("placements", "_fsdp_flattened", "ds_id")
    return [name for name, parameter in model.named_parameters() if any(hasattr(parameter, mark) for mark in marks)]
