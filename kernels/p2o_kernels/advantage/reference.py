"""Specification of `grouped_advantage`: one group after the other, in Python floats (float64)."""

from collections.abc import Sequence
from math import sqrt

STD_EPSILON = 1e-6
"""Added to the standard deviation of GRPO."""


def group_advantages_reference(
    rewards_G: Sequence[float], is_valid_G: Sequence[bool], estimator: str, anchor_rate: float | None = None
) -> list[float]:
    """Return the advantage of each rollout of one group.

    Invalid rollouts neither shape the baseline nor get an advantage. With `anchor_rate` as many virtual rollouts as
    valid ones join the baseline, by the expected moments of a 0/1 reward at that rate.
    """
    rewards = [reward for reward, is_valid in zip(rewards_G, is_valid_G, strict=True) if is_valid]
    weighted = [(reward, 1.0) for reward in rewards]
    if anchor_rate is not None:
        weighted += [(1.0, len(rewards) * anchor_rate), (0.0, len(rewards) * (1.0 - anchor_rate))]
    weighted = [(reward, weight) for reward, weight in weighted if weight > 0]
    size = sum(weight for _, weight in weighted)
    if len({reward for reward, _ in weighted}) <= 1 or size < 2:
        return [0.0] * len(rewards_G)
    mean = sum(reward * weight for reward, weight in weighted) / size
    variance = sum(weight * (reward - mean) ** 2 for reward, weight in weighted) / (size - 1)
    factor = {"grpo": 1.0 / (sqrt(variance) + STD_EPSILON), "dr_grpo": 1.0, "rloo": size / (size - 1)}[estimator]
    return [
        (reward - mean) * factor if is_valid else 0.0 for reward, is_valid in zip(rewards_G, is_valid_G, strict=True)
    ]
