"""Draws curves and histograms as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 380, 270
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 40
COLORS = 8  # number of colours in the style sheet, .c0 to .c7
ROW, BINS = 54, 40  # height of a histogram, number of its bars


class Line(NamedTuple):
    """A line of a plot.

    Attributes:
        name: name in the legend.
        x: x coordinates of the points, ascending.
        y: y coordinates of the points.
        dots: True to mark the points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


class Axis(NamedTuple):
    """An axis of a plot.

    Attributes:
        label: text beside the axis.
        low: value at the start.
        high: value at the end, greater than `low`.
        is_log: True for a logarithmic axis, which needs `low` above 0.
    """

    label: str
    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Returns a value's position on the axis: 0 at the start, 1 at the end."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Returns a few round values on the axis."""
        if self.is_log:
            decades = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            steps = (1, 2, 5) if len(decades) < 4 else (1,)
            found = [step * 10.0**k for k in decades for step in steps]
            inside = [v for v in found if self.low <= v <= self.high]
            if len(inside) > 1:
                return inside
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def fit_axis(label: str, values: Sequence[float]) -> Axis:
    """Returns an axis that holds all values; it is logarithmic if all are above 0."""
    low, high = min(values), max(values)
    if low > 0:
        return Axis(label, low / 1.1, high * 1.1, is_log=True)
    margin = 0.05 * (high - low) or 1.0
    return Axis(label, low - margin, high + margin)


def draw_lines(title: str, lines: Sequence[Line], *, x: Axis, y: Axis) -> str:
    """Returns a figure of lines with a legend; lines end with the x axis."""
    inner = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        across, up = x.place(px), y.place(py)
        return LEFT + across * inner[0], TOP + (1 - up) * inner[1]

    parts = _grid(x, y, inner)
    legend = []
    for k, line in enumerate(lines):
        style = f"c{k % COLORS}" + (" dashed" if k >= COLORS else "")
        points = [at(*p) for p in _cut(line, x.high)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
        if line.dots or len(points) == 1:
            parts += [
                f'<circle class="dot {style}" cx="{px:.1f}" cy="{py:.1f}" r="2.5"/>'
                for px, py in points
            ]
        legend.append(f'<li><i class="{style}"></i>{escape(line.name)}</li>')
    return _figure(title, HEIGHT, parts, f'<ul class="legend">{"".join(legend)}</ul>')


def draw_histograms(
    title: str,
    rows: Mapping[str, Sequence[float]],
    *,
    normal: Sequence[str],
    threshold: float,
    label: str,
) -> str:
    """Returns a figure of histograms, one below the other, over one axis.

    Args:
        title: title of the figure.
        rows: values by name; at least one name has a value.
        normal: names that are drawn in the colour of normal images.
        threshold: value at which a line is drawn through all histograms.
        label: label of the axis.
    """
    values = [v for row in rows.values() for v in row] + [threshold]
    margin = 0.03 * (max(values) - min(values)) or 0.5
    axis = Axis(label, min(values) - margin, max(values) + margin)
    inner = WIDTH - 2 * RIGHT
    height = 20 + ROW * len(rows) + BOTTOM
    parts = []
    for k, (name, row) in enumerate(rows.items()):
        base = 20 + ROW * (k + 1)
        counts, _ = np.histogram(row, BINS, (axis.low, axis.high))
        style = "normal" if name in normal else "defect"
        for i in np.flatnonzero(counts):
            bar = (ROW - 20) * counts[i] / counts.max()
            parts.append(
                f'<rect class="{style}" x="{RIGHT + i * inner / BINS:.1f}" '
                f'y="{base - bar:.1f}" width="{inner / BINS - 1:.1f}" '
                f'height="{bar:.1f}"/>'
            )
        parts.append(f'<path class="base" d="M{RIGHT} {base}h{inner}"/>')
        parts.append(
            f'<text class="name" x="{RIGHT}" y="{base - ROW + 13}">{escape(name)} '
            f"({len(row)})</text>"
        )
    bottom = 20 + ROW * len(rows)
    for value in axis.ticks():
        px = RIGHT + axis.place(value) * inner
        parts.append(_text(px, bottom + 14, f"{value:.6g}", "middle"))
    px = RIGHT + axis.place(threshold) * inner
    anchor = "end" if axis.place(threshold) > 0.5 else "start"
    parts.append(f'<path class="threshold" d="M{px:.1f} 4V{bottom}"/>')
    side = -4 if anchor == "end" else 4
    parts.append(_text(px + side, 13, f"threshold {threshold:.4g}", anchor))
    parts.append(_text(WIDTH / 2, bottom + 30, axis.label, "middle"))
    return _figure(title, height, parts, "")


def _cut(line: Line, high: float) -> list[tuple[float, float]]:
    """Returns the points up to `high`, with one interpolated at `high`."""
    points = list(zip(line.x, line.y, strict=True))
    inside = [p for p in points if p[0] <= high]
    if inside and len(inside) < len(points):
        inside.append((high, float(np.interp(high, line.x, line.y))))
    return inside


def _grid(x: Axis, y: Axis, inner: tuple[int, int]) -> list[str]:
    parts = []
    for value in x.ticks():
        px = LEFT + x.place(value) * inner[0]
        parts.append(f'<path class="grid" d="M{px:.1f} {TOP}v{inner[1]}"/>')
        parts.append(_text(px, HEIGHT - BOTTOM + 14, f"{value:.6g}", "middle"))
    for value in y.ticks():
        py = TOP + (1 - y.place(value)) * inner[1]
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}h{inner[0]}"/>')
        parts.append(_text(LEFT - 5, py + 4, f"{value:.6g}", "end"))
    parts.append(_text(LEFT + inner[0] / 2, HEIGHT - 6, x.label, "middle"))
    middle = TOP + inner[1] / 2
    parts.append(
        f'<text text-anchor="middle" transform="translate(11 {middle}) rotate(-90)">'
        f"{escape(y.label)}</text>"
    )
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, height: float, parts: Sequence[str], legend: str) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )
