"""Compares expressions whose letters are matrices: AB is not BA.

Letters take random 3 x 3 matrices over the integers modulo a prime, Greek letters and constants random numbers. Sums,
products, inverses and transposes are exact there, and two expressions that agree at random points are the same.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import reduce

from megatron_p2o.rewards.math.exact import exact_value
from megatron_p2o.rewards.math.reading.tree import MINUS_ONE, Node

PRIME = 2**61 - 1
SIZE = 3
NUM_POINTS = 2
MAX_EXPONENT = 10_000

Matrix = tuple[tuple[int, ...], ...]

_MATRIX = re.compile(r"[A-Z](?:_.*)?|\\(?:vec|mathbb|mathcal|overrightarrow)\{.*\}(?:_.*)?")
_LETTER = re.compile(r"[A-Za-z](?:_.*)?")
_TRANSPOSED = Node("symbol", name="T")


def has_matrices(node: Node) -> bool:
    r"""Return whether an expression inverts or transposes letters: `A^{-1}B`, `(AB)^{-1}`, `x^TA`."""
    return any(_is_matrix_power(*part.parts) for part in node.walk() if part.kind == "power")


def _is_matrix_power(base: Node, exponent: Node) -> bool:
    names = [part.name for part in base.walk() if part.kind == "symbol"]
    if exponent == MINUS_ONE:
        return bool(names) and all(_MATRIX.fullmatch(name) for name in names)
    return exponent == _TRANSPOSED and base.kind in ("symbol", "product") and all(map(_LETTER.fullmatch, names))


def _has_transposes(node: Node) -> bool:
    """Return whether a product such as X^TX may be of matrices that are not square: X has no inverse then."""
    return any(part.kind == "power" and part.parts[1] == _TRANSPOSED for part in node.walk())


def is_equal(gold: Node, answer: Node) -> bool:
    """Return whether two expressions are equal whatever matrices their letters are; False for other operations."""
    try:
        return all(_MatricesAt(number).value(gold) == _MatricesAt(number).value(answer) for number in range(NUM_POINTS))
    except (ArithmeticError, ValueError):
        return False


@dataclass(frozen=True, slots=True)
class _MatricesAt:
    """Evaluates expressions at one point."""

    point: int

    def value(self, node: Node) -> Matrix:
        """Return the value of an expression. Raises `ValueError` for what has no meaning for matrices."""
        number = exact_value(node)
        if number is not None:
            return _scaled(number.numerator * pow(number.denominator, -1, PRIME))
        if node.kind in ("symbol", "constant"):
            return self._letter(node)
        if node.kind == "power" and node.parts[1] == _TRANSPOSED:
            return tuple(zip(*self.value(node.parts[0]), strict=True))
        if node.kind == "power" and node.parts[1] == MINUS_ONE and _has_transposes(node.parts[0]):
            return self._random(f"inverse of {self.value(node.parts[0])}")
        if node.kind == "power":
            return _power(self.value(node.parts[0]), node.parts[1])
        values = [self.value(part) for part in node.parts]
        if node.kind == "negative":
            return _product(_scaled(-1), values[0])
        if node.kind == "quotient":
            return _product(values[0], _inverse(values[1]))
        if node.kind in ("sum", "product"):
            return reduce(_sum if node.kind == "sum" else _product, values)
        raise ValueError(f"{node.kind} of matrices")

    def _letter(self, node: Node) -> Matrix:
        if node.name == "I":
            return _scaled(1)
        letter = self._random(f"{node.kind} {node.name}")
        is_number = node.kind == "constant" or (node.name.startswith("\\") and not _MATRIX.fullmatch(node.name))
        return _scaled(letter[0][0]) if is_number else letter

    def _random(self, name: str) -> Matrix:
        digest = hashlib.shake_256(f"{self.point} {name}".encode()).digest(8 * SIZE * SIZE)
        numbers = [int.from_bytes(digest[start : start + 8]) % PRIME for start in range(0, len(digest), 8)]
        return tuple(tuple(numbers[start : start + SIZE]) for start in range(0, SIZE * SIZE, SIZE))


def _scaled(number: int) -> Matrix:
    return tuple(tuple(number % PRIME if row == column else 0 for column in range(SIZE)) for row in range(SIZE))


def _sum(left: Matrix, right: Matrix) -> Matrix:
    return tuple(
        tuple((one + other) % PRIME for one, other in zip(*rows, strict=True)) for rows in zip(left, right, strict=True)
    )


def _product(left: Matrix, right: Matrix) -> Matrix:
    columns = list(zip(*right, strict=True))
    return tuple(tuple(sum(map(int.__mul__, row, column)) % PRIME for column in columns) for row in left)


def _power(base: Matrix, exponent: Node) -> Matrix:
    number = exact_value(exponent)
    if number is None or number.denominator != 1 or abs(number) > MAX_EXPONENT:
        raise ValueError("a power of a matrix that is not whole")
    if number < 0:
        base = _inverse(base)
    power = _scaled(1)
    for digit in f"{abs(int(number)):b}":
        power = _product(power, power)
        power = _product(power, base) if digit == "1" else power
    return power


def _inverse(matrix: Matrix) -> Matrix:
    """Return the inverse by Cramer's rule. Raises `ValueError` where there is none."""

    def cofactor(row: int, column: int) -> int:
        rows, columns = ((row + 1) % SIZE, (row + 2) % SIZE), ((column + 1) % SIZE, (column + 2) % SIZE)
        (a, b), (c, d) = ([matrix[each][place] for place in columns] for each in rows)
        return a * d - b * c

    determinant = sum(matrix[0][column] * cofactor(0, column) for column in range(SIZE))
    scale = pow(determinant, -1, PRIME)
    return tuple(tuple(scale * cofactor(row, column) % PRIME for row in range(SIZE)) for column in range(SIZE))
