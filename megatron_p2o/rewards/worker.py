"""Compares answers with math-verify. Runs in the processes of `fork_server` alone, which may be killed at any time."""

from functools import lru_cache
from typing import Any

RELATIVE_TOLERANCE = 1e-6
"""Two numbers that math-verify calls equal must agree within this, relative to the smaller of 1 and the gold one."""


def is_match(answers: list[str], gold: str) -> bool:
    """Return whether math-verify calls every answer equal to `gold` and their numbers do not contradict it."""
    import math_verify  # in the worker alone: it takes a second and 60 MB

    gold_forms = parsed(gold)
    for answer in answers:
        try:
            forms = parsed(answer)
            is_equal = math_verify.verify(gold_forms, forms, timeout_seconds=0, raise_on_error=True)
            if not (is_equal and ("%" in gold or numbers_agree(gold_forms, forms))):
                return False
        except MemoryError:
            raise
        except Exception:  # sympy raises anything on odd input; an answer it cannot compare is not the gold one
            return False
    return True


@lru_cache(maxsize=4096)
def parsed(latex: str) -> list[Any]:
    """Return math-verify's readings of an answer: an expression when it has one, and the text."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units are gone already: this normalisation takes single letters, such as the t of 2t, for units.
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    extraction = LatexExtractionConfig(
        try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=spelling
    )
    return parse(rf"\boxed{{{latex}}}", [extraction], parsing_timeout=0, raise_on_error=True)


def numbers_agree(gold_forms: list[Any], forms: list[Any]) -> bool:
    """Return whether two numbers agree in relative terms; True for anything but finite numbers.

    math-verify rounds to six decimals, so that it calls every tiny number equal to 0.
    """
    gold, answer = gold_forms[0], forms[0]
    if not all(getattr(form, "is_number", False) and form.is_finite for form in (gold, answer)):
        return True
    scale = abs(gold.evalf(30))
    return bool(abs((gold - answer).evalf(30)) <= RELATIVE_TOLERANCE * min(1, scale))
