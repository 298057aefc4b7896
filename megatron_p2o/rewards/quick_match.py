"""Decides answers that need no algebra: numbers, lists of numbers, words."""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_p2o.rewards.latex import split_at, split_list

TOLERANCE = Fraction(1, 1_000_000)
"""Decimals agree within this, relative to the smaller of 1 and the gold answer: 1/3 is 0.333333, 1e-9 is not 0."""

MAX_DIGITS = 1000
"""Longer numerals are compared as text only: converting them takes quadratic time."""

MIN_WORD_LETTERS = 4
"""Letters without spaces or \\text are a word from this length on, a product of variables below it."""

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<grouped>\d{1,3}(?:[, ]\d{3})+)|"
    r"(?P<decimal>\d*\.\d+)|"
    r"(?P<whole>\d+)?(?:\\frac\{(?P<top>-?\d+)\}\{(?P<bottom>\d+)\}|\\frac(?P<top1>\d)(?P<bottom1>\d))|"
    r"(?P<slash_top>\d+)/(?P<slash_bottom>\d+)|"
    r"(?P<integer>\d+)"
    r")(?P<degree>\^\{?\\circ\}?|°)?(?P<percent>\\?%)?"
)
_BASED = re.compile(r"\(?(\d[0-9A-F]*)\)?_\{?(\d+)\}?")
_SPACED_INTEGERS = re.compile(r"-?\d+(?: -?\d+)+")
_ONLY_NUMERALS = re.compile(r"[\d., ]*")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z '-]*")
_RELATION = re.compile(r"[=<>]|\\(?:neq?|[lg]eq?|approx|equiv|in)(?![A-Za-z])")
_LONE_EQUALS = re.compile(r"(?<![<>!:=])=(?!=)")
_NUMERIC_COMMAND = re.compile(r"\\(?:frac|sqrt|cdot|times|div|pm|pi|circ)(?![A-Za-z])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    """A rational number as it was written."""

    value: Fraction
    """A percentage is already divided by 100."""
    is_decimal: bool
    """Written with a point, hence perhaps rounded."""
    is_percent: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberList:
    """Numbers and the brackets around them."""

    numbers: tuple[Number, ...]
    brackets: str
    """Such as "()" or "[)"; "" for none."""
    is_ordered: bool


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Return whether the answer equals the gold answer (both in normal form), None when that takes algebra."""
    if answer == "":
        return False
    if gold == answer:
        return True
    if _BASED.fullmatch(gold) or _BASED.fullmatch(answer):
        return _digits_and_base(gold) == _digits_and_base(answer)
    gold_numbers, answer_numbers = parse_numbers(gold), parse_numbers(answer)
    if gold_numbers is not None and answer_numbers is not None:
        return _lists_agree(gold_numbers, answer_numbers)
    if gold_numbers is not None and _ONLY_NUMERALS.fullmatch(answer):
        return False
    return _words_verdict(gold, answer)


def sides_to_check(gold: str, answer: str) -> tuple[str, ...]:
    """Return what must equal the gold answer: of `x=6/2=3` the sides `6/2` and `3`, of `1+1=3` both.

    Sides with variables only say what was computed. An answer to a gold answer that is itself a relation, and a list of
    equations, is one side.
    """
    if _RELATION.search(gold) or not _LONE_EQUALS.search(answer) or len(split_at(answer, ",")) > 1:
        return (answer,)
    sides = split_at(answer, "=")
    return (*(side for side in sides[:-1] if not re.search("[A-Za-z]", _NUMERIC_COMMAND.sub("", side))), sides[-1])


def parse_numbers(text: str) -> NumberList | None:
    """Return a number, or numbers in a list, None for anything else."""
    number = parse_number(text)
    if number is not None:
        return NumberList(numbers=(number,), brackets="", is_ordered=True)
    if _SPACED_INTEGERS.fullmatch(text):
        brackets, parts, is_ordered = "", text.split(" "), True
    else:
        brackets, parts = split_list(text)
        is_ordered = brackets not in ("", "{}")
    numbers = [parse_number(part) for part in parts]
    known = tuple(number for number in numbers if number is not None)
    return NumberList(numbers=known, brackets=brackets, is_ordered=is_ordered) if len(known) == len(parts) else None


def parse_number(text: str) -> Number | None:
    """Return an integer, decimal, fraction, mixed number or percentage, None for anything else."""
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
        numeral = found["grouped"] or found["decimal"] or found["integer"]
        value = Fraction(re.sub("[, ]", "", numeral))
    value = -value if found["sign"] == "-" else value
    is_percent = found["percent"] is not None
    return Number(
        value=value / 100 if is_percent else value, is_decimal=found["decimal"] is not None, is_percent=is_percent
    )


def _digits_and_base(text: str) -> tuple[str, int] | None:
    """Return the digits and the base of `120_8`; no base is base ten. math-verify would drop the base."""
    based = _BASED.fullmatch(text)
    if based is not None:
        return based[1], int(based[2])
    return (text, 10) if text.isdecimal() else None


def _lists_agree(gold: NumberList, answer: NumberList) -> bool:
    if len(gold.numbers) != len(answer.numbers):
        return False
    if gold.brackets and answer.brackets and gold.brackets != answer.brackets:
        return False
    if gold.is_ordered or answer.is_ordered:
        pairs = zip(gold.numbers, answer.numbers, strict=True)
    else:
        pairs = zip(sorted(gold.numbers, key=_value), sorted(answer.numbers, key=_value), strict=True)
    return all(_numbers_agree(*pair) for pair in pairs)


def _value(number: Number) -> Fraction:
    return number.value


def _numbers_agree(gold: Number, answer: Number) -> bool:
    """A gold percentage may be answered without its sign; a gold number is not its percentage: 9 is not 9 %."""
    if gold.is_percent and not answer.is_percent and _close(gold.value * 100, gold, answer):
        return True
    return _close(gold.value, gold, answer)


def _close(expected: Fraction, gold: Number, answer: Number) -> bool:
    if expected == answer.value:
        return True
    if not (gold.is_decimal or answer.is_decimal):
        return False
    if expected.denominator == 1 and not gold.is_decimal:
        return False
    return abs(expected - answer.value) <= TOLERANCE * min(Fraction(1), abs(expected))


def _words_verdict(gold: str, answer: str) -> bool | None:
    """Compare names, choices and yes/no; None for a few bare letters that differ: they may be variables."""
    gold_words, answer_words = _words(gold), _words(answer)
    if gold_words is None or answer_words is None:
        return None
    if gold_words == answer_words:
        return True
    is_text = _TEXT.fullmatch(gold) or _TEXT.fullmatch(answer) or min(len(gold), len(answer)) >= MIN_WORD_LETTERS
    return False if is_text else None


def _words(text: str) -> str | None:
    """Return words in lower case (a single letter keeps its case), None for anything that is more than words."""
    wrapped = _TEXT.fullmatch(text)
    bare = (wrapped[1] if wrapped else text).strip().removesuffix(".")
    if len(bare) == 3 and bare[0] == "(" and bare[2] == ")":
        bare = bare[1]
    if not _WORDS.fullmatch(bare):
        return None
    return bare if len(bare) == 1 else " ".join(bare.lower().split())
