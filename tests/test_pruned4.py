"""Checkpoints as transformers 4 wrote them after `prune_heads`: made by hand, held against the gated dense model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tombola
from conftest import tiny_family
from test_families import furthest, known, logits, mask_without
from tombola.errors import TombolaError
from tombola.gates import Gates
from tombola.pruned4 import load_pruned_heads

WIDTH, D = 24, 6


def written(folder: Path, kind: str, pruned: dict[str, list[int]]) -> Any:
    """The dense model; into `folder` goes what transformers 4 makes of it: rows of q, k, v and columns of o index-selected."""
    model = tiny_family(kind)
    state: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    for layer, heads in pruned.items():
        stays = torch.tensor([i for i in range(WIDTH) if i // D not in heads], dtype=torch.long)
        if kind == "gpt2":
            at = f"transformer.h.{layer}.attn."
            three = torch.cat([stays, stays + WIDTH, stays + 2 * WIDTH])
            state[at + "c_attn.weight"] = state[at + "c_attn.weight"][:, three].contiguous()
            state[at + "c_attn.bias"] = state[at + "c_attn.bias"][three]
            state[at + "c_proj.weight"] = state[at + "c_proj.weight"][stays].contiguous()
            continue
        at, names, o = {
            "bert": (f"bert.encoder.layer.{layer}.attention.", ("self.query", "self.key", "self.value"), "output.dense"),
            "distilbert": (f"distilbert.transformer.layer.{layer}.attention.", ("q_lin", "k_lin", "v_lin"), "out_lin"),
        }[kind]
        for name in names:
            for part in ("weight", "bias"):
                state[f"{at}{name}.{part}"] = state[f"{at}{name}.{part}"][stays]
        state[f"{at}{o}.weight"] = state[f"{at}{o}.weight"][:, stays].contiguous()
    model.config.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"pruned_heads": pruned, "transformers_version": "4.41.0"}))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2"])
@pytest.mark.parametrize("pruned", [{"0": [1, 3], "1": [0]}, {"1": [0, 1, 2, 3]}])
def test_a_checkpoint_of_transformers_4_is_the_dense_model_without_these_heads(
    kind: str, pruned: dict[str, list[int]], tmp_path: Path
) -> None:
    dense = written(tmp_path, kind, pruned)
    anatomy = known(kind)[1]
    small = load_pruned_heads(tmp_path)
    with Gates(dense, anatomy, mask_without(anatomy, [(int(layer), head) for layer in pruned for head in pruned[layer]])):
        expected = logits(dense)
    assert furthest(logits(small), expected) < 1e-5 * float(expected.abs().max())
    assert not hasattr(small.config, "pruned_heads")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "bert", {"0": [1]})
    said = json.loads((tmp_path / "config.json").read_text())

    def change(pruned: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(said | {"pruned_heads": pruned}))

    for pruned, message in (
        ({}, "no heads pruned"), ({"7": [0]}, "do not fit this bert"), ({"0": [9]}, "do not fit this bert"),
        ([1, 2], "cannot be read"), ({"a": [1]}, "cannot be read"), ({"0": [1, 2]}, "are not those"),
        ({"1": [1]}, "are not those"),
    ):  # fmt: skip
        change(pruned)
        with pytest.raises(TombolaError, match=message):
            load_pruned_heads(tmp_path)
    assert tombola.load_pruned_heads is load_pruned_heads
