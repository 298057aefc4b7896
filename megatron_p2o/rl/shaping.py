"""Credit beyond the grade: what is taken from a rollout's reward before its advantage, and only there.

Grades, the ledger, the choice of groups under dynamic sampling and the metrics of rewards know nothing of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

import numpy as np
import torch

from megatron_p2o.config.tree import Config, ObjectiveConfig
from megatron_p2o.rl.grouping import make_groups, train_samples
from megatron_p2o.rl.objective import with_reference_kl
from megatron_p2o.rl.standing_policy import StandingPolicy
from megatron_p2o.types import Group, Logprobs, TokenStats, no_tokens
from p2o_kernels.policy_loss.token_loss import kl_penalties


def shaped(
    groups: Sequence[Group], plain_success_rates: Sequence[float], policy: StandingPolicy, config: Config
) -> tuple[Sequence[Group], TokenStats[float]]:
    """Return the groups with the advantages of their shaped rewards, and the measurements for it. Without shaping the
    groups are returned unchanged.
    """
    penalties = [[0.0] * len(group.rollouts) for group in groups]
    measured = no_tokens()
    if config.advantage.overlong_tokens is not None:
        limits = config.advantage.overlong_tokens, config.rollout.max_new_tokens
        lengths = [[len(rollout.completion.token_ids) for rollout in group.rollouts] for group in groups]
        penalties = [[overlong_penalty(length, *limits) for length in row] for row in lengths]
    elif not has_kl_reward(config.objective):
        return groups, measured
    if has_kl_reward(config.objective):
        divergences, measured = kl_of(groups, policy, config.objective)
        penalties = [
            [penalty + config.objective.kl_coefficient * kl for penalty, kl in zip(*rows, strict=True)]
            for rows in zip(penalties, divergences, strict=True)
        ]
    siblings = [group.rollouts for group in groups]
    return make_groups(siblings, config.advantage, plain_success_rates, penalties), measured


def has_kl_reward(objective: ObjectiveConfig) -> bool:
    """Whether the KL term is part of the reward."""
    match objective.kl_as:
        case "reward":
            return objective.kl_coefficient > 0
        case "loss":
            return False
        case _:
            assert_never(objective.kl_as)


def overlong_penalty(num_tokens: int, overlong_tokens: int, max_new_tokens: int) -> float:
    """Return what DAPO's soft overlong punishment takes from the reward of a response (arXiv:2503.14476, eq. 13).

    0 up to max_new_tokens - overlong_tokens, then in a straight line to 1 at max_new_tokens.
    """
    excess = num_tokens - (max_new_tokens - overlong_tokens)
    return min(max(excess / overlong_tokens, 0.0), 1.0)


def kl_of(
    groups: Sequence[Group], policy: StandingPolicy, objective: ObjectiveConfig
) -> tuple[list[list[float]], TokenStats[float]]:
    """Return each rollout's estimate of KL(policy || initial policy), summed over its response; 0 for one without.

    Both log-probs are the trainer's, on the prompt of the gradient. For a templated rollout under another context than
    `sampling` they are not those that its tokens were drawn with, and the estimate has the bias of the objective.
    """
    everything = replace(objective, drop_failed_templated=False, drop_truncated=False)
    samples = train_samples(groups, everything)
    ours, reference = policy.logprobs(samples), policy.reference_logprobs(samples)
    sums = iter([kl_sum(*rows, objective) for rows in zip(ours, reference, strict=True)])
    divergences = [[next(sums) if rollout.can_be_trained_on else 0.0 for rollout in group.rollouts] for group in groups]
    return divergences, with_reference_kl(no_tokens(), ours, reference)


def kl_sum(policy_R: Logprobs, reference_R: Logprobs, objective: ObjectiveConfig) -> float:
    """Return the sum over a response of the estimate that `objective.kl_estimator` names, in float64."""
    difference_R = torch.as_tensor(reference_R.astype(np.float64) - policy_R)
    match objective.kl_estimator:
        case "k1":
            return -float(difference_R.sum())
        case "k2" | "k3":
            return float(kl_penalties(objective.kl_estimator, difference_R)[0].sum())
        case _:
            assert_never(objective.kl_estimator)
