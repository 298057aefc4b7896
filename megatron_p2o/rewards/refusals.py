"""Refuses answers that algebra must not see: they are endless, or may be."""

import re

from megatron_p2o.rewards.latex import nesting_depth

MAX_ANSWER_CHARACTERS = 400
"""Longest answer that is looked at, unless the gold answer is long too."""

MAX_REQUEST_CHARACTERS = 10_000
"""Longest gold and wrong answer together that algebra is asked about: as JSON they fit into the buffer of a pipe."""

MAX_NESTING = 25
"""Deepest brackets in an answer, unless the gold answer is deep too."""

COSTLY_FORMS = (
    re.compile(r"\^\{?\(?-?\d+\^|\^\{[^{}]*\d\^"),
    re.compile(r"\^\{?\(?-?\d{5,}|\)\^\{?-?\d{3,}"),
    re.compile(r"![)}]*!|\d{4,}[)}]*!"),
    re.compile(r"binom\{?\d{4,}"),
    re.compile(r"\\(?:sum|prod|i{0,3}int|oint|lim|det)(?![A-Za-z])"),
    re.compile(r"\\begin\{"),
)
r"""Towers of powers, huge exponents, factorials of factorials, huge binomials, operations over a range,
matrices: refused unless the gold answer has the same form."""


def is_too_long(gold: str, answer: str) -> bool:
    """Whether the answer is far longer than any answer to this problem: decided before anything reads it."""
    return len(answer) > max(MAX_ANSWER_CHARACTERS, 4 * len(gold))


def is_refused(gold: str, answer: str) -> bool:
    """Whether the answer (both in normal form) is incorrect for its form alone."""
    if len(gold) + len(answer) > MAX_REQUEST_CHARACTERS:
        return True
    if nesting_depth(answer) > max(MAX_NESTING, 2 * nesting_depth(gold)):
        return True
    return any(form.search(answer) and not form.search(gold) for form in COSTLY_FORMS)
