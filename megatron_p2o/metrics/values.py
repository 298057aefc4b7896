"""Metric values that carry their own reduction, so that nobody averages averages.

A value is merged with values of the same kind, from other ranks or other mini-batches, and turned into a number last.
Merging is associative, and commutative except for `Last`. One nan makes the whole nan.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean as (sum, count): the count is the stated denominator."""

    sum: float
    count: float
    """Observations (tokens, rollouts, groups: whatever the key speaks of); 0 is a mean of nothing."""

    @staticmethod
    def of(observations: Iterable[float]) -> "Mean":
        """Return the mean of equally weighted observations."""
        numbers = [float(number) for number in observations]
        return Mean(math.fsum(numbers), len(numbers))

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.sum + other.sum, self.count + other.count)

    def value(self) -> float:
        """Return sum / count; NaN when nothing was observed."""
        return self.sum / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Sum:
    """A total: counts of events, seconds of a phase."""

    total: float

    def merge(self, other: "Sum") -> "Sum":
        return Sum(self.total + other.total)

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest observation."""

    largest: float

    @staticmethod
    def of(observations: Iterable[float]) -> "Max":
        """Return the largest of at least one observation."""
        return reduce(Max.merge, map(Max, observations))

    def merge(self, other: "Max") -> "Max":
        # Python's maximum depends on the order where one of the two is nan.
        return self if math.isnan(self.largest) or self.largest > other.largest else other

    def value(self) -> float:
        return float(self.largest)


@dataclass(frozen=True, slots=True)
class Min:
    """The smallest observation."""

    smallest: float

    def merge(self, other: "Min") -> "Min":
        return self if math.isnan(self.smallest) or self.smallest < other.smallest else other

    def value(self) -> float:
        return float(self.smallest)


@dataclass(frozen=True, slots=True)
class Last:
    """A state rather than an observation (learning rate, library version): the later one replaces the earlier."""

    state: float

    def merge(self, later: "Last") -> "Last":
        return later

    def value(self) -> float:
        return float(self.state)


MetricValue = Mean | Sum | Max | Min | Last


def merge_metrics(earlier: Mapping[str, MetricValue], later: Mapping[str, MetricValue]) -> dict[str, MetricValue]:
    """Return the union of both, merging values of the same key.

    Raises:
        TypeError: the two sides reduce one key differently.
    """
    merged = dict(earlier)
    for key, value in later.items():
        merged[key] = _merge(key, merged[key], value) if key in merged else value
    return merged


def _merge(key: str, earlier: MetricValue, later: MetricValue) -> MetricValue:
    if type(earlier) is not type(later):
        raise TypeError(
            f"metric {key} is a {type(earlier).__name__} on one side and a {type(later).__name__} on the other: "
            "give it one reduction"
        )
    return earlier.merge(later)  # pyright: ignore[reportArgumentType]


def numbers_of(metrics: Mapping[str, MetricValue]) -> dict[str, float]:
    """Return each metric's number, leaving out means of nothing."""
    return {
        key: metric.value() for key, metric in metrics.items() if not (isinstance(metric, Mean) and metric.count == 0)
    }
