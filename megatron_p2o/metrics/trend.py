"""Detects that a number which should stay constant has risen since the start of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

NUM_FIRST = 10
"""Observations whose median is the level a run began with."""

NUM_LAST = 5
"""Observations whose median is its level now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rise:
    """Two levels of one number, each a median."""

    first: float
    last: float


def rise_of(numbers: Sequence[float], *, times: float, floor: float) -> Rise | None:
    """Return the levels where median(last 5) > max(`times` x median(first 10), `floor`); None elsewhere.

    Args:
        numbers: finite, oldest first. Fewer than 15 have no rise: the two windows would overlap.
        times: how often the first level the last one may be.
        floor: level that is noise of the arithmetic, of which any multiple means nothing.
    """
    if len(numbers) < NUM_FIRST + NUM_LAST:
        return None
    rise = Rise(first=median(numbers[:NUM_FIRST]), last=median(numbers[-NUM_LAST:]))
    return rise if rise.last > max(times * rise.first, floor) else None
