"""Compares two answers part by part. A `Judge` decides what needs algebra."""

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Protocol

from megatron_p2o.rewards.math.reading.answer import (
    SHORT_WORDS,
    Answer,
    Based,
    Items,
    Labelled,
    Quantity,
    Relation,
    Unread,
    Words,
    read,
    readings,
)
from megatron_p2o.rewards.math.reading.names import choice
from megatron_p2o.rewards.math.reading.parameters import without_parameters
from megatron_p2o.rewards.math.reading.tree import Node, is_ordered_name
from megatron_p2o.rewards.math.reading.units import NO_LABEL, Label, in_units, labels_agree
from megatron_p2o.rewards.math.relations import (
    LONE_NAME,
    MIRRORED,
    are_roots,
    as_intervals,
    as_values,
    in_order_of_names,
    interval_of,
    is_name,
    letters,
    mirrored,
    name_of,
    names_of,
    stem,
    text_of,
    value_of,
    without_modulus,
)
from megatron_p2o.rewards.math.vectors import in_one_notation

ROUGHLY = Fraction(1, 100)
"""Largest error of a value after an approximation sign, relative to the exact value before it."""

_HUNDRED = Node("number", value=Fraction(100))
_ARTICLE = re.compile(r"^(?:an?|the) (?=[A-Za-z]{3})", re.IGNORECASE)
_BRACKETS = ("()", "[]", "{}")
MIN_FOLDED_LETTERS = 4


class Judge(Protocol):
    """Decides comparisons of expressions; None where it cannot."""

    def is_equal(self, gold: Node, answer: Node, tolerance: Fraction | None = None) -> bool | None:
        """Whether two expressions are equal, within a relative `tolerance` if there is one."""
        ...

    def is_same_equation(self, gold: tuple[Node, Node], answer: tuple[Node, Node], sign: str) -> bool | None:
        """Whether two equations or inequalities, given by their sides, say the same; `sign` stands in both."""
        ...

    def is_equal_text(self, gold: str, answer: str) -> bool | None:
        """Whether two answers are equal when the form of the gold one is not read here."""
        ...


def verdict(gold: str, answer: str, judge: Judge) -> bool | None:
    """Return whether an answer equals the gold one, both in normal form; None when that takes more than `judge`."""
    try:
        return _verdict(gold, answer, judge)
    except RecursionError:
        return False


def _verdict(gold: str, answer: str, judge: Judge) -> bool | None:
    gold, answer = without_parameters(gold, answer)
    if gold == answer:
        return True
    if (letter := choice(gold)) and choice(answer):
        return letter == choice(answer)
    has_point = re.search(r"\d\.\d", gold) is not None
    answers = readings(answer, has_decimal_comma=has_point)
    found = _any(_agree(one, other, judge) for one in readings(gold) for other in answers)
    is_exotic = any(isinstance(one, Unread) for one in readings(gold)) or (
        r"\begin" in gold and any(isinstance(other, Unread) for other in answers)
    )
    return judge.is_equal_text(gold, answer) if found is False and is_exotic else found


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    is_open = False
    for each in verdicts:
        if each:
            return True
        is_open |= each is None
    return None if is_open else False


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    is_open = False
    for each in verdicts:
        if each is False:
            return False
        is_open |= each is None
    return None if is_open else True


