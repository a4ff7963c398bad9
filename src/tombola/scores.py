"""Scores: how important a part is. Higher = more important, keep.

For heads and MLPs the score is the sensitivity of Michel et al. 2019 as Prasanna et al. 2020 use it: the expectation over
rows of |∂L/∂ξ|, with ξ a gate that multiplies the part. `gate_gradients` gives that derivative exactly and for each row,
from one forward and one backward pass that needs no gradient of any weight; what is then done with the rows
(`REDUCTIONS`) and within a layer (`normalise`) are pure functions of that small table, so that the paper's formula and
the released code's accident are two lines apart. A whole layer has one gate on all its heads and its MLP, whose derivative is
the sum of theirs. Neurons, of which there are too many to keep a number for each row, are reduced on the way (`ByRow`).

For single values of parameters the rows of `CRITERIA` are functions of one signature; a new one is a function and a row.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tombola.anatomy import evaluating
from tombola.errors import DataError, MaskError
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


# ------------------------------------------------------------------------------------------- scores of single values


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a criterion may look at."""

    model: nn.Module
    names: Sequence[str]  # of the parameters to score, as in `named_parameters`
    # (row numbers, model inputs with labels), every row once; consumed once. None = there are no rows
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Criterion:
    """One row of `CRITERIA`: the function, and whether it needs a forward and a backward pass over rows."""

    scores: Callable[[Given], dict[str, Tensor]]
    needs_rows: bool


def magnitude(given: Given) -> dict[str, Tensor]:
    """|w|, without unit, in the type of the weights."""
    return {name: p.detach().abs().cpu() for name, p in parameters_of(given.model, given.names).items()}


def random(given: Given) -> dict[str, Tensor]:
    """Uniform in [0, 1), a function of seed, name and shape alone: neither other names nor their order plays a part."""
    scores = {}
    for name, p in parameters_of(given.model, given.names).items():
        digest = hashlib.sha256(f"{given.seed}|{name}".encode()).digest()
        drawn = np.random.default_rng(int.from_bytes(digest[:16], "big")).random(tuple(p.shape), dtype=np.float32)
        scores[name] = torch.from_numpy(drawn)
    return scores


def taylor_signed(given: Given) -> dict[str, Tensor]:
    """−w · ∂L/∂w: how much the mean loss over the rows rises, to first order, when the value is set to zero; in nats.

    Negative where removal lowers the loss. See `mean_gradients` for L and its exactness.
    Source: the first-order term of Molchanov et al. 2019, eq. 7. Deviation: its sign is kept; they square it.
    """
    gradients = mean_gradients(given)
    parameters = parameters_of(given.model, given.names)
    return {name: (-parameters[name].detach().double().cpu() * gradients.pop(name)).float() for name in given.names}


def taylor(given: Given) -> dict[str, Tensor]:
    """|w · ∂L/∂w|: how much the mean loss over the rows moves, to first order, when the value is set to zero; in nats.

    Source: Molchanov et al. 2017, sec. 2.2, and 2019, sec. 3.1. Deviations: of single values (they score filters and take
    the absolute value, or square, of batch means and then the mean over batches); the gradient is of the mean over all
    rows, so that batches play no part. A square would give the same order.
    """
    return {name: score.abs_() for name, score in taylor_signed(given).items()}


def snip(given: Given) -> dict[str, Tensor]:
    """|w · ∂L/∂w| as a share of the sum over all named values: the connection sensitivity of SNIP. Its order is that of `taylor`.

    Source: Lee et al. 2019, eq. 6. They take it at random weights and on one batch; here on the model and rows that are given.
    """
    scores = taylor(given)
    total = sum(float(score.double().sum()) for score in scores.values())
    return {name: score / total if total else score for name, score in scores.items()}


