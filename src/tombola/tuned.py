"""Mask tuning: kept heads and neurons scaled so that each layer's output is nearest the dense model's, by least squares.

Source: Kwon et al. 2022 (arXiv 2204.09656), sec. 4.3: layer by layer, the mask values of what is kept become real numbers, the
solution of min ‖A m − b‖², where column p of A is what part p adds to the output of its layer under the mask, over all tokens,
and b what all parts add in the dense model; found as m = 1 + r with a damped r; out of [−10, 10] it is discarded. Deviations:

- b is the dense model's output of the projection itself. Theirs has the difference of the residual streams besides, which lies
  at another place in every family. Their code leaves the heads of the first layer out, and fits the last MLP of a classifier to
  the first token alone; here all sites and all tokens that are no padding are taken.
- The damping is relative to the columns (theirs is 1, whatever their size).
- A layer whose factors are beyond the limit, or raise the loss on the rows, is left as it was, and the others are tuned all the
  same; theirs stops at the first beyond the limit, and looks at no loss.

Factors are no second kind of mask: `fold` multiplies them into the columns of the output projection, which is exact, and the
model is then cut, saved and loaded like any other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tombola.anatomy import Anatomy, Projection, evaluating, probe_inputs
from tombola.errors import MaskError
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.scores import summed_loss

DAMP = 0.03  # of the root mean square of the columns of A: what keeps r small where the rows say little
LIMIT = 10.0  # factors beyond are discarded, with those of their layer

Batches = Callable[[], Iterable[tuple[Tensor, Mapping[str, Tensor]]]]  # (row numbers, inputs with labels), anew at each call


@dataclass(frozen=True, slots=True)
class Site:
    """One output projection whose kept parts are tuned: `columns` are its kept inputs, `part` the part that each belongs to."""

    name: str  # as in "heads of layer 3"
    projection: Projection
    columns: Int[Tensor, " column"]
    part: Int[Tensor, " column"]

    @property
    def path(self) -> str:
        return self.projection.path


@dataclass(frozen=True, slots=True)
class Tuning:
    """Factors of the inputs of output projections, by path, and what they did on the rows they were found on."""

    factors: Mapping[str, Float[Tensor, " in"]]  # 1 where nothing is tuned; of projections that are left as they were none
    loss: tuple[float, float]  # mean a row, under the mask: before and after; never higher after
    errors: Mapping[str, tuple[float, float]]  # site → ‖A m − b‖² over ‖b‖², before and after
    left: Mapping[str, str]  # site → why it was left as it was


def tune(model: nn.Module, mask: Mask, anatomy: Anatomy, batches: Batches, *, damp: float = DAMP, limit: float = LIMIT) -> Tuning:
    """The factors of what `mask` keeps, found on these rows, site by site in the order in which the model runs them.

    One factor for each kept part of the kinds that the mask names: a head, a neuron, or of masks of whole MLPs an MLP. Each site
    sees the factors of those before it. A pass of the dense and of the masked model a site, and one more; the model is left as
    it was.

    Raises: MaskError for a mask of single values, or of nothing; for a projection that runs more than once a pass (ALBERT) or
    whose weight is another's too, since the factors of one place would hold in the other; and for quantised weights.
    """
    anatomy.check(mask)
    sites = _sites(model, mask, anatomy)
    factors: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}
    left: dict[str, str] = {}
    with evaluating(model), torch.no_grad(), Gates(model, anatomy) as gates, _scaled(model, sites, factors) as switch:
        measured = partial(_measure, model, gates, mask, batches, switch)
        reached: float | None = None
        first, last = 0.0, None
        for site in [*sites, None]:
            loss, equations = measured(site)
            if reached is None:
                first = loss
            elif last is not None and loss > reached:
                del factors[last.path]
                left[last.name] = f"the loss rose from {reached:.6f} to {loss:.6f}"
                loss, equations = measured(site)
            reached, last = loss, None
            if site is None or equations is None:
                continue
            solved = equations.solve(damp)
            errors[site.name] = (equations.error(torch.ones_like(solved)), equations.error(solved))
            if not bool(solved.isfinite().all()) or float(solved.abs().max()) > limit:
                left[site.name] = f"a factor is beyond {limit:g}"
                continue
            of = torch.ones(site.projection.n_in, dtype=torch.float64)
            of[site.columns] = solved[site.part]
            factors[site.path], last = of, site
        assert reached is not None
    return Tuning({path: of.float() for path, of in factors.items()}, (first, reached), errors, left)


def fold(model: nn.Module, factors: Mapping[str, Float[Tensor, " in"]]) -> None:
    """Multiplies the factors into the columns of their projections, in place: the same function as scaling what comes in.

    Raises: MaskError for a path that the model does not have, or a width that is not the projection's.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for path, of in factors.items():
        module = modules.get(path)
        into = None if module is None else module.weight.shape[0 if hasattr(module, "nf") else 1]
        if into != len(of):
            raise MaskError("these factors are of another model", got=f"{path}: {len(of)}", expected=f"{into} columns")
    with torch.no_grad():
        for path, of in factors.items():
            weight = modules[path].weight
            weight.mul_(of.to(weight)[:, None] if hasattr(modules[path], "nf") else of.to(weight))


