"""The page's figures as SVG text: plain values in, one `<svg>` out; colours come from the style sheet of the page.

Charts carry x positions in percent and y positions in pixels, so a chart fills any width while its text keeps its size;
heat maps have a natural size and shrink as a whole. Every mark has a `<title>`: a tooltip without JavaScript, and the
text which the page's script shows. All text from outside passes `escape`: a label may hold anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

Pixels = int | float


@dataclass(frozen=True, slots=True)
class Dot:
    """One seed in a row of the dot chart."""

    value: float
    draws: tuple[float, ...]  # shown small beside their mean where there are several
    title: str


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


@dataclass(frozen=True, slots=True)
class Line:
    """A score drawn across all rows of a chart."""

    css: str
    text: str
    value: float


@dataclass(frozen=True, slots=True)
class HeatCell:
    """One component; `shade` in [0, 1], None where there is no value."""

    shade: float | None
    title: str


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
    ticks = _ticks(min(values), max(values))
    x = _scale(min(ticks[0], *values), max(ticks[-1], *values), 1.5, 98.5)
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
        back.append(f'<text class="tick" x="{x(tick):.2f}%" y="{y + 16}">{_tick_text(tick, ticks)}</text>')
    for i, line in enumerate(lines):
        if math.isfinite(line.value):
            at = x(line.value)
            side = 'dx="6"' if at < 50 else 'dx="-6" text-anchor="end"'
            back.append(f'<line class="{line.css}" x1="{at:.2f}%" x2="{at:.2f}%" y1="{20 * i + 2}" y2="{y}"/>')
            back.append(f'<text class="{line.css}-text" x="{at:.2f}%" y="{20 * i + 13}" {side}>{escape(line.text)}</text>')
    return _svg("dots", "100%", y + 22, label, back + front)


def heat_map(
    heads: Sequence[Sequence[HeatCell]], mlps: Sequence[HeatCell], *, css: str, width: int, label: str, column: str = "MLP"
) -> str:
    """Layers down, heads across, the MLP of each layer in a column of its own; `width` of the heads, in pixels, at most.

    Without heads the column stands alone; `column` is what it is called.
    """
    columns = len(heads[0])
    cell = max(6, min(27, width // max(columns, 12) - 2))
    pitch, left, top = cell + 2, 24, 22
    mlp_x = left + columns * pitch + 12
    step = math.ceil(17 / pitch)  # axis labels of neighbours must not touch
    marks = [_tick(left + head * pitch + cell / 2, 14, str(head)) for head in range(0, columns, step)]
    marks.append(_tick(mlp_x + cell / 2, 14, column))
    for layer, (row, mlp) in enumerate(zip(heads, mlps, strict=True)):
        y = top + layer * pitch
        marks += [_tick(left - 8, y + cell / 2 + 4, str(layer), side=True)] if layer % math.ceil(13 / pitch) == 0 else []
        for x, it in (*((left + head * pitch, it) for head, it in enumerate(row)), (mlp_x, mlp)):
            shade = f'class="cell {css}" fill-opacity="{it.shade:.3f}"' if it.shade is not None else 'class="cell none"'
            marks.append(
                f'<rect {shade} x="{x}" y="{y}" width="{cell}" height="{cell}" rx="3"><title>{escape(it.title)}</title></rect>'
            )
    right, bottom = mlp_x + cell + (10 if columns else 24), top + len(heads) * pitch
    return _svg("heat", str(right), bottom, label, marks, box=f' viewBox="0 0 {right} {bottom}"')


def path_chart(dots: Sequence[PathDot], floor: float | None, *, label: str) -> str:
    """The score of each trial in order, and below it what the trial keeps; the line follows the masks that passed."""
    values = [value for value in (*(dot.score for dot in dots), floor) if value is not None and math.isfinite(value)]
    if not values:
        return ""
    top, bottom = 30, 180
    ticks = _ticks(min(values), max(values))
    y = _scale(min(ticks[0], *values), max(ticks[-1], *values), bottom - 6, top + 6)
    x = _scale(0.0, max(1.0, len(dots) - 1.0), 18, 97)
    marks = []
    for tick in ticks:
        marks.append(f'<line class="grid" x1="14%" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        marks.append(_tick("12.5%", y(tick) + 4, _tick_text(tick, ticks), side=True))
    if floor is not None and math.isfinite(floor):
        marks.append(f'<line class="floor" x1="14%" x2="100%" y1="{y(floor):.1f}" y2="{y(floor):.1f}"/>')
        marks.append(f'<text class="floor-text" x="15%" y="{y(floor) - 6:.1f}">floor {floor:.3f}</text>')
    circles = []
    held: tuple[float, float] | None = None  # the last mask that passed: every trial starts from it
    for i, dot in enumerate(dots):
        if not math.isfinite(dot.score):
            continue
        here, passed = (x(i), y(dot.score)), "" if dot.passed else " failed"
        if held:
            marks.append(
                f'<line class="path{passed}" x1="{held[0]:.2f}%" y1="{held[1]:.1f}" x2="{here[0]:.2f}%" y2="{here[1]:.1f}"/>'
            )
        circles.append(
            f'<circle class="trial{passed}" cx="{here[0]:.2f}%" cy="{here[1]:.1f}" r="4.5">'
            f"<title>{escape(dot.title)}</title></circle>"
        )
        held = here if dot.passed else held
    for phase, group in groupby(enumerate(dots), key=lambda pair: pair[1].phase):
        trials = [i for i, _ in group]
        if trials[0]:
            edge = x(trials[0] - 0.5)
            marks.append(f'<line class="phase" x1="{edge:.2f}%" x2="{edge:.2f}%" y1="6" y2="{bottom + 44}"/>')
        if len(trials) / len(dots) >= 0.12:  # narrower, the word would touch its neighbours; the tooltip has it
            marks.append(_tick(f"{x((trials[0] + trials[-1]) / 2):.2f}%", 16, phase))
    names = list(dict.fromkeys(name for dot in dots for name in dot.left))
    for line, name in enumerate(names):
        at = bottom + 20 + 18 * line
        marks.append(_tick("12.5%", at, name, side=True))
        shown = range(0, len(dots), math.ceil(len(dots) / 12))
        marks += [_tick(f"{x(i):.2f}%", at, dots[i].left.get(name, "")) for i in shown]
    return _svg("search", "100%", bottom + 10 + 18 * len(names), label, marks + circles)


def _dot_row(row: DotRow, y: Pixels, x: Callable[[float], float]) -> list[str]:
    axis = y + 31
    marks = [
        f'<text class="name" x="0" y="{y + 14}">{escape(row.label)}</text>',
        f'<text class="value" x="100%" y="{y + 14}">{escape(row.text)}</text>',
        f'<line class="track" x1="0" x2="100%" y1="{axis}" y2="{axis}"/>',
    ]
    if row.mean is not None:
        at = x(row.mean)
        if row.std:
            low, high = x(row.mean - row.std), x(row.mean + row.std)
            marks.append(f'<line class="whisker {row.css}" x1="{low:.2f}%" x2="{high:.2f}%" y1="{axis}" y2="{axis}"/>')
        marks.append(f'<line class="mean {row.css}" x1="{at:.2f}%" x2="{at:.2f}%" y1="{axis - 11}" y2="{axis + 11}"/>')
    for i, dot in enumerate(row.dots):
        cy = axis + 5 * (i - (len(row.dots) - 1) / 2) / max(1, (len(row.dots) - 1) / 2)  # spread, so that none hides
        points = [("draw", 2.5, value) for value in dot.draws] if len(dot.draws) > 1 else []
        title = f"<title>{escape(dot.title)}</title>"
        marks += [
            f'<circle class="{css} {row.css}" cx="{x(value):.2f}%" cy="{cy:.1f}" r="{r}">{title}</circle>'
            for css, r, value in [*points, ("dot", 5, dot.value)]
            if math.isfinite(value)
        ]
    return marks


def _svg(css: str, width: str, height: Pixels, label: str, marks: Sequence[str], box: str = "") -> str:
    return (
        f'<svg class="{css}" width="{width}" height="{height}"{box} role="img" aria-label="{escape(label)}">'
        + "".join(marks)
        + "</svg>"
    )


def _tick(x: Pixels | str, y: Pixels, text: str, *, side: bool = False) -> str:
    return f'<text class="tick{" side" if side else ""}" x="{x}" y="{y:g}">{escape(text)}</text>'


def _scale(low: float, high: float, start: Pixels, end: Pixels) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers whose range holds, or nearly holds, low to high; never a range of no width."""
    if high - low < 1e-9:
        low, high = low - 0.05, high + 0.05
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * i for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _tick_text(tick: float, ticks: Sequence[float]) -> str:
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    return f"{tick:.{decimals}f}".replace("-", "−")
