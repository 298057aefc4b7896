# pyright: reportArgumentType=false, reportCallIssue=false
"""Launches the kernels of `grouped_advantage` and `active_token_index`.

Legend: R rollouts, T packed tokens, B blocks of tokens.
"""

import torch
import triton
from torch import Tensor

from p2o_kernels.advantage.triton_kernels import (
    active_token_index_kernel,
    count_active_kernel,
    grouped_advantage_kernel,
)

_BLOCK = 1024
"""Rollouts, and tokens, that a program takes at a time."""


def grouped_advantage_triton(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    is_valid_R: Tensor,
    estimator: str,
    anchor_rates_R: Tensor | None,
) -> Tensor:
    """Return the advantages [R]; one launch."""
    num_rollouts = len(rewards_R)
    advantages_R = torch.empty_like(rewards_R)
    if num_rollouts:
        grouped_advantage_kernel[(num_rollouts,)](
            rewards_R, group_ids_R, is_valid_R.view(torch.uint8),
            rewards_R if anchor_rates_R is None else anchor_rates_R, advantages_R, num_rollouts,
            ESTIMATOR=estimator, HAS_ANCHORS=anchor_rates_R is not None, BLOCK_ROLLOUTS=_BLOCK,
        )  # fmt: skip
    return advantages_R


def active_token_index_triton(advantages_T: Tensor, weights_T: Tensor) -> Tensor:
    """Return the positions where both are not zero, ascending: counts of blocks, their running sum, positions."""
    num_tokens = len(advantages_T)
    if num_tokens == 0:
        return torch.empty(0, dtype=torch.int64, device=advantages_T.device)
    advantages_T, weights_T = advantages_T.contiguous(), weights_T.contiguous()
    num_active_B = torch.empty(triton.cdiv(num_tokens, _BLOCK), dtype=torch.int32, device=advantages_T.device)
    grid = (len(num_active_B),)
    count_active_kernel[grid](advantages_T, weights_T, num_active_B, num_tokens, BLOCK_TOKENS=_BLOCK)
    ends_B = num_active_B.cumsum(0)
    index = torch.empty(int(ends_B[-1]), dtype=torch.int64, device=advantages_T.device)
    active_token_index_kernel[grid](
        advantages_T, weights_T, num_active_B, ends_B, index, num_tokens, BLOCK_TOKENS=_BLOCK
    )
    return index
