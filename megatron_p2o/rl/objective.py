"""The P2O token loss on the original prompt (arXiv:2603.21877; clips of arXiv:1707.06347, 1912.09729).

`objective.context` says where the two log-probs of the policy ratio are taken; c is the prompt a rollout was sampled
with (x, or x with template z), and the gradient's prompt is `TrainSample.context_ids`:

    context      old on   current on   token weight
    sampling     c        c            1              no distillation
    replace      x        x            1              no correction for sampling from c
    importance   c        x            1              true importance ratio under the clip
    ratio_mask   x        x            context ratio  production
    distill      x        x            1              sampled on x; z adds to the advantage (`rl.teachers.teaching`)

`objective.surrogate` says what is made of the ratio: PPO's clip by token, GSPO's by sequence (arXiv:2507.18071),
CISPO's weight of the log-prob (arXiv:2506.13585), or a function of the user's (`rl.surrogate`). Any of them goes with
any context: the ratio of a sequence is that of its tokens in the table, and a token's weight multiplies its own loss.
docs/objectives.md says what each combination means.

The loss and its gradient are computed by `p2o_kernels.linear_policy_loss` together with the LM head; its specification
is `p2o_kernels/policy_loss/reference.py`. This module has its inputs and its statistics.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from megatron_p2o.config.sections.objective import ObjectiveContext
from megatron_p2o.config.tree import Config, ObjectiveConfig
from megatron_p2o.rl.context_shift import shift_of_tokens
from megatron_p2o.rl.surrogate import surrogate_named
from megatron_p2o.types import Logprobs, PackedBatch, TokenStats, TrainSample
from p2o_kernels import LossRule, PolicyLoss

MAX_MISMATCH_LOG_RATIO = 20.0
"""The ratio of trainer to engine is exp of the log-prob difference clamped to +-20."""

_STATS = tuple(field.name for field in fields(TokenStats))


def zero_stats(device: torch.device | str = "cpu") -> TokenStats[Tensor]:
    """Return the neutral element of `merged_stats`."""
    return TokenStats(**{name: torch.zeros((), dtype=torch.float64, device=device) for name in _STATS})


def merged_stats(one: TokenStats[Tensor], other: TokenStats[Tensor]) -> TokenStats[Tensor]:
    """Return the statistics of the tokens of both."""

    def merged(name: str) -> Tensor:
        values: tuple[Tensor, Tensor] = getattr(one, name), getattr(other, name)
        return torch.maximum(*values) if name.endswith("_max") else values[0] + values[1]

    return TokenStats(**{name: merged(name) for name in _STATS})


def stats_on_cpu(stats: TokenStats[Tensor]) -> TokenStats[Tensor]:
    """Return the statistics in host memory, by one copy."""
    values: list[Tensor] = [getattr(stats, name) for name in _STATS]
    return TokenStats(**dict(zip(_STATS, torch.stack(values).cpu().unbind(), strict=True)))


def stats_as_numbers(stats: TokenStats[Tensor]) -> TokenStats[float]:
    """Return the statistics as numbers, by one copy."""
    on_cpu = stats_on_cpu(stats)
    return TokenStats(**{name: float(getattr(on_cpu, name)) for name in _STATS})


def total_stats(updates: Sequence[TokenStats[float]]) -> TokenStats[float]:
    """Return the statistics of the tokens of several updates."""

    def total(name: str) -> float:
        values: list[float] = [getattr(update, name) for update in updates]
        return max(values, default=0.0) if name.endswith("_max") else sum(values)

    return TokenStats(**{name: total(name) for name in _STATS})


def dead_share(stats: TokenStats[float], otherwise: float) -> float:
    """Return the share of the tokens with an advantage that the context ratio dropped; `otherwise` without any."""
    return 1 - stats.kept_tokens / stats.carrying_tokens if stats.carrying_tokens else otherwise


def takes_gradient_on_bare_prompt(context: ObjectiveContext) -> bool:
    """Whether a templated rollout is trained on without its template: the "current on" column of the table above."""
    match context:
        case "sampling":
            return False
        case "replace" | "importance" | "ratio_mask" | "distill":
            return True
        case _:
            assert_never(context)


def samples_plainly(context: ObjectiveContext) -> bool:
    """Whether a problem with templates is asked without them, which then only teach."""
    match context:
        case "distill":
            return True
        case "sampling" | "replace" | "importance" | "ratio_mask":
            return False
        case _:
            assert_never(context)


def clones(objective: ObjectiveConfig) -> bool:
    """Whether the loss is the negative log-likelihood of what solved its problem, whatever its group did."""
    return objective.surrogate == "clone"


def compares_with_sampling(context: ObjectiveContext) -> bool:
    """Whether the policy ratio's old log-probs are those of sampling, so that later updates need no others."""
    match context:
        case "importance":
            return True
        case "sampling" | "replace" | "ratio_mask" | "distill":
            return False
        case _:
            assert_never(context)


