"""Rounds that are not worth computing: those after a level that is certainly lost.

A rule on results and no part of any cell: `stop_lost_chains = true` in a study file, and the same command without it computes the
rest. What is left out is said when a study runs, in its status and on its page.
"""

from collections.abc import Iterable, Mapping

from tombola import stats
from tombola.study.cells import Cell, Lab
from tombola.study.chain_rows import score_in
from tombola.tasks import bare_name


def why_stopped(lab: Lab, cell: Cell, *, margin: float = stats.MARGIN) -> str | None:
    """Why a round is not worth computing, or None: the level that the round before it trained is certainly lost
    (`tombola.stats.certainly_lost`, on the selection rows), and this one would prune further.

    By the chain of its own seed alone, so that the answer does not depend on which cells are finished first.
    """
    before, dense = cell.inputs.get("ticket"), cell.inputs.get("dense")
    if cell.step != "round" or not isinstance(before, Cell) or not isinstance(dense, Cell):
        return None
    places = [lab.store.load(one.key) for one in (before, dense)]
    mine, full = (None if place is None else score_in(place, "selection") for place in places)
    if mine is None or full is None:  # the first round has no scores of its own: it is the dense model
        return None
    if not stats.certainly_lost([mine.value], [full.value], mine.n, margin=margin):
        return None
    parent = before.inputs.get("ticket")
    at = parent.settings["cuts"]["to"] if isinstance(parent, Cell) else 0.0
    chain = f"{bare_name(str(cell.settings['data']['task']))}, seed {cell.settings['seeds']['run']}"
    scores = f"{mine.metric} {mine.value:.3f} after {full.value:.3f} on {mine.n} selection rows"
    return f"{chain} is certainly lost at {at:.0%}: {scores}"


def stopped(lab: Lab, cells: Iterable[Cell], *, margin: float = stats.MARGIN) -> dict[str, str]:
    """Key → reason, of those of these cells that are absent because a chain was lost: rounds, and all that stands on them."""
    found: dict[str, str] = {}
    asked: dict[str, str | None] = {}

    def why(cell: Cell) -> str | None:
        if cell.key not in asked:
            below = (why(one) for one in cell.inputs.values() if isinstance(one, Cell))
            reason = next((one for one in below if one), None) or why_stopped(lab, cell, margin=margin)
            asked[cell.key] = None if lab.store.has(cell.key) else reason
        return asked[cell.key]

    for cell in cells:
        if (reason := why(cell)) is not None:
            found[cell.key] = reason
    return found


def by_reason(found: Mapping[str, str]) -> dict[str, int]:
    """Reason → how many cells are left out for it."""
    counts: dict[str, int] = {}
    for reason in found.values():
        counts[reason] = counts.get(reason, 0) + 1
    return counts
