"""From graded rollouts to training samples: groups, their credit, and what of them carries gradient."""

from collections.abc import Sequence

from megatron_p2o.config import AdvantageConfig, ObjectiveConfig
from megatron_p2o.rl.advantage import group_advantages
from megatron_p2o.types import Group, Rollout, TrainSample


def make_group(rollouts: Sequence[Rollout], advantage: AdvantageConfig, plain_success_rate: float) -> Group:
    """Return the siblings with their advantages; a rollout that was given up on has none and shapes no baseline.

    `plain_success_rate` anchors templated groups when `advantage.baseline` is "plain_anchored".
    """
    tried = [rollout for rollout in rollouts if rollout.completion.finish_reason != "abort"]
    is_templated = any(rollout.completion.prompt.is_templated for rollout in rollouts)
    anchored = advantage.baseline == "plain_anchored" and is_templated
    credits = iter(
        group_advantages(
            [rollout.reward for rollout in tried],
            advantage.estimator,
            anchor_success_rate=plain_success_rate if anchored else None,
        )
    )
    advantages = tuple(0.0 if r.completion.finish_reason == "abort" else next(credits) for r in rollouts)
    return Group(problem=rollouts[0].completion.prompt.problem, rollouts=tuple(rollouts), advantages=advantages)


def train_samples(groups: Sequence[Group], objective: ObjectiveConfig) -> list[TrainSample]:
    """Return every rollout that has a response as a sample on the prompt the gradient is taken on."""
    samples: list[TrainSample] = []
    for group in groups:
        for rollout, advantage in zip(group.rollouts, group.advantages, strict=True):
            completion = rollout.completion
            if completion.finish_reason == "abort" or len(completion.token_ids) == 0:
                continue
            prompt = completion.prompt
            if objective.drop_failed_templated and prompt.is_templated and rollout.reward == 0:
                continue
            distils = objective.context != "sampling"
            samples.append(
                TrainSample(
                    context_ids=prompt.training_ids if distils else prompt.sampling_ids,
                    response_ids=completion.token_ids,
                    advantage=advantage,
                    sampling_logprobs=completion.logprobs,
                    is_templated=distils and prompt.is_templated,
                )
            )
    return samples
