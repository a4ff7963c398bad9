"""Lesions: pre-trained weights destroyed on purpose, to ask what a ticket owes to them.

A ticket that trains as well from re-initialised or shuffled weights owes nothing to pre-training (Chen et al. 2020, sec. 3: the
controls θ0' and θ0''). Each function works in place, on a model that holds no mask, and draws from CPU generators of its own: the
result depends on the seed, and on nothing else that is random. Which parameters a lesion reaches, `LESIONS` says.
"""

import difflib
import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from tombola.anatomy import Anatomy
from tombola.errors import AnatomyError
from tombola.scope import SCOPES, scope_parameters

Lesion = Callable[[nn.Module, Anatomy, int], None]


def reinitialise(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Draws the named parameters again: weights of Linear and Embedding from N(0, config.initializer_range), biases 0, the weight
    of a LayerNorm 1; the padding row of an embedding is 0, as before any training.

    Each parameter has a generator of its own, seeded by (seed, name): what one becomes does not depend on which others are named,
    nor on dtype, device or threads.

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
            parameter.copy_(draw(parameter, _generator(seed, name)))


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


def copy_values(model: nn.Module, source: nn.Module, names: Iterable[str]) -> None:
    """The named parameters become those of `source`, a model of the same architecture, bit for bit.

    Raises: AnatomyError for names that either does not have.
    """
    own, others = _named(model, names), _named(source, names)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(others[name])


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
