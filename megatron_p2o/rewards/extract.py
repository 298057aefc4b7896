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

_COMMENT_LINE = re.compile(r"^[ \t]*%.*$", re.MULTILINE)
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
    none either: one whose last box is open, or whose last `<think>` is not closed. (A chat template may have opened the
    first one, so that only `</think>` is there.) Boxes in a box are taken off: `\boxed{4+\boxed{3}}` is 4+3. A line
    that begins with `%` is a comment. Time is linear in the length of `text`, also for unbalanced input.
    """
    response = text.rpartition(END_OF_THINKING)[2]
    if START_OF_THINKING in response:
        return None
    response = _COMMENT_LINE.sub("", response)
    box = _last_box(response)
    return None if box is None else _ANY_BOX.sub("", response[box.start : box.end]).strip()


def _last_box(response: str) -> _Box | None:
    """Return the outermost closed box around the last that is opened, None if that one is not closed."""
    opened: list[_Box | None] = []
    latest: _Box | None = None
    last: _Box | None = None
    for token in _TOKEN.finditer(response):
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
    return last


def _outer(outer: _Box, inner: _Box, response: str) -> _Box:
    """Return the content of the inner box as that of the outer one if nothing else is in it, else the outer box."""
    if response[outer.start : inner.begin].strip() or response[inner.after : outer.end].strip():
        return outer
    return _Box(outer.begin, inner.start, inner.end, outer.after)
