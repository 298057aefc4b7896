"""Reads an answer in normal form: what it is (quantity, words, items, equation) and what it consists of."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from megatron_p2o.rewards.math.reading.forms import cases, multiplied_matrix, residue, simplified
from megatron_p2o.rewards.math.reading.labels import TEXT, split_label
from megatron_p2o.rewards.math.reading.latex import outer_brackets, split_at
from megatron_p2o.rewards.math.reading.names import chemical_formula
from megatron_p2o.rewards.math.reading.parser import parse_expression
from megatron_p2o.rewards.math.reading.spelling import AND, LIST_SEPARATOR, OR
from megatron_p2o.rewards.math.reading.tree import FUNCTIONS, Node, NotUnderstoodError
from megatron_p2o.rewards.math.reading.units import NO_LABEL, Label

MIN_WORD_LETTERS = 4
"""Letters without \\text are a word from this length on, a product of variables below it."""

SHORT_WORDS = frozenset({"yes", "no", "true", "false", "none", "odd", "even", "all", "both", "dne"})
"""Words too, whatever their length."""

_SPELLED_OUT = {
    **{"infinity": r"\infty", "does not exist": "DNE", "none": r"\emptyset"},
    **dict.fromkeys(("no solution", "no solutions", "there is no solution", "there are no solutions"), r"\emptyset"),
    **dict.fromkeys(("empty set", "the empty set"), r"\emptyset"),
    **dict.fromkeys(("all real numbers", "all reals", r"\mathbb{R}", r"\mathbb R"), r"(-\infty,\infty)"),
}
"""Words and their symbols."""

MAX_ITEMS = 200
"""More parts than this are not read."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """An expression, perhaps a percentage."""

    expression: Node
    text: str
    is_percent: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """Words, or a single letter such as a choice."""

    text: str
    """Case as written, spaces joined."""


@dataclass(frozen=True, slots=True)
class Based:
    """A numeral with its base: 120_8."""

    sign: str
    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Items:
    """Several answers: a list, set, tuple, interval, ratio, union, matrix, or hours and minutes."""

    kind: str
    """The brackets, such as "()" or "[)"; "" for none; or "union", "ratio", "compound", "matrix"."""
    parts: tuple["Answer", ...]
    is_ordered: bool
    connective: Literal["", "and", "or"] = ""
    """The word between the parts; "" for a comma."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer and the words beside it."""

    value: "Answer"
    label: Label


