"""Evaluates expressions of rational numbers exactly, within bounds that keep every step short."""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megatron_p2o.rewards.math.reading.tree import MAX_DIGITS, Node

TOLERANCE = Fraction(1, 1_000_000)
"""Decimals agree within this, relative to the smaller of 1 and the gold answer: 1/3 is 0.333333, 1e-9 is not 0."""

MAX_BITS = 4_000
"""Larger numbers are not computed, unless asked for: in a worker process."""

MAX_FACTORIAL = 1000


@lru_cache(maxsize=16384)
def exact_value(node: Node, max_bits: int = MAX_BITS) -> Fraction | None:
    """Return the value of an expression of rational numbers; None if it has anything else or exceeds `max_bits`."""
    if node.kind == "number":
        return node.value if _bits(node.value) <= max_bits else None
    values = [exact_value(part, max_bits) for part in node.parts]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    value = _operation(node.kind, known, max_bits)
    return value if value is not None and _bits(value) <= max_bits else None


def is_rounded(node: Node) -> bool:
    """Return whether an expression has a number with a decimal point."""
    return any(part.is_decimal for part in node.walk())


def agree(gold: Fraction, answer: Fraction, gold_is_rounded: bool, answer_is_rounded: bool) -> bool:
    """Return whether two values agree: exactly, or within the tolerance if one is a decimal.

    A gold integer is no measurement: nothing but the integer equals it.
    """
    if gold == answer:
        return True
    if not (gold_is_rounded or answer_is_rounded) or (gold.denominator == 1 and not gold_is_rounded):
        return False
    return abs(gold - answer) <= TOLERANCE * min(Fraction(1), abs(gold))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _operation(kind: str, values: list[Fraction], max_bits: int) -> Fraction | None:
    first = values[0]
    if kind in ("sum", "product"):
        return _accumulated(values, operator.add if kind == "sum" else operator.mul, max_bits)
    if kind == "power":
        return _power(first, values[1], max_bits)
    if kind == "negative":
        return -first
    if kind == "quotient":
        return first / values[1] if values[1] else None
    if kind == "abs":
        return abs(first)
    if kind in ("floor", "ceil"):
        return Fraction(math.floor(first) if kind == "floor" else math.ceil(first))
    if kind in ("max", "min"):
        return max(values) if kind == "max" else min(values)
    return _whole_operation(kind, values)


def _accumulated(
    values: list[Fraction], operation: Callable[[Fraction, Fraction], Fraction], max_bits: int
) -> Fraction | None:
    """Return the sum or product of values; None as soon as it exceeds `max_bits`."""
    total = values[0]
    for value in values[1:]:
        total = operation(total, value)
        if _bits(total) > max_bits:
            return None
    return total


def _power(base: Fraction, exponent: Fraction, max_bits: int) -> Fraction | None:
    if exponent.denominator != 1 or (base == 0 and exponent <= 0):
        return None
    if base not in (0, 1, -1) and abs(exponent) * _bits(base) > max_bits:
        return None
    return base ** (int(exponent) if base not in (1, -1) else int(exponent) % 2)


def _whole_operation(kind: str, values: list[Fraction]) -> Fraction | None:
    """Return the result of an operation on whole numbers, None for others."""
    if any(value.denominator != 1 or value < 0 for value in values):
        return None
    whole = [int(value) for value in values]
    if kind == "factorial" and whole[0] <= MAX_FACTORIAL:
        return Fraction(math.factorial(whole[0]))
    if kind == "binomial" and whole[0] <= MAX_FACTORIAL:
        return Fraction(math.comb(*whole))
    if kind == "gcd":
        return Fraction(math.gcd(*whole))
    return Fraction(math.lcm(*whole)) if kind == "lcm" else None


class ExactJudge:
    """Decides what exact arithmetic on rational numbers decides, in little time for any input. A `Judge`."""

    def __init__(self, max_bits: int = MAX_BITS) -> None:
        """Larger numbers than `max_bits` are not computed."""
        self._max_bits = max_bits

    def is_equal(self, gold: Node, answer: Node, tolerance: Fraction | None = None) -> bool | None:
        if gold == answer:
            return True
        signs = _infinity(gold), _infinity(answer)
        if signs != (0, 0):
            return signs[0] == signs[1]
        value, other = (exact_value(node, self._max_bits) for node in (gold, answer))
        if value is None or other is None:
            return None
        if tolerance is not None:
            return abs(value - other) <= tolerance * abs(value)
        return agree(value, other, is_rounded(gold), is_rounded(answer))

    def is_same_equation(self, gold: tuple[Node, Node], answer: tuple[Node, Node], sign: str) -> bool | None:
        return True if gold == answer else None

    def is_equal_text(self, gold: str, answer: str) -> bool | None:
        return None


def _infinity(node: Node) -> int:
    """Return 1 and -1 for plus and minus infinity, 0 for anything else."""
    if node.kind == "negative":
        return -_infinity(node.parts[0])
    return int(node.kind == "constant" and node.name == "infinity")


_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<decimal>\d*\.\d+)|"
    r"(?P<whole>\d+)?(?:\\frac\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}|\\frac(?P<top1>\d)(?P<bottom1>\d))|"
    r"(?P<slash_top>\d+)/(?P<slash_bottom>\d+)|"
    r"(?P<integer>\d+)"
    r")"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A rational number as it was written."""

    value: Fraction
    is_decimal: bool
    """Written with a point, hence perhaps rounded."""


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Return whether an answer equals the gold one (both in normal form) if both are plain numbers, else None."""
    if gold == answer:
        return True
    if not answer:
        return False
    number, other = parse_number(gold), parse_number(answer)
    if number is None or other is None:
        return None
    return agree(number.value, other.value, number.is_decimal, other.is_decimal)


def parse_number(text: str) -> Number | None:
    """Return an integer, decimal, fraction or mixed number, None for anything else."""
    found = _NUMBER.fullmatch(text)
    if found is None or len(text) > MAX_DIGITS:
        return None
    top = found["top"] or found["top1"] or found["slash_top"]
    if top is not None:
        bottom = int(found["bottom"] or found["bottom1"] or found["slash_bottom"])
        if bottom == 0 or (found["whole"] and top.startswith("-")):
            return None
        value = int(found["whole"] or 0) + Fraction(int(top), bottom)
    else:
        value = Fraction(found["decimal"] or found["integer"])
    return Number(value=-value if found["sign"] == "-" else value, is_decimal=found["decimal"] is not None)
