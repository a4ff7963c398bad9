"""A step of fine-tuning: the way its rows are batched, and what it costs to hold single values at zero meanwhile."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tombola.held
from measure import POOL_ROWS, Figure, Setup, Timed, evenly, fresh, gemm_speed, measure, rows_of
from tombola.anatomy import Anatomy
from tombola.held import HeldValues
from tombola.tasks.encode import Encoded, collate
from ways import WIDTH, Batch, adamw, bucketed, collate_to, shuffled, training_step

STEPS, PUBLISHED_STEPS = 10, 2  # a round; all published steps have one shape
SPARSITY = 0.7


def step(setup: Setup, task: str) -> list[Timed]:
    """Steps of fine-tuning on train rows. A round is ten batches of an epoch, in its order, spread over the widths it has: five
    rounds are the whole epoch of the 1,600 rows."""
    setup = fresh(setup)
    model, optimizer = setup.model, adamw(setup.model)
    rows = rows_of(setup, task, "train", POOL_ROWS)
    orders = {"published": shuffled(len(rows), 0), "dynamic": shuffled(len(rows), 0), "ours": bucketed(rows, 0)}
    ways = {way: Timed("step", task, way, details={"steps": []}) for way in orders}

    for i in range(setup.rounds):
        gemm = gemm_speed()
        for way, timed in ways.items():
            order = _of_round(rows, orders[way], PUBLISHED_STEPS if way == "published" else STEPS, i, setup.rounds)
            ready = [collate_to(rows, numbers, WIDTH) for numbers in order] if way == "published" else []

            def run(order: list[list[int]] = order, ready: list[Batch] = ready, timed: Timed = timed) -> None:
                for batch in ready or (collate(rows, numbers) for numbers in order):
                    start = time.perf_counter()
                    training_step(model, optimizer, batch)
                    timed.details["steps"].append(time.perf_counter() - start)

            measure(setup, timed, sum(map(len, order)), gemm, "weights, dropout", run)
    return list(ways.values())


def _of_round(rows: Encoded, batches: list[list[int]], n: int, i: int, rounds: int) -> list[list[int]]:
    """n batches for round i of `rounds`, evenly spaced among all sorted by width, in their own order."""
    by_width = sorted(range(len(batches)), key=lambda b: max(rows.lengths[row] for row in batches[b]))
    return [batches[b] for b in sorted(by_width[at] for at in evenly(len(batches), n * rounds)[i::rounds])]


# ------------------------------------------------------------------------------------------------------------------- held


def held(setup: Setup, task: str) -> list[Timed | Figure]:
    """Steps of fine-tuning on dev sentences (SST-2's train rows are phrases), dense and held; an entry is a step.

    One step of each in turn, on the same batch, of one and the same model, from which the hooks are taken off and on again
    while the clock stands: two models in two places of memory differ by more than what is measured. Which comes first
    changes from pair to pair. The held step ends with what the callback does, `enforce`.

    cost            processor seconds of a held step over those it spends outside the gradient hooks and `enforce`. It is
                    taken within one step, so that company on the machine moves it far less than the ratio of whole steps.
    whole step      the held step times the dense one, in seconds
    bytes/value     of the masks. Asserted too: every hook ran, and removed values are zero.
    """
    setup = fresh(setup)
    model, optimizer, values = setup.model, adamw(setup.model), random_values(setup.anatomy, seed=0)
    dense, ours = Timed("held", task, "dense"), Timed("held", task, "held")
    rows, costs = rows_of(setup, task, "report", None), list[float]()
    order, turns = bucketed(rows, 0), [dense, ours]
    training_step(model, optimizer, collate(rows, order[0]))  # makes the moments

    for i in range(setup.rounds):
        gemm = gemm_speed()
        for numbers in (order[at % len(order)] for at in range(i * STEPS, (i + 1) * STEPS)):
            batch = collate(rows, numbers)
            for timed in turns:
                with _hooks_clocked() as in_hooks:
                    holding = HeldValues(model, values if timed is ours else {})
                holding.clean(optimizer)
                clock: list[float] = []

                def run(holding: HeldValues = holding, batch: Batch = batch, clock: list[float] = clock) -> None:
                    clock.append(time.process_time())
                    training_step(model, optimizer, batch)
                    clock.append(time.process_time())
                    holding.enforce()
                    clock.append(time.process_time())

                measure(setup, timed, len(numbers), gemm, "weights, dropout", run)
                if timed is ours:
                    assert len(in_hooks) == len(values), f"{len(in_hooks)} of {len(values)} hooks ran"
                    assert not any(bool(model.get_parameter(name).detach()[~part].any()) for name, part in values.items())
                    whole, holds = clock[2] - clock[0], sum(in_hooks) + clock[2] - clock[1]
                    costs.append(whole / (whole - holds))
                    n_bytes = sum(part.untyped_storage().nbytes() for part in holding.values.values())
                holding.remove()
            turns.reverse()

    n_values = sum(part.numel() for part in values.values())
    assert n_bytes == n_values, f"{n_bytes} bytes hold {n_values} values"
    ratios = [after / before for before, after in zip(dense.seconds, ours.seconds, strict=True)]
    return [
        dense,
        ours,
        Figure("held", task, "cost", costs, "processor time of a held step over that of the same step without the holding"),
        Figure("held", task, "whole step", ratios, "seconds, × dense; for information: company on the machine moves it"),
        Figure("held", task, "bytes/value", [n_bytes / n_values], f"{n_values:,} maskable values, {SPARSITY:.0%} of them held"),
        *_multiplications(task, values, setup.rounds * STEPS),
    ]


def random_values(anatomy: Anatomy, seed: int) -> dict[str, Tensor]:
    """Masks (True = kept) that remove 70 % of every weight matrix of the encoder's layers."""
    generator, values = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for layer in anatomy.layers:
        a = layer.attention
        for projection in (a.q, a.k, a.v, a.o, *layer.mlp.ins, layer.mlp.out):
            shape = (projection.n_out, projection.n_in)
            values[f"{projection.path}.weight"] = torch.rand(shape, generator=generator) >= SPARSITY
    return values


@contextmanager
def _hooks_clocked() -> Iterator[list[float]]:
    """The processor seconds of every call of a gradient hook that is put on while this is open."""
    spent: list[float] = []
    original = tombola.held._mask_gradient

    def mask_gradient(*arguments: Any) -> Tensor:
        start = time.process_time()
        masked = original(*arguments)
        spent.append(time.process_time() - start)
        return masked

    tombola.held._mask_gradient = mask_gradient  # type: ignore[assignment]
    try:
        yield spent
    finally:
        tombola.held._mask_gradient = original


def _multiplications(task: str, values: dict[str, Tensor], times: int) -> list[Figure]:
    """What zeroing all matrices in place costs by other masks than uint8: why `held` keeps those."""
    tensors = {name: torch.randn(part.shape) for name, part in values.items()}
    removed = {name: ~part for name, part in values.items()}
    masks = {kind: {name: part.to(kind) for name, part in values.items()} for kind in (torch.uint8, torch.float32, torch.bool)}
    seconds: dict[str, list[float]] = {}
    for _ in range(times):
        for kind, kept in masks.items():
            start = time.perf_counter()
            for name, x in tensors.items():
                x.mul_(kept[name])
            seconds.setdefault(f"by {str(kind).removeprefix('torch.')}", []).append(time.perf_counter() - start)
        start = time.perf_counter()
        for name, x in tensors.items():
            x.masked_fill_(removed[name], 0.0)
        seconds.setdefault("masked_fill_", []).append(time.perf_counter() - start)
    base = seconds.pop("by uint8")
    note = f"one multiplication of all values, × by uint8 ({1e3 * median(base):.1f} ms)"
    return [Figure("held", task, way, [x / y for x, y in zip(some, base, strict=True)], note) for way, some in seconds.items()]
