"""Iterative magnitude pruning: train, remove the smallest values, rewind what is left, train again.

Source: Chen et al. 2020, Algorithm 1, and their released code (VITA-Group/BERT-Tickets); the rounds and their rewinding after
Frankle et al. 2020 and, for the learning rate alone, Renda et al. 2020. `ImpSettings` has the ways in which the paper, the
released code and correct practice differ.

Order of reading: the settings; the plan of a chain (`sparsities`, `Rewind`, `Round`), which knows no model; the snapshot and the
cut, which are all that touches weights; `imp`, the whole chain in one process. A study runs the same pieces as cells, a round
each.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from tombola.criteria import Given, magnitude, parameters_of
from tombola.errors import SearchError, SettingsError, TombolaError
from tombola.held import HeldValues
from tombola.levels import MOST, Levels
from tombola.mask import Mask
from tombola.prune import Granularity, count_of, groups, without_lowest

Start = Literal["snapshot", "carried"]  # of a round's weights: those of the rewind step, or those the last round ended with


@dataclass(frozen=True, slots=True, kw_only=True)
class ImpSettings:
    """Options of a chain, by the names of the reproduction's table; the defaults are its `corrected` column."""

    scope: str = "chen2020"  # which parameters are maskable; of BERT-base its 73 matrices
    granularity: Granularity = "global"
    # linear: a tenth of all values a round (10, 20, … %); geometric: a tenth of what remains (10, 19, 27.1, … %)
    imp_schedule: Literal["linear", "geometric"] = "linear"
    imp_step: Annotated[float, Gt(0), Lt(1)] = 0.1
    imp_last_level: Annotated[float, Gt(0), Le(1)] = 0.9  # sparsity of the last level; its step may be smaller than the others
    cut_count: Literal["exact", "rounded_per_call"] = (
        "exact"  # rounded_per_call: round(share · what is left), whose errors add up
    )
    # step_N, epoch_X, percent_X of a full run: what is left goes back to the weights of that step. none: it trains on from where
    # it is (standard pruning). learning_rate_only: likewise, and the schedule starts anew each round whatever its span
    rewind: Annotated[str, "see `Rewind.read`"] = "step_0"
    # aliased_mlm: of masked language modelling the kept copy is the live weights themselves, so that rewinding does nothing
    rewind_source: Literal["immutable", "aliased_mlm"] = "immutable"
    head_rewind: Literal["own_init", "carried"] = "own_init"  # carried: the task's head is never rewound
    lr_schedule_span: Literal["round", "whole_chain"] = "round"  # whole_chain: one linear decay over all rounds
    round_end: Literal["full_run", "fixed_step_count"] = "full_run"  # fixed: rows // batch_size steps an epoch, which falls short
    # same: every round sees the rows in one order; continuing_rng: it goes on where the last one stopped
    round_data_order: Literal["same", "continuing_rng", "seed_and_round"] = "seed_and_round"
    mlm_first_cut: Literal["after_training", "before_training"] = (
        "after_training"  # before: level 1 is cut from the start weights
    )
    # of masked language modelling: evaluation masks drawn once for all, or anew by each run; blocks weighed by their masked
    # tokens, or all alike as padded ones are
    mlm_eval_masks: Literal["fixed_by_seed", "redrawn"] = "fixed_by_seed"
    mlm_accuracy_weight: Literal["masked_tokens", "padded_tokens"] = "masked_tokens"
    # best: a level reports the best of looks at the ends of epochs, chosen on the selection rows; it is labelled so
    report_checkpoint: Literal["last", "best"] = "last"
    # off_by_one: the artefact of a level holds the mask of the level before it (of MLM two before), as the released files do
    artefact_level: Literal["single", "off_by_one"] = "single"
    # kept_values: weight decay also acts on what is kept in store of removed values. Nothing that is trained or scored depends on
    # it, as a test shows: removed values are 0 wherever they are read, and a rewind takes them from the snapshot
    pruned_weight_decay: Literal["none", "kept_values"] = "none"
    squad_epochs: Annotated[int, Ge(1)] = 2  # of SQuAD, where neither epochs nor steps are set
    mlm_finetune_steps: Literal["16x10000", "8x20000"] = "16x10000"  # batch × steps of MLM, where none of its settings are
    std_kind: Literal["sample", "none"] = "sample"  # matching is judged by it: n − 1; none: rules that need one say nothing


