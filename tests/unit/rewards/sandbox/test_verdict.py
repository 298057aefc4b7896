"""How values and outputs are compared."""

import math
from typing import Any

import pytest

from megatron_p2o.rewards.sandbox.verdict import is_json_equal, lines_of, shown_value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 5),
        (5, 5.0),
        (0.1 + 0.2, 0.3),
        ((1, (2, 3)), [1, [2, 3]]),
        ({1: "a", "b": (1,)}, {"1": "a", "b": [1]}),
        ("a", "a"),
        (None, None),
        (True, True),
        (math.inf, math.inf),
    ],
)
def test_values_that_json_cannot_tell_apart_are_equal(value: Any, expected: Any) -> None:
    assert is_json_equal(value, expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (5, 6),
        (5, "5"),
        (1, True),
        (True, 1),
        (0, None),
        ([1, 2], [1, 2, 3]),
        ([2, 1], [1, 2]),
        ({1, 2}, [1, 2]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, ["a"]),
        (math.nan, math.nan),
        (1.0001, 1),
        (10**400, 1.0),
        ("1.0", 1.0),
        (1j, 1.0),
        (b"a", "a"),
    ],
)
def test_other_values_are_not(value: Any, expected: Any) -> None:
    assert not is_json_equal(value, expected)


def test_spaces_at_the_ends_of_lines_and_blank_lines_last_do_not_count() -> None:
    assert lines_of("1 \n2\r\n\n") == lines_of("1\n2")
    assert lines_of("1\n\n2") != lines_of("1\n2")
    assert lines_of(" 1") != lines_of("1")


def test_long_values_are_shown_in_part() -> None:
    assert len(shown_value("x" * 10_000)) < 400
    assert shown_value(10**5000) == "a number too long to show"
