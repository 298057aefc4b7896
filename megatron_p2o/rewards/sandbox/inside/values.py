"""Plain values as JSON and back: what may pass between an answer's process and those that judge it.

Only data passes. An object of a class of the answer's own, which could call itself equal to everything, does not.
"""

from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of containers."""

EXACT_INT = 1 << 53
"""Integers up to here are written as numbers; longer ones in hexadecimal, which takes linear time to read."""


def encoded(value: Any, depth: int = 0) -> Any:
    """Return `value` as JSON has it.

    Raises:
        TypeError: it is no plain value: None, a bool, number, text, bytes, or a list, tuple, set or dict of such.
        ValueError: it is nested more than `MAX_DEPTH` deep.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"a value is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < EXACT_INT else {"int": hex(number)}
    if isinstance(value, float):
        return {"float": float(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encoded(key, depth + 1), encoded(entry, depth + 1)] for key, entry in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            entries = [encoded(entry, depth + 1) for entry in value]
            return entries if kind is list else {kind.__name__: entries}
    raise TypeError(f"a {type(value).__name__} is no plain value such as a number, text, list or dict")


def decoded(value: Any) -> Any:
    """Return the value that `encoded` wrote. Raises `ValueError` for what it did not write."""
    if isinstance(value, list):
        return [decoded(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    try:
        ((kind, content),) = value.items()
        return READERS[kind](content)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("not a plain value") from error


READERS = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda parts: complex(float.fromhex(parts[0]), float.fromhex(parts[1])),
    "bytes": bytes.fromhex,
    "dict": lambda pairs: {decoded(key): decoded(entry) for key, entry in pairs},
    "tuple": lambda entries: tuple(map(decoded, entries)),
    "set": lambda entries: set(map(decoded, entries)),
    "frozenset": lambda entries: frozenset(map(decoded, entries)),
}
