"""Score against latency and size: the frontiers that were measured on a store."""

from collections.abc import Sequence

from tombola.report import charts
from tombola.report.cases import Study
from tombola.report.charts import Spot
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import count
from tombola.study.frontier import Frontier, Point

HEAD = ("Task", "Ticket", "Score", "Random control", "Sparsity", "Time, ms", "of dense", "Operations", "Parameters", "")


def frontier_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Every measured frontier: its points in a figure, and all numbers in one table."""
    found = study.results.frontiers
    if not found:
        return ()
    figures = tuple(_figure(one) for one in found)
    return (
        Part(
            anchor,
            "Frontier",
            "What does a ticket gain, and what does it cost?",
            "Each ticket shrunk and timed. Hollow: dominated by another one. Dashed: random controls of the same sizes.",
            legend=(("full", "dense"), ("good", "good"), ("random", "random")),
            figures=(figures,),
            tables=(frontier_table(found),),
            cells=tuple(dict.fromkeys(key for one in found for point in one.points for key in point.cells)),
            all_seeds=any(len(one.seeds) > 1 for one in found),
        ),
    )


def frontier_table(found: Sequence[Frontier]) -> Table:
    """All points of these frontiers with all their numbers."""
    several = len({one.model for one in found}) > 1
    shapes = len({(one.batch, one.length) for one in found}) > 1
    rows = tuple(_row(one, point, several, shapes) for one in found for point in one.points)
    note = (
        "Scores are on report rows; the 95 % interval is for other rows and these very seeds. Time: of a forward pass, median "
        "over rounds in which all models take turns, with an interval over rounds; less apart than the noise is no difference. "
        "Operations and parameters as shares of the dense model’s. Size and time are those of the first seed’s ticket. "
        "Dominated: another one scores as much, is as fast and as small, and better in one of these."
    )
    return Table("Score against latency and size", HEAD, rows, note=note, stubs=2)


def _figure(found: Frontier) -> Figure:
    dense = found.points[0]
    spots = [
        Spot(
            1e3 * one.seconds.median,
            one.value,
            (one.score.low, one.score.high),
            "full" if one is dense else "good",
            hollow=one.dominated,
            title=_told(one, dense, found.metric),
        )
        for one in found.points
    ]
    drawn = [(1e3 * one.seconds.median, one.random.value) for one in found.points if one.random and one.random.value is not None]
    label = f"{found.metric} against time, {found.task}"
    svg = charts.scatter_chart(spots, sorted(drawn), label=label, x_label=f"ms for {found.batch} × {found.length} tokens")
    threads = count(found.threads, "thread")
    stage = {"retrained": "trained again, ", "tuned": "masks tuned, "}.get(found.stage, "")
    caption = (
        f"{found.metric}, {stage}{dense.n} rows, {count(len(found.seeds), 'seed')}; {threads}, noise ± {100 * dense.noise:.0f} %"
    )
    return Figure(f"{found.task} ({found.model})", svg, caption, natural=True)


def _told(one: Point, dense: Point, metric: str) -> str:
    lines = [one.goal, f"{metric} {one.score.text}", f"{1e3 * one.seconds.median:.1f} ms, {one.against_dense.text} of dense"]
    lines += [
        f"{100 * one.parameters / dense.parameters:.0f} % of the parameters, {100 * one.flops / dense.flops:.0f} % of operations"
    ]
    lines += [] if one.random is None else [f"random {one.random.text}"]
    return "\n".join([*lines, "dominated"] if one.dominated else lines)


def _row(found: Frontier, one: Point, several: bool, shapes: bool) -> tuple[str, ...]:
    dense = found.points[0]
    task = found.task + (f" ({found.model})" if several else "") + (f", {found.batch}×{found.length}" if shapes else "")
    return (
        task, one.goal, one.score.text, "" if one.random is None else one.random.text, f"{one.sparsity:.3f}",
        f"{1e3 * one.seconds.median:.1f}", one.against_dense.text, f"{one.flops / dense.flops:.2f}",
        f"{one.parameters / dense.parameters:.2f}", "dominated" if one.dominated else "",
    )  # fmt: skip
