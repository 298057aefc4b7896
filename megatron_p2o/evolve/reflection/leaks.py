"""Finds an answer in a template by its value, however it is spelled: 3/7 is \\frac{3}{7}, 1,234 is 1234."""

# ruff: noqa: RUF001  # characters that look like others are the subject

import re
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction

Token = str | Fraction
"""A word or symbol in lower case, or the value of a number."""

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([⁰¹²³⁴-⁹]+)", r"^\1"),
        (r"√", " sqrt "),
        (r"°|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree", " degrees "),
        (r"\\(?:text[a-z]*|math[a-z]+|mbox|operatorname|left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\(?:times|cdot)(?![A-Za-z])|×|·|⋅", "*"),
        (r"\*\*", "^"),
        (r"\\?%|\bper ?cent\b", "%"),
    )
)
_FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_MIXED = re.compile(r"(?<!\d)(\d{1,9})\s*(?:\\frac\s*\{(\d{1,9})\}\s*\{(\d{1,9})\})")
_GROUP_SEPARATOR = re.compile(r"(?<=\d)(?:,\\!|\{,\}|\\,|,)(?=\d{3}(?!\d))")
_NUMBER = r"\d{1,400}(?:\.\d{1,400})?(?:e[+-]?\d{1,3}(?![a-z\d]))?"
_TOKEN = re.compile(rf"{_NUMBER}|[^\W\d_]+|[^\s\w]|_")

IGNORED_SYMBOLS = frozenset("$\\,;{}()[].")
"""Typesetting that may differ between an answer and its mention."""

MIN_LEAK_CHARACTERS = 3
"""An answer with fewer letters and digits ("7", "x") stands in any instruction by chance."""

MAX_POWER = 64
"""Largest exponent that is computed; more stays as it is written."""


def leaked_answer(template: str, answers: Iterable[str]) -> str | None:
    """Return the first non-trivial answer that `template` contains as a run of tokens; None when there is none.

    Numbers are compared by value, whether written as decimals, fractions, percentages, powers, or with separated
    thousands.
    """
    mentions = _readings(template)
    for answer in answers:
        for wanted in _readings(answer):
            if _is_telling(wanted) and any(_contains(tokens, wanted) for tokens in mentions):
                return answer
    return None


def _contains(tokens: Sequence[Token], wanted: Sequence[Token]) -> bool:
    starts = (start for start, token in enumerate(tokens) if token == wanted[0])
    return any(tokens[start : start + len(wanted)] == wanted for start in starts)


def _readings(text: str) -> list[list[Token]]:
    """Return the tokens of `text`, once with `1,234` as a number and once as two."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _MIXED.sub(lambda found: f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}", text)
    text = _FRACTION.sub(r" \1/\2 ", text)
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").replace("\N{FRACTION SLASH}", "/").lower()
    joined = _GROUP_SEPARATOR.sub("", text)
    return [_tokens(each) for each in dict.fromkeys((joined, text))]


def _tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    for found in _TOKEN.findall(text):
        if found in IGNORED_SYMBOLS:
            continue
        tokens.append(Fraction(found) if found[0].isdecimal() and found.isascii() else found)
        if found == "%" and len(tokens) > 1 and isinstance(value := tokens[-2], Fraction):
            tokens[-2:] = [value / 100]
    tokens = _combined(_combined(tokens, "^"), "*/")
    kept = [token for token in tokens if token != "*"]
    return kept[1:] if kept[:1] == ["-"] else kept


def _combined(tokens: Iterable[Token], signs: str) -> list[Token]:
    """Replace operations on two numbers, such as `3 / 7`, by their values, from left to right."""
    combined: list[Token] = []
    for token in tokens:
        combined.append(token)
        if len(combined) < 3 or not isinstance(token, Fraction):
            continue
        left, sign = combined[-3:-1]
        if not isinstance(left, Fraction) or not isinstance(sign, str) or sign not in signs:
            continue
        value = _value(left, sign, token)
        if value is not None:
            combined[-3:] = [value]
    return combined


def _value(left: Fraction, sign: str, right: Fraction) -> Fraction | None:
    if sign == "/":
        return left / right if right else None
    if sign == "*":
        return left * right
    is_short = right.denominator == 1 and abs(right) <= MAX_POWER and 0 < abs(left.numerator) < 10**6
    return left ** int(right) if sign == "^" and is_short else None


def _is_telling(tokens: Sequence[Token]) -> bool:
    """Return whether these tokens identify an answer, unlike a short number or a single word such as "none"."""
    if len(tokens) == 1:
        (token,) = tokens
        if isinstance(token, str):
            return False
        return abs(token) >= 10 ** (MIN_LEAK_CHARACTERS - 1) if token.denominator == 1 else token.denominator > 2
    lengths = [len(str(token)) for token in tokens if isinstance(token, Fraction) or token.isalnum()]
    return sum(lengths) >= MIN_LEAK_CHARACTERS
