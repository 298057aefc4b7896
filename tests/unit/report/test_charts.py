"""Charts against the numbers they were given."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.report.charts import Line, LineChart, line_chart, moving_average, number_text, thinned


@given(st.integers(1, 2000), st.integers(1, 600))
def test_thinning_keeps_the_order_the_limit_and_the_last_point(size: int, limit: int) -> None:
    points = [(float(index), 0.0) for index in range(size)]
    kept = thinned(points, limit)
    assert len(kept) <= limit
    assert kept == sorted(kept)
    assert kept[-1] == points[-1]
    assert kept == points or size > limit


def test_a_moving_average_looks_back_only() -> None:
    assert moving_average([(0, 1.0), (1, 2.0), (2, 6.0)], 2) == [(0, 1.0), (1, 1.5), (2, 4.0)]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.123456, "0.1235"), (1234.0, "1234"), (123456.0, "123,456"), (0.00001, "1.00e-05"), (-3.0, "-3")],
)
def test_numbers_are_written_short(value: float, text: str) -> None:
    assert number_text(value) == text


def test_shares_are_written_in_percent() -> None:
    assert number_text(0.9375, "share") == "93.8 %"


def drawn(*lines: Line) -> Sequence[Line]:
    chart = LineChart(title="Reward", note="A note.", x_label="step", unit="share", lines=lines)
    return line_chart(chart).lines


def test_a_line_without_points_is_left_out_and_a_short_one_is_drawn_as_it_is() -> None:
    short = Line(name="a", style=0, points=[(1, 0.5), (2, 0.75)])
    assert drawn(short, Line(name="b", style=1, points=[])) == [short]


def test_a_long_line_has_a_moving_average_and_both_are_thinned() -> None:
    noisy = [(float(step), float(step % 2)) for step in range(1000)]
    (line,) = drawn(Line(name="run", style=0, points=noisy))
    assert (len(line.points), len(line.smooth)) == (500, 500)
    assert line.smooth[-1] == (999, pytest.approx(0.5, abs=0.02))  # the mean of alternating 0 and 1
