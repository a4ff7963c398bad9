"""The frontier: what is dominated and what a target picks, by hand; and the verb, end to end on a tiny model."""

import json
from pathlib import Path

import pytest

from conftest import Run
from tombola.errors import TombolaError
from tombola.report.frontier import frontier_page
from tombola.study.frontier import Frontier, Point, mark_dominated
from tombola.timing import Band


def point(name: str, score: float, ms: float, parameters: int, random: float | None = None) -> Point:
    seconds = Band(ms / 1e3, ms / 1e3, ms / 1e3)
    return Point(name, 0.9, name * 3, 0.5, score, 100, random, parameters, 1, seconds, Band(1.0, 1.0, 1.0), 0.02)


POINTS = (
    point("dense", 0.90, 100, 100),
    point("a", 0.89, 60, 70, 0.6),
    point("b", 0.88, 60, 70, 0.5),  # a is as fast and as small, and scores more
    point("c", 0.80, 30, 80, 0.4),  # larger than a, and faster
    point("d", 0.70, 40, 90),  # worse than c in all
)


def frontier() -> Frontier:
    return Frontier("m", "t", "accuracy", 8, 128, tuple(mark_dominated(POINTS)))


def test_what_is_dominated() -> None:
    assert [one.procedure for one in frontier().points if one.dominated] == ["b", "d"]
    same = mark_dominated([POINTS[1], POINTS[1]])
    assert not any(one.dominated for one in same), "of two equal ones neither beats the other"


@pytest.mark.parametrize(
    ("target", "picked"),
    [("50 ms", "c"), ("≤ 60 ms", "a"), ("<= 1000ms", "dense"), ("1 point", "a"), ("≤ 2 points lost", "a"), ("10 points", "c"),
     ("100 points", "c")],
)  # fmt: skip
def test_the_ticket_for_a_target(target: str, picked: str) -> None:
    assert frontier().pick(target).procedure == picked


@pytest.mark.parametrize("target", ["fast", "50", "ms 50", "50 s"])
def test_what_is_no_target(target: str) -> None:
    with pytest.raises(TombolaError, match="no target"):
        frontier().pick(target)


def test_a_target_that_nothing_meets_names_the_nearest() -> None:
    with pytest.raises(TombolaError, match="no ticket meets") as caught:
        frontier().pick("5 ms")
    assert "c at floor 0.9, 30.0 ms" in str(caught.value.got)
    with pytest.raises(TombolaError, match="no ticket meets") as caught:
        frontier().pick("0.5 points")
    assert "1.0 points lost" in str(caught.value.got)


def test_the_page_stands_alone_and_greys_what_is_dominated() -> None:
    page = frontier_page(Frontier("<m>", "t", "accuracy", 8, 128, frontier().points))
    assert "<m>" not in page and "&lt;m&gt;" in page and "http" not in page
    assert page.count('class="dominated"') == 2 and page.count("<circle") == 5 and page.count("stroke-dasharray") == 1


def test_the_verb_finds_shrinks_times_and_picks(tiny_folder: Path, data_folder: Path, tmp_path: Path, run: Run) -> None:
    given = [
        "frontier", tiny_folder, "sst2", "--procedures", "joint", "--floors", "0.9,0.7", "--draws", "1", "--shape", "2x16",
        "--rounds", "2", "--data", data_folder, "--store", tmp_path / "store", "--set", "epochs=4", "--set", "learning_rate=4e-3",
        "--set", "batch_size=16", "--set", "train_rows=128", "--set", "selection_rows=60",
    ]  # fmt: skip
    code, out, err = run(*given, "--dry-run")
    assert code == 0 and not (tmp_path / "store" / "cells").exists(), err
    code, out, err = run(*given, "--json", "--target", "100 points", "--out", tmp_path / "page.html")
    assert code == 0, err
    said = json.loads(out)
    assert [one["procedure"] for one in said["points"]] == ["dense", "joint", "joint"]
    assert said["picked"] in {one["cell"] for one in said["points"][1:]} and said["points"][1]["random"] is not None
    assert all(one["parameters"] <= said["points"][0]["parameters"] for one in said["points"])
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    code, out, err = run("ship", said["picked"][:12], tmp_path / "out", "--store", tmp_path / "store", "--data", data_folder)
    assert code == 0 and (tmp_path / "out" / "model.safetensors").is_file(), err
    for wrong in (["--floors", "high"], ["--shape", "8"], ["--procedures", "nothing"], ["--set", "floor=0.5"]):
        code, _, err = run(*given, *wrong)
        assert code == 2 and err.startswith("tombola:")
