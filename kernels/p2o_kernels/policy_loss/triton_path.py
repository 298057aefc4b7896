# pyright: reportArgumentType=false, reportCallIssue=false
"""Launches the token-loss kernel."""

import torch
import triton
from torch import Tensor

from p2o_kernels.policy_loss.token_loss import (
    MAX_CONTEXT_LOG_RATIO,
    MAX_LOG_RATIO,
    LossRule,
    TokenInputs,
    TokenLosses,
)
from p2o_kernels.policy_loss.triton_kernels import token_losses_kernel

_BLOCK = 256


def token_losses_triton(rule: LossRule, logprobs_N: Tensor, tokens: TokenInputs) -> TokenLosses:
    """`token_losses_torch` in one launch, float32."""
    num_tokens = len(logprobs_N)
    losses, logprob_grad, weights, ratio = logprobs_N.new_empty(4, num_tokens).unbind()
    is_clipped = torch.empty(num_tokens, dtype=torch.int8, device=logprobs_N.device)
    # A pointer that the kernel does not read still has to be one.
    old = logprobs_N if tokens.old_logprobs_N is None else tokens.old_logprobs_N.float()
    sampling, is_templated = logprobs_N, is_clipped
    if tokens.mask_logprobs_N is not None:
        assert tokens.is_templated_N is not None
        sampling, is_templated = tokens.mask_logprobs_N.float(), tokens.is_templated_N.to(torch.int8)
    token_losses_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
        logprobs_N, tokens.advantages_N.float(), tokens.weights_N.float(), old, sampling, is_templated,
        losses, logprob_grad, weights, ratio, is_clipped,
        num_tokens, rule.clip_low, rule.clip_high, rule.dual_clip, rule.ratio_low, rule.ratio_high,
        MAX_LOG_RATIO, MAX_CONTEXT_LOG_RATIO,
        HAS_OLD=tokens.old_logprobs_N is not None, HAS_MASK=tokens.mask_logprobs_N is not None,
        SOFT={"hard": False, "soft": True}[rule.ratio_form], BLOCK=_BLOCK,
    )  # fmt: skip
    return TokenLosses(
        losses_N=losses,
        logprob_grad_N=logprob_grad,
        weights_N=weights,
        ratio_N=ratio,
        is_clipped_N=is_clipped.bool(),
    )
