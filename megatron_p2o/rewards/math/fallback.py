"""Compares answers of a form that is not read here (sums, integrals, limits) with math-verify.

Believed only if the parse kept every letter: math-verify folds case, drops primes, and takes symbols for functions.
"""

import re
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify.grader import should_treat_as_complex

_LETTER = re.compile(r"\\([A-Za-z]+)|([A-Za-z])")
_OPERATIONS = (
    "frac sqrt sum prod int iint lim infty pi to rightarrow cdot times div pm le ge ne in cup cap sin cos tan cot "
    "sec csc log ln exp arcsin arccos arctan sinh cosh tanh binom det"
)
_COMMANDS = frozenset(_OPERATIONS.split())
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]*matrix\}")
_UNBRACED = re.compile(r"\\frac ?(\w)")
_CONSTANTS = frozenset("eid")
"""Letters that a parse may turn into numbers or, of an integral, leave out."""


def is_equal_by_math_verify(gold: str, answer: str) -> bool:
    """Return whether math-verify calls an answer equal to the gold one and has lost nothing of either."""
    try:
        forms = [_parsed(gold), _parsed(answer)]
        return bool(
            all(_keeps_letters(text, form) for text, form in zip((gold, answer), forms, strict=True))
            and (_renamed(forms[0]) == _renamed(forms[1]) or _verified(forms))
        )
    except MemoryError:
        raise
    except Exception:  # sympy raises anything on odd input; an answer it cannot compare is not the gold one
        return False


def _verified(forms: list[Any]) -> bool:
    return bool(math_verify.verify([forms[0]], [forms[1]], timeout_seconds=0, raise_on_error=True))


def _renamed(form: Any) -> Any:
    """Return a form whose bound variables, as of a sum, have names of their place: the sum over k is that over n."""
    return form.xreplace(form.canonical_variables) if isinstance(form, sympy.Expr) else form


@lru_cache(maxsize=1024)
def _parsed(latex: str) -> Any:
    return latex2sympy(
        _UNBRACED.sub(r"\\frac{\1}", latex),
        is_real=not should_treat_as_complex(latex),
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )


def _keeps_letters(latex: str, form: Any) -> bool:
    """Return whether the symbols of a parse are the letters of its text, and none of its values is undefined."""
    if not isinstance(form, sympy.Basic | sympy.MatrixBase) or form.has(sympy.nan, sympy.zoo, sympy.Derivative):
        return False
    found = _LETTER.findall(_ENVIRONMENT.sub("", latex))
    if any(command and command not in _COMMANDS for command, _ in found) or "'" in latex:
        return False
    written = {letter for _, letter in found if letter} - _CONSTANTS
    kept = {letter for symbol in form.atoms(sympy.Symbol) for letter in str(symbol) if letter.isalpha()} - _CONSTANTS
    return written == kept
