"""Plain values between processes."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.rewards.sandbox.inside.values import MAX_DEPTH, decoded, encoded

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
HASHABLE = st.recursive(ATOMS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=6)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(HASHABLE, inner, max_size=3) | st.sets(HASHABLE),
    max_leaves=12,
)


def passed(value: Any) -> Any:
    return decoded(json.loads(json.dumps(encoded(value))))


@given(VALUES)
def test_a_value_comes_out_as_it_went_in(value: Any) -> None:
    assert repr(passed(value)) == repr(value) or passed(value) == value  # sets have no order
    assert type(passed(value)) is type(value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 5e-324, 1j, complex(math.inf, -0.0), "\ud800"])
def test_odd_values_pass(value: Any) -> None:
    assert repr(passed(value)) == repr(value)


def test_long_whole_numbers_pass() -> None:
    assert passed(-(10**5000)) == -(10**5000)


def test_nan_passes() -> None:
    assert math.isnan(passed(math.nan))


def test_a_class_of_ones_own_passes_as_what_it_is_underneath() -> None:
    class Equal(list[int]):
        def __eq__(self, other: object) -> bool:
            return True

    assert passed(Equal([1])) == [1]
    assert passed(Equal([1])) != [2]


@pytest.mark.parametrize("value", [object(), print, (i for i in range(3)), {1: object()}, range(3)])
def test_what_is_no_plain_value_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="is no plain value"):
        encoded(value)


def test_deep_nesting_is_refused() -> None:
    value: Any = []
    for _ in range(MAX_DEPTH):
        value = [value]
    assert passed(value) == value
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        encoded([value])


@pytest.mark.parametrize(
    "value",
    [{}, {"int": 5}, {"int": "0xg"}, {"tuple": 3}, {"set": [[1]]}, {"object": []}, {"dict": [[1]]}, {"float": None}],
)
def test_what_was_not_written_by_it_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not a plain value"):
        decoded(value)
