"""Makes training samples from graded rollouts: groups, their credit, and the rollouts with a gradient."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from math import nan
from typing import TypeVar, assert_never

import numpy as np
import torch

from megatron_p2o.config.tree import AdvantageConfig, ObjectiveConfig
from megatron_p2o.rl.objective import clones, takes_gradient_on_bare_prompt
from megatron_p2o.types import Group, Logprobs, Rollout, TrainSample
from p2o_kernels import grouped_advantage

Item = TypeVar("Item")


def make_groups(
    siblings: Sequence[Sequence[Rollout]],
    advantage: AdvantageConfig,
    plain_success_rates: Sequence[float],
    penalties: Sequence[Sequence[float]] | None = None,
) -> list[Group]:
    """Return each problem's rollouts with their advantages; an undecided one has none and shapes no baseline.

    The formulas are `p2o_kernels.grouped_advantage`'s (GRPO, Dr.GRPO, RLOO): on a GPU where there is one.

    Args:
        siblings: the rollouts of each problem, at least one.
        plain_success_rates: mean plain reward of each problem; anchors templated groups when `advantage.baseline` is
            "plain_anchored".
        penalties: of each rollout, taken from its reward; None: none.
    """
    rollouts = [rollout for group in siblings for rollout in group]
    anchors = [
        _anchor(group, rate, advantage)
        for group, rate in zip(siblings, plain_success_rates, strict=True)
        for _ in group
    ]
    rewards = [rollout.grade.reward or 0.0 for rollout in rollouts]
    if penalties is not None:
        taken = [penalty for group in penalties for penalty in group]
        rewards = [reward - penalty for reward, penalty in zip(rewards, taken, strict=True)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    advantages = grouped_advantage(
        torch.tensor(rewards, dtype=torch.float32, device=device),
        torch.tensor([number for number, group in enumerate(siblings) for _ in group], device=device),
        torch.tensor([rollout.is_decided for rollout in rollouts], device=device),
        estimator=advantage.estimator,
        anchor_rates_R=torch.tensor(anchors, dtype=torch.float32, device=device),
    )
    credits = map(float, advantages.cpu())
    return [
        Group(
            problem=group[0].completion.prompt.problem,
            rollouts=tuple(group),
            advantages=tuple(next(credits) for _ in group),
        )
        for group in siblings
    ]


def _anchor(group: Sequence[Rollout], plain_success_rate: float, advantage: AdvantageConfig) -> float:
    """Return the rate of the virtual rollouts that join the group's baseline; nan for none."""
    match advantage.baseline:
        case "group":
            return nan
        case "plain_anchored":
            is_templated = any(rollout.completion.prompt.is_templated for rollout in group)
            return plain_success_rate if is_templated else nan
        case _:
            assert_never(advantage.baseline)


def train_samples(groups: Sequence[Group], objective: ObjectiveConfig) -> list[TrainSample]:
    """Return every decided rollout that has a response as a sample on the prompt the gradient is taken on; under
    `objective.surrogate: clone` those that solve their problem, with advantage 1."""
    samples: list[TrainSample] = []
    for group in groups:
        for place, (rollout, advantage) in enumerate(zip(group.rollouts, group.advantages, strict=True)):
            completion = rollout.completion
            if not rollout.can_be_trained_on or (objective.drop_truncated and completion.finish_reason == "length"):
                continue
            prompt = completion.prompt
            if objective.drop_failed_templated and prompt.is_templated and not rollout.is_solved:
                continue
            if clones(objective):
                if not rollout.is_solved:
                    continue
                advantage = 1.0
            distils = takes_gradient_on_bare_prompt(objective.context)
            samples.append(
                TrainSample(
                    context_ids=prompt.training_ids if distils else prompt.sampling_ids,
                    response_ids=completion.token_ids,
                    advantage=advantage,
                    sampling_logprobs=completion.logprobs,
                    is_templated=distils and prompt.is_templated,
                    key=(group.problem.id, place),
                    advantage_offsets=_offsets(rollout, objective.distill_beta),
                )
            )
    return samples


def _offsets(rollout: Rollout, distill_beta: float) -> Logprobs | None:
    if rollout.teaching is None or rollout.teaching.gains is None:
        return None
    return np.float32(distill_beta) * rollout.teaching.gains


def has_gradient(group: Group) -> bool:
    """Whether a group carries a gradient: its rollouts do not all agree, or a template teaches one of them."""
    return any(group.advantages) or any(each.teaching is not None and each.teaching.is_known for each in group.rollouts)


def num_informative(groups: Sequence[Group]) -> int:
    """Return how many groups carry a gradient."""
    return sum(has_gradient(group) for group in groups)


def most_informative(groups: Sequence[Group], size: int) -> list[Group]:
    """Return `size` groups in the order they were asked: those that carry a gradient first, then any."""
    by_use = sorted(range(len(groups)), key=lambda index: not has_gradient(groups[index]))
    return [groups[index] for index in sorted(by_use[:size])]


def divided(items: Sequence[Item], sizes: Iterable[int]) -> list[Sequence[Item]]:
    """Return `items` in consecutive parts of these sizes, which add up to their number."""
    ends = list(accumulate(sizes, initial=0))
    assert ends[-1] == len(items), f"{len(items)} items do not split into parts that end at {ends[1:]}"
    return [items[start:end] for start, end in pairwise(ends)]


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Return `items` in consecutive chunks of `size`; the caller's sizes divide evenly."""
    assert len(items) % size == 0, f"{len(items)} items do not split into chunks of {size}"
    return [items[start : start + size] for start in range(0, len(items), size)]
