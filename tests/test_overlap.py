"""What masks share beyond their parts, read from a store of tiny runs and counted again in plain Python."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr

from test_prasanna2020 import FAST
from test_report import Page
from tombola.errors import DataError
from tombola.report import render
from tombola.store import Store
from tombola.study.cells import Lab, read_rows
from tombola.study.heads import histogram_rows
from tombola.study.jobs import open_lab
from tombola.study.overlap import errors_rows, transfer_rows, values_rows, with_shared
from tombola.study.results import Results, collect
from tombola.study.runs import Found, plan_find, plan_test
from tombola.study.settings import resolve
from tombola.study.steps.shared import ticket_of

OTHER = "sst2:train=train"  # the same rows by another name: another task, as far as overlap is concerned
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Lab:
    return open_lab(tmp_path_factory.mktemp("overlap") / "store", data_folder)


@pytest.fixture(scope="module")
def found(lab: Lab, tiny_folder: Path) -> dict[tuple[str, str], list[Found]]:
    """(method, task) → a find for each seed; and tickets of the second task tested on the models of the first."""
    fast = FAST | {"floor": 0.8}
    every = {
        (method, task): plan_find(lab, str(tiny_folder), task, resolve(fast, SEEDS, method=method), SEEDS)
        for method in ("s-prune", "m-prune")
        for task in ("sst2", OTHER)
    }
    moved = [
        plan_test(there.search, here.dense, retrain=False)
        for here, there in zip(every["s-prune", "sst2"], every["s-prune", OTHER], strict=True)
    ]
    lab.run([cell for of in every.values() for one in of for cell in one.cells] + [one.pruned for one in moved])
    return every


@pytest.fixture(scope="module")
def results(lab: Lab, found: dict[tuple[str, str], list[Found]]) -> Results:
    return collect(lab.store)


def test_values_are_counted_by_parameter_and_in_all(
    lab: Lab, found: dict[tuple[str, str], list[Found]], results: Results
) -> None:
    rows = values_rows(lab.store, results)
    of_task = {other: {row.name: row for row in rows if (row.task, row.other) == ("sst2", other)} for other in ("sst2", OTHER)}
    masks = {task: [ticket_of(lab, one.search).mask.values for one in found["m-prune", task]] for task in ("sst2", OTHER)}
    names = list(masks["sst2"][0])
    assert of_task["sst2"].keys() == {"all", *names} == of_task[OTHER].keys()
    for other, pairs in (("sst2", list(combinations(masks["sst2"], 2))), (OTHER, list(zip(*masks.values(), strict=True)))):
        assert len(pairs) == 3
        flat = [[np.concatenate([one[name].numpy().ravel() for name in names]) for one in pair] for pair in pairs]
        row = of_task[other]["all"]
        assert row.n == len(flat[0][0]) and row.pairs == 3
        assert row.shared == pytest.approx(np.mean([(a & b).sum() for a, b in flat]))
        assert row.jaccard == pytest.approx(np.mean([(a & b).sum() / (a | b).sum() for a, b in flat]))
        assert row.expected == pytest.approx(np.mean([a.sum() * b.sum() / len(a) for a, b in flat]))
        within = [sum(int(a[n].sum()) * int(b[n].sum()) / a[n].numel() for n in names) for a, b in pairs]
        assert row.expected_by_matrix == pytest.approx(np.mean(within)) and row.ratio == pytest.approx(row.shared / row.expected)
        one = of_task[other][names[0]]
        assert one.shared == pytest.approx(np.mean([int((a[names[0]] & b[names[0]]).sum()) for a, b in pairs]))
        assert one.ratio == one.ratio_by_matrix, names[0]
    votes = np.sum(np.concatenate([np.stack([one[n].numpy().ravel() for one in masks["sst2"]], 1) for n in names]), axis=1)
    kept = np.mean(votes) / 3
    agreeing = np.mean([(k * (k - 1) + (3 - k) * (2 - k)) / 6 for k in votes])
    chance = kept**2 + (1 - kept) ** 2
    assert of_task["sst2"]["all"].kappa == pytest.approx((agreeing - chance) / (1 - chance))
    assert of_task[OTHER]["all"].kappa is None


def test_tickets_of_another_store_are_not_read(tmp_path: Path, results: Results) -> None:
    with pytest.raises(DataError, match="not in this store"):
        values_rows(Store(tmp_path / "empty"), results)


def test_errors_are_shared_or_not(lab: Lab, found: dict[tuple[str, str], list[Found]], results: Results) -> None:
    rows = {(row.case.task, row.part): row for row in errors_rows(lab.store, results)}
    assert rows.keys() == {(task, part) for task in ("sst2", OTHER) for part in ("heads", "mlps")}
    row = rows["sst2", "heads"]
    wrong, kept = [], []
    for one in found["s-prune", "sst2"]:
        said = [x for x in read_rows(lab.folder(one.pruned) / "predictions.jsonl") if x["role"] == "report"]
        wrong.append({x["id"] for x in said if int(np.argmax(x["logits"])) != x["label"]})
        mask = ticket_of(lab, one.search).mask.parts()["heads"].flatten()
        kept.append({i for i, keep in enumerate(mask.tolist()) if keep})
    expected = {
        (i, j): tuple(len(of[i] & of[j]) / max(len(of[i] | of[j]), 1) if of[i] | of[j] else 1.0 for of in (kept, wrong))
        for i, j in combinations(range(3), 2)
    }
    assert row.pairs == expected and row.seeds == SEEDS
    if row.found.r is not None:
        assert row.found.r == pytest.approx(pearsonr(*zip(*expected.values(), strict=True)).statistic)
        assert row.found.p in (pytest.approx(1 / 6), pytest.approx(2 / 6), pytest.approx(3 / 6), pytest.approx(4 / 6), 1.0)


def test_transfer_is_beside_the_overlap_of_both_tickets(
    lab: Lab, found: dict[tuple[str, str], list[Found]], results: Results
) -> None:
    rows = transfer_rows(lab.store, results)
    assert [(row.source, row.target, row.seed, row.stage) for row in sorted(rows, key=lambda one: one.seed)] == [
        (OTHER, "sst2", seed, "pruned") for seed in SEEDS
    ]
    for row in rows:
        here, there = (found["s-prune", task][row.seed] for task in ("sst2", OTHER))
        a, b = (ticket_of(lab, one.search).mask.parts()["heads"] for one in (here, there))
        assert (row.shared["heads"].shared, row.shared["heads"].size_b) == (int((a & b).sum()), int(a.sum()))

        def value(cell: object) -> float:
            scores = read_rows(lab.folder(cell) / "scores.jsonl")  # type: ignore[arg-type]
            return next(float(one["value"]) for one in scores if one["role"] == "report")

        assert row.own == value(here.pruned) and row.full == value(here.dense) and row.metric == "accuracy"


def test_histograms_of_importance_have_what_is_alive_and_cut_below_what_stays(
    lab: Lab, found: dict[tuple[str, str], list[Found]], results: Results
) -> None:
    from safetensors.torch import load_file

    rows = [row for row in histogram_rows(results) if (row.case.task, row.seed) == ("sst2", 0) and row.case.search == "s-prune"]
    steps = load_file(lab.folder(found["s-prune", "sst2"][0].search) / "steps.safetensors")
    path = ticket_of(lab, found["s-prune", "sst2"][0].search).details["path"]
    assert [row.step for row in rows if row.part == "heads"] == [trial["step"] for trial in path if trial["passed"]]
    for row in rows:
        before = steps[row.part][row.step].bool()
        scores = steps[f"{row.part[:-1]}_importance"][row.step].double()
        if row.part == "heads":  # by hand: over the L2 norm of what is left in the layer
            scores = scores / ((scores * before) ** 2).sum(1, keepdim=True).sqrt().clamp_min(1e-30)
        alive = scores[before].tolist()
        assert sum(row.counts) == len(alive) and len(row.edges) == 25 and row.edges[0] == 0.0
        assert max(alive, default=0.0) <= row.edges[-1] + 1e-6
        for i, count in enumerate(row.counts):  # but for values that lie on an edge, to within rounding
            low, high = row.edges[i], row.edges[i + 1]
            inside = sum(low + 1e-6 < value < high - 1e-6 for value in alive)
            near = sum(low - 1e-6 <= value <= high + 1e-6 for value in alive)
            assert inside <= count <= near
        if row.step + 1 == len(path):
            assert (row.removed, row.cut, row.phase, row.passed) == (0, None, "", None)
            continue
        after = steps[row.part][row.step + 1].bool()
        gone = before & ~after
        assert row.removed == int(gone.sum()) and (row.cut is not None or not row.removed or not after.any())
        if row.cut is not None:
            assert (scores[gone] <= row.cut + 1e-6).all() and (scores[after] >= row.cut - 1e-6).all()
        assert (row.phase, row.passed) == (path[row.step + 1]["phase"], path[row.step + 1]["passed"])
    assert {row.part for row in rows} == {"heads", "mlps"} and any(row.removed for row in rows)
    tops = {row.edges[-1] for row in rows if row.part == "heads"}
    assert len(tops) == 1, "one scale for all steps, so that they can be looked at one after the other"


def test_the_page_draws_what_only_a_store_can_say(lab: Lab, results: Results) -> None:
    assert "Do masks of single values agree?" not in render(results)
    asked = with_shared(lab.store, results)
    page = Page(render(asked))
    for which, words in ((True, "Single values that two seeds keep"), (False, "Single values that two tasks keep")):
        known = [row for row in values_rows(lab.store, results) if row.name == "all" and (row.task == row.other) == which]
        assert known and page.column(words, "Jaccard") == [f"{row.jaccard:.3f}" for row in known]
        assert page.column(words, "Ratio") == [f"{row.ratio:.3f}" for row in known]
    errors = [f"{row.found.r:.3f}".replace("-", "−") if row.found.r is not None else "—" for row in asked.shared_errors]
    assert errors and sorted(page.column("Masks that are alike", "r")) == sorted(errors)
    tested = page.table("Tickets of one task on another")[1:]
    assert {tuple(row[:2]) for row in tested} == {(row.source, row.target) for row in asked.transfers}


def test_a_ticket_of_another_task_is_no_seed_of_this_one(results: Results) -> None:
    """Tested on the models of sst2, it must never be averaged with the tickets found there."""
    pruned = [
        row for row in results.scores if (row.kind, row.stage, row.role, row.search) == ("good", "pruned", "report", "s-prune")
    ]
    families = {(row.task.partition(" (")[0], row.family) for row in pruned}
    assert families == {("sst2", "as found"), (OTHER, "as found"), ("sst2", f"found on {OTHER}")}
    by_task = [(row.task, row.seed) for row in pruned]
    assert len(set(by_task)) == len(by_task) == 9
