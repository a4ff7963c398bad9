"""s-pruning: remove whole parts (heads and MLPs, neurons, heads and neurons, or layers), least important first, while the score
holds the floor, or down to a sparsity.

Source: Prasanna et al. 2020, sec. 3.1 and App. B (E2 – E4 of the reproduction's list), for heads and MLPs; neurons, layers and
a sparsity are ours, by the same rule. A pass over the selection rows under a mask gives its score *and* the importance of what is
left, so that a step costs one pass. Steps are fractions of all heads (all MLPs) of the model, which makes 14, 7 and 1 of
BERT-base's 144 heads and 12 MLPs into 7, 3 and 1 of a 6-layer model's 72 and 6.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from jaxtyping import Int
from torch import Tensor

from tombola.anatomy import Anatomy
from tombola.errors import SearchError
from tombola.evaluate import Score, score, score_and_gradients
from tombola.gates import Gates
from tombola.mask import UNITS, Mask
from tombola.prune import lowest
from tombola.scores import REDUCTIONS, Importance, min_max, normalise, sensitivity
from tombola.search.floor import UNSAID, FloorRule, StopMetric, floor_score, holds
from tombola.tasks.encode import Encoded

Procedure = Literal["joint", "heads", "mlps", "neurons", "heads+neurons", "layers"]
if TYPE_CHECKING:
    Reduction = str
else:
    Reduction = Literal[*REDUCTIONS]
Amount = Annotated[int, Ge(1)] | Annotated[float, Gt(0), Lt(1)]  # a count, or a fraction of all; at least one goes

# Procedure → its phases: (name, which setting says how much of each kind of part goes a step). The paper's joint procedure goes
# on with heads only and then with MLPs only, each from the last mask that held.
PHASES: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "joint": (
        ("joint", {"heads": "s_head_step", "mlps": "s_mlp_step"}),
        ("heads", {"heads": "s_heads_only_phase_step"}),
        ("mlps", {"mlps": "s_mlp_step"}),
    ),
    "heads": (("heads", {"heads": "s_head_step"}),),
    "mlps": (("mlps", {"mlps": "s_mlp_step"}),),
    "neurons": (("neurons", {"neurons": "s_neuron_step"}),),
    # heads compete with heads and neurons with neurons, so that of both the same share goes
    "heads+neurons": (("heads+neurons", {"heads": "s_head_step", "neurons": "s_neuron_step"}),),
    "layers": (("layers", {"layers": "s_layer_step"}),),  # all heads of a layer and its MLP
}
NEAR = 1e-3  # a sparsity is reached to a thousandth: biases that nothing removes keep it from being met to the last digit
# Settings that are a part of a stored search only where its procedure reads them: see `Settings.search_in_use`.
_OF_NEURONS, _OF_LAYERS = {"procedures": ("neurons", "heads+neurons")}, {"procedures": ("layers",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SPruneSettings:
    """Options of s-pruning, by the names of the reproduction's table; the defaults are its `corrected` column."""

    procedure: Procedure = "joint"
    floor: Annotated[float, Gt(0), Le(1)] = 0.9  # share of the full score the mask must hold, in (0, 1]
    floor_rule: FloorRule = "fraction_of_full"
    # Down to this removed share, whatever the score; then the floor plays no part. The last step is made smaller so as to end
    # there, to the part.
    sparsity: Annotated[float, Gt(0), Lt(1)] | None = field(default=None, metadata=UNSAID)
    stsb_stop_metric: StopMetric = field(default="pearson", metadata=UNSAID)
    importance_reduction: Reduction = "per_example"
    importance_batch_size: Annotated[int, Ge(1)] = 64  # plays a part under per_batch and accumulated only
    importance_norm_members: Literal["remaining_heads", "all_heads"] = "remaining_heads"  # likewise of neurons
    importance_minmax: bool = False  # scores to [0, 1] over all parts of a kind; changes no order but by rounding
    mlp_importance_norm: Literal["none", "token_count"] = "none"  # over the number of real tokens; changes no order
    rollback_importance: Literal["recompute", "keep_failed"] = "recompute"
    s_head_step: Amount = 0.10  # heads a step
    s_head_step_base: Literal["total", "remaining"] = "total"  # what the fractions of heads are fractions of
    s_heads_only_phase_step: Amount = 0.05
    s_mlp_step: Amount = 1 / 12  # MLPs a step, of all
    s_neuron_step: Amount = field(default=0.10, metadata=_OF_NEURONS)  # neurons a step, of all
    s_layer_step: Amount = field(default=1 / 12, metadata=_OF_LAYERS)  # layers a step, of all