_LOSS_ESTIMATORS: Mapping[str, Literal["k2", "k3"]] = {"k1": "k3", "k2": "k2", "k3": "k3"}
"""By `objective.kl_estimator`; k1 is for rewards alone, and a loss of that rule has no KL term."""


def loss_rule(objective: ObjectiveConfig, importance_cap: float | None = None) -> LossRule:
    """Return the settings of the token loss as the fused kernels take them.

    `importance_cap`: see `cap_in_the_loss`.
    """
    return LossRule(
        # Plain samples are the same in every context; what a template teaches them is in their advantages.
        context="replace" if objective.context == "distill" else objective.context,
        surrogate=surrogate_named(objective.surrogate),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        ratio_low=objective.ratio_low,
        ratio_high=objective.ratio_high,
        ratio_form=objective.ratio_form,
        importance_cap=importance_cap,
        entropy_coefficient=objective.entropy_coefficient,
        kl_coefficient=objective.kl_coefficient if has_kl_loss(objective) else 0.0,
        kl_estimator=_LOSS_ESTIMATORS[objective.kl_estimator],
    )


def annealed(objective: ObjectiveConfig, num_updates: int) -> ObjectiveConfig:
    """Return the objective of an optimizer step that follows `num_updates` others: with the band of the context ratio
    that it has there (`objective.ratio_anneal_steps`)."""
    ratio_low, ratio_high = objective.band_at(num_updates)
    return replace(objective, ratio_low=ratio_low, ratio_high=ratio_high)


def cap_in_the_loss(config: Config) -> float | None:
    """Return the cap of the importance weights that plain rollouts get in the training pass, which finds the trainer's
    log-probs of their only prompt anyway.

    None where there are none, or `logprobs.recompute` has weighted all tokens.
    """
    return None if config.logprobs.recompute else config.logprobs.importance_cap


def has_kl_loss(objective: ObjectiveConfig) -> bool:
    """Whether the tokens' losses have a KL term, and the samples need the initial policy's log-probs."""
    match objective.kl_as:
        case "loss":
            return objective.kl_coefficient > 0
        case "reward":
            return False
        case _:
            assert_never(objective.kl_as)


def has_loss(sample: TrainSample, objective: ObjectiveConfig) -> bool:
    """Whether a forward pass of the sample changes the gradient: it has an advantage, or a term acts without one."""
    has_advantage = sample.advantage != 0 or sample.advantage_offsets is not None
    return has_advantage or loss_rule(objective).acts_without_advantage


def with_length_weights(
    samples: Sequence[TrainSample], minibatch: Sequence[TrainSample], objective: ObjectiveConfig, max_new_tokens: int
) -> list[TrainSample]:
    """Return `samples` weighted by length so that a mean over all tokens is the mean that `normalization` asks for.

    With N rollouts in the mini-batch, those without gradient included, and T response tokens, each token of a response
    of length R weighs T / (N R) for `sequence_mean`, and T / (N max_new_tokens) for `sequence_sum`.
    """
    num_tokens = sum(len(sample.response_ids) for sample in minibatch)

    def weighted(sample: TrainSample, length: int) -> TrainSample:
        ones = np.ones(len(sample.response_ids), np.float32)
        weights = ones if sample.loss_weights is None else sample.loss_weights
        return replace(sample, loss_weights=weights * np.float32(num_tokens / (len(minibatch) * length)))

    match objective.normalization:
        case "sequence_mean":
            return [weighted(sample, len(sample.response_ids)) for sample in samples]
        case "sequence_sum":
            return [weighted(sample, max_new_tokens) for sample in samples]
        case "token_mean" | "kept_token_mean" | "micro_batch_mean":
            return list(samples)
        case _:
            assert_never(objective.normalization)


