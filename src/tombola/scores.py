"""Scores: how important a part is. Higher = more important, keep.

For heads and MLPs the score is the sensitivity of Michel et al. 2019 as Prasanna et al. 2020 use it: the expectation over
rows of |∂L/∂ξ|, with ξ a gate that multiplies the part. `gate_gradients` gives that derivative exactly and for each row,
from one forward and one backward pass that needs no gradient of any weight; what is then done with the rows
(`REDUCTIONS`) and within a layer (`normalise`) are pure functions of that small table, so that the paper's formula and
the released code's accident are two lines apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from tombola.errors import DataError
from tombola.gates import Gates


@dataclass(frozen=True, slots=True)
class Importance:
    """Scores of heads and MLPs, in nats per unit of gate; higher = more important."""

    heads: Float[Tensor, "layer head"]
    mlps: Float[Tensor, " layer"]


@dataclass(frozen=True, slots=True)
class GateGradients:
    """∂L_i/∂ξ for every row i, in fp64 and in the order of the rows asked for, with the logits of the same pass."""

    heads: Float[Tensor, "row layer head"]
    mlps: Float[Tensor, "row layer"]
    logits: Float[Tensor, "row out"]


def gate_gradients(gates: Gates, batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]], n_rows: int) -> GateGradients:
    """The derivative of each row's own loss with respect to each gate, at the mask the gates have now.

    `batches` yields (row numbers, model inputs with `labels`); every row of 0 … n_rows − 1 must come once. The loss is
    cross-entropy in nats, of each row alone: neither batch size nor order nor padding enters. The weights need and get no
    gradients, and the model is put in eval mode.

    Raises: DataError when rows are missing or come twice.
    Source: Michel et al. 2019, eq. 2; Prasanna et al. 2020, sec. 3.1. Deviation: exact per row (their code takes the
    absolute value of batch sums that are never reset, see `REDUCTIONS["accumulated"]`).
    """
    model, anatomy = gates.model, gates.anatomy
    heads = torch.zeros(n_rows, anatomy.n_layers, anatomy.n_heads, dtype=torch.float64)
    mlps = torch.zeros(n_rows, anatomy.n_layers, dtype=torch.float64)
    logits: Tensor | None = None
    seen = torch.zeros(n_rows, dtype=torch.int64)
    wanted = [p for p in model.parameters() if p.requires_grad]
    was_training, mask = model.training, gates.mask
    model.eval().requires_grad_(False)
    try:
        for rows, inputs in batches:
            with torch.enable_grad():
                head_gates, mlp_gates = gates.per_example(len(rows))
                features = {name: value for name, value in inputs.items() if name != "labels"}
                output = model(**features).logits
                # fp64: for a row the model is sure of, softmax − 1 loses all its digits in fp32
                loss = cross_entropy(output.double(), inputs["labels"], reduction="sum")
            # A gate whose part cannot reach the loss has no gradient: it is zero, not an error.
            by_head, by_mlp = torch.autograd.grad(loss, (head_gates, mlp_gates), allow_unused=True, materialize_grads=True)
            heads[rows] = by_head.transpose(0, 1).double().cpu()
            mlps[rows] = by_mlp.transpose(0, 1).double().cpu()
            logits = torch.zeros(n_rows, output.shape[-1]) if logits is None else logits
            logits[rows] = output.detach().float().cpu()
            seen.index_add_(0, rows, torch.ones_like(rows))  # `seen[rows] += 1` counts a row once a batch
    finally:
        model.train(was_training)
        for parameter in wanted:
            parameter.requires_grad_(True)
        gates.set(mask)
    if logits is None or bool((seen != 1).any()):
        raise DataError(
            "every row must be scored exactly once", got=f"{int((seen == 0).sum())} missing, {int((seen > 1).sum())} twice"
        )
    return GateGradients(heads, mlps, logits)


def per_example(gradients: Float[Tensor, "row ..."], batch_size: int) -> Float[Tensor, "..."]:
    """Mean over rows of |∂L_i/∂ξ|: the formula. `batch_size` plays no part."""
    return gradients.abs().mean(0)


def per_batch(gradients: Float[Tensor, "row ..."], batch_size: int) -> Float[Tensor, "..."]:
    """Sum over batches of |∂(mean loss of the batch)/∂ξ|: signs cancel within a batch."""
    return torch.stack([rows.mean(0).abs() for rows in torch.split(gradients, batch_size)]).sum(0)


def accumulated(gradients: Float[Tensor, "row ..."], batch_size: int) -> Float[Tensor, "..."]:
    """Sum over batches t of |Σ_{s ≤ t} ∂(mean loss of batch s)/∂ξ|: the released code, which never zeroes the gradient."""
    return torch.stack([rows.mean(0) for rows in torch.split(gradients, batch_size)]).cumsum(0).abs().sum(0)


REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "per_example": per_example,
    "per_batch": per_batch,
    "accumulated": accumulated,
}


def sensitivity(gradients: GateGradients, reduction: str = "per_example", batch_size: int = 64) -> Importance:
    """The raw importance of heads and MLPs from their gate gradients, reduced over rows in fp64."""
    reduce = REDUCTIONS[reduction]
    return Importance(reduce(gradients.heads, batch_size), reduce(gradients.mlps, batch_size))


def normalise(heads: Float[Tensor, "layer head"], members: Bool[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
    """Head scores over the L2 norm of their layer, the norm taken over `members`; without unit.

    Makes layers comparable: the size of the gradient grows from the first layer to the last.
    Source: Molchanov et al. 2017; members = the remaining heads (released: all heads, removed ones included).
    """
    norm = torch.linalg.vector_norm(torch.where(members, heads, 0.0), dim=1, keepdim=True)
    scaled: Tensor = heads / (norm + 1e-20)
    return scaled
