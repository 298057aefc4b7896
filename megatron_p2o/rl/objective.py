"""The P2O token loss on the original prompt (arXiv:2603.21877; clips of arXiv:1707.06347, 1912.09729).

`objective.context` says where the two log-probs of the policy ratio are taken; c is the prompt a rollout was sampled
with (x, or x with template z), and the gradient's prompt is `TrainSample.context_ids`:

    context      old on   current on   token weight
    sampling     c        c            1              no distillation
    replace      x        x            1              no correction for sampling from c
    importance   c        x            1              true importance ratio under the clip
    ratio_mask   x        x            context ratio  production

The loss and its gradient are computed by `p2o_kernels.linear_policy_loss` together with the LM head; its specification
is `p2o_kernels/policy_loss/reference.py`. Here is what it is told, and what is reported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from megatron_p2o.config.tree import ObjectiveConfig
from megatron_p2o.types import Logprobs, PackedBatch, TrainSample
from p2o_kernels import LossRule, PolicyLoss

Context = Literal["sampling", "replace", "importance", "ratio_mask"]

MAX_LOG_RATIO = 20.0
"""The ratio of trainer to engine is exp of the log-prob difference clamped to +-20."""

SUM_NAMES = (
    "loss_tokens",
    "carrying_tokens",
    "live_tokens",
    "kept_tokens",
    "templated_tokens",
    "templated_kept_tokens",
    "clipped_tokens",
    "ratio_sum",
    "entropy_sum",
    "mismatch_tokens",
    "mismatch_abs_sum",
    "mismatch_ratio_sum",
    "mismatch_kl_sum",
)
MAX_NAMES = ("mismatch_abs_max",)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStats:
    """Sums and maxima over tokens; add across micro-batches and ranks, never average averages."""

    sums: Tensor
    """[len(SUM_NAMES)] float64, in that order: response tokens; of those the ones with an advantage and a weight; of
    those the ones that went through the LM head, and the ones the context ratio kept. `mismatch_*` compare engine and
    trainer under one prompt: plain tokens, or all of them under `scoring.recompute`; `mismatch_kl_sum` estimates
    KL(engine || trainer) in nats by r - 1 - log r with r = trainer / engine: unbiased, since the engine sampled the
    tokens, and never negative (John Schulman's k3, http://joschu.net/blog/kl-approx.html)."""
    maxima: Tensor
    """[len(MAX_NAMES)] float64."""

    def merge(self, other: "TokenStats") -> "TokenStats":
        return TokenStats(sums=self.sums + other.sums, maxima=torch.maximum(self.maxima, other.maxima))

    def as_dict(self) -> dict[str, float]:
        """Return every sum and maximum by name."""
        # One copy, where both lie on a GPU.
        values = [float(value) for value in torch.cat([self.sums, self.maxima]).cpu()]
        return dict(zip(SUM_NAMES + MAX_NAMES, values, strict=True))

    def dead_share(self, otherwise: float) -> float:
        """Return the share of the tokens with an advantage that the context ratio dropped; `otherwise` without any."""
        values = self.as_dict()
        return 1 - values["kept_tokens"] / values["carrying_tokens"] if values["carrying_tokens"] else otherwise

    @staticmethod
    def zero(device: torch.device | str = "cpu") -> "TokenStats":
        """Return the neutral element of `merge`."""
        return TokenStats(
            sums=torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device),
            maxima=torch.zeros(len(MAX_NAMES), dtype=torch.float64, device=device),
        )


def takes_gradient_on_bare_prompt(context: Context) -> bool:
    """Whether a templated rollout is trained on without its template: the "current on" column of the table above."""
    match context:
        case "sampling":
            return False
        case "replace" | "importance" | "ratio_mask":
            return True
        case _:
            assert_never(context)


def compares_with_sampling(context: Context) -> bool:
    """Whether the policy ratio's old log-probs are those of sampling, so that later updates need no others."""
    match context:
        case "importance":
            return True
        case "sampling" | "replace" | "ratio_mask":
            return False
        case _:
            assert_never(context)


def loss_rule(objective: ObjectiveConfig) -> LossRule:
    """Return the settings of the token loss as the fused kernels take them."""
    return LossRule(
        context=objective.context,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        ratio_low=objective.ratio_low,
        ratio_high=objective.ratio_high,
        ratio_form=objective.ratio_form,
    )


