"""The step of a probe: what can be seen at one point of fine-tuning of when mask training may begin."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tombola.anatomy import Anatomy, read_anatomy
from tombola.evaluate import mean_loss
from tombola.objective import load_weights
from tombola.scores import row_outputs, summed_loss
from tombola.search.learned import LearnedSettings
from tombola.search.scored import ScoredMask
from tombola.study.begin import jaccard, update_overlap
from tombola.study.cells import Cell, Lab, write_json
from tombola.study.data import TaskData, encoded_rows, layout_of, same_data
from tombola.study.steps.losses import favoured_rows, loss_of
from tombola.tasks.encode import Encoded, collate

Progress = Callable[[float], None]


def run_probe(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """The probes of one point (`tombola.study.begin.PROBES`), those of two against the input `before`.

    The losses of the fine-tuned model are its own, in eval mode. The first step of mask training is that of the mask it would
    start with, on train rows that are the same at all points, without dropout.
    """
    dense = cell.inputs["model"]
    assert isinstance(dense, Cell)
    data, device = same_data(dense, lab), dense.settings["machine"]["device"]
    model = load_weights(lab.folder(dense) / "weights", data.task.objective, head_seed=0).to(device)
    anatomy = read_anatomy(model, layout_of(dense.settings["model"]))
    train = encoded_rows(lab, dense, "train", data.train)
    count = min(cell.settings["probe"]["rows"], len(train))
    rows = sorted(random.Random(dense.settings["data"]["split_seed"]).sample(range(len(train)), count))
    said: dict[str, float | None] = {"dev_loss": mean_loss(model, encoded_rows(lab, dense, "selection", data.selection))}
    said |= {"bias_gap": _gap(cell, lab, data, model, train, rows)}
    progress(0.3)
    gradients, kept = _first_step(cell, lab, data, model, anatomy, train, rows)
    points = {"gradients": {name: one.sign().to(torch.int8) for name, one in gradients.items()}, "kept": kept}
    before = cell.inputs.get("before")
    for name, probe, compare in (("gradients", "update_overlap", update_overlap), ("kept", "mask_overlap", jaccard)):
        save_file({part: one.contiguous().cpu() for part, one in points[name].items()}, out / f"{name}.safetensors")
        earlier = None if before is None else load_file(lab.folder(before) / f"{name}.safetensors")
        said[probe] = None if earlier is None else compare(earlier, {part: one.cpu() for part, one in points[name].items()})
    write_json(out / "result.json", {"warnings": []} | said)


def _gap(cell: Cell, lab: Lab, data: TaskData, model: torch.nn.Module, train: Encoded, rows: list[int]) -> float | None:
    """Mean cross-entropy of the rows that the bias-only model gets wrong minus that of the others; None without both kinds."""
    favoured = favoured_rows(cell, lab, data, train)
    if favoured is None or len({favoured[row] for row in rows}) < 2:
        return None
    losses: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            some = rows[start : start + 32]
            inputs = _on(collate(train, some), model)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            of = -row_outputs(logits, labels)[:, 0] if logits.ndim == 3 else cross_entropy(logits, labels, reduction="none")
            for row, loss in zip(some, of.tolist(), strict=True):
                losses[favoured[row]].append(loss)
    return sum(losses[False]) / len(losses[False]) - sum(losses[True]) / len(losses[True])


def _first_step(
    cell: Cell, lab: Lab, data: TaskData, model: torch.nn.Module, anatomy: Anatomy, train: Encoded, rows: list[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient of the mask's loss with respect to its scores, and what the mask keeps, both of the mask as it starts."""
    settings = LearnedSettings(**cell.settings["search"])
    recipe = loss_of(cell, lab, data, model)
    with ScoredMask(model, anatomy, replace(settings, mask_choice="last"), cell.settings["seeds"]["mask"]) as scored:
        for start in range(0, len(rows), 32):
            some = rows[start : start + 32]
            inputs = _on(collate(train, some), model)
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            if recipe is None or recipe.loss is None:
                loss = summed_loss(logits, labels) / len(rows)
            else:
                loss = recipe.loss(logits, labels, torch.tensor(some), 0.0) * (len(some) / len(rows))
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = scored.gradients()
        return gradients, {name: part.clone() for name, part in scored.mask().parts().items()}


def _on(batch: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
