"""Compares expressions at random points, and with math-verify what has no expression.

Two expressions that agree to a hundred digits at several random points are the same function; no simplification is
needed, none can hang, and nothing that an expression holds is lost on the way. More digits are computed where terms of
different size meet, so that a small one is never lost in a large one. What an answer may cost is counted in digits and
operations, not in time: a verdict does not depend on the machine. What `reading.parser` does not read (sums, integrals)
math-verify compares, if its parse keeps every letter.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from mpmath import mp

from megatron_p2o.rewards.math.exact import TOLERANCE, ExactJudge, exact_value, is_rounded
from megatron_p2o.rewards.math.matrices import has_matrices
from megatron_p2o.rewards.math.matrices import is_equal as is_equal_for_matrices
from megatron_p2o.rewards.math.operations import OPERATIONS, power, real
from megatron_p2o.rewards.math.reading.tree import Node

NUM_POINTS = 4
"""Points of each kind at which expressions with letters are compared."""

NUM_WIDE_POINTS = 10
NUM_PIECEWISE_POINTS = 32
"""Points of a kind for expressions that are made of pieces."""

PIECEWISE = frozenset(["floor", "ceil", "abs", "max", "min", "gcd", "lcm"])

MIN_REAL_POINTS = 3
"""Least number of points with real values that decide alone, if the gold expression is not real everywhere."""

DIGITS = 150
"""Decimal digits of the arithmetic, at least."""

MATCHING_DIGITS = 100
"""Digits in which equal values agree, beside those that terms of different size take; the rest is for rounding."""

GUARD_DIGITS = 15
"""Extra digits of the values that show the error of the others."""

MAX_DIGITS = 5000
MAX_WORK = 500_000
"""Digits times cost of the operations: an answer that takes more is not equal to a gold one."""

COSTS = {"factorial": 200, "double_factorial": 200, "binomial": 300, "sum": 1, "product": 1, "quotient": 1}
"""Cost of an operation in multiplications; others cost `FUNCTION_COST`."""

FUNCTION_COST = 15

MAX_EXACT_BITS = 100_000
"""Rational numbers up to this size are compared exactly."""

MAX_ARGUMENT_BITS = 10_000
"""Size of the largest argument of a function, such as a sine or a floor."""


class NumericJudge:
    """Decides everything, with arithmetic that belongs into a worker process. A `Judge`."""

    def is_equal(self, gold: Node, answer: Node, tolerance: Fraction | None = None) -> bool:
        known = ExactJudge(MAX_EXACT_BITS).is_equal(gold, answer, tolerance)
        if known is not None:
            return known
        if has_matrices(gold):
            return is_equal_for_matrices(gold, answer)
        is_exact_integer = (value := exact_value(gold)) is not None and value.denominator == 1 and not is_rounded(gold)
        if tolerance is None and (is_rounded(gold) or is_rounded(answer)) and not is_exact_integer:
            tolerance = TOLERANCE
        return all(_agree_as_functions(gold, answer, each, tolerance) for each in _readings(gold, answer))

    def is_same_equation(self, gold: tuple[Node, Node], answer: tuple[Node, Node], sign: str) -> bool:
        """Equations say the same when their differences of sides are proportional."""
        one, other = (Node("sum", (left, Node("negative", (right,)))) for left, right in (gold, answer))
        return all(self._are_proportional(one, other, gold, answer, sign, each) for each in _readings(one, other))

    def _are_proportional(
        self, one: Node, other: Node, gold: tuple[Node, Node], answer: tuple[Node, Node], sign: str, applies: bool
    ) -> bool:
        pairs = [_pair_at(one, other, point) for point in _points(one, other, applies)]
        known = [pair for pair in pairs if pair is not None]
        if None in pairs[:NUM_POINTS]:
            return False
        if any(abs(each.value) <= each.error for pair in known for each in pair):
            return all(self.is_equal(*pair) for pair in zip(gold, answer, strict=True))
        ratios = [_ratio(second, first) for first, second in known]
        tolerance = TOLERANCE if is_rounded(one) or is_rounded(other) else None
        if not _has_letters(one) or not all(_is_close(ratios[0], ratio, tolerance) for ratio in ratios):
            return False
        first = ratios[0].value
        return sign in ("=", r"\ne") or (abs(mp.im(first)) <= ratios[0].error and mp.re(first) > 0)

    def is_equal_text(self, gold: str, answer: str) -> bool:
        from megatron_p2o.rewards.math.fallback import is_equal_by_math_verify  # it takes a second and 60 MB

        return is_equal_by_math_verify(gold, answer)


@dataclass(frozen=True, slots=True)
class Point:
    """Values of all letters: the same in every process."""

    number: int
    kind: Literal["positive", "signed", "wide", "whole", "half"]
    """Values of size 0.3 to 3.3 without or with signs, up to some thousands, whole numbers, or negative halves. At all
    but positive points, an expression with a part that is not real has no value."""

    applies: bool
    """Whether h(x) is a function of x, not h times x, where a name may be either."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A value and how far it may be off."""

    value: Any
    error: Any


