"""Metric values that carry their own reduction, so that averages are never averaged.

One nan makes the whole nan.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


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

    def value(self) -> float:
        """Return sum / count; NaN when nothing was observed."""
        return self.sum / self.count if self.count else math.nan


@dataclass(frozen=True, slots=True)
class Sum:
    """A total: counts of events, seconds of a phase."""

    total: float

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest observation."""

    largest: float

    @staticmethod
    def of(observations: Iterable[float]) -> "Max":
        """Return the largest of at least one observation."""
        numbers = list(observations)
        # Python's maximum depends on the order where one of the two is nan.
        return Max(math.nan if any(map(math.isnan, numbers)) else max(numbers))

    def value(self) -> float:
        return float(self.largest)


@dataclass(frozen=True, slots=True)
class Last:
    """A state rather than an observation (learning rate, library version): the later one replaces the earlier."""

    state: float

    def value(self) -> float:
        return float(self.state)


MetricValue = Mean | Sum | Max | Last


def numbers_of(metrics: Mapping[str, MetricValue]) -> dict[str, float]:
    """Return each metric's number, leaving out means of nothing."""
    return {
        key: metric.value() for key, metric in metrics.items() if not (isinstance(metric, Mean) and metric.count == 0)
    }
