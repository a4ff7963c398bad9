"""Lesions: pre-trained weights destroyed on purpose, to ask what a ticket owes to them.

A ticket that trains as well from re-initialised or shuffled weights owes nothing to pre-training (Chen et al. 2020, sec. 3: the
controls θ0' and θ0''). Each function works in place, on a model that holds no mask, and draws from CPU generators of its own: the
result depends on the seed, and on nothing else that is random. What a lesion of a whole model reaches, `LESIONS` says; what one
of parts reaches, in some layers, `PARTS` says (after the released code of Prasanna et al. 2020, X4 to X9 of the reproduction's
list).
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from tombola.anatomy import Anatomy, Projection, evaluating, probe_inputs
from tombola.errors import AnatomyError
from tombola.mask import Mask
from tombola.scope import SCOPES, scope_parameters

Lesion = Callable[[nn.Module, Anatomy, int], None]


def reinitialise(
    model: nn.Module, names: Iterable[str], seed: int, only: Mapping[str, Bool[Tensor, "..."]] | None = None
) -> None:
    """Draws the named parameters again: weights of Linear and Embedding from N(0, config.initializer_range), biases 0, the weight
    of a LayerNorm 1; the padding row of an embedding is 0, as before any training.

    Each parameter has a generator of its own, seeded by (seed, name): what one becomes does not depend on which others are named,
    nor on dtype, device or threads. only: name → which of its values are drawn; the others stay, bit for bit.

    Raises: AnatomyError, before anything is changed, for names that the model does not have, parameters whose initial values
    this rule does not know, and a config without initializer_range.
    Source: the initialiser of transformers 5 for BERT, RoBERTa, ELECTRA and DistilBERT, written out so that no version of it
    changes a result.
    """
    parameters = _named(model, names)
    fresh = {name: _initial(model, name) for name in parameters}
    unknown = sorted(name for name, draw in fresh.items() if draw is None)
    if unknown:
        raise AnatomyError(
            "it is not known how these parameters are initialised",
            got=_few([f"{name} of {type(_owner(model, name)).__name__}" for name in unknown]),
            expected="weights of Linear, Embedding (a learned one) and LayerNorm, and biases",
            next="name other parameters, or a scope without them: body+embeddings",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            draw = fresh[name]
            assert draw is not None
            _put(parameter, draw(parameter, _generator(seed, name)), None if only is None else only[name])


def shuffle_values(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Permutes the values of each named parameter within it: its values stay, their places do not.

    Every permutation is equally likely, and each parameter has a generator of its own, as in `reinitialise`.
    Raises: AnatomyError for names that the model does not have.
    """
    with torch.no_grad():
        for name, parameter in _named(model, names).items():
            order = torch.randperm(parameter.numel(), generator=_generator(seed, name)).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].reshape(parameter.shape))


def shuffle_layers(model: nn.Module, anatomy: Anatomy, seed: int) -> tuple[int, ...]:
    """Deals the layers' matrices out anew: layer i gets those of layer `order[i]`, all of q, k, v, o and the MLP together.

    Biases, norms, embeddings and the pooler stay where they are. Returns `order`: a permutation of the layers, never the
    identity, every other one equally likely.

    Raises: AnatomyError for a model of one layer, or with layers of different shape; nothing is changed then.
    Source: Chen et al. 2020, the control θ0''. Deviation: their permutation is unseeded, and may be the identity.
    """
    if anatomy.n_layers < 2:
        raise AnatomyError("there are no layers to shuffle", got=f"{anatomy.n_layers} layer", next="take shuffle-values")
    layers = [
        [model.get_parameter(f"{path}.weight") for path in dict.fromkeys(p.path for p in layer.projections)]  # fused ones once
        for layer in anatomy.layers
    ]
    shapes = {tuple(tuple(matrix.shape) for matrix in layer) for layer in layers}
    if len(shapes) > 1:
        raise AnatomyError(
            "the layers are of different shape, and cannot take each other's place", got=_few(sorted(map(str, shapes)))
        )
    order = tuple(range(anatomy.n_layers))
    generator = _generator(seed, "layers")
    while order == tuple(range(anatomy.n_layers)):
        order = tuple(torch.randperm(anatomy.n_layers, generator=generator).tolist())
    with torch.no_grad():
        for role in zip(*layers, strict=True):  # one role at a time: the copy is as large as one matrix of every layer
            before = [matrix.detach().clone() for matrix in role]
            for matrix, source in zip(role, order, strict=True):
                matrix.copy_(before[source])
    return order


