"""The operations of expressions on numbers of any precision."""

from collections.abc import Callable
from typing import Any

from mpmath import mp

MAX_EXPONENT = 10**15
"""Larger exponents are not computed."""


def power(base: Any, exponent: Any) -> Any:
    """Return a power. Raises `ArithmeticError` for one that is not computed or has no value."""
    if abs(exponent) > MAX_EXPONENT:
        raise OverflowError("a power that is not computed")
    if base == 0 and mp.re(exponent) <= 0:
        raise ZeroDivisionError("zero to the power of zero")
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


def _double_factorial(value: Any) -> Any:
    if abs(value) > MAX_EXPONENT:
        raise OverflowError("a factorial that is not computed")
    return mp.fac2(value)


def _rounded_down(value: Any) -> Any:
    """Return the floor; a value that is whole except for rounding is whole."""
    value = real(value)
    nearest = mp.nint(value)
    is_whole = abs(value - nearest) <= mp.mpf(10) ** (-mp.dps // 2) * max(1, abs(value))
    return nearest if is_whole else mp.floor(value)


def real(value: Any) -> Any:
    """Return a real value. Raises `ValueError` for one that is not real."""
    if mp.im(value) != 0:
        raise ValueError("not real")
    return mp.re(value)


def _log(value: Any, base: Any = 10) -> Any:
    return mp.log(value) / mp.log(base)


def _antisymmetric(left: Any, right: Any) -> Any:
    """Return a value that stands for the product of two vectors: its sign changes when they change places."""
    return left * left * right - left * right * right


_CIRCULAR = "sin cos tan cot sec csc sinh cosh tanh"
OPERATIONS: dict[str, Callable[..., Any]] = {
    "sum": lambda *values: mp.fsum(values),
    "product": lambda *values: mp.fprod(values),
    "quotient": lambda left, right: left / right,
    "negative": lambda value: -value,
    "power": power,
    "root": _root,
    "degree": lambda value: value * mp.pi / 180,
    "factorial": _factorial,
    "binomial": lambda n, k: mp.binomial(n, k) if abs(n) < MAX_EXPONENT else mp.nan,
    "abs": abs,
    "double_factorial": _double_factorial,
    "floor": _rounded_down,
    "ceil": lambda value: -_rounded_down(-value),
    "cross": _antisymmetric,
    "max": lambda *values: max(map(real, values)),
    "min": lambda *values: min(map(real, values)),
    "ln": mp.log,
    "log": _log,
    "lg": _log,
    "exp": lambda value: power(mp.e, value),
    **{name: getattr(mp, name) for name in _CIRCULAR.split()},
    **{f"arc{name}": getattr(mp, f"a{name}") for name in _CIRCULAR.split()},
}
