"""s-pruning: remove whole heads and MLPs, least important first, while the score holds the floor.

Source: Prasanna et al. 2020, sec. 3.1 and App. B (E2 – E4 of the reproduction's list). A pass over the selection rows
under a mask gives its score *and* the importance of what is left, so that a step costs one pass. Steps are fractions of
all heads (all MLPs) of the model, which makes 14, 7 and 1 of BERT-base's 144 heads and 12 MLPs into 7, 3 and 1 of a
6-layer model's 72 and 6.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt

from tombola.evaluate import Score, score, score_and_gradients
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.prune import lowest
from tombola.scores import REDUCTIONS, Importance, min_max, normalise, sensitivity
from tombola.search.floor import FloorRule, floor_score, holds
from tombola.tasks.encode import Encoded

Procedure = Literal["joint", "heads", "mlps"]
if TYPE_CHECKING:
    Reduction = str
else:
    Reduction = Literal[*REDUCTIONS]
Amount = Annotated[int, Ge(1)] | Annotated[float, Gt(0), Lt(1)]  # a count, or a fraction of all; at least one goes

# What each phase removes a step: (name, which head step, whether an MLP goes). The paper's joint procedure goes on with
# heads only and then with MLPs only, each from the last mask that held.
PHASES: dict[str, tuple[tuple[str, str | None, bool], ...]] = {
    "joint": (("joint", "s_head_step", True), ("heads", "s_heads_only_phase_step", False), ("mlps", None, True)),
    "heads": (("heads", "s_head_step", False),),
    "mlps": (("mlps", None, True),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SPruneSettings:
    """Options of s-pruning, by the names of the reproduction's table; the defaults are its `corrected` column."""

    procedure: Procedure = "joint"
    floor: Annotated[float, Gt(0), Le(1)] = 0.9  # share of the full score the mask must hold, in (0, 1]
    floor_rule: FloorRule = "fraction_of_full"
    importance_reduction: Reduction = "per_example"
    importance_batch_size: Annotated[int, Ge(1)] = 64  # plays a part under per_batch and accumulated only
    importance_norm_members: Literal["remaining_heads", "all_heads"] = "remaining_heads"
    importance_minmax: bool = False  # scores to [0, 1] over all heads and over all MLPs; changes no order but by rounding
    mlp_importance_norm: Literal["none", "token_count"] = "none"  # over the number of real tokens; changes no order
    rollback_importance: Literal["recompute", "keep_failed"] = "recompute"
    s_head_step: Amount = 0.10  # heads a step
    s_head_step_base: Literal["total", "remaining"] = "total"  # what the fractions of heads are fractions of
    s_heads_only_phase_step: Amount = 0.05
    s_mlp_step: Amount = 1 / 12  # MLPs a step, of all


@dataclass(frozen=True, slots=True)
class Trial:
    """One mask that was tried."""

    phase: str  # "full" for the dense model, then "joint" | "heads" | "mlps"
    mask: Mask
    score: Score  # on the selection rows
    importance: Importance  # of the parts under this mask, raw
    passed: bool


@dataclass(frozen=True, slots=True)
class SPruneResult:
    mask: Mask  # the last that held the floor
    trials: tuple[Trial, ...]  # in order, the dense model first
    floor_score: float


def s_prune(
    gates: Gates,
    selection: Encoded,
    metric: str,
    settings: SPruneSettings,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> SPruneResult:
    """The smallest mask on the path of s-pruning whose score on the selection rows holds the floor.

    The gates' model is the fine-tuned one; its weights are not touched and the gates are open again afterwards.
    Raises: SearchError when the full model is no better than the majority line (see `floor_score`).
    """
    trials: list[Trial] = []

    def attempt(phase: str, mask: Mask, floor: float) -> Trial:
        gates.set(mask)
        predictions, gradients = score_and_gradients(gates, selection)
        importance = sensitivity(gradients, settings.importance_reduction, settings.importance_batch_size)
        result = score(predictions, metric)
        trials.append(Trial(phase, mask, result, importance, holds(result, floor)))
        progress(trials[-1])
        return trials[-1]

    try:
        kept = attempt("full", gates.anatomy.full_mask(), -float("inf"))
        floor = floor_score(kept.score, settings.floor, settings.floor_rule)
        importance = kept.importance
        for phase, head_step, with_mlp in PHASES[settings.procedure]:
            while True:
                of = kept.mask if settings.s_head_step_base == "remaining" else gates.anatomy.full_mask()
                heads = 0 if head_step is None else _step(getattr(settings, head_step), _kept_heads(of))
                mlps = _step(settings.s_mlp_step, gates.anatomy.n_layers) if with_mlp else 0
                smaller = remove_lowest(kept.mask, importance, heads, mlps, settings, tokens=sum(selection.lengths))
                if smaller == kept.mask:
                    break
                trial = attempt(phase, smaller, floor)
                if not trial.passed:  # roll back; under keep_failed the next phase starts from the failed mask's scores
                    importance = trial.importance if settings.rollback_importance == "keep_failed" else kept.importance
                    break
                kept, importance = trial, trial.importance
    finally:
        gates.set(gates.anatomy.full_mask())
    return SPruneResult(kept.mask, tuple(trials), floor)


def remove_lowest(
    mask: Mask,
    importance: Importance,
    heads: int,
    mlps: int,
    settings: SPruneSettings = SPruneSettings(),
    *,
    tokens: int = 1,
) -> Mask:
    """`mask` without its `heads` least important heads and `mlps` least important MLPs, or all that are left of them.

    Head scores are normalised within their layer first, then both as the settings say; `tokens` are those of the selection.
    """
    assert mask.heads is not None and mask.mlps is not None
    members = mask.heads if settings.importance_norm_members == "remaining_heads" else torch.ones_like(mask.heads)
    head_scores, mlp_scores = normalise(importance.heads, members), importance.mlps
    if settings.mlp_importance_norm == "token_count":
        mlp_scores = mlp_scores / tokens
    if settings.importance_minmax:
        head_scores, mlp_scores = min_max(head_scores), min_max(mlp_scores)
    return Mask(
        heads=mask.heads & ~lowest(head_scores, min(heads, _kept_heads(mask)), mask.heads),
        mlps=mask.mlps & ~lowest(mlp_scores, min(mlps, int(mask.mlps.sum())), mask.mlps),
    )


def _step(amount: int | float, n: int) -> int:
    """How many of `n` go: a count, or a fraction of them (int(0.1 · 144) = 14, as released); at least one."""
    return amount if isinstance(amount, int) else max(1, int(amount * n))


def _kept_heads(mask: Mask) -> int:
    assert mask.heads is not None
    return int(mask.heads.sum())
