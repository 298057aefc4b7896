"""Cutting long text, and quoting text of others."""

from megatron_p2o.terminal import printable

MAX_RESPONSE_CHARS = 16_000
"""Of a response on its way to reflection: more would not fit the prompt beside the other examples."""

HEAD_SHARE = 0.5
"""Of what is kept; the rest is tail."""


def shorten(text: str, max_chars: int) -> str:
    """Return `text`, its middle replaced by a note of what is missing when it is longer than `max_chars`."""
    if len(text) <= max_chars:
        return text
    num_head = int(max_chars * HEAD_SHARE)
    num_tail = max_chars - num_head
    missing = len(text) - num_head - num_tail
    tail = text[len(text) - num_tail :]
    return f"{text[:num_head]}\n[... {missing} characters left out ...]\n{tail}"


MAX_QUOTED_CHARS = 200
"""Of what others wrote, in a message."""


def quoted(text: str | bytes) -> str:
    """Return the beginning of `text` on one line, for a message; what a terminal would obey is escaped."""
    head = text[: 4 * MAX_QUOTED_CHARS]
    words = (head.decode(errors="replace") if isinstance(head, bytes) else head).split()
    return printable(" ".join(words))[:MAX_QUOTED_CHARS]
