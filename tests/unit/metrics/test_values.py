"""Metric values against the plain arithmetic they stand for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.metrics.values import Last, Max, Mean, Min, Sum, merge_metrics, numbers_of

numbers = st.integers(-1000, 1000).map(float)
lists = st.lists(numbers, min_size=1)


@given(lists, lists)
def test_merging_two_parts_gives_the_value_of_the_whole(left: list[float], right: list[float]) -> None:
    whole = left + right
    merged = merge_metrics(
        {"mean": Mean.of(left), "sum": Sum(sum(left)), "max": Max(max(left)), "min": Min(min(left)), "last": Last(1)},
        {
            "mean": Mean.of(right),
            "sum": Sum(sum(right)),
            "max": Max(max(right)),
            "min": Min(min(right)),
            "last": Last(2),
        },
    )
    assert numbers_of(merged) == {
        "mean": sum(whole) / len(whole),
        "sum": sum(whole),
        "max": max(whole),
        "min": min(whole),
        "last": 2,
    }


@pytest.mark.parametrize("kind", [Max, Min, Sum])
def test_one_nan_makes_the_whole_nan_in_whatever_order(kind: type[Max] | type[Min] | type[Sum]) -> None:
    for numbers in ([math.nan, 1.0, 2.0], [1.0, math.nan, 2.0], [1.0, 2.0, math.nan]):
        first, second, third = (kind(number) for number in numbers)
        assert math.isnan(first.merge(second).merge(third).value())  # pyright: ignore[reportArgumentType]
        assert math.isnan(first.merge(second.merge(third)).value())  # pyright: ignore[reportArgumentType]


def test_a_mean_of_unequal_parts_weighs_observations_not_parts() -> None:
    assert Mean.of([0, 0, 0]).merge(Mean.of([1])).value() == 0.25


def test_a_mean_of_nothing_is_nan_and_is_left_out_of_the_numbers() -> None:
    assert math.isnan(Mean.of([]).value())
    assert numbers_of({"nothing": Mean.of([]), "zero": Mean.of([0.0])}) == {"zero": 0.0}


def test_a_mean_of_nothing_is_neutral_in_merging() -> None:
    assert Mean.of([]).merge(Mean(3, 4)) == Mean(3, 4)


def test_keys_of_one_side_only_survive_merging() -> None:
    assert merge_metrics({"a": Sum(1)}, {"b": Max(2)}) == {"a": Sum(1), "b": Max(2)}


def test_reducing_one_key_in_two_ways_is_an_error_that_names_it() -> None:
    with pytest.raises(TypeError, match=r"metric train/loss is a Mean on one side and a Sum on the other"):
        merge_metrics({"train/loss": Mean(1, 1)}, {"train/loss": Sum(1)})
