"""The tree of an expression: numbers, constants, symbols, and operations on them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
"""Longest numeral. Converting a longer one takes quadratic time."""

_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min"
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
CONSTANTS = {r"\pi": "pi", "e": "e", "i": "i", r"\imath": "i", r"\infty": "infinity"}
OPAQUE_FUNCTIONS = frozenset([*"fgFGO", r"\Gamma", r"\Theta", r"\zeta"])
"""Names of a function when a bracket follows: f(x) is not xf. Others are one when a number is in it."""

_PERHAPS_NAMES = "phi Phi psi Psi sigma delta tau"
PERHAPS_FUNCTIONS = frozenset([*"huJ", *(rf"\{name}" for name in _PERHAPS_NAMES.split())])
"""Names of a function or of a factor when a bracket follows."""


class NotUnderstoodError(ValueError):
    """The text is no expression that is read here."""


@dataclass(frozen=True, slots=True)
class Node:
    """A number, constant or symbol (no parts), or an operation on its parts."""

    kind: str
    """number, constant, symbol; sum, product, quotient, power, negative; or the name of a function."""
    parts: tuple["Node", ...] = ()
    name: str = ""
    """Name of a symbol, a constant or an opaque function."""
    value: Fraction = Fraction(0)
    """Value of a number."""
    is_decimal: bool = False
    """Whether a number was written with a point, so that it may be rounded."""

    def walk(self) -> Iterator["Node"]:
        """Yield this node and all below it."""
        yield self
        for part in self.parts:
            yield from part.walk()


MINUS_ONE = Node("negative", (Node("number", value=Fraction(1)),))


def product_of(node: Node, factor: Node) -> Node:
    """Return a product, without brackets around a product on its left: a long one stays shallow."""
    return Node("product", (*(node.parts if node.kind == "product" else (node,)), factor))


def cross_product_of(node: Node, factor: Node) -> Node:
    """Return the product of two vectors, whose order counts, or that of numbers."""
    last = node.parts[-1] if node.kind == "product" else node
    if not all(each.name.startswith((r"\vec", r"\overrightarrow", r"\hat")) for each in (last, factor)):
        return product_of(node, factor)
    cross = Node("cross", (last, factor))
    return cross if node is last else product_of(Node("product", node.parts[:-1]), cross)


def is_ordered_name(text: str) -> bool:
    """Return whether letters without operators are a word or a label, whose order counts: SSA, IX, Tom."""
    if not re.fullmatch("[A-Za-z]{2,}", text):
        return False
    return sum(map(str.isupper, text)) > 1 or (text.istitle() and re.search("[aeiouy]", text) is not None)
