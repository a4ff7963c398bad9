"""How fast models are and what they hold, beside each other: latency and throughput by batch and length, with noise bands.

All models take turns, round by round, so that what else the machine does meets them alike; the first model, the dense one, takes
a second turn in each round, and how far its two turns are apart is the noise: a ratio within it is no difference.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tombola.cut import check_rows
from tombola.errors import SettingsError, TombolaError
from tombola.export import ONNX_NAME, count, operations_of, weight_bytes
from tombola.source import resolve_model
from tombola.stats import Band, band

SHAPES = ((1, 16), (1, 128), (8, 128))  # batch, tokens a row
LEAST = 0.02  # seconds a turn takes at least: as many passes as that needs


@dataclass(frozen=True, slots=True)
class Timing:
    """One model at one batch and length; seconds are of one forward pass."""

    model: str
    batch: int
    length: int
    seconds: Band
    flops: int
    against_dense: Band  # seconds of this model by those of the first, round by round
    noise: float  # how far from 1 that ratio may be for one and the same model: the far end of the interval of its two turns

    @property
    def tokens_a_second(self) -> float:
        return self.batch * self.length / self.seconds.median

    @property
    def differs(self) -> bool:
        """Whether this model is faster or slower than the first by more than noise."""
        return self.against_dense.high < 1 - self.noise or self.against_dense.low > 1 + self.noise


@dataclass(frozen=True, slots=True)
class Held:
    """What a model holds: values, bytes of its weights on disk, bytes that one pass of the largest batch needs at its peak."""

    model: str
    parameters: int
    bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Bench:
    """All that was measured."""

    timings: tuple[Timing, ...]
    held: tuple[Held, ...]
    threads: int
    device: str
    rounds: int

    def in_words(self) -> str:
        """One sentence for each model beside the first: what was gained, where it is more than noise."""
        dense, *others = self.held
        said = []
        for one in others:
            rows = [t for t in self.timings if t.model == one.model]
            busiest = max(rows, key=lambda t: t.batch * t.length)
            ratio, noise = busiest.against_dense.median, busiest.noise
            base = next(
                t for t in self.timings if t.model == dense.model and (t.batch, t.length) == (busiest.batch, busiest.length)
            )
            if not busiest.differs:
                speed = f"is as fast as {dense.model} (ratio {ratio:.2f}, noise {noise:.2f})"
            else:
                word = "faster" if ratio < 1 else "slower"
                speed = f"is {max(ratio, 1 / ratio):.2f} times {word} than {dense.model} (noise {noise:.2f})"
            operations = f", with {busiest.flops / base.flops:.2f} of the operations" if base.flops and busiest.flops else ""
            parameters = f"{one.parameters / dense.parameters:.2f} of the parameters" if one.parameters else "its own format"
            said.append(
                f"At {busiest.batch} rows of {busiest.length} tokens {one.model} {speed}{operations}; it has {parameters} and "
                f"{one.bytes / dense.bytes:.2f} of the bytes on disk."
            )
        return " ".join(said) or f"{dense.model} alone: nothing to compare it with."

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self) | {"in_words": self.in_words()}


def bench(
    models: Sequence[str | Path],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 9,
    on_round: Callable[[float], None] = lambda share: None,
) -> Bench:
    """Times models that lie in folders (or have names: "demo", a Hub name; a folder with `model.onnx` runs in onnxruntime).

    The first is what the others are held against. As many threads as torch is set to; on the CPU.
    Raises: SettingsError with all bad settings; TombolaError for what is no model.
    """
    wrong = [] if rounds >= 1 else [TombolaError("a bench takes a round at least", got=rounds, expected="1 or more")]
    wrong += [
        TombolaError("no batch of this shape", got=f"{batch}x{length}", expected="1 row or more of 2 tokens or more")
        for batch, length in shapes
        if batch < 1 or length < 2
    ]
    wrong += [] if models and shapes else [TombolaError("nothing to time", got=f"{len(models)} models, {len(shapes)} shapes")]
    names = [str(one) for one in models]
    wrong += [TombolaError("a model is named twice", got=names)] if len(set(names)) < len(names) else []
    if wrong:
        raise SettingsError(wrong)
    opened = [_open(name) for name in names]
    return bench_models({one.name: one for one in opened}, shapes, rounds, on_round)


@dataclass(frozen=True, slots=True)
class Runner:
    """A model ready to be timed: `prepare(batch, length)` gives a function that runs one pass."""

    name: str
    prepare: Callable[[int, int], Callable[[], object]]
    flops: Callable[[int, int], int]
    parameters: int
    bytes: int


def bench_models(
    runners: Mapping[str, Runner],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 9,
    on_round: Callable[[float], None] = lambda share: None,
) -> Bench:
    """As `bench`, of models at hand: see `runner_of`."""
    first, *_ = runners
    timings: list[Timing] = []
    for at, (batch, length) in enumerate(shapes):
        turns = [(name, runner.prepare(batch, length)) for name, runner in runners.items()]
        turns.append(("", turns[0][1]))  # the first again
        often = {name: _passes(run) for name, run in turns}
        seconds: dict[str, list[float]] = {name: [] for name, _ in turns}
        for i in range(rounds):
            for name, run in turns[i % len(turns) :] + turns[: i % len(turns)]:  # each begins some rounds
                start = time.perf_counter()
                for _ in range(often[name]):
                    run()
                seconds[name].append((time.perf_counter() - start) / often[name])
            on_round((at + (i + 1) / rounds) / len(shapes))
        again = band([a / b for a, b in zip(seconds[""], seconds[first], strict=True)])
        noise = max(abs(1 - again.low), abs(again.high - 1))
        for name, runner in runners.items():
            ratios = band([a / b for a, b in zip(seconds[name], seconds[first], strict=True)])
            timings.append(Timing(name, batch, length, band(seconds[name]), runner.flops(batch, length), ratios, noise))
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    held = tuple(Held(name, one.parameters, one.bytes, _peak(one.prepare(*largest))) for name, one in runners.items())
    return Bench(tuple(timings), held, torch.get_num_threads(), "cpu", rounds)


def runner_of(name: str, model: nn.Module, folder: Path | None = None) -> Runner:
    """A model of torch as something to time; `folder` is where its weights are."""
    size = sum(p.numel() * p.element_size() for p in model.parameters()) if folder is None else weight_bytes(folder)

    def prepare(batch: int, length: int) -> Callable[[], object]:
        inputs = _full_rows(model, batch, length)

        def run() -> object:
            with torch.inference_mode():
                return model(**inputs)

        return run

    def operations(batch: int, length: int) -> int:
        return operations_of(model, _full_rows(model, batch, length))

    model.eval()
    return Runner(name, prepare, operations, count(model), size)


def _full_rows(model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Rows without padding: what is computed is what is counted."""
    inputs = check_rows(model, 1, length)
    return {name: value[:1].expand(batch, *value.shape[1:]).contiguous() for name, value in inputs.items()}


