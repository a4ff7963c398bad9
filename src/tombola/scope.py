"""Scopes: which parameters of a model are maskable, value by value.

A scope is text: terms joined by "+". A term is a name of `SCOPES`, a parameter's own name, or a pattern over names with
`*`; and it may end in `:weights` or `:biases`. "body:weights+pooler:weights" are the 73 matrices of Chen et al. 2020.
What belongs to the body is the anatomy's knowledge, so that the same scope means the same on any architecture.
"""

import difflib
import fnmatch
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from tombola.anatomy import Anatomy
from tombola.errors import MaskError
from tombola.mask import Mask

Selector = Callable[[nn.Module, Anatomy], list[str]]


def _body(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Weights and biases of every projection of attention and MLP; neither norms nor embeddings."""
    paths = [projection.path for layer in anatomy.layers for projection in layer.projections]
    return [f"{path}.{name}" for path in dict.fromkeys(paths) for name, _ in model.get_submodule(path).named_parameters()]


def _embeddings(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The table of every embedding: words, and positions and segments where they are learned."""
    return [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)]


def _pooler(model: nn.Module, anatomy: Anatomy) -> list[str]:
    return [name for name, _ in model.named_parameters() if "pooler" in name.split(".")]


def _head(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Everything outside the pre-trained part: what a task adds."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)] if hasattr(model, prefix[:-1]) else []


def _prasanna2020(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The m-prunable set: the body without the bias of MLP out. BERT-base: 85,008,384 values."""
    return [name for name in _body(model, anatomy) if name not in {f"{mlp.out.path}.bias" for mlp in anatomy.mlps}]


def _chen2020(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The matrices of the body and the pooler. BERT-base: 73, with 85,524,480 values."""
    return [name for name in _body(model, anatomy) + _pooler(model, anatomy) if name.endswith("weight")]


def _liu2022(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Those of Chen et al. 2020 and the classifier's."""
    return _chen2020(model, anatomy) + [name for name in _head(model, anatomy) if name.endswith("weight")]


SCOPES: dict[str, Selector] = {
    "body": _body,
    "pooler": _pooler,
    "embeddings": _embeddings,
    "head": _head,
    "prasanna2020": _prasanna2020,
    "chen2020": _chen2020,
    "liu2022": _liu2022,
}

# ":weights" and ":biases" go by the number of axes: what a norm calls its weight is a vector, and is pruned by nobody.
KINDS: Mapping[str, Callable[[Tensor], bool]] = {"weights": lambda p: p.ndim >= 2, "biases": lambda p: p.ndim == 1}


def scope_parameters(model: nn.Module, anatomy: Anatomy, scope: str) -> dict[str, nn.Parameter]:
    """The maskable parameters of a scope, by name and in the model's own order; each once, tied ones under their first name.

    Raises: MaskError for a term that is unknown (the nearest is offered) or that matches nothing in this model.
    """
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for term in scope.split("+"):
        what, _, kind = term.strip().partition(":")
        if (what not in SCOPES and "*" not in what and what not in parameters) or kind not in ("", *KINDS):
            known = [*SCOPES, *parameters]
            near = difflib.get_close_matches(term.strip(), [*known, *(f"{one}:{kind}" for one in known for kind in KINDS)], n=1)
            raise MaskError(
                f"there is no scope {term.strip()!r}",
                got=scope,
                expected=f"terms joined by +: {', '.join(SCOPES)}, a parameter's name, or a pattern with *; each may end in "
                ":weights or :biases",
                next=f"did you mean {near[0]!r}?" if near else None,
            )
        names = SCOPES[what](model, anatomy) if what in SCOPES else fnmatch.filter(parameters, what)
        # A name that is not among the model's own is that of a tied parameter, which counts where it is owned.
        names = [name for name in names if name in parameters and (not kind or KINDS[kind](parameters[name]))]
        if not names:
            raise MaskError(
                f"the scope {term.strip()!r} matches nothing in this {type(model).__name__}",
                got=scope,
                expected="a term that names at least one parameter",
                next="`tombola inspect MODEL` lists what each scope holds",
            )
        chosen.update(names)
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def scope_sizes(model: nn.Module, anatomy: Anatomy) -> dict[str, int]:
    """Maskable values of every named scope that this model has, of the body's weights and biases alone, and of s-pruning's finer
    and coarser units: neurons, and whole layers (all heads and MLPs)."""
    sizes = {"layers": anatomy.size(Mask()).maskable_values}
    if anatomy.d_ffn is not None:
        sizes = {"neurons": anatomy.size(anatomy.full_mask("neurons")).maskable_values} | sizes
    for scope in (*SCOPES, "body:weights", "body:biases"):
        try:
            sizes[scope] = sum(parameter.numel() for parameter in scope_parameters(model, anatomy, scope).values())
        except MaskError:  # this model has no pooler, or no head outside its base
            continue
    return sizes
