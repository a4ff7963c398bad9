"""What the command line shows: progress and messages on stderr, tables and JSON on stdout. Knows cells, computes nothing."""

import json
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tombola.study.cells import Reporter

if TYPE_CHECKING:
    from tombola.study.cells import Cell, Given, Lab
    from tombola.study.runs import RungCells, Tested


class Progress(Reporter):
    """One line of overall progress with remaining time on a terminal; a line per cell elsewhere. Always on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._columns = (
            TextColumn("[bold]{task.fields[at]}"), BarColumn(bar_width=28), TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.description}"),
        )  # fmt: skip
        self.cells = self.at = 0
        self.before = self.work = self.total = 0.0
        self.started = time.monotonic()

    def start(self, cells: int, work: float) -> None:
        from rich.progress import Progress

        self.cells, self.at, self.before, self.work, self.total = cells, 0, 0.0, 0.0, work
        self.started = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(*self._columns, console=self.console, speed_estimate_period=300.0, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=work, at=f"0/{cells}")

    def cell(self, title: str, work: float) -> None:
        self.before, self.work, self.at = self.before + self.work, work, self.at + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.before, description=title, at=f"{self.at}/{self.cells}")
        else:
            spent = time.monotonic() - self.started
            known = self.before > 0.01 * self.total  # the first cells may be cheap ones: from them, days would be expected
            left = f", about {duration(spent * (self.total / self.before - 1))} left" if known else ""
            self.console.print(f"[{self.at}/{self.cells}] {title}{left}", markup=False, soft_wrap=True)

    def share(self, done: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.before + done * self.work)

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, soft_wrap=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self.console.print(f"{self.at} of {self.cells} cells computed in {duration(time.monotonic() - self.started)}")


def say(message: str) -> None:
    print(message, file=sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"\n{title}")
    table = Table(header_style="")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row))
    # A pipe has no width: do not cut what somebody wants to grep.
    Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 200).print(table)


def print_plan(lab: "Lab", cells: "Sequence[Cell]", as_json: bool) -> None:
    """What is in the store, what would run, and about how long: row passes × the measured time of one."""
    from tombola.study.jobs import seconds_per_row_pass
    from tombola.study.steps import STEPS

    missing = lab.missing(cells)
    asked = {one.key for cell in cells for one in cell.needed()}
    work = [STEPS[cell.step].work(cell) for cell in missing]
    seconds = seconds_per_row_pass(lab, cells[0]) * sum(work) if missing else 0.0
    if as_json:
        planned = [{"key": c.key, "title": STEPS[c.step].title(c), "row_passes": w} for c, w in zip(missing, work, strict=True)]
        print_json({"asked": len(asked), "to_run": planned, "estimated_seconds": round(seconds, 1)})
        return
    rows = [(c.key[:12], STEPS[c.step].title(c), f"{w:,.0f}") for c, w in zip(missing, work, strict=True)]
    print_table(f"{len(missing)} of {len(asked)} cells to run", ("key", "cell", "row passes"), rows)
    print(f"about {duration(seconds)} on this machine, measured on a few rows; nothing was computed")


def print_scores(lab: "Lab", cells: "Sequence[Cell]") -> None:
    """One line for each kind × stage × split: mean over seeds of the mean over draws, with spread, n and majority line."""
    from tombola import stats
    from tombola.study.results import KINDS, STAGES, scores_of
    from tombola.study.variants import short_names

    rows = scores_of(lab, cells)
    short = short_names(row.task for row in rows)
    lines: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        lines.setdefault((row.task, row.role, row.split, row.metric, row.kind, row.stage), []).append(row)
    order = {"report": 0, "challenge": 1, "selection": 2}
    table = []
    for key, group in sorted(
        lines.items(),
        key=lambda item: (item[0][0], order[item[0][1]], item[0][3], KINDS.index(item[0][4]), STAGES.index(item[0][5])),
    ):
        task, _, split, metric, kind, stage = key
        seeds = sorted({row.seed for row in group})
        per_seed = [[row.value for row in group if row.seed == seed] for seed in seeds]
        mean = stats.over_seeds([sum(values) / len(values) for values in per_seed])
        known = [row.agreement for row in group if row.agreement is not None]
        flips = [it.flips / it.n if it.flips is not None else it.mean_difference for it in known]
        table.append(
            (
                short[task], split, metric, kind, "" if stage == "full" else stage,
                maybe(mean.value) + _perplexity(metric, mean.value), "" if mean.std is None else f"± {mean.std:.3f}",
                f"{len(seeds)} × {max(map(len, per_seed))}", str(group[0].n), f"{group[0].majority:.3f}",
                f"{sum(flips) / len(flips):.3f}" if flips else "",
            )
        )  # fmt: skip
    columns = ("task", "split", "metric", "kind", "stage", "score", "std", "seeds × draws", "rows", "majority", "flips")
    values = any(row.agreement is not None and row.agreement.flips is None for row in rows)
    of_values = "; of a regression or of text the mean |difference| to its values" if values else ""
    print_table(f"scores (flips: share of rows answered otherwise than by the dense model{of_values})", columns, table)


def _perplexity(metric: str, value: float | None) -> str:
    if metric != "log_likelihood" or value is None or value < -700:
        return ""
    return f" (perplexity {math.exp(-value):,.1f})"


def print_overlaps(lab: "Lab", controlled: "Sequence[Tested]") -> None:
    from tombola.study.steps.shared import ticket_of

    rows = []
    for one in controlled:
        ticket = ticket_of(lab, one.ticket)
        shared, kept = ticket.details["shared_with_good"], {name: n for name, (n, _) in ticket.mask.counts_by_type().items()}
        parts = list(kept)  # the same for all: controls of one ticket
        rows.append(
            (
                ticket.kind,
                str(ticket.details["draw"]),
                *(f"{shared[part]:,} of {kept[part]:,}" for part in parts),
                f"{ticket.sparsity:.3f}",
            )
        )
    print_table("controls: what they keep that the good ticket keeps too", ("kind", "draw", *parts, "sparsity"), rows)


def print_ladder(lab: "Lab", rungs: "Sequence[RungCells]", as_json: bool) -> None:
    """What each option costs: size and scores of every rung, and the difference to the first rung within each seed."""
    from tombola.study.results import ladder_rows

    rows = ladder_rows(lab, rungs)
    if as_json:
        print_json({"rungs": rows})
        return
    stages = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    table = []
    for row in rows:
        shown = [row["rung"], row["change"], f"{row['kept_share']:.3f}"]
        for name in stages:
            score, cost = row["scores"].get(name), row["minus_first"].get(name)
            shown.append("–" if score is None else f"{maybe(score['value'])}" + (f" ({cost['value']:+.3f})" if cost else ""))
        table.append(shown)
    first = rows[0]
    print_table(
        f"ladder, {first['metric']} on {first['split']} ({first['n']} rows, {first['seeds']} seeds); "
        f"in brackets: minus {first['rung']}, mean over seeds",
        ("rung", "change", "kept share", *stages),
        table,
    )


def ticket_json(lab: "Lab", taken: "Cell | Given", scored: "Sequence[Cell | None]") -> dict[str, Any]:
    """One ticket as JSON shows it, with the scores of these cells."""
    from tombola.study.cells import read_rows
    from tombola.study.steps.shared import ticket_of

    ticket = ticket_of(lab, taken)
    return {
        "seed": ticket.seeds["run"],
        "kind": ticket.kind,
        "draw": ticket.details.get("draw", 0),
        "cell": ticket.cell,
        "identity": ticket.identity,
        "kept": {name: kept for name, (kept, _) in ticket.mask.counts_by_type().items()},
        "shared_with_good": ticket.details.get("shared_with_good"),
        "sparsity": ticket.sparsity,
        "scores": [row for cell in scored if cell is not None for row in read_rows(lab.folder(cell) / "scores.jsonl")],
    }


def maybe(value: float | None, decimals: int = 3) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def megabytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 120:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
