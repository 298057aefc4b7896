"""Specification of `linear_policy_loss`: full logits, one rank, ordinary autograd."""

import torch
from torch import Tensor

from p2o_kernels.logprob.reference import linear_logprob_reference
from p2o_kernels.policy_loss.token_loss import LossRule


def linear_policy_loss_reference(
    hidden_TD: Tensor,
    weight_VpD: Tensor,
    targets_T: Tensor,
    *,
    advantages_T: Tensor,
    weights_T: Tensor,
    rule: LossRule,
    old_logprobs_T: Tensor | None = None,
    sampling_logprobs_T: Tensor | None = None,
    is_templated_T: Tensor | None = None,
    reference_logprobs_T: Tensor | None = None,
    sequence_T: Tensor | None = None,
    loss_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, logprobs_T, entropy_T) in `dtype`; the loss is differentiable in hidden and weight."""
    logprobs_T, entropy_T = linear_logprob_reference(
        hidden_TD, weight_VpD, targets_T, temperature=temperature, vocab_size=vocab_size, dtype=dtype
    )
    given_T = (weights_T != 0) & (advantages_T != 0)
    first_pass_T = logprobs_T.detach() if old_logprobs_T is None else old_logprobs_T.to(dtype)
    old_T = first_pass_T
    token_weights_T = weights_T.to(dtype)
    if rule.context == "importance":
        assert sampling_logprobs_T is not None
        old_T = sampling_logprobs_T.to(dtype)
    if rule.context == "ratio_mask":
        assert sampling_logprobs_T is not None and is_templated_T is not None
        rho_T = torch.where(is_templated_T, first_pass_T - sampling_logprobs_T.to(dtype), 0.0).clamp(-60, 60).exp()
        is_inside_T = (rho_T >= rule.ratio_low) & (rho_T <= rule.ratio_high)
        clipped_T = rho_T.clamp(rule.ratio_low, rule.ratio_high)
        factor_T = {
            "hard": is_inside_T.to(dtype),
            "one_sided": (is_inside_T | (advantages_T > 0)).to(dtype),
            "soft": clipped_T / rho_T,
            "fading": torch.where(rho_T < rule.ratio_low, rho_T / clipped_T, clipped_T / rho_T),
        }[rule.ratio_form]
        # A token of weight 0 may hold any log-prob; a nan of one that counts is no reason to leave it out.
        factor_T = torch.where(rho_T.isnan(), rho_T, factor_T)
        token_weights_T = torch.where(token_weights_T != 0, token_weights_T * factor_T, 0.0)
    if rule.importance_cap is not None:
        assert sampling_logprobs_T is not None and is_templated_T is not None
        trainer_over_engine_T = (first_pass_T - sampling_logprobs_T.to(dtype)).clamp(-60, 60).exp()
        factor_T = torch.where(is_templated_T, 1.0, trainer_over_engine_T.clamp(max=rule.importance_cap))
        token_weights_T = torch.where(token_weights_T != 0, token_weights_T * factor_T, 0.0)
    advantages_T = advantages_T.to(dtype)
    log_ratio_T = torch.where(weights_T != 0, logprobs_T - old_T, 0.0)
    losses_T = surrogate_reference(rule, log_ratio_T, logprobs_T, advantages_T, given_T, sequence_T)
    if rule.kl_coefficient > 0:
        assert reference_logprobs_T is not None
        losses_T = losses_T + rule.kl_coefficient * kl_reference(rule, reference_logprobs_T.to(dtype) - logprobs_T)
    losses_T = losses_T - rule.entropy_coefficient * entropy_T
    losses_T = torch.where(token_weights_T != 0, token_weights_T * losses_T, 0.0)
    return loss_scale * losses_T.sum(), logprobs_T.detach(), entropy_T.detach()


def surrogate_reference(
    rule: LossRule,
    log_ratio_T: Tensor,
    logprobs_T: Tensor,
    advantages_T: Tensor,
    given_T: Tensor,
    sequence_T: Tensor | None,
) -> Tensor:
    """Return the loss of the policy gradient by token; the ratio of a sequence is the mean over `given_T`."""
    if callable(rule.surrogate):
        return rule.surrogate(log_ratio_T.clamp(-20, 20).exp(), logprobs_T, advantages_T, rule)
    if rule.surrogate == "gspo":
        assert sequence_T is not None
        for sequence in sequence_T.unique():
            members = (sequence_T == sequence) & given_T
            if members.any():
                # The ratio's value is the sequence's, its gradient the token's own.
                own = log_ratio_T[members] - log_ratio_T[members].detach()
                log_ratio_T = log_ratio_T.index_put((members,), log_ratio_T[members].detach().mean() + own)
    ratio_T = log_ratio_T.clamp(-20, 20).exp()
    clipped_T = ratio_T.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    if rule.surrogate == "cispo":
        return -clipped_T.detach() * advantages_T * logprobs_T
    losses_T = torch.maximum(-advantages_T * ratio_T, -advantages_T * clipped_T)
    if rule.surrogate == "gspo":
        return losses_T
    return torch.where(advantages_T < 0, torch.minimum(losses_T, -rule.dual_clip * advantages_T), losses_T)


def kl_reference(rule: LossRule, difference_T: Tensor) -> Tensor:
    """Return the estimate of KL(policy || reference) by token; `difference_T`: log-prob of reference minus policy."""
    if rule.kl_estimator == "k2":
        return difference_T.square() / 2
    return difference_T.exp() - 1 - difference_T
