"""Checkpoints whose heads transformers 4 pruned (`prune_heads`, `config.pruned_heads`), which transformers 5 cannot load."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tombola.anatomy import read_anatomy
from tombola.cut import shrink
from tombola.errors import TombolaError
from tombola.mask import Mask
from tombola.source import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_pruned_heads(name: Path | str, auto: str = "AutoModelForSequenceClassification") -> "PreTrainedModel":
    """The shrunk model that a folder or Hub repository of transformers 4 holds, in eval mode: same weights, heads gone as said.

    auto: the Auto class of transformers to load it as. The result saves and loads like every shrunk model (`shrink`).
    Raises: TombolaError when its config has no `pruned_heads`, or they and the weights do not fit together.
    """
    import transformers

    folder = resolve_model(str(name)).folder
    said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("pruned_heads")
    if not said:
        raise TombolaError(
            f"{name} has no heads pruned by transformers 4",
            got=f"pruned_heads: {said}",
            expected="config.json with pruned_heads, {layer: [heads]}",
            next="load it with transformers",
        )
    kind: Any = getattr(transformers, auto)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.__dict__.pop("pruned_heads", None)
    dense = kind.from_config(config).eval()
    anatomy = read_anatomy(dense)
    heads = torch.ones(anatomy.n_attentions, anatomy.n_heads, dtype=torch.bool)
    try:
        removed = [(int(layer), int(head)) for layer, of in said.items() for head in of]
        wrong = [one for one in removed if not (0 <= one[0] < len(heads) and 0 <= one[1] < anatomy.n_heads)]
    except (ValueError, TypeError, AttributeError) as error:
        raise TombolaError(f"pruned_heads of {name} cannot be read", got=said, expected="{layer: [heads]}") from error
    if wrong or anatomy.n_attentions != anatomy.n_layers:
        raise TombolaError(
            f"pruned_heads of {name} do not fit this {anatomy.model_type}",
            got=f"(layer, head): {wrong[:6]}" if wrong else "a model with cross-attention",
            expected=f"layer in 0…{len(heads) - 1}, head in 0…{anatomy.n_heads - 1}",
        )
    for layer, head in removed:
        heads[layer, head] = False
    empty: Any = shrink(dense, Mask(heads=heads), anatomy)
    try:
        model, found = type(empty).from_pretrained(folder, config=empty.config, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise _misfit(name, str(error).strip().partition("\n")[0][:200]) from error
    heads_of_task = set(dense.state_dict()) - {key for key in dense.state_dict() if key.startswith(f"{dense.base_model_prefix}.")}
    missing = [key for key in found["missing_keys"] if key not in heads_of_task]
    if missing or found.get("mismatched_keys"):
        raise _misfit(name, f"missing: {sorted(missing)[:4]}, of another shape: {list(found.get('mismatched_keys', ()))[:4]}")
    return model.eval()


def _misfit(name: object, got: str) -> TombolaError:
    return TombolaError(
        f"the weights of {name} are not those that its pruned_heads say",
        got=got,
        expected="the weights that transformers 4 saved after prune_heads, under the names that this transformers has",
        next="look whether config.json and the weights are of the same checkpoint",
    )
