"""The bench: what it counts is exact, what it times is said with its noise, and what cannot be timed is refused."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tombola
from conftest import Run, tiny_family
from test_families import known, mask_without
from tombola.cut import shrink
from tombola.errors import SettingsError, TombolaError
from tombola.timing import Bench, Runner, band, bench, bench_models, runner_of


def sleeper(name: str, seconds: float) -> Runner:
    return Runner(name, lambda batch, length: lambda: time.sleep(seconds * batch), lambda batch, length: batch * length, 10, 40)


def test_a_model_that_takes_twice_as_long_is_twice_as_slow() -> None:
    found = bench_models({"a": sleeper("a", 0.02), "b": sleeper("b", 0.04)}, ((1, 8), (2, 8)), rounds=7)
    slow = [t for t in found.timings if t.model == "b"]
    assert [t.flops for t in slow] == [8, 16]
    for t in slow:
        assert t.against_dense.low <= t.against_dense.median <= t.against_dense.high
        assert 1.5 < t.against_dense.median < 2.5
    assert "times slower than a" in found.in_words() or not slow[1].differs  # on a machine that stands still for that long
    same = [t for t in found.timings if t.model == "a"]
    assert all(t.against_dense == same[0].against_dense and t.against_dense.median == 1.0 for t in same)


def test_what_is_no_more_than_noise_is_not_said_to_be_faster() -> None:
    from tombola.timing import Band, Held, Timing

    def of(ratio: float, noise: float) -> Bench:
        band_of = Band(ratio, ratio - 0.01, ratio + 0.01)
        one = Band(0.1, 0.1, 0.1)
        dense = Timing("dense", 8, 128, one, 100, Band(1.0, 1.0, 1.0), noise)
        timings = (dense, Timing("small", 8, 128, one, 50, band_of, noise))
        return Bench(timings, (Held("dense", 10, 40, 0), Held("small", 5, 20, 0)), 1, "cpu", 9)

    assert "is as fast as dense" in of(0.9, 0.1).in_words()
    assert of(0.5, 0.1).in_words() == (
        "At 8 rows of 128 tokens small is 2.00 times faster than dense (noise 0.10), with 0.50 of the operations; it has 0.50 of "
        "the parameters and 0.50 of the bytes on disk."
    )
    assert "2.00 times slower" in of(2.0, 0.1).in_words()


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_the_interval_of_a_median_is_that_of_the_coin(values: list[float]) -> None:
    found, n = band(values), len(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    k = sorted(values).index(found.low) + 1
    if n >= 6 and len(set(values)) == n:
        outside = 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
        assert outside <= 0.05 < outside + 2 * math.comb(n, k) / 2**n


def test_parameters_bytes_and_operations_are_counted_by_hand() -> None:
    """A BERT of width 24 without head 1 of layer 0: its operations are those of its matrices."""
    model, anatomy = tiny_family("bert"), known("bert")[1]
    small = shrink(model, mask_without(anatomy, [(0, 1)]), anatomy)
    found = bench_models({"dense": runner_of("dense", model), "small": runner_of("small", small)}, ((2, 8),), rounds=1)
    dense, cut = found.held
    assert dense.parameters - cut.parameters == 4 * 6 * 24 + 3 * 6 and dense.bytes == 4 * dense.parameters
    a, b = (t.flops for t in found.timings)
    tokens, length = 16, 8
    assert a - b == 2 * tokens * 4 * 6 * 24 + 2 * 2 * tokens * length * 6  # four projections; scores and mixture of one head
    assert all(one.peak_bytes > 0 for one in found.held)


def test_folders_are_timed_shrunk_ones_too(tmp_path: Path, run: Run) -> None:
    model, anatomy = tiny_family("bert"), known("bert")[1]
    small: Any = shrink(model, mask_without(anatomy, [(0, 1)], (1,)), anatomy)
    model.save_pretrained(tmp_path / "dense")
    small.save_pretrained(tmp_path / "small")
    threads = torch.get_num_threads()
    code, out, err = run("bench", tmp_path / "dense", tmp_path / "small", "--shapes", "1x8,2x16", "--rounds", "2", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert {(t["batch"], t["length"]) for t in said["timings"]} == {(1, 8), (2, 16)} and "small" in said["in_words"]
    code, out, err = run("bench", tmp_path / "dense", tmp_path / "small", "--shapes", "1x8", "--rounds", "1")
    assert code == 0 and "against the first" in out and "weights on disk" in out and torch.get_num_threads() == threads
    for arguments in (["--shapes", "eight"], ["--shapes", "0x8"], ["--rounds", "0"]):
        code, _, err = run("bench", tmp_path / "dense", *arguments)
        assert code == 2 and "expected" in err


def test_what_cannot_be_timed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        bench(["a", "a"], ((0, 1),), rounds=0)
    assert len(caught.value.problems) == 3
    with pytest.raises(TombolaError):
        bench([str(tmp_path)])
    tiny_family("bert").config.save_pretrained(tmp_path)
    with pytest.raises(TombolaError):
        bench([str(tmp_path)])
    assert tombola.bench is bench