# ------------------------------------------------------------------------------------------------------- the plan of a chain


def sparsities(settings: ImpSettings) -> tuple[float, ...]:
    """The removed share of the maskable values at levels 1, 2, …, each in (0, 1]; the last is `imp_last_level`.

    Raises: SearchError when there would be more than 255 levels.
    """
    found: list[float] = []
    step, last = settings.imp_step, settings.imp_last_level
    for k in range(1, MOST + 1):
        at = round(k * step, 12) if settings.imp_schedule == "linear" else 1.0 - (1.0 - step) ** k
        if at >= last - 1e-9:
            return (*found, last)
        found.append(at)
    raise SearchError("a chain of so many levels cannot be kept", got=f"more than {MOST}", expected="a larger imp_step")


def settings_for(settings: ImpSettings, *, mlm: bool) -> ImpSettings:
    """The settings as they act on a task: what is of masked language modelling alone plays no part elsewhere."""
    return settings if mlm else replace(settings, rewind_source="immutable", mlm_first_cut="after_training")


@dataclass(frozen=True, slots=True)
class Rewind:
    """Where a round starts: `kind` says what goes back, `amount` in which unit of a full run to where."""

    kind: Literal["weights", "learning_rate_only", "none"]
    unit: Literal["step", "epoch", "percent"] = "step"
    amount: float = 0.0

    @staticmethod
    def read(text: str) -> "Rewind":
        """Of "step_500", "epoch_1", "percent_5", "none", "learning_rate_only". Raises: SettingsError for anything else."""
        if text in ("none", "learning_rate_only"):
            return Rewind(text)  # type: ignore[arg-type]
        found = re.fullmatch(r"(step|epoch|percent)_(\d+(?:\.\d+)?)", text)
        if found is None or (found[1] == "step" and "." in found[2]):
            raise SettingsError(
                [
                    TombolaError(
                        "this is no place to rewind to",
                        got=repr(text),
                        expected="step_N, epoch_X, percent_X, none or learning_rate_only; step_0 is the start",
                    )
                ]
            )
        return Rewind("weights", found[1], float(found[2]))  # type: ignore[arg-type]

    def step(self, steps: int, steps_per_epoch: int) -> int:
        """i, of a full run of so many steps. Raises: SettingsError for a step at its end or past it."""
        per = {"step": 1.0, "epoch": float(steps_per_epoch), "percent": steps / 100}[self.unit]
        at = round(self.amount * per)
        if at >= steps:
            raise SettingsError(
                [
                    TombolaError(
                        "the rewind step is past the end of a round",
                        got=f"{self.unit}_{self.amount:g} is step {at}",
                        expected=f"less than the {steps} steps of a full run ({steps_per_epoch} an epoch)",
                        next="rewind to an earlier step, or train longer",
                    )
                ]
            )
        return at


@dataclass(frozen=True, slots=True)
class Round:
    """What one round trains, all numbers in optimizer steps; `level` is that of the mask it holds, from 0."""

    level: int
    start: Start  # of the weights
    head: Start  # of the task's head
    steps: int
    rows_from: int  # where in the endless order of the run's rows it begins
    schedule_from: int  # its first step on the schedule of the learning rate …
    schedule_steps: int  # … which is so long
    data_round: int  # 0: the order of the rows is that of the data seed; else it is drawn for this round

    def describe(self) -> dict[str, Any]:
        """As JSON, by the names of the fields."""
        return {name: getattr(self, name) for name in self.__slots__}