@dataclass(frozen=True, slots=True)
class Relation:
    """Two or more sides, as text, and the signs between them."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unread:
    """An answer of a form that is not read here."""

    text: str


Answer = Quantity | Words | Based | Items | Labelled | Relation | Unread

_END = r"(?![A-Za-z])"
_SEPARATOR = re.compile(f"[,;{LIST_SEPARATOR}{AND}{OR}]")
_INNER_SEPARATOR = re.compile(f"[,{LIST_SEPARATOR}{AND}{OR}]")
_OUTER_SEPARATOR = re.compile(";")
_RELATION = re.compile(
    r":=|[=<>]|\\(?:ne|[lg]e|approx|simeq|sim|equiv|in|notin|to|rightarrow|Rightarrow|implies|iff|mapsto|propto|cong|"
    rf"subset|subseteq|supset|supseteq|Leftrightarrow|longrightarrow|perp|parallel|ll|gg){_END}"
)
_UNION = re.compile(rf"\\cup{_END}")
_PLUS_MINUS = re.compile(rf"\\(?:pm|mp){_END}")
_COLON = re.compile(":")
_BASED = re.compile(r"([+-]?)\(?(\d[0-9A-F]*)\)?_\{?(\d{1,3})\}?")
_SPACED_NUMBERS = re.compile(r"-?\d+(?: -?\d+)+")
_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z '-]*[A-Za-z'])?")
_MATRIX = re.compile(r"\\begin\{([bp]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_OUTWARD = re.compile(r"([\[\]])([^\[\]()]+,[^\[\]()]+)([\[\]])")
"""An open interval may be written ]0,1[."""

_COMPOUND = re.compile(rf"(?:[\d.]+{TEXT}){{2,}}")
_APPROXIMATELY = re.compile(
    r"^=|^(?:\\approx|\\sim|\\simeq|~)(?![A-Za-z])|^\\text\{(?:about|approximately|approx\.?)\}"
)
_PREAMBLE = re.compile(r"^\\text\{(?:the )?(?:final )?answer(?: is)?:?\}:?", re.IGNORECASE)
_AMBIGUOUS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d])(?!,\d)|(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d])")
_E_MINUS = re.compile(r"(?<=\d)e(?=[+-]\d)")


@lru_cache(maxsize=16384)
def readings(text: str, has_decimal_comma: bool = False) -> tuple[Answer, ...]:
    """Return what an answer in normal form may mean: `81,256` is a number or two of them, `2e-1` 0.2 or 2e - 1.

    With `has_decimal_comma` also 3.14 for `3,14`.
    """
    if not text:
        return ()
    texts = [text]
    if _AMBIGUOUS.search(text):
        joined = _AMBIGUOUS.sub(lambda found: re.sub("[, ]", "", found.group()), text)
        if outer_brackets(text)[0] == "" or "," in joined:
            texts.insert(0, joined)
    texts += [_E_MINUS.sub(" e", each) for each in texts if _E_MINUS.search(each)]
    if has_decimal_comma and re.fullmatch(r"-?\d+,\d+", text):
        texts.append(text.replace(",", "."))
    return tuple(read(each) for each in texts)


def read(text: str) -> Answer:
    """Return the structure of an answer in normal form; never raises."""
    try:
        return _read(_PREAMBLE.sub("", text).strip().rstrip(".") or text)
    except (NotUnderstoodError, RecursionError):
        return Unread(text)


def _read(text: str) -> Answer:
    text = simplified(_SPELLED_OUT.get(text, text))
    known = residue(text)
    if known:
        parts = tuple(_quantity(str(number), 1) for number in known[1:])
        return Items(f"residue {known[0]}".strip(), parts, is_ordered=True)
    outward = _OUTWARD.fullmatch(text)
    if outward and outward[1] + outward[3] != "[]":
        return _read("[("[outward[1] == "]"] + outward[2] + "])"[outward[3] == "["])
    formula = chemical_formula(text)
    if formula:
        return Words(formula)
    whole = _WHOLE_TEXT.fullmatch(text)
    if whole:
        return _read_text(whole[1].strip().rstrip(". "))
    spaced = _SPACED_NUMBERS.fullmatch(text)
    if spaced:
        return _items("", text.split(" "), is_ordered=True)
    relation = _relation(text)
    if relation is not None:
        return relation
    parts, _ = split_at(text, _OUTER_SEPARATOR)
    if len(parts) > 1 and any(len(split_at(part, _INNER_SEPARATOR)[0]) > 1 for part in parts):
        return _items("", [part if outer_brackets(part)[0] else f"({part})" for part in parts], is_ordered=False)
    brackets, inner = outer_brackets(text)
    parts, separators = split_at(inner, _SEPARATOR)
    if len(parts) > 1:
        items = _items(brackets, parts, is_ordered=brackets not in ("", "{}"))
        return replace(items, connective=_connective(separators))
    parts, separators = split_at(text, _SEPARATOR)
    if len(parts) > 1:
        return replace(_items("", parts, is_ordered=False), connective=_connective(separators))
    if brackets == "{}":
        return Items("{}", (_read(inner),), is_ordered=False)
    return _read_one(inner if brackets else text)


def _items(kind: str, parts: list[str], is_ordered: bool) -> Items:
    if len(parts) > MAX_ITEMS or "" in parts:
        raise NotUnderstoodError("an empty or an endless list")
    spread = [each for part in parts for each in _both_signs(part)]
    return Items(kind, tuple(_read(part) for part in spread), is_ordered)


def _connective(separators: list[str]) -> Literal["", "and", "or"]:
    if AND in separators and OR in separators:
        raise NotUnderstoodError("both and and or")
    return "and" if AND in separators else "or" if OR in separators else ""


def _both_signs(text: str) -> list[str]:
    r"""Return the two texts that \pm and \mp stand for, or the text itself."""
    if not _PLUS_MINUS.search(text):
        return [text]
    upper, lower = (
        re.sub(rf"\\pm{_END} ?", first, re.sub(rf"\\mp{_END} ?", second, text)) for first, second in ("+-", "-+")
    )
    return [upper, lower]


def _relation(text: str) -> Answer | None:
    sides, signs = split_at(text, _SEPARATOR)
    if signs:
        return None
    approximately = _APPROXIMATELY.match(text)
    if approximately:
        return _read(text[approximately.end() :])
    sides, signs = split_at(text, _RELATION)
    if not signs:
        return None
    if "" in sides:
        raise NotUnderstoodError("a relation without a side")
    if len(_both_signs(text)) == 2:
        return Items("", tuple(_read(each) for each in _both_signs(text)), is_ordered=False)
    return Relation(tuple(sides), tuple(signs))


def _read_text(text: str) -> Answer:
    """Read the content of a \\text that is the whole answer: words, a choice, or an answer typed as text."""
    bare = text[1:-1].strip() if re.fullmatch(r"\([A-Za-z]\)", text) else text
    if bare.lower() in _SPELLED_OUT:
        return _read(_SPELLED_OUT[bare.lower()])
    if _WORDS.fullmatch(bare):
        parts = re.split(r" (?:and|or) ", bare)
        if len(parts) > 1 and all(len(part) == 1 or (part.istitle() and " " not in part) for part in parts):
            return _items("", parts, is_ordered=False)
        return Words(" ".join(bare.split()))
    words = re.search(r"[A-Za-z]{2}[A-Za-z ./]*$", bare)
    if words and re.search(r"\d\s*$", bare[: words.start()]):
        return _read(rf"{bare[: words.start()].strip()}\text{{{words.group()}}}")
    return _read(bare)


def _read_one(text: str) -> Answer:
    if _WORDS.fullmatch(text) and _has_a_word(text):
        return _read(_SPELLED_OUT[text.lower()]) if text.lower() in _SPELLED_OUT else Words(text)
    based = _BASED.fullmatch(text)
    if based:
        return Based(based[1].replace("+", ""), based[2], int(based[3]))
    if _COMPOUND.fullmatch(text):
        return Items("compound", tuple(_read(part) for part in re.findall(rf"[\d.]+{TEXT}", text)), is_ordered=True)
    pairs = cases(text)
    if pairs is not None:
        rows = tuple(Items("case", (_read(value), _read(condition)), is_ordered=True) for value, condition in pairs)
        return Items("cases", rows, is_ordered=False)
    text = multiplied_matrix(text) or text
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in matrix[2].strip().removesuffix("\\\\").split(r"\\")]
        return Items("matrix", tuple(_items("row", row, is_ordered=True) for row in rows), is_ordered=True)
    if len(_both_signs(text)) == 2:
        return Items("", tuple(_read(each) for each in _both_signs(text)), is_ordered=False)
    parts, _ = split_at(text, _UNION)
    if len(parts) > 1:
        return Items("union", tuple(_read(part) for part in parts), is_ordered=False)
    core, label = split_label(text)
    if label != NO_LABEL:
        return Labelled(_quantity(core, label.factor), label)
    return _quantity(core, 1)


def _has_a_word(text: str) -> bool:
    """Return whether letters are words: `infinitely many`, not `m g h` or `x sin x`."""
    words = text.split()
    if text.lower() in SHORT_WORDS:
        return True
    return any(len(word) >= MIN_WORD_LETTERS - (len(words) > 1) for word in words) and FUNCTIONS.isdisjoint(words)


def _quantity(text: str, factor: int) -> Answer:
    parts, _ = split_at(re.sub(r"(?<=\d)(?:\\text\{ ?to ?\}| to )(?=\d)", ":", text), _COLON)
    if len(parts) > 1 and factor == 1:
        return _items("ratio", parts, is_ordered=True)
    is_percent = text.endswith(r"\%")
    text = outer_brackets(text.removesuffix(r"\%").strip())[1]
    if len(split_at(text, _SEPARATOR)[0]) > 1:
        if factor != 1:
            raise NotUnderstoodError("a factor of several values")
        return _read(text)
    expression = parse_expression(text)
    if factor != 1:
        expression = Node("product", (Node("number", value=Fraction(factor)), expression))
    return Quantity(expression, text, is_percent)
