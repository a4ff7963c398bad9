"""Benchmarks of pruning single values: a whole m-prune search, exact selection, and what a mask weighs on disk.

`m_search` gives a `Timed` a way, as the functions of `benchmarks.py` do; `selection` a `Raced` a way; `weight` numbers.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils import prune as torch_prune

from benchmarks import POOL_ROWS, SEEDS, TUNING, TUNING_ROWS, Setup, Timed, gemm_speed, rows_of, watched, work_of
from tombola.mask import Mask
from tombola.prune import count_of, prune
from tombola.scope import scope_parameters
from tombola.scores import CRITERIA, Given
from tombola.search.magnitude import MPruneSettings, MTrial, m_prune
from tombola.tasks import get_task
from tombola.tasks.encode import TOKENS_PER_BATCH, Encoded, by_length, collate
from tombola.ticket import load_weights
from tombola.train import fine_tune
from ways import WIDTH, adamw, bucketed, collate_to, in_order, training_step
from work import Work, total, work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCOPE, SPARSITY = "prasanna2020", 0.7
MAX_STEPS = 10  # of the search: a model tuned for a minute may have no score to lose, and then nothing else would end it
BITS_TARGET = 1.02  # per maskable value, at most
STEP_SHARE_TARGET = 0.1  # of a training step, at most

# ----------------------------------------------------------------------------------------------------------------- search


def m_search(setup: Setup, task: str) -> list[Timed]:
    """A whole m-prune search on a model tuned once; an entry is a trial. "published" makes the same step by itself after each
    of ours: it sorts all that remains, copies the weights anew and scores rows padded to 128, 64 a batch. Of its batches,
    which all have one shape, one is timed a trial, and counted as often as the dev rows need.
    """
    train = rows_of(setup, task, "train", TUNING_ROWS)
    rows = rows_of(setup, task, "report", setup.cap)
    model = load_weights(setup.folder, ("0", "1"), head_seed=SEEDS.head)
    fine_tune(model, train, TUNING, SEEDS)
    names = list(scope_parameters(model, setup.anatomy, SCOPE))
    rival, settings = copy.deepcopy(model), MPruneSettings(floor_rule="fraction_above_baseline", m_max_steps=MAX_STEPS)
    published, ours = Timed("m-search", task, "published"), Timed("m-search", task, "ours")
    plans = {"published": _plan(setup, rows, "published"), "ours": _plan(setup, rows, "ours")}
    fixed = [(numbers, collate_to(rows, numbers, WIDTH)) for numbers in in_order(len(rows))]
    fixed = [(numbers, batch) for numbers, batch in fixed if len(numbers) == len(fixed[0][0])]
    parameters = dict(rival.named_parameters())
    original = {name: parameters[name].detach().clone() for name in names}
    masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in original.items()}
    live = dict(model.named_parameters())

    with watched(model) as seen:
        start = time.perf_counter()

        def replay(trial: MTrial) -> None:
            nonlocal start, masks
            seconds, gemm = time.perf_counter() - start, gemm_speed()
            given = work_of(setup, seen, "none")
            assert given == plans["ours"], f"ours: {given}, planned {plans['ours']}"
            ours.add(seconds, len(rows), given, gemm)

            start = time.perf_counter()
            if trial.step:
                masks = published_step(rival, original, masks, settings.m_step_fraction)
            stepped = time.perf_counter() - start
            numbers, batch = fixed[trial.step % len(fixed)]
            with watched(rival) as shown:
                start = time.perf_counter()
                with torch.no_grad():
                    rival.eval()(**batch)
                scored = time.perf_counter() - start
            given = work_of(setup, shown, "none")
            assert given.computed * len(rows) == plans["published"].computed * len(numbers), f"published: {given}"
            published.add(stepped + scored * len(rows) / len(numbers), len(rows), plans["published"], gemm)
            _assert_same(trial, {name: live[name] for name in names}, masks)
            seen.clear()
            start = time.perf_counter()

        result = m_prune(model, names, rows, get_task(task).metric, settings, replay)

    padding = plans["published"].computed / plans["ours"].computed
    for timed in (published, ours):
        assert timed.a_row("real") == sum(rows.lengths) / len(rows)
        timed.details = {
            "steps": len(result.trials),
            "score_of_full": result.trials[0].score.value,
            "kept": result.trials[result.steps].kept / result.trials[0].maskable,
            "padding_factor": padding,
            "rows": len(rows),
        }
    return [published, ours]


def published_step(
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


def _plan(setup: Setup, rows: Encoded, way: str) -> Work:
    """The work of scoring all of `rows` once."""
    batches = by_length(rows, TOKENS_PER_BATCH) if way == "ours" else in_order(len(rows))
    lengths = [[rows.lengths[i] for i in numbers] for numbers in batches]
    return total(work(batch, WIDTH if way == "published" else max(batch), setup.anatomy, 2, "none") for batch in lengths)


def _assert_same(trial: MTrial, live: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    """That both ways removed the same, but for values equal to the threshold, of which a comparison takes all or none."""
    other = sum(int(torch.count_nonzero((live[name] != 0) != mask)) for name, mask in masks.items())
    assert other <= 1e-5 * trial.maskable, f"step {trial.step}: the ways differ in {other} values"


# -------------------------------------------------------------------------------------------------------------- selection


@dataclass(slots=True)
class Raced:
    """One way of selecting, or the training step it is compared with; an entry of `seconds` is a round."""

    way: str
    seconds: list[float] = field(default_factory=list)
    removed: int | None = None


def selection(setup: Setup, task: str) -> list[Raced]:
    """The mask that removes 70 % of the demo model's maskable values, from magnitudes that are there already; beside a
    training step of 32 rows of middling length, in the same rounds. Ours is the last.

    kthvalue        torch.kthvalue of one flat copy, then a comparison; ties at the threshold all go
    torch prune     torch.nn.utils.prune.global_unstructured on a copy of the model that is made before the clock starts
    """
    model = load_weights(setup.folder, ("0", "1"), head_seed=0)
    names = list(scope_parameters(model, setup.anatomy, SCOPE))
    scores = CRITERIA["magnitude"].scores(Given(model=model, names=names))
    n = sum(x.numel() for x in scores.values())
    rows, optimizer = rows_of(setup, task, "train", POOL_ROWS), adamw(model)
    batches = sorted(bucketed(rows, 0), key=lambda numbers: max(rows.lengths[i] for i in numbers))
    batch = collate(rows, batches[len(batches) // 2])
    ways = step, kth, torch_way, ours = [Raced(way) for way in ("training step", "kthvalue", "torch prune", "ours")]

    def by_kthvalue() -> int:
        flat = torch.cat([x.flatten() for x in scores.values()])
        threshold = torch.kthvalue(flat, round(SPARSITY * n)).values
        return n - count_of([x > threshold for x in scores.values()])

    def exactly() -> int:
        return n - count_of(prune(scores, SPARSITY).values())

    for _ in range(setup.rounds):
        _race(step, lambda: training_step(model, optimizer, batch))
        kth.removed = _race(kth, by_kthvalue)
        twin = copy.deepcopy(model)
        pairs = [(twin.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        _race(torch_way, lambda pairs=pairs: _torch_prune(pairs))  # type: ignore[misc]
        torch_way.removed = n - sum(int(torch.count_nonzero(getattr(module, f"{kind}_mask"))) for module, kind in pairs)
        ours.removed = _race(ours, exactly)
    assert ours.removed == torch_way.removed == round(SPARSITY * n), f"{ours.removed} and {torch_way.removed} removed of {n}"
    assert kth.removed is not None and 0 <= kth.removed - ours.removed <= 1e-5 * n, f"kthvalue removed {kth.removed}"
    return ways


def _torch_prune(pairs: list[tuple[torch.nn.Module, str]]) -> None:
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=SPARSITY)


def _race(way: Raced, run: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = run()
    way.seconds.append(time.perf_counter() - start)
    return result


# ----------------------------------------------------------------------------------------------------------------- weight


def weight(setup: Setup) -> dict[str, float]:
    """Bits per maskable value of a 70 % mask of the demo model, as a ticket stores it. Asserts that it comes back whole."""
    names = list(scope_parameters(setup.model, setup.anatomy, SCOPE))
    kept = prune(CRITERIA["magnitude"].scores(Given(model=setup.model, names=names)), SPARSITY)
    mask = Mask(values=kept)
    packed = mask.pack()
    assert Mask.unpack(packed, {name: tuple(part.shape) for name, part in kept.items()}) == mask
    n, stored = sum(part.numel() for part in kept.values()), len(save(packed))
    assert 8 * stored / n <= BITS_TARGET, f"{8 * stored / n} bits a value"
    return {"maskable": n, "bytes": stored, "bits_per_value": 8 * stored / n, "sparsity": 1 - count_of(kept.values()) / n}
