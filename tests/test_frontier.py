"""The frontier: what is dominated and what a target picks, by hand; and the verb, end to end on a tiny model."""

import json
from pathlib import Path

import pytest

from conftest import Run
from tombola.errors import TombolaError
from tombola.report import render
from tombola.report.layout import Part
from tombola.stats import Band, Estimate
from tombola.store import Store
from tombola.study.frontier import Frontier, Point, keep_frontier, mark_dominated, read_frontiers
from tombola.study.results import Results, collect


def score(value: float, half: float = 0.02) -> Estimate:
    return Estimate(value, value - half, value + half, None, 1)


def point(name: str, value: float, ms: float, parameters: int, random: float | None = None) -> Point:
    drawn = None if random is None else score(random)
    seconds = Band(ms / 1e3, ms / 1e3, ms / 1e3)
    return Point(name, (name * 3,), 0.5, score(value), 100, drawn, parameters, 1, seconds, Band(1.0, 1.0, 1.0), 0.02)


POINTS = (
    point("dense", 0.90, 100, 100),
    point("a", 0.89, 60, 70, 0.6),
    point("b", 0.88, 60, 70, 0.5),  # a is as fast and as small, and scores more
    point("c", 0.80, 30, 80, 0.4),  # larger than a, and faster
    point("d", 0.70, 40, 90),  # worse than c in all
)


def frontier() -> Frontier:
    return Frontier("m", "t", "accuracy", (0,), "pruned", 8, 128, 1, tuple(mark_dominated(POINTS)))


def test_what_is_dominated() -> None:
    assert [one.goal for one in frontier().points if one.dominated] == ["b", "d"]
    same = mark_dominated([POINTS[1], POINTS[1]])
    assert not any(one.dominated for one in same), "of two equal ones neither beats the other"


@pytest.mark.parametrize(
    ("target", "picked"),
    [("50 ms", "c"), ("≤ 60 ms", "a"), ("<= 1000ms", "dense"), ("1 point", "a"), ("≤ 2 points lost", "a"), ("10 points", "c"),
     ("100 points", "c")],
)  # fmt: skip
def test_the_ticket_for_a_target(target: str, picked: str) -> None:
    assert frontier().pick(target).goal == picked


@pytest.mark.parametrize("target", ["fast", "50", "ms 50", "50 s"])
def test_what_is_no_target(target: str) -> None:
    with pytest.raises(TombolaError, match="no target"):
        frontier().pick(target)


def test_a_target_that_nothing_meets_names_the_nearest() -> None:
    with pytest.raises(TombolaError, match="no ticket meets") as caught:
        frontier().pick("5 ms")
    assert "nearest: c, 30.0 ms" in str(caught.value.got)
    with pytest.raises(TombolaError, match="no ticket meets") as caught:
        frontier().pick("0.5 points")
    assert "1.0 points lost" in str(caught.value.got)


def test_the_page_greys_what_is_dominated_and_draws_the_control(part: Part) -> None:
    (row,) = part.figures
    svg = row[0].svg
    assert svg.count("<circle") == 5 and svg.count("hollow") == 2 and svg.count("curve dashed random") == 1
    assert svg.count("whisker") == 5 and "&lt;m&gt;" not in svg
    assert [cells[-1] for cells in part.tables[0].rows] == ["", "", "dominated", "", "dominated"]
    assert part.tables[0].rows[1][2] == "0.890 (0.870 to 0.910)" and part.tables[0].rows[1][8] == "0.70"


@pytest.fixture
def part() -> Part:
    from tombola.report.about_frontier import frontier_parts
    from tombola.report.cases import study_of

    (found,) = frontier_parts("frontier-1", study_of(Results((), (), frontiers=(frontier(),))))
    return found


def test_what_a_page_says_of_a_frontier_is_escaped_and_a_page_without_one_has_no_section() -> None:
    odd = Frontier("<m>", "t", "accuracy", (0, 1), "retrained", 8, 128, 1, frontier().points)
    page = render(Results((), (), frontiers=(odd,)))
    assert "<m>" not in page and "&lt;m&gt;" in page and 'id="frontier"' in page and "data-all-seeds" in page
    assert 'id="frontier"' not in render(Results((), ()))


