"""Charts of a page: what uPlot draws in the browser, and the same in words."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

MAX_DRAWN = 400  # points of a line: more cannot be told apart

XY = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line or dots of a chart.

    Args:
        name: in the legend and at the pointer.
        points: x and y, in the order of x.
        kind: a faint line stands behind the others, as the mean of neighbours where points are
            many; steps keep their y up to the next point; rings are hollow dots.
        color: number of one of the page's eight colours.
        mark: a point to circle.
        note: text beside the mark.
    """

    name: str
    points: Sequence[XY]
    kind: Literal["line", "faint", "steps", "dots", "rings"] = "line"
    color: int = 0
    mark: XY | None = None
    note: str = ""

    def drawn(self) -> list[XY]:
        """The points to draw: finite, and no more of a line than can be seen.

        A line keeps its extremes; a faint one, of single noisy steps, shows their mean.
        """
        points = [point for point in self.points if abs(point[1]) < 1e100]  # no infinity, no NaN
        most = MAX_DRAWN // 2
        if self.kind not in ("line", "faint") or len(points) <= MAX_DRAWN:
            return points
        first = points[0][0]
        last = points[-1][0]
        bins: defaultdict[int, list[XY]] = defaultdict(list)
        for x, y in points:
            bins[int((x - first) * most / (last - first))].append((x, y))
        if self.kind == "faint":
            return [(near[-1][0], fmean(y for _, y in near)) for near in bins.values()]
        kept = {points[0], points[-1]}
        for near in bins.values():
            kept |= {min(near, key=lambda p: p[1]), max(near, key=lambda p: p[1])}
        return sorted(kept)


@dataclass(frozen=True)
class Chart:
    """One pair of axes; false where no series has points to draw.

    Args:
        series: the first is drawn on top of the others.
        x_name: what x is.
        x_names: names of x = 0, 1, 2, ... where these are not numbers.
        decimals: of y; None: three significant digits.
        from_zero: whether the y-axis begins at 0.
        y_range: None: what the points need.
        main: large, with a legend.
    """

    title: str
    series: Sequence[Series]
    x_name: str = "step"
    x_names: tuple[str, ...] = ()
    log_x: bool = False
    decimals: int | None = 3
    from_zero: bool = False
    y_range: XY | None = None
    main: bool = False

    @property
    def drawn(self) -> list[tuple[Series, list[XY]]]:
        return [(series, points) for series in self.series if (points := series.drawn())]

    def __bool__(self) -> bool:
        return bool(self.drawn)

    @property
    def legend(self) -> list[Series]:
        return [series for series, _ in self.drawn] if self.main else []

    def text(self, y: float) -> str:
        return f"{y:.3g}" if self.decimals is None else f"{y:,.{self.decimals}f}"

    @property
    def description(self) -> str:
        """The chart for those who can't see it."""
        spans = []
        for series, points in self.drawn:
            first, last = (
                f"{self.text(y)} at {self.x_name} {x:,.6g}" for x, y in (points[0], points[-1])
            )
            note = f", {series.note}" if series.note else ""
            spans.append(f"{series.name} from {first} to {last}{note}")
        return f"{self.title}: {'; '.join(spans)}"

    @property
    def spec(self) -> str:
        """JSON for charts.js, which draws the last series on top.

        Points of equal x share a row, unless they are of one series.
        """
        drawn = self.drawn[::-1]
        table: defaultdict[tuple[float, int], dict[int, float]] = defaultdict(dict)
        for i, (_, points) in enumerate(drawn):
            seen: Counter[float] = Counter()
            for x, y in points:
                table[x, seen[x]][i] = float(f"{y:.6g}")
                seen[x] += 1
        rows = sorted(table.items())
        columns = [[row.get(i) for _, row in rows] for i in range(len(drawn))]
        shown = ("name", "kind", "color", "mark", "note")
        content = {
            "data": [[x for (x, _), _ in rows], *columns],
            "series": [{name: getattr(series, name) for name in shown} for series, _ in drawn],
            "x": self.x_name,
            "names": self.x_names,
            "log": self.log_x,
            "decimals": self.decimals,
            "zero": self.from_zero,
            "range": self.y_range,
        }
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
