"""Owns the charts of a report: curves as SVG that fits any width, with axes, legend and marks."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[int, float]  # step, value

MAX_DRAWN = 400  # points of a curve: more than can be told apart
MAX_WORDS = 3  # curves of a chart; of more, the words would cover one another
MAX_DOTS = 30  # with more, a curve has a line only


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Args:
        name: in the legend and under the pointer.
        points: in the order of the steps.
        color: number of one of the page's colours.
        faint: for what stands behind the others; where there are many points, their means.
        best: a point to mark.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    faint: bool = False
    best: Point | None = None


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) within low..high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


def shorten(number: float) -> str:
    """As it stands on an axis: 0.006, 3.5, 20,000, 150k, 1.5M."""
    for least, size, unit in ((1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if abs(number) >= least:
            return f"{number / size:.6g}{unit}"
    return f"{number:,.6g}"


def drawn(line: Line) -> list[Point]:
    """The points that are drawn: finite, and not more than can be seen."""
    points = [point for point in line.points if abs(point[1]) < 1e100]  # no infinity, no NaN
    if len(points) <= MAX_DRAWN // (2 if line.faint else 1):
        return points
    bins = defaultdict(list)
    first, last = points[0][0], points[-1][0]
    for step, value in points:
        bins[(step - first) * MAX_DRAWN // (2 * (last - first))].append((step, value))
    if line.faint:  # single steps are noisy: their mean shows where they go
        return [(b[-1][0], math.fsum(value for _, value in b) / len(b)) for b in bins.values()]
    ends = {p for b in bins.values() for p in (min(b, key=value_of), max(b, key=value_of))}
    return sorted(ends | {points[0], points[-1]})


def value_of(point: Point) -> float:
    return point[1]


@dataclass(frozen=True)
class Scale:
    """Steps and values to thousandths of the chart's width and height."""

    steps: tuple[float, float]
    values: tuple[float, float]

    @classmethod
    def around(cls, points: list[Point], from_zero: bool) -> Scale:
        steps, values = [step for step, _ in points], [value for _, value in points]
        low, high = min(values), max(values)
        first, last = min(steps), max(steps)
        if first < last / 5:  # the charts of a whole run begin alike
            first = 0
        spread = high - low if high - low > 1e-9 * abs(high) else 0.0  # else flat, but for noise
        room = spread * 0.06 or abs(high) * 0.1 or 1.0
        # Under the lowest point there is room for what marks it.
        bottom = 0.0 if from_zero and low >= 0 else low - 2 * room
        return cls((first, max(last, first + 1)), (bottom, high + room))

    def x(self, step: float) -> float:
        return 1000 * (step - self.steps[0]) / (self.steps[1] - self.steps[0])

    def y(self, value: float) -> float:
        return 1000 * (self.values[1] - value) / (self.values[1] - self.values[0])


def chart(
    title: str,
    lines: Sequence[Line],
    show: Callable[[float], str] = "{:.3f}".format,
    from_zero: bool = False,
    tall: bool = False,
) -> str:
    """HTML of a chart of values over steps; "" where there is nothing to draw.

    Only the curves are SVG, stretched to the width there is; all text keeps its size.

    Args:
        lines: the first is drawn above the others.
        show: a value as text, for marks and under the pointer.
        from_zero: whether the axis of values begins at 0.
        tall: for the main chart of a page, which has the legend.
    """
    pairs = [(line, points) for line in lines if (points := drawn(line))]
    if not pairs:
        return ""
    scale = Scale.around([point for _, points in pairs for point in points], from_zero)
    legend = "".join(
        f'<span class="key {look(line)}">{escape(line.name)}</span>' for line, _ in pairs
    )
    curves = "".join(curve(line, points, scale) for line, points in pairs[::-1])  # first on top
    few = len(pairs) <= MAX_WORDS
    marks = "".join(mark(line, scale, show, few) for line, _ in pairs if line.best)
    return (
        f'<figure class="chart{" tall" if tall else ""}"><figcaption><b>{escape(title)}</b>'
        f"{legend if tall else ''}</figcaption>"
        f'<div class="plot" data-chart="{escape(under_pointer(pairs, scale, show))}">'
        f"{axes(scale, tall)}"
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(in_words(title, pairs, show))}">{grid(scale, tall)}{curves}</svg>'
        f"{marks}</div></figure>"
    )


def look(line: Line) -> str:
    return f"c{line.color}{' faint' if line.faint else ''}"


def under_pointer(
    pairs: list[tuple[Line, list[Point]]], scale: Scale, show: Callable[[float], str]
) -> str:
    """JSON of what the page's script shows where the pointer is."""
    lines = [
        {"name": line.name, "look": look(line), "points": [[x, show(y)] for x, y in points]}
        for line, points in pairs
    ]
    return json.dumps({"steps": scale.steps, "lines": lines}, separators=(",", ":"))


def curve(line: Line, points: list[Point], scale: Scale) -> str:
    places = [f"{scale.x(step):.1f} {scale.y(value):.1f}" for step, value in points]
    paths = f'<path class="{look(line)}" d="M{"L".join(places)}"/>'
    if len(points) == 1 or (len(points) <= MAX_DOTS and not line.faint):
        dots = "".join(f"M{place}h0" for place in places)  # lines of no length, with round ends
        paths += f'<path class="{look(line)} dots" d="{dots}"/>'
    return paths


def mark(line: Line, scale: Scale, show: Callable[[float], str], words: bool) -> str:
    """A ring around the best point, and words under it."""
    step, value = line.best
    left, top = scale.x(step) / 10, scale.y(value) / 10
    side = "left" if left > 60 else "right"
    name = f"<span>best: {escape(show(value))} at step {step:,}</span>" if words else ""
    return (
        f'<div class="best c{line.color} {side}" style="left:{left:.2f}%;top:{top:.2f}%">'
        f"{name}</div>"
    )


def axes(scale: Scale, tall: bool) -> str:
    values = "".join(
        f'<span class="y" style="top:{scale.y(value) / 10:.2f}%">{shorten(value)}</span>'
        for value in ticks(*scale.values, 6 if tall else 4)
    )
    steps = "".join(
        f'<span class="x" style="left:{scale.x(step) / 10:.2f}%">{shorten(step)}</span>'
        for step in ticks(*scale.steps, 5 if tall else 3)  # room for long numbers on a phone
        if step == int(step)
    )
    return values + steps


def grid(scale: Scale, tall: bool) -> str:
    lines = "".join(
        f"M0 {scale.y(value):.1f}H1000" for value in ticks(*scale.values, 6 if tall else 4)
    )
    return f'<path class="lines" d="{lines}"/>'


def in_words(
    title: str, pairs: list[tuple[Line, list[Point]]], show: Callable[[float], str]
) -> str:
    """The chart for those who don't see it."""
    spans = (
        f"{line.name} from {show(first)} at step {start:,} to {show(last)} at step {end:,}"
        for line, points in pairs
        for (start, first), (end, last) in [(points[0], points[-1])]
    )
    return f"{title}: {'; '.join(spans)}"
