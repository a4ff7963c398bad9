"""Mask training: what a step of it costs beside the step that trains the same matrices, and what masks on one model take."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from measure import POOL_ROWS, Figure, Setup, fresh, rows_of
from tombola.gates import masked
from tombola.scope import scope_parameters
from tombola.search.learned import LearnedSettings
from tombola.search.scored import ScoredMask
from tombola.tasks.encode import collate
from ways import ReleasedMask, bucketed, training_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS, SPARSITY = 10, 0.7  # steps a round
# abs(W): in a step or two a hard start moves nothing over the threshold, and all that is chosen anew is as it was
SETTINGS = LearnedSettings(sparsity=SPARSITY, score_init="soft", mask_choice="last")

# What is trained, and what is done after each step.
Turn = tuple[list[nn.Parameter], Callable[[], object]]


def mask_step(setup: Setup, task: str) -> list[Figure]:
    """Steps on the same batches of one and the same model, all else of it standing still: in turn the matrices alone are trained,
    scores on them in the released form, and ours. Which comes first changes from round to round; each turn begins with a step
    that makes the moments and is not counted. Processor seconds, which company on the machine moves least; an entry is a step.

    step              of ours, selection apart, over that of the matrices
    selection         exact, of every matrix, as ours makes it after each step; over our step
    published         step of the released form, over that of the matrices
    its thresholds    set every 500 steps there; over our step
    floats/score      what the optimizer remembers
    switch            a mask of values put on and taken off again, over a forward pass of 32 rows
    bytes/mask        what each further mask takes a value, as it waits to be put on
    Asserted: both forms give the same scores' gradients; our mask moves no weight and copies none.
    """
    setup = fresh(setup)
    model, rows = setup.model, rows_of(setup, task, "train", POOL_ROWS)
    names, order = list(scope_parameters(model, setup.anatomy, SETTINGS.scope)), bucketed(rows, 0)
    _assert_same_gradients(setup, names, collate(rows, order[0]))
    turns = {
        "matrices": partial(_matrices, model, names),
        "published": partial(_released, model, names),
        "ours": partial(_ours, setup),
    }
    steps: dict[str, list[float]] = {way: [] for way in turns}
    after: dict[str, list[float]] = {way: [] for way in turns}

    for i in range(setup.rounds):
        batches = [collate(rows, order[at % len(order)]) for at in range(i * STEPS, (i + 1) * STEPS)]
        for way in [*turns][i % len(turns) :] + [*turns][: i % len(turns)]:
            before = {name: (x.data_ptr(), x.detach().clone()) for name, x in _matrices_of(model, names).items()}
            with turns[way]() as (parameters, select):
                optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True)
                training_step(model, optimizer, batches[0])
                for batch in batches:
                    clock = [time.process_time()]
                    training_step(model, optimizer, batch)
                    clock.append(time.process_time())
                    select()
                    clock.append(time.process_time())
                    steps[way].append(clock[1] - clock[0])
                    after[way].append(clock[2] - clock[1])
                moments = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.ndim)
                floats = moments / sum(x.numel() for x in parameters)
            if way != "matrices":
                for name, x in _matrices_of(model, names).items():
                    assert x.data_ptr() == before[name][0] and torch.equal(x, before[name][1]), f"{way} moved {name}"
    n_values = sum(x.numel() for x in _matrices_of(model, names).values())
    of_ours = f"{n_values:,} scores; processor time over that of the same step, all else standing still"
    return [
        Figure("mask-step", task, "step", _ratios(steps["ours"], steps["matrices"]), of_ours),
        Figure("mask-step", task, "published", _ratios(steps["published"], steps["matrices"]), of_ours),
        Figure("mask-step", task, "selection", _ratios(after["ours"], steps["ours"]), "over our step: exact, after each"),
        Figure(
            "mask-step", task, "its thresholds", _ratios(after["published"], steps["ours"]), "over our step: after every 500th"
        ),
        Figure("mask-step", task, "floats/score", [floats], "of the optimizer, and one number a tensor"),
        *_switching(setup, names, task, lambda: collate(rows, order[0])),
    ]


def _switching(setup: Setup, names: Sequence[str], task: str, batch: Callable[[], Mapping[str, Tensor]]) -> list[Figure]:
    model, given, ratios = setup.model.eval(), batch(), list[float]()
    with ScoredMask(model, setup.anatomy, SETTINGS) as scored:
        mask = scored.mask()
    for _ in range(setup.rounds + 1):
        clock = [time.process_time()]
        with torch.no_grad():
            model(**given)
        clock.append(time.process_time())
        with masked(model, setup.anatomy, mask):
            pass
        clock.append(time.process_time())
        ratios.append((clock[2] - clock[1]) / (clock[1] - clock[0]))
    n_bytes = sum(part.untyped_storage().nbytes() for part in mask.values.values())
    n_values = sum(model.get_parameter(name).numel() for name in names)
    return [
        Figure("mask-step", task, "switch", ratios[1:], "on and off again, over a forward pass of 32 rows"),
        Figure("mask-step", task, "bytes/mask", [n_bytes / n_values], "a value, of each further mask; the model is not copied"),
    ]


# ------------------------------------------------------------------------------------------------------------ three turns


@contextmanager
def _matrices(model: "PreTrainedModel", names: Sequence[str]) -> Iterator[Turn]:
    model.requires_grad_(False)
    trained = list(_matrices_of(model, names).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield trained, lambda: None
    finally:
        model.requires_grad_(True)


@contextmanager
def _released(model: "PreTrainedModel", names: Sequence[str]) -> Iterator[Turn]:
    model.requires_grad_(False)
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    forms = [ReleasedMask(module.get_parameter(own), SPARSITY) for module, own in places]
    for (module, own), form in zip(places, forms, strict=True):
        parametrize.register_parametrization(module, own, form)
    try:
        yield [form.scores for form in forms], lambda: _set_thresholds(forms)
    finally:
        for module, own in places:
            parametrize.remove_parametrizations(module, own, leave_parametrized=False)
        model.requires_grad_(True)


def _set_thresholds(forms: Sequence[ReleasedMask]) -> None:
    for form in forms:
        form.set_threshold()


@contextmanager
def _ours(setup: Setup) -> Iterator[Turn]:
    with ScoredMask(setup.model, setup.anatomy, SETTINGS) as scored:
        yield scored.parameters(), scored.refresh


def _assert_same_gradients(setup: Setup, names: Sequence[str], batch: Mapping[str, Tensor]) -> None:
    """Both forms choose the same by scores without ties, so that the scores' gradients are the same but for rounding."""
    model, found = setup.model.eval(), list[list[Tensor]]()
    for turn in (_released(model, names), _ours(setup)):
        draws = torch.Generator().manual_seed(0)
        with turn as (parameters, select):
            for scores in parameters:
                with torch.no_grad():
                    scores.copy_(torch.randperm(scores.numel(), generator=draws).reshape(scores.shape) / scores.numel())
            select()
            model(**batch).loss.backward()
            found.append([x.grad.clone() for x in parameters if x.grad is not None])
            model.zero_grad()
    for name, theirs, mine in zip(names, *found, strict=True):
        most = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * most, msg=f"gradients of {name}")


def _matrices_of(model: "PreTrainedModel", names: Sequence[str]) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(name) for name in names}


def _ratios(some: Sequence[float], over: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(some, over, strict=True)]
