"""Groups and training samples from graded rollouts."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_p2o.config.tree import AdvantageConfig, ObjectiveConfig
from megatron_p2o.rl.grouping import make_groups, train_samples
from megatron_p2o.testing.fakes import UNDECIDED, fake_problem, fake_rollout, fake_token_ids
from megatron_p2o.types import PLAIN, Group, Rollout, Template
from p2o_kernels.advantage.reference import group_advantages_reference

HINT = Template(id=1, text="Go on.", parent=0)
PROBLEM = fake_problem(1)


def credits(rewards: list[float], estimator: str) -> tuple[float, ...]:
    return tuple(group_advantages_reference(rewards, [True] * len(rewards), estimator))


def make_group(siblings: list[Rollout], advantage: AdvantageConfig, plain_success_rate: float) -> Group:
    (group,) = make_groups([siblings], advantage, [plain_success_rate])
    return group


def rollouts(*, plain: list[float], templated: list[float] | None = None) -> list[Rollout]:
    """Return the rollouts of one problem by reward, templated ones first."""
    return [fake_rollout(PROBLEM, reward=reward, template=HINT, num_tokens=2) for reward in templated or []] + [
        fake_rollout(PROBLEM, reward=reward, num_tokens=3) for reward in plain
    ]


def test_templated_and_plain_rollouts_share_one_baseline() -> None:
    group = make_group(rollouts(templated=[1, 1, 0, 1], plain=[0, 0]), AdvantageConfig(), plain_success_rate=0.7)
    assert group.problem == PROBLEM
    assert group.advantages == pytest.approx(credits([1, 1, 0, 1, 0, 0], "grpo"))


def test_only_templated_groups_are_anchored() -> None:
    anchored = AdvantageConfig(baseline="plain_anchored", estimator="dr_grpo")
    templated = make_group(rollouts(templated=[1, 1], plain=[0, 1]), anchored, plain_success_rate=0.25)
    assert templated.advantages == pytest.approx([0.5, 0.5, -0.5, 0.5])  # mean of (3 + 4 * 0.25) / 8
    plain = make_group(rollouts(plain=[1, 1, 0, 1]), anchored, plain_success_rate=0.25)
    assert plain.advantages == pytest.approx(credits([1, 1, 0, 1], "dr_grpo"))


def test_cloning_takes_every_response_that_solves_its_problem_on_the_bare_prompt_and_no_other() -> None:
    siblings = rollouts(templated=[1, 0, 1], plain=[0, 1])
    groups = make_groups(
        [siblings, rollouts(templated=[1, 1], plain=[]), rollouts(plain=[0, 0])], AdvantageConfig(), [0.0] * 3
    )
    partial = replace(fake_rollout(PROBLEM, reward=0.6), solved_at=0.5)
    lost = fake_rollout(PROBLEM, reward=0, finish_reason="abort")
    groups.append(make_group([partial, lost], AdvantageConfig(), plain_success_rate=0.0))
    samples = train_samples(groups, ObjectiveConfig(surrogate="clone", context="replace"))
    assert [sample.key[1] for sample in samples] == [0, 2, 4, 0, 1, 0], "a group that agrees is cloned, too"
    assert {sample.advantage for sample in samples} == {1.0}
    assert [sample.is_templated for sample in samples] == [True, True, False, True, True, False]
    bare = siblings[0].completion.prompt.training_ids
    assert all(sample.context_ids.tolist() == bare.tolist() for sample in samples)


def test_a_rollout_that_was_given_up_on_shapes_no_baseline() -> None:
    siblings = rollouts(plain=[1, 0, 0])
    aborted = fake_rollout(PROBLEM, reward=0, finish_reason="abort")
    group = make_group([siblings[0], aborted, *siblings[1:]], AdvantageConfig(), plain_success_rate=0.0)
    first, second, third = credits([1, 0, 0], "grpo")
    assert group.advantages == pytest.approx((first, 0.0, second, third))
    assert len(group.rollouts) == 4


@pytest.mark.parametrize("baseline", ["group", "plain_anchored"])
def test_a_group_that_was_given_up_on_has_no_credit(baseline) -> None:
    lost = [fake_rollout(PROBLEM, reward=0, template=HINT, finish_reason="abort") for _ in range(3)]
    group = make_group(lost, AdvantageConfig(baseline=baseline), plain_success_rate=0.5)
    assert group.advantages == (0.0, 0.0, 0.0)
    assert train_samples([group], ObjectiveConfig()) == []


@pytest.mark.parametrize("context", ["replace", "importance", "ratio_mask"])
def test_distilling_samples_stand_on_the_bare_prompt(context) -> None:
    group = make_group(rollouts(templated=[1, 0], plain=[0]), AdvantageConfig(), plain_success_rate=0.0)
    samples = train_samples([group], ObjectiveConfig(context=context))
    assert [sample.context_ids.tolist() for sample in samples] == [fake_token_ids(PROBLEM.question).tolist()] * 3
    assert [sample.is_templated for sample in samples] == [True, True, False]
    assert tuple(sample.advantage for sample in samples) == group.advantages
    for sample, rollout in zip(samples, group.rollouts, strict=True):
        assert np.array_equal(sample.response_ids, rollout.completion.token_ids)
        assert np.array_equal(sample.sampling_logprobs, rollout.completion.logprobs)


def test_without_distillation_samples_stand_on_the_prompt_they_were_sampled_with() -> None:
    group = make_group(rollouts(templated=[1], plain=[0]), AdvantageConfig(), plain_success_rate=0.0)
    samples = train_samples([group], ObjectiveConfig(context="sampling"))
    assert samples[0].context_ids.tolist() == fake_token_ids("Go on.\n\n" + PROBLEM.question).tolist()
    assert samples[1].context_ids.tolist() == fake_token_ids(PROBLEM.question).tolist()
    assert [sample.is_templated for sample in samples] == [False, False]


def test_failed_templated_rollouts_can_be_dropped_and_still_shape_the_baseline() -> None:
    group = make_group(rollouts(templated=[1, 0, 1], plain=[0, 1]), AdvantageConfig(), plain_success_rate=0.0)
    whole = train_samples([group], ObjectiveConfig())
    samples = train_samples([group], ObjectiveConfig(drop_failed_templated=True))
    kept = [0, 2, 3, 4]
    assert [sample.advantage for sample in samples] == [whole[index].advantage for index in kept]
    assert [sample.is_templated for sample in samples] == [True, True, False, False]


@pytest.mark.parametrize(("solved_at", "kept"), [(1.0, [2, 3, 4]), (0.75, [1, 2, 3, 4])])
def test_a_templated_rollout_with_a_reward_below_solved_has_failed(solved_at: float, kept: list[int]) -> None:
    siblings = rollouts(templated=[0.5, 0.75, 1.0], plain=[0.75, 0.5])
    siblings = [replace(rollout, solved_at=solved_at) for rollout in siblings]
    group = make_group(siblings, AdvantageConfig(), plain_success_rate=0.0)
    samples = train_samples([group], ObjectiveConfig(drop_failed_templated=True))
    assert [sample.advantage for sample in samples] == [group.advantages[index] for index in kept]


def test_an_empty_response_is_credited_but_cannot_be_trained_on() -> None:
    empty = fake_rollout(PROBLEM, reward=0, num_tokens=0)
    group = make_group([empty, *rollouts(plain=[1, 1])], AdvantageConfig(), plain_success_rate=0.0)
    assert group.advantages == pytest.approx(credits([0, 1, 1], "grpo"))
    assert len(train_samples([group], ObjectiveConfig())) == 2


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("baseline", ["group", "plain_anchored"])
def test_an_undecided_answer_shapes_no_baseline_and_is_no_sample(estimator, baseline) -> None:
    undecided = replace(fake_rollout(PROBLEM, reward=0, template=HINT, num_tokens=9), grade=UNDECIDED)
    config = AdvantageConfig(estimator=estimator, baseline=baseline)
    siblings = rollouts(templated=[1, 0], plain=[1, 0, 0])
    alone = make_group(siblings, config, plain_success_rate=0.25)
    group = make_group([*siblings[:1], undecided, *siblings[1:]], config, plain_success_rate=0.25)
    assert group.advantages == (alone.advantages[0], 0.0, *alone.advantages[1:])
    assert len(train_samples([group], ObjectiveConfig())) == 5


def test_five_correct_answers_and_an_undecided_one_agree() -> None:
    undecided = replace(fake_rollout(PROBLEM, reward=0), grade=UNDECIDED)
    group = make_group([*rollouts(plain=[1] * 5), undecided], AdvantageConfig(), plain_success_rate=0.0)
    assert group.advantages == (0.0,) * 6


def test_zero_advantage_samples_are_still_samples() -> None:
    group = make_group(rollouts(plain=[0, 0]), AdvantageConfig(), plain_success_rate=0.0)
    samples = train_samples([group], ObjectiveConfig())
    assert [(sample.advantage, len(sample.response_ids)) for sample in samples] == [(0.0, 3), (0.0, 3)]
    assert all(rollout.completion.prompt.template == PLAIN for rollout in group.rollouts)


def test_truncated_rollouts_are_trained_on_unless_they_are_dropped_and_shape_the_baseline_either_way() -> None:
    problem = fake_problem(1)
    siblings = [
        fake_rollout(problem, reward=1.0),
        fake_rollout(problem, reward=0.0, finish_reason="length"),
        fake_rollout(problem, reward=0.0),
    ]
    (group,) = make_groups([siblings], AdvantageConfig(), [0.5])
    whole = train_samples([group], ObjectiveConfig())
    kept = train_samples([group], ObjectiveConfig(drop_truncated=True))
    assert [sample.advantage for sample in whole] == list(group.advantages)
    assert [sample.advantage for sample in kept] == [group.advantages[0], group.advantages[2]]


def test_partial_rewards_are_credited_as_they_are() -> None:
    rollouts = [fake_rollout(PROBLEM, reward=reward) for reward in (0.0, 0.25, 1.0)]
    (group,) = make_groups([rollouts], AdvantageConfig(), [0.0])
    assert group.advantages == pytest.approx(group_advantages_reference([0.0, 0.25, 1.0], [True] * 3, "grpo", None))
