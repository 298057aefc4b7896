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
_RATIO_FORMS = {
    "hard": {"SOFT": False, "FADING": False, "ONE_SIDED": False},
    "one_sided": {"SOFT": False, "FADING": False, "ONE_SIDED": True},
    "soft": {"SOFT": True, "FADING": False, "ONE_SIDED": False},
    "fading": {"SOFT": False, "FADING": True, "ONE_SIDED": False},
}
_SURROGATES = {
    "ppo": {"CISPO": False, "DUAL_CLIP": True},
    "gspo": {"CISPO": False, "DUAL_CLIP": False},
    "cispo": {"CISPO": True, "DUAL_CLIP": False},
}


def token_losses_triton(rule: LossRule, logprobs_N: Tensor, tokens: TokenInputs) -> TokenLosses:
    """`token_losses_torch` in one launch, float32."""
    num_tokens = len(logprobs_N)
    losses, logprob_grad, weights, ratio = logprobs_N.new_empty(4, num_tokens).unbind()
    is_clipped = torch.empty(num_tokens, dtype=torch.int8, device=logprobs_N.device)

    def given(values: Tensor | None) -> Tensor:
        # A pointer that the kernel does not read still has to be one.
        return logprobs_N if values is None else values.float()

    is_templated = is_clipped if tokens.is_templated_N is None else tokens.is_templated_N.to(torch.int8)
    has_kl = rule.kl_coefficient > 0
    token_losses_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
        logprobs_N, tokens.advantages_N.float(), tokens.weights_N.float(), given(tokens.old_logprobs_N),
        given(tokens.mask_logprobs_N), is_templated, given(tokens.log_ratio_N), given(tokens.reference_logprobs_N),
        losses, logprob_grad, weights, ratio, is_clipped,
        num_tokens, rule.clip_low, rule.clip_high, rule.dual_clip, rule.ratio_low, rule.ratio_high,
        rule.importance_cap or 1.0, rule.kl_coefficient,
        MAX_LOG_RATIO, MAX_CONTEXT_LOG_RATIO,
        HAS_OLD=tokens.old_logprobs_N is not None, HAS_MASK=tokens.mask_logprobs_N is not None,
        HAS_LOG_RATIO=tokens.log_ratio_N is not None, **_RATIO_FORMS[rule.ratio_form],
        HAS_BAND=rule.context == "ratio_mask", HAS_CAP=rule.importance_cap is not None,
        **_SURROGATES[rule.surrogate], K2=has_kl and rule.kl_estimator == "k2", K3=has_kl and rule.kl_estimator == "k3",
        BLOCK=_BLOCK,
    )  # fmt: skip
    return TokenLosses(
        losses_N=losses,
        logprob_grad_N=logprob_grad,
        weights_N=weights,
        ratio_N=ratio,
        is_clipped_N=is_clipped.bool(),
    )