def _has_letters(node: Node) -> bool:
    return any(part.kind in ("symbol", "opaque", "applied") for part in node.walk())


def _readings(gold: Node, answer: Node) -> tuple[bool, ...]:
    """Return whether names before brackets are functions: both ways have to agree, unless a name is a factor too."""
    parts = [part for node in (gold, answer) for part in node.walk()]
    applied = {part.name for part in parts if part.kind == "applied"}
    factors = {part.name for part in parts if part.kind == "symbol"}
    return (False, True) if applied - factors else (False,)


def _points(gold: Node, answer: Node, applies: bool) -> Iterator[Point]:
    """Yield the points at which two expressions are compared: the `NUM_POINTS` positive ones first.

    One point without letters. Letters are positive first, as lengths, masses and arguments of roots and logarithms are.
    """
    parts = [part for node in (gold, answer) for part in node.walk()]
    if not (_has_letters(gold) or _has_letters(answer)):
        yield Point(0, "positive", applies)
        return
    yield from (Point(number, "positive", applies) for number in range(NUM_POINTS))
    if any(part.name == "i" for part in parts):
        return
    yield from (Point(number, "signed", applies) for number in range(NUM_POINTS))
    is_piecewise = any(part.kind in PIECEWISE for part in parts)
    yield from (
        Point(number, "wide", applies) for number in range(NUM_PIECEWISE_POINTS if is_piecewise else NUM_WIDE_POINTS)
    )
    if is_piecewise:
        for number in range(NUM_PIECEWISE_POINTS):
            yield Point(number, "whole", applies)
            yield Point(number, "half", applies)


def _agree_as_functions(gold: Node, answer: Node, applies: bool, tolerance: Fraction | None) -> bool:
    """Return whether two expressions agree at all points.

    Points where one is not real are left out, except the positive ones: |x| is not x, but ln(ab) is ln a + ln b. Those
    count too, unless the gold expression is not real there and there are others.
    """
    num_real = 0
    unreal: list[Point] = []
    for point in _points(gold, answer, applies):
        is_real = value_at(gold, Point(point.number, "positive", applies), DIGITS, True) is not None
        if point.kind == "positive" and _has_letters(gold) and not is_real:
            unreal.append(point)
            continue
        pair = _pair_at(gold, answer, point)
        if pair is None and point.kind != "positive":
            continue
        if pair is None or not _is_close(*pair, tolerance):
            return False
        num_real += 1
    if num_real >= MIN_REAL_POINTS:
        return True
    pairs = [_pair_at(gold, answer, point) for point in unreal]
    return all(pair is not None and _is_close(*pair, tolerance) for pair in pairs)


