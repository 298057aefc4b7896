"""The P2O token loss and its derivative in the log-prob, on plain tensors (arXiv:2603.21877).

Legend: N tokens, in any order.
"""

from dataclasses import dataclass
from typing import Literal

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
    if rule.context == "importance" or rule.context == "ratio_mask":
        if sampling_logprobs_N is None:
            raise ValueError(f"sampling_logprobs_T is None: context={rule.context!r} needs it")
        if rule.context == "importance":
            return TokenInputs(advantages_N=advantages_N, weights_N=weights_N, old_logprobs_N=sampling_logprobs_N)
        if is_templated_N is None:
            raise ValueError("is_templated_T is None: context='ratio_mask' needs it")
        if old_logprobs_N is None:
            return TokenInputs(
                advantages_N=advantages_N,
                weights_N=weights_N,
                mask_logprobs_N=sampling_logprobs_N,
                is_templated_N=is_templated_N,
            )
        weights_N = weights_N * context_weights(rule, old_logprobs_N, sampling_logprobs_N, is_templated_N)
    return TokenInputs(advantages_N=advantages_N, weights_N=weights_N, old_logprobs_N=old_logprobs_N)


def context_weights(rule: LossRule, old_N: Tensor, sampling_N: Tensor, is_templated_N: Tensor) -> Tensor:
    """Return the context-ratio weight of each token, in the dtype of `old_N`."""
    log_ratio_N = torch.where(is_templated_N, old_N - sampling_N, 0.0)
    ratio_N = log_ratio_N.clamp(-MAX_CONTEXT_LOG_RATIO, MAX_CONTEXT_LOG_RATIO).exp()
    if rule.ratio_form == "soft":
        return ratio_N.clamp(rule.ratio_low, rule.ratio_high) / ratio_N
    return ((ratio_N >= rule.ratio_low) & (ratio_N <= rule.ratio_high)).to(old_N.dtype)


def token_losses_torch(rule: LossRule, logprobs_N: Tensor, tokens: TokenInputs) -> TokenLosses:
    """Return the dual-clipped losses and their derivative, in the dtype of `logprobs_N`.

    With r = exp(clamp(lp - old, +-20)): u = max(-A r, -A clip(r, 1 - low, 1 + high)), and min(u, -dual A) for A < 0.
    """
    old_N = logprobs_N if tokens.old_logprobs_N is None else tokens.old_logprobs_N
    weights_N = tokens.weights_N.to(logprobs_N.dtype)
    if tokens.mask_logprobs_N is not None:
        assert tokens.is_templated_N is not None
        weights_N = weights_N * context_weights(rule, old_N, tokens.mask_logprobs_N, tokens.is_templated_N)
    advantages_N = tokens.advantages_N.to(logprobs_N.dtype)
    log_ratio_N = logprobs_N - old_N
    ratio_N = log_ratio_N.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    plain_N = -advantages_N * ratio_N
    clipped_N = -advantages_N * ratio_N.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    losses_N = torch.maximum(plain_N, clipped_N)
    ceiling_N = -rule.dual_clip * advantages_N
    is_capped_N = (advantages_N < 0) & (losses_N > ceiling_N)
    is_clipped_N = (clipped_N > plain_N) | is_capped_N
    has_gradient_N = ~is_clipped_N & (log_ratio_N.abs() <= MAX_LOG_RATIO)
    return TokenLosses(
        losses_N=weights_N * torch.where(is_capped_N, ceiling_N, losses_N),
        logprob_grad_N=torch.where(has_gradient_N, weights_N * plain_N, 0.0),
        weights_N=weights_N,
        ratio_N=ratio_N,
        is_clipped_N=is_clipped_N,
    )
