"""The loss around and between trained models: a barrier on the straight line, and how sharp the place is where a model ended.

A "flat optimum" is two claims: that two models lie in one valley, which `barrier` answers, and that the loss rises little when
weights are moved at random, which `rises` answers. Both only need losses of changed weights: no gradients.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tombola.errors import DataError
from tombola.gates import restored

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Barrier:
    """How far the loss on a line rises, in units of the loss; 0 where it does not. Over n points: a narrow peak may hide."""

    over_line: float  # the largest excess over the straight line between the losses of both ends
    over_ends: float  # the largest excess over the higher end
    at: float  # where the first of them is, in [0, 1]


def barrier(at: Sequence[float], losses: Sequence[float]) -> Barrier:
    """The barrier of losses at these places of a line, from 0 (one end) to 1 (the other).

    Raises: DataError unless there are as many of both, beginning at 0 and ending at 1.
    Source: Frankle et al. 2020 (error barrier, over the mean of both ends); deviation: over their linear interpolation.
    """
    if len(at) != len(losses) or len(at) < 2 or at[0] != 0 or at[-1] != 1:
        raise DataError("these are no losses on a line", got=f"{len(losses)} losses at {list(at)}", expected="from 0 to 1")
    first, last = losses[0], losses[-1]
    excess = [loss - ((1 - t) * first + t * last) for t, loss in zip(at, losses, strict=True)]
    highest = max(range(len(at)), key=excess.__getitem__)
    return Barrier(max(excess[highest], 0.0), max(max(losses) - max(first, last), 0.0), at[highest])


@torch.no_grad()
def along_line(model: nn.Module, end: Mapping[str, Tensor], at: Sequence[float], measure: Callable[[], T]) -> list[T]:
    """What `measure` says at these places of the straight line from the parameters of `model` (0) to those in `end` (1).

    The model is given back as it was, bit for bit. Raises: DataError when `end` has other parameters.
    """
    parameters = dict(model.named_parameters())
    if {name: p.shape for name, p in parameters.items()} != {name: end[name].shape for name in end}:
        raise DataError("the two ends of a line are of different models", expected="the same parameters, by name and shape")
    start, found = {name: p.detach().clone() for name, p in parameters.items()}, []
    with restored(parameters.values()):
        for t in at:
            for name, parameter in parameters.items():
                # lerp is exact at both ends, so that an end scores what its model scores
                parameter.copy_(torch.lerp(start[name], end[name].to(start[name]), t))
            found.append(measure())
    return found


def filter_normalised(model: nn.Module, names: Iterable[str], seed: int) -> dict[str, Tensor]:
    """A random direction: parameter name → Gaussian noise whose every row has the norm of that row of the weight.

    Values that are exactly 0 stay so: what a mask removes is no part of the model, and is not moved. The rows are output
    channels as `nn.Linear` stores them, [out, in]; of a transposed weight they are input channels.
    Source: Li et al. 2018, "Visualizing the loss landscape of neural nets", sec. 4.
    """
    drawn, found = torch.Generator().manual_seed(seed), {}
    for name in names:
        weight = model.get_parameter(name).detach()
        noise = torch.randn(weight.shape, generator=drawn, dtype=torch.float32).to(weight) * (weight != 0)
        rows, norms = noise.flatten(1), weight.flatten(1).norm(dim=1, keepdim=True)
        found[name] = (rows * norms / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)).view_as(weight)
    return found


@torch.no_grad()
def rises(
    model: nn.Module, names: Sequence[str], measure: Callable[[], T], *, radius: float, draws: int, seed: int
) -> list[tuple[T, T]]:
    """What `measure` says with weights moved by `radius` times a filter-normalised direction, there and opposite, for each draw.

    Half the sum of a pair, less the loss where the model is, is the rise of that draw; a slope cancels. For the mean rise and not
    the largest eigenvalue of the Hessian: weights that a norm follows may be scaled without changing the model, and that
    eigenvalue then changes with their scale (Dinh et al. 2017), which a mask changes too; a direction in units of each row's own
    norm does not. Of a quadratic with Hessian H the expected rise is radius² / 2 · Σ over rows of |row|² / (its values that are
    not 0) · (trace of H over these). The model is given back as it was, bit for bit.
    """
    parameters, found = {name: model.get_parameter(name) for name in names}, []
    for draw in range(draws):
        direction, pair = filter_normalised(model, names, seed + draw), []
        for sign in (1.0, -1.0):
            with restored(parameters.values()):
                for name, parameter in parameters.items():
                    parameter.add_(direction[name], alpha=sign * radius)
                pair.append(measure())
        found.append((pair[0], pair[1]))
    return found
