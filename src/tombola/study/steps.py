"""The steps: what each kind of cell computes. One function and one row of `STEPS` each.

    fine_tune   base → dense model of a task             weights, predictions, scores
    search      fine-tuned model → good ticket           ticket, path, importance of every step
    control     ticket → control ticket of its size      ticket
    evaluate    ticket on weights (pruned)               predictions, scores
    retrain     ticket on base, trained again            predictions, scores, weights when asked for

What a step may depend on stands in its cell: settings and inputs. The lab only says where things lie.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from tombola.anatomy import read_anatomy, size_of
from tombola.errors import DataError, TombolaError
from tombola.evaluate import Predictions, agreement, predict, score, subgroup_scores
from tombola.gates import Gates, hold, prove_acts
from tombola.mask import Mask
from tombola.search.controls import control
from tombola.search.structured import SPruneResult, SPruneSettings, s_prune
from tombola.store import fingerprint
from tombola.study.cells import Cell, Given, Lab, Step, read_json, read_rows, write_json, write_rows
from tombola.tasks import Role, Rows, Task, get_task, load_rows, shared_texts, split_selection
from tombola.tasks.encode import Encoded, encode
from tombola.ticket import Ticket, Weights, fingerprint_folder, load_weights, resolve_model
from tombola.train import RunSeeds, TrainSettings, fine_tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class TaskData:
    """The rows of one task under one set of data settings, by what they are for."""

    task: Task
    train: Rows
    selection: Rows
    report: Rows
    challenge: Rows | None
    leaked: int  # train rows dropped because a selection row has the same texts
    selection_name: str = "selection"  # the report split's own name when the mask is chosen on its rows: the page says so

    def evaluated(self) -> dict[str, tuple[str, Rows]]:
        """Role → (name of the split, rows), for every set a model is scored on."""
        sets = {"selection": (self.selection_name, self.selection), "report": (self.task.splits["report"], self.report)}
        if self.challenge is not None:
            sets["challenge"] = (self.task.splits["challenge"], self.challenge)
        return sets

    def fingerprints(self) -> dict[str, str]:
        """A fingerprint of each set of rows, so that a cell is known by its data and not by where that came from."""
        sets = {"train": self.train} | {role: rows for role, (_, rows) in self.evaluated().items()}
        return {role: fingerprint([rows.ids, rows.texts, rows.labels, rows.groups]) for role, rows in sets.items()}


def task_data(lab: Lab, spec: str, settings: Mapping[str, Any]) -> TaskData:
    """The rows of a task. Rows on which a mask is chosen are held out of train by seed, or are the dev rows if so set.

    Raises: DataError as `load_rows` does, and when train or selection rows stand in the report split under another label.
    """
    known = (
        "data",
        spec,
        settings["train_rows"],
        settings["selection_rows"],
        settings["selection_split"],
        settings["split_seed"],
    )
    if known not in lab.cache:
        task = get_task(spec)
        rows: dict[Role, Rows] = {role: load_rows(task, role, data_dir=lab.data_dir) for role in task.splits}
        full, report = rows["train"], rows["report"]
        train, selection = split_selection(
            full,
            len(report),
            seed=settings["split_seed"],
            max_train=settings["train_rows"],
            max_selection=settings["selection_rows"],
        )
        leaked = len(shared_texts(full, selection)) - len(selection)
        name = "selection"
        if settings["selection_split"] == "dev":
            cap = min(len(report), settings["selection_rows"] or len(report))
            selection, name = report.take(range(cap)), task.splits["report"]
        lab.cache[known] = TaskData(task, train, selection, report, rows.get("challenge"), leaked, name)
    data: TaskData = lab.cache[known]
    return data


def _same_data(cell: Cell, lab: Lab) -> TaskData:
    """The rows a cell was planned for. Raises: DataError when the data of today are others."""
    settings = cell.settings["data"]
    data = task_data(lab, settings["task"], settings)
    found = data.fingerprints()
    if found != settings["rows"]:
        differing = [role for role in found if found[role] != settings["rows"].get(role)]
        raise DataError(
            f"the data of {settings['task']} are not those this run was made with",
            got=f"other rows in: {', '.join(differing)}",
            next="pass the --data folder the run was made with",
        )
    return data


def encoded_rows(lab: Lab, cell: Cell, role: str, rows: Rows) -> Encoded:
    """Rows as the base's tokenizer encodes them, once per run; `role` names them."""
    known = ("encoded", cell.settings["model"]["fingerprint"], role, fingerprint(cell.settings["data"]))
    if known not in lab.cache:
        lab.cache[known] = encode(_tokenizer(lab, cell), rows, cell.settings["data"]["max_length"])
    encoded: Encoded = lab.cache[known]
    return encoded


