"""Gives the parameter in a family of answers one name: k pi for integer k is n pi for integer n."""

import re
from dataclasses import dataclass

_DOMAIN = r"\\mathbb ?\{?(?P<domain>[ZNR])\}?"
_FRONT = r"(?<![,;\x01 ])[,;\x01 ]*"
"""What separates the parameter from the family, all of it: tried once for each run, which keeps the search linear."""

_TAIL = re.compile(
    rf"{_FRONT}(?:\\text\{{[, ]*(?:where|for|with)(?: (?:all|any|some|every|each))? ?\}}[,\x01 ]*)?"
    rf"\(?(?P<letter>[A-Za-z])\\in ?{_DOMAIN}\)?$"
)
_WORDS = re.compile(
    rf"{_FRONT}\\text\{{[, ]*(?:where|for|with)(?: (?:all|any|some|every|each|an))?(?: integers?)? ?\}}"
    r"(?P<letter>[A-Za-z])"
    r"(?P<is>\\text\{ ?is (?:an|any) integer\.?\})?$"
)
_TOKEN = re.compile(r"\\[A-Za-z]+|\\text\{[^{}]*\}|[A-Za-z]")


@dataclass(frozen=True, slots=True)
class _ParametricAnswer:
    text: str
    letter: str
    domain: str


def without_parameters(gold: str, answer: str) -> tuple[str, str]:
    r"""Return both without a final `k\in\mathbb{Z}`, with the letter of the gold one in the answer.

    As they are where that would change what one of them says: another domain, or letters with other meanings.
    """
    one, other = _parametric_answer(gold), _parametric_answer(answer)
    if one is None and other is None:
        return gold, answer
    if one is None and other is not None:
        is_harmless = other.domain in "ZR" and other.letter in _letters(gold)
        return (gold, other.text) if is_harmless else (gold, answer)
    assert one is not None
    text = answer if other is None else other.text
    letters, own = _letters(text), _letters(one.text)
    if other is not None and other.domain != one.domain:
        return gold, answer
    extra = letters - own
    letter = other.letter if other is not None else extra.pop() if len(extra) == 1 else one.letter
    if letter != one.letter:
        if one.letter in letters or letter in own:
            return gold, answer
        text = _TOKEN.sub(lambda found: one.letter if found.group() == letter else found.group(), text)
    return one.text, text


def _parametric_answer(text: str) -> _ParametricAnswer | None:
    found = _TAIL.search(text)
    words = _WORDS.search(text) if found is None else None
    if words and not (words["is"] or "integer" in words.group()):
        return None
    tail = found or words
    if tail is None or tail.start() == 0 or tail["letter"] not in _letters(text[: tail.start()]):
        return None
    return _ParametricAnswer(text[: tail.start()], tail["letter"], found["domain"] if found else "Z")


def _letters(text: str) -> set[str]:
    return {found for found in _TOKEN.findall(text) if len(found) == 1}
