r"""Reads the words beside a number: a unit, a factor such as million, the things counted, or something else."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

_PREFIXES = {
    "k": "kilo",
    "M": "mega",
    "G": "giga",
    "m": "milli",
    "c": "centi",
    "d": "deci",
    "n": "nano",
    "T": "tera",
    "u": "micro",
}
_PREFIXED = {
    **{"m": "meter", "g": "gram", "L": "liter", "l": "liter", "s": "second", "N": "newton", "J": "joule", "W": "watt"},
    **{"V": "volt", "A": "ampere", "Hz": "hertz", "eV": "electronvolt", "Pa": "pascal", "K": "kelvin", "C": "coulomb"},
    **{"mol": "mole", "cal": "calorie", "F": "farad", "T": "tesla", "erg": "erg", "pc": "parsec", "bar": "bar"},
}
_SYMBOLS = {
    **_PREFIXED,
    **{prefix + unit: _PREFIXES[prefix] + name for prefix in _PREFIXES for unit, name in _PREFIXED.items()},
    **{"in": "inch", "ft": "foot", "yd": "yard", "mi": "mile", "lb": "pound", "oz": "ounce", "gal": "gallon"},
    **{"sec": "second", "min": "minute", "h": "hour", "hr": "hour", "hrs": "hour", "cc": "centimeter^3"},
    **{"mph": "mile/hour", "kph": "kilometer/hour", "kmh": "kilometer/hour", "rpm": "revolution/minute"},
    **{"rad": "radian", "deg": "degree", "AU": "astronomicalunit", "ly": "lightyear", "yr": "year", "wk": "week"},
    **{"ohm": "ohm", "kohm": "kiloohm", "Mohm": "megaohm"},
    **{"sq": "square", "cu": "cubic", "ml": "milliliter", "amu": "dalton", "cents": "cent", "USD": "dollar"},
}
_IRREGULAR = {
    **{"feet": "foot", "inches": "inch", "metre": "meter", "litre": "liter", "henries": "henry", "people": "person"},
    **{"children": "child", "men": "man", "women": "woman", "mice": "mouse", "sheep": "sheep", "fish": "fish"},
    **{"dice": "die", "vertices": "vertex", "indices": "index", "oclock": "clock", "buck": "dollar", "deg": "degree"},
}
_METRIC = "meter gram liter second newton joule watt volt ampere hertz electronvolt pascal kelvin mole calorie"
_OTHER_UNITS = (
    "kiloohm megaohm "
    "inch foot yard mile pound ounce gallon quart pint cup ton tonne acre hectare minute hour day week month year cent "
    "dollar euro rupee yen degree radian unit coulomb farad tesla ohm erg parsec bar angstrom lightyear revolution "
    "astronomicalunit dalton celsius fahrenheit decade century fortnight knot"
)
_NAMES = frozenset(
    [
        *_OTHER_UNITS.split(),
        *_METRIC.split(),
        *(prefix + name for prefix in _PREFIXES.values() for name in _METRIC.split()),
    ]
)
"""Units by name, in the singular."""

FACTORS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Words that multiply the number before them."""

_CHANGING = (
    "a an the one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty half halves "
    "third thirds fourth fourths quarter fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth "
    "tenths hundredths thousandths tens ones twos threes squared cubed plus minus times less more fewer than not isnt "
    "no nor or and is are was were has as its this thus percents at least most over under above below about "
    "except but if when where for exactly only to from with without by wrong false answer answers mod modulo remainder "
    "remainders north south east west left right up down am pm dozens pairs hundreds thousands millions billions "
    "trillions negatives inverse reciprocals always divided factorial base bases digits powers roots squares cubes "
    "multiples decimals does each per quarters lakh lakhs crore crores score scores gross grosses myriad myriads "
    "factorials sines cosines tangents logs logarithms opposites complements conjugates percentage basis decimal "
    "magnitude"
)
_SPEAKING = frozenset(_CHANGING.split())
"""Words that change what a number says: with one of them it is no count of things."""

