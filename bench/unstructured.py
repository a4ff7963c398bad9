"""Single values: a whole m-prune search, exact selection, and what a mask weighs on disk."""

import copy
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.prune import L1Unstructured

from measure import POOL_ROWS, Figure, Result, Setup, Timed, fresh, gemm_speed, planned, rows_of, tuned, watched, work_of
from tombola.criteria import CRITERIA, Given
from tombola.mask import Mask
from tombola.prune import count_of, prune
from tombola.scope import scope_parameters
from tombola.search.magnitude import MPruneSettings, MTrial, m_prune
from tombola.tasks import get_task
from tombola.tasks.encode import TOKENS_PER_BATCH, by_length, collate
from ways import WIDTH, adamw, bucketed, published_batches, training_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCOPE, SPARSITY = "prasanna2020", 0.7
MAX_STEPS = 10  # of the search: a model tuned for a minute may have no score to lose, and then nothing else would end it
TIES = 1e-5  # of all values: so many may equal a threshold, of which a comparison takes all or none

# ----------------------------------------------------------------------------------------------------------------- search


def m_search(setup: Setup, task: str) -> list[Timed]:
    """A whole m-prune search on a model tuned once; an entry is a trial. "published" makes the same step by itself after each
    of ours: it sorts all that remains, copies the weights anew and scores rows padded to 128, 64 a batch. Of its batches,
    which all have one shape, one is timed a trial, and counted as often as the dev rows need.

    Asserted: it scores as many tokens as ours times the padding factor, the same of text, and both remove the same values.
    """
    rows = rows_of(setup, task, "report", setup.cap)
    setup = tuned(setup, task)
    model, names = setup.model, list(scope_parameters(setup.model, setup.anatomy, SCOPE))
    rival, settings = copy.deepcopy(model), MPruneSettings(floor_rule="fraction_above_baseline", m_max_steps=MAX_STEPS)
    published, ours = Timed("m-search", task, "published"), Timed("m-search", task, "ours")
    plan, fixed = planned(setup, rows, "published", "none"), published_batches(rows)
    original = {name: rival.get_parameter(name).detach().clone() for name in names}
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in original.items()}

    with watched(model) as seen:
        start = time.perf_counter()

        def replay(trial: MTrial) -> None:
            nonlocal start, masks
            seconds, gemm = time.perf_counter() - start, gemm_speed()
            ours.add(seconds, len(rows), work_of(setup, seen, "none"), gemm)

            start = time.perf_counter()
            if trial.step:
                masks = _published_step(rival, original, masks, settings.m_step_fraction)
            stepped = time.perf_counter() - start
            numbers, batch = fixed[trial.step % len(fixed)]
            with watched(rival) as shown:
                start = time.perf_counter()
                with torch.no_grad():
                    rival.eval()(**batch)
                scored = time.perf_counter() - start
            given = work_of(setup, shown, "none")
            assert given.flops * len(rows) == plan.flops * len(numbers), f"published: {given} for {len(numbers)} rows"
            published.add(stepped + scored * len(rows) / len(numbers), len(rows), plan, gemm)
            _assert_same({name: model.get_parameter(name) != 0 for name in names}, masks, f"trial {trial.step}")
            seen.clear()
            start = time.perf_counter()

        result = m_prune(model, names, rows, get_task(task).metric, settings, replay)

    # of the rows alone: what the published way pads to, over the longest row of each batch of ours
    widths = [len(batch) * max(rows.lengths[i] for i in batch) for batch in by_length(rows, TOKENS_PER_BATCH)]
    for theirs, mine in zip(published.works, ours.works, strict=True):
        assert mine.computed == sum(widths) and theirs.computed == WIDTH * len(rows), f"{mine}, {theirs}"
        assert mine.real == theirs.real == sum(rows.lengths), f"{mine}, {theirs}"
    for timed in (published, ours):
        timed.details = {
            "steps": len(result.trials),
            "score_of_full": result.trials[0].score.value,
            "kept": result.trials[result.steps].kept / result.trials[0].maskable,
            "of": "the maskable values",
            "padding_factor": WIDTH * len(rows) / sum(widths),
            "flops": sum(work.flops for work in timed.works) / len(result.trials),
        }
    return [published, ours]


