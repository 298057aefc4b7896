# pyright: reportAttributeAccessIssue=false
"""Triton kernels of `grouped_advantage` and `active_token_index`."""

import triton
import triton.language as tl

from p2o_kernels.advantage.reference import STD_EPSILON

_STD_EPSILON = tl.constexpr(STD_EPSILON)


@triton.jit
def grouped_advantage_kernel(
    rewards_ptr, group_ids_ptr, is_valid_ptr, anchor_rates_ptr, advantages_ptr, num_rollouts,
    ESTIMATOR: tl.constexpr, HAS_ANCHORS: tl.constexpr, BLOCK_ROLLOUTS: tl.constexpr,
):  # fmt: skip
    """Grid (R,). Each program finds the statistics of its rollout's group again: cheaper than a second launch.

    Rewards enter relative to the rollout's own, so float32 keeps the digits in which the group differs.
    """
    rollout = tl.program_id(0)
    own_group = tl.load(group_ids_ptr + rollout)
    is_valid = tl.load(is_valid_ptr + rollout) != 0
    own_reward = tl.where(is_valid, tl.load(rewards_ptr + rollout), 0.0)
    size = 0.0
    total = 0.0
    highest = float("-inf")
    lowest = float("inf")
    for start in range(0, num_rollouts, BLOCK_ROLLOUTS):
        others = start + tl.arange(0, BLOCK_ROLLOUTS)
        inside = others < num_rollouts
        is_sibling = inside & (tl.load(is_valid_ptr + others, mask=inside, other=0) != 0)
        is_sibling = is_sibling & (tl.load(group_ids_ptr + others, mask=inside, other=0) == own_group)
        relative = tl.load(rewards_ptr + others, mask=inside, other=0.0) - own_reward
        size += tl.sum(tl.where(is_sibling, 1.0, 0.0), 0)
        total += tl.sum(tl.where(is_sibling, relative, 0.0), 0)
        highest = tl.maximum(highest, tl.max(tl.where(is_sibling, relative, float("-inf")), 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(is_sibling, relative, float("inf")), 0))
    successes = 0.0
    failures = 0.0
    if HAS_ANCHORS:
        rate = tl.load(anchor_rates_ptr + rollout)
        has_anchor = rate == rate  # not nan
        successes = tl.where(has_anchor, size * rate, 0.0)
        failures = tl.where(has_anchor, size * (1.0 - rate), 0.0)
        highest = tl.where(successes > 0.0, tl.maximum(highest, 1.0 - own_reward), highest)
        lowest = tl.where(successes > 0.0, tl.minimum(lowest, 1.0 - own_reward), lowest)
        highest = tl.where(failures > 0.0, tl.maximum(highest, -own_reward), highest)
        lowest = tl.where(failures > 0.0, tl.minimum(lowest, -own_reward), lowest)
        total += successes * (1.0 - own_reward) - failures * own_reward
        size = tl.where(has_anchor, 2.0 * size, size)
    mean = total / tl.maximum(size, 1.0)
    degrees = tl.maximum(size - 1.0, 1.0)
    advantage = -mean
    if ESTIMATOR == "grpo":
        squares = successes * (1.0 - own_reward - mean) * (1.0 - own_reward - mean)
        squares += failures * (own_reward + mean) * (own_reward + mean)
        for start in range(0, num_rollouts, BLOCK_ROLLOUTS):
            others = start + tl.arange(0, BLOCK_ROLLOUTS)
            inside = others < num_rollouts
            is_sibling = inside & (tl.load(is_valid_ptr + others, mask=inside, other=0) != 0)
            is_sibling = is_sibling & (tl.load(group_ids_ptr + others, mask=inside, other=0) == own_group)
            relative = tl.load(rewards_ptr + others, mask=inside, other=0.0) - own_reward
            centred = tl.where(is_sibling, relative - mean, 0.0)
            squares += tl.sum(centred * centred, 0)
        advantage = advantage / (tl.sqrt(squares / degrees) + _STD_EPSILON)
    elif ESTIMATOR == "rloo":
        advantage = advantage * (size / degrees)
    else:
        tl.static_assert(ESTIMATOR == "dr_grpo", "this estimator has no formula here")
    # A nan reward makes its group nan, not flat: the hardware's maximum and minimum drop it, the sum does not.
    is_flat = ((highest <= lowest) & (total == total)) | (size < 2.0)
    advantage = tl.where(is_valid & (is_flat == 0), advantage, 0.0)
    tl.store(advantages_ptr + rollout, advantage)


@triton.jit
def _is_active(advantages_ptr, weights_ptr, tokens, num_tokens):
    """Return int32, 1 for the tokens whose advantage and weight are not zero."""
    advantage = tl.load(advantages_ptr + tokens, mask=tokens < num_tokens, other=0.0)
    weight = tl.load(weights_ptr + tokens, mask=tokens < num_tokens, other=0.0)
    return ((advantage != 0.0) & (weight != 0.0)).to(tl.int32)


@triton.jit
def count_active_kernel(advantages_ptr, weights_ptr, num_active_ptr, num_tokens, BLOCK_TOKENS: tl.constexpr):
    """Grid (token blocks,). Counts the active tokens of a block."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_active = _is_active(advantages_ptr, weights_ptr, tokens, num_tokens)
    tl.store(num_active_ptr + tl.program_id(0), tl.sum(is_active, 0))


@triton.jit
def active_token_index_kernel(
    advantages_ptr, weights_ptr, num_active_ptr, ends_ptr, index_ptr, num_tokens, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (token blocks,). Writes the block's active positions in order; `ends` is the running sum of the counts."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_active = _is_active(advantages_ptr, weights_ptr, tokens, num_tokens)
    first = tl.load(ends_ptr + tl.program_id(0)) - tl.load(num_active_ptr + tl.program_id(0))
    tl.store(index_ptr + first + tl.cumsum(is_active, 0) - 1, tokens, mask=is_active != 0)
