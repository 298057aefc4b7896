"""Reads a mathematical expression in LaTeX as a tree that keeps every letter, case, index and prime."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 1000
"""Of a numeral: converting longer ones takes quadratic time."""

MAX_EXPONENT_DIGITS = 4
"""Of a number such as 1e300: a longer exponent is not read."""

_FUNCTION_NAMES = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp gcd lcm max min"
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
CONSTANTS = {r"\pi": "pi", "e": "e", "i": "i", r"\imath": "i", r"\infty": "infinity"}
OPAQUE_FUNCTIONS = frozenset([*"fgFGO", r"\Gamma", r"\Theta", r"\zeta"])
"""Names of a function when a bracket follows: f(x) is not xf. Others are one when a number is in it."""

_PERHAPS_NAMES = "phi Phi psi Psi sigma delta tau"
PERHAPS_FUNCTIONS = frozenset([*"huJ", *(rf"\{name}" for name in _PERHAPS_NAMES.split())])
"""Names of a function or of a factor when a bracket follows."""

_SYMBOL_NAMES = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega "
    "ell hbar partial triangle emptyset"
)
_SYMBOLS = frozenset(_SYMBOL_NAMES.split())
_ACCENT_NAMES = "vec hat bar overline tilde dot ddot widehat overrightarrow mathbb mathcal mathfrak"
_ACCENTS = frozenset(_ACCENT_NAMES.split())
_WORDS = {"pi": r"\pi", "infinity": r"\infty", "sqrt": r"\sqrt", **{name: rf"\{name}" for name in FUNCTIONS}}
"""Names that mean the same without a backslash, when nothing else touches them."""

_TOKEN = re.compile(
    r"(?P<repeating>(?:\d+)?\.\d*(?:\\(?:overline|bar|dot)(?: ?\d|\{\d+\})|\(\d+\)))"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z^]))?)"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]{2,}(?![A-Za-z]))|(?P<other>[^\s])",
    re.DOTALL,
)
_REPEATED = re.compile(r"(?:\\[a-z]+[ {]?|\()(\d+)[})]?$")
_DIFFERENTIAL = re.compile(r"(?:d|\\partial ?)(?:\^\{?\d\}?)?(?:[A-Za-z]|\\[A-Za-z]+)?(?:\^\{?\d\}?)?")


class NotUnderstoodError(ValueError):
    """The text is no expression that is read here."""


@dataclass(frozen=True, slots=True)
class Node:
    """A number, constant or symbol (no parts), or an operation on its parts."""

    kind: str
    """number, constant, symbol; sum, product, quotient, power, negative; or the name of a function."""
    parts: tuple["Node", ...] = ()
    name: str = ""
    """Of a symbol or constant; of an opaque function."""
    value: Fraction = Fraction(0)
    """Of a number."""
    is_decimal: bool = False
    """Of a number: written with a point, hence perhaps rounded."""

    def walk(self) -> Iterator["Node"]:
        """Yield this node and all below it."""
        yield self
        for part in self.parts:
            yield from part.walk()


MINUS_ONE = Node("negative", (Node("number", value=Fraction(1)),))


def parse_expression(text: str) -> Node:
    """Return the tree of an expression in normal form.

    Raises:
        NotUnderstoodError: it has a part whose meaning is not known here.
    """
    parser = _Parser(text)
    node = parser.braced()
    if parser.peek() != "":
        raise NotUnderstoodError(f"unexpected {parser.peek()!r}")
    return node


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens: list[str] = []
        for found in _TOKEN.finditer(text):
            word = found["word"]
            tokens = list(word) if word and word not in _WORDS else [_WORDS[word] if word else found.group()]
            self._tokens += tokens
        self._next = 0
        self._open_bars = 0

    def peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def take(self) -> str:
        token = self.peek()
        if token == "":
            raise NotUnderstoodError("ends too early")
        self._next += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise NotUnderstoodError(f"{token!r} expected")

    def braced(self) -> Node:
        """Return the content of braces, or of the whole text: n \\choose k ends with them."""
        node = self.sum()
        if self.peek() != r"\choose":
            return node
        self.take()
        return Node("binomial", (node, self.sum()))

    def sum(self) -> Node:
        terms = [self._signed(self._product)]
        while self.peek() in ("+", "-"):
            terms.append(self._signed(self._product))
        return terms[0] if len(terms) == 1 else Node("sum", tuple(terms))

    def _signed(self, operand: Callable[[], Node]) -> Node:
        sign = self.take() if self.peek() in ("+", "-") else "+"
        node = operand()
        return node if sign == "+" else Node("negative", (node,))

    def _product(self) -> Node:
        node = self._power()
        while True:
            token = self.peek()
            if token in ("*", r"\cdot", r"\times", r"\ast"):
                self.take()
                factor = self._signed(self._power)
                node = _cross_product(node, factor) if token == r"\times" else _product_of(node, factor)
            elif token in ("/", r"\div"):
                self.take()
                node = Node("quotient", (node, self._signed(self._power)))
            elif self._starts_factor(token):
                node = self._juxtaposed(node)
            else:
                return node

    def _juxtaposed(self, node: Node) -> Node:
        start = self._next
        factor = self._power()
        is_fraction = self._tokens[start] == r"\frac" and all(part.kind == "number" for part in factor.parts)
        last = node.parts[-1] if node.kind == "product" else node
        if last.kind == "number" and not last.is_decimal and is_fraction:
            mixed = Node("sum", (last, factor))
            return mixed if node is last else Node("product", (*node.parts[:-1], mixed))
        is_number = self._tokens[start][0].isdecimal() or (self._tokens[start] == "{" and factor.kind == "number")
        if is_number and last.kind not in ("power", "factorial"):
            raise NotUnderstoodError("a number after a factor")
        return _product_of(node, factor)

    def _starts_factor(self, token: str) -> bool:
        if token == "|":
            return self._open_bars == 0
        if token in ("(", "[", "{") or (token[:1].isalnum() and token.isascii()) or _is_label(token):
            return True
        is_command = token[:1] == "\\" and len(token) > 2
        return is_command and token not in (r"\rfloor", r"\rceil", r"\cdot", r"\times", r"\div", r"\degree", r"\choose")

    def _power(self) -> Node:
        node = self._postfix(self._atom())
        if self.peek() == "^":
            self.take()
            node = self._postfix(self._raised(node, self._argument()))
            if self.peek() == "^":
                raise NotUnderstoodError("two exponents")
        return node

    def _raised(self, node: Node, exponent: Node) -> Node:
        """Return a power; f^{-1}(x) is the inverse function at x, and C_{10}^{3} a binomial coefficient."""
        if node.kind == "applied":
            return Node("applied", (*node.parts, exponent), name=node.name)
        is_function = node.kind == "symbol" and node.name in OPAQUE_FUNCTIONS | PERHAPS_FUNCTIONS
        if is_function and exponent == MINUS_ONE and self.peek() == "(":
            return Node("opaque", (self._group("(", ")"),), name=f"{node.name}^-1")
        chosen_from = re.fullmatch(r"C_(\d{1,4})", node.name)
        if chosen_from and exponent.kind == "number":
            return Node("binomial", (Node("number", value=Fraction(chosen_from[1])), exponent))
        return Node("power", (node, exponent))

    def _postfix(self, node: Node) -> Node:
        while self.peek() in ("!", r"\degree"):
            kind = "factorial" if self.take() == "!" else "degree"
            if kind == "factorial" and self.peek() == "!":
                self.take()
                kind = "double_factorial"
            node = Node(kind, (node,))
        return node

    def _argument(self) -> Node:
        """Return what stands in braces, or the one token without them."""
        if self.peek() == "{":
            return self._group("{", "}")
        return self._signed(self._atom) if self.peek() in ("+", "-") else self._atom()

    def _group(self, opening: str, closing: str) -> Node:
        self.expect(opening)
        bars, self._open_bars = self._open_bars, 0
        node = self.sum() if opening != "{" else self.braced()
        self._open_bars = bars
        self.expect(closing)
        return node

    def _atom(self) -> Node:
        token = self.peek()
        if token in ("(", "[", "{"):
            return self._group(token, {"(": ")", "[": "]", "{": "}"}[token])
        self.take()
        if token == "|":
            return self._between_bars()
        if token[0].isdecimal() or (token[0] == "." and len(token) > 1):
            return self._number(token)
        if _is_label(token):
            return Node("symbol", name=token)
        if token in CONSTANTS and self.peek() not in ("_", "'"):
            return Node("constant", name=CONSTANTS[token])
        if token.isalpha() and token.isascii():
            return self._symbol(token)
        return self._command(token.removeprefix("\\"))

    def _number(self, token: str) -> Node:
        if self.peek() in ("_", "'"):
            raise NotUnderstoodError("a numeral of another base")
        if len(token) > MAX_DIGITS:
            raise NotUnderstoodError("a numeral of more than a thousand digits")
        whole, repeated, _ = _REPEATED.split(token) if _REPEATED.search(token) else (token, "", "")
        mantissa, _, exponent = re.sub("[eE]", "e", whole).partition("e")
        if len(exponent.lstrip("+-")) > MAX_EXPONENT_DIGITS:
            raise NotUnderstoodError("a huge exponent")
        value = Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)
        if repeated:
            places = len(mantissa.partition(".")[2])
            value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
        return Node("number", value=value, is_decimal="." in mantissa and not repeated)

    def _symbol(self, name: str) -> Node:
        if self.peek() == "_":
            self.take()
            name += "_" + self._index()
        while self.peek() == "'":
            name += self.take()
        stem = name.rstrip("'").partition("_")[0]
        if self.peek() == "(" and (stem in OPAQUE_FUNCTIONS or self._is_number_in_brackets()):
            return Node("opaque", (self._group("(", ")"),), name=name)
        if self.peek() == "(" and stem in PERHAPS_FUNCTIONS:
            return Node("applied", (self._group("(", ")"),), name=name)
        if name == "C" and self.peek() == "(" and "," in self._tokens[self._next :]:
            return Node("binomial", self._list_of_arguments(num_arguments=2))
        return Node("symbol", name=name)

    def _is_number_in_brackets(self) -> bool:
        """Return whether `(0)` follows: I(0) is the value of I at 0, not 0."""
        _, number, closing, *_ = [*self._tokens[self._next : self._next + 3], "", ""]
        return number[:1].isdecimal() and closing == ")"

    def _index(self) -> str:
        """Return an index without its font: `max`, however that is written."""
        index = self._raw()
        if index == r"\text":
            index = self._raw()
        return re.sub(r"\\text(?![A-Za-z])|[{}\s]", "", index).removeprefix("\\")

    def _raw(self) -> str:
        """Return the text of a group or of one token as it stands: an index, the content of an accent."""
        token = self.take()
        if token != "{":
            return token
        taken: list[str] = []
        depth = 1
        while depth:
            taken.append(self.take())
            depth += {"{": 1, "}": -1}.get(taken[-1], 0)
        return "".join(taken[:-1])

    def _between_bars(self) -> Node:
        self._open_bars += 1
        node = self.sum()
        self._open_bars -= 1
        self.expect("|")
        return Node("abs", (node,))

    def _command(self, name: str) -> Node:
        if name in ("frac", "nicefrac", "sfrac"):
            return self._fraction()
        if name == "sqrt":
            return self._root()
        if name in ("binom", "dbinom", "tbinom"):
            return Node("binomial", (self._argument(), self._argument()))
        if name in ("lfloor", "lceil"):
            node = self.sum()
            self.expect("\\r" + name[1:])
            return Node(name[1:], (node,))
        if name in FUNCTIONS:
            return self._function(name)
        if name in _SYMBOLS:
            return self._symbol(f"\\{name.removeprefix('var')}")
        if name == "angle":
            return self._angle()
        if name in _ACCENTS:
            return self._symbol(f"\\{name}{{{self._raw()}}}")
        if name == "text":
            return self._text_symbol()
        raise NotUnderstoodError(f"\\{name}")

    def _angle(self) -> Node:
        """Return an angle as one name: ABC is another angle than BAC."""
        points: list[str] = []
        while self.peek().isalpha():
            points.append(self.take())
        return Node("symbol", name="\\angle " + "".join(points))

    def _text_symbol(self) -> Node:
        text = self._raw()
        if text in ("i", "e"):
            return Node("constant", name=text)
        return self._symbol(text if len(text) == 1 else f"\\text{{{text}}}")

    def _fraction(self) -> Node:
        start = self._next
        numerator_text, denominator_text = self._fraction_part(), self._fraction_part()
        are_differentials = all(_DIFFERENTIAL.fullmatch(text) for text in (numerator_text, denominator_text))
        if are_differentials and len(denominator_text) > 1:  # \frac{d}{d} is a ratio of two letters
            return Node("symbol", name=f"\\frac{{{numerator_text}}}{{{denominator_text}}}")
        self._next = start
        return Node("quotient", (self._fraction_argument(), self._fraction_argument()))

    def _fraction_part(self) -> str:
        if self.peek() == "{":
            return self._raw()
        self._fraction_argument()
        return ""

    def _fraction_argument(self) -> Node:
        r"""Return one argument of \frac: a group, or one digit or letter of what follows, as in \frac12."""
        token = self.peek()
        if len(token) > 1 and token.isdigit():
            self._tokens[self._next : self._next + 1] = list(token)
        return self._argument()

    def _root(self) -> Node:
        index = None
        if self.peek() == "[":
            index = self._group("[", "]")
        if len(self.peek()) > 1 and self.peek().isdigit():
            return Node("root", (self._number(self.take()), index or Node("number", value=Fraction(2))))  # \sqrt 12
        radicand = self._atom() if self.peek() == "(" else self._argument()
        return Node("root", (radicand, index or Node("number", value=Fraction(2))))

    def _function(self, name: str) -> Node:
        base: tuple[Node, ...] = ()
        exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = (self._argument(),)
        if self.peek() == "^":
            self.take()
            exponent = self._argument()
        if self.peek() == "_":
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
        opening = self.take()
        closing = {"(": ")", "{": "}", r"\{": r"\}"}.get(opening)
        if closing is None:
            raise NotUnderstoodError("arguments without brackets")
        arguments = [self.sum()]
        while self.peek() in (",", ";"):
            self.take()
            arguments.append(self.sum())
        self.expect(closing)
        if num_arguments not in (None, len(arguments)):
            raise NotUnderstoodError("more or fewer arguments")
        return tuple(arguments)

    def _function_argument(self) -> Node:
        """Return the bracket that follows, or the product of factors up to the next function or bracket."""
        if self.peek() in ("(", "[", "{"):
            return self._postfix(self._atom())
        node = self._signed(self._power)
        while self._starts_factor(self.peek()) and not self._starts_next_factor():
            node = self._juxtaposed(node)
        return node

    def _starts_next_factor(self) -> bool:
        token = self.peek()
        return token in ("(", "[", "{", "|") or token.removeprefix("\\") in (*FUNCTIONS, "sqrt", "text")


def _is_label(token: str) -> bool:
    """Return whether a character is a circled or bracketed numeral or letter: the name of a statement, no number."""
    name = unicodedata.name(token, "") if len(token) == 1 and not token.isascii() else ""
    return name.startswith(("CIRCLED", "PARENTHESIZED", "NEGATIVE CIRCLED", "DINGBAT")) or name.endswith("FULL STOP")


def _cross_product(node: Node, factor: Node) -> Node:
    """Return the product of two vectors, whose order counts, or that of numbers."""
    last = node.parts[-1] if node.kind == "product" else node
    if not all(each.name.startswith((r"\vec", r"\overrightarrow")) for each in (last, factor)):
        return _product_of(node, factor)
    cross = Node("cross", (last, factor))
    return cross if node is last else _product_of(Node("product", node.parts[:-1]), cross)


def is_ordered_name(text: str) -> bool:
    """Return whether letters without operators are a word or a label, whose order counts: SSA, IX, Tom."""
    if not re.fullmatch("[A-Za-z]{2,}", text):
        return False
    return sum(map(str.isupper, text)) > 1 or (text.istitle() and re.search("[aeiouy]", text) is not None)


def _product_of(node: Node, factor: Node) -> Node:
    """Return a product, without brackets around a product on its left: a long one stays shallow."""
    return Node("product", (*(node.parts if node.kind == "product" else (node,)), factor))
