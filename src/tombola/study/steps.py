"""The steps: what each kind of cell computes. One function and one row of `STEPS` each.

    fine_tune   base → dense model of a task             weights, predictions, scores
    search      fine-tuned model → good ticket           ticket, path, importance of every step
    control     ticket → control ticket of its size      ticket
    derive      tickets → another ticket                 ticket
    evaluate    ticket on weights (pruned)               predictions, scores
    lesion      part of a dense model destroyed          scores of each place
    train_mode  base, trained in another way             predictions, scores
    retrain     ticket on base, trained again            predictions, scores, weights when asked for

What a step may depend on stands in its cell: settings and inputs. The lab only says where things lie.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tombola.anatomy import Anatomy, layers_of_heads, read_anatomy, size_of
from tombola.errors import CheckpointError, TombolaError
from tombola.evaluate import Predictions, agreement, predict, score, subgroup_scores
from tombola.gates import hold, lesion_of, masked, prove_acts
from tombola.lesion import LESIONS, copy_values
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.scope import SCOPES, scope_parameters
from tombola.scores import Given as Wanted
from tombola.scores import magnitude
from tombola.search.controls import CONTROLS, ControlSettings, control, inverted, needs_scores
from tombola.store import fingerprint
from tombola.study import ranks
from tombola.study.cells import Cell, Given, Lab, Step, read_json, read_rows, write_json, write_rows
from tombola.study.data import TaskData, base_folder, encoded_rows, layout_of, same_data, save_tokenizer, tokenizer_of
from tombola.study.derived import RULES, Sources
from tombola.study.kinds import CONTROL_KINDS, TRAIN_MODES, TrainMode
from tombola.study.lesions import EXPECTED_PLACES, PLACES, Cut, Patient, done, said_of
from tombola.study.searches import METHODS, Asked, Outcome
from tombola.study.settings import RetrainSettings
from tombola.tasks import bare_name
from tombola.ticket import Ticket, Weights, fingerprint_folder, locate_weights, resolve_model
from tombola.train import RunSeeds, TrainLog, TrainSettings, fine_tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]


# --------------------------------------------------------------------------------------------------------------- steps


def run_training(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """fine_tune, retrain and train_mode: base weights, new head; with a ticket its mask is held throughout.

    Goes on where it was killed.
    """
    data, settings, ticket = same_data(cell, lab), cell.settings, _ticket(cell, lab)
    # Of several ranks each would need the random state of its own: what is killed there starts anew.
    checkpoints = lab.store.scratch(cell.key) / "training" if ranks.size() == 1 else None
    try:
        model, log, said = _trained(cell, lab, data, ticket, checkpoints, progress)
    except CheckpointError as error:  # what a cell cannot go on from, it starts without, and from the base: weights may be read
        lab.reporter.say(f"{error}\n  starting this run anew")
        assert checkpoints is not None
        lab.store.scratch(cell.key)  # raises when they are a successor's by now
        shutil.rmtree(checkpoints)
        model, log, said = _trained(cell, lab, data, ticket, checkpoints, progress)
    predictions = _predict_all(cell, lab, data, model)
    dense = _read_predictions(lab.folder(cell.inputs["dense"])) if "dense" in cell.inputs else None
    kind = TRAIN_MODES[settings["mode"]].kind if "mode" in settings else "full"
    _write_scores(cell, out, data, predictions, dense, ticket, stage="full" if dense is None else "retrained", kind=kind)
    train = asdict(log) | {"rows": len(data.train), "rows_dropped_as_leaked": data.leaked}
    if settings["keep_weights"] and ranks.rank() == 0:  # transformers writes nothing on the others
        model.save_pretrained(out / "weights")
        save_tokenizer(tokenizer_of(lab, cell), out / "weights")
        train["weights_fingerprint"] = fingerprint_folder(out / "weights")
    write_json(out / "train.json", train)
    doubts = {} if dense is not None or not data.doubts else {"of_data": list(data.doubts)}  # of each task once
    if said or doubts:
        write_json(out / "result.json", {"warnings": said} | doubts)


def _trained(
    cell: Cell, lab: Lab, data: TaskData, ticket: Ticket | None, checkpoints: Path | None, progress: Progress
) -> "tuple[PreTrainedModel, TrainLog, list[str]]":
    """The base after training, what was done, and what a user would not expect."""
    settings, seeds = cell.settings, _run_seeds(cell.settings)
    device = settings["machine"]["device"]
    model = load_weights(base_folder(lab, settings["model"]), data.task.objective, head_seed=seeds.head)
    anatomy = read_anatomy(model, layout_of(settings["model"]))
    model.to(device)
    said = [] if ticket is None else _prepare_retraining(cell, lab, model, anatomy, ticket)
    if "mode" in settings:
        prepare_mode(TRAIN_MODES[settings["mode"]], model, anatomy, seeds)
    if settings["train"]["epochs"] == 0 and not data.task.objective.causal:
        said.append("nothing was trained (epochs 0): the task head was drawn, and scores are those of chance")
    log = fine_tune(
        model,
        encoded_rows(lab, cell, "train", data.train),
        TrainSettings(**settings["train"]),
        seeds,
        device=device,
        progress=lambda share: progress(0.9 * share),
        checkpoints=checkpoints,
        every_seconds=lab.checkpoint_seconds,
        ours=lambda: lab.store.scratch(cell.key),  # raises when this process was stalled and lost its lock to a successor
    )
    return model, log, said


def prepare_mode(mode: TrainMode, model: "PreTrainedModel", anatomy: Anatomy, seeds: RunSeeds) -> None:
    """Weights drawn again, and all but the task's head frozen, as the mode says."""
    if mode.random:
        LESIONS["random-init"](model, anatomy, lesion_seed(seeds.mask, 0))
    if mode.frozen:
        head = set(SCOPES["head"](model, anatomy))
        if not head:
            raise TombolaError(
                "nothing is left to train",
                got=f"{type(model).__name__} without a head of the task's own",
                expected="a classifier",
                next="leave the frozen train modes out for this task",
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)


