"""Finds the final answer in a response."""

import re

START_OF_THINKING = "<think>"
END_OF_THINKING = "</think>"

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_CUT_OFF = re.compile(r"\\(?:boxed|fbox)\s*\Z")
_TOKEN = re.compile(rf"(?P<box>{_BOX.pattern})|\\.|[{{}}]", re.DOTALL)
"""A box opens, an escaped character (an escaped brace is text), a brace."""


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}` after the last `</think>`, None without one.

    A response that was cut off has no answer: one whose last box is open, or whose last `<think>` is not closed. (A
    chat template may have opened the first one, so that only `</think>` is there.) Of nested boxes the innermost
    counts. Time is linear in the length of `text`, also for unbalanced input.
    """
    response = text.rpartition(END_OF_THINKING)[2]
    first = _BOX.search(response)
    if first is None or START_OF_THINKING in response or _CUT_OFF.search(response):
        return None
    box_starts: list[int | None] = []
    latest, last_start, last_end = -1, -1, -1
    for token in _TOKEN.finditer(response, first.start()):
        if token["box"]:
            latest = token.end()
            box_starts.append(latest)
        elif token.group() == "{":
            box_starts.append(None)
        elif token.group() == "}" and box_starts:
            start = box_starts.pop()
            if start is not None and start > last_start:
                last_start, last_end = start, token.start()
    return response[last_start:last_end].strip() if last_start == latest else None
