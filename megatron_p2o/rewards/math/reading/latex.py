"""Brackets in LaTeX: where they close, how deep they go, what stands between separators outside of them."""

import re
from collections.abc import Iterator

OPENING = "([{"
CLOSING = ")]}"

_BRACKET = re.compile(r"\\[{}]|\\[A-Za-z]+|\\.|[()\[\]{}]", re.DOTALL)


def nesting_depth(text: str) -> int:
    """Return how deeply brackets of any kind are nested; unclosed ones count."""
    return max((depth for _, depth in _brackets(text)), default=0)


def closing_brace(text: str, start: int) -> int | None:
    r"""Return where the brace opened before `start` is closed, None if it is not; `\{` and `\}` are text."""
    depth = 1
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return token.start()
    return None


def outer_brackets(text: str) -> tuple[str, str]:
    """Return the two characters of the brackets that enclose all of `text` and what they enclose.

    "" and the text itself when nothing does. Plain braces group in LaTeX and are taken off.
    """
    while text.startswith("{") and closing_brace(text, 1) == len(text) - 1:
        text = text[1:-1].strip()
    first = _BRACKET.match(text)
    if first is None or first.group()[-1] not in OPENING or first.group() == "{":
        return "", text
    for token, depth in _brackets(text):
        if depth == 0:
            if token.end() < len(text) or token.group() == "}":
                return "", text
            return first.group()[-1] + token.group()[-1], text[first.end() : token.start()].strip()
    return "", text


def split_at(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Return the parts between separators outside all brackets and environments, and the separators."""
    if not separator.search(text):
        return [text.strip()], []
    parts: list[str] = []
    separators: list[str] = []
    start = 0
    for found in separator.finditer(text):
        before = text[start : found.start()]
        if _is_closed(before):
            parts.append(before.strip())
            separators.append(found.group())
            start = found.end()
    return [*parts, text[start:].strip()], separators


def _is_closed(text: str) -> bool:
    depths = [depth for _, depth in _brackets(text)]
    return (not depths or depths[-1] <= 0) and text.count(r"\begin{") == text.count(r"\end{")


def _brackets(text: str) -> Iterator[tuple[re.Match[str], int]]:
    """Yield each bracket and how many are open after it."""
    depth = 0
    for token in _BRACKET.finditer(text):
        bracket = token.group()[-1]
        if len(token.group()) > 2:
            continue
        if bracket in OPENING:
            depth += 1
            yield token, depth
        elif bracket in CLOSING:
            depth -= 1
            yield token, depth


MAX_ANSWER_CHARACTERS = 400
"""Longest answer that is looked at, unless the gold answer is long too."""

MAX_REQUEST_CHARACTERS = 10_000
"""Longest gold and wrong answer together that algebra is asked about: as JSON they fit into the buffer of a pipe."""

MAX_NESTING = 25
"""Deepest brackets in an answer, unless the gold answer is deep too."""

COSTLY_FORMS = (
    re.compile(r"\^\{?\(?-?\d+\^|\^\{[^{}]*\d\^"),
    re.compile(r"\^\{?\(?-?\d{5,}"),
    re.compile(r"![)}]*!|\d{4,}[)}]*!"),
    re.compile(r"binom\{?\d{4,}"),
    re.compile(r"\\(?:sum|prod|i{0,3}int|oint|lim|det)(?![A-Za-z])"),
)
r"""Towers of powers, huge exponents, factorials of factorials, huge binomials, operations over a range:
refused unless the gold answer has the same form."""


_POWER_OF_A_BRACKET = re.compile(r"\)\^\{?-?\d{3,}")
_HIGH_POWER = re.compile(r"\^\{?-?\d{3,}")


def is_too_long(gold: str, answer: str) -> bool:
    """Whether the answer is far longer than any answer to this problem: decided before anything reads it."""
    return len(answer) > max(MAX_ANSWER_CHARACTERS, 4 * len(gold))


def is_refused(gold: str, answer: str) -> bool:
    """Whether the answer (both in normal form) is incorrect for its form alone."""
    if len(gold) + len(answer) > MAX_REQUEST_CHARACTERS:
        return True
    if nesting_depth(answer) > max(MAX_NESTING, 2 * nesting_depth(gold)):
        return True
    if _POWER_OF_A_BRACKET.search(answer) and not _HIGH_POWER.search(gold):
        return True
    if r"\begin{" in answer and r"\begin{" not in gold and not gold.startswith("("):
        return True  # a point may be answered by a column
    return any(form.search(answer) and not form.search(gold) for form in COSTLY_FORMS)