def fisher(given: Given) -> dict[str, Tensor]:
    """½ · w² · mean over rows of (∂L_i/∂w)²: how much the mean loss rises, to second order, when the value is zeroed; in nats.

    The Hessian is replaced by the diagonal of the empirical Fisher information, and the first-order term left out: right at a
    minimum. One backward pass a row, in fp64 on a copy of the model.
    Source: Theis et al. 2018, eq. 6; Kwon et al. 2022 use the same of gates (see `fisher_of_gates`).
    """
    squares: dict[str, Tensor] = {}
    rows = 0
    for gradients in _row_gradients(given):
        rows += 1
        for name, gradient in gradients.items():
            squares[name] = squares[name].add_(gradient.square()) if name in squares else gradient.square()
    parameters = parameters_of(given.model, given.names)
    return {
        name: (0.5 * parameters[name].detach().double().cpu().square() * squares.pop(name).cpu() / rows).float()
        for name in given.names
    }


def wanda(given: Given) -> dict[str, Tensor]:
    """|w| · ‖x‖₂, x the input that the weight multiplies over all real tokens of the rows; in units of the activation.

    Of a copy of the model in fp64. Raises: MaskError for parameters that are no weights of a linear map (biases, embeddings);
    DataError without rows.
    Source: Sun et al. 2024, eq. 1. Deviation: they compare within an output row; here values compete as `granularity` says.
    """
    parameters = parameters_of(given.model, given.names)
    model = copy.deepcopy(given.model).double()
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in given.names}
    wrong = [name for name, module in owners.items() if parameters[name].ndim != 2 or isinstance(module, nn.Embedding)]
    if wrong:
        raise MaskError(
            "Wanda scores weights of linear maps only",
            got=", ".join(wrong[:5]),
            expected="matrices that multiply an input",
            next="take a scope such as body:weights",
        )
    squares: dict[str, Tensor] = {}
    real: list[Tensor] = []  # [batch, seq] of the batch at work

    def record(name: str, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().double().reshape(-1, args[0].shape[-1])
        if x.shape[0] == real[0].numel():  # what is not a position of the batch (a pooled row, a table) has no padding
            x = x[real[0].flatten()]
        squares[name] = squares.get(name, torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)) + x.square().sum(0)

    handles = [module.register_forward_pre_hook(lambda _, args, name=name: record(name, args)) for name, module in owners.items()]
    try:
        with evaluating(model), torch.no_grad():
            for _, inputs in _rows_of(given):
                real[:] = [inputs["attention_mask"].bool()]
                model(**{name: value for name, value in inputs.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for name, parameter in parameters.items():
        norms = squares[name].sqrt()
        along_rows = parameter.shape[1] == len(norms) and type(owners[name]).__name__ != "Conv1D"
        scores[name] = (parameter.detach().double().abs() * (norms if along_rows else norms[:, None])).float().cpu()
    return scores


def grasp(given: Given) -> dict[str, Tensor]:
    """w · (H·g), H and g the Hessian and gradient of the mean loss over the rows, in nats²: of GraSP with its sign turned, so
    that what it removes first, where removal keeps most of the flow of gradients, is lowest here.

    Exact, by differentiating g·v for a fixed v = g, in fp64 on a copy of the model with plain attention. Memory: the model twice
    more, and a graph of one batch.
    Source: Wang et al. 2020, eq. 8. Deviation: over all rows that are given; they take a few of each class, at random weights.
    """
    ready = list(_rows_of(given))
    gradients = mean_gradients(Given(model=given.model, names=given.names, batches=iter(ready)))
    model, parameters = _with_gradients(given)
    plain = getattr(model, "set_attn_implementation", None)
    if callable(plain):  # fused attention has no second derivative
        plain("eager")
    n = sum(len(rows) for rows, _ in ready)
    found = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for _, inputs in ready:
        with torch.enable_grad():
            first = torch.autograd.grad(
                _loss(model, inputs), list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
            along = torch.stack([(g * gradients[name].to(g)).sum() for name, g in zip(parameters, first, strict=True)]).sum()
        if not along.requires_grad:  # of a loss that is linear in these values
            continue
        second = torch.autograd.grad(along, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, product in zip(parameters, second, strict=True):
            found[name] += product / n
    return {name: (parameters[name].detach() * product).float().cpu() for name, product in found.items()}


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, needs_rows=False),
    "random": Criterion(random, needs_rows=False),
    "taylor": Criterion(taylor, needs_rows=True),
    "taylor-signed": Criterion(taylor_signed, needs_rows=True),
    "snip": Criterion(snip, needs_rows=True),
    "fisher": Criterion(fisher, needs_rows=True),
    "wanda": Criterion(wanda, needs_rows=True),
    "grasp": Criterion(grasp, needs_rows=True),
}


def mean_gradients(given: Given) -> dict[str, Tensor]:
    """∂L/∂w of the named parameters, fp64, with L the mean loss over all rows (see `summed_loss`), in eval mode.

    Computed in fp64 on a copy of the model: of a mean over rows that cancel, fp32 would leave digits that change with batch
    size and order. Memory: the model twice more, and the named values twice more again. The model itself is not touched.

    Raises: DataError without rows, when rows are missing or come twice, or when labels and outputs do not fit; MaskError for
    names the model does not have.
    """
    model, parameters = _with_gradients(given)
    n = 0
    for rows, inputs in _rows_of(given):
        _loss(model, inputs).backward()  # type: ignore[no-untyped-call]
        n += len(rows)
    # A parameter that cannot reach the loss has no gradient: it is zero, not an error.
    return {name: (torch.zeros_like(p) if p.grad is None else p.grad.div_(n)).cpu() for name, p in parameters.items()}


def _row_gradients(given: Given) -> Iterator[dict[str, Tensor]]:
    """∂L_i/∂w of the named parameters for each row by itself, in fp64; as `mean_gradients`."""
    model, parameters = _with_gradients(given)
    for rows, inputs in _rows_of(given):
        for i in range(len(rows)):
            loss = _loss(model, {name: value[i : i + 1] for name, value in inputs.items()})
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
            yield dict(zip(parameters, found, strict=True))


def _with_gradients(given: Given) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the model in fp64 and eval mode, of which the named parameters alone have gradients."""
    parameters_of(given.model, given.names)
    model = copy.deepcopy(given.model).double().eval().requires_grad_(False)
    parameters = parameters_of(model, given.names)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return model, parameters


def _loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.enable_grad():
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
        return summed_loss(logits, inputs["labels"])


def _rows_of(given: Given) -> Iterator[tuple[Tensor, Mapping[str, Tensor]]]:
    """The batches. Raises: DataError when there are none or, at their end, when rows are missing or came twice."""
    if given.batches is None:
        raise DataError("this criterion needs rows", got="none", expected="the selection rows, with labels")
    seen: list[int] = []
    for rows, inputs in given.batches:
        seen += rows.tolist()
        yield rows, inputs
    different = len(set(seen))
    if not seen or sorted(seen) != list(range(len(seen))):
        missing = max(seen, default=-1) + 1 - different
        got = f"{len(seen)} rows, {len(seen) - different} of them again, {missing} left out"
        raise DataError("every row must be scored exactly once", got=got)


def parameters_of(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The named parameters, in the order of the names. Raises: MaskError for names that are unknown, empty or repeated.

    A tied parameter has one name, its first: under a second its values would count twice.
    """
    own = dict(model.named_parameters())
    unknown = [name for name in names if name not in own]
    if unknown or not names or len(set(names)) < len(names):
        raise MaskError(
            "these are not the names of maskable parameters",
            got=", ".join(unknown[:5]) or ("no names" if not names else "a name comes twice"),
            expected="different names out of model.named_parameters()",
            next="take them from tombola.scope.scope_parameters",
        )
    return {name: own[name] for name in names}