def _prepare_retraining(cell: Cell, lab: Lab, model: "PreTrainedModel", anatomy: Anatomy, ticket: Ticket) -> list[str]:
    """The weights a ticket is trained again from, with its mask held; says what a user would not expect."""
    options, mask = RetrainSettings(**cell.settings["retrain"]), ticket.mask
    said = []
    if options.retrain_start == "pretrained_keep_tuned_embeddings":
        tuned = load_weights(lab.folder(cell.inputs["dense"]) / "weights", ticket.objective, head_seed=0)
        copy_values(model, tuned, scope_parameters(model, anatomy, "embeddings"))
    lesion_of(ticket)(model, anatomy)
    if options.empty_layer_bias == "mask_keeps_shrink_drops" and mask.heads is not None:
        emptied = [one.o for one, heads in zip(anatomy.attentions, mask.heads, strict=True) if not bool(heads.any())]
        biases = {f"{o.path}.bias": torch.zeros(o.n_out, dtype=torch.bool) for o in emptied if o.has_bias}
        mask = mask & Mask(values=biases)
        if biases:
            said.append(f"retrained without the bias of the attention output of {len(biases)} emptied layers, as released")
    prove_acts(model, anatomy, mask)
    hold(model, anatomy, mask)
    return said


def run_search(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A search on the fine-tuned model; the mask it ends with becomes the good ticket."""
    dense = cell.inputs["model"]
    assert isinstance(dense, Cell)
    data = same_data(dense, lab)
    labels = data.task.labels
    model = load_weights(lab.folder(dense) / "weights", data.task.objective, head_seed=0)
    model.to(dense.settings["machine"]["device"])
    anatomy, tried = read_anatomy(model, layout_of(dense.settings["model"])), list[object]()

    def count(trial: object) -> None:
        tried.append(trial)
        progress(min(len(tried) / EXPECTED_TRIALS, 0.95))

    base, seeds = dense.settings["model"], dense.settings["seeds"]
    found = METHODS[cell.settings["method"]](
        Asked(
            model=model,
            anatomy=anatomy,
            selection=encoded_rows(lab, dense, "selection", data.selection),
            metric=data.task.metric,
            settings=cell.settings["search"],
            seed=seeds["mask"],
            trial=count,
        )
    )
    prove_acts(model, anatomy, found.mask)
    heads, mlps = anatomy.survival(found.mask)
    ticket = Ticket(
        mask=found.mask,
        base=Weights(base["name"], base["fingerprint"], base["revision"]),
        found_on=Weights(
            f"{base['name']} fine-tuned on {data.task.name}",
            read_json(lab.folder(dense) / "train.json")["weights_fingerprint"],
            path=_from_ticket(lab, str(lab.folder(dense) / "weights")),
        ),
        anatomy=anatomy.summary(),
        kind="good",
        scope=found.scope,
        sparsity=anatomy.size(found.mask).sparsity,
        task=dense.settings["data"]["task"],
        labels=labels,
        preset=cell.settings["preset"],
        settings={"method": cell.settings["method"], "search": cell.settings["search"], "data": dense.settings["data"]}
        | {"train": dense.settings["train"], "machine": dense.settings["machine"]}
        | ({"objective": said} if (said := data.task.objective.describe()) else {})
        | ({"layout": base["layout"]} if "layout" in base else {}),
        seeds=seeds,
        metrics=tuple(
            {"split": "selection", "what": what, "metric": one.metric, "value": one.value, "n": one.n, "majority": one.majority}
            for what, one in (("full", found.full), ("pruned", found.kept))
        ),
        details={
            "path": found.path,
            "floor_score": found.floor_score,
            "full_score": found.full.value,
            "survival": {"heads": heads.tolist(), "mlps": mlps.tolist()},
        },
        cell=cell.key,
        versions={name: version(name) for name in ("tombola", "torch", "transformers")},
    )
    ticket.save_pretrained(out / "ticket")
    if found.tensors:
        save_file(dict(found.tensors), out / "steps.safetensors")
    write_json(out / "result.json", {"warnings": _doubts_of_search(found) + _empty_mask(found.mask)})


def _doubts_of_search(found: Outcome) -> list[str]:
    full, floor, said = found.full, found.floor_score, []
    if full.at_or_below_majority:
        said.append(
            f"the full model ({full.value:.3f}) is at or below the majority line ({full.majority:.3f}) on the selection rows"
        )
    if floor is not None and floor <= full.majority:
        said.append(
            f"the floor ({floor:.3f}) is not above the majority line ({full.majority:.3f}) of the selection rows: "
            "an empty network would hold it; --floor-rule fraction_above_baseline keeps a share of what is above the line"
        )
    return said


def run_control(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A control ticket for the good ticket it takes."""
    good = _ticket(cell, lab)
    assert good is not None
    name, draw = cell.settings["kind"], cell.settings["draw"]
    kind = CONTROL_KINDS[name]
    options = ControlSettings(**cell.settings["control"])
    if kind.rule in CONTROLS:
        scores = _scores_found_on(cell, lab, good) if needs_scores(good.mask, kind.rule, options) else None
        layers = layers_of_heads(good.anatomy) if good.scope == "layers" else None
        mask = control(good.mask, kind.rule, seed=good.seeds["mask"], draw=draw, settings=options, scores=scores, layers=layers)
    else:
        mask = OTHER_RULES[kind.rule](good.mask, lesion_seed(good.seeds["mask"], draw))
    overlap, survival = good.mask.overlap_by_type(mask), good.details.get("survival")
    if mask != good.mask and survival is not None:
        heads, mlps = _anatomy_of(lab, good).survival(mask)
        survival = {"heads": heads.tolist(), "mlps": mlps.tolist()}
    ticket = Ticket(
        mask=mask,
        base=good.base,
        found_on=replace(good.found_on, path=_from_ticket(lab, good.found_on.path)),
        anatomy=good.anatomy,
        kind=name,
        scope=good.scope,
        sparsity=size_of(good.anatomy, mask).sparsity,
        task=good.task,
        labels=good.labels,
        preset=good.preset,
        settings=dict(good.settings) | {"control": {"kind": name, "draw": draw} | asdict(options)},
        seeds=good.seeds,
        details={
            "draw": draw,
            "kept_good": {part: one.size_a for part, one in overlap.items()},
            "shared_with_good": {part: one.shared for part, one in overlap.items()},
        }
        | ({"lesion": {"name": kind.lesion, "seed": lesion_seed(good.seeds["mask"], draw)}} if kind.lesion else {})
        | ({"survival": survival} if survival is not None else {}),
        parents=(good.identity,),
        cell=cell.key,
        versions={name: version(name) for name in ("tombola", "torch", "transformers")},
    )
    ticket.save_pretrained(out / "ticket")
    smaller = {part: one for part, one in overlap.items() if one.size_b < one.size_a}
    drawn_size = options.random_size == "bernoulli" and kind.rule in CONTROLS
    said = [
        f"{name} keeps {one.size_b} {part}, the good ticket {one.size_a}: "
        + ("its size is drawn too" if drawn_size else "no more were removed by it")
        for part, one in smaller.items()
    ]
    write_json(out / "result.json", {"warnings": said + _empty_mask(mask)})


def run_derive(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A ticket made from others by a rule of `tombola.study.derived`; base, seeds and weights are those of the input `ticket`."""
    own = _ticket(cell, lab)
    assert own is not None
    others = [_read_ticket(taken, lab) for role, taken in sorted(cell.inputs.items(), key=lambda one: (len(one[0]), one[0]))
              if role != "ticket"]  # fmt: skip
    rule, options = RULES[cell.settings["rule"]], cell.settings["options"]

    def found_on() -> "tuple[PreTrainedModel, Anatomy]":
        model = load_weights(locate_weights(own, "found_on")[0], own.objective, head_seed=0)
        return model, read_anatomy(model, own.layout)

    made = rule.make(Sources(own, others, options, found_on))
    heads, mlps = _anatomy_of(lab, own).survival(made.mask)
    overlap = {} if made.good is None else made.good.overlap_by_type(made.mask)
    ticket = Ticket(
        mask=made.mask,
        base=own.base,
        found_on=replace(own.found_on, path=_from_ticket(lab, own.found_on.path)),
        anatomy=own.anatomy,
        kind=rule.kind,
        scope=made.scope,
        sparsity=size_of(own.anatomy, made.mask).sparsity,
        task=own.task,
        labels=own.labels,
        preset=own.preset,
        settings=dict(own.settings) | {"derived": {"rule": cell.settings["rule"]} | dict(options)},
        seeds=own.seeds,
        details={"survival": {"heads": heads.tolist(), "mlps": mlps.tolist()}, "draw": options.get("draw", 0)}
        | ({"shared_with_good": {part: one.shared for part, one in overlap.items()}} if overlap else {}),
        parents=tuple(one.identity for one in (own, *others)),
        cell=cell.key,
        versions={name: version(name) for name in ("tombola", "torch", "transformers")},
    )
    ticket.save_pretrained(out / "ticket")
    write_json(out / "result.json", {"warnings": _empty_mask(made.mask)})


# Rules of `CONTROL_KINDS` that draw no mask of the ticket's size: (the ticket's mask, a seed) → mask.
OTHER_RULES: Mapping[str, Callable[[Mask, int], Mask]] = {
    "good": lambda good, seed: good,
    "all": lambda good, seed: good | ~good,
    "inverted": lambda good, seed: inverted(good),
    "inverted-revived": lambda good, seed: inverted(good, revive=seed),
}


def _anatomy_of(lab: Lab, ticket: Ticket) -> Anatomy:
    """The anatomy of the base a ticket was found on, read once a run."""
    known = ("anatomy", ticket.base.fingerprint, fingerprint(ticket.settings.get("layout")))
    if known not in lab.cache:
        source = resolve_model(ticket.base.name, ticket.base.revision)
        lab.cache[known] = read_anatomy(load_weights(source.folder, ticket.objective, head_seed=0), ticket.layout)
    anatomy: Anatomy = lab.cache[known]
    return anatomy


def _scores_found_on(cell: Cell, lab: Lab, good: Ticket) -> dict[str, torch.Tensor]:
    """What a good ticket was chosen by: importances of its dense model, or magnitudes of the weights it was found on."""
    searched = cell.inputs["ticket"]
    if good.mask.structured().parts():
        if not isinstance(searched, Cell):
            raise TombolaError(
                "the importances this ticket was chosen by are not here",
                got="a ticket from another place",
                expected="a ticket of this store",
                next="run `tombola find` into this store, or take the rule pruned_plus_fill",
            )
        steps = load_file(lab.folder(searched) / "steps.safetensors")
        return {f"{name.removesuffix('_importance')}s": of[0] for name, of in steps.items() if name.endswith("_importance")}
    folder, _ = locate_weights(good, "found_on")
    model = load_weights(folder, good.objective, head_seed=0)
    return magnitude(Wanted(model=model, names=list(good.mask.values)))


def run_evaluate(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A ticket's mask on given weights, nothing trained."""
    data, ticket = same_data(cell, lab), _ticket(cell, lab)
    assert ticket is not None
    weights = cell.inputs.get("weights")
    if weights is None:
        folder = base_folder(lab, cell.settings["model"])
    else:
        folder = lab.folder(weights) / "weights" if isinstance(weights, Cell) else weights.folder
    model = load_weights(folder, data.task.objective, head_seed=cell.settings["seeds"]["head"])
    anatomy = read_anatomy(model, layout_of(cell.settings["model"]))
    model.to(cell.settings["machine"]["device"])
    anatomy.check(ticket.mask)
    # The dense predictions of the same weights: read where they were stored for these very rows, else made here.
    stored = isinstance(weights, Cell) and weights.settings["data"] == cell.settings["data"]
    dense = _read_predictions(lab.folder(weights)) if stored and weights else _predict_all(cell, lab, data, model)
    progress(0.3)
    if not isinstance(weights, Given):  # weights of one's own were trained from a lesion, if at all: not to be destroyed again
        lesion_of(ticket)(model, anatomy)
    prove_acts(model, anatomy, ticket.mask)
    with masked(model, anatomy, ticket.mask):
        predictions = _predict_all(cell, lab, data, model)
    _write_scores(cell, out, data, predictions, dense, ticket, stage="pruned")
    head = (
        []
        if weights is not None
        else ["the weights are the base: the task head was drawn, not trained, and scores are those of chance"]
    )
    write_json(out / "result.json", {"warnings": head})


def run_lesion(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A lesion of the dense model, in each of its places, nothing trained after it.

    With a ticket its removed heads are what is destroyed; what else it removes is masked, as in its pruned score.
    """
    data, ticket, dense = same_data(cell, lab), _ticket(cell, lab), cell.inputs["weights"]
    cut, seeds, objective = Cut(**cell.settings["lesion"]), cell.settings["seeds"], data.task.objective
    model = load_weights(lab.folder(dense) / "weights", objective, head_seed=seeds["head"])
    anatomy = read_anatomy(model, layout_of(cell.settings["model"]))
    model.to(cell.settings["machine"]["device"])
    base: list[PreTrainedModel] = []

    def pretrained() -> "PreTrainedModel":
        if not base:
            base.append(load_weights(base_folder(lab, cell.settings["model"]), objective, head_seed=seeds["head"]))
        return base[0]

    patient = Patient(model, anatomy, pretrained, lesion_seed(seeds["mask"], cut.draw))
    heads = None if ticket is None else ticket.mask.heads
    beside = Mask() if ticket is None else Mask(mlps=ticket.mask.mlps, neurons=ticket.mask.neurons)
    before, places, rows = _read_predictions(lab.folder(dense)), PLACES[cut.where](anatomy.n_layers), list[dict[str, Any]]()
    for i, layers in enumerate(places):
        with done(cut, layers, patient, heads), masked(model, anatomy, beside):
            predictions = _predict_all(cell, lab, data, model)
        said = {"kind": "lesion", "stage": "pruned", "draw": cut.draw, "lesion": said_of(cut, layers, anatomy.n_layers)}
        rows += _score_rows(cell, data, predictions, before, said)
        progress((i + 1) / len(places))
    write_rows(out / "lesions.jsonl", rows)
    spared = heads is not None and bool(heads.all())
    write_json(out / "result.json", {"warnings": ["the ticket removes no heads, so none was destroyed"] if spared else []})


# ------------------------------------------------------------------------------------------------------------- helpers


def _run_seeds(settings: Mapping[str, Any]) -> RunSeeds:
    return RunSeeds(**{name: seed for name, seed in settings["seeds"].items() if name != "run"})


def lesion_seed(mask_seed: int, draw: int) -> int:
    """The seed of a lesion: every draw of every run destroys the weights otherwise."""
    return int(fingerprint(["lesion", mask_seed, draw])[:12], 16)


def _ticket(cell: Cell, lab: Lab) -> Ticket | None:
    taken = cell.inputs.get("ticket")
    return None if taken is None else _read_ticket(taken, lab)


def _read_ticket(taken: Cell | Given, lab: Lab) -> Ticket:
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
    kind: str = "full",
) -> None:
    """scores.jsonl (the fields of a ScoreRow), subgroups.jsonl and predictions.jsonl."""
    what = {"kind": kind, "draw": 0} if ticket is None else {"kind": ticket.kind, "draw": ticket.details.get("draw", 0)}
    what, groups = what | {"stage": stage}, []
    for role, (split, set_) in data.evaluated().items():
        if set_.groups is not None:
            common = _where(cell, what, split, role)
            members = dict(zip(set_.ids, set_.groups, strict=True))
            by_group = subgroup_scores(predictions[role], members, data.task.metric if data.task.regression else "accuracy")
            groups += [common | {"group": name} | asdict(one) for name, one in by_group.items()]
    write_rows(out / "scores.jsonl", _score_rows(cell, data, predictions, dense, what))
    write_rows(out / "subgroups.jsonl", groups)
    write_rows(
        out / "predictions.jsonl",
        (
            {"role": role, "id": row, "label": label, "logits": logits} | ({"weight": one.weights[i]} if one.weights else {})
            for role, one in predictions.items()
            for i, (row, label, logits) in enumerate(zip(one.ids, one.labels, one.logits.tolist(), strict=True))
        ),
    )


def _where(cell: Cell, what: Mapping[str, Any], split: str, role: str) -> dict[str, Any]:
    """What every score of a cell says of itself."""
    settings = cell.settings
    said = {"model": settings["model"]["name"], "task": settings["data"]["task"], "seed": settings["seeds"]["run"]}
    return said | dict(what) | {"split": split, "role": role}


def _score_rows(
    cell: Cell,
    data: TaskData,
    predictions: Mapping[str, Predictions],
    dense: Mapping[str, Predictions] | None,
    what: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The fields of a ScoreRow for every set of rows and metric; `what` are those that say of which model."""
    names, rows = data.task.labels, []
    for role, (split, _) in data.evaluated().items():
        flips = None if dense is None else agreement(dense[role], predictions[role])
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
        metrics = (data.task.metric, *data.task.extra_metrics)
        rows += [common | asdict(score(predictions[role], metric)) | {"agreement": said} for metric in metrics]
    return rows


def _by_name(counts: Mapping[int, int] | None, names: tuple[str, ...]) -> dict[str, int]:
    """Class name → count; nothing where there are no classes."""
    return {} if counts is None else {name: counts.get(i, 0) for i, name in enumerate(names)}


def _read_predictions(folder: Path) -> dict[str, Predictions]:
    by_role: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(folder / "predictions.jsonl"):
        by_role.setdefault(row["role"], []).append(row)
    return {
        role: Predictions(
            tuple(row["id"] for row in rows),
            torch.tensor([row["logits"] for row in rows]),
            tuple(row["label"] for row in rows),
            tuple(row["weight"] for row in rows) if "weight" in rows[0] else None,
        )
        for role, rows in by_role.items()
    }


def _empty_mask(mask: Mask) -> list[str]:
    empty = [name for name, (kept, _) in mask.counts_by_type().items() if kept == 0]
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


def _lesion_work(cell: Cell) -> float:
    return EXPECTED_PLACES[cell.settings["lesion"]["where"]] * _rows(cell, "selection", "report", "challenge")


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
            bare_name(data.get("task", "")),
            f"seed {seeds.get('run', '?')}",
        )
        if x
    )


def _about(cell: Cell) -> str:
    ticket = cell.inputs.get("ticket")
    if cell.step == "train_mode":
        return str(cell.settings["mode"])
    if cell.step == "control":
        return f"{cell.settings['kind']} {cell.settings['draw']}"
    if cell.step == "lesion":
        return f"{Cut(**cell.settings['lesion'])} ({cell.settings['lesion']['where']})"
    if cell.step == "derive":
        return str(cell.settings["rule"])
    tested = _about(ticket) if isinstance(ticket, Cell) and ticket.step in ("control", "derive") else "good" if ticket else ""
    dense = cell.inputs.get("dense")
    longer = isinstance(dense, Cell) and cell.settings["train"]["epochs"] != dense.settings["train"]["epochs"]
    return f"{tested}, {cell.settings['train']['epochs']} epochs" if longer else tested


STEPS: dict[str, Step] = {
    "fine_tune": Step(1, run_training, _training_work, _title),
    "search": Step(1, run_search, _search_work, _title),
    "control": Step(1, run_control, lambda cell: 1.0, _title),
    "derive": Step(1, run_derive, lambda cell: 1.0, _title),
    "evaluate": Step(2, run_evaluate, lambda cell: _rows(cell, "selection", "report", "challenge"), _title),
    "lesion": Step(1, run_lesion, _lesion_work, _title),
    "train_mode": Step(1, run_training, _training_work, _title),
    "retrain": Step(1, run_training, _training_work, _title),
}