def _open(name: str) -> Runner:
    folder = Path(name)
    if (folder / ONNX_NAME).is_file():
        return _open_onnx(name, folder)
    import transformers
    from transformers import AutoConfig, AutoModel

    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source.folder)
        wanted = (config.architectures or [""])[0]
        kinds = ("ForSequenceClassification", "ForCausalLM", "ForImageClassification", "ForTokenClassification", "ForMaskedLM")
        found = next((kind for kind in kinds if wanted.endswith(kind)), "ForCausalLM" if wanted.endswith("LMHeadModel") else None)
        auto = AutoModel if found is None else getattr(transformers, f"AutoModel{found}")
        model = auto.from_pretrained(source.folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TombolaError(
            f"{name} could not be loaded to be timed",
            got=f"{type(error).__name__}: " + str(error).strip().partition("\n")[0][:200],
            expected="a folder that transformers loads, a shrunk model, or a folder with model.onnx",
        ) from error
    return runner_of(name, model, source.folder)


def _open_onnx(name: str, folder: Path) -> Runner:
    import importlib.util

    if importlib.util.find_spec("onnxruntime") is None:
        raise TombolaError("ONNX models need a package that is not installed", got=name, next="pip install 'tombola[onnx]'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / ONNX_NAME), options, providers=["CPUExecutionProvider"])
    takes = [one.name for one in session.get_inputs()]
    if "pixel_values" in takes:
        raise TombolaError("ONNX models of images are not timed", got=name, next="time the folder that --to hf writes")

    def prepare(batch: int, length: int) -> Callable[[], object]:
        ids, real = torch.full((batch, length), 7), torch.ones(batch, length, dtype=torch.long)
        inputs = {one: (real if one.endswith("mask") else ids).numpy() for one in takes}
        return lambda: session.run(None, inputs)

    return Runner(name, prepare, lambda batch, length: 0, 0, weight_bytes(folder))


def _passes(run: Callable[[], object]) -> int:
    """How many passes a turn takes to last; the first two warm up."""
    run()
    start = time.perf_counter()
    run()
    return max(1, math.ceil(LEAST / max(time.perf_counter() - start, 1e-6)))


def _peak(run: Callable[[], object]) -> int:
    """Bytes that torch holds at most at one time during a pass, weights aside; 0 for what torch does not run."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes two lines of its own on stderr, each time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
