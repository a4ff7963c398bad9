"""Mask training: which values, or which parts, to keep is learned by gradient descent on scores, the weights standing still.

    forward    W' = W · m,  m = 1 for the highest scores, 0 for the rest
    backward   ∂L/∂score = ∂L/∂W' · W, as if m were the score itself (straight through)

A `ScoredMask` sits on a live model: each of its parameters reads as W · m while W itself is kept, so that taking the mask off
gives every bit back, and several masks may take turns on one model. What is trained is the scores alone (`parameters()`), or
the weights too: straight-through scores that start at 0, with weights that move, are movement pruning.
Sparsity is exact at every refresh, by position among equals; between two of them the mask stands still, but under the published
rule ("gt_threshold", "ge_threshold"), where it drifts, and `drift` says how far.
Source: Liu et al. 2022, sections 3 and 4, after Mallya et al. 2018 and Zhao et al. 2020; movement: Sanh et al. 2020; hard
concrete: Louizos, Welling, Kingma 2018, with the Lagrangian of Wang, Wohlwend, Lei 2020.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from tombola.anatomy import Anatomy
from tombola.errors import MaskError
from tombola.mask import Mask
from tombola.prune import count_of, groups, prune
from tombola.scope import scope_parameters
from tombola.search.learned import THRESHOLD, LearnedSettings, Unit, check_learned, looks_at, rate_of, sparsity_at
from tombola.tasks.encode import Encoded
from tombola.train import Recipe, RunSeeds, TrainLog, TrainSettings, fine_tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch of the hard concrete law


@dataclass(slots=True)
class _Part:
    """One tensor of scores, what it chooses now, and how either is spread over each parameter it rules."""

    scores: nn.Parameter
    kept: Tensor  # bool, of the shape of `scores`
    best: Tensor  # likewise: that of the best mask so far
    spread: Mapping[str, Callable[[Tensor], Tensor]]  # parameter -> scores or mask in a shape that broadcasts with it
    threshold: float = -math.inf


class ScoredMask:
    """A mask on `model` whose scores can be trained. `remove()`, or the end of `with`, takes it off.

    Values removed now are multiplied by zero in every forward pass; the weights behind them are as they were. With
    `train_weights` unset no weight requires a gradient while the mask is on; what did before does again afterwards. Scores and
    choice are parameters and buffers of the model meanwhile, so that Trainer trains and saves them. Move the model first: it must
    stay on its device.
    Raises: MaskError for a scope that matches nothing; SettingsError as `check_learned`.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, settings: LearnedSettings, seed: int = 0) -> None:
        check_learned(settings)
        self.model, self.settings = model, settings
        self._draws = torch.Generator().manual_seed(seed)
        self._parts = _parts_of(model, anatomy, settings)
        self._selections, self._drift = 0, 0.0
        # (score, step) of the best mask so far; like the mask a part of the model's state, so that a checkpoint brings it back
        self._best = torch.tensor([-math.inf, -1.0], dtype=torch.float64, device=next(model.parameters()).device)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        start = settings.sparsity if settings.schedule == "fixed" else settings.start_sparsity
        self._start(start)
        if not settings.train_weights:
            for parameter in self._trained:
                parameter.requires_grad_(False)
        self.multipliers = nn.ParameterList(
            nn.Parameter(torch.zeros(())) for _ in range(2 if settings.estimator == "hard_concrete" else 0)
        )
        for one in self.multipliers:  # the Lagrangian is a maximum over these
            one.register_hook(torch.neg)
        self._rules = [name for part in self._parts.values() for name in part.spread]
        for part in self._parts.values():
            for name, spread in part.spread.items():
                path, _, own = name.rpartition(".")
                parametrize.register_parametrization(model.get_submodule(path), own, _Rule(self, part, spread))

    def parameters(self) -> list[nn.Parameter]:
        """What is to be trained: the scores, of L0 its two multipliers, and with `train_weights` the weights."""
        weights = self._trained if self.settings.train_weights else []
        return [*(part.scores for part in self._parts.values()), *self.multipliers, *weights]

    @property
    def drift(self) -> float | None:
        """Largest distance, over the refreshes so far, between the sparsity asked for and that of the mask just before it."""
        return self._drift if self._selections > 1 else None

    def refresh(self, sparsity: float | None = None) -> None:
        """Chooses anew, by the scores of now: exactly `round(sparsity · n)` are removed (of each group, see `granularity`).

        Under a published rule it sets the thresholds instead, at the k-th lowest score. Call it before the first step, and every
        `sparsity_refresh_steps` after one.
        Raises: MaskError when a score is not a number.
        """
        if sparsity is not None:
            self.sparsity_now = sparsity
        self._measure_drift()
        scores = {name: part.scores.detach() for name, part in self._parts.items()}
        rows = _rows_of(scores, self.settings)
        kept = _joined(prune(rows, self.sparsity_now, granularity=self.settings.granularity), scores)
        for group in groups(list(rows), self.settings.granularity):
            self._set_thresholds(group, rows)
        for name, part in self._parts.items():
            part.kept.copy_(kept[name])
        self._selections += 1

    def mask(self) -> Mask:
        """The mask of now, exact at its sparsity whatever the rule: what is saved. True = kept."""
        scores = {name: part.scores.detach() for name, part in self._parts.items()}
        rows = _rows_of(scores, self.settings)
        kept = _joined(prune(rows, self.sparsity_now, granularity=self.settings.granularity), scores)
        return self._as_mask(kept)

    def _as_mask(self, kept: dict[str, Tensor]) -> Mask:
        if self.settings.unit == "values":
            return Mask(values=kept)
        return Mask(**{self.settings.unit: kept[self.settings.unit]}, values={})

    def gradients(self) -> dict[str, Tensor]:
        """What a backward pass has left of each tensor of scores; zeros where none came by."""
        return {
            name: torch.zeros_like(part.scores) if part.scores.grad is None else part.scores.grad.clone()
            for name, part in self._parts.items()
        }

    def remember(self, score: float, step: int) -> None:
        """Keeps the mask of now as the best one if no other had such a score before."""
        if score > float(self._best[0]):
            now = self.mask().parts()
            for name, part in self._parts.items():
                part.best.copy_(now[name])
            self._best.copy_(torch.tensor([score, step], dtype=torch.float64))

    def best(self) -> tuple[Mask, int]:
        """The best mask of those remembered, and its step; without any that of now, at step −1."""
        if int(self._best[1]) < 0:
            return self.mask(), -1
        return self._as_mask({name: part.best.cpu() for name, part in self._parts.items()}), int(self._best[1])

    def actual_sparsity(self) -> float:
        """Removed share of what is maskable in the forward pass of now; under "exact_top_k" what was asked for."""
        masks = [self._chosen(part) for part in self._parts.values()]
        return 1.0 - count_of(masks) / sum(mask.numel() for mask in masks)

    def penalty(self) -> Float[Tensor, ""]:
        """What L0 adds to the loss: λ1·(s − target) + λ2·(s − target)², s the expected sparsity. 0 for other estimators."""
        if not self.multipliers:
            return torch.zeros(())
        alive = torch.cat([_p_not_zero(part.scores).flatten() for part in self._parts.values()])
        gap = (1 - alive.mean()) - self.sparsity_now
        penalty: Tensor = self.multipliers[0] * gap + self.multipliers[1] * gap**2
        return penalty

    def remove(self) -> None:
        """Takes the mask off: every parameter is what it was, or what training made of it, bit for bit."""
        for name in self._rules:
            path, _, own = name.rpartition(".")
            parametrize.remove_parametrizations(self.model.get_submodule(path), own, leave_parametrized=False)
        self._rules = []
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def __enter__(self) -> "ScoredMask":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # -------------------------------------------------------------------------------------------------------- inside

    def _start(self, sparsity: float) -> None:
        """Scores by the initialisation, and the first selection."""
        settings, draws = self.settings, self._draws
        sizes = {name: _magnitude_of(self.model, part) for name, part in self._parts.items()}
        rows = _rows_of(sizes, settings)
        by_size = _joined(prune(rows, sparsity, granularity=settings.granularity), sizes)
        for name, part in self._parts.items():
            n, shape = part.scores.numel(), part.scores.shape
            drawn = _drawn_subset(n, sparsity, settings.score_init_draw, draws).reshape(shape)
            chance = torch.rand(n, generator=draws).reshape(shape)
            starts = {
                "hard": 2 * THRESHOLD * by_size[name],
                "soft": sizes[name],
                "random": 2 * THRESHOLD * drawn,
                "double_uniform": THRESHOLD * (torch.where(drawn, 1.1, 0.5) + 0.4 * chance),
                "uniform": 2 * THRESHOLD * chance,
                "zero": torch.zeros(shape),
            }
            with torch.no_grad():
                part.scores.copy_(starts[settings.score_init])
                if settings.estimator == "hard_concrete":  # the same order, about a density of 1 − sparsity
                    part.scores.add_(math.log((1 - sparsity) / max(sparsity, 1e-6)) - part.scores.mean())
        self.refresh(sparsity)

    def _set_thresholds(self, group: Sequence[str], rows: Mapping[str, Tensor]) -> None:
        if self.settings.mask_rule == "exact_top_k":
            return
        values = torch.cat([rows[name].flatten() for name in group])
        k = int(len(values) * self.sparsity_now)
        found = float(values.kthvalue(k).values) if k else -math.inf
        if found == float(values.max()):
            return  # as published: a threshold at the largest score would remove everything
        for name in group:
            self._parts[name.partition("#")[0]].threshold = found

    def _measure_drift(self) -> None:
        if self._selections:
            self._drift = max(self._drift, abs(self.actual_sparsity() - self.sparsity_now))

    def _chosen(self, part: _Part) -> Bool[Tensor, "..."]:
        rule = self.settings.mask_rule
        if rule == "exact_top_k":
            return part.kept
        return part.scores.detach() > part.threshold if rule == "gt_threshold" else part.scores.detach() >= part.threshold

    def _gate(self, part: _Part) -> Tensor:
        """What weights are multiplied by now: 0 or 1 with the scores' gradient, or a drawn gate."""
        scores = part.scores
        if self.settings.estimator == "hard_concrete":
            return _hard_concrete(scores) if self.model.training else part.kept.to(scores.dtype)
        chosen = self._chosen(part)
        if self.settings.estimator == "bernoulli" and self.model.training:
            chosen = torch.rand_like(scores) < scores.detach().sigmoid()
        passed = scores.clamp(-1, 1) if self.settings.estimator == "clamped" else scores
        return passed + (chosen.to(scores.dtype) - passed).detach()  # the value of `chosen`, the gradient of the score