def test_a_measured_frontier_is_kept_and_the_next_measurement_of_the_same_cells_takes_its_place(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    keep_frontier(store, frontier())
    assert read_frontiers(store) == [frontier()] == list(collect(store).frontiers)
    faster = Frontier("m", "t", "accuracy", (0,), "pruned", 8, 128, 1, (point("dense", 0.9, 50, 100), *frontier().points[1:]))
    keep_frontier(store, faster)
    keep_frontier(store, Frontier("m", "t", "accuracy", (0,), "pruned", 1, 16, 1, POINTS))
    assert read_frontiers(store) == [Frontier("m", "t", "accuracy", (0,), "pruned", 1, 16, 1, POINTS), faster]
    assert read_frontiers(store, {"dense" * 3, "a" * 3}) == []


GIVEN = ["--draws", "1", "--shape", "2x16", "--rounds", "2", "--train-rows", "128", "--selection-rows", "60", "--epochs", "4",
         "--learning-rate", "4e-3", "--batch-size", "16"]  # fmt: skip


def test_the_verb_finds_shrinks_times_and_picks(tiny_folder: Path, data_folder: Path, tmp_path: Path, run: Run) -> None:
    given = ["frontier", tiny_folder, "sst2", *GIVEN, "--data", data_folder, "--store", tmp_path / "store"]
    ask = [*given, "--procedures", "joint", "--floors", "0.9,0.7"]
    code, out, err = run(*ask, "--dry-run")
    assert code == 0 and not (tmp_path / "store" / "cells").exists(), err
    code, out, err = run(*ask, "--json", "--target", "100 points", "--out", tmp_path / "page.html")
    assert code == 0, err
    said = json.loads(out)
    assert [one["goal"] for one in said["points"]] == ["dense", "joint, floor 0.9", "joint, floor 0.7"]
    assert said["picked"] in {one["cells"][0] for one in said["points"][1:]} and said["points"][1]["random"] is not None
    assert all(one["parameters"] <= said["points"][0]["parameters"] for one in said["points"])
    assert 'id="frontier"' in (tmp_path / "page.html").read_text()
    code, out, err = run("ship", said["picked"][:12], tmp_path / "out", "--store", tmp_path / "store", "--data", data_folder)
    assert code == 0 and (tmp_path / "out" / "model.safetensors").is_file(), err
    code, out, err = run(*ask, "--target", "≤ 5000 ms")
    assert code == 0 and "≤ 5000 ms: " in out and "0 of" not in err, err


def test_the_verb_goes_to_sparsities_over_seeds_and_trains_again(
    tiny_folder: Path, data_folder: Path, tmp_path: Path, run: Run
) -> None:
    store = tmp_path / "store"
    given = ["frontier", tiny_folder, "sst2", *GIVEN, "--data", data_folder, "--store", store]
    code, out, err = run(*given, "--procedures", "heads+neurons", "--sparsities", "0.5", "--seeds", "0,1", "--retrain", "--json")
    assert code == 0, err
    dense, half = json.loads(out)["points"]
    assert half["goal"] == "heads+neurons, to 50 %" and len(half["cells"]) == 2 and 0.499 <= half["sparsity"] < 0.6
    assert half["score"]["n_seeds"] == 2 and half["score"]["low"] <= half["score"]["value"] <= half["score"]["high"]
    assert half["flops"] < dense["flops"] and half["parameters"] < dense["parameters"]
    rows = {(row.stage, row.kind, row.seed): row.value for row in collect(Store(store)).scores if row.role == "report"}
    for name, kind, stage in (("score", "good", "retrained"), ("random", "random", "retrained")):
        assert half[name]["value"] == pytest.approx((rows[stage, kind, 0] + rows[stage, kind, 1]) / 2)
    # what `tombola retrain` would train is there already, with its weights
    code, out, err = run("retrain", half["cells"][0][:12], "--store", store, "--data", data_folder, "--out", tmp_path / "again")
    assert (code == 0 and "0 of" in err + out) or "computed" not in err, err


def test_what_a_frontier_cannot_be_asked(tiny_folder: Path, data_folder: Path, tmp_path: Path, run: Run) -> None:
    given = ["frontier", tiny_folder, "sst2", "--data", data_folder, "--store", tmp_path / "store"]
    for wrong in (
        ["--floors", "high"], ["--shape", "8"], ["--procedures", "nothing"], ["--set", "floor=0.5"], ["--set", "sparsity=0.5"],
        ["--sparsities", "1.5"], ["--sparsities", "0.5,0.5"], ["--target", "fast"], ["--procedures", ","],
    ):  # fmt: skip
        code, _, err = run(*given, *wrong)
        assert code == 2 and err.startswith("tombola:"), wrong
    assert not (tmp_path / "store").exists()