def carrying_tokens(batch: PackedBatch, *, acts_without_advantage: bool = False) -> Tensor:
    """Return which tokens may carry gradient: those with a weight and, unless a term acts without it, an advantage."""
    carries_T = batch.loss_mask_T & (batch.loss_weights_T != 0)
    return carries_T if acts_without_advantage else carries_T & (batch.advantages_T != 0)


def token_stats(
    batch: PackedBatch,
    outcome: PolicyLoss,
    *,
    acts_without_advantage: bool = False,
    importance_cap: float | None = None,
) -> TokenStats[Tensor]:
    """Return what happened to the tokens of `batch`; only those that may carry gradient are looked at.

    A token without advantage or weight is in `loss_tokens` and nowhere else, so that it does not matter whether it was
    dropped before packing. Where a term acts without an advantage, the weight alone decides.

    `importance_cap`: that of the rule.
    """
    carries_T = carrying_tokens(batch, acts_without_advantage=acts_without_advantage)
    live_T = outcome.is_live_T
    is_kept_T = outcome.weights_T != 0
    is_templated_T = batch.is_templated_T & carries_T
    trainer_T, engine_T, is_compared_T = _on_one_prompt(batch, outcome, carries_T, importance_cap)
    difference_T = torch.where(is_compared_T, trainer_T - engine_T, torch.zeros_like(trainer_T))
    zero_T = torch.zeros_like(outcome.ratio_T)
    reference_T = outcome.logprobs_T if batch.reference_logprobs_T is None else batch.reference_logprobs_T
    is_referred_T = live_T & (batch.reference_logprobs_T is not None)
    bounded_T = difference_T.clamp(-MAX_MISMATCH_LOG_RATIO, MAX_MISMATCH_LOG_RATIO)
    return replace(
        zero_stats(outcome.loss.device),
        loss_tokens=_sum(batch.loss_mask_T),
        carrying_tokens=_sum(carries_T),
        live_tokens=_sum(live_T),
        kept_tokens=_sum(is_kept_T),
        templated_tokens=_sum(is_templated_T),
        templated_kept_tokens=_sum(is_templated_T & is_kept_T),
        **_mask_sums(batch, outcome, is_templated_T),
        clipped_tokens=_sum(outcome.is_clipped_T & is_kept_T),
        ratio_sum=_sum(torch.where(live_T, outcome.ratio_T, zero_T)),
        entropy_sum=_sum(outcome.entropy_T),
        mismatch_tokens=_sum(is_compared_T),
        mismatch_abs_sum=_sum(difference_T.abs()),
        mismatch_abs_max=difference_T.abs().max().detach().double(),
        mismatch_ratio_sum=_sum(torch.where(is_compared_T, bounded_T.exp(), zero_T)),
        mismatch_kl_sum=_k3_sum(difference_T),
        **_cap_sums(difference_T, is_compared_T & ~batch.is_templated_T, importance_cap),
        reference_tokens=_sum(is_referred_T),
        reference_kl_sum=_k3_sum(torch.where(is_referred_T, reference_T - outcome.logprobs_T, zero_T)),
    )


def _mask_sums(batch: PackedBatch, outcome: PolicyLoss, is_templated_T: Tensor) -> dict[str, Tensor]:
    """Return what the context ratio has to weigh in templated rollouts, and what it takes away; see `TokenStats`."""
    weights_T = torch.where(is_templated_T, batch.loss_weights_T, 1.0)
    taken_T = 1 - (outcome.weights_T / weights_T).clamp(max=1)
    mass_T = torch.where(is_templated_T, batch.advantages_T.abs() * weights_T, 0.0)
    is_gain_T = is_templated_T & (batch.advantages_T > 0)
    gain_T = torch.where(is_gain_T, mass_T * shift_of_tokens(batch, outcome).clamp(min=0), 0.0)
    return {
        "templated_advantage_sum": _sum(mass_T),
        "dropped_advantage_sum": _sum(torch.where(is_templated_T, mass_T * taken_T, 0.0)),
        "templated_gain_sum": _sum(gain_T),
        "dropped_gain_sum": _sum(torch.where(is_gain_T, gain_T * taken_T, 0.0)),
    }


def _k3_sum(difference_T: Tensor) -> Tensor:
    """Return the sum of exp(d) - 1 - d; in float64, where a small difference leaves something of its square."""
    difference_T = difference_T.detach().double()
    bounded_T = difference_T.clamp(-MAX_MISMATCH_LOG_RATIO, MAX_MISMATCH_LOG_RATIO)
    return (bounded_T.expm1() - difference_T).sum()


