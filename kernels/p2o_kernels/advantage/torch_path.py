"""`grouped_advantage` in torch: float64 sums over group indices."""

import torch
from torch import Tensor

from p2o_kernels.advantage.reference import STD_EPSILON


def grouped_advantage_torch(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    is_valid_R: Tensor,
    estimator: str,
    anchor_rates_R: Tensor | None,
) -> Tensor:
    """Return the advantages [R]; see `grouped_advantage`."""
    _, group_R = torch.unique(group_ids_R, return_inverse=True)
    # What an invalid rollout was given, nan included, must not enter a sum.
    rewards = rewards_R.double().where(is_valid_R, 0.0)
    weight_R = is_valid_R.double()
    has_anchor_R, rate_R = torch.zeros_like(is_valid_R), torch.zeros_like(rewards)
    if anchor_rates_R is not None:
        has_anchor_R = ~anchor_rates_R.isnan()
        rate_R = anchor_rates_R.double().nan_to_num(0.0)
    anchored_R = weight_R * has_anchor_R
    size_R = _group_sum(weight_R + anchored_R, group_R)
    mean_R = _group_sum(weight_R * rewards + anchored_R * rate_R, group_R) / size_R.clamp(min=1.0)
    squares_R = weight_R * (rewards - mean_R).square()
    squares_R = squares_R + anchored_R * (rate_R * (1.0 - mean_R).square() + (1.0 - rate_R) * mean_R.square())
    degrees_R = (size_R - 1.0).clamp(min=1.0)
    is_flat_R = _is_flat(rewards_R, is_valid_R, has_anchor_R, rate_R, group_R) | (size_R < 2)
    centred_R = rewards - mean_R
    match estimator:
        case "grpo":
            credit_R = centred_R / ((_group_sum(squares_R, group_R) / degrees_R).sqrt() + STD_EPSILON)
        case "dr_grpo":
            credit_R = centred_R
        case "rloo":
            credit_R = centred_R * (size_R / degrees_R)
        case _:
            raise ValueError(f"estimator={estimator!r} has no formula here")
    return torch.where(is_flat_R | ~is_valid_R, 0.0, credit_R).float()


def active_token_index_torch(advantages_T: Tensor, weights_T: Tensor) -> Tensor:
    """Return the positions where both are not zero, ascending."""
    return ((advantages_T != 0) & (weights_T != 0)).nonzero().squeeze(1)


def _group_sum(values_R: Tensor, group_R: Tensor) -> Tensor:
    """Return, for each rollout, the sum over its group."""
    sums = values_R.new_zeros(len(group_R)).index_add_(0, group_R, values_R)
    return sums[group_R]


def _is_flat(rewards_R: Tensor, is_valid_R: Tensor, has_anchor_R: Tensor, rate_R: Tensor, group_R: Tensor) -> Tensor:
    """Whether the largest and the smallest reward of the rollout's group, anchors included, are the same number."""

    highest, lowest = rewards_R, rewards_R
    for is_present_R, reward in ((has_anchor_R & (rate_R > 0), 1.0), (has_anchor_R & (rate_R < 1), 0.0)):
        highest = torch.where(is_present_R, highest.clamp(min=reward), highest)
        lowest = torch.where(is_present_R, lowest.clamp(max=reward), lowest)

    def extreme(values_R: Tensor, reduction: str, neutral: float) -> Tensor:
        start = torch.full_like(values_R, neutral)
        return start.scatter_reduce_(0, group_R, torch.where(is_valid_R, values_R, neutral), reduction)[group_R]

    return extreme(highest, "amax", -torch.inf) <= extreme(lowest, "amin", torch.inf)
