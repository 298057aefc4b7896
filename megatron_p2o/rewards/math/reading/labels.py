"""Splits an answer from the words, unit or currency beside it."""

import re

from megatron_p2o.rewards.math.reading.units import NO_LABEL, Label, is_unit_symbol, read_label

TEXT = r"\\text\{[^{}]*\}(?:\^\{?-?\d+\}?)?"
_LABEL = re.compile(rf"(?:(?<!^)(?:\\cdot|/)?{TEXT})(?:(?:\\cdot|/|\\times)?{TEXT})*$")
_FRACTION_OF_UNITS = re.compile(rf"\\frac\{{({TEXT})\}}\{{({TEXT})\}}$")
_TEMPERATURE = re.compile(r"\\degree ?(?:\\text\{([CF])\}|([CF]))$")
_TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}
_BARE_UNIT = re.compile(r"(?<=[\d }])([A-Za-z]+)((?:\^\{?\d\}?)?)$")
_BARE_WORDS = re.compile(r"^([^A-Za-z\\]*\d) ?((?<= )[A-Za-z]{3}[A-Za-z ]*|[AaPp]\.?[Mm]\.?)$")
"""Words without \\text after a number: `5 apples`, `3 PM`."""

_CURRENCY = re.compile(r"^([+-]?)(\\\$|€|£|¥)(?=.)|(\\\$|€|£|¥)$")
_CURRENCIES = {"\\$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen"}


def split_label(text: str) -> tuple[str, Label]:
    r"""Return an answer without the words, unit or currency beside it, and what they say.

    Words in \text after a lone letter or other words are no label: `\triangle\text{ABC}` is a name.
    """
    text = _BARE_WORDS.sub(r"\1\\text{\2}", text)
    currency = _CURRENCY.search(text)
    if currency:
        core, label = split_label(currency[1] + text[currency.end() :] if currency[2] else text[: currency.start()])
        name = _CURRENCIES[currency[2] or currency[3]]
        return core, Label("unit", f"{name}^1", label.factor) if label.kind in ("none", "unit") else label
    temperature = _TEMPERATURE.search(text)
    if temperature:
        return text[: temperature.start()], Label("unit", _TEMPERATURES[temperature[1] or temperature[2]])
    text = _FRACTION_OF_UNITS.sub(r"\1/\2", text)
    found = _LABEL.search(text)
    if found and found.start() > 0 and re.search(r"\d|\\pi|[A-Za-z](?![{}])", text[: found.start()]):
        core, words = text[: found.start()].strip(), found.group()
        if re.search(r"[\d)}\]%A-Za-z!]$", core) and not re.search(r"\\text|[_^]$", core):
            label = read_label(words.removeprefix(r"\cdot"))
            has_letters = re.search(r"(?<![\\A-Za-z])[A-Za-z]|\\(?:triangle|angle)", core)
            if label.kind == "unit" or not has_letters:
                return core, label
    bare = _BARE_UNIT.search(text)
    if bare and is_unit_symbol(bare[1]) and not re.search(r"(?<![\\A-Za-z])[A-Za-z]", text[: bare.start()]):
        return text[: bare.start()].strip(), read_label(rf"\text{{{bare[1]}}}{bare[2]}")
    degree = re.fullmatch(r"(-?[\d.]+|-?\\frac\{\d+\}\{\d+\})\\degree", text)
    if degree:
        return degree[1], Label("unit", "degree^1")
    return text, NO_LABEL