# ---------------------------------------------------------------------------------------------------------------- sites


def _sites(model: nn.Module, mask: Mask, anatomy: Anatomy) -> list[Site]:
    if mask.values or not mask.structured().parts():
        raise MaskError(
            "there is nothing to tune",
            got="a mask of single values" if mask.values else "a mask of nothing",
            expected="a mask of heads, MLPs or neurons",
            next="search a ticket of parts (s-prune), or leave mask tuning out",
        )
    full = anatomy.full_mask() & mask
    assert full.heads is not None and full.mlps is not None
    found = []
    for i, (attention, heads) in enumerate(zip(anatomy.attentions, full.heads, strict=True)):
        if mask.heads is not None and bool(heads.any()):
            found.append(_site(f"heads of layer {i}", attention.o, heads.repeat_interleave(attention.d_head), attention.d_head))
    for i, (mlp, kept) in enumerate(zip(anatomy.mlps, full.mlps, strict=True)):
        if not bool(kept):
            continue
        if mask.neurons is not None and bool(mask.neurons[i].any()):
            found.append(_site(f"neurons of layer {i}", mlp.out, mask.neurons[i], 1))
        elif mask.neurons is None and mask.mlps is not None:
            found.append(_site(f"MLP of layer {i}", mlp.out, torch.ones(mlp.d_ffn, dtype=torch.bool), mlp.d_ffn))
    order = _order(model, found)
    return sorted(found, key=lambda site: order[site.path])


