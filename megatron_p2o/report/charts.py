"""Line charts as inline SVG with HTML labels: no script is needed to read them, none is loaded from elsewhere.

The drawing stretches to its box (strokes keep their width) while labels are positioned in percent, so that text has one
size on a phone and on a wide screen. `report.js` adds hover values; a table says the same without sight or pointer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_p2o.report.markup import Html, element, join, json_script, table

Points = Sequence[tuple[float, float]]
Unit = Literal["share", "number"]
"""A share is shown in percent on an axis from 0 to 1."""

NUM_STYLES = 6
"""Colours and dash patterns in report.css."""

SMOOTHED_FROM = 80
"""A line of so many points is drawn as a moving average over the faint original."""

MAX_POINTS = 500
"""Points drawn per line; more cannot be told apart."""

MAX_ROWS = 200
"""Rows of a chart's table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a chart."""

    name: str
    """Unique in the chart; shown on hover and in the table."""
    legend: str
    """Lines with the same legend and style share one entry."""
    style: int
    """Colour and dash, 0..5, used cyclically."""
    points: Points
    """(x, y), x ascending and whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LineChart:
    """What a chart shows."""

    title: str
    note: str
    """What is drawn and over what it was averaged, in a sentence."""
    x_label: str
    unit: Unit
    lines: Sequence[Line]
    starts_at_zero: bool = True
    """Whether the y axis of a "number" chart includes 0."""


def line_chart(chart: LineChart) -> Html:
    """Return the figure; a sentence in its place when no line has a point."""
    lines = [line for line in chart.lines if line.points]
    heading = [element("figcaption", element("h3", chart.title), element("p", chart.note))]
    if not lines:
        return element("figure", heading, element("p", "Nothing was recorded.", class_="empty"), class_="chart")
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = _widened(min(xs), max(xs))
    y_ticks = value_ticks(chart, lines)
    frame = Frame(x_low=x_low, x_high=x_high, y_low=y_ticks[0], y_high=y_ticks[-1])
    plot = element(
        "div",
        _drawing(chart, lines, frame, y_ticks),
        _labels(chart, frame, y_ticks),
        json_script(_hover_values(chart, lines, frame)),
        class_="plot",
        tabindex=0,
    )
    return element("figure", heading, _legend(lines), plot, _table(chart, lines), class_="chart")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The ranges of the axes."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def left(self, x: float) -> float:
        """Return the position of x in percent from the left."""
        return round(100 * (x - self.x_low) / (self.x_high - self.x_low), 2)

    def top(self, y: float) -> float:
        """Return the position of y in percent from the top."""
        return round(100 * (self.y_high - y) / (self.y_high - self.y_low), 2)


def value_ticks(chart: LineChart, lines: Sequence[Line]) -> list[float]:
    """Return the y ticks; the first and last bound the axis."""
    if chart.unit == "share":
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    values = [y for line in lines for _, y in line.points] + ([0.0] if chart.starts_at_zero else [])
    return ticks(min(values), max(values), 4) if any(values) else [0.0, 0.5, 1.0]


def ticks(low: float, high: float, num: int) -> list[float]:
    """Return about `num` + 1 multiples of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    low, high = _widened(low, high)
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


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
    """Return a number as the report writes it."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.4g}"
    if 10_000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.2e}"


def _widened(low: float, high: float) -> tuple[float, float]:
    # A range at the limit of rounding has no ticks in it.
    if high - low > 1e-12 * max(abs(low), abs(high), 1e-100):
        return low, high
    margin = abs(low) / 2 or 0.5
    return low - margin, high + margin


def _drawing(chart: LineChart, lines: Sequence[Line], frame: Frame, y_ticks: Sequence[float]) -> Html:
    grid = [element("line", x1=0, x2=100, y1=frame.top(tick), y2=frame.top(tick), class_="grid") for tick in y_ticks]
    ends = [(number_text(line.points[0][1], chart.unit), number_text(line.points[-1][1], chart.unit)) for line in lines]
    ranges = "; ".join(f"{line.name}: from {first} to {last}" for line, (first, last) in zip(lines, ends, strict=True))
    return element(
        "svg",
        element("title", f"{chart.title}. {ranges}"),
        grid,
        [_strokes(line, frame) for line in lines],
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        role="img",
    )


def _strokes(line: Line, frame: Frame) -> Html:
    style = f"line s{line.style % NUM_STYLES}"
    if len(line.points) < SMOOTHED_FROM:
        dots = element("path", d=_dots(line.points, frame), class_=f"dots s{line.style % NUM_STYLES}")
        few = len(line.points) <= 20
        return join(element("path", d=_path(line.points, frame), class_=style), dots if few else None)
    smooth = moving_average(line.points, len(line.points) // 25)
    return join(
        element("path", d=_path(thinned(line.points, MAX_POINTS), frame), class_=f"{style} faint"),
        element("path", d=_path(thinned(smooth, MAX_POINTS), frame), class_=style),
    )


def _path(points: Points, frame: Frame) -> str:
    return "M" + "L".join(f"{frame.left(x)} {frame.top(y)}" for x, y in points)


def _dots(points: Points, frame: Frame) -> str:
    # A stroke of no length with round caps is a dot that the stretched drawing does not distort.
    return "".join(f"M{frame.left(x)} {frame.top(y)}h0" for x, y in points)


def _labels(chart: LineChart, frame: Frame, y_ticks: Sequence[float]) -> Html:
    y_texts = [
        element(
            "span",
            f"{tick:.0%}" if chart.unit == "share" else number_text(tick),
            class_="y",
            style=f"top:{frame.top(tick)}%",
        )
        for tick in y_ticks
    ]
    # Steps, epochs and rollouts are counted: a tick between two of them would mean nothing.
    candidates = ticks(frame.x_low, frame.x_high, 4)
    x_ticks = [tick for tick in candidates if frame.x_low <= tick <= frame.x_high and round(tick, 6).is_integer()]
    x_texts = [element("span", number_text(tick), class_="x", style=f"left:{frame.left(tick)}%") for tick in x_ticks]
    return element("div", y_texts, x_texts, element("span", chart.x_label, class_="x-label"), aria_hidden="true")


def _legend(lines: Iterable[Line]) -> Html:
    entries = {(line.legend, line.style % NUM_STYLES) for line in lines}
    ordered = sorted(entries, key=lambda entry: (entry[1], entry[0]))
    return element("ul", [element("li", _key(style), legend) for legend, style in ordered], class_="legend")


def _key(style: int) -> Html:
    stroke = element("path", d="M0 5H24", class_=f"line s{style}")
    return element("svg", stroke, viewBox="0 0 24 10", class_="key", aria_hidden="true")


def _hover_values(chart: LineChart, lines: Sequence[Line], frame: Frame) -> dict[str, object]:
    xs = _positions(lines, MAX_POINTS)
    numbers = [dict(line.points) for line in lines]
    return {
        "x": xs,
        "left": [frame.left(x) for x in xs],
        "xLabel": chart.x_label,
        "lines": [
            {
                "name": line.name,
                "style": line.style % NUM_STYLES,
                "text": [number_text(values[x], chart.unit) if x in values else None for x in xs],
                "top": [frame.top(values[x]) if x in values else None for x in xs],
            }
            for line, values in zip(lines, numbers, strict=True)
        ],
    }


def _positions(lines: Iterable[Line], limit: int) -> list[float]:
    """Return the x of all lines, at most `limit` of them."""
    xs = sorted({x for line in lines for x, _ in line.points})
    return [x for x, _ in thinned([(x, 0.0) for x in xs], limit)]


def _table(chart: LineChart, lines: Sequence[Line]) -> Html:
    numbers = [dict(line.points) for line in lines]
    num_xs = len({x for line in lines for x, _ in line.points})
    shown = _positions(lines, MAX_ROWS)
    rows = [
        [number_text(x), *(number_text(values[x], chart.unit) if x in values else "" for values in numbers)]
        for x in shown
    ]
    summary = "Table" if len(shown) == num_xs else f"Table ({len(shown)} of {num_xs} rows)"
    header = [chart.x_label, *(line.name for line in lines)]
    return element("details", element("summary", summary), table(header, rows, chart.title))
