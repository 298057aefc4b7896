"""Finds the final answer in a response."""

import re

END_OF_THINKING = "</think>"

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TOKEN = re.compile(rf"(?P<box>{_BOX.pattern})|\\.|[{{}}]", re.DOTALL)
"""A box opens, an escaped character (an escaped brace is text), a brace."""


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}` after the last `</think>`, None without one.

    Boxes that are never closed do not count; of nested boxes the innermost does. Time is linear in the length of
    `text`, also for unbalanced input.
    """
    response = text.rpartition(END_OF_THINKING)[2]
    first = _BOX.search(response)
    if first is None:
        return None
    box_starts: list[int | None] = []
    last_start, last_end = -1, -1
    for token in _TOKEN.finditer(response, first.start()):
        if token["box"]:
            box_starts.append(token.end())
        elif token.group() == "{":
            box_starts.append(None)
        elif token.group() == "}" and box_starts:
            start = box_starts.pop()
            if start is not None and start > last_start:
                last_start, last_end = start, token.start()
    return None if last_start < 0 else response[last_start:last_end].strip()
