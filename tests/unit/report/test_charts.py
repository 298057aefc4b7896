"""Charts: positions, ticks and tables against the numbers they were given."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.report.charts import (
    Line,
    LineChart,
    Plot,
    Stroke,
    Unit,
    line_chart,
    moving_average,
    number_text,
    thinned,
    ticks,
)

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, finite)
def test_ticks_are_few_even_and_enclose_the_range(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high, 4)
    span = marks[-1] - marks[0]
    assert 2 <= len(marks) <= 8
    assert marks[0] <= low + 1e-6 * span and marks[-1] >= high - 1e-6 * span
    steps = [later - earlier for earlier, later in pairwise(marks)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps)


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


def plot(*lines: Line, unit: Unit = "share") -> Plot:
    figure = line_chart(LineChart(title="Reward", note="A note.", x_label="step", unit=unit, lines=lines))
    assert (figure.title, figure.note) == ("Reward", "A note.")
    assert figure.plot is not None
    return figure.plot


def test_points_are_drawn_where_their_values_lie() -> None:
    drawn = plot(Line(name="run", legend="arm", style=1, points=[(0, 0.0), (5, 0.25), (10, 1.0)]))
    line, dots = drawn.strokes
    assert line == Stroke(path="M0.0 100.0L50.0 75.0L100.0 0.0", css_class="line s1")
    assert dots == Stroke(path="M0.0 100.0h0M50.0 75.0h0M100.0 0.0h0", css_class="dots s1")


def test_hover_values_and_table_say_what_was_recorded_and_leave_gaps_where_nothing_was() -> None:
    drawn = plot(
        Line(name="a", legend="a", style=0, points=[(1, 0.5), (2, 0.75)]),
        Line(name="b", legend="b", style=7, points=[(2, 1.0)]),
    )
    assert drawn.hover == {
        "x": [1, 2],
        "left": [0.0, 100.0],
        "xLabel": "step",
        "lines": [
            {"name": "a", "style": 0, "text": ["50.0 %", "75.0 %"], "top": [50.0, 25.0]},
            {"name": "b", "style": 1, "text": [None, "100.0 %"], "top": [None, 0.0]},
        ],
    }
    assert drawn.table.header == ["step", "a", "b"]
    assert drawn.table.rows == [["1", "50.0 %", ""], ["2", "75.0 %", "100.0 %"]]
    assert drawn.table_summary == "Table"


def test_the_drawing_has_a_title_that_tells_its_content() -> None:
    drawn = plot(Line(name="run", legend="arm", style=0, points=[(0, 0.0), (5, 0.25)]))
    assert drawn.summary == "Reward. run: from 0.0 % to 25.0 %"


def test_seeds_of_an_arm_share_one_entry_of_the_legend() -> None:
    drawn = plot(*(Line(name=f"p2o-seed{seed}", legend="p2o", style=0, points=[(0, 0.5)]) for seed in (1, 2)))
    assert [(entry.text, entry.style) for entry in drawn.legend] == [("p2o", 0)]


def test_a_long_line_is_smoothed_over_its_faint_original() -> None:
    noisy = [(float(step), float(step % 2)) for step in range(1000)]
    drawn = plot(Line(name="run", legend="arm", style=0, points=noisy))
    faint, bold = drawn.strokes
    assert (faint.css_class, bold.css_class) == ("line s0 faint", "line s0")
    assert len(faint.path.split("L")) == 500
    last_top = float(bold.path.split("L")[-1].split()[1])
    assert last_top == pytest.approx(50, abs=2)  # the mean of alternating 0 and 1
    assert drawn.table_summary == "Table (200 of 1000 rows)" and len(drawn.table.rows) == 200


def test_a_single_point_and_a_constant_line_are_drawn_inside_the_frame() -> None:
    drawn = plot(Line(name="a", legend="a", style=0, points=[(3, 7.0)]), unit="number")
    left, top = drawn.strokes[0].path.removeprefix("M").split()
    assert 0 <= float(left) <= 100 and 0 <= float(top) <= 100


def test_a_count_that_is_always_zero_has_an_axis_from_zero_to_one() -> None:
    drawn = plot(Line(name="a", legend="a", style=0, points=[(1, 0.0), (2, 0.0)]), unit="number")
    assert [(label.text, label.percent) for label in drawn.y_labels] == [("0", 100.0), ("0.5", 50.0), ("1", 0.0)]
    assert drawn.strokes[0].path == "M0.0 100.0L100.0 100.0"


def test_a_tick_between_two_counted_steps_has_no_label() -> None:
    drawn = plot(Line(name="a", legend="a", style=0, points=[(1, 0.5), (3, 0.5)]))
    assert [(label.text, label.percent) for label in drawn.x_labels] == [("1", 0.0), ("2", 50.0), ("3", 100.0)]


def test_a_chart_without_points_has_nothing_to_draw() -> None:
    empty = Line(name="a", legend="a", style=0, points=[])
    assert line_chart(LineChart(title="t", note="", x_label="step", unit="share", lines=[empty])).plot is None
