"""Charts: positions, ticks and tables against the numbers they were given; markup escapes what it did not build."""

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.report.charts import Line, LineChart, line_chart, moving_average, number_text, thinned, ticks
from megatron_p2o.report.markup import Html, element, json_script, raw_text, table

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


def chart(*lines: Line) -> str:
    return line_chart(LineChart(title="Reward", note="A note.", x_label="step", unit="share", lines=lines))


def test_points_are_drawn_where_their_values_lie() -> None:
    page = chart(Line(name="run", legend="arm", style=1, points=[(0, 0.0), (5, 0.25), (10, 1.0)]))
    assert 'd="M0.0 100.0L50.0 75.0L100.0 0.0" class="line s1"' in page


def test_hover_values_and_table_say_what_was_recorded_and_leave_gaps_where_nothing_was() -> None:
    page = chart(
        Line(name="a", legend="a", style=0, points=[(1, 0.5), (2, 0.75)]),
        Line(name="b", legend="b", style=1, points=[(2, 1.0)]),
    )
    match = re.search(r'<script type="application/json">(.*?)</script>', page)
    assert match is not None
    hover = json.loads(match[1])
    assert hover["x"] == [1, 2] and hover["left"] == [0, 100]
    assert [line["text"] for line in hover["lines"]] == [["50.0 %", "75.0 %"], [None, "100.0 %"]]
    assert '<tr><th scope="row">1</th><td>50.0 %</td><td></td></tr>' in page
    assert '<tr><th scope="row">2</th><td>75.0 %</td><td>100.0 %</td></tr>' in page


def test_the_drawing_has_a_title_that_tells_its_content() -> None:
    page = chart(Line(name="run", legend="arm", style=0, points=[(0, 0.0), (5, 0.25)]))
    assert "<title>Reward. run: from 0.0 % to 25.0 %</title>" in page


def test_seeds_of_an_arm_share_one_entry_of_the_legend() -> None:
    lines = [Line(name=f"p2o-seed{seed}", legend="p2o", style=0, points=[(0, 0.5)]) for seed in (1, 2)]
    legend = re.search(r'<ul class="legend">.*?</ul>', chart(*lines))
    assert legend is not None and legend[0].count("<li>") == 1


def test_a_long_line_is_smoothed_over_its_faint_original() -> None:
    noisy = [(float(step), float(step % 2)) for step in range(1000)]
    page = chart(Line(name="run", legend="arm", style=0, points=noisy))
    faint = re.search(r'd="M([^"]*)" class="line s0 faint"', page)
    bold = re.search(r'd="M([^"]*)" class="line s0"', page.split("faint")[1])
    assert faint is not None and bold is not None
    assert len(faint[1].split("L")) == 500
    last_top = float(bold[1].split("L")[-1].split()[1])
    assert last_top == pytest.approx(50, abs=2)  # the mean of alternating 0 and 1
    assert "Table (200 of 1000 rows)" in page


def test_a_single_point_and_a_constant_line_are_drawn_inside_the_frame() -> None:
    drawn = LineChart(
        title="t",
        note="",
        x_label="step",
        unit="number",
        lines=[Line(name="a", legend="a", style=0, points=[(3, 7.0)])],
    )
    position = re.search(r'd="M([\d.]+) ([\d.]+)"', line_chart(drawn))
    assert position is not None
    assert 0 <= float(position[1]) <= 100 and 0 <= float(position[2]) <= 100


def test_a_count_that_is_always_zero_has_an_axis_from_zero_to_one() -> None:
    line = Line(name="a", legend="a", style=0, points=[(1, 0.0), (2, 0.0)])
    page = line_chart(LineChart(title="t", note="", x_label="step", unit="number", lines=[line]))
    assert re.findall(r'<span class="y"[^>]*>([^<]*)<', page) == ["0", "0.5", "1"]
    assert 'd="M0.0 100.0L100.0 100.0"' in page


def test_a_chart_without_points_says_so() -> None:
    assert "Nothing was recorded." in chart(Line(name="a", legend="a", style=0, points=[]))


HOSTILE = '</script><img src=x onerror="alert(1)">&\'"'


def test_text_and_attributes_are_escaped_and_built_markup_is_not() -> None:
    page = element("p", HOSTILE, element("b", "bold"), title=HOSTILE)
    assert page == (
        '<p title="&lt;/script&gt;&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;&#x27;&quot;">'
        "&lt;/script&gt;&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;&#x27;&quot;<b>bold</b></p>"
    )


def test_joining_markup_with_text_by_plus_loses_the_trust() -> None:
    assert element("p", Html("<b>") + HOSTILE).count("<") == 2


def test_an_inert_json_block_cannot_be_ended_from_inside() -> None:
    block = json_script({"name": HOSTILE})
    assert block.count("<") == 2
    assert json.loads(block.removeprefix('<script type="application/json">').removesuffix("</script>")) == {
        "name": HOSTILE
    }


def test_own_script_text_that_would_end_early_is_refused() -> None:
    with pytest.raises(ValueError, match="must not contain </script"):
        raw_text("script", "'</script>'")


def test_a_table_names_its_columns_and_rows() -> None:
    page = table(["Run", "Reward"], [["a<b", "1"]], "Rewards")
    assert '<th scope="col">Reward</th>' in page
    assert '<th scope="row">a&lt;b</th><td>1</td>' in page
    assert 'aria-label="Rewards"' in page
