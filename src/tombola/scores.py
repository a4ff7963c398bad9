"""Scores: how important a part is. Higher = more important, keep.

For heads and MLPs the score is the sensitivity of Michel et al. 2019 as Prasanna et al. 2020 use it: the expectation over
rows of |∂L/∂ξ|, with ξ a gate that multiplies the part. `gate_gradients` gives that derivative exactly and for each row,
from one forward and one backward pass that needs no gradient of any weight; what is then done with the rows
(`REDUCTIONS`) and within a layer (`normalise`) are pure functions of that small table, so that the paper's formula and
the released code's accident are two lines apart. A whole layer has one gate on all its heads and its MLP, whose derivative is
the sum of theirs. Neurons, of which there are too many to keep a number for each row, are reduced on the way (`ByRow`).

Single values of parameters have `tombola.criteria`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from tombola.errors import DataError
from tombola.gates import Gates


@dataclass(frozen=True, slots=True)
class Importance:
    """Scores of parts, in units of the loss per unit of gate (nats, or squared units); higher = more important."""

    heads: Float[Tensor, "attention head"]
    mlps: Float[Tensor, " layer"]
    neurons: Float[Tensor, "layer d_ffn"] | None = None  # where they were asked for
    layers: Float[Tensor, " layer"] | None = None  # likewise, of one gate on all of a layer


@dataclass(frozen=True, slots=True)
class GateGradients:
    """∂L_i/∂ξ for every row i, in fp64 and in the order of the rows asked for, with the outputs of the same pass."""

    heads: Float[Tensor, "row attention head"]
    mlps: Float[Tensor, "row layer"]
    logits: Float[Tensor, "row out"]
    neurons: Float[Tensor, "layer d_ffn"] | None = None  # over all rows already, see `ByRow`; None = not asked for

    def layers(self, layer_of_attention: Int[Tensor, " attention"]) -> Float[Tensor, "row layer"]:
        """∂L_i/∂λ, with λ one gate that multiplies all heads of a layer and its MLP: by the chain rule the sum of theirs.

        layer_of_attention: see `Anatomy`. Gates that the mask has closed count too, by their derivative at 0.
        """
        return self.mlps.index_add(1, layer_of_attention, self.heads.sum(2))


class ByRow:
    """Reduces derivatives of each row over all rows, as they come: what `REDUCTIONS` does of a table that is kept whole.

    A table of BERT-base's 36,864 neurons takes 0.3 MB a row. Memory here: that of one row, or, for reductions of batches, of one
    row for every `batch_size`. Rows may come in any order: batches are those of their numbers.
    """

    def __init__(self, reduction: str, batch_size: int, n_rows: int) -> None:
        self.reduction, self.n_rows = reduction, n_rows
        self.size = batch_size if reduction in OF_BATCHES else n_rows
        self.table: Tensor | None = None

    def add(self, rows: Tensor, gradients: Float[Tensor, "row ..."]) -> None:
        """The derivatives of these rows, each of 0 … n_rows − 1 once."""
        groups = rows // self.size
        if self.table is None:
            self.table = torch.zeros(-(-self.n_rows // self.size), *gradients.shape[1:], dtype=torch.float64)
        for group in sorted(set(groups.tolist())):
            of = gradients[groups == group].double()
            mean = of.mean(0) if self.reduction in OF_BATCHES else REDUCTIONS[self.reduction](of, len(of))
            self.table[group] += mean.cpu() * (len(of) / min(self.size, self.n_rows - group * self.size))

    def result(self) -> Float[Tensor, "..."]:
        """The importances, when all rows have come."""
        assert self.table is not None
        return REDUCTIONS[self.reduction](self.table, 1) if self.reduction in OF_BATCHES else self.table[0]


def gate_gradients(
    gates: Gates,
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
    n_rows: int,
    *,
    neurons: tuple[str, int] | None = None,
) -> GateGradients:
    """The derivative of each row's own loss with respect to each gate, at the mask the gates have now.

    neurons: how to reduce those of neurons over rows, (reduction, batch size); None = they are not wanted, and cost nothing.
    They come from the same pass, which then keeps the inside of every MLP for the way back.

    `batches` yields (row numbers, model inputs with `labels`); every row of 0 … n_rows − 1 must come once. The loss is
    cross-entropy in nats, or of a regression the squared error in squared units of the label (see `summed_loss`), of each
    row alone: neither batch size nor order nor padding enters. The weights need and get no gradients, and the model is put
    in eval mode.

    Raises: DataError when rows are missing or come twice, or when labels and outputs do not fit.
    Source: Michel et al. 2019, eq. 2; Prasanna et al. 2020, sec. 3.1. Deviation: exact per row (their code takes the
    absolute value of batch sums that are never reset, see `REDUCTIONS["accumulated"]`).
    """
    model, anatomy = gates.model, gates.anatomy
    heads = torch.zeros(n_rows, anatomy.n_attentions, anatomy.n_heads, dtype=torch.float64)
    mlps = torch.zeros(n_rows, anatomy.n_layers, dtype=torch.float64)
    by_row = None if neurons is None else ByRow(*neurons, n_rows)
    logits: Tensor | None = None
    seen = torch.zeros(n_rows, dtype=torch.int64)
    wanted = [p for p in model.parameters() if p.requires_grad]
    was_training, mask = model.training, gates.mask
    model.eval().requires_grad_(False)
    try:
        for rows, inputs in batches:
            with torch.enable_grad():
                opened: tuple[Tensor, ...] = gates.per_example(len(rows))
                opened += () if by_row is None else (gates.neurons_per_example(len(rows)),)
                features = {name: value for name, value in inputs.items() if name != "labels"}
                raw = model(**features).logits
                loss = summed_loss(raw, inputs["labels"])
                output = row_outputs(raw.detach(), inputs["labels"])
            # A gate whose part cannot reach the loss has no gradient: it is zero, not an error.
            by_head, by_mlp, *by_neuron = torch.autograd.grad(loss, opened, allow_unused=True, materialize_grads=True)
            heads[rows] = by_head.transpose(0, 1).double().cpu()
            mlps[rows] = by_mlp.transpose(0, 1).double().cpu()
            if by_row is not None:
                by_row.add(rows, by_neuron[0].transpose(0, 1))
            logits = torch.zeros(n_rows, output.shape[-1]) if logits is None else logits
            logits[rows] = output.cpu()
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
    return GateGradients(heads, mlps, logits, None if by_row is None else by_row.result())


def summed_loss(logits: Float[Tensor, "row *position out"], labels: Tensor) -> Float[Tensor, ""]:
    """The sum over rows of each row's own loss, in fp64: what a model of this kind is trained by, as a mean.

    Whole labels: cross-entropy in nats. Floating labels and a single output: the squared error. Logits for each position:
    of a row the mean over its predicted tokens (`row_outputs`, whose negative it is).
    Raises: DataError for a single output with whole labels, whose cross-entropy would be 0 whatever the model says, and for
    floating labels with several outputs.
    """
    if logits.ndim == 3:
        return -row_outputs(logits, labels).double().sum()
    if labels.is_floating_point() and logits.shape[-1] == 1:
        return (logits.double().squeeze(-1) - labels.double()).square().sum()
    if labels.is_floating_point() or logits.shape[-1] < 2:
        raise DataError(
            "labels and outputs of the model do not fit",
            got=f"{'values' if labels.is_floating_point() else 'classes'} for {logits.shape[-1]} output"
            + "s" * (logits.shape[-1] != 1),
            expected="classes for 2 outputs or more, or values for a single one",
        )
    # fp64: for a row the model is sure of, softmax − 1 loses all its digits in fp32
    return cross_entropy(logits.double(), labels, reduction="sum")


def row_outputs(logits: Tensor, labels: Tensor) -> Float[Tensor, "row out"]:
    """What a model says of each row, in fp32: its logits; or, of logits for each position, the log-likelihood per token.

    That is the mean over the predicted tokens of a row (all but its first and its padding, label -100) of the log-probability
    that the position before gives them, in nats; [row, 1].
    """
    if logits.ndim < 3:
        return logits.float()
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return -(losses.sum(1) / (labels[:, 1:] != -100).sum(1))[:, None]


def per_example(gradients: Float[Tensor, "row ..."], batch_size: int) -> Float[Tensor, "..."]:
    """Mean over rows of |∂L_i/∂ξ|: the formula. `batch_size` plays no part."""
    return gradients.abs().mean(0)


def per_batch(gradients: Float[Tensor, "row ..."], batch_size: int) -> Float[Tensor, "..."]:
    """Sum over batches of |∂(mean loss of the batch)/∂ξ|: signs cancel within a batch."""
    return torch.stack([rows.mean(0).abs() for rows in torch.split(gradients, batch_size)]).sum(0)


def accumulated(gradients: Float[Tensor, "row ..."], batch_size: int) -> Float[Tensor, "..."]:
    """Sum over batches t of |Σ_{s ≤ t} ∂(mean loss of batch s)/∂ξ|: the released code, which never zeroes the gradient."""
    return torch.stack([rows.mean(0) for rows in torch.split(gradients, batch_size)]).cumsum(0).abs().sum(0)


def fisher_of_gates(gradients: Float[Tensor, "row ..."], batch_size: int) -> Float[Tensor, "..."]:
    """Mean over rows of (∂L_i/∂ξ)²: the diagonal of the empirical Fisher information of the gates. `batch_size` plays no part.

    Source: Kwon et al. 2022, eq. 7, without their search for the best mask that follows it.
    """
    return gradients.square().mean(0)


REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "per_example": per_example,
    "fisher": fisher_of_gates,
    "per_batch": per_batch,
    "accumulated": accumulated,
}
OF_BATCHES = frozenset({"per_batch", "accumulated"})  # functions of the means of batches alone; the others are means over rows


def sensitivity(
    gradients: GateGradients,
    reduction: str = "per_example",
    batch_size: int = 64,
    *,
    layer_of_attention: Int[Tensor, " attention"] | None = None,
) -> Importance:
    """The raw importance of heads, MLPs and, where they were asked for, neurons, reduced over rows in fp64.

    With `layer_of_attention` (see `Anatomy`) that of whole layers too. Neurons come reduced, as `gate_gradients` was told.
    """
    reduce = REDUCTIONS[reduction]
    layers = None if layer_of_attention is None else reduce(gradients.layers(layer_of_attention), batch_size)
    return Importance(reduce(gradients.heads, batch_size), reduce(gradients.mlps, batch_size), gradients.neurons, layers)


def normalise(parts: Float[Tensor, "layer part"], members: Bool[Tensor, "layer part"]) -> Float[Tensor, "layer part"]:
    """Scores of heads, or of neurons, over the L2 norm of their layer, the norm taken over `members`; without unit.

    Makes layers comparable: the size of the gradient grows from the first layer to the last.
    Source: Molchanov et al. 2017; members = the remaining heads (released: all heads, removed ones included).
    """
    norm = torch.linalg.vector_norm(torch.where(members, parts, 0.0), dim=1, keepdim=True)
    scaled: Tensor = parts / (norm + 1e-20)
    return scaled


def min_max(scores: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Scores moved and scaled to [0, 1] over all of them; all equal gives zeros. The order is the same but for rounding."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else torch.zeros_like(scores)
