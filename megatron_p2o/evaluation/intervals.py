"""Confidence intervals over problems. They hold for few problems, and if all or none were solved.

The percentile bootstrap knows only the values it was given: of equal ones it makes a point. It serves where at least
`MIN_VARIED` problems differ from the others. Elsewhere, and always for problems answered once, binomial intervals do.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import mpmath
import numpy as np

from megatron_p2o.evaluation.estimators import CHUNK_NUMBERS, NUM_RESAMPLES

CONFIDENCE = 0.95

MIN_VARIED = 6
"""Problems that must differ from the commonest value for a bootstrap. With five, no paired test could reach 95 %; and
for rare successes (shares from Beta(0.02, 0.5) and Beta(0.05, 0.5), 15 to 60 problems) a bootstrap covered 59 to 93 %
in place of 95, Clopper and Pearson's interval 96 to 100."""

NUM_HALVINGS = 60
"""Bisections of a range no wider than 2. The remainder is below a rounding error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A confidence interval at `CONFIDENCE`."""

    low: float
    high: float


def mean_interval(values: Sequence[float], seed: int) -> Interval:
    """Return the interval of the mean of shares in [0, 1], one per problem, at least one.

    Clopper and Pearson's where all are 0 or 1, or too few vary: shares vary no more than zeros and ones of their mean,
    so that it is then too wide rather than too narrow. Else the bootstrap's, seeded.
    """
    if _is_varied(values, {0.0, 1.0}):
        return _bootstrap_interval(values, seed)
    return share_interval(math.fsum(values), len(values))


def difference_interval(differences: Sequence[float], p_value: float, seed: int) -> Interval:
    """Return the interval of the mean of paired differences in [-1, 1], one per problem, at least one.

    Tango's score interval where all are -1, 0 or 1, or too few vary, else the bootstrap's, seeded. It holds 0 wherever
    `p_value`, of the test that the mean is 0, is too large to exclude it.
    """
    if _is_varied(differences, {-1.0, 0.0, 1.0}):
        interval = _bootstrap_interval(differences, seed)
    else:
        gained = math.fsum(max(difference, 0.0) for difference in differences)
        lost = math.fsum(max(-difference, 0.0) for difference in differences)
        interval = score_interval(gained, lost, len(differences))
    if p_value <= 1 - CONFIDENCE:
        return interval
    return Interval(low=min(interval.low, 0.0), high=max(interval.high, 0.0))


@lru_cache(maxsize=1024)
def share_interval(num_solved: float, num_problems: int) -> Interval:
    """Return the exact interval of a binomial share (Clopper and Pearson, 1934); `num_solved` may sum up shares."""
    tail, num_failed = (1 - CONFIDENCE) / 2, num_problems - num_solved
    low = 0.0 if num_solved <= 0 else _beta_quantile(tail, num_solved, num_failed + 1)
    high = 1.0 if num_failed <= 0 else _beta_quantile(1 - tail, num_solved + 1, num_failed)
    return Interval(low=low, high=high)


def score_interval(num_gained: float, num_lost: float, num_problems: int) -> Interval:
    """Return the score interval of a difference of paired shares (Tango, Statistics in Medicine 17, 1998).

    Args:
        num_gained: problems only the second solved, or a sum of shares that it solved more.
        num_lost: the same for the first.
        num_problems: all of them.
    """
    limit = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    observed = (num_gained - num_lost) / num_problems

    def score(difference: float) -> float:
        return _paired_score(difference, num_gained, num_lost, num_problems)

    return Interval(
        low=-1.0 if score(-1.0) <= limit else _crossing(lambda at: limit - score(at), -1.0, observed),
        high=1.0 if score(1.0) >= -limit else _crossing(lambda at: -limit - score(at), observed, 1.0),
    )


def _paired_score(difference: float, num_gained: float, num_lost: float, num_problems: int) -> float:
    """Return how many standard errors the observed difference lies above `difference`, under which they are taken."""
    b = (2 * num_problems - num_gained + num_lost) * difference - num_gained - num_lost
    c = -num_lost * difference * (1 - difference)
    share_lost = (math.sqrt(max(0.0, b * b - 8 * num_problems * c)) - b) / (4 * num_problems)
    variance = num_problems * (2 * share_lost + difference * (1 - difference))
    distance = num_gained - num_lost - num_problems * difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _beta_quantile(share: float, a: float, b: float) -> float:
    return _crossing(lambda x: float(mpmath.betainc(a, b, 0, x, regularized=True)) - share, 0.0, 1.0)


def _crossing(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function that rises from below 0 at `low` to above it at `high` crosses 0."""
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def _is_varied(values: Sequence[float], trials: set[float]) -> bool:
    """Whether values other than the outcomes of single trials are there, and enough vary for a bootstrap."""
    return not trials.issuperset(values) and len(values) - max(Counter(values).values()) >= MIN_VARIED


def _bootstrap_interval(values: Sequence[float], seed: int) -> Interval:
    """Return the percentiles of the means of `NUM_RESAMPLES` resamples of the problems."""
    column = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_NUMBERS // len(column))
    means = np.concatenate(
        [
            column[generator.integers(len(column), size=(min(rows, NUM_RESAMPLES - start), len(column)))].mean(axis=1)
            for start in range(0, NUM_RESAMPLES, rows)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(low=float(low), high=float(high))
