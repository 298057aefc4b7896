"""Line charts: the layout of their parts, and the same numbers as a table. assets/macros.html draws them.

They are inline SVG with HTML labels: no script is needed to read them, none is loaded from elsewhere. The drawing
stretches to its box (strokes keep their width) while labels are positioned in percent, so that text has one size on a
phone and on a wide screen. `report.js` adds hover values; a table says the same without sight or pointer.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_p2o.report.runs import Points
from megatron_p2o.report.tables import Table

Unit = Literal["share", "number"]
"""A share is shown in percent on an axis from 0 to 1."""

NUM_STYLES = 6
"""Colours and dash patterns in report.css."""

SMOOTHED_FROM = 80
"""A line of at least this many points is drawn as a moving average over the faint original."""

DOTTED_UP_TO = 20
"""A line of no more points shows each as a dot."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Stroke:
    """A path of the drawing."""

    path: str
    """SVG path in a box of 100 by 100."""
    css_class: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TickLabel:
    """The text of a tick and where it lies, in percent from the left or the top."""

    text: str
    percent: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LegendEntry:
    """The meaning of a colour and dash."""

    text: str
    style: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A chart that has points, laid out."""

    summary: str
    """The chart in a sentence, for those who cannot see it."""
    strokes: Sequence[Stroke]
    x_label: str
    x_labels: Sequence[TickLabel]
    y_labels: Sequence[TickLabel]
    """A grid line goes with each."""
    legend: Sequence[LegendEntry]
    hover: Mapping[str, object]
    """What `report.js` shows."""
    table: Table
    table_summary: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A chart under its heading."""

    title: str
    note: str
    plot: Plot | None
    """The plot; None if no line has a point."""


def line_chart(chart: LineChart) -> Figure:
    """Return the chart laid out."""
    lines = [line for line in chart.lines if line.points]
    return Figure(title=chart.title, note=chart.note, plot=_plot(chart, lines) if lines else None)


def _plot(chart: LineChart, lines: Sequence[Line]) -> Plot:
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = _widened(min(xs), max(xs))
    y_ticks = value_ticks(chart, lines)
    frame = PlotArea(x_low=x_low, x_high=x_high, y_low=y_ticks[0], y_high=y_ticks[-1])
    shown, num_xs = _positions(lines, MAX_ROWS), len(set(xs))
    return Plot(
        summary=_summary(chart, lines),
        strokes=[stroke for line in lines for stroke in _strokes(line, frame)],
        x_label=chart.x_label,
        x_labels=_x_labels(frame),
        y_labels=[
            TickLabel(text=f"{tick:.0%}" if chart.unit == "share" else number_text(tick), percent=frame.top(tick))
            for tick in y_ticks
        ],
        legend=_legend(lines),
        hover=_hover_values(chart, lines, frame),
        table=_table(chart, lines, shown),
        table_summary="Table" if len(shown) == num_xs else f"Table ({len(shown)} of {num_xs} rows)",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlotArea:
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


def _summary(chart: LineChart, lines: Sequence[Line]) -> str:
    ends = [(number_text(line.points[0][1], chart.unit), number_text(line.points[-1][1], chart.unit)) for line in lines]
    ranges = "; ".join(f"{line.name}: from {first} to {last}" for line, (first, last) in zip(lines, ends, strict=True))
    return f"{chart.title}. {ranges}"


def _strokes(line: Line, frame: PlotArea) -> Iterator[Stroke]:
    style = f"s{line.style % NUM_STYLES}"
    if len(line.points) >= SMOOTHED_FROM:
        smooth = moving_average(line.points, len(line.points) // 25)
        yield Stroke(path=_path(thinned(line.points, MAX_POINTS), frame), css_class=f"line {style} faint")
        yield Stroke(path=_path(thinned(smooth, MAX_POINTS), frame), css_class=f"line {style}")
        return
    yield Stroke(path=_path(line.points, frame), css_class=f"line {style}")
    if len(line.points) <= DOTTED_UP_TO:
        yield Stroke(path=_dots(line.points, frame), css_class=f"dots {style}")


def _path(points: Points, frame: PlotArea) -> str:
    return "M" + "L".join(f"{frame.left(x)} {frame.top(y)}" for x, y in points)


def _dots(points: Points, frame: PlotArea) -> str:
    # A stroke of no length with round caps is a dot that the stretched drawing does not distort.
    return "".join(f"M{frame.left(x)} {frame.top(y)}h0" for x, y in points)


def _x_labels(frame: PlotArea) -> list[TickLabel]:
    # Steps, epochs and rollouts are counted: a tick between two of them would mean nothing.
    candidates = ticks(frame.x_low, frame.x_high, 4)
    x_ticks = [tick for tick in candidates if frame.x_low <= tick <= frame.x_high and round(tick, 6).is_integer()]
    return [TickLabel(text=number_text(tick), percent=frame.left(tick)) for tick in x_ticks]


def _legend(lines: Iterable[Line]) -> list[LegendEntry]:
    entries = {(line.style % NUM_STYLES, line.legend) for line in lines}
    return [LegendEntry(text=legend, style=style) for style, legend in sorted(entries)]


def _hover_values(chart: LineChart, lines: Sequence[Line], frame: PlotArea) -> dict[str, object]:
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


def _table(chart: LineChart, lines: Sequence[Line], shown: Iterable[float]) -> Table:
    numbers = [dict(line.points) for line in lines]
    rows = [
        [number_text(x), *(number_text(values[x], chart.unit) if x in values else "" for values in numbers)]
        for x in shown
    ]
    return Table(caption=chart.title, header=[chart.x_label, *(line.name for line in lines)], rows=rows)
