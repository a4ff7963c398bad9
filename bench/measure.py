"""What all benchmarks share: the setup, the results, the clock, and the counting of what a model was given meanwhile.

The work of a way is not what it is supposed to do but what the model was given while the clock ran. That this is what was
planned is asserted to the operation, as is that all ways find the same.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from tombola.anatomy import Anatomy, read_anatomy
from tombola.objective import load_weights
from tombola.source import resolve_model
from tombola.tasks import get_task, load_rows
from tombola.tasks.encode import TOKENS_PER_BATCH, Encoded, by_length, encode
from tombola.train import RunSeeds, TrainSettings, fine_tune
from ways import (
    TRAIN_BATCH,
    WIDTH,
    bertology,
    bucketed,
    collate_to,
    in_order,
    ours_importance,
    score_alone,
    training_step,
)
from work import Backward, Work, counted, total, work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POOL_ROWS = 50 * TRAIN_BATCH  # one pool of `LengthBuckets`; fewer rows would be bucketed worse than those of an epoch
TUNING = TrainSettings(learning_rate=5e-5, epochs=1)
TUNING_ROWS = 1500
SEEDS = RunSeeds(head=0, data=0, dropout=0, mask=0)

Result = TypeVar("Result")

# Of each batch: the lengths of its rows in tokens, the width they are padded to, whether a backward pass follows.
Batches = list[tuple[list[int], int, bool]]


@dataclass(frozen=True, slots=True)
class Setup:
    """What the benchmarks run on, and how often."""

    data: Path | None  # None for generated tasks
    rounds: int
    cap: int | None  # on the rows of a dev split
    own_score_pass: bool  # the rivals score in a forward pass of their own
    folder: Path
    model: "PreTrainedModel"
    anatomy: Anatomy
    tokenizer: Any


@dataclass(slots=True)
class Timed:
    """One way of one benchmark that puts rows through the model; an entry of a list is a round, or a step of a search."""

    benchmark: str
    task: str
    way: str
    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)  # GFLOP/s of a matrix product at that time
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, seconds: float, rows: int, work: Work, gemm: float) -> None:
        for values, value in ((self.seconds, seconds), (self.rows, rows), (self.works, work), (self.gemm, gemm)):
            values.append(value)  # type: ignore[arg-type]

    @property
    def seconds_a_row(self) -> list[float]:
        return [seconds / n for seconds, n in zip(self.seconds, self.rows, strict=True)]

    def a_row(self, count: Literal["real", "computed", "flops"]) -> float:
        counts: list[int] = [getattr(work, count) for work in self.works]
        return sum(counts) / sum(self.rows)

    @property
    def share_of_gemm(self) -> float:
        """FLOPs a second over those of a plain matrix product at the same time, median."""
        entries = zip(self.works, self.seconds, self.gemm, strict=True)
        return median(work.flops / seconds / (1e9 * gemm) for work, seconds, gemm in entries)


@dataclass(frozen=True, slots=True)
class Figure:
    """Any other number of a benchmark, such as a ratio or bytes a value; an entry of `values` is a round, or the only one."""

    benchmark: str
    task: str
    way: str  # what it is of
    values: list[float]
    note: str = ""  # what it is, with its unit


def prepare(data: Path | None, rounds: int, cap: int | None, own_score_pass: bool) -> Setup:
    """Raises: TombolaError when the demo model is not installed."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = resolve_model("demo").folder
    model = load_weights(folder, ("0", "1"), head_seed=SEEDS.head)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Setup(data, rounds, cap, own_score_pass, folder, model, read_anatomy(model), tokenizer)


def fresh(setup: Setup) -> Setup:
    """The same with a model of its own, to be trained or pruned."""
    return replace(setup, model=load_weights(setup.folder, ("0", "1"), head_seed=SEEDS.head))


