"""Line charts as data: what the page draws, and how it writes numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_p2o.report.runs import Points

Unit = Literal["share", "number"]
"""A share is shown in percent on an axis from 0 to 1."""

NUM_STYLES = 6
"""Colours and dash patterns of the page."""

SMOOTHED_FROM = 80
"""A line of at least this many points is drawn as a moving average over the faint original."""

MAX_POINTS = 500
"""Points drawn per line; more cannot be told apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    """Unique in the chart."""
    style: int
    """Colour and dash, 0..5, used cyclically."""
    points: Points
    """(x, y), x ascending and whole."""
    smooth: Points = ()
    """The moving average of a long line; empty for a short one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LineChart:
    """What a chart shows."""

    title: str
    note: str
    """What is drawn and over what it was averaged, in a sentence."""
    x_label: str
    unit: Unit
    lines: Sequence[Line]


def line_chart(chart: LineChart) -> LineChart:
    """Return the chart as it is drawn: without lines that have no point, long ones thinned and smoothed."""
    return replace(chart, lines=[_drawn(line) for line in chart.lines if line.points])


def _drawn(line: Line) -> Line:
    points = thinned(line.points, MAX_POINTS)
    if len(line.points) < SMOOTHED_FROM:
        return replace(line, points=points)
    smooth = moving_average(line.points, len(line.points) // 25)
    return replace(line, points=points, smooth=thinned(smooth, MAX_POINTS))


def moving_average(points: Points, window: int) -> list[tuple[float, float]]:
    """Return each y averaged with up to `window` - 1 predecessors."""
    averaged: list[tuple[float, float]] = []
    for index, (x, _) in enumerate(points):
        recent = [y for _, y in points[max(0, index + 1 - window) : index + 1]]
        averaged.append((x, math.fsum(recent) / len(recent)))
    return averaged


def thinned(points: Points, limit: int) -> list[tuple[float, float]]:
    """Return at most `limit` of the points, evenly chosen, the last among them."""
    stride = math.ceil(len(points) / limit)
    return [point for index, point in enumerate(points) if (len(points) - 1 - index) % stride == 0]


def number_text(value: float, unit: Unit = "number") -> str:
    """Return a number as tables write it."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.4g}"
    if 10_000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.2e}"