def copy_values(
    model: nn.Module,
    source: nn.Module,
    names: Iterable[str],
    only: Mapping[str, Bool[Tensor, "..."]] | None = None,
    *,
    rotated: bool = False,
) -> None:
    """The named parameters become those of `source`, a model of the same architecture, bit for bit.

    only: name → which of its values are copied. rotated: each row takes the place of the next one, the last that of the first: of
    embeddings, the control in which every word has another's (X6).
    Raises: AnatomyError for names that either does not have.
    """
    own, others = _named(model, names), _named(source, names)
    with torch.no_grad():
        for name, parameter in own.items():
            value = others[name].roll(1, 0) if rotated else others[name]
            _put(parameter, value, None if only is None else only[name])


def add_noise(model: nn.Module, names: Iterable[str], std: float, seed: int) -> None:
    """Adds to each named parameter numbers of N(0, std), in place; a generator of its own for each, as in `reinitialise`.

    Raises: AnatomyError for names that the model does not have. Source: Chen et al. 2020, released scripts (X5).
    """
    with torch.no_grad():
        for name, parameter in _named(model, names).items():
            drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(
                0.0, std, generator=_generator(seed, f"noise|{name}")
            )
            parameter.add_(drawn.to(parameter))


def zero_values(model: nn.Module, only: Mapping[str, Bool[Tensor, "..."]]) -> None:
    """These values of weights become 0; biases and norms stay as they are (X5). Raises: AnatomyError for unknown names."""
    with torch.no_grad():
        for name, parameter in _named(model, only).items():
            if parameter.ndim >= 2:
                _put(parameter, torch.zeros_like(parameter), only[name])


# ------------------------------------------------------------------------------------------------------- parts of a model


def part_values(model: nn.Module, anatomy: Anatomy, what: str, layers: Sequence[int]) -> dict[str, Bool[Tensor, "..."]]:
    """Parameter name → which of its values belong to `what`, names of `PARTS` joined by "+", in these layers.

    Of q, k, v that are fused into one parameter the slice of each. Raises: AnatomyError for unknown parts and layers.
    """
    unknown = [term for term in what.split("+") if term not in PARTS]
    outside = [layer for layer in layers if not 0 <= layer < anatomy.n_layers]
    if unknown or outside:
        raise AnatomyError(
            "there are no such parts of a model",
            got=", ".join([*unknown, *(f"layer {layer}" for layer in outside)]),
            expected=f"{', '.join(PARTS)}, joined by +, in layers 0…{anatomy.n_layers - 1}",
        )
    found: dict[str, Tensor] = {}
    for term in what.split("+"):
        for name, of in PARTS[term](model, anatomy, layers).items():
            found[name] = found[name] | of if name in found else of
    return found


def head_values(anatomy: Anatomy, kept: Bool[Tensor, "attention head"], which: str = "all") -> dict[str, Bool[Tensor, "..."]]:
    """Parameter name → the values of the heads that are not kept (X9).

    all      their q, k, v rows with biases and their columns of o; a kv-head's once no head that reads it is kept
    o        their columns of o alone
    o-rows   the rows of o of the same numbers, as released: these belong to no head

    Raises: AnatomyError for another `which`, and for o-rows of an o that is not square.
    """
    if which not in ("all", "o", "o-rows"):
        raise AnatomyError(f"heads have no values {which!r}", expected="all, o, o-rows")
    if which == "all":
        return {name: ~part for name, part in anatomy.as_values(Mask(heads=kept)).items()}
    found = {}
    for attention, heads in zip(anatomy.attentions, kept, strict=True):
        o, lost = attention.o, ~heads.repeat_interleave(attention.d_head)
        if which == "o-rows" and o.n_in != o.n_out:
            raise AnatomyError("the rows of o are not as many as its columns", got=f"{o.n_out} and {o.n_in}", next="take o")
        along_rows = (which == "o-rows") != o.transposed
        name = f"{o.path}.weight"
        found[name] = (lost[:, None] if along_rows else lost).expand(anatomy.shapes[name])
    return {name: of for name, of in found.items() if bool(of.any())}


