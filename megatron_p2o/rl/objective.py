"""The P2O token loss on the original prompt (arXiv:2603.21877; clips of arXiv:1707.06347, 1912.09729).

`objective.context` says where the two log-probs of the policy ratio are taken; c is the prompt a rollout was sampled
with (x, or x with template z), and the gradient's prompt is `TrainSample.context_ids`:

    context      old on   current on   token weight
    sampling     c        c            1              no distillation
    replace      x        x            1              no correction for sampling from c
    importance   c        x            1              true importance ratio under the clip
    ratio_mask   x        x            context ratio  production
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_p2o.config import ObjectiveConfig
from megatron_p2o.rl.context_ratio import context_ratio_weights
from megatron_p2o.types import PackedBatch

MAX_LOG_RATIO = 20.0
"""The policy ratio is exp of the log-prob difference clamped to +-20."""

SUM_NAMES = (
    "loss_tokens",
    "kept_tokens",
    "templated_tokens",
    "templated_kept_tokens",
    "clipped_tokens",
    "ratio_sum",
    "entropy_sum",
    "mismatch_tokens",
    "mismatch_abs_sum",
    "mismatch_ratio_sum",
)
MAX_NAMES = ("mismatch_abs_max",)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStats:
    """Sums and maxima over tokens; add across micro-batches and ranks, never average averages."""

    sums: Tensor
    """[len(SUM_NAMES)] float64, in that order. `mismatch_*` compare engine and trainer on plain tokens."""
    maxima: Tensor
    """[len(MAX_NAMES)] float64."""

    def merge(self, other: "TokenStats") -> "TokenStats":
        return TokenStats(sums=self.sums + other.sums, maxima=torch.maximum(self.maxima, other.maxima))

    def as_dict(self) -> dict[str, float]:
        """Return every sum and maximum by name."""
        values = [float(value) for value in torch.cat([self.sums, self.maxima])]
        return dict(zip(SUM_NAMES + MAX_NAMES, values, strict=True))

    @staticmethod
    def zero(device: torch.device | str = "cpu") -> "TokenStats":
        """Return the neutral element of `merge`."""
        return TokenStats(
            sums=torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device),
            maxima=torch.zeros(len(MAX_NAMES), dtype=torch.float64, device=device),
        )


def policy_loss(
    logprobs_T: Tensor, batch: PackedBatch, objective: ObjectiveConfig, entropy_T: Tensor | None = None
) -> tuple[Tensor, TokenStats]:
    """Return the SUM of weighted token losses and what happened to the tokens.

    The caller divides by the global denominator: `loss_tokens` of the whole mini-batch for `denominator: all`, the
    summed `kept_tokens` for `kept`. Accumulates in float32.

    Args:
        logprobs_T: [T] float32 current log-probs of `target_ids_T`; values outside `loss_mask_T` are ignored.
        batch: the packed samples.
        objective: clip range, context mode, ratio band.
        entropy_T: [T] float32, only for the statistics.
    """
    mask_T = batch.loss_mask_T
    logprobs_T = torch.where(mask_T, logprobs_T, torch.zeros_like(logprobs_T))
    first_pass = logprobs_T.detach() if batch.old_logprobs_T is None else batch.old_logprobs_T
    old_T = batch.sampling_logprobs_T if objective.context == "importance" else first_pass
    weights_T = batch.loss_weights_T * mask_T
    if objective.context == "ratio_mask":
        weights_T = weights_T * context_ratio_weights(
            old_T,
            batch.sampling_logprobs_T,
            batch.is_templated_T,
            low=objective.ratio_low,
            high=objective.ratio_high,
            form=objective.ratio_form,
        )
    ratio_T = (logprobs_T - old_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    losses_T, is_clipped_T = clipped_losses(ratio_T, batch.advantages_T, objective)
    stats = _token_stats(batch, weights_T, ratio_T, is_clipped_T, first_pass, entropy_T)
    return (weights_T * losses_T).sum(), stats


def clipped_losses(ratio_T: Tensor, advantages_T: Tensor, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Return the dual-clipped policy-gradient loss per token, and where clipping took the gradient away."""
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    losses_T = torch.maximum(plain_T, clipped_T)
    ceiling_T = -objective.dual_clip * advantages_T
    is_capped_T = (advantages_T < 0) & (losses_T > ceiling_T)
    losses_T = torch.where(is_capped_T, ceiling_T, losses_T)
    return losses_T, (clipped_T > plain_T) | is_capped_T


def _token_stats(
    batch: PackedBatch,
    weights_T: Tensor,
    ratio_T: Tensor,
    is_clipped_T: Tensor,
    first_pass_T: Tensor,
    entropy_T: Tensor | None,
) -> TokenStats:
    mask_T = batch.loss_mask_T
    is_kept_T = (weights_T != 0) & mask_T
    is_templated_T = batch.is_templated_T & mask_T
    is_plain_T = mask_T & ~batch.is_templated_T
    difference_T = torch.where(is_plain_T, first_pass_T - batch.sampling_logprobs_T, torch.zeros_like(first_pass_T))
    zero = torch.zeros_like(ratio_T)
    sums = [
        mask_T,
        is_kept_T,
        is_templated_T,
        is_templated_T & is_kept_T,
        is_clipped_T & is_kept_T,
        torch.where(mask_T, ratio_T, zero),
        zero if entropy_T is None else torch.where(mask_T, entropy_T, zero),
        is_plain_T,
        difference_T.abs(),
        torch.where(is_plain_T, difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), zero),
    ]
    maxima = [difference_T.abs().max() if len(difference_T) else zero.sum()]
    return TokenStats(
        sums=torch.stack([values.detach().double().sum() for values in sums]),
        maxima=torch.stack([value.detach().double() for value in maxima]),
    )
