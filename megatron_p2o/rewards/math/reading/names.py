"""Names made of letters: chemical formulas and the letters of choices."""

import re

_ELEMENTS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo "
    "Ag Cd In Sn Sb Te I Xe Cs Ba La Ce W Re Os Ir Pt Au Hg Tl Pb Bi U"
)
_ELEMENT = "(?:" + "|".join(sorted(_ELEMENTS.split(), key=len, reverse=True)) + ")"
_FORMULA = re.compile(rf"(?:{_ELEMENT}(?:_[2-9]|_1\d)?)+")
_FONT = re.compile(r"\\text\{([A-Za-z]+)\}")


def chemical_formula(text: str) -> str:
    """Return a formula such as `H_2SO_4` without fonts and braces, "" for anything else.

    At least two elements and one index tell it from a product. `C_1C_2` is one: an index 1 is not written.
    """
    formula = re.sub(r"_\{(\d+)\}", r"_\1", _FONT.sub(r"\1", text).replace(" ", ""))
    if "_" not in formula or not _FORMULA.fullmatch(formula):
        return ""
    return formula if len(re.findall("[A-Z]", formula)) > 1 else ""


_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer|statement):? ?)?"
    r"(?:\(([A-J])\)(?![A-Za-z](?![A-Za-z]))|([A-J])(?:[).:]|$))(?P<text>.*)",
    re.DOTALL,
)
_OTHER_CHOICE = re.compile(
    r"\b[A-Z]\b|\\(?:to|[Rr]ightarrow|implies)(?![A-Za-z])|"
    r"^ ?[\^_'+*/=!<>&|-]|[,;\x01-\x03]|\b(?:or|and|not|no|isn|maybe|wrong|false|incorrect|either|neither)\b"
)


def choice(text: str) -> str:
    """Return the letter that names the choice in `A. 5`, `(A) 5`, `Option A`; "" for anything else or for two."""
    found = _CHOICE.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip())
    if found is None or _OTHER_CHOICE.search(found["text"]):
        return ""
    return found[1] or found[2]