def token_stats(batch: PackedBatch, outcome: PolicyLoss) -> TokenStats:
    """Return what happened to the tokens of `batch`; only those that may carry gradient are looked at.

    A token without advantage or weight is in the denominator `all` and nowhere else, so that it does not matter whether
    it was dropped before packing.
    """
    carries_T = batch.loss_mask_T & (batch.loss_weights_T != 0) & (batch.advantages_T != 0)
    live_T = outcome.is_live_T
    is_kept_T = outcome.weights_T != 0
    is_templated_T = batch.is_templated_T & carries_T
    trainer_T, engine_T, is_compared_T = _on_one_prompt(batch, outcome, carries_T)
    difference_T = torch.where(is_compared_T, trainer_T - engine_T, torch.zeros_like(trainer_T))
    zero_T = torch.zeros_like(outcome.ratio_T)
    bounded_T = difference_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    sums = [
        batch.loss_mask_T,
        carries_T,
        live_T,
        is_kept_T,
        is_templated_T,
        is_templated_T & is_kept_T,
        outcome.is_clipped_T & is_kept_T,
        torch.where(live_T, outcome.ratio_T, zero_T),
        outcome.entropy_T,
        is_compared_T,
        difference_T.abs(),
        torch.where(is_compared_T, bounded_T.exp(), zero_T),
        # A small difference would leave nothing of its square in float32.
        bounded_T.double().expm1() - difference_T.double(),
    ]
    maxima = [difference_T.abs().max()]
    return TokenStats(
        sums=torch.stack([values.detach().double().sum() for values in sums]),
        maxima=torch.stack([value.detach().double() for value in maxima]),
    )


def _on_one_prompt(batch: PackedBatch, outcome: PolicyLoss, carries_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return trainer's and engine's log-probs, and which tokens have both under the prompt of sampling."""
    if batch.engine_logprobs_T is not None:
        return batch.sampling_logprobs_T, batch.engine_logprobs_T, carries_T
    first_pass_T = outcome.logprobs_T if batch.old_logprobs_T is None else batch.old_logprobs_T
    return first_pass_T, batch.sampling_logprobs_T, carries_T & ~batch.is_templated_T


def with_trainer_logprobs(sample: TrainSample, trainer_R: Logprobs, importance_cap: float | None) -> TrainSample:
    """Return `sample` with the trainer's log-probs of its sampling prompt in the place of the engine's.

    Args:
        trainer_R: float32.
        importance_cap: when given, each token weighs min(pi_trainer / pi_engine, cap): truncated importance sampling,
            because the engine samples from a policy that differs from the trainer's by rounding at least.
    """
    engine_R = sample.sampling_logprobs
    weights_R = None
    if importance_cap is not None:
        weights_R = np.exp(np.minimum(trainer_R - engine_R, np.log(importance_cap))).astype(np.float32)
    return replace(sample, sampling_logprobs=trainer_R, engine_logprobs=engine_R, loss_weights=weights_R)


def mismatch_sums(trainer: Sequence[Logprobs], engine: Sequence[Logprobs]) -> dict[str, float]:
    """Return the `mismatch_*` entries of `TokenStats.as_dict` for log-probs under one prompt, [R] each."""
    difference = np.concatenate(trainer).astype(np.float64) - np.concatenate(engine)
    bounded = np.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "mismatch_tokens": float(len(difference)),
        "mismatch_abs_sum": float(np.abs(difference).sum()),
        "mismatch_ratio_sum": float(np.exp(bounded).sum()),
        "mismatch_kl_sum": float((np.expm1(bounded) - difference).sum()),
        "mismatch_abs_max": float(np.abs(difference).max()),
    }


def cap_sums(samples: Sequence[TrainSample], importance_cap: float | None) -> dict[str, float]:
    """Return how many tokens with an advantage have an importance weight, and of how many it was truncated.

    By `with_trainer_logprobs`, with the same cap; empty without one.
    """
    if importance_cap is None:
        return {}
    log_ratios = [
        sample.sampling_logprobs - sample.engine_logprobs
        for sample in samples
        if sample.advantage != 0 and sample.engine_logprobs is not None
    ]
    return {
        "weighted_tokens": float(sum(len(row) for row in log_ratios)),
        "capped_tokens": float(sum(int((row > np.log(importance_cap)).sum()) for row in log_ratios)),
    }