def _sum(values_T: Tensor) -> Tensor:
    return values_T.detach().double().sum()


def _cap_sums(difference_T: Tensor, is_weighted_T: Tensor, importance_cap: float | None) -> dict[str, Tensor]:
    """Return how many tokens the loss weighted by trainer over engine, and how many of these weights it truncated."""
    if importance_cap is None:
        return {}
    is_capped_T = is_weighted_T & (difference_T > math.log(importance_cap))
    return {"weighted_tokens": _sum(is_weighted_T), "capped_tokens": _sum(is_capped_T)}


def _on_one_prompt(
    batch: PackedBatch, outcome: PolicyLoss, carries_T: Tensor, importance_cap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return trainer's and engine's log-probs, and which tokens have both under the prompt of sampling."""
    first_pass_T = outcome.logprobs_T if batch.old_logprobs_T is None else batch.old_logprobs_T
    if batch.engine_logprobs_T is None:
        return first_pass_T, batch.sampling_logprobs_T, carries_T & ~batch.is_templated_T
    if importance_cap is None:
        return batch.sampling_logprobs_T, batch.engine_logprobs_T, carries_T
    trainer_T = torch.where(batch.is_templated_T, batch.sampling_logprobs_T, first_pass_T)
    return trainer_T, batch.engine_logprobs_T, carries_T


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


def with_engine_weights(
    samples: Sequence[TrainSample], templated: Sequence[Logprobs], importance_cap: float
) -> list[TrainSample]:
    """Return the samples with truncated importance weights where the training pass will not find them.

    `templated`: the trainer's log-probs of each templated sample under the prompt it was sampled with. Those of the
    training pass are under the bare prompt; to compare them with the engine's would put the context ratio into the
    weight. (MarinSkyRL re-bases the engine's instead: b + log pi(y | x) - log pi(y | x, z), which gives this weight.)
    """
    rows = iter(templated)
    return [
        with_trainer_logprobs(sample, next(rows), importance_cap)
        if sample.is_templated
        else replace(sample, engine_logprobs=sample.sampling_logprobs)
        for sample in samples
    ]


def with_mismatch(
    stats: TokenStats[float], trainer: Sequence[Logprobs], engine: Sequence[Logprobs]
) -> TokenStats[float]:
    """Return `stats` with the `mismatch_*` of log-probs under one prompt, [R] each; unchanged if there are none."""
    if not trainer:
        return stats
    difference = np.concatenate(trainer).astype(np.float64) - np.concatenate(engine)
    bounded = np.clip(difference, -MAX_MISMATCH_LOG_RATIO, MAX_MISMATCH_LOG_RATIO)
    return replace(
        stats,
        mismatch_tokens=float(len(difference)),
        mismatch_abs_sum=float(np.abs(difference).sum()),
        mismatch_abs_max=float(np.abs(difference).max()),
        mismatch_ratio_sum=float(np.exp(bounded).sum()),
        mismatch_kl_sum=float(_k3_sum(torch.as_tensor(difference))),
    )


def with_reference_kl(
    stats: TokenStats[float], policy: Sequence[Logprobs], reference: Sequence[Logprobs]
) -> TokenStats[float]:
    """Return `stats` with the `reference_*` of log-probs under one prompt, [R] each."""
    differences = [ours.astype(np.float64) - row for ours, row in zip(reference, policy, strict=True)]
    return replace(
        stats,
        reference_tokens=float(sum(map(len, differences))),
        reference_kl_sum=float(sum(float(_k3_sum(torch.as_tensor(row))) for row in differences)),
    )


def with_caps(
    stats: TokenStats[float], samples: Sequence[TrainSample], importance_cap: float | None
) -> TokenStats[float]:
    """Return `stats` with the weighted and capped tokens of `samples` (`with_trainer_logprobs`, with the same cap).

    Those that the loss has weighted are in `stats` already; see `cap_in_the_loss`.
    """
    if importance_cap is None:
        return stats
    log_ratios = [
        sample.sampling_logprobs - sample.engine_logprobs
        for sample in samples
        if (sample.advantage != 0 or sample.advantage_offsets is not None) and sample.engine_logprobs is not None
    ]
    return replace(
        stats,
        weighted_tokens=stats.weighted_tokens + sum(len(row) for row in log_ratios),
        capped_tokens=stats.capped_tokens + sum(int((row > np.log(importance_cap)).sum()) for row in log_ratios),
    )
