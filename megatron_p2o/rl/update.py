"""The optimizer steps of one P2O step, all relative to the policy that sampled its rollouts."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import Policy
from megatron_p2o.rl.grouping import chunks, train_samples
from megatron_p2o.rl.objective import (
    compares_with_sampling,
    has_kl_loss,
    has_loss,
    with_caps,
    with_engine_weights,
    with_length_weights,
    with_mismatch,
    with_trainer_logprobs,
)
from megatron_p2o.rl.shaping import shaped
from megatron_p2o.rl.standing_policy import StandingPolicy
from megatron_p2o.types import Group, Logprobs, TrainSample, UpdateReport

NUM_PROBED = 4
"""Samples whose log-probs are computed to measure the mismatch in a step without a training pass (every group's
rewards are equal)."""


def update(
    groups: Sequence[Group], plain_success_rates: Sequence[float], policy: Policy, config: Config
) -> list[UpdateReport]:
    """Take one optimizer step per mini-batch of groups, all against the policy that sampled them.

    `plain_success_rates`: of each group's problem, for the baseline of shaped rewards.
    """
    sampler = StandingPolicy(policy)  # of the rollouts, until the first update
    groups, measured = shaped(groups, plain_success_rates, sampler, config)
    parts = chunks(groups, config.schedule.problems_per_update)
    minibatches = [train_samples(part, config.objective) for part in parts]
    live = [
        length_weighted(with_recomputed(carrying_gradient(samples, config), part, sampler, config), samples, config)
        for samples, part in zip(minibatches, parts, strict=True)
    ]
    live = with_references(live, sampler, config)
    # The first update's own forward pass gives its old log-probs; later ones need theirs before the policy moves.
    old_logprobs = [None, *(old_logprobs_of(samples, sampler, config) for samples in live[1:])]
    reports = [
        updated(policy, samples, old, minibatch, config)
        for samples, old, minibatch in zip(live, old_logprobs, minibatches, strict=True)
    ]
    if not any(live):
        reports[0] = with_probe(reports[0], minibatches[0], policy)
    if measured.reference_tokens:
        tokens = {"reference_tokens": measured.reference_tokens, "reference_kl_sum": measured.reference_kl_sum}
        reports[0] = replace(reports[0], tokens=replace(reports[0].tokens, **tokens))
    return reports


def updated(
    policy: Policy,
    samples: Sequence[TrainSample],
    old_logprobs: Sequence[Logprobs] | None,
    minibatch: Sequence[TrainSample],
    config: Config,
) -> UpdateReport:
    """Take the optimizer step on `samples`, the part of `minibatch` that carries gradient."""
    report = policy.update(samples, old_logprobs, sum(len(sample.response_ids) for sample in minibatch))
    weighted = samples if config.logprobs.recompute else [sample for sample in samples if sample.is_templated]
    return replace(report, tokens=with_caps(report.tokens, weighted, config.logprobs.importance_cap))


def with_probe(report: UpdateReport, samples: Sequence[TrainSample], policy: Policy) -> UpdateReport:
    """Return `report`, of a step that trained on nothing, with engine and trainer compared on a few plain samples."""
    probe = [sample for sample in samples if not sample.is_templated][:NUM_PROBED]
    engine = [sample.sampling_logprobs for sample in probe]
    return replace(report, tokens=with_mismatch(report.tokens, policy.logprobs(probe) if probe else [], engine))


def with_references(
    minibatches: Sequence[Sequence[TrainSample]], policy: StandingPolicy, config: Config
) -> Sequence[Sequence[TrainSample]]:
    """Return the samples with the initial policy's log-probs, if the loss has a KL term; one pass for all of them."""
    if not has_kl_loss(config.objective):
        return minibatches
    rows = iter(policy.reference_logprobs([sample for minibatch in minibatches for sample in minibatch]))
    return [[replace(sample, reference_logprobs=next(rows)) for sample in minibatch] for minibatch in minibatches]


def carrying_gradient(samples: Sequence[TrainSample], config: Config) -> list[TrainSample]:
    """Return the samples the forward pass needs: what has no loss has only a place in the denominator."""
    objective = config.objective
    return [sample for sample in samples if has_loss(sample, objective) or not objective.drop_zero_advantage]


def length_weighted(
    samples: Sequence[TrainSample], minibatch: Sequence[TrainSample], config: Config
) -> list[TrainSample]:
    """Return the samples of `minibatch` that carry gradient with the weights of `objective.normalization`."""
    return with_length_weights(samples, minibatch, config.objective, config.rollout.max_new_tokens)


def old_logprobs_of(
    samples: Sequence[TrainSample], policy: StandingPolicy, config: Config
) -> Sequence[Logprobs] | None:
    """Return log pi_old on the gradient's prompt; the importance context uses the sampling log-probs instead."""
    if compares_with_sampling(config.objective.context):
        return None
    if not config.logprobs.recompute:
        return policy.logprobs(samples)
    # Where both prompts are one, `with_recomputed` has these log-probs already.
    rows = iter(policy.logprobs([sample for sample in samples if sample.is_templated]))
    return [next(rows) if sample.is_templated else sample.sampling_logprobs for sample in samples]


def with_recomputed(
    samples: list[TrainSample], groups: Sequence[Group], policy: StandingPolicy, config: Config
) -> list[TrainSample]:
    """Return the samples of `groups` with the trainer's own log-probs of their sampling prompts, if settings ask so."""
    cap = config.logprobs.importance_cap
    if not config.logprobs.recompute and cap is None:
        return samples
    sampling = replace(config.objective, context="sampling")
    on_sampling_context = carrying_gradient(train_samples(groups, sampling), config)
    if config.logprobs.recompute:
        logprobs = policy.logprobs(on_sampling_context)
        return [with_trainer_logprobs(sample, row, cap) for sample, row in zip(samples, logprobs, strict=True)]
    assert cap is not None
    templated = [theirs for ours, theirs in zip(samples, on_sampling_context, strict=True) if ours.is_templated]
    return with_engine_weights(samples, policy.logprobs(templated) if templated else [], cap)
