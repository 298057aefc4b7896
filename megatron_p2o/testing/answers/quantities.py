"""Shapes of answers with something beside a number: units, percentages, money, millions."""

# characters that look like others are among the spellings

import random
from collections.abc import Callable

from megatron_p2o.testing.answers.record import Made

_UNITS = [
    ("cm", "centimeters", ["m", "mm", "kg"]),
    ("mL", "milliliters", ["L", "mm"]),
    ("MeV", "MeV", ["eV", "keV", "meV"]),
    ("kg", "kilograms", ["g", "km", "mg"]),
    ("m/s", "meters per second", ["km/h", "m/s^2", "m"]),
    ("hours", "hr", ["minutes", "days"]),
    ("miles", "mile", ["kilometers", "feet"]),
    ("N", "newtons", ["kN", "J"]),
    ("square feet", "square foot", ["feet", "cubic feet", "square inches"]),
    ("p.m.", "PM", ["a.m.", "AM"]),
    ("dollars", "dollar", ["cents", "euros"]),
]


def _unit(generator: random.Random) -> Made:
    name, same, others = generator.choice(_UNITS)
    value = generator.randint(2, 300)
    gold = rf"{value}\text{{ {name}}}"
    right = [
        ("synonym", rf"{value}\text{{ {same}}}"),
        ("roman", rf"{value}\,\mathrm{{{name.replace(' ', '~')}}}"),
        ("decimal", rf"{value}.0\text{{ {name}}}"),
        ("unknown", rf"x={value}\text{{ {name}}}"),
    ]
    if name not in ("p.m.",):
        right.append(("no unit", str(value)))
    wrong = [
        *(("unit", rf"{value}\text{{ {other}}}") for other in others),
        ("value", rf"{value + 1}\text{{ {name}}}"),
        ("sign", rf"-{value}\text{{ {name}}}"),
        ("million", rf"{value}\text{{ million {name}}}"),
    ]
    return Made(gold, right, wrong)


def _power_of_unit(generator: random.Random) -> Made:
    value, power = generator.randint(2, 90), generator.choice([2, 3])
    gold = rf"{value}\text{{ cm}}^{power}"
    words = {2: "square", 3: "cubic"}[power]
    right = [
        ("braced", rf"{value}\,\mathrm{{cm}}^{{{power}}}"),
        ("words", rf"{value}\text{{ {words} centimeters}}"),
        ("character", rf"{value}\text{{ cm}}{'²³'[power - 2]}"),
        ("no unit", str(value)),
    ]
    wrong = [
        ("exponent", rf"{value}\text{{ cm}}^{5 - power}"),
        ("no exponent", rf"{value}\text{{ cm}}"),
        ("unit", rf"{value}\text{{ m}}^{power}"),
        ("words", rf"{value}\text{{ {'square' if power == 3 else 'cubic'} centimeters}}"),
        ("value", rf"{value}\,^{power}\text{{ cm}}"),
    ]
    return Made(gold, right, wrong)


def _percent(generator: random.Random) -> Made:
    value = generator.randint(2, 98)
    if generator.random() < 0.5:
        right = [("sign", rf"{value}\%"), ("word", rf"{value}\text{{ percent}}"), ("plain", rf"{value}%")]
        wrong = [("value", rf"{value + 1}\%"), ("hundredth", str(value / 100)), ("tenth", rf"0.{value}\%")]
        return Made(str(value), right, wrong, "What percent of them are red?")
    gold = rf"{value}\%"
    right = [("no sign", str(value)), ("decimal", f"{value / 100:.2f}"), ("word", rf"{value}\text{{ percent}}")]
    wrong = [
        ("value", rf"{value + 1}\%"),
        ("sign", rf"-{value}\%"),
        ("twice", rf"{value / 100:.2f}\%"),
        ("more", str(value * 100)),
    ]
    return Made(gold, right, wrong)


def _money(generator: random.Random) -> Made:
    value = generator.randint(1000, 99_999)
    cents = generator.randint(10, 99)
    gold = rf"\${value}.{cents}"
    right = [
        ("no sign", f"{value}.{cents}"),
        ("commas", rf"\${value:,}.{cents}"),
        ("words", rf"{value}.{cents}\text{{ dollars}}"),
        ("tight", rf"\${value:,}.{cents}".replace(",", r",\!")),
    ]
    wrong = [
        ("cents", rf"{value}.{cents}\text{{ cents}}"),
        ("pounds", f"£{value}.{cents}"),
        ("digit", rf"\${value + 1}.{cents}"),
        ("list", rf"\${value},{cents}"),
    ]
    return Made(gold, right, wrong)


def _scale(generator: random.Random) -> Made:
    value, (word, zeros) = (
        generator.randint(2, 900),
        generator.choice([("thousand", 3), ("million", 6), ("billion", 9)]),
    )
    gold = generator.choice([rf"{value}\text{{ {word}}}", str(value * 10**zeros)])
    right = [
        ("digits", str(value * 10**zeros)),
        ("word", rf"{value}\text{{ {word}}}"),
        ("power", rf"{value}\times 10^{zeros}"),
        ("commas", f"{value * 10**zeros:,}"),
        ("dollars", rf"{value}\text{{ {word} dollars}}"),
    ]
    wrong = [
        ("no word", str(value)),
        ("other word", rf"{value}\text{{ {'million' if word != 'million' else 'thousand'}}}"),
    ]
    wrong += [("value", rf"{value + 1}\text{{ {word}}}"), ("twice", rf"{value * 10**zeros}\text{{ {word}}}")]
    return Made(gold, right, wrong)


SHAPES: dict[str, Callable[[random.Random], Made]] = {
    "unit": _unit,
    "power of a unit": _power_of_unit,
    "percent": _percent,
    "money": _money,
    "million": _scale,
}