_FRACTION_WORD = re.compile(r"(?:n|f|nd|red|ie|x|gh|ur)ths?$|illions?$|teens?$")
"""Fractions and number words: sixteenths, millionths, zillions."""

_COUNTED = frozenset(_IRREGULAR.values()) | {"time"}
MAX_WORDS = 3

_PER = re.compile(r"\b(?:an?|each|every) (?=(?:second|minute|hour|day|week|month|year|person)\b)")
_DIMENSION = re.compile(r"(?<=s) (?:old|tall|long|wide|high|deep|away|apart|thick)$")
_IN_TOTAL = re.compile(r"(?:^| )(?:(?:in )?total|in all|altogether)$")
_PARTS_OF = re.compile(r"(?P<counted>.*?) ?of (?:the |an? )?(?P<whole>[a-z]+(?: [a-z]+)?)")
"""`cups of flour`, or of a fraction `of the cake`."""

_WORD = re.compile(r"[A-Za-z]+")
_LONE_TEXT = re.compile(r"^\\text\{([^{}]*)\}$")
_FACTOR = re.compile(r"(?P<slash>/)|\^\{?(?P<exponent>-?\d+)\}?|\\text\{(?P<text>[^{}]*)\}")
_BEFORE = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER = {"squared": 2, "cubed": 3}


@dataclass(frozen=True, slots=True)
class Label:
    """Words beside a number, read."""

    kind: Literal["none", "unit", "thing", "clock", "other"]
    """`thing` is what is counted (apples), `clock` a.m. or p.m., `other` anything that may change the value."""
    name: str = ""
    """One spelling for all that mean the same; of a unit its factors with exponents."""
    factor: int = 1
    """What the number is multiplied by: 1000 for thousand."""


NO_LABEL = Label("none")


def labels_agree(gold: Label, answer: Label) -> bool:
    """Return whether the words beside the answer say the same as those beside the gold one.

    A unit or counted thing may be left out or added; a unit is not another, nor are words that change a value dropped.
    """
    if answer == gold or answer.name == gold.name:
        return True
    if gold.kind == "none":
        return answer.kind != "other" and answer.name != "kelvin^1"  # 5K may be five thousand
    if answer.kind == "none":
        return gold.kind in ("unit", "thing")
    if gold.kind == answer.kind == "thing":
        return set(gold.name.split()) <= set(answer.name.split()) or set(answer.name.split()) <= set(gold.name.split())
    return False


def is_unit_symbol(text: str) -> bool:
    """Return whether letters without \\text, after a number, are a unit: two or more letters that are no product."""
    return (
        len(text) > 1
        and text[0] != "u"
        and (text in _SYMBOLS or _singular(text.lower()) in _NAMES)
        and text not in ("mg", "cm/g")
    )


def in_units(text: str) -> str:
    r"""Return `9.8 m/s^2` as `9.8\text{m}/\text{s}^2`, where the letters behind a number are known to be units."""
    text = re.sub(r"\\Omega ?", "ohm", re.sub(r"\\mu ?", "u", text))
    found = re.fullmatch(r"([+-]?[\d.]+)([A-Za-z/ ]+(?:\^\{?-?\d\}?)?)", text)
    return found[1] + re.sub(r" ?([A-Za-z]+)", r"\\text{\1}", found[2]) if found else text


@lru_cache(maxsize=4096)
def read_label(text: str) -> Label:
    r"""Return what `text` says: one or more \text, with exponents, `\cdot` or `/` between them; "" for no words."""
    if not text:
        return NO_LABEL
    factor, text = _split_factor(_LONE_TEXT.sub(lambda found: _plain(found[1]), text))
    if not text:
        return Label("none", factor=factor)
    clock = re.fullmatch(r"\\text\{([ap])\.?\s?m\.?\}", text.lower())
    if clock:
        return Label("clock", clock[1] + "m", factor)
    unit = _unit(text)
    if unit is not None:
        return Label("unit", unit, factor)
    words = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    name = " ".join(_singular(word) for word in _WORD.findall(words[1].lower())) if words else text
    return Label("thing" if words and _is_counted(words[1]) else "other", name, factor)


