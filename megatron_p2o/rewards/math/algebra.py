"""Compares expressions at random points, and with math-verify what has no expression.

Two expressions that agree to a hundred digits at several random points are the same function; no simplification is
needed, none can hang, and nothing that an expression holds is lost on the way. What `expression` does not read
(sums, integrals) math-verify compares, if its parse keeps every letter.
"""

import hashlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mpmath import mp

from megatron_p2o.rewards.math.exact import TOLERANCE, ExactJudge, exact_value, is_rounded
from megatron_p2o.rewards.math.expression import Node

NUM_POINTS = 4
"""Points at which expressions with letters are compared."""

DIGITS = 120
"""Decimal digits of the arithmetic."""

MATCHING_DIGITS = 100
"""Digits in which equal values agree; the rest is for rounding."""

MAX_EXACT_BITS = 100_000
"""Rational numbers up to this size are compared exactly."""

MAX_EXPONENT = 10**15
"""Larger exponents are not computed."""


class NumericJudge:
    """Decides everything, with arithmetic that belongs into a worker process. A `Judge`."""

    def is_equal(self, gold: Node, answer: Node, tolerance: Fraction | None = None) -> bool:
        known = ExactJudge(MAX_EXACT_BITS).is_equal(gold, answer, tolerance)
        if known is not None:
            return known
        is_exact_integer = (value := exact_value(gold)) is not None and value.denominator == 1 and not is_rounded(gold)
        if tolerance is None and (is_rounded(gold) or is_rounded(answer)) and not is_exact_integer:
            tolerance = TOLERANCE
        pairs = values_at_points(gold, answer)
        return pairs is not None and all(_is_close(one, other, tolerance) for one, other in pairs)

    def is_same_equation(self, gold: tuple[Node, Node], answer: tuple[Node, Node], sign: str) -> bool:
        """Equations say the same when their differences of sides are proportional."""
        differences = [Node("sum", (left, Node("negative", (right,)))) for left, right in (gold, answer)]
        pairs = values_at_points(*differences)
        if pairs is None:
            return False
        if any(_is_close(value, 0, None) for pair in pairs for value in pair):
            return all(self.is_equal(*pair) for pair in zip(gold, answer, strict=True))
        ratios = [other / one for one, other in pairs]
        tolerance = TOLERANCE if any(is_rounded(each) for each in differences) else None
        is_constant = all(_is_close(ratios[0], ratio, tolerance) for ratio in ratios)
        has_letters = any(part.kind in ("symbol", "opaque") for part in differences[0].walk())
        return is_constant and has_letters and (sign in ("=", r"\ne") or (ratios[0].imag == 0 and ratios[0].real > 0))

    def is_equal_text(self, gold: str, answer: str) -> bool:
        from megatron_p2o.rewards.math.fallback import is_equal_by_math_verify  # it takes a second and 60 MB

        return is_equal_by_math_verify(gold, answer)


def values_at_points(gold: Node, answer: Node) -> list[tuple[Any, Any]] | None:
    """Return the values of two expressions at the points; None if there is one at which they cannot be compared.

    One point without letters. Letters are positive first, as lengths, masses and arguments of roots and logarithms are.
    Then they have both signs, and points where either expression is not real on the way to its value are left out: |x|
    is not x, but ln(ab) is ln a + ln b.
    """
    kinds = {part.kind for node in (gold, answer) for part in node.walk()}
    if not kinds & {"symbol", "opaque"}:
        pairs = [(value_at(gold, 0), value_at(answer, 0))]
    else:
        pairs = [(value_at(gold, point), value_at(answer, point)) for point in range(NUM_POINTS)]
    if any(value is None for pair in pairs for value in pair):
        return None
    if len(pairs) == 1 or any(part.name == "i" for node in (gold, answer) for part in node.walk()):
        return pairs
    signed = [(value_at(gold, -point), value_at(answer, -point)) for point in range(1, NUM_POINTS + 1)]
    return pairs + [pair for pair in signed if None not in pair]


