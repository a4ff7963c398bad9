"""The steps that make tickets: search, control and derive."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tombola.anatomy import Anatomy, layers_of_heads, read_anatomy, size_of
from tombola.canonical import fingerprint
from tombola.criteria import CRITERIA, magnitude
from tombola.criteria import Given as Wanted
from tombola.errors import TombolaError
from tombola.evaluate import Score
from tombola.gates import prove_acts
from tombola.mask import Mask
from tombola.objective import Objective, load_weights
from tombola.prune import prune
from tombola.scope import scope_parameters
from tombola.search.controls import CONTROLS, ControlSettings, control, inverted, needs_scores
from tombola.search.floor import floor_score
from tombola.search.magnitude import MTrial
from tombola.search.structured import Trial
from tombola.source import resolve_model
from tombola.study.cells import Cell, Lab, read_json, write_json
from tombola.study.data import base_folder, encoded_rows, layout_of, same_data
from tombola.study.derived import RULES, Sources
from tombola.study.kinds import CONTROL_KINDS
from tombola.study.searches import METHODS, TRAINED, Asked, Outcome
from tombola.study.steps.losses import loss_of
from tombola.study.steps.shared import from_ticket, lesion_seed, run_seeds, taken_ticket, ticket_of
from tombola.study.steps.training import resumable
from tombola.tasks.encode import batches
from tombola.ticket import Ticket, Weights, locate_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]

EXPECTED_TRIALS = 14  # passes of an s-prune search that goes down to a handful of MLPs; for the estimate of time only


def run_search(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A search on the fine-tuned model; the mask it ends with becomes the good ticket."""
    dense = cell.inputs["model"]
    assert isinstance(dense, Cell)
    of_rows = dense  # whose rows it is searched on
    if "learned_on" in cell.settings:
        of_rows = Cell("rows", 1, {**dense.settings, "data": cell.settings["learned_on"]})
    data = same_data(of_rows, lab)
    search, metric, tried = cell.settings["search"], data.task.metric, list[Trial | MTrial]()
    device = dense.settings["machine"]["device"]

    def count(trial: Trial | MTrial) -> None:
        tried.append(trial)
        progress(min(len(tried) / EXPECTED_TRIALS, 0.95))
        if len(tried) == 1:  # said before the search falls through the floor, which may take hours
            to_floor = search.get("sparsity") is None
            floor = floor_score(trial.score, search["floor"], search["floor_rule"]) if to_floor else None
            for doubt in _doubts_of_search(trial.score, floor):
                lab.reporter.say(doubt)

    def searched(checkpoints: Path | None) -> "tuple[PreTrainedModel, Anatomy, Outcome]":
        model = load_weights(lab.folder(dense) / "weights", data.task.objective, head_seed=0)
        model.to(device)
        anatomy = read_anatomy(model, layout_of(dense.settings["model"]))
        how = {"device": device, "progress": lambda share: progress(0.9 * share), "checkpoints": checkpoints}
        how |= {"every_seconds": lab.checkpoint_seconds, "ours": lambda: lab.store.scratch(cell.key)}
        asked = Asked(
            model=model,
            anatomy=anatomy,
            selection=encoded_rows(lab, of_rows, "selection", data.selection),
            metric=search.get("stsb_stop_metric", metric) if metric == "pearson" else metric,
            settings=search,
            seed=dense.settings["seeds"]["mask"],
            trial=count,
            train=lambda: encoded_rows(lab, of_rows, "train", data.train),
            seeds=run_seeds(dense.settings),
            batch_size=dense.settings["train"]["batch_size"],
            recipe=lambda: loss_of(cell, lab, data, model),
            how=how,
        )
        return model, anatomy, METHODS[cell.settings["method"]](asked)

    base = dense.settings["model"]
    model, anatomy, found = resumable(cell, lab, searched) if cell.settings["method"] in TRAINED else searched(None)
    prove_acts(model, anatomy, found.mask)
    heads, mlps = anatomy.survival(found.mask)
    ticket = good_ticket(
        cell,
        dense,
        mask=found.mask,
        found_on=Weights(
            f"{base['name']} fine-tuned on {data.task.name}",
            read_json(lab.folder(dense) / "train.json")["weights_fingerprint"],
            path=from_ticket(lab, str(lab.folder(dense) / "weights")),
        ),
        anatomy=anatomy,
        scope=found.scope,
        objective=data.task.objective,
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
    )
    ticket.save_pretrained(out / "ticket")
    if found.tensors:
        save_file(dict(found.tensors), out / "steps.safetensors")
    trained = dense.settings["train"]["epochs"] > 0  # of a head as it was drawn nothing is expected
    doubts = _doubts_of_search(found.full, found.floor_score) if trained else []
    said = [*doubts, *_empty_mask(found.mask), *found.said]
    write_json(out / "result.json", {"warnings": said} | ({} if found.log is None else {"train": asdict(found.log)}))


def good_ticket(
    cell: Cell, run: Cell, *, mask: Mask, found_on: Weights, anatomy: Anatomy, scope: str, objective: Objective, **facts: Any
) -> Ticket:
    """The ticket that a cell of a search found; `run` is the one that says model, data, training and seeds."""
    base, said = run.settings["model"], run.settings
    return Ticket(
        mask=mask,
        base=Weights(base["name"], base["fingerprint"], base["revision"]),
        found_on=found_on,
        anatomy=anatomy.summary(),
        kind="good",
        scope=scope,
        sparsity=anatomy.size(mask).sparsity,
        task=said["data"]["task"],
        labels=objective.labels,
        preset=cell.settings["preset"],
        settings={"method": cell.settings["method"], "search": cell.settings["search"], "data": said["data"]}
        | {"train": said["train"], "machine": said["machine"]}
        | ({"objective": asked} if (asked := objective.describe()) else {})
        | ({"layout": base["layout"]} if "layout" in base else {}),
        seeds=said["seeds"],
        cell=cell.key,
        versions=_versions(),
        **facts,
    )


