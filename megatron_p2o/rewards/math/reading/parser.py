"""Reads a mathematical expression in LaTeX as a tree that keeps every letter, case, index and prime."""

import re
from collections.abc import Callable
from fractions import Fraction

from megatron_p2o.rewards.math.reading.tokens import Tokens, is_label, number_of
from megatron_p2o.rewards.math.reading.tree import (
    CONSTANTS,
    FUNCTIONS,
    MINUS_ONE,
    OPAQUE_FUNCTIONS,
    PERHAPS_FUNCTIONS,
    Node,
    NotUnderstoodError,
    cross_product_of,
    product_of,
)

_SYMBOL_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega "
    "ell hbar partial triangle emptyset"
)
_SYMBOLS = frozenset(_SYMBOL_NAMES.split())
_ACCENT_NAMES = "vec hat bar overline tilde dot ddot widehat overrightarrow mathbb mathcal mathfrak"
_ACCENTS = frozenset(_ACCENT_NAMES.split())
_VECTORS = (r"\vec", r"\overrightarrow")
_DIFFERENTIAL = re.compile(r"(?:d|\\partial ?)(?:\^\{?\d\}?)?(?:[A-Za-z]|\\[A-Za-z]+)?(?:\^\{?\d\}?)?")


def parse_expression(text: str) -> Node:
    """Return the tree of an expression in normal form.

    Raises:
        NotUnderstoodError: it has a part whose meaning is not known here.
    """
    tokens = Tokens(text)
    node = _Parser(tokens).braced()
    if tokens.peek() != "":
        raise NotUnderstoodError(f"unexpected {tokens.peek()!r}")
    return node


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._open_bars = 0
        self._open_norms = 0

    def braced(self) -> Node:
        """Return the content of braces, or of the whole text: n \\choose k ends with them."""
        node = self.sum()
        if self._tokens.peek() != r"\choose":
            return node
        self._tokens.take()
        return Node("binomial", (node, self.sum()))

    def sum(self) -> Node:
        terms = [self._signed(self._product)]
        while self._tokens.peek() in ("+", "-"):
            terms.append(self._signed(self._product))
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def _signed(self, operand: Callable[[], Node]) -> Node:
        sign = self._tokens.take() if self._tokens.peek() in ("+", "-") else "+"
        node = operand()
        return node if sign == "+" else Node("negative", (node,))

    def _product(self) -> Node:
        node = self._power()
        while True:
            token = self._tokens.peek()
            if token in ("*", r"\cdot", r"\times", r"\ast"):
                self._tokens.take()
                factor = self._signed(self._power)
                node = cross_product_of(node, factor) if token == r"\times" else product_of(node, factor)
            elif token in ("/", r"\div"):
                self._tokens.take()
                node = Node("quotient", (node, self._signed(self._power)))
            elif self._starts_factor(token):
                node = self._juxtaposed(node)
            else:
                return node

    def _juxtaposed(self, node: Node) -> Node:
        first = self._tokens.peek()
        factor = self._power()
        is_fraction = first == r"\frac" and all(part.kind == "number" for part in factor.parts)
        last = node.parts[-1] if node.kind == "product" else node
        if last.kind == "number" and not last.is_decimal and is_fraction:
            mixed = Node("sum", (last, factor))
            return mixed if node is last else Node("product", (*node.parts[:-1], mixed))
        is_number = first[0].isdecimal() or (first == "{" and factor.kind == "number")
        if is_number and last.kind not in ("power", "factorial"):
            raise NotUnderstoodError("a number after a factor")
        return product_of(node, factor)

    def _starts_factor(self, token: str) -> bool:
        if token in ("|", r"\|"):
            return (self._open_bars if token == "|" else self._open_norms) == 0
        if token in ("(", "[", "{") or (token[:1].isalnum() and token.isascii()) or is_label(token):
            return True
        is_command = token[:1] == "\\" and len(token) > 2
        return is_command and token not in (r"\rfloor", r"\rceil", r"\cdot", r"\times", r"\div", r"\degree", r"\choose")

    def _power(self) -> Node:
        node = self._postfix(self._atom())
        if self._tokens.peek() == "^":
            self._tokens.take()
            node = self._postfix(self._raised(node, self._argument()))
            if self._tokens.peek() == "^":
                raise NotUnderstoodError("two exponents")
        return node

    def _raised(self, node: Node, exponent: Node) -> Node:
        """Return a power; f^{-1}(x) is the inverse function at x, and C_{10}^{3} a binomial coefficient."""
        if node.kind == "applied":
            return Node("applied", (*node.parts, exponent), name=node.name)
        is_function = node.kind == "symbol" and node.name in OPAQUE_FUNCTIONS | PERHAPS_FUNCTIONS
        if is_function and exponent == MINUS_ONE and self._tokens.peek() == "(":
            return Node("opaque", (self._group("(", ")"),), name=f"{node.name}^-1")
        chosen_from = re.fullmatch(r"C_(\d{1,4})", node.name)
        if chosen_from and exponent.kind == "number":
            return Node("binomial", (Node("number", value=Fraction(chosen_from[1])), exponent))
        return Node("power", (node, exponent))

    def _postfix(self, node: Node) -> Node:
        while self._tokens.peek() in ("!", r"\degree"):
            kind = "factorial" if self._tokens.take() == "!" else "degree"
            if kind == "factorial" and self._tokens.peek() == "!":
                self._tokens.take()
                kind = "double_factorial"
            node = Node(kind, (node,))
        return node

    def _argument(self) -> Node:
        """Return what stands in braces, or the one token without them."""
        if self._tokens.peek() == "{":
            return self._group("{", "}")
        return self._signed(self._atom) if self._tokens.peek() in ("+", "-") else self._atom()

    def _group(self, opening: str, closing: str) -> Node:
        self._tokens.expect(opening)
        bars, self._open_bars = self._open_bars, 0
        node = self.sum() if opening != "{" else self.braced()
        self._open_bars = bars
        self._tokens.expect(closing)
        return node

    def _atom(self) -> Node:
        token = self._tokens.peek()
        if token in ("(", "[", "{"):
            return self._group(token, {"(": ")", "[": "]", "{": "}"}[token])
        self._tokens.take()
        if token == "|":
            return self._between_bars()
        if token == r"\|":
            return self._norm()
        if token[0].isdecimal() or (token[0] == "." and len(token) > 1):
            return self._number(token)
        if is_label(token):
            return Node("symbol", name=token)
        if token in CONSTANTS and self._tokens.peek() not in ("_", "'"):
            return Node("constant", name=CONSTANTS[token])
        if token.isalpha() and token.isascii():
            return self._symbol(token)
        return self._command(token.removeprefix("\\"))

    def _number(self, token: str) -> Node:
        if self._tokens.peek() in ("_", "'"):
            raise NotUnderstoodError("a numeral of another base")
        return number_of(token)

    def _symbol(self, name: str) -> Node:
        if self._tokens.peek() == "_":
            self._tokens.take()
            name += "_" + self._index()
        while self._tokens.peek() == "'":
            name += self._tokens.take()
        stem = name.rstrip("'").partition("_")[0]
        if self._tokens.peek() == "(" and (stem in OPAQUE_FUNCTIONS or self._is_number_in_brackets()):
            return Node("opaque", (self._group("(", ")"),), name=name)
        if self._tokens.peek() == "(" and stem in PERHAPS_FUNCTIONS:
            return Node("applied", (self._group("(", ")"),), name=name)
        if name == "C" and self._tokens.peek() == "(" and "," in self._tokens.following():
            return Node("binomial", self._list_of_arguments(num_arguments=2))
        return Node("symbol", name=name)

    def _is_number_in_brackets(self) -> bool:
        """Return whether `(0)` follows: I(0) is the value of I at 0, not 0."""
        _, number, closing, *_ = [*self._tokens.following()[:3], "", ""]
        return number[:1].isdecimal() and closing == ")"

    def _index(self) -> str:
        """Return an index without its font: `max`, however that is written."""
        index = self._tokens.raw()
        if index == r"\text":
            index = self._tokens.raw()
        return re.sub(r"\\text(?![A-Za-z])|[{}\s]", "", index).removeprefix("\\")

    def _norm(self) -> Node:
        """Return the norm of what stands up to the next double bar; it is no absolute value."""
        self._open_norms += 1
        node = self.sum()
        self._open_norms -= 1
        self._tokens.expect(r"\|")
        return Node("opaque", (node,), name=r"\|")

    def _between_bars(self) -> Node:
        self._open_bars += 1
        node = self.sum()
        self._open_bars -= 1
        self._tokens.expect("|")
        return Node("opaque", (node,), name=r"\|") if node.name.startswith(_VECTORS) else Node("abs", (node,))

    def _command(self, name: str) -> Node:
        if name in ("frac", "nicefrac", "sfrac"):
            return self._fraction()
        if name == "sqrt":
            return self._root()
        if name in ("binom", "dbinom", "tbinom"):
            return Node("binomial", (self._argument(), self._argument()))
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self._tokens.expect("\\r" + name[1:])
            return Node(name[1:], (node,))
        if name in FUNCTIONS:
            return self._function(name)
        if name in _SYMBOLS:
            return self._symbol(f"\\{name.removeprefix('var')}")
        if name == "angle":
            return self._angle()
        if name in _ACCENTS:
            return self._symbol(f"\\{name}{{{self._tokens.raw()}}}")
        if name == "text":
            return self._text_symbol()
        raise NotUnderstoodError(f"\\{name}")

    def _angle(self) -> Node:
        """Return an angle as one name: ABC is another angle than BAC."""
        points: list[str] = []
        while self._tokens.peek().isalpha():
            points.append(self._tokens.take())
        return Node("symbol", name="\\angle " + "".join(points))

    def _text_symbol(self) -> Node:
        text = self._tokens.raw()
        if text in ("i", "e"):
            return Node("constant", name=text)
        return self._symbol(text if len(text) == 1 else f"\\text{{{text}}}")

    def _fraction(self) -> Node:
        start = self._tokens.position
        numerator_text, denominator_text = self._fraction_part(), self._fraction_part()
        are_differentials = all(_DIFFERENTIAL.fullmatch(text) for text in (numerator_text, denominator_text))
        if are_differentials and len(denominator_text) > 1:  # \frac{d}{d} is a ratio of two letters
            return Node("symbol", name=f"\\frac{{{numerator_text}}}{{{denominator_text}}}")
        self._tokens.position = start
        return Node("quotient", (self._fraction_argument(), self._fraction_argument()))

    def _fraction_part(self) -> str:
        if self._tokens.peek() == "{":
            return self._tokens.raw()
        self._fraction_argument()
        return ""

    def _fraction_argument(self) -> Node:
        r"""Return one argument of \frac: a group, or one digit or letter of what follows, as in \frac12."""
        self._tokens.split_number()
        return self._argument()

    def _root(self) -> Node:
        index = None
        if self._tokens.peek() == "[":
            index = self._group("[", "]")
        if len(self._tokens.peek()) > 1 and self._tokens.peek().isdigit():
            return Node(
                "root", (self._number(self._tokens.take()), index or Node("number", value=Fraction(2)))
            )  # \sqrt 12
        radicand = self._atom() if self._tokens.peek() == "(" else self._argument()
        return Node("root", (radicand, index or Node("number", value=Fraction(2))))

    def _function(self, name: str) -> Node:
        base: tuple[Node, ...] = ()
        exponent = None
        if name == "log" and self._tokens.peek() == "_":
            self._tokens.take()
            base = (self._argument(),)
        if self._tokens.peek() == "^":
            self._tokens.take()
            exponent = self._argument()
        if self._tokens.peek() == "_":
            raise NotUnderstoodError(f"\\{name} with an index")
        if name in ("gcd", "lcm", "max", "min"):
            return Node(name, self._list_of_arguments())
        arguments = (self._function_argument(), *base)
        if exponent is None:
            return Node(name, arguments)
        if exponent == MINUS_ONE:
            if name in ("ln", "log", "exp"):
                raise NotUnderstoodError(f"\\{name}^{{-1}}")
            return Node("arc" + name, arguments)
        return Node("power", (Node(name, arguments), exponent))

    def _list_of_arguments(self, num_arguments: int | None = None) -> tuple[Node, ...]:
        opening = self._tokens.take()
        closing = {"(": ")", "{": "}", r"\{": r"\}"}.get(opening)
        if closing is None:
            raise NotUnderstoodError("arguments without brackets")
        arguments = [self.sum()]
        while self._tokens.peek() in (",", ";"):
            self._tokens.take()
            arguments.append(self.sum())
        self._tokens.expect(closing)
        if num_arguments not in (None, len(arguments)):
            raise NotUnderstoodError("more or fewer arguments")
        return tuple(arguments)

    def _function_argument(self) -> Node:
        """Return the bracket that follows, or the product of factors up to the next function or bracket."""
        if self._tokens.peek() in ("(", "[", "{"):
            return self._postfix(self._atom())
        node = self._signed(self._power)
        while self._starts_factor(self._tokens.peek()) and not self._starts_next_factor():
            node = self._juxtaposed(node)
        return node

    def _starts_next_factor(self) -> bool:
        token = self._tokens.peek()
        return token in ("(", "[", "{", "|", r"\|") or token.removeprefix("\\") in (*FUNCTIONS, "sqrt", "text")
