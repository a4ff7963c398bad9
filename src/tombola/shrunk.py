"""A model that is physically smaller than its config says: how it is built, saved, and loaded again.

A shrunk model is an ordinary `PreTrainedModel` of one family, some of whose modules are narrower, layer by layer, or gone. Its
config is the family's own, with the numbers of the dense model, and a plan (`config.tombola`) of what is narrower: by that plan
an empty model is given its shapes before its weights are read. One template makes the classes for every family of transformers.

This file needs torch and transformers and nothing else of tombola: it is also what is written beside the weights for those who
have no tombola (`trust_remote_code`). Where attention keeps its numbers is the heart of it, see `_COUNTS` and `_OwnHeads`.

The plan, as JSON:
    format     1
    base       model type of the family: "bert"
    linear     path of a linear module → [inputs, outputs] it has
    gone       path of a linear module → [outputs, bias]: nothing is computed, its output is its bias ("bias") or zero ("zero")
    attention  path of the module that cuts q, k and v into heads → the heads it has, of how many, and the same of kv-heads
"""

import functools
import inspect
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

FORMAT = 1
MODEL_TYPE = "tombola"  # of config.json: plain transformers says that it does not know it, and never loads half a model
FIELD = "tombola"  # where the plan is in config.json
PREFIX = "Shrunk"  # of the names of classes
CODE = "modeling_tombola"  # what this file is called beside weights


# ------------------------------------------------------------------------------------------------------- what is gone


class Zeros(nn.Module):
    """In the place of a linear map that has no outputs left: zeros [..., n_out], as wide as one head, which costs nothing.

    An attention without heads so keeps one head of zeros, and everything around it (views, rotations, caches of the right
    length) goes its ordinary way.
    """

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.n_out = n_out
        self.register_buffer("weight", torch.empty(0), persistent=False)  # some families ask for its type
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.n_out).clone()


class Constant(nn.Module):
    """In the place of a linear map that has no inputs left: its bias, or zeros, at every position."""

    def __init__(self, n_out: int, bias: bool) -> None:
        super().__init__()
        self.n_out = n_out
        self.register_buffer("weight", torch.empty(0), persistent=False)
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        value = x.new_zeros(()) if self.bias is None else self.bias
        return value.expand(*x.shape[:-1], self.n_out).clone()  # its own memory: some models add in place


# -------------------------------------------------------------------------------------------- heads of an attention


# What an attention module calls its numbers. One is changed only where it is what the dense model has.
_COUNTS: dict[str, str] = {
    "num_attention_heads": "heads",
    "num_heads": "heads",
    "n_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_kv_heads": "kv_heads",
    "kv_heads": "kv_heads",
    "num_key_value_groups": "groups",
    "all_head_size": "width",
    "inner_dim": "width",
    "split_size": "width",
    "embed_dim": "width",
    "kv_dim": "kv_width",
}
# Arguments of an attention's forward that hold something for each head of the dense model: these pick their own.
_PER_HEAD = ("position_bias", "alibi", "attention_mask")
# Attentions that read the number of heads from the config while they run.
_READ_CONFIG = ("Phi3Attention",)


