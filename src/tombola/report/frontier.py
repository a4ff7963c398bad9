"""The page of a frontier: score against latency, what is dominated greyed, random controls as a line. One file, no network."""

import html

from tombola.study.frontier import Frontier, Point

WIDTH, HEIGHT, MARGIN = 720, 400, 56


def frontier_page(frontier: Frontier) -> str:
    """The whole page as HTML."""
    dense = frontier.points[0]
    rows = "".join(_row(one, dense) for one in frontier.points)
    title = f"{html.escape(frontier.model)} on {html.escape(frontier.task)}: score against latency"
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in _COLUMNS) + "</tr>"
    about = (
        f"{html.escape(frontier.metric)} on {dense.n} rows; time of a forward pass of {frontier.batch} rows of {frontier.length} "
        f"tokens, medians, noise {dense.noise:.2f}. Hollow: dominated by another point. Dashed: random controls of these sizes."
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{about}</p>{_picture(frontier)}<table>{head}{rows}</table></html>\n"
    )


_COLUMNS = ("ticket", "sparsity", "score", "random control", "ms", "time / dense", "parameters / dense", "")
_STYLE = (
    "body{font:15px/1.5 system-ui;max-width:52rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;width:100%}"
    "td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    ".dominated{color:#999}"
)


def _row(one: Point, dense: Point) -> str:
    name = one.procedure if one is dense else f"{one.procedure}, floor {one.floor:g}"
    cells = (
        html.escape(name), f"{one.sparsity:.3f}", f"{one.score:.3f}", "" if one.random is None else f"{one.random:.3f}",
        f"{1e3 * one.seconds.median:.1f}",
        f"{one.against_dense.median:.2f} ({one.against_dense.low:.2f} to {one.against_dense.high:.2f})",
        f"{one.parameters / dense.parameters:.2f}", "dominated" if one.dominated else "",
    )  # fmt: skip
    kind = ' class="dominated"' if one.dominated else ""
    return f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _picture(frontier: Frontier) -> str:
    points = frontier.points
    times = [1e3 * one.seconds.median for one in points]
    scores = [one.score for one in points] + [one.random for one in points if one.random is not None]
    low, high = min(scores), max(scores)
    span, longest = (high - low) or 1.0, max(times) * 1.05

    def at(ms: float, score: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * ms / longest
        return round(x, 1), round(HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (score - low) / span, 1)

    marks = []
    for one, ms in zip(points, times, strict=True):
        x, y = at(ms, one.score)
        name = "dense" if one is points[0] else f"{one.procedure}, floor {one.floor:g}"
        paint = 'fill="none" stroke="#aaa"' if one.dominated else 'fill="#1f6f8b"'
        marks.append(
            f'<circle cx="{x}" cy="{y}" r="5" {paint}><title>{html.escape(name)}: {one.score:.3f}, {ms:.1f} ms</title></circle>'
        )
    drawn = sorted((ms, one.random) for one, ms in zip(points, times, strict=True) if one.random is not None)
    path = " ".join(f"{x},{y}" for x, y in (at(ms, score) for ms, score in drawn))
    line = f'<polyline points="{path}" fill="none" stroke="#b5651d" stroke-dasharray="5 4"/>' if len(drawn) > 1 else ""
    bottom, left = HEIGHT - MARGIN, MARGIN
    axes = (
        f'<path d="M{left},{MARGIN / 2} V{bottom} H{WIDTH - MARGIN / 2}" fill="none" stroke="#333"/>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">ms (0 to {longest:.0f})</text>'
        f'<text x="8" y="{MARGIN}">{high:.2f}</text><text x="8" y="{bottom}">{low:.2f}</text>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="score against latency">{axes}{line}{"".join(marks)}</svg>'
