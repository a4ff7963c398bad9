"""The benchmarks, one function each: each runs its ways in turns and returns what was measured, a `Timed` a way.

Read `measure` first. The work of a way is not what it is supposed to do but what the model was given while the clock ran;
that both are equal is asserted, as is that all ways find the same.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from tombola.anatomy import Anatomy, read_anatomy
from tombola.evaluate import score_and_gradients
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.scores import GateGradients, Importance, sensitivity
from tombola.search.structured import SPruneSettings, Trial, s_prune
from tombola.tasks import get_task, load_rows
from tombola.tasks.encode import Encoded, by_length, collate, encode
from tombola.ticket import load_weights, resolve_model
from tombola.train import RunSeeds, TrainSettings, fine_tune
from ways import (
    SCORE_BATCH,
    TRAIN_BATCH,
    WIDTH,
    Batch,
    adamw,
    bertology,
    bucketed,
    collate_to,
    in_order,
    ours_importance,
    score_alone,
    shuffled,
    training_step,
)
from work import Backward, Work, counted, total, work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POOL_ROWS = 50 * TRAIN_BATCH  # one pool of `LengthBuckets`; fewer rows would be bucketed worse than those of an epoch
STEPS, PUBLISHED_STEPS = 10, 2  # a round; all published steps have one shape
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
    """One way of one benchmark; an entry of a list is a round, or a step of the search."""

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


def prepare(data: Path | None, rounds: int, cap: int | None, own_score_pass: bool) -> Setup:
    """Raises: TombolaError when the demo model is not installed."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = resolve_model("demo").folder
    model = load_weights(folder, ("0", "1"), head_seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Setup(data, rounds, cap, own_score_pass, folder, model, read_anatomy(model), tokenizer)


def rows_of(setup: Setup, task: str, role: Literal["train", "report"], cap: int | None) -> Encoded:
    """At most `cap` rows of a split, evenly spaced in it, so that the mix of lengths stays what it is."""
    rows = load_rows(get_task(task), role, data_dir=setup.data)
    return encode(setup.tokenizer, rows.take(_spread(len(rows), min(cap or len(rows), len(rows)))), WIDTH)


def _spread(n: int, k: int) -> list[int]:
    """k of n positions, evenly spaced."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


# --------------------------------------------------------------------------------------------------------------- measuring


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


# -------------------------------------------------------------------------------------------------------------- importance


def importance(setup: Setup, task: str) -> list[Timed]:
    """An importance pass over the dev rows, score included. "published" is timed on one of its batches a round: all have one
    shape, so that a row costs the same in each."""
    model, anatomy, full = setup.model, setup.anatomy, setup.anatomy.full_mask()
    rows, split = (rows_of(setup, task, "report", cap) for cap in (setup.cap, None))
    ways = published, dynamic, ours = [Timed("importance", task, way) for way in ("published", "dynamic", "ours")]
    order, fixed = in_order(len(rows)), _published_batches(rows)

    for i in range(setup.rounds):
        gemm, (numbers, batch) = gemm_speed(), fixed[i * len(fixed) // setup.rounds]
        alone = _measure_rival(setup, published, len(numbers), gemm, full, [batch])
        joint = _measure_rival(setup, dynamic, len(rows), gemm, full, (collate(rows, numbers) for numbers in order))
        _, exact = measure(setup, ours, len(rows), gemm, "gates", lambda: ours_importance(model, anatomy, rows))
        _assert_same(joint, exact)
        _assert_same(alone, GateGradients(exact.heads[numbers], exact.mlps[numbers], exact.logits[numbers]))

    for timed in ways:
        timed.details = _assert_planned(setup, timed, rows, split)
    return ways


def _published_batches(rows: Encoded) -> list[tuple[list[int], Batch]]:
    """The full batches of "published", with their row numbers: padded before the clock starts, as the released code does."""
    order = in_order(len(rows))
    return [(numbers, collate_to(rows, numbers, WIDTH)) for numbers in order if len(numbers) == len(order[0])]


def _measure_rival(
    setup: Setup, timed: Timed, n_rows: int, gemm: float, mask: Mask, batches: Iterable[Batch]
) -> tuple[Importance, Tensor]:
    def run() -> tuple[Importance, Tensor]:
        ready = list(batches)
        if setup.own_score_pass:
            score_alone(setup.model, setup.anatomy, mask, ready)
        return bertology(setup.model, setup.anatomy, mask, ready)

    return measure(setup, timed, n_rows, gemm, "weights", run)


def _plan(setup: Setup, rows: Encoded, way: str) -> Work:
    """The work of a pass over all of `rows`."""
    if way == "ours":
        batches = by_length(rows, signature(score_and_gradients).parameters["tokens_per_batch"].default)
    else:
        batches = in_order(len(rows))
    lengths = [[rows.lengths[i] for i in numbers] for numbers in batches]
    shapes: Batches = [(batch, WIDTH if way == "published" else max(batch), True) for batch in lengths]
    if way != "ours" and setup.own_score_pass:
        shapes += [(batch, width, False) for batch, width, _ in shapes]
    return work_of(setup, shapes, "gates" if way == "ours" else "weights")


def _assert_planned(setup: Setup, timed: Timed, rows: Encoded, split: Encoded) -> dict[str, Any]:
    """That the model was given the planned work, to the operation. Returns the plan, and that of the whole split."""
    plan = _plan(setup, rows, timed.way).flops
    for given, n_rows in zip(timed.works, timed.rows, strict=True):
        assert given.flops * len(rows) == plan * n_rows, f"{timed.benchmark}, {timed.way}: {given} for {n_rows} rows"
    whole = _plan(setup, split, timed.way).flops
    return {"rows": len(rows), "flops": plan, "rows_of_split": len(split), "flops_of_split": whole}


def _assert_same(found: tuple[Importance, Tensor], exact: GateGradients) -> None:
    """That a rival's importance and logits are ours, once our rows are reduced as it reduces them."""
    scores = sensitivity(exact, "accumulated", SCORE_BATCH)
    pairs = ((found[0].heads, scores.heads), (found[0].mlps, scores.mlps), (found[1], exact.logits))
    for theirs, mine in pairs:
        off = float((theirs - mine).abs().max() / mine.abs().max())
        assert off < 1e-3, f"the ways disagree by {off:.1e} of the largest value"


# ------------------------------------------------------------------------------------------------------------------- step


def step(setup: Setup, task: str) -> list[Timed]:
    """Steps of fine-tuning on train rows. A round is ten batches of an epoch, in its order, spread over the widths it has: five
    rounds are the whole epoch of the 1,600 rows."""
    setup = replace(setup, model=load_weights(setup.folder, ("0", "1"), head_seed=0))
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
    return [batches[b] for b in sorted(by_width[at] for at in _spread(len(batches), n * rounds)[i::rounds])]


# ----------------------------------------------------------------------------------------------------------------- search


def search(setup: Setup, task: str) -> list[Timed]:
    """A whole s-prune search on a model tuned once. After each step "published" scores the mask that was just tried.

    It replays our masks because its own importance (see `ways`) would lead it to others, and a search that happens to stop
    sooner is not a faster one.
    """
    train = rows_of(setup, task, "train", TUNING_ROWS)
    rows, split = (rows_of(setup, task, "report", cap) for cap in (setup.cap, None))
    model = load_weights(setup.folder, ("0", "1"), head_seed=SEEDS.head)
    setup = replace(setup, model=model)
    log = fine_tune(model, train, TUNING, SEEDS)
    epoch = [[train.lengths[i] for i in numbers] for numbers in bucketed(train, SEEDS.data)]
    assert log.padded_tokens == sum(len(b) * max(b) for b in epoch), "fine_tune has other batches than the step benchmark"

    published, ours = Timed("search", task, "published"), Timed("search", task, "ours")
    fixed, full = _published_batches(rows), setup.anatomy.full_mask()
    metric = get_task(task).metric
    with Gates(model, setup.anatomy) as gates, watched(model) as seen:
        start = time.perf_counter()

        def replay(trial: Trial) -> None:
            nonlocal start
            seconds, gemm = time.perf_counter() - start, gemm_speed()
            ours.add(seconds, len(rows), work_of(setup, seen, "gates"), gemm)
            numbers, batch = fixed[len(published.rows) % len(fixed)]
            gates.set(full)  # the next trial sets them anew
            _measure_rival(setup, published, len(numbers), gemm, trial.mask, [batch])
            seen.clear()
            start = time.perf_counter()

        result = s_prune(gates, rows, metric, SPruneSettings(floor_rule="fraction_above_baseline"), replay)

    assert len(published.rows) == len(ours.rows) == len(result.trials)
    for timed in (published, ours):
        timed.details = _assert_planned(setup, timed, rows, split) | {
            "steps": len(result.trials),
            "score_of_full": result.trials[0].score.value,
            "kept": setup.anatomy.size(result.mask).body_share,
        }
    return [published, ours]


# --------------------------------------------------------------------------------------------------------------- start-up

COMMANDS = {
    "python": "pass",
    "import tombola": "import tombola",
    "tombola --help": "import sys; sys.argv = ['tombola', '--help']; from tombola.cli import main; main()",
}


@dataclass(frozen=True, slots=True)
class Started:
    command: str
    seconds: list[float]
    modules: list[str]


def start_up(rounds: int) -> list[Started]:
    """Whole processes, in turns. Asserts that neither torch nor transformers is imported."""
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(rounds):
        for command, code in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            seconds[command].append(time.perf_counter() - start)
    modules = {command: _imported(code) for command, code in COMMANDS.items()}
    for command, names in modules.items():
        heavy = {"torch", "transformers"} & set(names)
        assert not heavy, f"{command} imports {heavy}"
    return [Started(command, seconds[command], modules[command]) for command in COMMANDS]


def _imported(code: str) -> list[str]:
    """Every module that a process imports, by the interpreter's own report on stderr ("import time: … | … | name")."""
    report = subprocess.run([sys.executable, "-X", "importtime", "-c", code], check=True, capture_output=True, text=True).stderr
    return sorted({line.rsplit("|", 1)[1].strip() for line in report.splitlines()[1:] if line.startswith("import time:")})