@dataclass(frozen=True, slots=True)
class Trial:
    """One mask that was tried."""

    phase: str  # "full" for the dense model, then "joint" | "heads" | "mlps" | "neurons" | "heads+neurons" | "layers"
    mask: Mask
    score: Score  # on the selection rows
    importance: Importance  # of the parts under this mask, raw
    passed: bool


@dataclass(frozen=True, slots=True)
class SPruneResult:
    mask: Mask  # the last that held the floor, or that reached the sparsity
    trials: tuple[Trial, ...]  # in order, the dense model first
    floor_score: float | None  # None on the way to a sparsity


def s_prune(
    gates: Gates,
    selection: Encoded,
    metric: str,
    settings: SPruneSettings,
    progress: Callable[[Trial], None] = lambda trial: None,
) -> SPruneResult:
    """The smallest mask on the path of s-pruning whose score on the selection rows holds the floor; with `settings.sparsity` the
    largest that removes so much.

    The gates' model is the fine-tuned one; its weights are not touched and the gates are open again afterwards.
    Raises: SearchError when the full model is no better than the majority line (see `floor_score`), unless a sparsity is asked
    for; then when the parts of the procedure are fewer than that.
    """
    trials: list[Trial] = []
    anatomy, phases = gates.anatomy, PHASES[settings.procedure]
    units = {unit for _, steps in phases for unit in steps}
    dense = anatomy.full_mask(*(sorted(units) if "neurons" in units else ["heads", "mlps"]))
    how = (settings.importance_reduction, settings.importance_batch_size)
    over_rows = partial(score_and_gradients, neurons=how) if "neurons" in units else score_and_gradients
    layer_of = anatomy.layer_of_attention

    def there(mask: Mask) -> bool:
        return settings.sparsity is not None and anatomy.size(mask).sparsity >= settings.sparsity - NEAR

    def smaller_than(trial: Trial, importance: Importance, counts: Mapping[str, int]) -> Mask:
        remove = partial(remove_lowest, trial.mask, importance, settings=settings, tokens=sum(selection.lengths))
        smaller = remove(counts=counts, layer_of_attention=layer_of)
        if settings.sparsity is None:
            return smaller
        now, then = (anatomy.size(mask).sparsity for mask in (trial.mask, smaller))
        share = 1.0 if then <= settings.sparsity + NEAR else (settings.sparsity - now) / (then - now)
        counts = {unit: math.ceil(share * count - 1e-9) for unit, count in counts.items()}
        return smaller if share == 1.0 else remove(counts=counts, layer_of_attention=layer_of)

    def attempt(phase: str, mask: Mask, floor: float) -> Trial:
        gates.set(mask)
        predictions, gradients = over_rows(gates, selection)
        importance = sensitivity(gradients, *how, layer_of_attention=layer_of if "layers" in units else None)
        result = score(predictions, metric)
        trials.append(Trial(phase, mask, result, importance, holds(result, floor)))
        progress(trials[-1])
        return trials[-1]

    _refuse_beyond(anatomy, units, settings)
    try:
        kept = attempt("full", dense, -float("inf"))
        floor = None if settings.sparsity is not None else floor_score(kept.score, settings.floor, settings.floor_rule)
        importance = kept.importance
        for phase, steps in phases:
            while not there(kept.mask):
                counts = {unit: _step(getattr(settings, name), _base(unit, settings, kept.mask)) for unit, name in steps.items()}
                smaller = smaller_than(kept, importance, counts)
                if smaller == kept.mask:
                    break
                trial = attempt(phase, smaller, -float("inf") if floor is None else floor)
                if not trial.passed:  # roll back; under keep_failed the next phase starts from the failed mask's scores
                    importance = trial.importance if settings.rollback_importance == "keep_failed" else kept.importance
                    break
                kept, importance = trial, trial.importance
    finally:
        gates.set(anatomy.full_mask())
    return SPruneResult(kept.mask, tuple(trials), floor)


