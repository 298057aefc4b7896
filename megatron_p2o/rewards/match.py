"""Compares two answers part by part; what takes algebra is asked of a `Judge`."""

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Protocol

from megatron_p2o.rewards.answer import (
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
from megatron_p2o.rewards.expression import CONSTANTS, FUNCTIONS, Node
from megatron_p2o.rewards.units import NO_LABEL, Label, labels_agree

ROUGHLY = Fraction(1, 100)
"""How far what stands after an approximation sign may be off, relative to the exact value before it."""

_HUNDRED = Node("number", value=Fraction(100))
_NAME = r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_(?:\w|\{[^{}]*\}))?"
_LONE_NAME = re.compile(rf"({_NAME})('*)(?:\(.*\))?|\\text\{{[^{{}}]*\}}")
_POINTS = r"(?:\\(?:angle|triangle) ?)?(?:[A-Z]'?(?:_(?:\w|\{[^{}]*\}))?)+"
_MEASURED = re.compile(
    rf"\|?{_POINTS}\|?|{_POINTS}[:/]{_POINTS}|\\frac\{{{_POINTS}\}}\{{{_POINTS}\}}|\({_NAME}(?:,{_NAME})+\)"
)
"""What an equation may give besides an unknown: a length AB, a ratio of two, a point (x,y)."""
_LETTER = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}]*\}")
_SPELLED_NAMES = r"\frac \sqrt \cdot \times \div \pm \mp \infty \degree \binom"
_SPELLED = frozenset(_SPELLED_NAMES.split())
_NEGATION = re.compile(r"\\text\{[^{}]*\b(?:not?|isn|never|wrong|other)\b")
_LESS, _MORE = ("<", r"\le"), (">", r"\ge")
_MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
_BRACKETS = ("()", "[]", "{}")
_SHORT_WORDS = frozenset({"yes", "no", "true", "false", "none", "odd", "even", "all", "both"})
MIN_FOLDED_LETTERS = 4


class Judge(Protocol):
    """Decides what is left when structure is taken apart; None where it cannot."""

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
    if gold == answer:
        return True
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
    if gold == answer:
        return True
    return gold.lower() == answer.lower() and _is_word(gold) and _is_word(answer)


def _is_word(text: str) -> bool:
    if text.lower() in _SHORT_WORDS or " " in text:
        return True
    is_plain = text.islower() or text.isupper() or text.istitle()
    return is_plain and len(text) >= MIN_FOLDED_LETTERS and len(set(text.lower()) & set("aeiouy")) > 1


def _quantities_agree(gold: Quantity, answer: Quantity, judge: Judge) -> bool | None:
    """A gold percentage may be answered without its sign; a gold number is not its percentage: 9 is not 9 %."""
    if gold.is_percent == answer.is_percent:
        return judge.is_equal(gold.expression, answer.expression)
    if gold.is_percent:
        hundredth = Node("quotient", (gold.expression, _HUNDRED))
        return _any(judge.is_equal(each, answer.expression) for each in (gold.expression, hundredth))
    return judge.is_equal(gold.expression, Node("quotient", (answer.expression, _HUNDRED)))


