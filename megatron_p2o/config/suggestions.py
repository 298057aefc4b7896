"""Finds the known name that is nearest to an unknown one."""

import difflib
from collections.abc import Collection

CUTOFF = 0.75
"""Share of letters in common, in order, from which two names are alike: `lrr` and `lr` are, `reward` and `head` not."""

MIN_BEGINNING = 3
"""Letters from which the beginning of a name stands for it: `temp`."""


def nearest(name: str, known: Collection[str]) -> str | None:
    """Return the known name that is most like `name`, or begins with it; None when none is."""
    alike = difflib.get_close_matches(name, known, n=1, cutoff=CUTOFF)
    begun = [other for other in known if len(name) >= MIN_BEGINNING and other.startswith(name)]
    return next(iter([*alike, *begun]), None)


def did_you_mean(name: str, known: Collection[str], prefix: str = "") -> str:
    """Return ": did you mean <prefix><nearest>?" for the end of a sentence; "" when no name is near."""
    near = nearest(name, known)
    return "" if near is None else f": did you mean {prefix}{near}?"