def _numbers(heads: int, kv_heads: int, d_head: int) -> dict[str, int]:
    width, kv_width = heads * d_head, kv_heads * d_head
    return {"heads": heads, "kv_heads": kv_heads, "groups": heads // kv_heads, "width": width, "kv_width": kv_width}


class _OwnHeads:
    """Before an attention class: of what comes in for all heads of the dense model, the heads that are left here."""

    _names: tuple[str, ...]  # of the arguments of forward, in their order
    _heads: list[int]
    _of: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        own = {name: self._own(name, value) if name in _PER_HEAD else value for name, value in given.items()}
        return super().forward(**own)  # type: ignore[misc]

    def _own(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name == "alibi" and value.ndim == 3:  # [batch · head, 1, key]
            return value.reshape(-1, self._of, *value.shape[1:])[:, self._heads].flatten(0, 1)
        return value[:, self._heads] if value.ndim == 4 and value.shape[1] == self._of else value


class _OwnBias(_OwnHeads):
    """T5: the first layer makes the bias of positions for all layers, so it hands on what all heads of the dense model have."""

    def compute_bias(self, *args: Any, **kwargs: Any) -> Tensor:
        whole: Tensor = super().compute_bias(*args, **kwargs)  # type: ignore[misc]
        self._whole = whole
        return whole[:, self._heads]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        attended, own, *rest = super().forward(**given)
        whole, made = given.get("position_bias"), self.__dict__.pop("_whole", None)
        if made is not None:
            # The first releases of transformers 5 have added the mask of padding by now, the same for all heads.
            whole = made + (own[:, :1] - made[:, self._heads[:1]])
        return (attended, whole, *rest)  # without a bias the next layer makes its own zeros


class _OwnConfig:
    """A config seen from one attention: the number of heads is its own, everything else the model's."""

    def __init__(self, config: Any, own: Mapping[str, int]) -> None:
        self.__dict__.update(_config=config, **own)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_config" not in self.__dict__:  # half made, while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)


@functools.cache
def _with_own_heads(attention: Any) -> Any:
    adapter = _OwnBias if hasattr(attention, "compute_bias") else _OwnHeads
    names = tuple(inspect.signature(attention.forward).parameters)[1:]
    return type(PREFIX + attention.__name__, (adapter, attention), {"_names": names, "__module__": __name__})


def _set_heads(module: nn.Module, said: Mapping[str, Any]) -> None:
    kept, of, kv_heads, kv_of, d_head = (said[name] for name in ("heads", "of", "kv_heads", "kv_of", "d_head"))
    dense, own = _numbers(of, kv_of, d_head), _numbers(len(kept), kv_heads, d_head)
    for name, which in _COUNTS.items():
        if getattr(module, name, None) == dense[which]:
            setattr(module, name, own[which])
    if type(module).__name__ in _READ_CONFIG:
        counts = {"num_attention_heads": own["heads"], "num_key_value_heads": own["kv_heads"]}
        module.config = _OwnConfig(module.config, counts)  # type: ignore[assignment]
    takes = inspect.signature(type(module).forward).parameters
    if {"position_bias", "alibi"} & takes.keys() and not isinstance(module, _OwnHeads):
        kind: Any = type(module)
        module.__class__ = _with_own_heads(kind)
    if isinstance(module, _OwnHeads):
        module._heads, module._of = list(kept), of


# ------------------------------------------------------------------------------------------------- a model by its plan


def resize(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Gives `model`, which has the dense shapes or these already, in place the shapes of `plan`; weights lose their last rows.

    Raises: ValueError when the plan is of a newer format, names modules that the model does not have, or widens one.
    """
    if plan.get("format") != FORMAT:
        raise ValueError(f"this shrunk model is of format {plan.get('format')}, and this tombola reads {FORMAT}: upgrade tombola")
    for path, (n_out, bias) in plan["gone"].items():
        at, module = _find(model, path)
        if not isinstance(module, Zeros | Constant):
            reference = next(module.parameters())
            stub = Constant(n_out, bias == "bias") if bias in ("bias", "zero") else Zeros(n_out)
            model.set_submodule(at, stub.to(reference.device, reference.dtype))
    for path, (n_in, n_out) in plan["linear"].items():
        _narrow(path, _find(model, path)[1], n_in, n_out)
    for path, said in plan["attention"].items():
        _set_heads(_find(model, path)[1], said)


def become_shrunk(model: nn.Module) -> None:
    """Gives `model`, and every model inside it, in place the class of the shrunk models of its class.

    Those inside too: transformers renames the weights of classes of its own in files, below the models that have them, and must
    find the same names with a head and without.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind: Any = type(module)
            if not kind.__name__.startswith(PREFIX):
                module.__class__ = shrunk_class(kind)
            for name in ("transformers.utils.output_capturing", "transformers.utils.generic"):  # by release
                registry = getattr(sys.modules.get(name), "_CAN_RECORD_REGISTRY", None)
                if registry is not None:  # as a constructor does it: which modules give hidden states and attentions
                    dict.__setitem__(registry, str(type(module)), module._can_record_outputs)


def _find(model: nn.Module, path: str) -> tuple[str, Any]:
    """A module and its path here: of a model with a head, or of one without, whichever the plan was made for."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    raise ValueError(f"the plan of this shrunk model names {path}, which a {type(model).__name__} of this transformers has not")


def _narrow(path: str, module: Any, n_in: int, n_out: int) -> None:
    transposed = hasattr(module, "nf")  # GPT-2's Conv1D
    shape = (n_in, n_out) if transposed else (n_out, n_in)
    weight, bias = module.weight, module.bias
    if any(own > dense for own, dense in zip(shape, weight.shape, strict=True)):
        raise ValueError(f"the plan of this shrunk model widens {path}: {shape} of {tuple(weight.shape)}")
    if tuple(weight.shape) != shape:
        module.weight = nn.Parameter(weight.detach()[: shape[0], : shape[1]].clone(), weight.requires_grad)
    if bias is not None and len(bias) != n_out:
        module.bias = nn.Parameter(bias.detach()[:n_out].clone(), bias.requires_grad)
    if transposed:
        module.nx, module.nf = n_in, n_out
    else:
        module.in_features, module.out_features = n_in, n_out


# ------------------------------------------------------------------------------------------------ classes, by template


@functools.cache
def shrunk_config(base: Any) -> Any:
    """The class of config of shrunk models of a family: the family's own, under another model type."""

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        carries = getattr(self, "auto_map", None)
        if carries:  # of a Hub model it names the repository it came from
            self.auto_map = carry_code()
        saved = base.save_pretrained(self, save_directory, *args, **kwargs)
        if carries:
            shutil.copyfile(__file__, Path(save_directory) / f"{CODE}.py")
        return saved

    own = {"model_type": MODEL_TYPE, "__module__": __name__, "save_pretrained": save_pretrained}
    return type(PREFIX + base.__name__, (base,), own)


def carry_code() -> dict[str, str]:
    """For `config.auto_map`: a model whose config has it is saved with this file, and loads under trust_remote_code alone."""
    return {"AutoConfig": f"{CODE}.ShrunkConfig"}


@functools.cache
def shrunk_class(base: Any) -> Any:
    """The class of shrunk models of `base`, a model class of transformers: takes its shapes from the plan in its config."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        become_shrunk(self)
        resize(self, getattr(config, FIELD))

    own = {"__init__": __init__, "config_class": shrunk_config(base.config_class), "__module__": __name__}
    return type(PREFIX + base.__name__, (base,), own)


class ShrunkConfig(PreTrainedConfig):  # type: ignore[misc]
    """What Auto classes find under our model type: reads which family it is, and hands over to that family's config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's own config, the plan in it. Raises: ValueError when there is no plan, or of a family not known here."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        plan = config_dict.get(FIELD)
        if not isinstance(plan, dict) or not isinstance(plan.get("base"), str) or plan["base"] not in CONFIG_MAPPING:
            family = plan.get("base") if isinstance(plan, dict) else None
            raise ValueError(f"config.json has no plan of a shrunk model of a family that this transformers knows: {family}")
        if plan["base"] == MODEL_TYPE:
            raise ValueError("config.json has a plan of a shrunk model of no family")
        base = CONFIG_MAPPING[plan["base"]]
        _register_models(base)
        return shrunk_config(base).from_dict(config_dict, **kwargs)


@functools.cache
def _register_models(base: Any) -> None:
    """Every Auto class that knows a family knows its shrunk models from now on."""
    from transformers.models.auto import modeling_auto

    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not isinstance(auto, type) or base not in mapping:
            continue
        known = mapping[base]
        made = tuple(map(shrunk_class, known)) if isinstance(known, tuple | list) else shrunk_class(known)
        mapping.register(shrunk_config(base), made, exist_ok=True)


def register() -> None:
    """Auto classes of transformers load shrunk models from now on."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING.register(MODEL_TYPE, ShrunkConfig, exist_ok=True)


def __getattr__(name: str) -> Any:
    """ShrunkBertForSequenceClassification and the like, made when they are asked for: by pickles, and by `auto_map`."""
    import transformers

    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return shrunk_config(base) if issubclass(base, PreTrainedConfig) else shrunk_class(base)