@contextmanager
def without_residual(
    model: nn.Module, anatomy: Anatomy, layers: Sequence[int], form: Literal["drop", "double"] = "drop"
) -> Iterator[None]:
    """The model in eval mode without the residual around the MLP of these layers (X7); afterwards it is as it was.

    drop     the norm after the MLP gets the MLP's output alone
    double   it gets that output twice, as the released code has it, which adds the branch to itself

    Weights are not touched. The norm is found on a probe: the one whose input is the MLP's input plus its output, bit for bit.
    Raises: AnatomyError for layers the model does not have, or where no norm gets that sum, as in pre-norm models.
    """
    outside = [layer for layer in layers if not 0 <= layer < anatomy.n_layers]
    if outside:
        raise AnatomyError("there are no such layers", got=outside, expected=f"0…{anatomy.n_layers - 1}")
    factor, handles = 2.0 if form == "double" else 1.0, list[Any]()
    with evaluating(model):
        norms = _norms_after_mlps(model, anatomy, layers)
        try:
            for layer, norm in norms.items():
                branch: list[Tensor] = []  # what the MLP gave last; of each layer its own
                out = model.get_submodule(anatomy.layers[layer].mlp.out.path)
                handles.append(out.register_forward_hook(lambda _, __, y, branch=branch: branch.__setitem__(slice(None), [y])))
                handles.append(norm.register_forward_pre_hook(lambda _, __, branch=branch: (factor * branch[0],)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _norms_after_mlps(model: nn.Module, anatomy: Anatomy, layers: Sequence[int]) -> dict[int, nn.Module]:
    found: dict[int, nn.Module] = {}
    seen: dict[tuple[int, str], Tensor] = {}
    handles = []
    for layer in layers:
        parts = anatomy.layers[layer]
        into, out = (model.get_submodule(one.path) for one in (parts.mlp.ins[0], parts.mlp.out))

        def enter(_: nn.Module, args: tuple[Any, ...], layer: int = layer) -> None:
            seen[layer, "in"] = args[0]

        def leave(_: nn.Module, __: tuple[Any, ...], y: Tensor, layer: int = layer) -> None:
            seen[layer, "out"] = y

        def norm(module: nn.Module, args: tuple[Any, ...], layer: int = layer) -> None:
            sides = [seen.get((layer, side)) for side in ("in", "out")]
            x, y = sides
            if x is not None and y is not None and x.shape == y.shape and torch.equal(args[0], x + y):
                found.setdefault(layer, module)

        handles += [into.register_forward_pre_hook(enter), out.register_forward_hook(leave)]
        inside = model.get_submodule(parts.path).modules()
        handles += [one.register_forward_pre_hook(norm) for one in inside if isinstance(one, nn.LayerNorm)]
    try:
        with torch.no_grad():
            model(**probe_inputs(model, 2))
    finally:
        for handle in handles:
            handle.remove()
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise AnatomyError(
            f"the residual of the MLP is not added right before a LayerNorm in this {type(model).__name__}",
            got=f"layers {', '.join(map(str, missing))}",
            expected="a post-norm model, such as BERT, RoBERTa, ELECTRA or DistilBERT",
        )
    return found


PartValues = Callable[[nn.Module, Anatomy, Sequence[int]], dict[str, Tensor]]


def _projections(choose: Callable[[Any], Iterable[Projection]]) -> PartValues:
    """The values, bias included, of some projections of each layer."""

    def values(model: nn.Module, anatomy: Anatomy, layers: Sequence[int]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for projection in (one for layer in layers for one in choose(anatomy.layers[layer])):
            for kind in ("weight", "bias") if projection.has_bias else ("weight",):
                name = f"{projection.path}.{kind}"
                of = torch.zeros(anatomy.shapes[name], dtype=torch.bool)
                along = of.T if kind == "weight" and projection.transposed else of
                along[projection.channels()] = True
                found[name] = found[name] | of if name in found else of
        return found

    return values


def _words(model: Any, anatomy: Anatomy, layers: Sequence[int]) -> dict[str, Tensor]:
    """The table of word embeddings, which is in no layer."""
    table = model.get_input_embeddings().weight
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p is table}


def _whole_layers(model: nn.Module, anatomy: Anatomy, layers: Sequence[int]) -> dict[str, Tensor]:
    """Every parameter of a layer, norms included."""
    paths = tuple(f"{anatomy.layers[layer].path}." for layer in layers)
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if name.startswith(paths)}


# What lesions of parts can reach: name -> (model, anatomy, layers) -> parameter name -> which of its values.
PARTS: dict[str, PartValues] = {
    "words": _words,
    "q": _projections(lambda layer: [one.q for one in layer.attentions]),
    "k": _projections(lambda layer: [one.k for one in layer.attentions]),
    "v": _projections(lambda layer: [one.v for one in layer.attentions]),
    "o": _projections(lambda layer: [one.o for one in layer.attentions]),
    "in": _projections(lambda layer: layer.mlp.ins),
    "out": _projections(lambda layer: [layer.mlp.out]),
    "layer": _whole_layers,
}


# ------------------------------------------------------------------------------------------------------- of a whole model


def _reinit_body(model: nn.Module, anatomy: Anatomy, seed: int) -> None:
    """Weights and biases of attention and MLPs; norms, embeddings and pooler stay pre-trained."""
    reinitialise(model, scope_parameters(model, anatomy, "body"), seed)


def _reinit_body_embeddings(model: nn.Module, anatomy: Anatomy, seed: int) -> None:
    """The same and the embeddings: the control θ0' of Chen et al. 2020."""
    reinitialise(model, scope_parameters(model, anatomy, "body+embeddings"), seed)


def _random_init(model: nn.Module, anatomy: Anatomy, seed: int) -> None:
    """Everything but the task's head, which is drawn by the head seed of its own: nothing pre-trained is left."""
    head = set(SCOPES["head"](model, anatomy))
    reinitialise(model, [name for name, _ in model.named_parameters() if name not in head], seed)


def _shuffle_values(model: nn.Module, anatomy: Anatomy, seed: int) -> None:
    """The matrices of attention and MLPs; their biases stay."""
    shuffle_values(model, scope_parameters(model, anatomy, "body:weights"), seed)


def _shuffle_layers(model: nn.Module, anatomy: Anatomy, seed: int) -> None:
    """See `shuffle_layers`."""
    shuffle_layers(model, anatomy, seed)


# What can be done to a model: name -> lesion(model, anatomy, seed), in place.
LESIONS: dict[str, Lesion] = {
    "reinit-body": _reinit_body,
    "reinit-body-embeddings": _reinit_body_embeddings,
    "random-init": _random_init,
    "shuffle-values": _shuffle_values,
    "shuffle-layers": _shuffle_layers,
}


def _initial(model: nn.Module, name: str) -> Callable[[Tensor, torch.Generator], Tensor] | None:
    """How the named parameter is initialised, or None when that is not known."""
    module, kind = _owner(model, name), name.rpartition(".")[2]
    if kind == "bias":
        return lambda parameter, _: torch.zeros_like(parameter)
    if kind != "weight":
        return None
    if isinstance(module, nn.LayerNorm):  # some of the RMSNorms of newer models start at 0, not at 1
        return lambda parameter, _: torch.ones_like(parameter)
    # DistilBERT can have a table of sinusoids for positions, which is computed and not drawn.
    computed = bool(getattr(model.config, "sinusoidal_pos_embds", False)) and "position_embeddings" in name
    if not isinstance(module, nn.Linear | nn.Embedding) or computed:
        return None
    std, padding_row = _std(model), getattr(module, "padding_idx", None)

    def draw(parameter: Tensor, generator: torch.Generator) -> Tensor:
        # float32 on the CPU whatever the model is in, so that the same seed gives the same weights
        drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        if padding_row is not None:
            drawn[padding_row] = 0.0
        return drawn

    return draw


def _std(model: nn.Module) -> float:
    std = getattr(model.config, "initializer_range", None)
    if not isinstance(std, int | float) or not std > 0:
        raise AnatomyError(
            f"the config of this {type(model).__name__} does not say how its weights are drawn",
            got=f"initializer_range = {std}",
            expected="a standard deviation above 0; BERT's is 0.02",
            next="set config.initializer_range",
        )
    return std


def _put(parameter: Tensor, value: Tensor, only: Tensor | None) -> None:
    """`value` in place of the parameter's, or of those of its values that `only` says."""
    value = value.to(parameter)
    parameter.copy_(value if only is None else torch.where(only.to(parameter.device), value, parameter))


def _named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    parameters, wanted = dict(model.named_parameters()), list(names)
    missing = [name for name in wanted if name not in parameters]
    if missing:
        near = difflib.get_close_matches(missing[0], parameters, n=1)
        raise AnatomyError(
            "the model does not have these parameters",
            got=_few(missing),
            expected=f"names of model.named_parameters(), such as {_few(list(parameters)[:3])}",
            next=f"did you mean {near[0]!r}?" if near else "a tied parameter has the name under which it comes first",
        )
    return {name: parameters[name] for name in wanted}


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # a seed is a signed 64-bit number


def _few(found: list[str]) -> str:
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
