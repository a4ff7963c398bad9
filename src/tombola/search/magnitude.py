"""m-pruning: remove single values of weights, lowest score first, while the score of the model holds the floor.

Source: Prasanna et al. 2020, sec. 2 and 4 (E1 of the reproduction's list): a step removes a fraction of what remains, by
global magnitude; nothing is trained between steps. The path is nested, so that a step is one multiplication of the live
weights; these are put back at the end.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from tombola.criteria import CRITERIA, Given, parameters_of
from tombola.evaluate import Score, predict, score
from tombola.gates import restored
from tombola.mask import Mask
from tombola.prune import Granularity, count_of, groups, without_lowest
from tombola.search.floor import UNSAID, FloorRule, StopMetric, floor_score, holds
from tombola.tasks.encode import Encoded, batches

if TYPE_CHECKING:
    CriterionName = str
else:
    CriterionName = Literal[*CRITERIA]  # a new criterion is one row there, and no word here


@dataclass(frozen=True, slots=True, kw_only=True)
class MPruneSettings:
    """Options of m-pruning, by the names of the reproduction's table; the defaults are its `corrected` column."""

    criterion: CriterionName = "magnitude"
    scope: str = "prasanna2020"  # which parameters are maskable, see `tombola.scope`
    granularity: Granularity = "global"  # values compete with all others, or within their own parameter
    m_step_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05  # removed a step
    m_step_base: Literal["remaining", "total"] = "remaining"  # what it is a fraction of
    m_max_steps: Annotated[int, Ge(1)] | None = None  # masks tried at most; None = until the floor breaks
    floor: Annotated[float, Gt(0), Le(1)] = 0.9  # share of the full score the mask must hold, in (0, 1]
    floor_rule: FloorRule = "fraction_of_full"
    stsb_stop_metric: StopMetric = field(default="pearson", metadata=UNSAID)
    criterion_refresh: Literal["each_step", "once"] = "each_step"  # of criteria that look at rows; others do not change


@dataclass(frozen=True, slots=True)
class MTrial:
    """One mask that was tried; `step` 0 is the dense model."""

    step: int
    kept: int  # values
    maskable: int
    score: Score  # on the selection rows
    passed: bool

    @property
    def sparsity(self) -> float:
        """Removed share of the maskable values."""
        return 1.0 - self.kept / self.maskable


@dataclass(frozen=True, slots=True)
class MPruneResult:
    mask: Mask  # the last that held the floor
    trials: tuple[MTrial, ...]  # in order, the dense model first
    floor_score: float

    @property
    def steps(self) -> int:
        """k: how many steps held the floor."""
        return sum(trial.passed for trial in self.trials) - 1


def m_prune(
    model: nn.Module,
    names: Sequence[str],
    selection: Encoded,
    metric: str,
    settings: MPruneSettings,
    progress: Callable[[MTrial], None] = lambda trial: None,
    *,
    seed: int = 0,
) -> MPruneResult:
    """The smallest mask on the path of m-pruning whose score on the selection rows holds the floor.

    `model` is the fine-tuned one, `names` its maskable parameters (resolved from `settings.scope` by the caller), `seed`
    that of a criterion that draws. A step removes exactly round(fraction · base) values, of all parameters together or of
    each; the search ends when the floor breaks, after `m_max_steps`, or before a step that would remove nothing or all
    that is left. While it runs the live weights are those of the mask being tried; they are put back bit for bit, also
    after an error. Memory: one copy of the maskable values, and their scores.

    Raises: SearchError when the full model is no better than the majority line (see `floor_score`); MaskError for names
    that the model does not have; DataError as the criterion does.
    """
    parameters, criterion = parameters_of(model, names), CRITERIA[settings.criterion]
    kept = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    maskable, trials = count_of(kept.values()), list[MTrial]()

    def attempt(mask: Mapping[str, Tensor], floor: float) -> MTrial:
        result = score(predict(model, selection), metric)
        trials.append(MTrial(len(trials), count_of(mask.values()), maskable, result, holds(result, floor)))
        progress(trials[-1])
        return trials[-1]

    def scores() -> dict[str, Tensor]:
        rows = batches(selection, device=next(model.parameters()).device) if criterion.needs_rows else None
        return criterion.scores(Given(model=model, names=names, batches=rows, seed=seed))

    with restored(parameters.values()):
        floor = floor_score(attempt(kept, -float("inf")).score, settings.floor, settings.floor_rule)
        of = scores()
        while settings.m_max_steps is None or len(trials) <= settings.m_max_steps:
            if len(trials) > 1 and criterion.needs_rows and settings.criterion_refresh == "each_step":
                of = scores()
            smaller = _next(kept, of, settings)
            if smaller is None:
                break
            multiply(parameters, smaller)
            if not attempt(smaller, floor).passed:
                break
            kept = smaller
    return MPruneResult(Mask(values=kept), tuple(trials), floor)


def _next(kept: Mapping[str, Tensor], scores: Mapping[str, Tensor], settings: MPruneSettings) -> dict[str, Tensor] | None:
    """`kept` after one more step; None when the step would remove nothing, or everything."""
    steps: list[tuple[list[str], int]] = []
    for names in groups(list(kept), settings.granularity):
        left = count_of(kept[name] for name in names)
        base = left if settings.m_step_base == "remaining" else sum(kept[name].numel() for name in names)
        steps.append((names, min(round(settings.m_step_fraction * base), left)))
    if not 0 < sum(count for _, count in steps) < count_of(kept.values()):
        return None
    smaller: dict[str, Tensor] = {}
    for names, count in steps:
        smaller |= without_lowest({name: scores[name] for name in names}, count, kept)
    return smaller


def multiply(parameters: Mapping[str, nn.Parameter], mask: Mapping[str, Tensor]) -> None:
    """Zeroes what `mask` removes, in place."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.mul_(mask[name].to(p.device))
