"""Heads and MLPs: an importance pass over dev rows, and a whole s-prune search."""

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from measure import Setup, Timed, gemm_speed, measure, planned, rows_of, tuned, watched, work_of
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.scores import GateGradients, Importance, sensitivity
from tombola.search.structured import SPruneSettings, Trial, s_prune
from tombola.tasks import get_task
from tombola.tasks.encode import Encoded, collate
from ways import SCORE_BATCH, Batch, bertology, in_order, ours_importance, published_batches, score_alone
from work import Work, total


def importance(setup: Setup, task: str) -> list[Timed]:
    """An importance pass over the dev rows, score included. "published" is timed on one of its batches a round: all have one
    shape, so that a row costs the same in each."""
    model, anatomy, full = setup.model, setup.anatomy, setup.anatomy.full_mask()
    rows, split = (rows_of(setup, task, "report", cap) for cap in (setup.cap, None))
    ways = published, dynamic, ours = [Timed("importance", task, way) for way in ("published", "dynamic", "ours")]
    order, fixed = in_order(len(rows)), published_batches(rows)

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


def search(setup: Setup, task: str) -> list[Timed]:
    """A whole s-prune search on a model tuned once. After each step "published" scores the mask that was just tried.

    It replays our masks because its own importance (see `ways`) would lead it to others, and a search that happens to stop
    sooner is not a faster one.
    """
    rows, split = (rows_of(setup, task, "report", cap) for cap in (setup.cap, None))
    setup = tuned(setup, task)
    published, ours = Timed("search", task, "published"), Timed("search", task, "ours")
    fixed, full = published_batches(rows), setup.anatomy.full_mask()
    with Gates(setup.model, setup.anatomy) as gates, watched(setup.model) as seen:
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

        result = s_prune(gates, rows, get_task(task).metric, SPruneSettings(floor_rule="fraction_above_baseline"), replay)

    assert len(published.rows) == len(ours.rows) == len(result.trials)
    for timed in (published, ours):
        timed.details = _assert_planned(setup, timed, rows, split) | {
            "steps": len(result.trials),
            "score_of_full": result.trials[0].score.value,
            "kept": setup.anatomy.size(result.mask).body_share,
            "of": "the body",
        }
    return [published, ours]


def _measure_rival(
    setup: Setup, timed: Timed, n_rows: int, gemm: float, mask: Mask, batches: Iterable[Batch]
) -> tuple[Importance, Tensor]:
    def run() -> tuple[Importance, Tensor]:
        ready = list(batches)
        if setup.own_score_pass:
            score_alone(setup.model, setup.anatomy, mask, ready)
        return bertology(setup.model, setup.anatomy, mask, ready)

    return measure(setup, timed, n_rows, gemm, "weights", run)


def _assert_planned(setup: Setup, timed: Timed, rows: Encoded, split: Encoded) -> dict[str, Any]:
    """That the model was given the planned work, to the operation. Returns the plan, and that of the whole split."""
    plan, whole = (_plan(setup, some, timed.way).flops for some in (rows, split))
    for given, n_rows in zip(timed.works, timed.rows, strict=True):
        assert given.flops * len(rows) == plan * n_rows, f"{timed.benchmark}, {timed.way}: {given} for {n_rows} rows"
    return {"rows": len(rows), "flops": plan, "rows_of_split": len(split), "flops_of_split": whole}


def _plan(setup: Setup, rows: Encoded, way: str) -> Work:
    """The work of an importance pass over all of `rows`."""
    if way == "ours":
        return planned(setup, rows, way, "gates")
    passes = [planned(setup, rows, way, "weights")]
    return total(passes + ([planned(setup, rows, way, "none")] if setup.own_score_pass else []))


def _assert_same(found: tuple[Importance, Tensor], exact: GateGradients) -> None:
    """That a rival's importance and logits are ours, once our rows are reduced as it reduces them."""
    scores = sensitivity(exact, "accumulated", SCORE_BATCH)
    pairs = ((found[0].heads, scores.heads), (found[0].mlps, scores.mlps), (found[1], exact.logits))
    for theirs, mine in pairs:
        off = float((theirs - mine).abs().max() / mine.abs().max())
        assert off < 1e-3, f"the ways disagree by {off:.1e} of the largest value"