class _Rule(nn.Module):
    """Parametrization of one parameter: W → W · m. Scores and choice are a part of the model's state while the mask is on."""

    def __init__(self, owner: ScoredMask, part: _Part, spread: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scores, self.multipliers = part.scores, owner.multipliers
        self.register_buffer("kept", part.kept)
        self.register_buffer("best", part.best)
        self.register_buffer("best_score", owner._best)
        self._owner, self._part, self._spread = owner, part, spread

    def forward(self, weight: Tensor) -> Tensor:
        owner = self._owner
        settings, part = owner.settings, self._part
        straight = settings.estimator == "identity" or (settings.estimator == "bernoulli" and not owner.model.training)
        if straight and settings.unit == "values":
            masked: Tensor = _Straight.apply(weight, part.scores, owner._chosen(part))  # type: ignore[no-untyped-call]
            return masked
        return weight * self._spread(owner._gate(part)).to(weight.dtype)


class _Straight(torch.autograd.Function):
    """W · m without a float for every value of m: the plain form of `ScoredMask._gate`, in a third of its memory."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
        kept = kept.view(torch.uint8)  # on a CPU a product with bool takes twice as long
        ctx.save_for_backward(weight, kept)
        return weight * kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, kept = ctx.saved_tensors
        return (
            gradient * kept if ctx.needs_input_grad[0] else None,
            gradient * weight if ctx.needs_input_grad[1] else None,
            None,
        )


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class LearnedResult:
    """What mask training ended with."""

    mask: Mask  # exact at the sparsity asked for
    log: TrainLog
    drift: float | None  # see `ScoredMask.drift`; None where only one selection was made
    chosen_at: int  # the step that the mask was taken at; the last, unless one before scored higher on the selection rows


RowLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # as `Recipe.loss`


def learn_mask(
    model: "PreTrainedModel",
    anatomy: Anatomy,
    train: Encoded,
    settings: LearnedSettings,
    seeds: RunSeeds,
    *,
    loss: RowLoss | None = None,
    look: Callable[[], float] | None = None,
    said: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    **how: Any,
) -> LearnedResult:
    """The mask that is learned on `train` from the weights of `model`, which has them, untouched, when this returns.

    With `train_weights` the model has its new weights, those the mask was learned with, and the removed ones are not zero.
    loss: of a batch, instead of the model's own; `said`: what it depends on, as JSON. look: how good the model is under its mask
    of now, on rows for choosing; without it the last mask is taken, whatever `mask_choice` says. `how`: device, progress,
    checkpoints and what goes with them, as `fine_tune` takes them; a run that was killed goes on to the same mask.
    Raises: MaskError when the scores end all equal; as `ScoredMask` and `fine_tune`.
    """
    training = TrainSettings(epochs=settings.mask_epochs, batch_size=batch_size, warmup_steps=settings.mask_warmup_steps)
    steps = training.steps_of(len(train))
    training = replace(training, learning_rate=rate_of(settings, steps))
    looks = looks_at(settings, steps) if look is not None else frozenset()
    with ScoredMask(model, anatomy, settings, seeds.mask) as scored:

        def before_step(step: int, share: float) -> None:
            if step % settings.sparsity_refresh_steps == 0 or step in looks:
                scored.refresh(sparsity_at(settings, share))
            if step in looks and look is not None:
                scored.remember(look(), step)

        def with_penalty(logits: Tensor, labels: Tensor, rows: Tensor, share: float) -> Tensor:
            inner = cross_entropy(logits, labels) if loss is None else loss(logits, labels, rows, share)
            return inner + scored.penalty().to(inner)

        log = fine_tune(
            model,
            train,
            training,
            seeds,
            recipe=Recipe(
                loss=with_penalty if loss is not None or scored.multipliers else None,
                before_step=before_step,
                said={"mask": asdict(settings), "seed": seeds.mask} | dict(said or {}),
            ),
            **how,
        )
        scored.refresh(sparsity_at(settings, 1.0))
        check_scores({name: part.scores for name, part in scored._parts.items()})
        if look is not None and settings.mask_choice == "best":
            scored.remember(look(), log.steps)
        mask, at = scored.best()
        return LearnedResult(mask, log, scored.drift, log.steps if at < 0 else at)


# --------------------------------------------------------------------------------------------------------------- helpers


def _parts_of(model: nn.Module, anatomy: Anatomy, settings: LearnedSettings) -> dict[str, _Part]:
    parameters = dict(model.named_parameters())
    if settings.unit == "values":
        names = list(scope_parameters(model, anatomy, settings.scope))
        return {name: _part(parameters[name].shape, {name: _itself}, parameters[name].device) for name in names}
    shape = tuple(anatomy.full_mask(settings.unit).parts()[settings.unit].shape)
    spread = dict(_spreads(anatomy, settings.unit))
    return {settings.unit: _part(shape, spread, next(model.parameters()).device)}


def _part(shape: Sequence[int], spread: Mapping[str, Callable[[Tensor], Tensor]], device: torch.device) -> _Part:
    kept, best = (torch.ones(*shape, dtype=torch.bool, device=device) for _ in range(2))
    return _Part(nn.Parameter(torch.zeros(*shape, device=device)), kept, best, spread)


def _spreads(anatomy: Anatomy, unit: Unit) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Parameter → how the scores of all parts spread over it. Removing the columns that read a part removes the part.

    A head: its columns of o. A neuron: its column of MLP out. An MLP: weight and bias of its out.
    """

    if unit == "heads":
        for i, attention in enumerate(anatomy.attentions):
            yield f"{attention.o.path}.weight", _Columns(i, attention.d_head, attention.o.transposed)
    for i, mlp in enumerate(anatomy.mlps):
        if unit == "neurons":
            yield f"{mlp.out.path}.weight", _Columns(i, 1, mlp.out.transposed)
        if unit == "mlps":
            for name in ("weight", "bias") if mlp.out.has_bias else ("weight",):
                yield f"{mlp.out.path}.{name}", partial(torch.select, dim=0, index=i)


def _itself(scores: Tensor) -> Tensor:
    return scores


@dataclass(frozen=True, slots=True)
class _Columns:
    """Row `layer` of a table of scores, each for so many neighbouring inputs of a projection; broadcasts with its weight."""

    layer: int
    inputs: int
    transposed: bool

    def __call__(self, scores: Tensor) -> Tensor:
        of = scores[self.layer].repeat_interleave(self.inputs)
        return of[:, None] if self.transposed else of[None, :]


def _magnitude_of(model: nn.Module, part: _Part) -> Tensor:
    """abs(W) of values; of parts the mean of abs(W) over what their score rules."""
    total, ones = torch.zeros_like(part.scores), torch.zeros_like(part.scores)
    for name, spread in part.spread.items():
        weight = model.get_parameter(name).detach().abs()
        if spread(part.scores).shape == weight.shape == part.scores.shape:
            return weight.float()
        index = spread(torch.arange(part.scores.numel(), device=weight.device).reshape(part.scores.shape))
        index = index.expand(weight.shape).flatten()
        total.data.view(-1).index_add_(0, index, weight.flatten().float())
        ones.data.view(-1).index_add_(0, index, torch.ones_like(weight).flatten().float())
    return total / ones.clamp_min(1)


def _rows_of(scores: Mapping[str, Tensor], settings: LearnedSettings) -> dict[str, Tensor]:
    """What competes per matrix: each parameter; of parts those of one layer."""
    if settings.unit in ("values", "mlps") or settings.granularity == "global":
        return dict(scores)
    return {f"{name}#{i}": row for name, of in scores.items() for i, row in enumerate(of)}


def _joined(kept: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for name, part in kept.items():
        rows.setdefault(name.partition("#")[0], []).append(part)
    return {
        name: (torch.stack(some) if "#" in next(iter(kept)) else some[0]).reshape(like[name].shape) for name, some in rows.items()
    }


def _drawn_subset(n: int, sparsity: float, how: str, draws: torch.Generator) -> Bool[Tensor, " n"]:
    """What a random start keeps. With replacement fewer are removed than the sparsity says, as released."""
    count = round(sparsity * n)
    removed = (
        torch.randint(n, (count,), generator=draws) if how == "with_replacement" else torch.randperm(n, generator=draws)[:count]
    )
    kept = torch.ones(n, dtype=torch.bool)
    kept[removed] = False
    return kept


def _hard_concrete(log_alpha: Tensor) -> Tensor:
    u = torch.rand_like(log_alpha).clamp(1e-6, 1 - 1e-6)  # by the generator that a checkpoint brings back
    drawn = ((u.log() - (-u).log1p() + log_alpha) / _BETA).sigmoid()
    return (drawn * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def _p_not_zero(log_alpha: Tensor) -> Tensor:
    """The probability that a hard concrete gate is not 0."""
    return (log_alpha - _BETA * math.log(-_GAMMA / _ZETA)).sigmoid()


def check_scores(scores: Mapping[str, Tensor]) -> None:
    """Raises: MaskError when all scores are equal, so that a selection would go by position alone."""
    flat = torch.cat([one.detach().flatten() for one in scores.values()])
    if len(flat) > 1 and bool((flat == flat[0]).all()):
        raise MaskError(
            "all scores are equal, so that position alone would choose",
            got=f"{len(flat)} scores of {float(flat[0]):g}",
            next="take another score_init, a larger learning rate, or train for longer",
        )