def tuned(setup: Setup, task: str) -> Setup:
    """The same with a model of its own, fine-tuned for one epoch of 1,500 rows."""
    setup, train = fresh(setup), rows_of(setup, task, "train", TUNING_ROWS)
    log = fine_tune(setup.model, train, TUNING, SEEDS)
    epoch = [[train.lengths[i] for i in numbers] for numbers in bucketed(train, SEEDS.data)]
    assert log.padded_tokens == sum(len(b) * max(b) for b in epoch), "fine_tune has other batches than the step benchmark"
    return setup


def rows_of(setup: Setup, task: str, role: Literal["train", "report"], cap: int | None) -> Encoded:
    """At most `cap` rows of a split, evenly spaced in it, so that the mix of lengths stays what it is."""
    rows = load_rows(get_task(task), role, data_dir=setup.data)
    return encode(setup.tokenizer, rows.take(evenly(len(rows), min(cap or len(rows), len(rows)))), WIDTH)


def evenly(n: int, k: int) -> list[int]:
    """k of n positions, evenly spaced."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[Batches]:
    """The batches that the model is given."""
    seen: Batches = []

    def record(_: Any, __: Any, inputs: dict[str, Tensor]) -> None:
        seen.append((inputs["attention_mask"].sum(1).tolist(), inputs["input_ids"].shape[1], torch.is_grad_enabled()))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def work_of(setup: Setup, batches: Batches, backward: Backward) -> Work:
    return total(work(lengths, width, setup.anatomy, 2, backward if back else "none") for lengths, width, back in batches)


def planned(setup: Setup, rows: Encoded, way: str, backward: Backward) -> Work:
    """The work of a pass over all of `rows`, the way "published", "dynamic" or "ours" goes."""
    batches = by_length(rows, TOKENS_PER_BATCH) if way == "ours" else in_order(len(rows))
    lengths = [[rows.lengths[i] for i in numbers] for numbers in batches]
    return work_of(setup, [(batch, WIDTH if way == "published" else max(batch), True) for batch in lengths], backward)


def measure(setup: Setup, timed: Timed, n_rows: int, gemm: float, backward: Backward, run: Callable[[], Result]) -> Result:
    """The result of `run()`; its seconds and its work go into `timed`."""
    with watched(setup.model) as seen:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
    timed.add(seconds, n_rows, work_of(setup, seen, backward), gemm)
    return result


def gemm_speed(tokens: int = 2048) -> float:
    """GFLOP/s of fp32 [tokens, 384] × [384, 1536], median of ten: what the machine now gives the model's largest product."""
    x, weight, seconds = torch.randn(tokens, 384), torch.randn(1536, 384), []
    for _ in range(10):
        start = time.perf_counter()
        linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * 384 * 1536 / median(seconds) / 1e9


def check_formula(setup: Setup) -> dict[str, float]:
    """Asserts that torch counts what the formula says, for every kind of pass. Returns the share torch misses by itself."""
    rows = encode(setup.tokenizer, load_rows(get_task("acceptability:report_rows=8"), "report", data_dir=None), WIDTH)
    model, anatomy, mask = setup.model, setup.anatomy, setup.anatomy.full_mask()
    batch, no_change = collate_to(rows, range(8), 40), torch.optim.SGD(model.parameters(), lr=0.0)
    passes: dict[Backward, Callable[[], object]] = {
        "none": lambda: score_alone(model, anatomy, mask, [batch]),
        "gates": lambda: ours_importance(model, anatomy, rows),
        "weights": lambda: bertology(model, anatomy, mask, [batch]),
        "weights, dropout": lambda: training_step(model, no_change, batch),
    }
    missed: dict[str, float] = {}
    for backward, run in passes.items():
        with watched(model) as seen:
            bare, whole = counted(run)
        expected = work_of(setup, seen, backward).flops
        assert whole == expected, f"{backward}: torch counts {whole} FLOPs, the formula says {expected}"
        missed[backward] = 1 - bare / whole
    return missed
