"""Units after an answer: most gold answers have none, two different ones make a different answer.

math-verify would strip them itself, but takes the variables c, d, g, h, l, m, o, s and t for units as well.
"""

import re

_NAMES = (
    *(("mm", "millimeter"), ("cm", "centimeter"), ("m", "meter"), ("km", "kilometer"), ("in", "inch", "inche")),
    *(("ft", "foot", "feet"), ("yd", "yard"), ("mi", "mile"), ("mg", "milligram"), ("g", "gram"), ("kg", "kilogram")),
    *(("lb", "pound"), ("oz", "ounce"), ("ml", "milliliter"), ("l", "liter"), ("s", "sec", "second")),
    *(("min", "minute"), ("h", "hr", "hour"), ("day",), ("week",), ("month",), ("year",), ("cent",), ("dollar",)),
    *(("degree",), ("unit",), ("mph",)),
)
_UNIT_OF = {name + plural: names[0] for names in _NAMES for name in names for plural in ("", "s")}

_TEXT_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}0-9]*)\}(?:\^\{?\d\}?)?$")
_BARE_UNIT = re.compile(rf"(?<=[\d }}])(?:{'|'.join(name for name in _UNIT_OF if len(name) > 1)})(?:\^\{{?\d\}}?)?$")
_HAS_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]|\\(?:text|mathrm|mbox)")


def units_agree(gold: str, answer: str) -> bool:
    """Whether two answers in normal form do not end in two different known units."""
    gold_unit, answer_unit = _unit(gold), _unit(answer)
    return gold_unit is None or answer_unit is None or gold_unit == answer_unit


def without_unit(text: str) -> str:
    r"""Return an answer in normal form without the unit at its end.

    Words in \text and bare units such as `cm` are taken off numbers only: `H_2\text{O}` is no number of O, and after a
    variable `cm` is a product. A known unit in \text is taken off anything but other text.
    """
    found = _TEXT_UNIT.search(text) or _BARE_UNIT.search(text)
    if found is None:
        return text
    rest = text[: found.start()].rstrip()
    is_number = re.search(r"\d", rest) is not None and not _HAS_LETTER.search(rest)
    is_known_unit = _unit(text) is not None and rest != "" and r"\text" not in rest
    return rest if is_number or is_known_unit else text


def _unit(text: str) -> str | None:
    """Return the short name of the unit in \\text at the end, None for none or an unknown one."""
    found = _TEXT_UNIT.search(text)
    if found is None:
        return None
    name = found[1].strip(" .")
    return _UNIT_OF.get(name if len(name) == 1 else name.lower())
