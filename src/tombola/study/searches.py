"""What each method does inside a search cell: one function and one row of `METHODS` each.

A method gets the fine-tuned model, the selection rows and its settings, and says which mask it found and how it came there,
in the same words for all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tombola.anatomy import Anatomy
from tombola.evaluate import Score, predict, score
from tombola.gates import Gates, masked
from tombola.mask import Mask
from tombola.scope import scope_parameters
from tombola.search.learned import LearnedSettings
from tombola.search.magnitude import MPruneSettings, MTrial, m_prune
from tombola.search.one_shot import OneShotSettings, one_shot
from tombola.search.scored import learn_mask
from tombola.search.structured import SPruneSettings, Trial, s_prune
from tombola.tasks.encode import Encoded
from tombola.train import Recipe, RunSeeds, TrainLog

# procedure of s-prune → the scope of its tickets: which parts are kept or removed whole
STRUCTURED = {"joint": "heads+mlps", "heads": "heads+mlps", "mlps": "heads+mlps", "neurons": "neurons", "layers": "layers",
              "heads+neurons": "heads+neurons"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found."""

    mask: Mask
    scope: str
    full: Score  # of the dense model, on the selection rows
    kept: Score  # under the mask, on the same rows
    floor_score: float | None  # what the mask had to hold; None for a method without a floor
    path: list[dict[str, Any]]  # of each trial: step, phase, kept (part → entries), score, passed; the dense model first
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # what was measured at each step, to be stored beside it
    said: tuple[str, ...] = ()  # what a user would not expect
    log: TrainLog | None = None  # of a method that trains


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a search is given."""

    model: Any
    anatomy: Anatomy
    selection: Encoded
    metric: str
    settings: Mapping[str, Any]
    seed: int  # the run's mask seed, for criteria that draw
    trial: Callable[[Trial | MTrial], None]  # called after each trial; of a method without a floor never
    # of methods that train: rows, seeds, rows a step, a loss that is not the model's own, and how, as `fine_tune` takes it
    train: Callable[[], Encoded]
    seeds: RunSeeds
    batch_size: int
    recipe: Callable[[], Recipe | None]
    how: Mapping[str, Any]


def _s_prune(asked: Asked) -> Outcome:
    settings = SPruneSettings(**asked.settings)
    with Gates(asked.model, asked.anatomy) as gates:
        result = s_prune(gates, asked.selection, asked.metric, settings, asked.trial)
    scope = STRUCTURED[settings.procedure]
    path = [
        {"step": step, "phase": trial.phase, "score": trial.score.value, "passed": trial.passed}
        | {"kept": _kept(trial.mask, whole_layers=scope == "layers")}
        for step, trial in enumerate(result.trials)
    ]
    kept = next(trial for trial in reversed(result.trials) if trial.mask == result.mask)
    full, tensors = result.trials[0].score, _importances(result.trials)
    return Outcome(result.mask, scope, full, kept.score, result.floor_score, path, tensors)


def _m_prune(asked: Asked) -> Outcome:
    settings = MPruneSettings(**asked.settings)
    names = list(scope_parameters(asked.model, asked.anatomy, settings.scope))
    result = m_prune(asked.model, names, asked.selection, asked.metric, settings, asked.trial, seed=asked.seed)
    path = [
        {"step": t.step, "phase": "m-prune" if t.step else "full", "score": t.score.value, "passed": t.passed}
        | {"kept": {"values": t.kept}}
        for t in result.trials
    ]
    trials = result.trials
    return Outcome(result.mask, settings.scope, trials[0].score, trials[result.steps].score, result.floor_score, path)


def _one_shot(asked: Asked) -> Outcome:
    settings = OneShotSettings(**asked.settings)
    names = list(scope_parameters(asked.model, asked.anatomy, settings.scope))
    full = score(predict(asked.model, asked.selection), asked.metric)
    result = one_shot(asked.model, names, asked.selection, asked.metric, settings, seed=asked.seed)
    assert result.score is not None
    return Outcome(result.mask, settings.scope, full, result.score, None, [])


def _learned(asked: Asked) -> Outcome:
    settings = LearnedSettings(**asked.settings)
    full, recipe = score(predict(asked.model, asked.selection), asked.metric), asked.recipe()
    loss, said = (None, {}) if recipe is None else (recipe.loss, recipe.said)

    def look() -> float:
        return score(predict(asked.model, asked.selection), asked.metric).value

    found = learn_mask(
        asked.model, asked.anatomy, asked.train(), settings, asked.seeds, loss=loss, look=look, said=said,
        batch_size=asked.batch_size, **asked.how,
    )  # fmt: skip
    with masked(asked.model, asked.anatomy, found.mask):
        kept = score(predict(asked.model, asked.selection), asked.metric)
    drifted = found.drift is not None and found.drift > 1e-3
    doubts = (f"between two selections the sparsity drifted by up to {found.drift:.3f}",) if drifted else ()
    path = [{"step": step, "phase": "learned", "loss": value} for step, value in found.log.losses]
    scope = settings.scope if settings.unit == "values" else "neurons" if settings.unit == "neurons" else "heads+mlps"
    return Outcome(found.mask, scope, full, kept, None, path, said=doubts, log=found.log)


TRAINED = ("learned",)  # methods that train, and so can be gone on with

# method → how it runs; its settings class is in `tombola.search.SEARCHES`.
METHODS: dict[str, Callable[[Asked], Outcome]] = {
    "s-prune": _s_prune,
    "m-prune": _m_prune,
    "one-shot": _one_shot,
    "learned": _learned,
}


def _kept(mask: Mask, *, whole_layers: bool) -> dict[str, int]:
    """Part → how many are kept; a layer is kept where its MLP is."""
    kept = {name: kept for name, (kept, _) in mask.counts().items()}
    return {"layers": kept["mlps"]} if whole_layers else kept


def _importances(trials: tuple[Trial, ...]) -> dict[str, Tensor]:
    """Importance and mask of every trial: [step, layer, head], [step, layer] and, of neurons, [step, layer, d_ffn]."""
    scored = {
        f"{unit.removesuffix('s')}_importance": [getattr(t.importance, unit) for t in trials]
        for unit in ("heads", "mlps", "neurons", "layers")
        if getattr(trials[0].importance, unit) is not None
    }
    masks = {unit: [t.mask.parts()[unit].to(torch.uint8) for t in trials] for unit in trials[0].mask.parts()}
    return {name: torch.stack(steps) for name, steps in (scored | masks).items()}