def rounds(settings: ImpSettings, *, rows: int, batch_size: int, epochs: int, steps: int | None = None) -> tuple[Round, ...]:
    """The rounds of a chain, that of the dense model first, and last the one that trains the last level.

    rows, batch_size, epochs: of a full run; steps: its length where that is no number of epochs.
    Raises: SettingsError for a `rewind` that cannot be read or is past the end; SearchError as `sparsities`.
    """
    rewind, n = Rewind.read(settings.rewind), len(sparsities(settings)) + 1
    per_epoch = -(-rows // batch_size)
    if steps is None:
        counted = per_epoch if settings.round_end == "full_run" else max(1, rows // batch_size)
        steps = counted * epochs
    first = rewind.step(steps, per_epoch) if rewind.kind == "weights" else 0
    live = rewind.kind != "weights" or settings.rewind_source == "aliased_mlm"
    length, whole = steps - first, settings.lr_schedule_span == "whole_chain" and rewind.kind != "learning_rate_only"
    found = []
    for level in range(n):
        carried: Start = "carried" if live and level else "snapshot"
        head: Start = "carried" if level and (live or settings.head_rewind == "carried") else "snapshot"
        continuing = settings.round_data_order == "continuing_rng"
        found.append(
            Round(
                level=level,
                start=carried,
                head=head,
                steps=length,
                rows_from=first + (level * length if continuing else 0),
                schedule_from=first + (level * length if whole else 0),
                schedule_steps=first + length * (n if whole else 1),
                data_round=level if settings.round_data_order == "seed_and_round" else 0,
            )
        )
    return tuple(found)


def order_seed(data_seed: int, data_round: int) -> int:
    """The seed of the order of rows in a round; round 0 has the run's own, so that it is the dense model's run."""
    if data_round == 0:
        return data_seed
    return int.from_bytes(hashlib.sha256(f"imp order|{data_seed}|{data_round}".encode()).digest()[:4], "big")


# ----------------------------------------------------------------------------------------------------------------- weights


class Snapshot:
    """The weights of the rewind step, θ_i and γ_i: a copy that shares no memory with any model and is never written to.

    Buffers that are saved with a model belong to it; parameters that are tied are one.
    """

    def __init__(self, model: nn.Module) -> None:
        held = HeldValues.on(model)
        if held is not None:
            raise SearchError("a snapshot is of a model that holds no mask", got="a model whose removed values are zero already")
        self._state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Name → value; not to be written to."""
        return MappingProxyType(self._state)

    @property
    def digest(self) -> str:
        """SHA-256 (32 hex characters) over names, types, shapes and bytes."""
        digest = hashlib.sha256()
        for name, value in sorted(self._state.items()):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:32]

    def restore(self, model: nn.Module, names: Sequence[str] | None = None) -> None:
        """Writes the snapshot, or the named tensors of it, into the model in place; what a mask removes too."""
        state = model.state_dict()
        wanted = self._state if names is None else {name: self._state[name] for name in names}
        with torch.no_grad():
            for name, value in wanted.items():
                state[name].copy_(value)

    def check(self, model: nn.Module, mask: Mask, carried: Sequence[str] = ()) -> None:
        """Every value of the model that the mask keeps, and every parameter it does not name, is the snapshot's bit for bit;
        every removed value is 0. `carried`: parameters that are not rewound and may be anything where they are kept.

        Raises: SearchError naming what differs.
        """
        wrong: list[str] = []
        for name, value in model.state_dict().items():
            kept = mask.values.get(name)
            live, wanted = value.detach().cpu(), self._state[name]
            if kept is not None:
                if bool(live[~kept].ne(0).any()):
                    wrong.append(f"{name}: {int(live[~kept].ne(0).sum())} removed values are not 0")
                live, wanted = live[kept], wanted[kept]
            if name not in carried and not _same_bits(live, wanted):
                wrong.append(f"{name}: values other than those of the rewind step")
        if wrong:
            raise SearchError(
                "the rewind did not give back the weights of the rewind step",
                got="; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
                expected="every surviving value bit for bit as it was",
                next="report this: a chain that is not rewound finds no lottery ticket",
            )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def cut(model: nn.Module, kept: Mapping[str, Tensor], settings: ImpSettings, *, since: float, to: float) -> dict[str, Tensor]:
    """The mask of the next level: `kept`, of sparsity `since`, without the values of lowest magnitude in the model.

    exact: so many go that round(to · n) are gone in all, of all parameters together or of each; rounded_per_call: round(share of
    what is left), as repeated calls of a pruning library do. Ties go by position.
    Raises: SearchError when `to` is not above `since`; MaskError for NaN, and for names the model lacks.
    """
    if not 0 <= since < to <= 1:
        raise SearchError("a level removes more than the one before", got=f"{since} and then {to}", expected="rising, up to 1")
    scores = magnitude(Given(model=model, names=list(kept)))
    smaller: dict[str, Tensor] = {}
    for names in groups(list(kept), settings.granularity):
        n, left = sum(kept[name].numel() for name in names), count_of(kept[name] for name in names)
        if settings.cut_count == "exact":
            count = round(to * n) - (n - left)
        else:
            count = round(round((to - since) / (1.0 - since), 12) * left)  # 1 / (10 − k), of which 0.3 − 0.2 falls short
        smaller |= without_lowest({name: scores[name] for name in names}, max(0, min(count, left)), kept)
    return smaller


# ---------------------------------------------------------------------------------------------------- the chain in one process


@dataclass(frozen=True, slots=True)
class ImpResult:
    levels: Levels
    rounds: tuple[Round, ...]
    snapshot: str  # its digest: the same in every round

    @property
    def mask(self) -> Mask:
        """Of the last level."""
        return self.levels.mask(self.levels.n)


def imp(
    model: nn.Module,
    names: Sequence[str],
    train: Callable[[nn.Module, Round], object],
    plan: Sequence[Round],
    settings: ImpSettings,
    *,
    before_rewind_step: Callable[[nn.Module], object] = lambda model: None,
    head: Sequence[str] = (),
    progress: Callable[[int, Mask], object] = lambda level, mask: None,
) -> ImpResult:
    """The nested masks of a chain, with training as a function of the caller's.

    model                the pre-trained one with its head; ends rewound, under the mask of the last level and with it held no
                         longer
    names                its maskable parameters (resolved from `settings.scope` by the caller)
    train(model, round)  trains in place for `round.steps`, with a new optimizer; the mask is held meanwhile
    plan                 of `rounds`; the round that trains the last level may be left out
    before_rewind_step   trains the model in place up to the rewind step, without a mask
    head                 names of the task head's parameters, for head_rewind=carried
    progress(level, mask)  is told each mask as it is found

    After every rewind each surviving value is compared with the snapshot bit for bit. Memory: the snapshot, and two bytes a
    maskable value: its mask, and the level at which it goes. Raises: SearchError when a rewind did not give back the snapshot;
    MaskError as `cut`.
    """
    parameters = parameters_of(model, names)
    before_rewind_step(model)
    snapshot = Snapshot(model)
    kept = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    pruned_at = {name: torch.zeros(p.shape, dtype=torch.uint8) for name, p in parameters.items()}
    body = [name for name in snapshot.state if name not in set(head)]
    at = (0.0, *sparsities(settings))
    n_levels = len(at) - 1
    for one in plan[:n_levels]:
        if one.level:
            _rewind(model, snapshot, one, body, head, Mask(values=kept))
        if not (one.level == 0 and settings.mlm_first_cut == "before_training"):
            holding = HeldValues(model, kept, copy=False)
            try:
                train(model, one)
                holding.enforce()
            finally:
                holding.remove()
        smaller = cut(model, kept, settings, since=at[one.level], to=at[one.level + 1])
        for name, gone_at in pruned_at.items():
            gone_at[kept[name] & ~smaller[name]] = one.level + 1
        kept = smaller
        progress(one.level + 1, Mask(values=kept))
    last = plan[n_levels] if len(plan) > n_levels else plan[-1]
    _rewind(model, snapshot, last, body, head, Mask(values=kept))
    return ImpResult(Levels(pruned_at, n_levels), tuple(plan), snapshot.digest)


def _rewind(model: nn.Module, snapshot: Snapshot, one: Round, body: Sequence[str], head: Sequence[str], mask: Mask) -> None:
    """Puts back what this round starts from and zeroes what the mask removes; proved where anything was put back."""
    if one.start == "snapshot":
        snapshot.restore(model, body)
    if one.head == "snapshot":
        snapshot.restore(model, head)
    holding = HeldValues(model, mask.values, copy=False)
    holding.remove()  # it has zeroed the removed values
    if one.start == "snapshot":
        snapshot.check(model, mask, carried=head if one.head == "carried" else ())
