"""A mask held in your own `transformers.Trainer`:

Trainer(model=model, ..., callbacks=[tombola.HoldMask(ticket)])
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from tombola.anatomy import Layout, read_anatomy
from tombola.errors import MaskError
from tombola.gates import Gates, hold
from tombola.held import HeldValues, forget, sharded
from tombola.mask import Mask
from tombola.ticket import Ticket


class HoldMask(TrainerCallback):  # type: ignore[misc]
    """Holds a mask, or that of a ticket, on the model that a `Trainer` trains, from the first step on and thereafter.

    Removed values, their gradients (before clipping, so that they are not in the norm) and their moments are zero after every
    step: in fp32 and mixed precision, with gradient accumulation, compiled, and in several processes (DistributedDataParallel).
    Moments of a resumed optimizer are cleaned. The model keeps its hooks when training ends, like one from `tombola.load`:
    `model.tombola_gates.remove()`, or `HeldValues.on(model).remove()` for single values alone, takes them off.

    A model that carries this very mask already is left as it is. Raises, when training begins: MaskError when the mask does
    not fit, when the model carries another one, when processes hold different masks, when parameters are sharded.
    """

    def __init__(self, mask: Mask | Ticket) -> None:
        self.mask, self._layout = (mask.mask, mask.layout) if isinstance(mask, Ticket) else (mask, None)
        self._held: HeldValues | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        same_on_every_rank(self.mask, args.device)  # first: a rank that raised before would leave the others waiting
        if args.deepspeed or args.fsdp or sharded(given["model"]):
            raise MaskError(
                "a mask cannot be held on sharded parameters",
                got=f"a {type(given['model']).__name__}, trained with {'DeepSpeed' if args.deepspeed else 'FSDP or the like'}",
                expected="every parameter whole on each device",
                next="train with DistributedDataParallel (torchrun) instead",
            )
        model, optimizer = _unwrapped(given["model"]), given["optimizer"]
        carried = _carried(model)
        if not carried:
            _put(model, self.mask, self._layout)
        elif not _same(carried, _losing(self.mask)):
            raise MaskError(
                "the model carries another mask already",
                got=_said(carried),
                expected=f"none, or {_said(_losing(self.mask))}, as it is to be held",
                next="take it off first: model.tombola_gates.remove(), or HeldValues.on(model).remove()",
            )
        self._held = HeldValues.on(model)
        if self._held is not None:
            self._held.clean(optimizer)
        gates = _gates_on(model)
        if gates is not None:  # Trainer may have read a checkpoint over what was zero
            gates.zero()
            forget(optimizer, model, gates.anatomy.as_values(gates.mask.structured()))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._held is not None:
            self._held.enforce()


def same_on_every_rank(mask: Mask, device: torch.device | str) -> None:
    """Compares 16 bytes of digest over all processes. Raises: MaskError on each of them, naming ranks, when masks differ."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    own = torch.frombuffer(bytearray.fromhex(mask.digest()[:32]), dtype=torch.uint8).to(device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(every):
        ranks.setdefault(bytes(digest.tolist()).hex()[:12], []).append(rank)
    if len(ranks) > 1:
        raise MaskError(
            "processes of one training run hold different masks",
            got="; ".join(f"{digest}… on rank {', '.join(map(str, some))}" for digest, some in ranks.items()),
            expected="the same mask on every rank",
            next="load one ticket from one folder on all of them; draw no mask from a seed that depends on the rank",
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what trains or compiles it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _put(model: nn.Module, mask: Mask, layout: Sequence[Layout] | None) -> None:
    if any(name not in mask.values for name in _losing(mask)):
        with _full_precision(model):
            anatomy = read_anatomy(model, layout)
        hold(model, anatomy, mask)
    else:  # needs no heads and no MLPs: any model will do
        HeldValues(model, mask.values)


@contextmanager
def _full_precision(model: nn.Module) -> Iterator[None]:
    """The model's own forward pass: Trainer has put mixed precision around it, too coarse to prove an anatomy in."""
    own: dict[str, Any] = vars(model)
    around = own.get("forward")
    if around is not None and "_original_forward" in own:
        own["forward"] = own["_original_forward"]
    try:
        yield
    finally:
        if around is not None:
            own["forward"] = around


def _gates_on(model: nn.Module) -> Gates | None:
    gates = getattr(model, "tombola_gates", None)
    return gates if isinstance(gates, Gates) and gates.attached else None


def _carried(model: nn.Module) -> dict[str, Tensor]:
    """What the model's hooks remove: part -> kept."""
    gates, held = _gates_on(model), HeldValues.on(model)
    return (_losing(gates.mask.structured()) if gates is not None else {}) | (dict(held.values) if held is not None else {})


def _losing(mask: Mask) -> dict[str, Tensor]:
    """The parts that lose something."""
    return {name: part for name, part in mask.parts().items() if not bool(part.all())}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


def _said(parts: dict[str, Tensor]) -> str:
    removed = sum(part.numel() - int(part.sum()) for part in parts.values())
    return f"{removed} entries removed from {', '.join(list(parts)[:3])}" + ("…" if len(parts) > 3 else "")
