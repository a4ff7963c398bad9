"""Criteria: how important a single value of a parameter is. Higher = more important, keep.

The rows of `CRITERIA` are functions of one signature, from what is `Given` to scores; a new one is a function and a row.
Heads, MLPs and neurons have scores of their own, in `tombola.scores`.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tombola.anatomy import evaluating
from tombola.errors import DataError, MaskError
from tombola.scores import summed_loss


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
