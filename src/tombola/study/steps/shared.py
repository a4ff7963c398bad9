"""What steps read of each other's folders, and how they write what they measured."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tombola.canonical import fingerprint
from tombola.evaluate import Merge, Predictions, agreement, merged, predict, score, subgroup_scores
from tombola.study.cells import Cell, Given, Lab, read_rows, write_rows
from tombola.study.data import TaskData, encoded_rows
from tombola.ticket import Ticket
from tombola.train import RunSeeds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run_seeds(settings: Mapping[str, Any]) -> RunSeeds:
    return RunSeeds(**{name: seed for name, seed in settings["seeds"].items() if name != "run"})


def lesion_seed(mask_seed: int, draw: int) -> int:
    """The seed of a lesion: every draw of every run destroys the weights otherwise."""
    return int(fingerprint(["lesion", mask_seed, draw])[:12], 16)


def taken_ticket(cell: Cell, lab: Lab) -> Ticket | None:
    """The ticket among a cell's inputs."""
    taken = cell.inputs.get("ticket")
    return None if taken is None else ticket_of(lab, taken)


def ticket_of(lab: Lab, taken: Cell | Given) -> Ticket:
    """The ticket a finished search or control cell holds, or a given folder."""
    return Ticket.from_pretrained(taken.folder if isinstance(taken, Given) else lab.folder(taken) / "ticket")


def from_ticket(lab: Lab, weights: str | None) -> str | None:
    """A folder of weights as the ticket of a cell names it: inside the store relative, so that a store can be moved."""
    cells = lab.store.root.resolve() / "cells"
    if weights is None or not Path(weights).resolve().is_relative_to(cells):
        return weights
    return f"../../{Path(weights).resolve().relative_to(cells).as_posix()}"


def predict_all(cell: Cell, lab: Lab, data: TaskData, model: "PreTrainedModel") -> dict[str, Predictions]:
    return {role: predict(model, encoded_rows(lab, cell, role, rows)) for role, (_, rows) in data.evaluated().items()}


def write_scores(
    cell: Cell,
    out: Path,
    data: TaskData,
    predictions: Mapping[str, Predictions],
    dense: Mapping[str, Predictions] | None,
    ticket: Ticket | None,
    *,
    stage: str,
    kind: str = "full",
) -> None:
    """scores.jsonl (the fields of a ScoreRow), subgroups.jsonl and predictions.jsonl."""
    what = {"kind": kind, "draw": 0} if ticket is None else {"kind": ticket.kind, "draw": ticket.details.get("draw", 0)}
    what, groups = what | {"stage": stage}, []
    for role, (split, set_) in data.evaluated().items():
        if set_.groups is not None:
            common = _where(cell, what, split, role)
            members = dict(zip(set_.ids, set_.groups, strict=True))
            metric = "accuracy" if len(data.task.labels) > 1 else data.task.metric
            by_group = subgroup_scores(as_labelled(data, role, predictions[role]), members, metric)
            groups += [common | {"group": name} | asdict(one) for name, one in by_group.items()]
    write_rows(out / "scores.jsonl", score_rows(cell, data, predictions, dense, what))
    write_rows(out / "subgroups.jsonl", groups)
    write_rows(out / "predictions.jsonl", prediction_rows(predictions))


def prediction_rows(predictions: Mapping[str, Predictions]) -> Iterator[dict[str, Any]]:
    """The lines of predictions.jsonl, which `read_predictions` reads."""
    for role, one in predictions.items():
        for i, (row, label, logits) in enumerate(zip(one.ids, one.labels, one.logits.tolist(), strict=True)):
            yield (
                {"role": role, "id": row, "label": label, "logits": logits}
                | ({"weight": one.weights[i]} if one.weights else {})
                | ({"measures": one.measures, "lines": one.lines[i]} if one.lines else {})
            )


def _where(cell: Cell, what: Mapping[str, Any], split: str, role: str) -> dict[str, Any]:
    """What every score of a cell says of itself."""
    settings = cell.settings
    said = {"model": settings["model"]["name"], "task": settings["data"]["task"], "seed": settings["seeds"]["run"]}
    return said | dict(what) | {"split": split, "role": role}


def score_rows(
    cell: Cell,
    data: TaskData,
    predictions: Mapping[str, Predictions],
    dense: Mapping[str, Predictions] | None,
    what: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The fields of a ScoreRow for every set of rows and metric; `what` are those that say of which model."""
    task, rows = data.task, []
    for role, (split, _) in data.evaluated().items():
        names = task.challenge_labels if role == "challenge" and task.merges else task.labels
        answers = as_labelled(data, role, predictions[role])
        flips = None if dense is None else agreement(as_labelled(data, role, dense[role]), answers)
        common = _where(cell, what, split, role)
        said: dict[str, Any] | None = None if flips is None else {
            "flips": flips.flips,
            "lost": flips.lost,
            "gained": flips.gained,
            "n": flips.n,
            "dense_counts": _by_name(flips.dense_counts, names),
            "counts": _by_name(flips.counts, names),
        }  # fmt: skip
        if said is not None and flips is not None and flips.mean_difference is not None:
            said["mean_difference"] = flips.mean_difference
        metrics = (task.metric, *task.extra_metrics)
        rows += [common | asdict(score(answers, metric)) | {"agreement": said} for metric in metrics]
        if answers is not predictions[role]:
            summed = score(as_labelled(data, role, predictions[role], "sum_probability"), task.metric)
            rows.append(common | asdict(summed) | {"metric": f"{task.metric}_summed", "agreement": None})
    return rows


def as_labelled(data: TaskData, role: str, predictions: Predictions, how: Merge = "after_argmax") -> Predictions:
    """Predictions in the classes that rows of this role are labelled with: a challenge may have fewer of them than the model."""
    task = data.task
    if role != "challenge" or not task.merges:
        return predictions
    return merged(predictions, [task.challenge_labels.index(task.merges[name]) for name in task.labels], how)


def _by_name(counts: Mapping[int, int] | None, names: tuple[str, ...]) -> dict[str, int]:
    """Class name → count; nothing where there are no classes."""
    return {} if counts is None else {name: counts.get(i, 0) for i, name in enumerate(names)}


def read_predictions(folder: Path) -> dict[str, Predictions]:
    by_role: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(folder / "predictions.jsonl"):
        by_role.setdefault(row["role"], []).append(row)
    return {
        role: Predictions(
            tuple(row["id"] for row in rows),
            torch.tensor([row["logits"] for row in rows]),
            tuple(row["label"] for row in rows),
            tuple(row["weight"] for row in rows) if "weight" in rows[0] else None,
            tuple(rows[0].get("measures", ())),
            tuple(tuple(row["lines"]) for row in rows) if "lines" in rows[0] else None,
        )
        for role, rows in by_role.items()
    }
