"""Looks at answers as LaTeX text, without evaluating them."""

import re

OPENING = "([{"
CLOSING = ")]}"

_REWRITES = (
    (re.compile(r"\\[()\[\]]|\\\$|\$|\\displaystyle(?![A-Za-z])|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;:!> ]|~|\\q?quad(?![A-Za-z])|\\thinspace(?![A-Za-z])"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile("[\u2212\u2013]"), "-"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:text|mathrm)\{\s*percent\s*\}"), r"\\%"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<=[^\w]) | (?=[^\w])"), ""),
)
"""Spellings that do not change an answer. A space stays between two word characters: `12 45` is not `1245`."""

_BRACKET = re.compile(r"\\[{}]|\\.|[()\[\]{}]")


def normal_form(text: str) -> str:
    """Return an answer with one spelling of spacing, fractions, minus signs and brackets, without a final full stop."""
    # A double backslash ends a row of a matrix: its second half does not belong to what follows.
    rows = [_rewritten(row) for row in text.split(r"\\")]
    return r"\\".join(rows).strip().removesuffix(".").strip()


def _rewritten(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def nesting_depth(text: str) -> int:
    """Return how deeply brackets of any kind are nested; unclosed ones count."""
    depth = deepest = 0
    for token in _BRACKET.finditer(text):
        bracket = token.group()[-1]
        if bracket in OPENING:
            depth += 1
            deepest = max(deepest, depth)
        elif bracket in CLOSING:
            depth -= 1
    return deepest


def split_list(text: str) -> tuple[str, list[str]]:
    r"""Return the kind of brackets around a list ("()", "[)", "{}", "" for none) and its comma-separated parts.

    Text without a comma outside of inner brackets is one part without brackets, brackets or not: `(5)` is 5.
    """
    kind, inner = _outer_brackets(text)
    parts = split_at(inner, ",")
    if len(parts) > 1:
        return kind, parts
    parts = split_at(text, ",")
    return "", parts if len(parts) > 1 else [inner]


def split_at(text: str, separator: str) -> list[str]:
    """Return the parts between separators that stand outside all brackets, without surrounding blanks."""
    parts: list[str] = []
    start = depth = 0
    for token in re.finditer(rf"{_BRACKET.pattern}|{re.escape(separator)}", text):
        bracket = token.group()[-1]
        if token.group() == separator:
            if depth == 0:
                parts.append(text[start : token.start()].strip())
                start = token.end()
        elif bracket in OPENING:
            depth += 1
        elif bracket in CLOSING:
            depth -= 1
    return [*parts, text[start:].strip()]


def _outer_brackets(text: str) -> tuple[str, str]:
    """Return the two characters of the brackets that enclose all of `text` ("" for none) and what they enclose."""
    depth = 0
    first = _BRACKET.match(text)
    if first is None or first.group()[-1] not in OPENING or first.group() == "{":
        return "", text
    for token in _BRACKET.finditer(text):
        bracket = token.group()[-1]
        if bracket in OPENING:
            depth += 1
        elif bracket in CLOSING:
            depth -= 1
            if depth == 0:
                if token.end() < len(text) or token.group() == "}":
                    return "", text
                return first.group()[-1] + bracket, text[first.end() : token.start()].strip()
    return "", text
