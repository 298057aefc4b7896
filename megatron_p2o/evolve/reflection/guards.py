"""Refuses templates before they are tried. Every set of rules calls it before anything else reads a new template."""

from collections.abc import Iterable

from megatron_p2o.evolve.reflection.leaks import leaked_answer
from megatron_p2o.evolve.reflection.reflection import SPECIAL_TOKEN
from megatron_p2o.evolve.reflection.reply import SAME_AS_PARENT

MAX_CHARS_PER_TOKEN = 16
"""Most characters per token of an instruction; English has four to five. A longer text is refused without counting its
tokens, which takes a second for every few megabytes."""

TOO_LONG = "longer than evolution.max_template_tokens"


def is_too_long_to_count(text: str, max_template_tokens: int) -> bool:
    """Return whether `text` has more than `evolution.max_template_tokens`, as far as its characters tell."""
    return len(text) > MAX_CHARS_PER_TOKEN * max_template_tokens


def refusal_of(
    text: str, *, parent_text: str, max_template_tokens: int, is_duplicate: bool, answers: Iterable[str]
) -> str:
    """Return why the template `text` may not be tried; "" when it may.

    `answers` are gold answers that it must not tell.
    """
    if not text:
        return "empty"
    if is_too_long_to_count(text, max_template_tokens):
        return TOO_LONG
    if not is_unicode(text):
        return "not Unicode text"
    if text == parent_text.strip():
        return SAME_AS_PARENT
    if is_duplicate:
        return "duplicate"
    if SPECIAL_TOKEN.search(text):
        return "chat markup"
    if leaked_answer(text, answers) is not None:
        return "leaks an answer"
    return ""


def is_unicode(text: str) -> bool:
    """Return whether `text` can be written: half of a surrogate pair cannot."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
