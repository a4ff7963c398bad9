"""Small charts that stand side by side, one a task: bars, curves, histograms with a slider, matrices, stacks, pictures of maps.

As in `figures`: plain values in, one `<svg>` out, of a natural size; colours come from the style sheet, and what stands on seeds
can be drawn again by the page's script for those a reader chooses.
"""

import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import fmean, stdev

from tombola.report.figures import Line, Pixels, axis_text, draw_svg, scale, tick_text, ticks_of, tips
from tombola.report.live import BySeed, bound, over, values

BINS = 24  # of importance histograms, as in the paper


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, its seeds as dots; `group` is written below the bars that share it."""

    group: str
    css: str
    by_seed: BySeed
    title: str


@dataclass(frozen=True, slots=True)
class Point:
    """One place of a curve."""

    x: float
    by_seed: BySeed
    title: str


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in the order of x, joined by a line; `dashed` sets a second one of the same colour apart."""

    css: str
    points: Sequence[Point]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Spot:
    """One mark of a scatter chart, with an interval where there is one."""

    x: float
    y: float
    ends: tuple[float | None, float | None]
    css: str
    title: str
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """One cell of a matrix: shade in [−1, 1], below 0 in the other hue; None where there is no value."""

    text: str
    shade: float | None
    title: str


@dataclass(frozen=True, slots=True)
class Bins:
    """A histogram at one step of a search: counts over [0, top], and where the search cut."""

    counts: Sequence[int]
    cut: float | None
    title: str


@dataclass(frozen=True, slots=True)
class Stack:
    """One bar of shares that add up to 1: css class → share."""

    label: str
    shares: Mapping[str, float]
    titles: Mapping[str, str] = field(default_factory=dict)


