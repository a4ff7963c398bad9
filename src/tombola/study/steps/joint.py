"""The steps of a chain over several tasks with one body (X1 of Chen et al. 2020): its rewind step, and its rounds.

All of it is `tombola.study.steps.imp`; here is what several tasks train and score where one task does there. Scores of each task
stand in a folder of their own, `task-0`, `task-1`, … in the order of the tasks.
"""

from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn

from tombola.anatomy import Anatomy, read_anatomy
from tombola.gates import prove_acts
from tombola.joint import Joint
from tombola.mask import Mask
from tombola.objective import Objective, load_weights
from tombola.order import Several, Stretch
from tombola.study import ranks
from tombola.study.cells import Cell, Lab
from tombola.study.data import base_folder, encoded_rows, layout_of, same_data
from tombola.study.steps.imp import OneTask, Progress, round_of, snapshot_of
from tombola.study.steps.looks import Answers, Looks, epoch_ends, looks_folder
from tombola.study.steps.shared import predict_all, read_predictions, run_seeds, write_scores
from tombola.tasks import bare_name
from tombola.ticket import Ticket
from tombola.train import Recipe

WEIGHTS = "joint.safetensors"  # the body and all heads


class SeveralTasks(OneTask):
    """What the rounds of a chain over several tasks train and score."""

    def __init__(self, cell: Cell, lab: Lab) -> None:
        self.cell, self.lab = cell, lab
        common = {name: cell.settings[name] for name in ("model", "machine", "seeds")}
        of = cell.settings["tasks"]
        # each task as a cell of its own says it: what its rows are read, encoded and scored by
        self.parts = {one["data"]["task"]: Cell(cell.step, cell.version, common | {"data": one["data"]}) for one in of}
        self.batch_sizes = {one["data"]["task"]: int(one["batch_size"]) for one in of}
        self.all_data = {name: same_data(part, lab) for name, part in self.parts.items()}
        self.name, self.looks = names_of(cell), []

    def load(self, folder: Path | None) -> Joint:
        place, seed = base_folder(self.lab, self.cell.settings["model"]), run_seeds(self.cell.settings).head
        joint = Joint({name: load_weights(place, of.task.objective, head_seed=seed) for name, of in self.all_data.items()})
        if folder is not None:
            load_model(joint, folder / WEIGHTS)
        return joint

    def anatomy(self, model: nn.Module) -> Anatomy:
        assert isinstance(model, Joint)
        return read_anatomy(next(iter(model.models.values())), layout_of(self.cell.settings["model"]))

    def prove(self, model: nn.Module, anatomy: Anatomy, mask: Mask) -> None:
        assert isinstance(model, Joint)
        for one in model.models.values():
            prove_acts(one, anatomy, mask)

    def train_rows(self) -> Several:
        rows = {name: encoded_rows(self.lab, part, "train", self.all_data[name].train) for name, part in self.parts.items()}
        return Several(rows, self.batch_sizes)

    def recipe(self) -> Recipe | None:
        return None

    def counts(self) -> dict[str, int]:
        every = self.all_data.values()
        return {"rows": sum(len(one.train) for one in every), "rows_dropped_as_leaked": sum(one.leaked for one in every)}

    def write_weights(self, model: nn.Module, out: Path) -> None:
        if ranks.rank() == 0:
            save_model(model, str(out / WEIGHTS))

    def looks_at(self, model: nn.Module, stretch: Stretch) -> list[Looks]:
        if self.cell.settings.get("report_checkpoint") != "best":
            return []
        assert isinstance(model, Joint)
        folder, rows = looks_folder(self.cell, self.lab), self.train_rows()
        found = []
        for i, (name, part) in enumerate(self.parts.items()):
            at = epoch_ends(len(rows.rows[name]), self.batch_sizes[name], stretch.steps, stretch.rows_from)
            ask = partial(predict_all, part, self.lab, self.all_data[name], model.models[name])
            found.append(Looks(folder / str(i), at, ask))
        return found

    def write_scores(self, model: nn.Module, out: Path, ticket: Ticket | None, steps: int) -> dict[str, Any]:
        """Of each task, with the agreement with the dense model that was trained on it alone."""
        assert isinstance(model, Joint)
        looks: dict[str, Any] = {}
        for i, (name, part) in enumerate(self.parts.items()):
            data, folder = self.all_data[name], out / f"task-{i}"
            folder.mkdir()
            predictions: Answers = predict_all(part, self.lab, data, model.models[name])
            if self.looks:
                predictions, looks[name] = self.looks[i].best(data, predictions, steps)
            dense = read_predictions(self.lab.folder(alone(self.cell)[i]))
            stage = "full" if ticket is None else "retrained"
            write_scores(part, folder, data, predictions, dense, ticket, stage=stage)
        return {"looks": looks} if looks else {}

    def of_ticket(self) -> tuple[Cell, Objective]:
        """A ticket of several tasks says no classes: its mask is of the body alone, and fits under any head."""
        said: dict[str, Any] = {"task": self.name, "tasks": [one["data"] for one in self.cell.settings["tasks"]]}
        return Cell(self.cell.step, self.cell.version, {**self.cell.settings, "data": said}), Objective()


def alone(cell: Cell) -> list[Cell]:
    """Of a cell of several tasks the dense models of each alone, in the order of the tasks."""
    found = [cell.inputs[f"dense-{i}"] for i in range(len(cell.settings["tasks"]))]
    return [one for one in found if isinstance(one, Cell)]


def names_of(cell: Cell) -> str:
    """Of a cell of several tasks their names."""
    return " + ".join(bare_name(one["data"]["task"]) for one in cell.settings["tasks"])


def run_joint_snapshot(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """The body and all heads trained up to the rewind step."""
    snapshot_of(SeveralTasks(cell, lab), out, progress)


def run_joint_round(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """One round: the mask of the level before, trained on all tasks from the rewind step, and the mask of the next level."""
    round_of(SeveralTasks(cell, lab), out, progress)
