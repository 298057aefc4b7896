"""Metric values against the plain arithmetic they stand for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.metrics.values import Last, Max, Mean, Sum, numbers_of

numbers = st.integers(-1000, 1000).map(float)
lists = st.lists(numbers, min_size=1)


@given(lists)
def test_each_value_is_the_number_it_stands_for(observations: list[float]) -> None:
    metrics = {
        "mean": Mean.of(observations),
        "sum": Sum(sum(observations)),
        "max": Max.of(observations),
        "last": Last(observations[-1]),
    }
    assert numbers_of(metrics) == {
        "mean": sum(observations) / len(observations),
        "sum": sum(observations),
        "max": max(observations),
        "last": observations[-1],
    }


@pytest.mark.parametrize("kind", [Max, Mean])
def test_one_nan_makes_the_whole_nan_in_whatever_order(kind: type[Max] | type[Mean]) -> None:
    for numbers in ([math.nan, 1.0, 2.0], [1.0, math.nan, 2.0], [1.0, 2.0, math.nan]):
        assert math.isnan(kind.of(numbers).value())


def test_a_mean_of_nothing_is_nan_and_is_left_out_of_the_numbers() -> None:
    assert math.isnan(Mean.of([]).value())
    assert numbers_of({"nothing": Mean.of([]), "zero": Mean.of([0.0])}) == {"zero": 0.0}