def _plain(words: str) -> str:
    r"""Return a \text of words without those that say nothing: old, in total, of the cake."""
    plain = _IN_TOTAL.sub("", _DIMENSION.sub("", _PER.sub("per ", words.strip(" ."))))
    parts = _PARTS_OF.fullmatch(plain)
    if parts and not any(_changes(word) for word in parts["whole"].split()):
        plain = parts["counted"]
    return rf"\text{{{plain}}}" if plain else ""


def _changes(word: str) -> bool:
    return word in _SPEAKING or word in FACTORS or _FRACTION_WORD.search(word) is not None


def _split_factor(text: str) -> tuple[int, str]:
    r"""Return the factor that the words begin with, such as million, and the words after it."""
    found = re.match(r"\\text\{\s*([A-Za-z]+)\s*(?:of )?([^{}]*)\}(.*)", text)
    if found is None or found[1].lower() not in FACTORS:
        return 1, text
    rest = found[2].strip()
    again, following = _split_factor(rf"\text{{{rest}}}" if rest else found[3])
    return FACTORS[found[1].lower()] * again, following + (found[3] if rest else "")


def _is_counted(text: str) -> bool:
    """Return whether words name things: few, none that changes a number, the last in the plural."""
    words = text.strip(" .").lower().split()
    if not 0 < len(words) <= MAX_WORDS or not all(re.fullmatch("[a-z-]+", word) for word in words):
        return False
    if any(map(_changes, words)):
        return False
    last = words[-1]
    return last in _IRREGULAR or _singular(last) in _COUNTED or (len(last) > 3 and last.endswith("s"))


def _singular(word: str) -> str:
    word = word.strip(".")
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    bare = word.removesuffix("s") if len(word) > 2 and not word.endswith("ss") else word
    return _IRREGULAR.get(bare, bare)


def _unit(text: str) -> str | None:
    """Return a product of known units as `meter^1 second^-2`, None if a factor is unknown."""
    exponents: dict[str, int] = {}
    sign = 1
    last: list[tuple[str, int]] = []
    for token in _FACTOR.finditer(text):
        if token["slash"]:
            sign = -1
        elif token["exponent"]:
            for name, power in last:
                exponents[name] += power * (int(token["exponent"]) - 1)
        else:
            factors = _unit_words(token["text"])
            if factors is None:
                return None
            last = [(name, sign * power) for name, power in factors]
            for name, power in last:
                exponents[name] = exponents.get(name, 0) + power
            last = last[-1:]
    return " ".join(f"{name}^{power}" for name, power in sorted(exponents.items()) if power)


def _unit_words(text: str) -> list[tuple[str, int]] | None:
    """Return the units in words such as "square feet", "miles per hour", "kg m/s^2" with their exponents."""
    words = re.findall(r"[A-Za-z]+(?:\^?-?\d)?|/|\d", re.sub(r"\bper\b", "/", text.replace(".", "")))
    factors: list[tuple[str, int]] = []
    sign, power = 1, 1
    for word in words:
        if word == "/":
            sign = -1
            continue
        name, _, exponent = re.sub(r"\^?(-?\d)$", r"^\1", word).partition("^")
        if name.lower() in _AFTER and factors:
            factors[-1] = (factors[-1][0], factors[-1][1] * _AFTER[name.lower()])
        elif name.lower() in _BEFORE:
            power = _BEFORE[name.lower()]
        else:
            known = _known(name)
            if known is None:
                return None
            top, _, bottom = known.partition("/")
            base, _, own = top.partition("^")
            factors.append((base, sign * power * int(own or 1) * int(exponent or 1)))
            if bottom:
                factors.append((bottom, -sign))
            power = 1
    return factors or None


def _known(name: str) -> str | None:
    """Return the one name of a unit; symbols keep their case: mW is not MW."""
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    singular = _singular(name.lower())
    if singular in _NAMES:
        return singular
    lowered = name.lower()
    return _SYMBOLS.get(lowered) if len(name) > 2 and lowered in ("cms", "kms", "hrs", "mins", "secs", "lbs") else None
