"""Cuts an expression in LaTeX into tokens, and walks over them."""

import re
import unicodedata
from fractions import Fraction

from megatron_p2o.rewards.math.reading.tree import FUNCTIONS, MAX_DIGITS, Node, NotUnderstoodError

MAX_EXPONENT_DIGITS = 4
"""Longest exponent of a number such as 1e300 that is read."""

_WORDS = {"pi": r"\pi", "infinity": r"\infty", "sqrt": r"\sqrt", **{name: rf"\{name}" for name in FUNCTIONS}}
"""Names that mean the same without a backslash, when nothing else touches them."""

_TOKEN = re.compile(
    r"(?P<repeating>(?:\d+)?\.\d*(?:\\(?:overline|bar|dot)(?: ?\d|\{\d+\})|\(\d+\)))"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+(?![A-Za-z^]))?)"
    r"|(?P<command>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]{2,}(?![A-Za-z]))|(?P<other>[^\s])",
    re.DOTALL,
)
_REPEATED = re.compile(r"(?:\\[a-z]+[ {]?|\()(\d+)[})]?$")


class Tokens:
    """A position in the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        for found in _TOKEN.finditer(text):
            word = found["word"]
            tokens = list(word) if word and word not in _WORDS else [_WORDS[word] if word else found.group()]
            self._tokens += tokens
        self.position = 0
        """Index of the next token."""

    def peek(self) -> str:
        """Return the next token, "" at the end."""
        return self._tokens[self.position] if self.position < len(self._tokens) else ""

    def following(self) -> list[str]:
        """Return the tokens from the next one on."""
        return self._tokens[self.position :]

    def take(self) -> str:
        """Return the next token and go on behind it."""
        token = self.peek()
        if token == "":
            raise NotUnderstoodError("ends too early")
        self.position += 1
        return token

    def expect(self, token: str) -> None:
        """Go on behind `token`."""
        if self.take() != token:
            raise NotUnderstoodError(f"{token!r} expected")

    def split_number(self) -> None:
        """Split a number that comes next into its digits."""
        token = self.peek()
        if len(token) > 1 and token.isdigit():
            self._tokens[self.position : self.position + 1] = list(token)

    def raw(self) -> str:
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


def number_of(token: str) -> Node:
    """Return the number that a token spells."""
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


def is_label(token: str) -> bool:
    """Return whether a character is a circled or bracketed numeral or letter: the name of a statement, no number."""
    name = unicodedata.name(token, "") if len(token) == 1 and not token.isascii() else ""
    return name.startswith(("CIRCLED", "PARENTHESIZED", "NEGATIVE CIRCLED", "DINGBAT")) or name.endswith("FULL STOP")
