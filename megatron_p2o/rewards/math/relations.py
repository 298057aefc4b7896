"""Reads the form of equations and inequalities: names, values, intervals; and the letters in expressions."""

import re

from megatron_p2o.rewards.math.reading.answer import Answer, Items, Labelled, Quantity, Relation, Unread, Words, read
from megatron_p2o.rewards.math.reading.forms import reals_without
from megatron_p2o.rewards.math.reading.tree import CONSTANTS, FUNCTIONS

_GREEK = (
    "alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon|"
    "(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|ell"
)
_NAME = rf"(?:[A-Za-z]|\\(?:{_GREEK})(?![A-Za-z]))(?:_(?:\w|\\[a-z]+|\{{[^{{}}=]*\}}))?"
_ARGUMENTS = r"\((?:[\w.+-]|\\[A-Za-z]+)(?:,[\w.-]+)*\)"
_EVENT = r"(?:[EPT]|\\mathbb\{[EP]\}|Var|\\text\{(?:Var|Cov|Area|Volume)\})(?:\([^=]*\)|\[[^=]*\])"
_FUNCTION = r"[fghFGH](?:_\w)?'*\([^=()]*\)"
_ACCENTED = r"\\(?:vec|hat|bar|overline|dot|ddot|tilde|overrightarrow|mathbb|mathcal) ?\{?[A-Za-z]{1,3}\}?(?:_\w)?"
_DERIVATIVE = r"\\frac\{(?:d|\\partial ?)[A-Za-z]?\}\{(?:d|\\partial ?)[A-Za-z]\}"
_SAYS_MORE = r"(?:not?|isn|never|wrong|other|cannot|can|false|if|unless|twice|half|double|triple|minus|except)\b"
LONE_NAME = re.compile(
    rf"{_NAME}'*(?:{_ARGUMENTS})?|{_FUNCTION}|{_EVENT}|{_ACCENTED}|{_DERIVATIVE}|"
    rf"\\text\{{(?![^{{}}]*\b{_SAYS_MORE})[^{{}}]*\}}"
)
"""The name of one quantity: x, x_1, f(2), P(A), a word. `2x` and `x(x-1)` are none."""

_POINTS = r"(?:m?\\(?:angle|triangle) ?)?(?:[A-Z]'?(?:_(?:\w|\{[^{}]*\}))?)+"
_MEASURED = re.compile(
    rf"\|?{_POINTS}\|?|\[{_POINTS}\]|{_POINTS}[:/]{_POINTS}|\\frac\{{{_POINTS}\}}\{{{_POINTS}\}}|"
    rf"\({_NAME}(?:,{_NAME})+\)"
)
"""What an equation may give besides an unknown: a length AB, a ratio of two, a point (x,y)."""
_LETTER = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}]*\}")
_SPELLED_NAMES = r"\frac \sqrt \cdot \times \div \pm \mp \infty \degree \binom"
_SPELLED = frozenset(_SPELLED_NAMES.split())
_ROOT = re.compile(r"[a-z]_\{?\d\}?")
_LESS, _MORE = ("<", r"\le"), (">", r"\ge")
MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}


def as_intervals(items: Items) -> Items:
    """Return `x<1 or x>2` as a union of intervals, `x>1 and x<2` as an interval, anything else as it is."""
    intervals = [interval_of(part) if isinstance(part, Relation) else None for part in items.parts]
    found = [interval for interval in intervals if interval is not None]
    if items.kind or len(found) < len(intervals) or len({unknown for unknown, _ in found}) != 1:
        return items
    parts = tuple(interval for _, interval in found)
    return _intersection(items, parts) if items.connective == "and" else Items("union", parts, is_ordered=False)


def _intersection(items: Items, intervals: tuple[Items, ...]) -> Items:
    """Return the interval between a lower and an upper bound; other conditions as they are."""
    infinities = (read(r"-\infty"), read(r"\infty"))
    lower = [interval for interval in intervals if interval.parts[1] == infinities[1]]
    upper = [interval for interval in intervals if interval.parts[0] == infinities[0]]
    if len(lower) != 1 or len(upper) != 1 or len(intervals) != 2:
        return items
    bounds = (lower[0].parts[0], upper[0].parts[1])
    return Items(lower[0].kind[0] + upper[0].kind[1], bounds, is_ordered=True)


def names_of(items: Items) -> list[str]:
    """Return the name that each part is assigned to, [] unless all are assignments `x=...`."""
    names = [name_of(part) for part in items.parts]
    return [name for name in names if name] if all(names) else []