def _refuse_beyond(anatomy: Anatomy, units: set[str], settings: SPruneSettings) -> None:
    if settings.sparsity is None:
        return
    whole = anatomy.full_mask(*(sorted(units) if "neurons" in units else ["heads", "mlps"]))
    gone = {"heads", "mlps"} if "layers" in units else units
    parts = {name: torch.zeros_like(part) if name in gone else part for name, part in whole.parts().items()}
    most = anatomy.size(Mask(**parts, values={})).sparsity
    if most < settings.sparsity - NEAR:
        raise SearchError(
            f"the procedure {settings.procedure} cannot remove so much",
            got=f"sparsity {settings.sparsity:g}",
            expected=f"at most {most:.3f}, what is left without its parts",
            next="take heads+neurons or joint, or a smaller sparsity",
        )


def remove_lowest(
    mask: Mask,
    importance: Importance,
    counts: Mapping[str, int],
    settings: SPruneSettings = SPruneSettings(),
    *,
    tokens: int = 1,
    layer_of_attention: Int[Tensor, " attention"] | None = None,
) -> Mask:
    """`mask` without the least important parts of each kind, as many as `counts` says, or all that are left of them.

    counts: "heads", "mlps", "neurons" or "layers" → how many go. Scores of heads and of neurons are normalised within their layer
    first, then all as the settings say; `tokens` are those of the selection. A layer takes all its heads along and its MLP: it is
    there while its MLP is, and `layer_of_attention` (see `Anatomy`) says which heads are its own; without it, those of its row.
    """
    parts = {name: part for name, part in mask.parts().items() if name in UNITS}
    for unit, count in counts.items():
        left = parts["mlps" if unit == "layers" else unit]
        gone = lowest(_comparable(unit, importance, left, settings, tokens), min(count, int(left.sum())), left)
        if unit == "layers":
            parts["mlps"] = left & ~gone
            of = gone if layer_of_attention is None else gone[layer_of_attention]
            parts["heads"] = parts["heads"] & ~of[:, None]
        else:
            parts[unit] = left & ~gone
    return Mask(**parts, values=mask.values)


def _comparable(unit: str, importance: Importance, left: Tensor, settings: SPruneSettings, tokens: int) -> Tensor:
    """The scores by which parts of one kind compete, over all layers."""
    scores: Tensor | None = getattr(importance, unit)
    assert scores is not None
    if scores.ndim == 2:
        scores = normalise(scores, left if settings.importance_norm_members == "remaining_heads" else torch.ones_like(left))
    elif unit == "mlps" and settings.mlp_importance_norm == "token_count":
        scores = scores / tokens
    return min_max(scores) if settings.importance_minmax else scores


def _base(unit: str, settings: SPruneSettings, mask: Mask) -> int:
    """What the step of a kind of part is a fraction of: all of them; of heads, as the settings say."""
    part = mask.parts()["mlps" if unit == "layers" else unit]
    return int(part.sum()) if unit == "heads" and settings.s_head_step_base == "remaining" else part.numel()


def _step(amount: int | float, n: int) -> int:
    """How many of `n` go: a count, or a fraction of them (int(0.1 · 144) = 14, as released); at least one."""
    return amount if isinstance(amount, int) else max(1, int(amount * n))