def _tokenizer(lab: Lab, cell: Cell) -> Any:
    from transformers import AutoTokenizer

    folder = base_folder(lab, cell.settings["model"])
    if ("tokenizer", folder) not in lab.cache:
        lab.cache["tokenizer", folder] = AutoTokenizer.from_pretrained(folder)
    return lab.cache["tokenizer", folder]


def base_folder(lab: Lab, model: Mapping[str, Any]) -> Path:
    """The folder of a base by its settings. Raises: TombolaError when its weights are no longer those of the plan."""
    known = ("base", model["name"], model["revision"])
    if known not in lab.cache:
        lab.cache[known] = resolve_model(model["name"], model["revision"])
    source = lab.cache[known]
    if source.fingerprint != model["fingerprint"]:
        raise TombolaError(
            f"the weights of {model['name']} changed since this run was planned",
            got=source.fingerprint,
            expected=model["fingerprint"],
            next="pin the revision it was made with",
        )
    folder: Path = source.folder
    return folder


# --------------------------------------------------------------------------------------------------------------- steps


def run_training(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """fine_tune and retrain: base weights, new head; with a ticket its mask is held throughout."""
    data, settings = _same_data(cell, lab), cell.settings
    seeds = RunSeeds(**{name: seed for name, seed in settings["seeds"].items() if name != "run"})
    model = load_weights(base_folder(lab, settings["model"]), data.task.labels, head_seed=seeds.head)
    ticket = _ticket(cell, lab)
    anatomy = read_anatomy(model)
    model.to(settings["machine"]["device"])
    if ticket is not None:
        prove_acts(model, anatomy, ticket.mask)
        hold(model, anatomy, ticket.mask)
    log = fine_tune(
        model,
        encoded_rows(lab, cell, "train", data.train),
        TrainSettings(**settings["train"]),
        seeds,
        device=settings["machine"]["device"],
        progress=lambda share: progress(0.9 * share),
    )
    predictions = _predict_all(cell, lab, data, model)
    dense = None if ticket is None else _read_predictions(lab.folder(cell.inputs["dense"]))
    _write_scores(cell, out, data, predictions, dense, ticket, stage="full" if ticket is None else "retrained")
    train = asdict(log) | {"rows": len(data.train), "rows_dropped_as_leaked": data.leaked}
    if settings["keep_weights"]:
        model.save_pretrained(out / "weights")
        _tokenizer(lab, cell).save_pretrained(out / "weights")
        train["weights_fingerprint"] = fingerprint_folder(out / "weights")
    write_json(out / "train.json", train)


def run_search(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """s-prune on the fine-tuned model; the mask that held the floor becomes the good ticket."""
    dense = cell.inputs["model"]
    assert isinstance(dense, Cell)
    data, labels = _same_data(dense, lab), get_task(dense.settings["data"]["task"]).labels
    model = load_weights(lab.folder(dense) / "weights", labels, head_seed=0)
    model.to(dense.settings["machine"]["device"])
    options = SPruneSettings(**cell.settings["search"])
    with Gates(model) as gates:
        anatomy = gates.anatomy
        tried: list[int] = []

        def count(_: object) -> None:
            tried.append(1)
            progress(min(len(tried) / EXPECTED_TRIALS, 0.95))

        result = s_prune(gates, encoded_rows(lab, dense, "selection", data.selection), data.task.metric, options, count)
    prove_acts(model, anatomy, result.mask)
    base, seeds = dense.settings["model"], dense.settings["seeds"]
    full, kept = result.trials[0].score, next(t for t in reversed(result.trials) if t.mask == result.mask).score
    ticket = Ticket(
        mask=result.mask,
        base=Weights(base["name"], base["fingerprint"], base["revision"]),
        found_on=Weights(
            f"{base['name']} fine-tuned on {data.task.name}",
            read_json(lab.folder(dense) / "train.json")["weights_fingerprint"],
            path=_from_ticket(lab, str(lab.folder(dense) / "weights")),
        ),
        anatomy=anatomy.summary(),
        kind="good",
        scope="heads+mlps",
        sparsity=anatomy.size(result.mask).sparsity,
        task=dense.settings["data"]["task"],
        labels=labels,
        preset=cell.settings["preset"],
        settings={"method": cell.settings["method"], "search": cell.settings["search"], "data": dense.settings["data"]}
        | {"train": dense.settings["train"], "machine": dense.settings["machine"]},
        seeds=seeds,
        metrics=tuple(
            {"split": "selection", "what": what, "metric": one.metric, "value": one.value, "n": one.n, "majority": one.majority}
            for what, one in (("full", full), ("pruned", kept))
        ),
        details={"path": _path(result), "floor_score": result.floor_score, "full_score": full.value},
        cell=cell.key,
        versions={name: version(name) for name in ("tombola", "torch", "transformers")},
    )
    ticket.save_pretrained(out / "ticket")
    save_file(_steps(result), out / "steps.safetensors")
    said = []
    if options.floor_rule == "fraction_above_baseline" and full.at_or_below_majority:
        said.append(
            f"the full model ({full.value:.3f}) is at or below the majority line ({full.majority:.3f}) on the selection rows"
        )
    if result.floor_score <= full.majority:
        said.append(
            f"the floor ({result.floor_score:.3f}) is not above the majority line ({full.majority:.3f}) of the selection rows: "
            "an empty network would hold it; --floor-rule fraction_above_baseline keeps a share of what is above the line"
        )
    said += _empty_mask(result.mask)
    write_json(out / "result.json", {"warnings": said})


def run_control(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A control ticket for the good ticket it takes."""
    good = _ticket(cell, lab)
    assert good is not None
    kind, draw = cell.settings["kind"], cell.settings["draw"]
    mask = control(good.mask, kind, seed=good.seeds["mask"], draw=draw)
    overlap = good.mask.overlap(mask)
    ticket = Ticket(
        mask=mask,
        base=good.base,
        found_on=replace(good.found_on, path=_from_ticket(lab, good.found_on.path)),
        anatomy=good.anatomy,
        kind=kind,
        scope=good.scope,
        sparsity=size_of(good.anatomy, mask).sparsity,
        task=good.task,
        labels=good.labels,
        preset=good.preset,
        settings=dict(good.settings) | {"control": {"kind": kind, "draw": draw}},
        seeds=good.seeds,
        details={
            "draw": draw,
            "kept_good": {name: one.size_a for name, one in overlap.items()},
            "shared_with_good": {name: one.shared for name, one in overlap.items()},
        },
        parents=(good.identity,),
        cell=cell.key,
        versions={name: version(name) for name in ("tombola", "torch", "transformers")},
    )
    ticket.save_pretrained(out / "ticket")
    smaller = {name: one for name, one in overlap.items() if one.size_b < one.size_a}
    said = [
        f"{kind} keeps {one.size_b} {name}, the good ticket {one.size_a}: no more were removed by it"
        for name, one in smaller.items()
    ]
    write_json(out / "result.json", {"warnings": said + _empty_mask(mask)})


def run_evaluate(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A ticket's mask on given weights, nothing trained."""
    data, ticket = _same_data(cell, lab), _ticket(cell, lab)
    assert ticket is not None
    weights = cell.inputs.get("weights")
    if weights is None:
        folder = base_folder(lab, cell.settings["model"])
    else:
        folder = lab.folder(weights) / "weights" if isinstance(weights, Cell) else weights.folder
    model = load_weights(folder, data.task.labels, head_seed=cell.settings["seeds"]["head"])
    anatomy = read_anatomy(model)
    model.to(cell.settings["machine"]["device"])
    anatomy.check(ticket.mask)
    # The dense predictions of the same weights: read where they were stored, else made here.
    dense = _read_predictions(lab.folder(weights)) if isinstance(weights, Cell) else _predict_all(cell, lab, data, model)
    progress(0.3)
    prove_acts(model, anatomy, ticket.mask)
    with Gates(model, anatomy, ticket.mask):
        predictions = _predict_all(cell, lab, data, model)
    _write_scores(cell, out, data, predictions, dense, ticket, stage="pruned")
    head = (
        []
        if weights is not None
        else ["the weights are the base: the task head was drawn, not trained, and scores are those of chance"]
    )
    write_json(out / "result.json", {"warnings": head})


# ------------------------------------------------------------------------------------------------------------- helpers


def _ticket(cell: Cell, lab: Lab) -> Ticket | None:
    taken = cell.inputs.get("ticket")
    if taken is None:
        return None
    return Ticket.from_pretrained(taken.folder if isinstance(taken, Given) else lab.folder(taken) / "ticket")


def _from_ticket(lab: Lab, weights: str | None) -> str | None:
    """A folder of weights as the ticket of a cell names it: inside the store relative, so that a store can be moved."""
    cells = lab.store.root.resolve() / "cells"
    if weights is None or not Path(weights).resolve().is_relative_to(cells):
        return weights
    return f"../../{Path(weights).resolve().relative_to(cells).as_posix()}"


def _predict_all(cell: Cell, lab: Lab, data: TaskData, model: "PreTrainedModel") -> dict[str, Predictions]:
    return {role: predict(model, encoded_rows(lab, cell, role, rows)) for role, (_, rows) in data.evaluated().items()}


def _write_scores(
    cell: Cell,
    out: Path,
    data: TaskData,
    predictions: Mapping[str, Predictions],
    dense: Mapping[str, Predictions] | None,
    ticket: Ticket | None,
    *,
    stage: str,
) -> None:
    """scores.jsonl (the fields of a ScoreRow), subgroups.jsonl and predictions.jsonl."""
    names, rows, groups = data.task.labels, [], []
    for role, (split, set_) in data.evaluated().items():
        flips = None if dense is None else agreement(dense[role], predictions[role])
        common = {
            "model": cell.settings["model"]["name"],
            "task": cell.settings["data"]["task"],
            "seed": cell.settings["seeds"]["run"],
            "kind": "full" if ticket is None else ticket.kind,
            "stage": stage,
            "draw": 0 if ticket is None else ticket.details.get("draw", 0),
            "split": split,
            "role": role,
        }
        said = None if flips is None else {
            "flips": flips.flips,
            "lost": flips.lost,
            "gained": flips.gained,
            "n": flips.n,
            "dense_counts": {name: flips.dense_counts.get(i, 0) for i, name in enumerate(names)},
            "counts": {name: flips.counts.get(i, 0) for i, name in enumerate(names)},
        }  # fmt: skip
        metrics = (data.task.metric, *data.task.extra_metrics)
        rows += [common | asdict(score(predictions[role], metric)) | {"agreement": said} for metric in metrics]
        if set_.groups is not None:
            by_group = subgroup_scores(predictions[role], dict(zip(set_.ids, set_.groups, strict=True)))
            groups += [common | {"group": name} | asdict(one) for name, one in by_group.items()]
    write_rows(out / "scores.jsonl", rows)
    write_rows(out / "subgroups.jsonl", groups)
    write_rows(
        out / "predictions.jsonl",
        (
            {"role": role, "id": row, "label": label, "logits": logits}
            for role, one in predictions.items()
            for row, label, logits in zip(one.ids, one.labels, one.logits.tolist(), strict=True)
        ),
    )


def _read_predictions(folder: Path) -> dict[str, Predictions]:
    by_role: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(folder / "predictions.jsonl"):
        by_role.setdefault(row["role"], []).append(row)
    return {
        role: Predictions(
            tuple(row["id"] for row in rows), torch.tensor([row["logits"] for row in rows]), tuple(row["label"] for row in rows)
        )
        for role, rows in by_role.items()
    }


def _path(result: SPruneResult) -> list[dict[str, Any]]:
    """The fields of a PathStep for each trial."""
    path = []
    for step, trial in enumerate(result.trials):
        counts = trial.mask.counts()
        kept = {"heads_kept": counts["heads"][0], "mlps_kept": counts["mlps"][0]}
        path.append({"step": step, "phase": trial.phase, "score": trial.score.value, "passed": trial.passed} | kept)
    return path


def _steps(result: SPruneResult) -> dict[str, torch.Tensor]:
    """Importance and mask of every trial: [step, layer, head] and [step, layer]."""
    trials = result.trials
    return {
        "head_importance": torch.stack([t.importance.heads for t in trials]),
        "mlp_importance": torch.stack([t.importance.mlps for t in trials]),
        "heads": torch.stack([t.mask.parts()["heads"] for t in trials]).to(torch.uint8),
        "mlps": torch.stack([t.mask.parts()["mlps"] for t in trials]).to(torch.uint8),
    }


def _empty_mask(mask: Mask) -> list[str]:
    empty = [name for name, (kept, _) in mask.counts().items() if kept == 0]
    return [f"the mask keeps none of the {' and none of the '.join(empty)}"] if empty else []


# --------------------------------------------------------------------------------------------------------------- table

EXPECTED_TRIALS = 14  # passes of an s-prune search that goes down to a handful of MLPs; for the estimate of time only


def _rows(cell: Cell, *roles: str) -> float:
    counts: Mapping[str, int] = cell.settings["data"]["counts"]
    return float(sum(counts.get(role, 0) for role in roles))


def _training_work(cell: Cell) -> float:
    # forward, gradients of activations, gradients of weights: three passes a row
    epochs: int = cell.settings["train"]["epochs"]
    return 3.0 * epochs * _rows(cell, "train") + _rows(cell, "selection", "report", "challenge")


def _search_work(cell: Cell) -> float:
    dense = cell.inputs["model"]
    assert isinstance(dense, Cell)
    return 2.0 * EXPECTED_TRIALS * _rows(dense, "selection")


def _title(cell: Cell) -> str:
    planned: dict[str, Any] = {}  # a search or control has the task and seed of the model it goes back to
    for one in cell.needed():
        planned |= {name: one.settings[name] for name in ("seeds", "data") if name in one.settings}
    seeds, data = planned.get("seeds", {}), planned.get("data", {})
    return " · ".join(
        x
        for x in (
            cell.step.replace("_", "-"),
            _about(cell),
            data.get("task", "").partition(":")[0],
            f"seed {seeds.get('run', '?')}",
        )
        if x
    )


def _about(cell: Cell) -> str:
    ticket = cell.inputs.get("ticket")
    if cell.step == "control":
        return f"{cell.settings['kind']} {cell.settings['draw']}"
    if isinstance(ticket, Cell) and ticket.step == "control":
        return f"{ticket.settings['kind']} {ticket.settings['draw']}"
    return "good" if ticket is not None else ""


STEPS: dict[str, Step] = {
    "fine_tune": Step(1, run_training, _training_work, _title),
    "search": Step(1, run_search, _search_work, _title),
    "control": Step(1, run_control, lambda cell: 1.0, _title),
    "evaluate": Step(1, run_evaluate, lambda cell: _rows(cell, "selection", "report", "challenge"), _title),
    "retrain": Step(1, run_training, _training_work, _title),
}
