"""Ranges of numeric settings, written beside the field they bound: `Annotated[float, Range(above=0)]`."""

import dataclasses
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from megatron_p2o.config.shape import record_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The values that a number may have. Floats must be finite as well; None, where a field allows it, has no range."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    reason: str = ""
    """What goes wrong outside; ends the message."""
    names: tuple[tuple[str, float], ...] = ()
    """Words that a file may write instead of a number, and the numbers they stand for."""

    def broken_rule(self, number: float) -> str | None:
        """Return the rule that a number breaks, "must be at least 0 and less than 1"; None for one in the range."""
        if isinstance(number, float) and not math.isfinite(number):
            return "must be a finite number"
        bounds = (
            ("greater than", self.above, operator.gt),
            ("at least", self.at_least, operator.ge),
            ("less than", self.below, operator.lt),
            ("at most", self.at_most, operator.le),
        )
        given = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
        if all(holds(number, bound) for _, bound, holds in given):
            return None
        is_fixed = self.at_least is not None and self.at_least == self.at_most
        rule = f"{self.at_least:.12g}" if is_fixed else " and ".join(f"{word} {bound:.12g}" for word, bound, _ in given)
        return f"must be {rule}: {self.reason}" if self.reason else f"must be {rule}"


UNBOUNDED = Range()
"""Every finite number."""

LONGEST_WAIT_S = 2_000_000
"""23 days. The system calls that wait count milliseconds in 32 bits."""

PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
NumRanks = Annotated[
    int, Range(at_least=1, at_most=65536, reason="each is a process, on a GPU of its own where there are any")
]
NumSamples = Annotated[int, Range(at_least=1, at_most=65536, reason="each problem is asked so often")]
Seconds = Annotated[float, Range(above=0, at_most=LONGEST_WAIT_S)]
"""A time limit. None of them can be switched off: every wait ends."""


def range_problems(section: Any, prefix: str = "") -> list[str]:
    """Return a sentence for each number of a tree of dataclasses that lies outside its range."""
    return [
        f"{name}={number} {rule}"
        for name, number, bounds in _bounded_numbers(section, prefix)
        if (rule := bounds.broken_rule(number)) is not None
    ]


def range_of(annotation: object) -> Range | None:
    """Return the range of a field of this type, or of `X | None`; None when it has none."""
    if get_origin(annotation) is Annotated:
        return next((item for item in get_args(annotation) if isinstance(item, Range)), None)
    return next((found for option in get_args(annotation) if (found := range_of(option)) is not None), None)


def _bounded_numbers(section: Any, prefix: str) -> Iterator[tuple[str, float, Range]]:
    hints = get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        name, bounds = prefix + field.name, range_of(hints[field.name])
        value: Any = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _bounded_numbers(value, f"{name}.")
        elif record_of(hints[field.name]) is not None:
            for key, item in value.items():
                yield from _bounded_numbers(item, f"{name}.{key}.")
        elif bounds is not None and _is_number(value):
            yield name, value, bounds


def _is_number(value: object) -> bool:
    # A required number that is missing holds "" until the settings are refused.
    return isinstance(value, int | float) and not isinstance(value, bool)