def _agree(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    gold, answer = in_one_notation(gold, answer)
    if isinstance(gold, Unread) or isinstance(answer, Unread):
        return False
    if gold == answer:
        return True
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _relations_agree(gold, answer, judge)
    if isinstance(gold, Labelled) or isinstance(answer, Labelled):
        return _labelled_agree(gold, answer, judge)
    if isinstance(gold, Items) and isinstance(answer, Items):
        return _items_agree(gold, answer, judge)
    if isinstance(gold, Items) or isinstance(answer, Items):
        return _single_agrees(gold, answer, judge)
    if isinstance(gold, Based) or isinstance(answer, Based):
        return _decimal(gold) == _decimal(answer) is not None
    if isinstance(gold, Words) or isinstance(answer, Words):
        return same_words(gold.text, answer.text)
    return _quantities_agree(gold, answer, judge)


def _decimal(answer: Answer) -> tuple[str, str, int] | None:
    """Return sign, digits and base of a numeral; digits without a base are in base ten."""
    if isinstance(answer, Based):
        return answer.sign, answer.digits, answer.base
    if isinstance(answer, Quantity) and re.fullmatch(r"-?\d+", answer.text):
        return "-" * answer.text.startswith("-"), answer.text.removeprefix("-"), 10
    return None


def same_words(gold: str, answer: str) -> bool:
    """Return whether two texts are the same words. Case counts where letters may be symbols: `mgh` is not `MgH`."""
    gold, answer = (re.sub(r"[\s{}]+", " ", text).strip() for text in (gold, answer))
    gold, answer = (_ARTICLE.sub("", text) for text in (gold, answer))
    if gold == answer:
        return True
    words, others = gold.split(), answer.split()
    if len(words) == 1 or len(others) == 1:
        return gold.lower() == answer.lower() and _is_word(gold) and _is_word(answer)
    return len(words) == len(others) and all(map(_is_same_word, words, others, range(len(words))))


def _is_same_word(gold: str, answer: str, position: int) -> bool:
    """Return whether two words of a phrase are the same: `option a` is not `option A`, but `a line` is `A line`."""
    if gold == answer:
        return True
    return gold.lower() == answer.lower() and (len(gold) > 1 or (position == 0 and gold in "aA"))


def _is_word(text: str) -> bool:
    if text.lower() in SHORT_WORDS:
        return True
    is_plain = text.islower() or text.isupper() or text.istitle()
    return is_plain and len(text) >= MIN_FOLDED_LETTERS and len(set(text.lower()) & set("aeiouy")) > 1


def _quantities_agree(gold: Quantity, answer: Quantity, judge: Judge) -> bool | None:
    """A gold percentage may be answered without its sign; a gold number is not its percentage: 9 is not 9 %."""
    if is_ordered_name(gold.text) and re.fullmatch("[A-Za-z]+", answer.text):
        return gold.text == answer.text
    if gold.is_percent == answer.is_percent:
        return judge.is_equal(gold.expression, answer.expression)
    if gold.is_percent:
        hundredth = Node("quotient", (gold.expression, _HUNDRED))
        return _any(judge.is_equal(each, answer.expression) for each in (gold.expression, hundredth))
    return judge.is_equal(gold.expression, Node("quotient", (answer.expression, _HUNDRED)))


def _labelled_agree(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    gold_value, gold_label = _unlabelled(gold)
    value, label = _unlabelled(answer)
    if gold_label.kind == "unit" and label.kind == "none" and isinstance(answer, Quantity):
        value, label = _unlabelled(read(in_units(answer.text)))
    if not labels_agree(gold_label, label):
        return False
    if label.kind == "unit" and isinstance(gold_value, Quantity) and gold_value.is_percent:
        return False  # a percentage has no unit
    return _agree(gold_value, value, judge)


def _unlabelled(answer: Answer) -> tuple[Answer, Label]:
    return (answer.value, answer.label) if isinstance(answer, Labelled) else (answer, NO_LABEL)


def _single_agrees(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    """A set of one element is that element; several answers are never one."""
    if r"\emptyset" in (text_of(gold).strip(), text_of(answer).strip()):
        return False
    if isinstance(gold, Items) and gold.kind == "{}" and len(gold.parts) == 1:
        return _agree(gold.parts[0], answer, judge)
    if isinstance(answer, Items) and answer.kind.startswith("residue "):
        return _agree(gold, answer.parts[0], judge)  # 3 is what x is modulo 7
    if isinstance(answer, Items) and answer.kind == "{}" and len(answer.parts) == 1:
        return _agree(gold, answer.parts[0], judge)
    return False


def _items_agree(gold: Items, answer: Items, judge: Judge) -> bool | None:
    if not _connectives_agree(gold, answer):
        return False
    if "union" in (gold.kind, answer.kind) or "and" in (gold.connective, answer.connective):
        gold, answer = as_intervals(gold), as_intervals(answer)
    if not _kinds_agree(gold, answer):
        return False
    if gold.kind == answer.kind == "ratio":
        return _ratios_agree(gold, answer, judge)
    gold_names, names = names_of(gold), names_of(answer)
    if gold_names and names:
        return _assignments_agree(gold, answer, judge)
    gold, answer = as_values(gold, gold_names, is_gold=True), as_values(answer, names, is_gold=False)
    if len(gold.parts) != len(answer.parts):
        return False
    if gold.is_ordered or answer.is_ordered:
        return _all(_agree(one, other, judge) for one, other in zip(gold.parts, answer.parts, strict=True))
    return _agree_in_some_order(gold.parts, answer.parts, judge)


def _connectives_agree(gold: Items, answer: Items) -> bool:
    """Return whether the connectives mean the same. Between values of one unknown "and" and "or" do; between
    conditions, or values of several unknowns, they do not."""
    connectives = {gold.connective, answer.connective}
    if "or" not in connectives or len(connectives) == 1:
        return True
    for items in (gold, answer):
        names = names_of(items)
        has_conditions = not names and any(isinstance(part, Relation) for part in items.parts)
        if (names and not are_roots(names)) or ("and" in connectives and (has_conditions or letters(text_of(items)))):
            return bool(names) and are_roots(names)
    return True


def _ratios_agree(gold: Items, answer: Items, judge: Judge) -> bool | None:
    """Return whether two ratios agree. 3:4 is 6:8; but 3:30, which may be a time, only equals itself."""
    if len(gold.parts) != len(answer.parts):
        return False
    texts = [[text_of(part) for part in items.parts] for items in (gold, answer)]
    are_counts = all(re.fullmatch(r"[1-9]\d{0,5}", text) for text in (*texts[0], *texts[1]))
    if not are_counts or (len(texts[0]) == 2 and len(texts[0][1]) > 1):
        return _all(_agree(one, other, judge) for one, other in zip(gold.parts, answer.parts, strict=True))
    numbers, others = ([int(text) for text in each] for each in texts)
    return all(number * others[0] == other * numbers[0] for number, other in zip(numbers, others, strict=True))


def _kinds_agree(gold: Items, answer: Items) -> bool:
    """A point is no set, an open interval no closed one. Brackets may be left out, but those of an interval."""
    if gold.kind == answer.kind:
        return True
    if gold.kind.startswith("residue") and answer.kind.startswith("residue"):
        return "residue" in (gold.kind, answer.kind)
    kinds = {gold.kind, answer.kind}
    if "" not in kinds:
        return False
    kind = gold.kind or answer.kind
    return kind in _BRACKETS and (kind != "[]" or len(gold.parts) != 2)


def _agree_in_some_order(gold: Sequence[Answer], answer: Sequence[Answer], judge: Judge) -> bool | None:
    left = list(answer)
    is_open = False
    for part in gold:
        verdicts = [_agree(part, other, judge) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            is_open = True
        else:
            return False
    return None if is_open else True


def _assignments_agree(gold: Items, answer: Items, judge: Judge) -> bool | None:
    """Names must be the same; only the roots of one unknown, which the gold answer does not number, have any name."""
    gold_names, names = names_of(gold), names_of(answer)
    if len(names) != len(gold_names):
        return False
    is_one_unknown = are_roots(gold_names) and are_roots(names) and stem(gold_names[0]) == stem(names[0])
    if is_one_unknown and 1 in (len(set(gold_names)), len(set(names))):
        values = [[value_of(part) for part in items.parts] for items in (gold, answer)]
        return _agree_in_some_order(values[0], values[1], judge)
    if sorted(gold_names) != sorted(names):
        return False
    pairs = zip(in_order_of_names(gold, gold_names), in_order_of_names(answer, names), strict=True)
    return _all(_agree(value_of(one), value_of(other), judge) for one, other in pairs)


def _relations_agree(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _any((_same_relation(gold, answer, judge), _same_interval(gold, answer, judge)))
    if isinstance(gold, Relation):
        return _agrees_with_bare_value(gold, answer, judge)
    if isinstance(answer, Relation):
        interval = interval_of(answer)
        if interval is not None:
            return _agree(gold, interval[1], judge) if _is_range_like(gold, interval[1]) else False
        if name_of(answer) and isinstance(gold, Items):
            return _agree(gold, value_of(answer), judge)
        return _last_value_agrees(gold, answer, judge)
    return False


def _is_range_like(answer: Answer, interval: Items) -> bool:
    """Return whether an answer may be an interval or set: `2,3` is no interval from 2 to 3."""
    return isinstance(answer, Items) and (
        answer.kind != "" or answer.connective == "and" or interval.kind not in ("()", "(]", "[)", "[]")
    )


def _agrees_with_bare_value(gold: Relation, answer: Answer, judge: Judge) -> bool | None:
    """Gold `x=3` may be answered by 3, and `0<x<1` by (0,1); a gold equation needs an equation."""
    interval = interval_of(gold)
    if interval is not None:
        return _agree(interval[1], answer, judge) if _is_range_like(answer, interval[1]) else False
    if name_of(gold) and not re.search(r"'|\\frac\{(?:d|\\partial)", gold.sides[0]):
        return _agree(value_of(gold), answer, judge)
    return False


def _same_relation(gold: Relation, answer: Relation, judge: Judge) -> bool | None:
    name, other = name_of(gold), name_of(answer)
    if name and (name == other or {name, other} == {"y", "f(x)"}):
        return _agree(value_of(gold), value_of(answer), judge)
    if name and gold.signs[0] == "=" and other == "" and len(answer.sides) > 2 and answer.sides[0] == name:
        return _last_value_agrees(value_of(gold), Relation(answer.sides, answer.signs), judge)
    if len(gold.sides) != len(answer.sides):
        return False
    if len(gold.sides) == 2:
        return _any(_same_two_sides(gold, each, judge) for each in (answer, mirrored(answer)) if each is not None)
    for each in (answer, mirrored(answer)):
        if each is not None and each.signs == gold.signs:
            sides = zip(gold.sides, each.sides, strict=True)
            found = _all(_agree(read(one), read(two), judge) for one, two in sides)
            if found is not False:
                return found
    return False


def _same_two_sides(gold: Relation, answer: Relation, judge: Judge) -> bool | None:
    if gold.signs != answer.signs:
        return False
    sides = [_expression(side) for side in (*gold.sides, *answer.sides)]
    known = [side for side in sides if side is not None]
    if len(known) == 4 and gold.signs[0] in MIRRORED:
        return judge.is_same_equation((known[0], known[1]), (known[2], known[3]), gold.signs[0])
    return _all(_agree(read(one), read(two), judge) for one, two in zip(gold.sides, answer.sides, strict=True))


def _expression(text: str) -> Node | None:
    side = read(text)
    if not isinstance(side, Quantity):
        return None
    return Node("quotient", (side.expression, _HUNDRED)) if side.is_percent else side.expression


def _same_interval(gold: Relation, answer: Relation, judge: Judge) -> bool | None:
    one, other = interval_of(gold), interval_of(answer)
    if one is None or other is None or one[0] != other[0]:
        return False
    return _agree(one[1], other[1], judge)


def _last_value_agrees(gold: Answer, answer: Relation, judge: Judge) -> bool | None:
    """Return whether a chain of equations gives the gold answer: 6/2 and 3 of `x=6/2=3`, both sides of `1+1=3`.

    Only the first side may have letters that the gold answer lacks, and only to name what was computed.
    """
    known = letters(text_of(gold))
    sides, signs = [without_modulus(side) for side in answer.sides], list(answer.signs)
    if not all(sign in ("=", ":=", r"\in", r"\approx", r"\equiv") for sign in signs):
        return False
    is_unknown = [bool(letters(side) - known) for side in sides]
    if signs == ["="] and is_unknown == [False, True] and LONE_NAME.fullmatch(sides[1]):
        sides, is_unknown = sides[::-1], is_unknown[::-1]
    is_named = is_unknown[0] and is_name(sides[0])
    if any(is_unknown[is_named:]) or (r"\in" in signs and not isinstance(read(sides[-1]), Items)):
        return False
    if r"\equiv" in signs and (signs != [r"\equiv"] or not is_named):
        return False
    first_rough = signs.index(r"\approx") + 1 if r"\approx" in signs else len(sides)
    exact, rough = sides[is_named:first_rough], sides[first_rough:]
    if not exact:
        exact, rough = [sides[-1]], []
    verdicts = [_agree(gold, read(side), judge) for side in exact]
    return _all([*verdicts, *(_is_near(gold, read(side), judge) for side in rough)])


def _is_near(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    value, other = _unlabelled(gold)[0], _unlabelled(answer)[0]
    if not isinstance(value, Quantity) or not isinstance(other, Quantity):
        return False
    return judge.is_equal(value.expression, other.expression, ROUGHLY)
