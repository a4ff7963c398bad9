"""Mask training, what can be chosen: where scores start, how they become a mask, how sparsity rises, when a mask is taken.

`tombola.search.scored` does it.
Source: Liu et al. 2022, sections 3 and 4, after Mallya et al. 2018 and Zhao et al. 2020; movement: Sanh et al. 2020; hard
concrete: Louizos, Welling, Kingma 2018, with the Lagrangian of Wang, Wohlwend, Lei 2020.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from tombola.errors import SettingsError, TombolaError
from tombola.losses import LossName
from tombola.prune import Granularity

Unit = Literal["values", "heads", "mlps", "neurons"]
Estimator = Literal["identity", "clamped", "bernoulli", "hard_concrete"]
ScoreInit = Literal["hard", "soft", "random", "double_uniform", "uniform", "zero"]
Rule = Literal["exact_top_k", "gt_threshold", "ge_threshold"]

# A score that has no signal is moved by Adam all the same, some 0.6 · rate · √steps far under a rate that falls to 0. So the rate
# that lets noise go as far as the published one does, whatever the number of steps, is this over √steps (5e-5 · √61,360).
RATE = 0.0124
THRESHOLD = 0.01  # t of the published initialisations: a hard start has scores of 0 and 2t


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedSettings:
    """Options of mask training, by the names of the reproduction's table; the defaults are its `corrected` column."""

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.7  # removed share of the maskable values or parts at the end, in [0, 1)
    unit: Unit = "values"
    scope: str = "liu2022"  # of values: which parameters are maskable, see `tombola.scope`
    granularity: Granularity = "per_matrix"  # or global; of parts per layer, or all of a kind together
    # identity: straight through. clamped: the same, without a gradient for scores beyond [−1, 1]. bernoulli: drawn anew in each
    # forward pass with probability sigmoid(score), straight through. hard_concrete: L0, drawn gates in [0, 1] and a Lagrangian
    estimator: Estimator = "identity"
    score_init: ScoreInit = "hard"
    score_init_draw: Literal["without_replacement", "with_replacement"] = "without_replacement"  # of inits that draw a subset
    mask_rule: Rule = "exact_top_k"
    sparsity_refresh_steps: Annotated[int, Ge(1)] = 1  # optimizer steps between two selections
    schedule: Literal["fixed", "stepwise", "cubic"] = "fixed"
    start_sparsity: Annotated[float, Ge(0), Lt(1)] = 0.7  # of a schedule that rises
    schedule_begin: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of training at which it begins to rise
    gradual_end: Annotated[float, Gt(0), Le(1)] = 0.75  # and at which it has arrived
    schedule_stages: Annotated[int, Ge(1)] = 10  # of stepwise
    mask_loss: LossName = "ce"  # see `tombola.losses`; a teacher is the model itself
    train_weights: bool = False  # movement pruning: weights are trained beside the scores
    mask_epochs: Annotated[int, Ge(1)] = 5
    # of scores; None: `RATE` / √steps. The published 5e-5 is for 61,360 steps: in a few hundred the mask stays where it started
    mask_learning_rate: Annotated[float, Gt(0)] | None = None
    mask_warmup_steps: Annotated[int, Ge(0)] = 0
    # best: of so many masks met on the way, from a share of training on and never before the last sparsity is reached, the one
    # that scores highest on the selection rows; of equals the first. last: what training ends with
    mask_choice: Literal["best", "last"] = "best"
    choice_from: Annotated[float, Ge(0), Le(1)] = 0.7
    choice_looks: Annotated[int, Ge(1)] = 5


def check_learned(settings: LearnedSettings, *, cell: bool = False) -> None:
    """Raises: SettingsError with every setting that does not go with another, or that a search as a cell does not have."""
    problems = []
    if settings.schedule != "fixed" and settings.start_sparsity > settings.sparsity:
        problems.append(
            TombolaError(
                "the schedule cannot reach its target",
                got=f"start_sparsity {settings.start_sparsity}, sparsity {settings.sparsity}",
                expected="start_sparsity ≤ sparsity",
            )
        )
    if settings.schedule != "fixed" and settings.schedule_begin >= settings.gradual_end:
        problems.append(
            TombolaError(
                "the schedule cannot reach its target",
                got=f"schedule_begin {settings.schedule_begin}, gradual_end {settings.gradual_end}",
                expected="schedule_begin < gradual_end",
            )
        )
    if settings.mask_rule != "exact_top_k" and settings.estimator in ("bernoulli", "hard_concrete"):
        problems.append(TombolaError("drawn gates have no threshold", got=settings.mask_rule, expected="mask_rule exact_top_k"))
    if settings.score_init == "hard" and settings.schedule != "fixed" and settings.mask_rule != "exact_top_k":
        problems.append(
            TombolaError(
                "a threshold cannot rise among scores that are all 0 or all the same", got="score_init hard", expected="soft"
            )
        )
    if settings.train_weights and cell:
        problems.append(
            TombolaError("a search leaves the weights as they are", got="train_weights", next="learn_mask trains both, in Python")
        )
    if problems:
        raise SettingsError(problems)


def sparsity_at(settings: LearnedSettings, share: float) -> float:
    """The sparsity at a share of training in [0, 1].

    cubic: p_f + (p_i − p_f)·(1 − x)³, x from 0 to 1 between schedule_begin and gradual_end. stepwise: in each stage the same
    share of what is left, s ← s + (1 − s)·r, with r such that the last stage ends at p_f.
    """
    end, start = settings.sparsity, settings.start_sparsity
    if settings.schedule == "fixed":
        return end
    x = min(max((share - settings.schedule_begin) / (settings.gradual_end - settings.schedule_begin), 0.0), 1.0)
    if x == 1.0:
        return end
    if settings.schedule == "cubic":
        return end + (start - end) * (1 - x) ** 3
    stage = math.floor(x * settings.schedule_stages)
    return float(1 - (1 - start) * ((1 - end) / (1 - start)) ** (stage / settings.schedule_stages))


def rate_of(settings: LearnedSettings, steps: int) -> float:
    """The learning rate of scores, in a run of so many optimizer steps."""
    return RATE / math.sqrt(max(steps, 1)) if settings.mask_learning_rate is None else settings.mask_learning_rate


def looks_at(settings: LearnedSettings, steps: int) -> frozenset[int]:
    """Before which of `steps` optimizer steps a mask is looked at; that of the end is looked at besides.

    Evenly from `choice_from` on, and of a schedule that rises only those at which it has arrived.
    """
    if settings.mask_choice == "last":
        return frozenset()
    n, begin = settings.choice_looks, settings.choice_from
    at = {round(steps * (begin + (1 - begin) * i / n)) for i in range(n)}
    return frozenset(step for step in at if 0 < step < steps and sparsity_at(settings, step / steps) == settings.sparsity)