def _pair_at(gold: Node, answer: Node, point: Point) -> tuple[Measured, Measured] | None:
    """Return the values of two expressions at a point, with digits enough to tell them apart.

    None where one has no value, or takes more work than is done for an answer.
    """
    max_digits = min(MAX_DIGITS, MAX_WORK // (_cost(gold) + _cost(answer)))
    digits = DIGITS
    while digits <= max_digits:
        expected, given = value_at(gold, point, digits), value_at(answer, point, digits)
        if expected is None or given is None:
            return None
        needed = MATCHING_DIGITS + sum(int(each.lost_bits * 0.302) for each in (expected, given))
        if needed <= digits or digits > 2 * DIGITS + needed // 2:
            return _measured(gold, expected, point, digits), _measured(answer, given, point, digits)
        digits = needed + GUARD_DIGITS
    return None


def _measured(node: Node, known: "Evaluated", point: Point, digits: int) -> Measured:
    finer = value_at(node, point, digits + GUARD_DIGITS)
    with mp.workdps(digits + GUARD_DIGITS):
        value = known.value if finer is None else finer.value
        rounding = mp.mpf(10) ** (GUARD_DIGITS - digits) * abs(value)
        return Measured(value, abs(value - known.value) * 10**GUARD_DIGITS + rounding)


def _ratio(one: Measured, other: Measured) -> Measured:
    with mp.workdps(MAX_DIGITS):
        value = one.value / other.value
        return Measured(value, abs(value) * (one.error / abs(one.value) + other.error / abs(other.value)))


def _is_close(gold: Measured, answer: Measured, tolerance: Fraction | None) -> bool:
    with mp.workdps(MAX_DIGITS):
        distance = abs(gold.value - answer.value)
        if tolerance is None:
            return bool(distance <= gold.error + answer.error)
        scale = min(1, abs(gold.value)) if tolerance == TOLERANCE else abs(gold.value)
        return bool(distance <= mp.mpf(tolerance.numerator) / tolerance.denominator * scale)


@lru_cache(maxsize=4096)
def _cost(node: Node) -> int:
    return sum(COSTS.get(part.kind, FUNCTION_COST) if part.parts else 1 for part in node.walk())


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A value and the digits, as bits, that terms of different size took on the way to it."""

    value: Any
    lost_bits: int


@lru_cache(maxsize=8192)
def value_at(node: Node, point: Point, digits: int, must_be_real: bool = False) -> Evaluated | None:
    """Return the complex value of an expression at a point, None where it has none."""
    walk = _Walk(point, must_be_real or point.kind != "positive")
    with mp.workdps(digits):
        try:
            value = walk.value(node)
        except (ArithmeticError, ValueError, TypeError, KeyError, NotImplementedError):
            return None
        return Evaluated(value, walk.lost_bits) if mp.isfinite(value) else None


class _Walk:
    """One walk over an expression, in the current precision."""

    def __init__(self, point: Point, must_be_real: bool) -> None:
        self._point, self._must_be_real = point, must_be_real
        self.lost_bits = 0

    def value(self, node: Node) -> Any:
        exact = exact_value(node)
        if exact is not None:
            return mp.mpf(exact.numerator) / exact.denominator
        if node.kind == "symbol":
            return _random(node.name, self._point)
        if node.kind == "constant":
            return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[node.name]
        values = [self.value(part) for part in node.parts]
        if node.kind in ("opaque", "applied"):
            return self._application(node, values)
        self.lost_bits += _lost_bits(node.kind, values)
        value = OPERATIONS[node.kind](*values)
        return real(value) if self._must_be_real else mp.convert(value)

    def _application(self, node: Node, values: list[Any]) -> Any:
        argument, *exponent = values
        if node.kind == "applied" and not self._point.applies:
            return _random(node.name, self._point) * (power(argument, *exponent) if exponent else argument)
        value = _random(f"{node.name}({mp.nstr(argument, 30)})", self._point)
        return power(value, *exponent) if exponent else value


def _lost_bits(kind: str, values: list[Any]) -> int:
    """Return the bits of cancellation: between the terms of a sum, or between a function's value and its limit.

    Raises:
        OverflowError: an argument of a function is too large.
    """
    sizes = [int(mp.mag(value)) for value in values if value != 0]
    if not sizes or kind in ("product", "quotient", "negative", "abs", "max", "min", "root", "ln", "log", "lg"):
        return 0
    if kind == "sum":
        return max(sizes) - min(sizes)
    if kind == "power":
        return max(0, -int(mp.mag(values[1]))) if values[1] != 0 else 0
    if max(sizes) > MAX_ARGUMENT_BITS:
        raise OverflowError("an argument that is not computed")
    if kind == "tanh":
        return int(min(3 * abs(values[0]), 4 * MAX_DIGITS))
    return 2 * max(0, -min(sizes)) + max(0, max(sizes)) * kind.startswith("arc")


def _random(name: str, point: Point) -> Any:
    """Return the value of a name at a point."""
    digest = hashlib.sha256(f"{point.number} {name}".encode()).digest()
    share = mp.mpf(int.from_bytes(digest)) / (1 << 256)
    if point.kind in ("whole", "half"):
        own = hashlib.sha256(name.encode()).digest()  # each name takes all the values, in its own order
        whole = (point.number * (2 * own[0] + 1) + own[1]) % NUM_PIECEWISE_POINTS + 1
        return mp.mpf(whole) if point.kind == "whole" else -mp.mpf(whole) / 2
    if point.kind == "wide":
        return mp.mpf(10) ** (4 * share) * (1 if point.number % 2 == 0 else -1 if digest[0] % 2 else 1)
    size = share * 3 + mp.mpf("0.3")
    return -size if point.kind == "signed" and digest[0] % 2 else size
