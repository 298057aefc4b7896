"""Finds the final answer in a response."""

import re
from dataclasses import dataclass

START_OF_THINKING = "<think>"
END_OF_THINKING = "</think>"

_BOX = r"\\(?:boxed|fbox)(?![A-Za-z])"
_TOKEN = re.compile(
    rf"(?P<box>{_BOX}\s*)(?:(?P<brace>\{{)|"
    r"(?P<character>[A-Za-z0-9])(?=(?:[.,;:!?$]|\\[)\]])*(?:\s+[A-Za-z]|\s*\Z|\s*\}))|"
    r"(?P<mention>[A-Za-z]{2}|[.,;:!?'\"`)])|)|"
    rf"\\(?!{_BOX}).|[{{}}]",
    re.DOTALL,
)
"""A box opens, with a brace, with its only character, or not at all; an escaped character; a brace.

The backslash before a box escapes nothing: a box after the end of a row, or one that was escaped once too often."""

_HIDDEN = re.compile(
    r"\\iffalse(?![A-Za-z]).*?(?:\\fi(?![A-Za-z])|\Z)|\\begin\{comment\}.*?(?:\\end\{comment\}|\Z)|<!--.*?(?:-->|\Z)",
    re.DOTALL,
)
_HIDING = ("\\iffalse", "\\begin{comment}", "<!--")
"""How what `_HIDDEN` finds begins."""

_FIRST_BOX = re.compile(_BOX)
_PERCENT_OR_COMMENT = re.compile(r"(?P<percent>\\%|[\d)$}][ \t]*%|[^\s%]%)|%.*")
_PERCENT_AFTER_BRACE = re.compile(r"\}[ \t]*%")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_ANY_BOX = re.compile(rf"\\?{_BOX}\s*")


@dataclass(slots=True)
class _Box:
    begin: int
    """Where its command begins."""
    start: int
    """Where its content begins."""
    end: int
    """Where its content ends."""
    after: int
    """Where what follows it begins."""


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}` after the last `</think>`, None without one.

    `\boxed 5` is a box of one character; without braces around more there is no answer. A response that was cut off has
    none either: one whose last box is open or stands in an open box of its paragraph, or whose last `<think>` is not
    closed. (A chat template may have opened the first one, so that only `</think>` is there.) Boxes in a box are taken
    off: `\boxed{4+\boxed{3}}` is 4+3. What LaTeX or HTML does not show is not read: comments and `\iffalse ... \fi`.
    Time is linear in the length of `text`, also for unbalanced input.
    """
    response = text.rpartition(END_OF_THINKING)[2]
    if START_OF_THINKING in response:
        return None
    response = _shown(response)
    box = _last_box(response)
    if box is None or _PERCENT_AFTER_BRACE.search(response, response.rfind("\n", 0, box.begin) + 1, box.begin):
        return None  # behind a percent sign that may begin a comment
    return _ANY_BOX.sub("", response[box.start : box.end]).strip()


def _shown(response: str) -> str:
    """Return what LaTeX and HTML show of a response."""
    if any(opening in response for opening in _HIDING):
        response = _HIDDEN.sub("", response)
    if "%" not in response:
        return response
    # No comment is longer than its line, and few lines have one.
    lines = response.split("\n")
    return "\n".join(_PERCENT_OR_COMMENT.sub(_percent, line) if "%" in line else line for line in lines)


def _percent(found: re.Match[str]) -> str:
    return found["percent"] or ""


def _last_box(response: str) -> _Box | None:
    """Return the outermost closed box around the last that is opened, None if that one or one around it is open."""
    opened: list[_Box | None] = []
    latest: _Box | None = None
    last: _Box | None = None
    # Braces before the first box close none, open or not: most of a long response is not looked at.
    first = _FIRST_BOX.search(response)
    for token in _TOKEN.finditer(response, first.start()) if first is not None else ():
        if token["mention"]:
            continue
        if token["box"] is not None:
            latest = _Box(token.start(), token.end("box"), token.end(), token.end())
            last = latest if token["character"] else None
            if token["brace"]:
                latest.start += 1
                opened.append(latest)
        elif token.group() == "{":
            opened.append(None)
        elif token.group() == "}" and opened:
            closed = opened.pop()
            if closed is not None and (last is not None or closed is latest):
                closed.end, closed.after = token.start(), token.end()
                last = closed if last is None else _outer(closed, last, response)
    return None if last is None or _is_in_open_box(last, opened, response) else last


def _is_in_open_box(box: _Box, opened: list[_Box | None], response: str) -> bool:
    """Return whether one of the boxes that were never closed was opened before `box` in its paragraph."""
    if not any(opened):
        return False
    paragraph = max((gap.end() for gap in _BLANK_LINE.finditer(response, 0, box.begin)), default=0)
    return any(each is not None and paragraph <= each.begin < box.begin for each in opened)


def _outer(outer: _Box, inner: _Box, response: str) -> _Box:
    """Return the content of the inner box as that of the outer one if nothing else is in it, else the outer box."""
    if response[outer.start : inner.begin].strip() or response[inner.after : outer.end].strip():
        return outer
    return _Box(outer.begin, inner.start, inner.end, outer.after)
