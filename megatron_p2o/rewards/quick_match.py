"""Decides the most frequent answers at once: a number against a number."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_p2o.rewards.exact import agree
from megatron_p2o.rewards.expression import MAX_DIGITS

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<decimal>\d*\.\d+)|"
    r"(?P<whole>\d+)?(?:\\frac\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}|\\frac(?P<top1>\d)(?P<bottom1>\d))|"
    r"(?P<slash_top>\d+)/(?P<slash_bottom>\d+)|"
    r"(?P<integer>\d+)"
    r")"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A rational number as it was written."""

    value: Fraction
    is_decimal: bool
    """Written with a point, hence perhaps rounded."""


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Return whether an answer equals the gold one (both in normal form) if both are plain numbers, else None."""
    if gold == answer:
        return True
    if not answer:
        return False
    number, other = parse_number(gold), parse_number(answer)
    if number is None or other is None:
        return None
    return agree(number.value, other.value, number.is_decimal, other.is_decimal)


def parse_number(text: str) -> Number | None:
    """Return an integer, decimal, fraction or mixed number, None for anything else."""
    found = _NUMBER.fullmatch(text)
    if found is None or len(text) > MAX_DIGITS:
        return None
    top = found["top"] or found["top1"] or found["slash_top"]
    if top is not None:
        bottom = int(found["bottom"] or found["bottom1"] or found["slash_bottom"])
        if bottom == 0 or (found["whole"] and top.startswith("-")):
            return None
        value = int(found["whole"] or 0) + Fraction(int(top), bottom)
    else:
        value = Fraction(found["decimal"] or found["integer"])
    return Number(value=-value if found["sign"] == "-" else value, is_decimal=found["decimal"] is not None)
