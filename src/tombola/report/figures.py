"""The page's figures as SVG text: plain values in, one `<svg>` out; colours come from the style sheet of the page.

Charts carry x positions in percent and y positions in pixels, so a chart fills any width while its text keeps its size;
heat maps have a natural size and shrink as a whole. Every mark has a `<title>`: a tooltip without JavaScript, and the
text which the page's script shows; but for heat maps, whose many cells the script reads from one list. All text from outside
passes `escape`: a label may hold anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from statistics import fmean

from tombola.report.live import Live, bound, grid, over

Pixels = int | float


@dataclass(frozen=True, slots=True)
class Dot:
    """One seed in a row of the dot chart."""

    value: float
    draws: tuple[float, ...]  # shown small beside their mean where there are several
    title: str
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class DotRow:
    """One row of the dot chart."""

    group: str  # a heading stands where it changes
    label: str
    css: str  # colour
    text: str  # the numbers, at the right end
    mean: float | None
    std: float | None
    dots: tuple[Dot, ...]
    sample: str = ""  # behind the numbers


@dataclass(frozen=True, slots=True)
class Line:
    """A score drawn across all rows of a chart."""

    css: str
    text: str
    value: float


@dataclass(frozen=True, slots=True)
class Heat:
    """What a heat map shows: of each seed a value for every head, layer by layer, and then for every MLP; in [0, 1].

    Its tooltips are made by the page's script from the values, as hundreds of cells would each repeat them. `told` says how:
    kept (whole parts), share (of a part's values), tasks, importance.
    """

    layers: int
    heads: int  # of each layer; 0: the column stands alone
    by_seed: Mapping[int, Sequence[float]]
    told: str
    column: str = "MLP"
    raw: Mapping[int, Sequence[float]] | None = None  # what the script tells in place of the shades

    def shade(self, at: int) -> float | None:
        """The mean over seeds; None where it is unknown."""
        found = [values[at] for values in self.by_seed.values()]
        return fmean(found) if found and all(map(math.isfinite, found)) else None


@dataclass(frozen=True, slots=True)
class PathDot:
    """One trial of a search."""

    score: float
    passed: bool
    phase: str
    left: Mapping[str, str]  # what the trial keeps, by name: "heads" → "36"
    title: str


def dot_chart(rows: Sequence[DotRow], lines: Sequence[Line], *, label: str) -> str:
    """A dot per seed, a bar at their mean, a whisker of one std to each side; empty if no value is finite."""
    values = [v for row in rows for dot in row.dots for v in (dot.value, *dot.draws)] + [line.value for line in lines]
    values += [row.mean + side * row.std for row in rows if row.mean is not None and row.std for side in (-1, 1)]
    if not (values := [value for value in values if math.isfinite(value)]):
        return ""
    ticks = ticks_of(min(values), max(values))
    x = scale(min(ticks[0], *values), max(ticks[-1], *values), 1.5, 98.5)
    top = y = 20 * len(lines) + 8
    front: list[str] = []
    for group, members in groupby(rows, key=lambda row: row.group):
        if group:
            y += 38
            front.append(f'<text class="group" x="0" y="{y - 10}">{escape(group)}</text>')
        for row in members:
            front += _dot_row(row, y, x)
            y += 48
    back = []
    for tick in ticks:
        back.append(f'<line class="grid" x1="{x(tick):.2f}%" x2="{x(tick):.2f}%" y1="{top}" y2="{y}"/>')
        back.append(f'<text class="tick" x="{x(tick):.2f}%" y="{y + 16}">{tick_text(tick, ticks)}</text>')
    for i, line in enumerate(lines):
        if math.isfinite(line.value):
            at = x(line.value)
            side = 'dx="6"' if at < 50 else 'dx="-6" text-anchor="end"'
            back.append(f'<line class="{line.css}" x1="{at:.2f}%" x2="{at:.2f}%" y1="{20 * i + 2}" y2="{y}"/>')
            back.append(f'<text class="{line.css}-text" x="{at:.2f}%" y="{20 * i + 13}" {side}>{escape(line.text)}</text>')
    return draw_svg("dots", "100%", y + 22, label, back + front)


def heat_map(heat: Heat, *, css: str, width: int, label: str, name: str = "") -> str:
    """Layers down, heads across, the MLP of each layer in a column of its own; `width` of the heads, in pixels, at most."""
    columns = heat.heads
    cell = max(6, min(27, width // max(columns, 12) - 2))
    pitch, left, top = cell + 2, 24, 22
    mlp_x = left + columns * pitch + 12
    step = math.ceil(17 / pitch)  # axis labels of neighbours must not touch
    marks = [axis_text(left + head * pitch + cell / 2, 14, str(head)) for head in range(0, columns, step)]
    marks.append(axis_text(mlp_x + cell / 2, 14, heat.column))
    every = math.ceil(13 / pitch)
    marks += [axis_text(left - 8, top + i * pitch + cell / 2 + 4, str(i), side=True) for i in range(0, heat.layers, every)]
    places = [(left + head * pitch, top + i * pitch) for i in range(heat.layers) for head in range(columns)]
    places += [(mlp_x, top + i * pitch) for i in range(heat.layers)]
    drawn: dict[float | None, str] = {}  # one path a shade; the script makes a mark of each cell, that can be pointed at
    for at, (px, py) in enumerate(places):
        shade = heat.shade(at)
        key = None if shade is None else round(shade, 2)
        drawn[key] = drawn.get(key, "") + f"M{px} {py}h{cell}v{cell}h-{cell}z"
    cells = "".join(
        f'<path d="{d}" ' + ('class="none"/>' if shade is None else f'fill-opacity="{shade:g}"/>') for shade, d in drawn.items()
    )
    data = f'data-heat="{heat.told}" data-heads="{columns}" data-layers="{heat.layers}" data-column="{escape(heat.column)}"'
    data += f' data-at="{left} {top} {pitch} {cell} {mlp_x}"'
    raw = f' data-raw="{grid(heat.raw)}"' if heat.raw is not None else ""
    group = f'<g class="cells {css}" {data} data-name="{escape(name)}" data-v="{grid(heat.by_seed)}"{raw}>{cells}</g>'
    right, bottom = mlp_x + cell + (10 if columns else 24), top + heat.layers * pitch
    return draw_svg("heat", str(right), bottom, label, [*marks, group], box=f' viewBox="0 0 {right} {bottom}"')


def path_chart(dots: Sequence[PathDot], floor: float | None, *, label: str) -> str:
    """The score of each trial in order, and below it what the trial keeps; the line follows the masks that passed."""
    values = [value for value in (*(dot.score for dot in dots), floor) if value is not None and math.isfinite(value)]
    if not values:
        return ""
    top, bottom, left, right = 30, 180, 42, 296
    ticks = ticks_of(min(values), max(values))
    y = scale(min(ticks[0], *values), max(ticks[-1], *values), bottom - 6, top + 6)
    x = scale(0.0, max(1.0, len(dots) - 1.0), left + 24, right - 14)
    marks = []
    for tick in ticks:
        marks.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        marks.append(axis_text(left - 5, y(tick) + 4, tick_text(tick, ticks), side=True))
    if floor is not None and math.isfinite(floor):
        marks.append(f'<line class="floor" x1="{left}" x2="{right}" y1="{y(floor):.1f}" y2="{y(floor):.1f}"/>')
        marks.append(f'<text class="floor-text" x="{left + 3}" y="{y(floor) - 6:.1f}">floor {floor:.3f}</text>')
    circles, told, passed, failed = [], [], "", ""
    held: tuple[float, float] | None = None  # the last mask that passed: every trial starts from it
    for i, dot in enumerate(dots):
        if not math.isfinite(dot.score):
            continue
        here = (x(i), y(dot.score))
        step = f"M{held[0]:.0f} {held[1]:.1f}L{here[0]:.0f} {here[1]:.1f}" if held else ""
        passed, failed = (passed + step, failed) if dot.passed else (passed, failed + step)
        css = "" if dot.passed else ' class="failed"'
        circles.append(f'<circle{css} cx="{here[0]:.0f}" cy="{here[1]:.1f}" r="4.5"/>')
        told.append(dot.title)
        held = here if dot.passed else held
    marks += [f'<path class="path {css}" d="{d}"/>' for css, d in (("failed", failed), ("passed", passed)) if d]
    for phase, group in groupby(enumerate(dots), key=lambda pair: pair[1].phase):
        trials = [i for i, _ in group]
        if trials[0]:
            edge = x(trials[0] - 0.5)
            marks.append(f'<line class="phase" x1="{edge:.1f}" x2="{edge:.1f}" y1="6" y2="{bottom + 44}"/>')
        if len(trials) / len(dots) >= 0.12:  # narrower, the word would touch its neighbours; the tooltip has it
            marks.append(axis_text(f"{x((trials[0] + trials[-1]) / 2):.1f}", 16, phase))
    names = list(dict.fromkeys(name for dot in dots for name in dot.left))
    for line, name in enumerate(names):
        at = bottom + 20 + 18 * line
        marks.append(axis_text(left - 5, at, name, side=True))
        shown = range(0, len(dots), math.ceil(len(dots) / 8))
        marks += [axis_text(f"{x(i):.0f}", at, dots[i].left.get(name, "")) for i in shown]
    height = bottom + 10 + 18 * len(names)
    marks.append(f'<g class="trials"{tips(told)}>{"".join(circles)}</g>')
    return draw_svg("search", str(right), height, label, marks, box=f' viewBox="0 0 {right} {height}"')


def tips(told: Sequence[str]) -> str:
    """The attribute of a group with the text of each of its marks, which the script gives them."""
    return ' data-tips="' + escape("\n\n".join(text.replace("\n\n", "\n") for text in told)) + '"'


def _dot_row(row: DotRow, y: Pixels, x: Callable[[float], float]) -> list[str]:
    axis = y + 31
    seeds = {dot.seed: dot.value for dot in row.dots if dot.seed is not None}
    live = over(seeds) if len(seeds) == len(row.dots) else ""
    marks = [
        f'<text class="name" x="0" y="{y + 14}">{escape(row.label)}</text>',
        f'<line class="track" x1="0" x2="100%" y1="{axis}" y2="{axis}"/>',
        f'<g class="{row.css}"{live}><text class="value" x="100%" y="{y + 14}"><tspan{_said(row.text)}>{escape(row.text)}</tspan>'
        f"{escape(row.sample)}</text>",
    ]
    if row.mean is not None:
        at = x(row.mean)
        if row.std:
            low, high = x(row.mean - row.std), x(row.mean + row.std)
            ends = bound(("x1", "l", x), ("x2", "h", x), unit="%") if live else ""
            marks.append(f'<line class="whisker" x1="{low:.2f}%" x2="{high:.2f}%" y1="{axis}" y2="{axis}"{ends}/>')
        ends = bound(("x1", "m", x), ("x2", "m", x), unit="%") if live else ""
        marks.append(f'<line class="mean" x1="{at:.2f}%" x2="{at:.2f}%" y1="{axis - 11}" y2="{axis + 11}"{ends}/>')
    for i, dot in enumerate(row.dots):
        cy = axis + 5 * (i - (len(row.dots) - 1) / 2) / max(1, (len(row.dots) - 1) / 2)  # spread, so that none hides
        points = [("draw", 2.5, value) for value in dot.draws] if len(dot.draws) > 1 else []
        title, seed = f"<title>{escape(dot.title)}</title>", "" if dot.seed is None else f' data-seed="{dot.seed}"'
        marks += [
            f'<circle class="{css}" cx="{x(value):.2f}%" cy="{cy:.1f}" r="{r}"{seed}>{title}</circle>'
            for css, r, value in [*points, ("dot", 5, dot.value)]
            if math.isfinite(value)
        ]
    return [*marks, "</g>"]


def _said(text: str) -> str:
    """How the script writes a text again."""
    return f' data-f="{text.how}"' if isinstance(text, Live) else ""


def draw_svg(css: str, width: str, height: Pixels, label: str, marks: Sequence[str], box: str = "") -> str:
    return (
        f'<svg class="{css}" width="{width}" height="{height}"{box} role="img" aria-label="{escape(label)}">'
        + "".join(marks)
        + "</svg>"
    )


def axis_text(x: Pixels | str, y: Pixels, text: str, *, side: bool = False) -> str:
    return f'<text class="tick{" side" if side else ""}" x="{x}" y="{y:g}">{escape(text)}</text>'


def scale(low: float, high: float, start: Pixels, end: Pixels) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def ticks_of(low: float, high: float) -> list[float]:
    """Three to six round numbers whose range holds, or nearly holds, low to high; never a range of no width."""
    if high - low < 1e-9:
        low, high = low - 0.05, high + 0.05
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * i for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{tick:.{decimals}f}".replace("-", "−")
