"""The step landscape: how sharp the loss is around one model, and what lies between a retrained ticket and its dense model."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt

from tombola.anatomy import read_anatomy
from tombola.evaluate import mean_loss
from tombola.landscape import along_line, barrier, rises
from tombola.objective import load_weights
from tombola.study.cells import Cell, Lab, write_json, write_rows
from tombola.study.data import encoded_rows, layout_of, same_data
from tombola.study.steps.shared import lesion_seed, taken_ticket

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LandscapeSettings:
    """Where the loss is measured, and on how many rows."""

    points: Annotated[int, Ge(3)] = 11  # of the line, both ends included
    landscape_rows: Annotated[int, Ge(1)] = 512  # at most, of train and of report each; drawn by split_seed
    radius: Annotated[float, Gt(0)] = 0.1  # of a random step, in units of each row's own norm
    directions: Annotated[int, Ge(1)] = 5  # random steps, each also taken backwards


def run_landscape(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """landscape.jsonl: a row for each set of rows (train, report); of a ticket with the line from the dense model to it.

    The line goes from the dense model as it is (0) to the retrained ticket (1), whose removed values are 0: both ends are models
    that are used, and no mask acts between. A mask at both ends would start from the ticket as pruned, which is a valley of
    nothing when pruning has destroyed it.
    """
    settings, data, ticket = LandscapeSettings(**cell.settings["landscape"]), same_data(cell, lab), taken_ticket(cell, lab)
    dense, retrained = cell.inputs["dense"], cell.inputs.get("retrained")
    model = load_weights(lab.folder(dense) / "weights", data.task.objective, head_seed=0)
    anatomy = read_anatomy(model, layout_of(cell.settings["model"]))
    model.to(cell.settings["machine"]["device"])
    sets, drawn = {"train": ("train", data.train), "report": data.evaluated()["report"]}, {}
    for role, (_, rows) in sets.items():
        some = random.Random(cell.settings["data"]["split_seed"]).sample(
            range(len(rows)), min(settings.landscape_rows, len(rows))
        )
        drawn[role] = encoded_rows(lab, cell, f"landscape {role} {settings.landscape_rows}", rows.take(sorted(some)))
    passes = 1 + 2 * settings.directions + (settings.points if retrained is not None else 0)
    done = [0]

    def losses() -> dict[str, float]:
        done[0] += 1
        progress(min(done[0] / passes, 0.99))
        return {role: mean_loss(model, rows) for role, rows in drawn.items()}

    at: list[float] = []
    line: list[dict[str, float]] = []
    if retrained is not None:
        other = load_weights(lab.folder(retrained) / "weights", data.task.objective, head_seed=0)
        end, at = dict(other.named_parameters()), np.linspace(0.0, 1.0, settings.points).tolist()
        line = along_line(model, end, at, losses)
        model = other.to(cell.settings["machine"]["device"])
    here = losses()
    names = [f"{one.path}.weight" for layer in anatomy.layers for one in layer.projections]
    seed = lesion_seed(cell.settings["seeds"]["mask"], 0)  # the same directions for every model of a run
    moved = rises(model, list(dict.fromkeys(names)), losses, radius=settings.radius, draws=settings.directions, seed=seed)
    said = {"model": cell.settings["model"]["name"], "task": cell.settings["data"]["task"], "seed": cell.settings["seeds"]["run"]}
    said |= {"kind": "full", "draw": 0} if ticket is None else {"kind": ticket.kind, "draw": ticket.details.get("draw", 0)}
    found_rows: list[dict[str, Any]] = []
    for role, (split, _) in sets.items():
        risen = [(there[role] + back[role]) / 2 - here[role] for there, back in moved]
        of_line = [one[role] for one in line]
        found = barrier(at, of_line) if line else None
        row: dict[str, Any] = said | {"role": role, "split": split, "n": len(drawn[role]), "loss": here[role]}
        row |= {"at": at, "losses": of_line, "over_line": None if found is None else found.over_line}
        row |= {"over_ends": None if found is None else found.over_ends, "barrier_at": None if found is None else found.at}
        row |= {"sharpness": float(np.mean(risen)), "rises": risen, "radius": settings.radius}
        found_rows.append(row)
    write_rows(out / "landscape.jsonl", found_rows)
    write_json(out / "result.json", {"warnings": []})