def _doubts_of_search(full: Score, floor: float | None) -> list[str]:
    said = []
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
    good = taken_ticket(cell, lab)
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
    ticket = _made_from(
        good,
        cell,
        lab,
        mask=mask,
        kind=name,
        settings=dict(good.settings) | {"control": {"kind": name, "draw": draw} | asdict(options)},
        details={
            "draw": draw,
            "kept_good": {part: one.size_a for part, one in overlap.items()},
            "shared_with_good": {part: one.shared for part, one in overlap.items()},
        }
        | ({"lesion": {"name": kind.lesion, "seed": lesion_seed(good.seeds["mask"], draw)}} if kind.lesion else {})
        | ({"survival": survival} if survival is not None else {}),
        parents=(good.identity,),
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


def _made_from(ticket: Ticket, cell: Cell, lab: Lab, *, mask: Mask, **changes: Any) -> Ticket:
    """Another ticket on the same base and weights: no metrics, since those are of the ticket it was made from."""
    return replace(
        ticket,
        mask=mask,
        found_on=replace(ticket.found_on, path=from_ticket(lab, ticket.found_on.path)),
        sparsity=size_of(ticket.anatomy, mask).sparsity,
        metrics=(),
        cell=cell.key,
        versions=_versions(),
        **changes,
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tombola", "torch", "transformers")}


# Rules of `CONTROL_KINDS` that draw no mask of the ticket's size: (the ticket's mask, a seed) → mask.
OTHER_RULES: Mapping[str, Callable[[Mask, int], Mask]] = {
    "good": lambda good, seed: good,
    "all": lambda good, seed: good | ~good,
    "inverted": lambda good, seed: inverted(good),
    "inverted-revived": lambda good, seed: inverted(good, revive=seed),
}


def run_derive(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A ticket made from others by a rule of `tombola.study.derived`; base, seeds and weights are those of the input `ticket`."""
    own = taken_ticket(cell, lab)
    assert own is not None
    others = [ticket_of(lab, taken) for role, taken in sorted(cell.inputs.items(), key=lambda one: (len(one[0]), one[0]))
              if role != "ticket"]  # fmt: skip
    rule, options = RULES[cell.settings["rule"]], cell.settings["options"]

    def found_on() -> "tuple[PreTrainedModel, Anatomy]":
        model = load_weights(locate_weights(own, "found_on")[0], own.objective, head_seed=0)
        return model, read_anatomy(model, own.layout)

    made = rule.make(Sources(own, others, options, found_on))
    heads, mlps = _anatomy_of(lab, own).survival(made.mask)
    overlap = {} if made.good is None else made.good.overlap_by_type(made.mask)
    ticket = _made_from(
        own,
        cell,
        lab,
        mask=made.mask,
        kind=rule.kind,
        scope=made.scope,
        settings=dict(own.settings) | {"derived": {"rule": cell.settings["rule"]} | dict(options)},
        details={"survival": {"heads": heads.tolist(), "mlps": mlps.tolist()}, "draw": options.get("draw", 0)}
        | ({"shared_with_good": {part: one.shared for part, one in overlap.items()}} if overlap else {})
        | ({} if made.lesion is None else {"lesion": dict(made.lesion)}),
        parents=tuple(one.identity for one in (own, *others)),
    )
    ticket.save_pretrained(out / "ticket")
    write_json(out / "result.json", {"warnings": _empty_mask(made.mask)})


def run_base_mask(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A mask of the pre-trained weights themselves, in one step and without any training: by magnitude, or by a criterion that
    looks at a few train rows under a head that was only drawn."""
    data, settings = same_data(cell, lab), cell.settings
    search, base, seeds = settings["search"], settings["model"], settings["seeds"]
    model = load_weights(base_folder(lab, base), data.task.objective, head_seed=seeds["head"])
    anatomy, criterion = read_anatomy(model, layout_of(base)), CRITERIA[search["criterion"]]
    model.to(settings["machine"]["device"])
    names = list(scope_parameters(model, anatomy, search["scope"]))
    rows = None
    if criterion.needs_rows:
        drawn = random.Random(seeds["data"]).sample(range(len(data.train)), min(settings["rows"], len(data.train)))
        encoded = encoded_rows(lab, cell, f"train, {settings['rows']} drawn by {seeds['data']}", data.train.take(sorted(drawn)))
        rows = batches(encoded, device=settings["machine"]["device"])
    scores = criterion.scores(Wanted(model=model, names=names, batches=rows, seed=seeds["mask"]))
    mask = Mask(values=prune(scores, search["sparsity"], granularity=search["granularity"]))
    prove_acts(model, anatomy, mask)
    heads, mlps = anatomy.survival(mask)
    ticket = good_ticket(
        cell,
        cell,
        mask=mask,
        found_on=Weights(base["name"], base["fingerprint"], base["revision"]),
        anatomy=anatomy,
        scope=search["scope"],
        objective=data.task.objective,
        details={"survival": {"heads": heads.tolist(), "mlps": mlps.tolist()}},
    )
    ticket.save_pretrained(out / "ticket")
    write_json(out / "result.json", {"warnings": _empty_mask(mask)})


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


def _empty_mask(mask: Mask) -> list[str]:
    empty = [name for name, (kept, _) in mask.counts_by_type().items() if kept == 0]
    return [f"the mask keeps none of the {' and none of the '.join(empty)}"] if empty else []