def bar_chart(bars: Sequence[Bar], lines: Sequence[Line], *, label: str) -> str:
    """Bars from 0 with a whisker of one std to each side, and a dot a seed; empty if nothing is finite."""
    found = [bar for bar in bars if bar.by_seed and all(map(math.isfinite, bar.by_seed.values()))]
    if not found:
        return ""
    means = {id(bar): fmean(bar.by_seed.values()) for bar in found}
    reach = [means[id(bar)] + side * _std(bar.by_seed) for bar in found for side in (-1, 0, 1)]
    reach += [value for bar in found for value in bar.by_seed.values()] + [
        line.value for line in lines if math.isfinite(line.value)
    ]
    ticks = ticks_of(min(0.0, *reach), max(0.0, *reach))
    left, top, bottom, wide, gap = 34, 8, 132, 17, 5
    y = scale(ticks[0], max(ticks[-1], *reach), bottom, top)
    marks, bodies, at, group = [], [], float(left + 8), ""
    starts: list[tuple[str, float]] = []
    for bar in found:
        if bar.group != group:
            at += 9 if starts else 0
            group = bar.group
            starts.append((group, at))
        mean, std, live = means[id(bar)], _std(bar.by_seed), over(bar.by_seed)
        mid, rising = at + wide / 2, mean >= 0
        high, low = (mean, 0.0) if rising else (0.0, mean)
        body = f'<rect class="bar" x="{at:g}" width="{wide}" y="{y(high):.1f}" height="{y(low) - y(high):.1f}"'
        if rising and live:
            zero = y(0.0)
            body += bound(("y", "m", y), ("height", "m", lambda value, zero=zero: zero - y(value)))  # type: ignore[misc]
        body += f"><title>{escape(bar.title)}</title></rect>"
        if std:
            body += f'<line class="whisker" x1="{mid:g}" x2="{mid:g}" y1="{y(mean - std):.1f}" y2="{y(mean + std):.1f}"'
            body += bound(("y1", "l", y), ("y2", "h", y)) + "/>"
        dots = list(bar.by_seed.items())
        for i, (seed, value) in enumerate(dots):
            x = mid + (i - (len(dots) - 1) / 2) * min(3.0, 12 / len(dots))
            body += f'<circle class="seed" cx="{x:.1f}" cy="{y(value):.1f}" r="1.8" data-seed="{seed}"/>'
        bodies.append(f'<g class="{bar.css}"{live}>{body}</g>')
        at += wide + gap
    right = max(at + 4, left + 120)
    for value in ticks:
        marks.append(f'<line class="grid" x1="{left}" x2="{right:g}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        marks.append(axis_text(left - 5, y(value) + 4, tick_text(value, ticks), side=True))
    ends = [*(start for _, start in starts[1:]), at + 9][: len(starts)]
    for (name, start), end in zip(starts, ends, strict=True):
        marks.append(axis_text(f"{(start + end - 9 - gap) / 2:.1f}", bottom + 16, name))
    marks += bodies + _lines(lines, y, left, right)
    return draw_svg("bars", f"{right:g}", bottom + 22, label, marks, box=f' viewBox="0 0 {right:g} {bottom + 22}"')


def curve_chart(curves: Sequence[Curve], lines: Sequence[Line], *, label: str, x_label: str, percent: bool = False) -> str:
    """Means over seeds joined by lines, bands of one std to each side, and a dot a mean; empty if nothing is finite."""
    curves = [
        Curve(
            one.css,
            [p for p in one.points if p.by_seed and math.isfinite(p.x) and all(map(math.isfinite, p.by_seed.values()))],
            one.dashed,
        )
        for one in curves
    ]
    points = [point for one in curves for point in one.points]
    if not points:
        return ""
    reach = [fmean(p.by_seed.values()) + side * _std(p.by_seed) for p in points for side in (-1, 0, 1)]
    reach += [line.value for line in lines if math.isfinite(line.value)]
    ticks = ticks_of(min(reach), max(reach))
    left, top, bottom, right = 38, 8, 150, 268
    y = scale(min(ticks[0], *reach), max(ticks[-1], *reach), bottom, top)
    across = sorted({point.x for point in points})
    first, last = (across[0], across[-1]) if len(across) > 1 else (across[0] - 0.5, across[0] + 0.5)
    x = scale(first, last, left + 8, right - 10)
    marks = []
    for value in ticks:
        marks.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        marks.append(axis_text(left - 5, y(value) + 4, tick_text(value, ticks), side=True))
    shown = across if len(across) <= 6 else ticks_of(first, last)
    written = -99.0
    for value in shown:
        if first <= value <= last and x(value) - written >= 24:
            marks.append(axis_text(f"{x(value):.1f}", bottom + 16, f"{100 * value:.0f}" if percent else f"{value:g}"))
            written = x(value)
    marks.append(axis_text(f"{(left + right) / 2:g}", bottom + 33, x_label))
    marks += _lines(lines, y, left, right)
    for one in curves:
        if one.points:
            marks.append(_curve(one, x, y))
    return draw_svg("curves", str(right), bottom + 40, label, marks, box=f' viewBox="0 0 {right} {bottom + 40}"')


def _curve(curve: Curve, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    means = [fmean(point.by_seed.values()) for point in curve.points]
    stds = [_std(point.by_seed) for point in curve.points]
    at = [x(point.x) for point in curve.points]
    start = y(0.0)
    data = ";".join(values(point.by_seed) for point in curve.points)
    scaled = f'data-points="{data}" data-x="{" ".join(f"{one:.1f}" for one in at)}" data-y="{start:.6g} {y(1.0) - start:.6g}"'
    line = "M" + "L".join(f"{px:.1f} {y(mean):.1f}" for px, mean in zip(at, means, strict=True))
    upper = [f"{px:.1f} {y(mean + std):.1f}" for px, mean, std in zip(at, means, stds, strict=True)]
    lower = [f"{px:.1f} {y(mean - std):.1f}" for px, mean, std in zip(at, means, stds, strict=True)]
    band = "M" + "L".join([*upper, *reversed(lower)]) + "z" if any(stds) else "M0 0"
    dots = "".join(f'<circle cx="{px:.1f}" cy="{y(mean):.1f}" r="3.2"/>' for px, mean in zip(at, means, strict=True))
    told = tips([point.title for point in curve.points])
    dashed = " dashed" if curve.dashed else ""
    return (
        f'<g class="curve {curve.css}{dashed}" {scaled}><path class="band" d="{band}"/><path class="line" d="{line}"/>'
        f"<g{told}>{dots}</g></g>"
    )


def scatter_chart(spots: Sequence[Spot], line: Sequence[tuple[float, float]], *, label: str, x_label: str) -> str:
    """Marks over a scale that begins at 0, each with its interval, and a dashed line of a control; empty if nothing is finite."""
    spots = [one for one in spots if math.isfinite(one.x) and math.isfinite(one.y)]
    if not spots:
        return ""
    reach = [one.y for one in spots] + [end for one in spots for end in one.ends if end is not None] + [y for _, y in line]
    ticks = ticks_of(min(reach), max(reach))
    across = ticks_of(0.0, max(one.x for one in spots))
    left, top, bottom, right = 38, 8, 212, 348
    y = scale(min(ticks[0], *reach), max(ticks[-1], *reach), bottom, top)
    x = scale(0.0, max(across[-1], *(one.x for one in spots)), left, right - 10)
    marks = []
    for value in ticks:
        marks.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        marks.append(axis_text(left - 5, y(value) + 4, tick_text(value, ticks), side=True))
    marks += [axis_text(f"{x(value):.1f}", bottom + 16, tick_text(value, across)) for value in across]
    marks.append(axis_text(f"{(left + right) / 2:g}", bottom + 33, x_label))
    if len(line) > 1:
        path = "L".join(f"{x(at):.1f} {y(value):.1f}" for at, value in line)
        marks.append(f'<g class="curve dashed random"><path class="line" d="M{path}"/></g>')
    for one in sorted(spots, key=lambda spot: not spot.hollow):
        low, high = one.ends
        body = ""
        if low is not None and high is not None:
            body = f'<line class="whisker" x1="{x(one.x):.1f}" x2="{x(one.x):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
        dot = f'<circle class="dot" cx="{x(one.x):.1f}" cy="{y(one.y):.1f}" r="5"><title>{escape(one.title)}</title></circle>'
        marks.append(f'<g class="{one.css}{" hollow" if one.hollow else ""}">{body}{dot}</g>')
    return draw_svg("curves", str(right), bottom + 40, label, marks, box=f' viewBox="0 0 {right} {bottom + 40}"')


def histogram(steps: Mapping[int, Sequence[Bins]], top: float, *, label: str) -> str:
    """Of one seed and step, as many as the script's slider can choose: seed → its steps. The first of each is drawn."""
    if not steps or top <= 0:
        return ""
    left, above, bottom, right = 30, 8, 118, 246
    highest = max((max(bins.counts) for found in steps.values() for bins in found), default=0) or 1
    ticks = [value for value in ticks_of(0.0, float(highest)) if value == int(value)]
    y = scale(0.0, max(ticks[-1], highest), bottom, above)
    x = scale(0.0, top, left, right - 6)
    first = next(iter(steps.values()))[0]
    width = (right - 6 - left) / BINS
    marks = []
    for value in ticks:
        marks.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        marks.append(axis_text(left - 5, y(value) + 4, f"{value:g}", side=True))
    marks += [axis_text(f"{x(value):.1f}", bottom + 16, f"{value:.2g}") for value in (0.0, top / 2, top)]
    start = y(0.0)
    said = "|".join(
        f"{seed}:"
        + ";".join(f"{','.join(map(str, one.counts))}/{'' if one.cut is None else f'{one.cut:.4g}'}/{one.title}" for one in found)
        for seed, found in steps.items()
    )
    bars = "".join(
        f'<rect class="bar" x="{left + i * width + 0.5:.1f}" width="{width - 1:.1f}" y="{y(n):.1f}" height="{start - y(n):.1f}"/>'
        for i, n in enumerate(first.counts)
    )
    cut = "" if first.cut is None else f' x1="{x(first.cut):.1f}" x2="{x(first.cut):.1f}"'
    hidden = ' visibility="hidden"'
    bars += f'<line class="cut" y1="{above}" y2="{bottom}"{cut or hidden}/>'
    per = y(1.0) - start
    data = (
        f'data-steps="{escape(said)}" data-y="{start:g} {per:.6g}" data-x="{x(0.0):g} {x(1.0) - x(0.0):.6g}" data-top="{top:.6g}"'
    )
    marks.append(f'<g class="histogram" {data}>{bars}</g>')
    return draw_svg("bars", str(right), bottom + 22, label, marks, box=f' viewBox="0 0 {right} {bottom + 22}"')


def _bins(one: Bins) -> str:
    cut = "" if one.cut is None else f"{one.cut:.4g}"
    return f"{','.join(map(str, one.counts))}/{cut}/{one.title}"


def matrix(
    names: Sequence[str], tiles: Mapping[tuple[int, int], Tile], *, label: str, columns: Sequence[str] | None = None
) -> str:
    """A shaded cell with its number for each (row, column); columns have the names of rows where none are given."""
    columns = names if columns is None else columns
    longest = max((len(name) for name in names), default=0)
    cell, left, top = 44, min(120, 10 + round(6.6 * longest)), 20
    marks = []
    for i, name in enumerate(names):
        shown = name if len(name) <= 16 else name[:15] + "…"
        marks.append(axis_text(left - 6, top + i * cell + cell / 2 + 4, shown, side=True))
    for i, name in enumerate(columns):
        marks.append(axis_text(left + i * cell + cell / 2, 13, name if len(name) <= 7 else name[:6] + "…"))
    for (row, column), one in tiles.items():
        x, y = left + column * cell, top + row * cell
        css = "none" if one.shade is None else "more" if one.shade >= 0 else "less"
        shade = "" if one.shade is None else f' fill-opacity="{0.78 * min(1.0, abs(one.shade)):.2f}"'
        marks.append(
            f'<g><rect class="tile {css}" x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}"{shade}/>'
            f"{axis_text(x + cell / 2, y + cell / 2 + 4, one.text)}<title>{escape(one.title)}</title></g>"
        )
    width, height = left + len(columns) * cell, top + len(names) * cell
    return draw_svg("matrix", str(width), height, label, marks, box=f' viewBox="0 0 {width} {height}"')


def stacked(stacks: Sequence[Stack], *, label: str) -> str:
    """A horizontal bar each, whose parts are shares of 1."""
    left, width, tall = 132, 260, 20
    marks = []
    for i, stack in enumerate(stacks):
        y, x = 6 + i * (tall + 8), float(left)
        marks.append(axis_text(left - 6, y + tall / 2 + 4, stack.label, side=True))
        for css, share in stack.shares.items():
            place = f'x="{x:.1f}" y="{y}" width="{max(0.0, share * width):.1f}" height="{tall}"'
            title = escape(stack.titles.get(css, f"{css}: {share:.3f}"))
            marks.append(f'<rect class="share {escape(css)}" {place}><title>{title}</title></rect>')
            x += share * width
    height = 6 + len(stacks) * (tall + 8) + 18
    marks += [axis_text(f"{left + share * width:g}", height - 4, f"{100 * share:.0f} %") for share in (0, 0.5, 1)]
    return draw_svg("stacked", str(left + width + 18), height, label, marks, box=f' viewBox="0 0 {left + width + 18} {height}"')


def row_chart(rows: Sequence[Bar], lines: Sequence[Line], *, label: str) -> str:
    """A row a bar, named at the left: the mean as a dot, one std to each side, a small dot a seed; empty if nothing is finite."""
    rows = [row for row in rows if row.by_seed and all(map(math.isfinite, row.by_seed.values()))]
    if not rows:
        return ""
    reach = [fmean(row.by_seed.values()) + side * _std(row.by_seed) for row in rows for side in (-1, 0, 1)]
    reach += [value for row in rows for value in row.by_seed.values()] + [
        line.value for line in lines if math.isfinite(line.value)
    ]
    ticks = ticks_of(min(reach), max(reach))
    left, right, tall, top = 14 + round(6.4 * max(len(row.group) for row in rows)), 0, 19, 6
    right = left + 190
    bottom = top + tall * len(rows)
    x = scale(min(ticks[0], *reach), max(ticks[-1], *reach), left + 8, right - 8)
    marks, written = [], -99.0
    for value in ticks:
        marks.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{bottom}"/>')
        if x(value) - written >= 28:
            marks.append(axis_text(f"{x(value):.1f}", bottom + 15, tick_text(value, ticks)))
            written = x(value)
    for line in lines:
        if math.isfinite(line.value):
            place = f'x1="{x(line.value):.1f}" x2="{x(line.value):.1f}" y1="{top}" y2="{bottom}"'
            marks.append(f'<line class="{line.css}" {place}><title>{escape(line.text)}</title></line>')
    for i, row in enumerate(rows):
        y, mean, std = top + tall * i + tall / 2, fmean(row.by_seed.values()), _std(row.by_seed)
        marks.append(axis_text(left - 4, y + 4, row.group, side=True))
        live, body = over(row.by_seed), ""
        if std:
            ends = bound(("x1", "l", x), ("x2", "h", x))
            body += f'<line class="whisker" x1="{x(mean - std):.1f}" x2="{x(mean + std):.1f}" y1="{y:g}" y2="{y:g}"{ends}/>'
        for seed, value in row.by_seed.items():
            body += f'<circle class="draw" cx="{x(value):.1f}" cy="{y:g}" r="2" data-seed="{seed}"/>'
        place = f'cx="{x(mean):.1f}" cy="{y:g}" r="4.5"{bound(("cx", "m", x))}'
        body += f'<circle class="dot" {place}><title>{escape(row.title)}</title></circle>'
        marks.append(f'<g class="{row.css}"{live}>{body}</g>')
    return draw_svg("bars", str(right), bottom + 20, label, marks, box=f' viewBox="0 0 {right} {bottom + 20}"')


def picture(rows: Sequence[Sequence[int]], *, size: Pixels, label: str) -> str:
    """A map of bytes, 0 pale and 255 strong, as one small grey picture that follows the page's colours."""
    height, width = len(rows), len(rows[0]) if rows else 0
    if not width:
        return ""
    # Grey with alpha: ink that is as strong as the value, so that it reads on light and dark.
    raw = b"".join(b"\x00" + bytes(b for value in row for b in (90, value)) for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 4, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    image = f'<image href="{source}" width="{size}" height="{size}" preserveAspectRatio="none"/>'
    frame = f'<rect class="frame-line" x=".5" y=".5" width="{size - 1}" height="{size - 1}"/>'
    return draw_svg("picture", str(size), size, label, [image, frame], box=f' viewBox="0 0 {size} {size}"')


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _lines(lines: Sequence[Line], y: Callable[[float], float], left: Pixels, right: Pixels) -> list[str]:
    marks = []
    for line in lines:
        if math.isfinite(line.value):
            place = f'x1="{left}" x2="{right:g}" y1="{y(line.value):.1f}" y2="{y(line.value):.1f}"'
            marks.append(f'<line class="{line.css}" {place}><title>{escape(line.text)}</title></line>')
    return marks


def _std(by_seed: BySeed) -> float:
    return stdev(by_seed.values()) if len(by_seed) > 1 else 0.0