def _site(name: str, projection: Projection, kept: Tensor, width: int) -> Site:
    columns = torch.nonzero(kept).flatten()
    return Site(name, projection, columns, torch.unique(columns // width, return_inverse=True)[1])


def _order(model: nn.Module, sites: list[Site]) -> dict[str, int]:
    """When each projection runs in a pass. Raises: MaskError for what cannot be folded."""
    seen: list[str] = []
    handles = [
        model.get_submodule(site.path).register_forward_pre_hook(lambda _, __, path=site.path: seen.append(path))
        for site in sites
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(**probe_inputs(model, batch=1))
    finally:
        for handle in handles:
            handle.remove()
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    wrong = []
    for site in sites:
        weight = getattr(model.get_submodule(site.path), "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            wrong.append(f"{site.path} has no plain weights")
        elif seen.count(site.path) != 1 or owners[id(weight)] != 1:
            wrong.append(f"{site.path} runs {seen.count(site.path)} times a pass, its weight is {owners[id(weight)]} modules'")
    if wrong:
        raise MaskError(
            "the factors of this mask could not be folded into the weights",
            got="; ".join(wrong[:4]),
            expected="an output projection of its own, in floating point, for each layer",
            next="leave mask tuning out, or train the ticket again (tombola retrain)",
        )
    return {path: at for at, path in enumerate(seen)}


# -------------------------------------------------------------------------------------------------------- least squares


@dataclass
class _Switch:
    """Whether factors are on, and what one projection takes in, or gives out, in the pass that is running."""

    on: bool = False
    path: str = ""
    taken: Tensor | None = None
    given: Tensor | None = None


@contextmanager
def _scaled(model: nn.Module, sites: list[Site], factors: Mapping[str, Tensor]) -> Iterator[_Switch]:
    """Hooks behind those of the gates: inputs of projections are multiplied by their factors, where the switch is on."""
    switch = _Switch()

    def scale(path: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if path == switch.path:
            switch.taken = args[0]
        of = factors.get(path) if switch.on else None
        return None if of is None else (args[0] * of.to(args[0]), *args[1:])

    def note(path: str, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if path == switch.path:
            switch.given = output

    handles = []
    for site in sites:
        module = model.get_submodule(site.path)
        handles.append(module.register_forward_pre_hook(partial(scale, site.path)))
        handles.append(module.register_forward_hook(partial(note, site.path), prepend=True))
    try:
        yield switch
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class Equations:
    """The normal equations of min ‖A m − b‖², in fp64."""

    products: Float[Tensor, "part part"]  # AᵀA
    targets: Float[Tensor, " part"]  # Aᵀb
    length: float  # ‖b‖²

    def solve(self, damp: float) -> Float[Tensor, " part"]:
        """m = 1 + r with r of min ‖A r − (b − A 1)‖² + ‖λ r‖², λ = damp × the root mean square of the columns of A."""
        ones = torch.ones_like(self.targets)
        ridge = damp**2 * self.products.diagonal().mean() * torch.eye(len(ones), dtype=torch.float64)
        rest = self.targets - self.products @ ones
        solved: Tensor = ones + torch.linalg.lstsq(self.products + ridge, rest[:, None], driver="gelsd").solution[:, 0]
        return solved

    def error(self, m: Float[Tensor, " part"]) -> float:
        """‖A m − b‖² over ‖b‖²."""
        left = self.length - 2 * float(m @ self.targets) + float(m @ self.products @ m)
        return max(left, 0.0) / self.length if self.length > 0 else 0.0


class _Sums:
    """AᵀA, Aᵀb and ‖b‖² of one site, batch by batch.

    Column p of A is W[:, p] Z[p] of each token; so AᵀA is ZᵀZ ∘ WᵀW, summed over the columns of each pair of parts.
    Of a batch they are made in the type of the model, and added up in fp64.
    """

    def __init__(self, model: nn.Module, site: Site) -> None:
        module: Any = model.get_submodule(site.path)
        place, kind = module.weight.device, torch.promote_types(module.weight.dtype, torch.float32)
        self.site, self.columns, self.channels = site, site.columns.to(place), site.projection.channels().to(place)
        self.weight = site.projection.rows(module.weight).detach().to(kind)[:, self.columns]
        self.bias = 0.0 if module.bias is None else module.bias.detach().to(kind)[self.channels]
        n = len(self.columns)
        self.products = torch.zeros(n, n, dtype=torch.float64, device=place)
        self.targets = torch.zeros(n, dtype=torch.float64, device=place)
        self.length = 0.0

    def add(self, taken: Tensor, given: Tensor, real: Tensor | None) -> None:
        """taken: what the projection takes in under the mask; given: what it gives out in the dense model; real: no padding."""
        z = taken.flatten(0, -2).to(self.weight)[:, self.columns]
        b = given.flatten(0, -2).to(self.weight)[:, self.channels] - self.bias
        if real is not None and real.numel() == len(z):
            z, b = z[real.flatten().bool()], b[real.flatten().bool()]
        self.products += (z.T @ z).double()
        self.targets += (z * (b @ self.weight)).double().sum(0)
        self.length += float(b.double().square().sum())

    def equations(self) -> Equations:
        weight, part = self.weight.double(), self.site.part
        belongs = torch.zeros(len(part), int(part.max()) + 1, dtype=torch.float64)
        belongs[torch.arange(len(part)), part] = 1.0
        products = (self.products * (weight.T @ weight)).cpu()
        return Equations(belongs.T @ products @ belongs, belongs.T @ self.targets.cpu(), self.length)


def _measure(
    model: nn.Module, gates: Gates, mask: Mask, batches: Batches, switch: _Switch, site: Site | None
) -> tuple[float, Equations | None]:
    """The mean loss of a row under the mask and the factors so far, and the equations of one site, from the same passes."""
    total, rows = 0.0, 0
    sums, switch.path = (None, "") if site is None else (_Sums(model, site), site.path)
    for _, inputs in batches():
        features = {name: value for name, value in inputs.items() if name != "labels"}
        given = None
        if sums is not None:
            switch.on = False
            gates.set(gates.anatomy.full_mask())
            model(**features)
            given = switch.given
        switch.on = True
        gates.set(mask)
        logits = cast(Any, model(**features)).logits
        total, rows = total + float(summed_loss(logits, inputs["labels"])), rows + len(logits)
        if sums is not None and switch.taken is not None and given is not None:
            sums.add(switch.taken, given, features.get("attention_mask"))
    switch.path, switch.on, switch.taken, switch.given = "", False, None, None
    return total / rows, None if sums is None else sums.equations()
