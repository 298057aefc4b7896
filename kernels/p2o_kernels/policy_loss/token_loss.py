"""The P2O token loss and its derivative in the log-prob, on plain tensors (arXiv:2603.21877).

Legend: N tokens, in any order.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""The policy ratio is exp of the log-prob difference clamped to +-20."""
MAX_CONTEXT_LOG_RATIO = 60.0
"""The same for the context ratio."""

Context = Literal["sampling", "replace", "importance", "ratio_mask"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRule:
    """How a token's loss follows from its log-probs. Contexts: c is the sampling prompt, x the prompt of the gradient.

    `sampling` (x is c) and `replace` compare with the old log-prob on x, `importance` with the sampling log-prob on c,
    `ratio_mask` compares on x and weighs a templated token by its context ratio rho = exp(old on x - sampling on c).
    """

    context: Context = "ratio_mask"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    """Bound on the loss of tokens with negative advantage, in units of -advantage."""
    ratio_low: float = 0.01
    ratio_high: float = 10.0
    """Band of rho, both ends inclusive."""
    ratio_form: Literal["hard", "soft"] = "hard"
    """Outside the band: weight 0, or clip(rho) / rho."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenInputs:
    """What the loss of N tokens needs besides the current log-prob."""

    advantages_N: Tensor
    weights_N: Tensor
    """Factor on the loss; 0 outside the loss mask."""
    old_logprobs_N: Tensor | None = None
    """Log-probs the policy ratio is taken against; None: the current ones, so that the ratio is 1."""
    mask_logprobs_N: Tensor | None = None
    """Sampling log-probs on c of a context-ratio weight that is still to be applied; None: there is none."""
    is_templated_N: Tensor | None = None
    """Whether x differs from c: the context ratio of other tokens is 1."""

    def select(self, rows: Tensor) -> "TokenInputs":
        """Return some tokens."""

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return TokenInputs(
            advantages_N=self.advantages_N[rows],
            weights_N=self.weights_N[rows],
            old_logprobs_N=pick(self.old_logprobs_N),
            mask_logprobs_N=pick(self.mask_logprobs_N),
            is_templated_N=pick(self.is_templated_N),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """The loss of N tokens and what became of them."""

    losses_N: Tensor
    """Weighted."""
    logprob_grad_N: Tensor
    """d losses / d log-prob."""
    weights_N: Tensor
    """After the context ratio."""
    ratio_N: Tensor
    is_clipped_N: Tensor
    """bool: clipping took the gradient away."""


def token_inputs(
    rule: LossRule,
    advantages_N: Tensor,
    weights_N: Tensor,
    old_logprobs_N: Tensor | None,
    sampling_logprobs_N: Tensor | None,
    is_templated_N: Tensor | None,
) -> TokenInputs:
    """Choose the log-probs that `rule.context` compares with, and apply the context ratio where it is known already.

    Raises:
        ValueError: the context needs an input that is None.
    """
    match rule.context:
        case "sampling" | "replace":
            return TokenInputs(advantages_N=advantages_N, weights_N=weights_N, old_logprobs_N=old_logprobs_N)
        case "importance":
            sampling_N = _given(sampling_logprobs_N, "sampling_logprobs_T", rule)
            return TokenInputs(advantages_N=advantages_N, weights_N=weights_N, old_logprobs_N=sampling_N)
        case "ratio_mask":
            sampling_N = _given(sampling_logprobs_N, "sampling_logprobs_T", rule)
            templated_N = _given(is_templated_N, "is_templated_T", rule)
            if old_logprobs_N is None:
                return TokenInputs(
                    advantages_N=advantages_N,
                    weights_N=weights_N,
                    mask_logprobs_N=sampling_N,
                    is_templated_N=templated_N,
                )
            weights_N = context_weighted(rule, weights_N, old_logprobs_N, sampling_N, templated_N)
            return TokenInputs(advantages_N=advantages_N, weights_N=weights_N, old_logprobs_N=old_logprobs_N)
        case _:
            assert_never(rule.context)


def _given(values_N: Tensor | None, name: str, rule: LossRule) -> Tensor:
    if values_N is None:
        raise ValueError(f"{name} is None: context={rule.context!r} needs it")
    return values_N


def context_weighted(
    rule: LossRule, weights_N: Tensor, old_N: Tensor, sampling_N: Tensor, is_templated_N: Tensor
) -> Tensor:
    """Return the weights times those of the context ratio, in the dtype of `old_N`; 0 stays 0 whatever the ratio is.

    A ratio that is nan makes the weight nan in either form: as a token left out it would pass every check of the loss.
    """
    log_ratio_N = torch.where(is_templated_N, old_N - sampling_N, 0.0)
    ratio_N = log_ratio_N.clamp(-MAX_CONTEXT_LOG_RATIO, MAX_CONTEXT_LOG_RATIO).exp()
    match rule.ratio_form:
        case "hard":
            is_outside_N = (ratio_N < rule.ratio_low) | (ratio_N > rule.ratio_high)
            factor_N = torch.where(ratio_N.isnan(), ratio_N, (~is_outside_N).to(ratio_N.dtype))
        case "soft":
            factor_N = ratio_N.clamp(rule.ratio_low, rule.ratio_high) / ratio_N
        case _:
            assert_never(rule.ratio_form)
    return torch.where(weights_N != 0, weights_N.to(factor_N.dtype) * factor_N, 0.0)


def token_losses_torch(rule: LossRule, logprobs_N: Tensor, tokens: TokenInputs) -> TokenLosses:
    """Return the dual-clipped losses and their derivative, in the dtype of `logprobs_N`.

    With r = exp(clamp(lp - old, +-20)): u = max(-A r, -A clip(r, 1 - low, 1 + high)), and min(u, -dual A) for A < 0.
    """
    old_N = logprobs_N if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    weights_N = tokens.weights_N.to(logprobs_N.dtype)
    if tokens.mask_logprobs_N is not None:
        assert tokens.is_templated_N is not None
        weights_N = context_weighted(rule, weights_N, old_N, tokens.mask_logprobs_N, tokens.is_templated_N)
    advantages_N = tokens.advantages_N.to(logprobs_N.dtype)
    log_ratio_N = logprobs_N - old_N
    ratio_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    losses_N = torch.maximum(plain_N, clipped_N)
    ceiling_N = -rule.dual_clip * advantages_N
    is_capped_N = (advantages_N < 0) & (losses_N > ceiling_N)
    is_clipped_N = (clipped_N > plain_N) | is_capped_N
    counts_N = weights_N != 0
    # Asked so that nan, in a log-prob or in the weight, has a gradient, which then is nan and shows.
    has_gradient_N = counts_N & ~is_clipped_N & ~(log_ratio_N.abs() > MAX_LOG_RATIO) | weights_N.isnan()
    return TokenLosses(
        losses_N=torch.where(counts_N, weights_N * torch.where(is_capped_N, ceiling_N, losses_N), 0.0),
        logprob_grad_N=torch.where(has_gradient_N, weights_N * plain_N, 0.0),
        weights_N=weights_N,
        ratio_N=ratio_N,
        is_clipped_N=is_clipped_N,
    )