def name_of(answer: Answer) -> str:
    """Return the left side of `x=...`, `f(x)=...`, `x\\in...`; "" for anything else."""
    if not isinstance(answer, Relation) or len(answer.sides) != 2 or answer.signs[0] not in ("=", r"\in", ":="):
        return ""
    return answer.sides[0] if is_name(answer.sides[0]) else ""


def is_name(side: str) -> bool:
    """Return whether a side of an equation only names a quantity."""
    return bool(LONE_NAME.fullmatch(side) or _MEASURED.fullmatch(side))


def stem(name: str) -> str:
    """Return a name without its index: x of x_1."""
    return name.partition("_")[0]


def are_roots(names: list[str]) -> bool:
    """Return whether values belong to one unknown: `x=2, x=3`, or x_1 and x_2; T_A and T_B are different things."""
    if len(set(names)) == 1:
        return True
    return len({stem(name) for name in names}) == 1 and all(_ROOT.fullmatch(name) for name in names)


def as_values(items: Items, names: list[str], is_gold: bool) -> Items:
    """Values of different unknowns are a tuple: as the gold answer lists them, else in the order of the letters.

    `y=2,x=1` answers (1, 2). Several values of one unknown are a set, unless the gold answer numbers them.
    """
    if not names or (are_roots(names) and (not is_gold or len(set(names)) == 1)):
        return _without_repeated_points(items)
    parts = items.parts
    if not is_gold and all(len(name) == 1 for name in names):
        parts = tuple(in_order_of_names(items, names))
    return Items(items.kind, parts, is_ordered=True)


def _without_repeated_points(items: Items) -> Items:
    if items.is_ordered or not all(isinstance(part, Items) for part in items.parts):
        return items
    return Items(items.kind, tuple(dict.fromkeys(items.parts)), is_ordered=False)


def in_order_of_names(items: Items, names: list[str]) -> list[Answer]:
    """Return the parts of a list sorted by `names`, one for each."""
    return [part for _, part in sorted(zip(names, items.parts, strict=True), key=lambda pair: pair[0])]


def value_of(assignment: Answer) -> Answer:
    """Return the last side of an equation, read; anything else as it is."""
    return read(assignment.sides[-1]) if isinstance(assignment, Relation) else assignment


def mirrored(relation: Relation) -> Relation | None:
    """Return `3>x` for `x<3`; None for signs that cannot be turned."""
    if not all(sign in MIRRORED for sign in relation.signs):
        return None
    return Relation(relation.sides[::-1], tuple(MIRRORED[sign] for sign in reversed(relation.signs)))


def interval_of(relation: Relation) -> tuple[str, Items] | None:
    """Return the unknown and the interval that an inequality such as `0<x<1` or `x>2` gives it."""
    sides, signs = relation.sides, relation.signs
    if signs == (r"\in",) and isinstance(items := read(sides[1]), Items):
        return sides[0], items
    if signs == (r"\ne",) and is_name(sides[0]) and isinstance(items := read(reals_without([sides[1]])), Items):
        return sides[0], items
    if all(sign in _MORE for sign in signs):
        sides, signs = sides[::-1], tuple(MIRRORED[sign] for sign in reversed(signs))
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


def without_modulus(side: str) -> str:
    """Return the side of a congruence without the modulus behind it."""
    return re.sub(r"\\pmod\{?[\w^{}]+\}?$|\(\\mod ?\w+\)$", "", side).strip()


def letters(text: str) -> set[str]:
    """Return the letters, Greek letters and words in an expression that are not constants, functions or units."""
    found = {token.replace(" ", "") for token in _LETTER.findall(_ENVIRONMENT.sub("", text))}
    names = set(CONSTANTS) | _SPELLED | {f"\\{name}" for name in FUNCTIONS}
    return {token for token in found - names if not token.startswith("\\text")} | {
        token for token in found if token.startswith("\\text") and len(token) > 7 and not any(c.isdigit() for c in text)
    }


def text_of(answer: Answer) -> str:
    """Return all expressions in an answer, as text."""
    if isinstance(answer, Quantity | Words | Unread):
        return answer.text
    if isinstance(answer, Labelled):
        return text_of(answer.value)
    if isinstance(answer, Items):
        return " ".join(text_of(part) for part in answer.parts)
    return " ".join(answer.sides) if isinstance(answer, Relation) else ""
