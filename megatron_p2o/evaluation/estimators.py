"""Estimates from a sample of responses: pass@k, and tests of paired differences.

Everything is over problems: they are the sample, responses to one problem are not independent of each other.
"""

import math
from collections.abc import Sequence

import numpy as np

NUM_RESAMPLES = 10_000
"""Bootstrap resamples, and random sign patterns of the permutation test."""

EXACT_SIGNS = 16
"""Most differing problems for which the permutation test goes through all sign patterns."""

CHUNK_NUMBERS = 1 << 20
"""Random numbers drawn at once: bounds the memory."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return 1 - C(n-c, k)/C(n, k): the unbiased estimate of solving a problem in `k` tries (arXiv:2107.03374).

    Raises:
        ValueError: `k` is not in 1..`num_samples`.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} must lie in 1..{num_samples}, the samples of the problem")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def powers_up_to(num_samples: int) -> list[int]:
    """Return 1, 2, 4, ... and `num_samples` itself: the k of pass@k."""
    return sorted({1 << exponent for exponent in range(num_samples.bit_length())} | {num_samples})


def sign_permutation_p_value(differences: Sequence[float], seed: int) -> float:
    """Return the two-sided p-value of "the mean of these paired differences is 0", by flipping their signs.

    Exact up to `EXACT_SIGNS` non-zero differences, beyond from `NUM_RESAMPLES` seeded sign patterns and the observed
    one, so that it is never 0.
    """
    moved = np.asarray([difference for difference in differences if difference != 0], dtype=np.float64)
    if len(moved) == 0:
        return 1.0
    # Equal sums in another order of addition must count as equal.
    observed = abs(moved.sum()) * (1 - 1e-12)
    if len(moved) <= EXACT_SIGNS:
        patterns = np.arange(1 << len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ moved) >= observed))
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_NUMBERS // len(moved))
    num_extreme = 1
    for start in range(0, NUM_RESAMPLES, rows):
        signs = 1 - 2 * generator.integers(2, size=(min(rows, NUM_RESAMPLES - start), len(moved)))
        num_extreme += int(np.sum(np.abs(signs @ moved) >= observed))
    return num_extreme / (NUM_RESAMPLES + 1)


def mcnemar_p_value(num_only_first: int, num_only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: problems that only one of two policies solved."""
    num_discordant = num_only_first + num_only_second
    smaller = min(num_only_first, num_only_second)
    tail = sum(math.comb(num_discordant, count) for count in range(smaller + 1))
    return min(1.0, 2 * tail / 2**num_discordant)
