"""Finds questions that are nearly those of another set: they share most of its n-grams of words."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

NGRAM_WORDS = 5
"""A changed number spoils this many n-grams and leaves the others."""

MIN_SHARE = 0.5
"""Least share of the known question's n-grams in a near duplicate."""

MIN_NGRAMS = 8
"""A known question with fewer must be found whole: half of it may be a common phrase."""

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|text|textbf|mathrm|mathbf|operatorname|quad|qquad|big|Big)(?![A-Za-z])"
)
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_WORD = re.compile(r"[^\W\d_]+|\d+")

RULE = (
    f"A question nearly repeats a known one when it holds at least the given share of the known one's distinct "
    f"{NGRAM_WORDS}-grams of words (all of them, if there are fewer than {MIN_NGRAMS}). Words are runs of letters and "
    f"runs of digits, without case; punctuation, LaTeX layout commands and drawings do not count."
)
"""For readers of a manifest."""

Ngram = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How a question resembles a known one."""

    id: str
    """Id of the known question."""
    share: float
    """Share of its n-grams that are found, in [0, 1]."""


def words(question: str) -> tuple[str, ...]:
    """Return the words and numbers of a question without case, punctuation, drawings and LaTeX's layout commands."""
    text = _LAYOUT.sub(" ", _DRAWING.sub(" ", question))
    return tuple(_WORD.findall(_FRACTION.sub(r"\\frac", text).casefold()))


def ngrams(question: str) -> frozenset[Ngram]:
    """Return the question's n-grams; one that has fewer words is a single n-gram."""
    found = words(question)
    starts = range(max(len(found) - NGRAM_WORDS, 0) + 1) if found else ()
    return frozenset(found[start : start + NGRAM_WORDS] for start in starts)


class NearDuplicateIndex:
    """Known questions, to be compared with many others."""

    def __init__(self, questions: Mapping[str, str], min_share: float = MIN_SHARE) -> None:
        """Args:
        questions: text by id.
        min_share: see `MIN_SHARE`.
        """
        self._num_needed: dict[str, float] = {}
        self._num_ngrams: dict[str, int] = {}
        self._ids_by_ngram: dict[Ngram, list[str]] = {}
        for question_id, question in questions.items():
            own = ngrams(question)
            self._num_ngrams[question_id] = len(own)
            self._num_needed[question_id] = len(own) * (min_share if len(own) >= MIN_NGRAMS else 1)
            for ngram in own:
                self._ids_by_ngram.setdefault(ngram, []).append(question_id)

    def overlap(self, question: str) -> Overlap | None:
        """Return the known question that this one repeats most of; None when it nearly repeats none."""
        num_shared = Counter(known for ngram in ngrams(question) for known in self._ids_by_ngram.get(ngram, ()))
        shares = {
            known: count / self._num_ngrams[known]
            for known, count in num_shared.items()
            if count >= self._num_needed[known]
        }
        best = max(shares, key=lambda known: (shares[known], known), default=None)
        return None if best is None else Overlap(id=best, share=shares[best])
