"""What it costs to hold single values at zero while a model trains: steps under a mask beside the same steps without.

One step of each in turn, on the same batch, of one and the same model, from which the hooks are taken off and on again
while the clock stands: two models in two places of memory differ by more than what is measured. Which comes first
changes from pair to pair. What counts is the median of the pairs' ratios. The target is at most 1.03.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

import tombola.held
from benchmarks import STEPS, Setup, Timed, gemm_speed, measure, rows_of
from tombola.anatomy import Anatomy
from tombola.held import HeldValues
from tombola.mask import Mask
from tombola.tasks.encode import collate
from tombola.ticket import load_weights
from ways import Batch, adamw, bucketed, training_step

SPARSITY = 0.7


def random_values(anatomy: Anatomy, seed: int) -> Mask:
    """A mask that removes 70 % of every weight matrix of the encoder's layers."""
    generator, values = torch.Generator().manual_seed(seed), {}
    for layer in anatomy.layers:
        a = layer.attention
        for projection in (a.q, a.k, a.v, a.o, *layer.mlp.ins, layer.mlp.out):
            shape = (projection.n_out, projection.n_in)
            values[f"{projection.path}.weight"] = torch.rand(shape, generator=generator) >= SPARSITY
    return Mask(values=values)


def held(setup: Setup, task: str) -> list[Timed]:
    """Steps of fine-tuning on dev sentences (SST-2's train rows are phrases), dense and held; an entry is a step.

    The held step ends with what the callback does, `enforce`. `details` of held, medians: `ratio` of the pairs, in seconds;
    `cost`, processor seconds in gradient hooks and in `enforce` to those of the rest of the same step, plus 1, which company
    on the machine moves far less. Asserted: a byte a value, and zeros.
    """
    setup = replace(setup, model=load_weights(setup.folder, ("0", "1"), head_seed=0))
    model, optimizer, values = setup.model, adamw(setup.model), random_values(setup.anatomy, seed=0).values
    timed = {way: Timed("held", task, way) for way in ("dense", "held")}
    costs: list[float] = []
    rows = rows_of(setup, task, "report", None)
    order = bucketed(rows, 0)
    training_step(model, optimizer, collate(rows, order[0]))  # makes the moments
    ways = ["dense", "held"]

    for i in range(setup.rounds):
        gemm = gemm_speed()
        for numbers in (order[at % len(order)] for at in range(i * STEPS, (i + 1) * STEPS)):
            batch = collate(rows, numbers)
            for way in ways:
                with _clocked() as spent:
                    holding = HeldValues(model, values if way == "held" else {})
                holding.clean(optimizer)

                def run(holding: HeldValues = holding, batch: Batch = batch, spent: list[float] = spent) -> None:
                    training_step(model, optimizer, batch)
                    start = time.process_time()
                    holding.enforce()
                    spent.append(time.process_time() - start)

                start = time.process_time()
                measure(setup, timed[way], len(numbers), gemm, "weights, dropout", run)
                whole = time.process_time() - start
                if way == "held":
                    assert not any(bool(model.get_parameter(name).detach()[~part].any()) for name, part in values.items())
                    n_values = sum(part.numel() for part in values.values())
                    n_bytes = sum(part.untyped_storage().nbytes() for part in holding.values.values())
                    assert n_bytes == n_values, (n_bytes, n_values)
                    timed[way].details |= {"values": n_values, "bytes": n_bytes}
                    costs.append(whole / (whole - sum(spent)))
                holding.remove()
            ways.reverse()

    ratios = [b / a for a, b in zip(timed["dense"].seconds, timed["held"].seconds, strict=True)]
    timed["held"].details |= {"ratio": median(ratios), "cost": median(costs), "ratios": ratios, "costs": costs}
    return list(timed.values())


@contextmanager
def _clocked() -> Iterator[list[float]]:
    """The processor seconds of every call of a gradient hook that is made while this is open."""
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


def parts(anatomy: Anatomy, rounds: int = 50) -> dict[str, Any]:
    """Milliseconds of one multiplication of all masked matrices, in place, by masks of several kinds: medians."""
    mask = random_values(anatomy, seed=0)
    tensors = {name: torch.randn(part.shape) for name, part in mask.values.items()}
    kinds = {kind: {n: p.to(kind) for n, p in mask.values.items()} for kind in (torch.float32, torch.uint8, torch.bool)}
    removed = {name: ~part for name, part in mask.values.items()}
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for kind, masks in kinds.items():
            start = time.perf_counter()
            for name, x in tensors.items():
                x.mul_(masks[name])
            seconds.setdefault(str(kind), []).append(time.perf_counter() - start)
        start = time.perf_counter()
        for name, x in tensors.items():
            x.masked_fill_(removed[name], 0.0)
        seconds.setdefault("masked_fill_", []).append(time.perf_counter() - start)
    return {kind: 1e3 * median(some) for kind, some in seconds.items()}
