"""Refuses answers that algebra must not see: endless ones, and ones that math-verify accepts although they differ."""

import re

from megatron_p2o.rewards.latex import nesting_depth, split_list

MAX_ANSWER_CHARACTERS = 400
"""Longest answer that is looked at, unless the gold answer is long too."""

MAX_NESTING = 25
"""Deepest brackets in an answer, unless the gold answer is deep too."""

COSTLY_FORMS = (
    re.compile(r"\^\{?\(?-?\d+\^|\^\{[^{}]*\d\^"),
    re.compile(r"\^\{?\(?-?\d{5,}|\)\^\{?-?\d{3,}"),
    re.compile(r"![)}]*!|\d{4,}[)}]*!"),
    re.compile(r"\d{40,}"),
    re.compile(r"binom\{?\d{4,}"),
    re.compile(r"\\(?:sum|prod|i{0,3}int|oint|lim|det)(?![A-Za-z])"),
    re.compile(r"\\begin\{"),
)
r"""Towers of powers, huge exponents, factorials of factorials, long numerals, huge binomials, operations over a range,
matrices: refused unless the gold answer has the same form."""

_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*([A-Za-z]+)\.?\s*\}(?:\^\{?\d\}?)?$")
_UNITS = (
    *(("mm", "millimeter"), ("cm", "centimeter"), ("m", "meter"), ("km", "kilometer"), ("in", "inch", "inches")),
    *(("ft", "foot", "feet"), ("yd", "yard"), ("mi", "mile"), ("mg", "milligram"), ("g", "gram"), ("kg", "kilogram")),
    *(("lb", "pound"), ("oz", "ounce"), ("ml", "milliliter"), ("l", "liter"), ("s", "sec", "second")),
    *(("min", "minute"), ("h", "hr", "hour"), ("day",), ("week",), ("month",), ("year",), ("cent",), ("dollar",)),
)
_UNIT_OF = {name + plural: names[0] for names in _UNITS for name in names for plural in ("", "s")}


def is_too_long(gold: str, answer: str) -> bool:
    """Whether the answer is far longer than any answer to this problem: decided before anything reads it."""
    return len(answer) > max(MAX_ANSWER_CHARACTERS, 4 * len(gold))


def is_refused(gold: str, answer: str) -> bool:
    """Whether the answer (both in normal form) is incorrect for its form alone."""
    if nesting_depth(answer) > max(MAX_NESTING, 2 * nesting_depth(gold)):
        return True
    if any(form.search(answer) and not form.search(gold) for form in COSTLY_FORMS):
        return True
    return not (_units_agree(gold, answer) and _brackets_agree(gold, answer))


def _units_agree(gold: str, answer: str) -> bool:
    """Two known units must be the same; a missing or unknown one is let pass: many gold answers have none."""
    gold_unit, answer_unit = _unit(gold), _unit(answer)
    return gold_unit is None or answer_unit is None or gold_unit == answer_unit


def _unit(text: str) -> str | None:
    found = _UNIT.search(text)
    return None if found is None else _UNIT_OF.get(found[1].lower())


def _brackets_agree(gold: str, answer: str) -> bool:
    """A point is no set, an open interval no closed one. A list without brackets is let pass."""
    gold_brackets, answer_brackets = split_list(gold)[0], split_list(answer)[0]
    return not gold_brackets or not answer_brackets or gold_brackets == answer_brackets
