"""Credit of a rollout against its siblings (arXiv:2402.03300 GRPO, arXiv:2503.20783 Dr.GRPO, arXiv:2402.14740 RLOO)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

STD_EPSILON = 1e-6
"""Added to the standard deviation of GRPO, as the authors do."""

Estimator = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(
    rewards_G: Sequence[float], estimator: Estimator, *, anchor_success_rate: float | None = None
) -> tuple[float, ...]:
    """Return one advantage per rollout, computed in float64.

    Args:
        rewards_G: rewards of the siblings.
        estimator: "grpo" (r - mean) / (unbiased std + 1e-6), "dr_grpo" r - mean, "rloo" r - mean of the others.
        anchor_success_rate: when given, as many virtual plain rollouts as there are real ones join the baseline. They
            enter by the expected moments of a 0/1 reward at this rate, so that templated rollouts that all succeed
            where the plain prompt fails still carry a positive advantage.

    Returns:
        Exactly 0 for every rollout when no reward differs (from the siblings and from the anchor).
    """
    rewards = np.asarray(rewards_G, dtype=np.float64)
    if len(rewards) == 0:
        return ()
    size, mean = len(rewards), rewards.mean()
    possible = set(rewards.tolist())
    anchor_squares = 0.0
    if anchor_success_rate is not None:
        failures, successes = size * (1 - anchor_success_rate), size * anchor_success_rate
        mean = (rewards.sum() + successes) / (2 * size)
        anchor_squares = successes * (1 - mean) ** 2 + failures * mean**2
        possible |= ({1.0} if successes > 0 else set()) | ({0.0} if failures > 0 else set())
        size = 2 * size
    if len(possible) <= 1 or size < 2:
        return tuple(0.0 for _ in rewards)
    centred = rewards - mean
    if estimator == "dr_grpo":
        scaled = centred
    elif estimator == "rloo":
        scaled = centred * (size / (size - 1))
    else:
        variance = (np.square(centred).sum() + anchor_squares) / (size - 1)
        scaled = centred / (np.sqrt(variance) + STD_EPSILON)
    return tuple(float(value) for value in scaled)