def _is_close(gold: Any, answer: Any, tolerance: Fraction | None) -> bool:
    if tolerance is not None:
        scale = min(1, abs(gold)) if tolerance == TOLERANCE else abs(gold)
        return bool(abs(gold - answer) <= mp.mpf(tolerance.numerator) / tolerance.denominator * scale)
    return bool(abs(gold - answer) <= mp.mpf(10) ** -MATCHING_DIGITS * max(1, abs(gold), abs(answer)))


@lru_cache(maxsize=4096)
def value_at(node: Node, point: int) -> Any:
    """Return the complex value of an expression at a random point, None where it has none.

    At a point of negative number, letters have both signs, and an expression with a part that is not real has no value.
    """
    with mp.workdps(DIGITS):
        try:
            value = _value(node, point)
        except (ArithmeticError, ValueError, TypeError, KeyError, NotImplementedError):
            return None
        return value if mp.isfinite(value) else None


def _random(name: str, point: int) -> Any:
    """Return the value of a name at a point, of size 0.3 to 3.3: the same in every process."""
    digest = hashlib.sha256(f"{point} {name}".encode()).digest()
    size = mp.mpf(int.from_bytes(digest)) / (1 << 256) * 3 + mp.mpf("0.3")
    return -size if point < 0 and digest[0] % 2 else size


def _value(node: Node, point: int) -> Any:
    exact = exact_value(node)
    if exact is not None:
        return mp.mpf(exact.numerator) / exact.denominator
    if node.kind == "symbol":
        return _random(node.name, point)
    if node.kind == "constant":
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[node.name]
    values = [_value(part, point) for part in node.parts]
    if node.kind == "opaque":
        return _random(f"{node.name}({mp.nstr(values[0], 30)})", point)
    return (_real if point < 0 else mp.convert)(_OPERATIONS[node.kind](*values))


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > MAX_EXPONENT:
        raise OverflowError("a power that is not computed")
    return mp.power(base, exponent)


def _root(radicand: Any, index: Any) -> Any:
    """Return the real root where there is one: the cube root of -8 is -2."""
    is_odd = mp.isint(index) and int(index) % 2 == 1
    if is_odd and mp.im(radicand) == 0 and mp.re(radicand) < 0:
        return -mp.power(-radicand, 1 / index)
    return mp.power(radicand, 1 / index)


def _factorial(value: Any) -> Any:
    if abs(value) > MAX_EXPONENT:
        raise OverflowError("a factorial that is not computed")
    return mp.factorial(value)


def _real(value: Any) -> Any:
    if mp.im(value) != 0:
        raise ValueError("not real")
    return mp.re(value)


def _log(value: Any, base: Any = 10) -> Any:
    return mp.log(value) / mp.log(base)


_CIRCULAR = "sin cos tan cot sec csc sinh cosh tanh"
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "sum": lambda *values: mp.fsum(values),
    "product": lambda *values: mp.fprod(values),
    "quotient": lambda left, right: left / right,
    "negative": lambda value: -value,
    "power": _power,
    "root": _root,
    "degree": lambda value: value * mp.pi / 180,
    "factorial": _factorial,
    "binomial": lambda n, k: mp.binomial(n, k) if abs(n) < MAX_EXPONENT else mp.nan,
    "abs": abs,
    "floor": lambda value: mp.floor(_real(value)),
    "ceil": lambda value: mp.ceil(_real(value)),
    "max": lambda *values: max(map(_real, values)),
    "min": lambda *values: min(map(_real, values)),
    "ln": mp.log,
    "log": _log,
    "lg": _log,
    "exp": lambda value: _power(mp.e, value),
    **{name: getattr(mp, name) for name in _CIRCULAR.split()},
    **{f"arc{name}": getattr(mp, f"a{name}") for name in _CIRCULAR.split()},
}