def _labelled_agree(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    gold_value, gold_label = _unlabelled(gold)
    value, label = _unlabelled(answer)
    if not labels_agree(gold_label, label):
        return False
    return _agree(gold_value, value, judge)


def _unlabelled(answer: Answer) -> tuple[Answer, Label]:
    return (answer.value, answer.label) if isinstance(answer, Labelled) else (answer, NO_LABEL)


def _single_agrees(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    """A set of one element is that element; several answers are never one."""
    if isinstance(gold, Items) and gold.kind == "{}" and len(gold.parts) == 1:
        return _agree(gold.parts[0], answer, judge)
    if isinstance(answer, Items) and answer.kind == "{}" and len(answer.parts) == 1:
        return _agree(gold, answer.parts[0], judge)
    return False


def _items_agree(gold: Items, answer: Items, judge: Judge) -> bool | None:
    if "union" in (gold.kind, answer.kind):
        gold, answer = _as_union(gold), _as_union(answer)
    if not _kinds_agree(gold, answer):
        return False
    gold_names, names = _names(gold), _names(answer)
    if gold_names and names:
        return _assignments_agree(gold, answer, judge)
    gold, answer = _as_values(gold, gold_names, is_gold=True), _as_values(answer, names, is_gold=False)
    if len(gold.parts) != len(answer.parts):
        return False
    if gold.is_ordered or answer.is_ordered:
        return _all(_agree(one, other, judge) for one, other in zip(gold.parts, answer.parts, strict=True))
    return _agree_in_some_order(gold.parts, answer.parts, judge)


def _as_union(items: Items) -> Items:
    """Return `x<1 or x>2` as a union of intervals, anything else as it is."""
    intervals = [_interval(part) if isinstance(part, Relation) else None for part in items.parts]
    found = [interval for interval in intervals if interval is not None]
    if items.kind or len(found) < len(intervals) or len({unknown for unknown, _ in found}) != 1:
        return items
    return Items("union", tuple(interval for _, interval in found), is_ordered=False)


def _kinds_agree(gold: Items, answer: Items) -> bool:
    """A point is no set, an open interval no closed one. Brackets may be left out, but those of an interval."""
    if gold.kind == answer.kind:
        return True
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


def _names(items: Items) -> list[str]:
    """Return the name that each part is assigned to, [] unless all are assignments `x=...`."""
    names = [_name(part) for part in items.parts]
    return [name for name in names if name] if all(names) else []


def _name(answer: Answer) -> str:
    """Return the left side of `x=...`, `f(x)=...`, `x\\in...`; "" for anything else."""
    if not isinstance(answer, Relation) or len(answer.sides) != 2 or answer.signs[0] not in ("=", r"\in", ":="):
        return ""
    side = answer.sides[0]
    return side if _LONE_NAME.fullmatch(side) or _MEASURED.fullmatch(side) else ""


def _stem(name: str) -> str:
    return name.partition("_")[0].partition("(")[0]


def _as_values(items: Items, names: list[str], is_gold: bool) -> Items:
    """Values of different unknowns are a tuple: as the gold answer lists them, else in the order of the letters.

    `y=2,x=1` answers (1, 2). Several values of one unknown are a set.
    """
    if not names or len({_stem(name) for name in names}) == 1:
        return _without_repeated_points(items)
    parts = items.parts
    if not is_gold and all(len(name) == 1 for name in names):
        parts = tuple(_sorted_parts(items, names))
    return Items(items.kind, parts, is_ordered=True)


def _without_repeated_points(items: Items) -> Items:
    if items.is_ordered or not all(isinstance(part, Items) for part in items.parts):
        return items
    return Items(items.kind, tuple(dict.fromkeys(items.parts)), is_ordered=False)


def _assignments_agree(gold: Items, answer: Items, judge: Judge) -> bool | None:
    gold_names, names = _names(gold), _names(answer)
    if {_stem(name) for name in gold_names} != {_stem(name) for name in names}:
        return False
    if len(names) != len(gold_names):
        return False
    if len({_stem(name) for name in names}) == 1:
        values = [[_value(part) for part in items.parts] for items in (gold, answer)]
        return _agree_in_some_order(values[0], values[1], judge)
    if sorted(gold_names) != sorted(names):
        return False
    pairs = zip(_sorted_parts(gold, gold_names), _sorted_parts(answer, names), strict=True)
    return _all(_agree(_value(one), _value(other), judge) for one, other in pairs)


def _sorted_parts(items: Items, names: list[str]) -> list[Answer]:
    return [part for _, part in sorted(zip(names, items.parts, strict=True), key=lambda pair: pair[0])]


def _value(assignment: Answer) -> Answer:
    return read(assignment.sides[-1]) if isinstance(assignment, Relation) else assignment


def _relations_agree(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _any((_same_relation(gold, answer, judge), _same_interval(gold, answer, judge)))
    if isinstance(gold, Relation):
        return _agrees_with_bare_value(gold, answer, judge)
    if isinstance(answer, Relation):
        interval = _interval(answer)
        if interval is not None:
            return _agree(gold, interval[1], judge) if isinstance(gold, Items) else False
        if _name(answer) and isinstance(gold, Items):
            return _agree(gold, _value(answer), judge)
        return _last_value_agrees(gold, answer, judge)
    return False


def _agrees_with_bare_value(gold: Relation, answer: Answer, judge: Judge) -> bool | None:
    """Gold `x=3` may be answered by 3, and `0<x<1` by (0,1); a gold equation needs an equation."""
    interval = _interval(gold)
    if interval is not None:
        return _agree(interval[1], answer, judge) if isinstance(answer, Items) else False
    if _name(gold) and not re.search(r"'", gold.sides[0]):
        return _agree(_value(gold), answer, judge)
    return False


def _same_relation(gold: Relation, answer: Relation, judge: Judge) -> bool | None:
    name, other = _name(gold), _name(answer)
    if name and name == other:
        return _agree(_value(gold), _value(answer), judge)
    if name and gold.signs[0] == "=" and other == "" and len(answer.sides) > 2 and answer.sides[0] == name:
        return _last_value_agrees(_value(gold), Relation(answer.sides, answer.signs), judge)
    if len(gold.sides) != len(answer.sides):
        return False
    if len(gold.sides) == 2:
        return _any(_same_two_sides(gold, each, judge) for each in (answer, _mirrored(answer)) if each is not None)
    for each in (answer, _mirrored(answer)):
        if each is not None and each.signs == gold.signs:
            sides = zip(gold.sides, each.sides, strict=True)
            found = _all(_agree(read(one), read(two), judge) for one, two in sides)
            if found is not False:
                return found
    return False


def _mirrored(relation: Relation) -> Relation | None:
    if not all(sign in _MIRRORED for sign in relation.signs):
        return None
    return Relation(relation.sides[::-1], tuple(_MIRRORED[sign] for sign in reversed(relation.signs)))


def _same_two_sides(gold: Relation, answer: Relation, judge: Judge) -> bool | None:
    if gold.signs != answer.signs:
        return False
    sides = [_expression(side) for side in (*gold.sides, *answer.sides)]
    known = [side for side in sides if side is not None]
    if len(known) == 4 and gold.signs[0] in _MIRRORED:
        return judge.is_same_equation((known[0], known[1]), (known[2], known[3]), gold.signs[0])
    return _all(_agree(read(one), read(two), judge) for one, two in zip(gold.sides, answer.sides, strict=True))


def _expression(text: str) -> Node | None:
    side = read(text)
    if not isinstance(side, Quantity):
        return None
    return Node("quotient", (side.expression, _HUNDRED)) if side.is_percent else side.expression


def _same_interval(gold: Relation, answer: Relation, judge: Judge) -> bool | None:
    one, other = _interval(gold), _interval(answer)
    if one is None or other is None or one[0] != other[0]:
        return False
    return _agree(one[1], other[1], judge)


def _interval(relation: Relation) -> tuple[str, Items] | None:
    """Return the unknown and the interval that an inequality such as `0<x<1` or `x>2` gives it."""
    sides, signs = relation.sides, relation.signs
    if signs == (r"\in",) and isinstance(items := read(sides[1]), Items):
        return sides[0], items
    if all(sign in _MORE for sign in signs):
        sides, signs = sides[::-1], tuple(_MIRRORED[sign] for sign in reversed(signs))
    if not all(sign in _LESS for sign in signs) or len(sides) > 3:
        return None
    unknown = [index for index, side in enumerate(sides) if re.fullmatch(rf"{_NAME}(?:\({_NAME}\))?", side)]
    if len(unknown) != 1 or (len(sides) == 3 and unknown != [1]):
        return None
    index = unknown[0]
    bounds = [side for side in sides if side != sides[index]]
    if len(bounds) != len(sides) - 1 or any(letters(side) for side in bounds):
        return None
    lower = sides[index - 1] if index > 0 else r"-\infty"
    upper = sides[index + 1] if index + 1 < len(sides) else r"\infty"
    left = "[" if index > 0 and signs[index - 1] == r"\le" else "("
    right = "]" if index + 1 < len(sides) and signs[index] == r"\le" else ")"
    return sides[index], Items(left + right, (read(lower), read(upper)), is_ordered=True)


def _last_value_agrees(gold: Answer, answer: Relation, judge: Judge) -> bool | None:
    """Of `x=6/2=3` the sides 6/2 and 3 must equal the gold answer, of `1+1=3` both.

    A side with letters that the gold answer lacks only says what was computed.
    """
    known = letters(_any_text(gold))
    sides, signs = [_without_modulus(side) for side in answer.sides], list(answer.signs)
    if any(r"\text" in side for side in sides[1:-1]) or _NEGATION.search(sides[0]):
        return False
    if not all(sign in ("=", ":=", r"\in", r"\approx", r"\equiv") for sign in signs):
        return False
    if r"\equiv" in signs and (signs != [r"\equiv"] or not letters(sides[0]) - known):
        return False
    is_named = [bool(letters(side) - known) for side in sides]
    if is_named[-1] and not is_named[0] and _LONE_NAME.fullmatch(sides[-1]):
        sides, signs, is_named = sides[:-1], signs[:-1], is_named[:-1]
    first_rough = signs.index(r"\approx") + 1 if r"\approx" in signs else len(sides)
    exact = [side for side, named in zip(sides[:first_rough], is_named[:first_rough], strict=True) if not named]
    rough = sides[first_rough:]
    if not exact:
        exact, rough = ([sides[-1]], []) if rough or is_named[-1] else (exact, rough)
    if is_named[-1] or not exact:
        return False
    verdicts = [_agree(gold, read(side), judge) for side in exact]
    return _all([*verdicts, *(_is_near(gold, read(side), judge) for side in rough)])


def _without_modulus(side: str) -> str:
    return re.sub(r"\\pmod\{?[\w^{}]+\}?$|\(\\mod ?\w+\)$", "", side).strip()


def _is_near(gold: Answer, answer: Answer, judge: Judge) -> bool | None:
    value, other = _unlabelled(gold)[0], _unlabelled(answer)[0]
    if not isinstance(value, Quantity) or not isinstance(other, Quantity):
        return False
    return judge.is_equal(value.expression, other.expression, ROUGHLY)


def letters(text: str) -> set[str]:
    """Return the letters, Greek letters and words in an expression that are not constants, functions or units."""
    found = {token.replace(" ", "") for token in _LETTER.findall(_ENVIRONMENT.sub("", text))}
    names = set(CONSTANTS) | _SPELLED | {f"\\{name}" for name in FUNCTIONS}
    return {token for token in found - names if not token.startswith("\\text")} | {
        token for token in found if token.startswith("\\text") and len(token) > 7 and not any(c.isdigit() for c in text)
    }


def _any_text(answer: Answer) -> str:
    """Return all expressions in an answer, as text."""
    if isinstance(answer, Quantity | Words | Unread):
        return answer.text
    if isinstance(answer, Labelled):
        return _any_text(answer.value)
    if isinstance(answer, Items):
        return " ".join(_any_text(part) for part in answer.parts)
    return " ".join(answer.sides) if isinstance(answer, Relation) else ""