def _published_step(
    model: "PreTrainedModel", original: dict[str, Tensor], masks: dict[str, Tensor], fraction: float
) -> dict[str, Tensor]:
    """The masks after one more step, put on `model`: a full sort of all values that remain, and all weights copied."""
    values = torch.cat([original[name][mask].abs() for name, mask in masks.items()])
    threshold = values.sort().values[round(fraction * values.numel()) - 1]
    smaller = {name: mask & (original[name].abs() > threshold) for name, mask in masks.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in smaller:
                parameter.copy_(original[name] * smaller[name])
    return smaller


def _assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], where: str) -> None:
    """That both removed the same values, but for ties."""
    other = count_of(ours[name] != theirs[name] for name in ours)
    assert other <= TIES * sum(mask.numel() for mask in ours.values()), f"{where}: the ways differ in {other} values"


# -------------------------------------------------------------------------------------------------------------- selection


def selection(setup: Setup, task: str) -> list[Figure]:
    """The mask that removes 70 % of the demo model's maskable values, from magnitudes that are there already; beside a
    training step of 32 rows of middling length, in the same rounds, of which the first is not counted.

    kthvalue        torch.kthvalue of one flat copy, then a comparison; ties at the threshold all go
    torch prune     torch.nn.utils.prune.global_unstructured on a copy of the model that is made before the clock starts
    """
    names = list(scope_parameters(setup.model, setup.anatomy, SCOPE))
    scores = CRITERIA["magnitude"].scores(Given(model=setup.model, names=names))
    trained = fresh(setup).model
    n = sum(x.numel() for x in scores.values())
    rows, optimizer = rows_of(setup, task, "train", POOL_ROWS), adamw(trained)
    batches = sorted(bucketed(rows, 0), key=lambda numbers: max(rows.lengths[i] for i in numbers))
    batch = collate(rows, batches[len(batches) // 2])

    def by_kthvalue() -> dict[str, Tensor]:
        threshold = torch.kthvalue(torch.cat([x.flatten() for x in scores.values()]), round(SPARSITY * n)).values
        return {name: x > threshold for name, x in scores.items()}

    seconds: dict[str, list[float]] = {}
    for _ in range(setup.rounds + 1):
        twin = copy.deepcopy(setup.model)
        parts = {name: (twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names}
        exact = _timed(seconds, "ours", lambda: prune(scores, SPARSITY))
        by_threshold = _timed(seconds, "kthvalue", by_kthvalue)
        _timed(seconds, "torch prune", partial(torch_prune.global_unstructured, parts.values(), L1Unstructured, amount=SPARSITY))
        by_library = {name: getattr(module, f"{kind}_mask") != 0 for name, (module, kind) in parts.items()}
        _timed(seconds, "training step", lambda: training_step(trained, optimizer, batch))
    removed = [n - count_of(masks.values()) for masks in (exact, by_library, by_threshold)]
    assert removed[0] == removed[1] == round(SPARSITY * n) <= removed[2], f"{removed} removed of {n}"
    _assert_same(exact, by_library, "torch prune")
    _assert_same(exact, by_threshold, "kthvalue")

    length, ours = batch["input_ids"].shape[1], seconds.pop("ours")[1:]
    notes = dict.fromkeys(seconds, f"seconds, × exact selection among {n:,} values")
    notes["training step"] += f"; {len(batch['labels'])} rows × {length} tokens"
    ratios = {way: [x / y for x, y in zip(some[1:], ours, strict=True)] for way, some in seconds.items()}
    return [Figure("selection", task, way, some, notes[way]) for way, some in ratios.items()]


def _timed(seconds: dict[str, list[float]], way: str, run: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    result = run()
    seconds.setdefault(way, []).append(time.perf_counter() - start)
    return result


# ----------------------------------------------------------------------------------------------------------------- weight


def weight(setup: Setup, task: str) -> list[Figure]:
    """Bits per maskable value of a 70 % mask of the demo model, as a ticket stores it. Asserts that it comes back whole."""
    names = list(scope_parameters(setup.model, setup.anatomy, SCOPE))
    mask = Mask(values=prune(CRITERIA["magnitude"].scores(Given(model=setup.model, names=names)), SPARSITY))
    packed = mask.pack()
    assert Mask.unpack(packed, {name: tuple(part.shape) for name, part in mask.values.items()}) == mask
    n, stored = sum(part.numel() for part in mask.values.values()), len(save(packed))
    return [Figure("weight", task, "bits/value", [8 * stored / n], f"{stored:,} bytes for {n:,} maskable values")]
