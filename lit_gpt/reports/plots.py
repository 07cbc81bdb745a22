"""Owns plots as SVG, for light and dark pages: panels of points and lines, and heat maps.

Without matplotlib: where it is installed, torchmetrics imports it, and each run would start later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from lit_gpt.storage import write_whole

WIDTH, HEIGHT = 480, 340  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 30, 50  # around what is drawn
COLORS = ("#1f77b4", "#d62728", "#7f7f7f")
CELL = 26  # of a heat map, in pixels
# Paper and ink change together, so that a plot can be read on any page. Its own names: a notebook
# puts plots into one document with everything else.
STYLE = (
    "@media (prefers-color-scheme: dark) "
    "{ .lit-gpt-plot { color: #f2f1ec } .lit-gpt-plot .paper { fill: #1d1d1b } }"
)


@dataclass(frozen=True)
class Series:
    """Points of one kind; a color is a place in COLORS."""

    points: list[tuple[float, float]]
    mark: Literal["dot", "cross", "line"]
    color: int = 0
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        names: the names of 0, 1, 2, ... on the x-axis, where these are no numbers.
        y_range: none: what the points need.
    """

    x_label: str
    y_label: str
    series: list[Series]
    log_x: bool = False
    names: tuple[str, ...] = ()
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Axis:
    """From values to pixels: low lies at start, high at end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, x = map(math.log10 if self.log else float, (self.low, self.high, value))
        return self.start + (x - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round numbers within the axis; on a logarithmic one powers of ten, or more."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
                ticks = [d * 10.0**n for n in decades for d in digits]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) >= 3:
                    break
            return ticks
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / 5))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= span / 5 * 0.99)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [n * step for n in range(first, last + 1)]


def axis_of(values: Iterable[float], start: float, end: float, log: bool = False) -> Axis:
    """An axis with all of the values, and a margin."""
    values = list(values) or [1.0]
    low, high = min(values), max(values)
    if log:
        factor = max(high / low, 1.5) ** 0.04
        return Axis(low / factor, high * factor, start, end, log=True)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(low - margin, high + margin, start, end)


def save_svg(panels: list[Panel], path: Path) -> None:
    """Writes the panels, side by side in about a square, whole or not at all."""
    write_whole(path, side_by_side(panels))


def side_by_side(panels: list[Panel]) -> str:
    """SVG of the panels in about a square."""
    columns = math.ceil(math.sqrt(len(panels)))
    parts = []
    for i, panel in enumerate(panels):
        x, y = i % columns * WIDTH, i // columns * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *draw(panel), "</g>"]
    return document(columns * WIDTH, -(-len(panels) // columns) * HEIGHT, parts)


def heat_map(shares: list[list[float]], names: list[str], x_label: str, y_label: str) -> str:
    """SVG of a square of shares, 0 to 1: the stronger a cell, the more; with its percent in it.

    A share of exactly 0 stays empty.

    Args:
        shares: rows from above.
        names: of the rows, and of the columns.
    """
    # Of a letter and of a Chinese character, about, with room for the label beside.
    room = 34 + max(sum(12 if ord(c) > 0x2E80 else 7 for c in name) for name in names)
    size, middle = CELL * len(names), CELL / 2
    parts = [
        text(x_label, f"translate({room + size / 2} 18)"),
        text(y_label, f"translate(18 {room + size / 2}) rotate(-90)"),
    ]
    for i, (name, row) in enumerate(zip(names, shares, strict=True)):
        x = y = room + CELL * i
        parts.append(text(name, f"translate({room - 6} {y + middle + 4})", "end"))
        parts.append(text(name, f"translate({x + middle + 4} {room - 6}) rotate(-90)", "start"))
        for j, share in enumerate(row):
            x = room + CELL * j
            parts.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{CELL}" height="{CELL}" '
                f'fill="{COLORS[0]}" fill-opacity="{share:.4g}" '
                'stroke="currentColor" stroke-opacity="0.12"/>'
            )
            if share:
                percent = f"{100 * share:.0f}"
                parts.append(text(percent, f"translate({x + middle} {y + middle + 4})"))
    return document(room + size + 12, room + size + 12, parts)


def document(width: int, height: int, parts: list[str]) -> str:
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" '
        'class="lit-gpt-plot" color="black" fill="currentColor">',
        f"<style>{STYLE}</style>",
        '<rect class="paper" width="100%" height="100%" fill="white"/>',
    ]
    return "\n".join([*head, *parts, "</svg>\n"])


def draw(panel: Panel) -> list[str]:
    points = [point for series in panel.series for point in series.points]
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    x = axis_of((p[0] for p in points), left, right, panel.log_x)
    y = axis_of((p[1] for p in points), bottom, top)
    if panel.names:
        x = Axis(-0.5, len(panel.names) - 0.5, left, right)
    if panel.y_range:
        y = Axis(*panel.y_range, bottom, top)
    middle = f"{(left + right) / 2} {HEIGHT - 10}", f"14 {(top + bottom) / 2}"
    parts = [
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" '
        'fill="none" stroke="currentColor"/>',
        text(panel.x_label, f"translate({middle[0]})"),
        text(panel.y_label, f"translate({middle[1]}) rotate(-90)"),
    ]
    names = list(enumerate(panel.names)) or [(tick, f"{tick:.6g}") for tick in x.ticks()]
    for tick, name in names:
        parts.append(line([(x(tick), bottom), (x(tick), bottom + 4)], "currentColor"))
        parts.append(text(name, f"translate({x(tick):.1f} {bottom + 18})"))
    for tick in y.ticks():
        parts.append(line([(left, y(tick)), (left - 4, y(tick))], "currentColor"))
        parts.append(text(f"{tick:.6g}", f"translate({left - 8} {y(tick) + 4:.1f})", "end"))
    for series in panel.series:
        inside = [p for p in series.points if y.low <= p[1] <= y.high]
        parts += marks([(x(p[0]), y(p[1])) for p in inside], series)
    labelled = [series for series in panel.series if series.label]
    for n, series in enumerate(labelled):  # above the axes, where no point is
        start = left + 120 * n
        sign = [(start, 15), (start + 16, 15)] if series.mark == "line" else [(start + 8, 15)]
        parts += marks(sign, series)
        parts.append(text(series.label, f"translate({start + 22} 19)", "start"))
    return parts


def marks(points: list[tuple[float, float]], series: Series) -> list[str]:
    color = COLORS[series.color]
    if series.mark == "line":
        return [line(points, color)]
    if series.mark == "dot":
        return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in points]
    arms = ((3.5, 3.5), (3.5, -3.5))
    return [line([(x - dx, y - dy), (x + dx, y + dy)], color) for x, y in points for dx, dy in arms]


def line(points: list[tuple[float, float]], color: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'


def text(content: str, transform: str, anchor: str = "middle") -> str:
    return f'<text transform="{transform}" text-anchor="{anchor}">{escape(content)}</text>'
