"""What is taken from a reward before the advantage: over-long responses and the KL to the initial policy."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_p2o.rl.grouping import make_groups
from megatron_p2o.rl.shaping import kl_of, kl_sum, overlong_penalty, shaped
from megatron_p2o.rl.standing_policy import StandingPolicy
from megatron_p2o.testing.fakes import FakePolicy, fake_config, fake_logprobs, fake_problem, fake_rollout
from megatron_p2o.types import Group, Template, no_tokens

HINT = Template(id=1, text="Hint.", parent=0)


def group_of(*rewards: float, lengths: tuple[int, ...] | None = None, **settings: Any) -> Group:
    """Return rollouts of one problem, credited by their grades; `lengths` in tokens."""
    sizes = lengths or (4,) * len(rewards)
    rollouts = [
        fake_rollout(fake_problem(1), reward=reward, num_tokens=size, **settings)
        for reward, size in zip(rewards, sizes, strict=True)
    ]
    return make_groups([rollouts], fake_config().advantage, [0.5])[0]


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0.0), (12, 0.0), (13, 0.25), (14, 0.5), (15, 0.75), (16, 1.0), (17, 1.0)]
)
def test_the_over_long_penalty_is_dapos(num_tokens: int, penalty: float) -> None:
    """L_max 16, L_cache 4: minus ((16 - 4) - L) / 4 between 12 and 16 tokens (arXiv:2503.14476, eq. 13)."""
    assert overlong_penalty(num_tokens, 4, 16) == penalty


def test_a_long_right_answer_is_worth_less_than_a_short_one_and_its_grade_stays() -> None:
    config = fake_config({"advantage.overlong_tokens": 4, "advantage.estimator": "dr_grpo"})
    group = group_of(1.0, 1.0, 0.0, 1.0, lengths=(4, 6, 2, 8))  # of at most 8 tokens
    (result,), measured = shaped([group], [0.5], StandingPolicy(FakePolicy()), config)
    rewards = np.array([1.0, 0.5, 0.0, 0.0])
    assert result.advantages == pytest.approx(rewards - rewards.mean(), abs=1e-6)
    assert result.rollouts == group.rollouts
    assert measured == no_tokens()


def test_settings_that_shape_nothing_leave_the_groups_alone() -> None:
    groups, policy = [group_of(1.0, 0.0)], FakePolicy()
    for settings in ({}, {"objective.kl_coefficient": 0.1}, {"objective.kl_as": "reward"}):
        result, measured = shaped(groups, [0.5], StandingPolicy(policy), fake_config(settings))
        assert result is groups and measured == no_tokens()
    assert policy.journal == []


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimates_are_those_of_schulman_in_float64(estimator: str) -> None:
    objective = fake_config({"objective.kl_estimator": estimator}).objective
    ours, reference = (np.array(row, np.float32) for row in ([-1.0, -2.0, -0.1], [-1.25, -1.0, -0.1]))
    ratios = np.exp(reference.astype(np.float64) - ours)
    expected = {
        "k1": -np.log(ratios).sum(),
        "k2": (np.log(ratios) ** 2 / 2).sum(),
        "k3": (ratios - 1 - np.log(ratios)).sum(),
    }[estimator]
    assert kl_sum(ours, reference, objective) == pytest.approx(expected, rel=1e-12)
    assert kl_sum(ours, ours, objective) == 0


def test_k1_over_all_tokens_of_a_distribution_is_the_divergence_and_its_reward_gradient_the_divergences() -> None:
    """Sum over p of k1 times the score: what a policy gradient sees of `k1` in the reward (arXiv:2510.01555)."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(0)
    divergence = (logprobs.exp() * (logprobs - reference)).sum()
    (truth,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    objective = fake_config({"objective.kl_estimator": "k1"}).objective
    rows = [
        (np.array([float(ours)]), np.array([float(theirs)]))
        for ours, theirs in zip(logprobs.detach(), reference, strict=True)
    ]
    k1 = torch.tensor([kl_sum(*row, objective) for row in rows], dtype=torch.float64)
    probabilities = logprobs.detach().exp()
    assert float((probabilities * k1).sum()) == pytest.approx(divergence.item())
    (gradient,) = torch.autograd.grad((probabilities * k1 * logprobs).sum(), logits)
    torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_divergence_is_taken_from_the_reward_on_the_prompt_of_the_gradient(estimator: str) -> None:
    settings = {"objective.kl_coefficient": 0.25, "objective.kl_as": "reward", "objective.kl_estimator": estimator}
    config = fake_config({**settings, "advantage.estimator": "dr_grpo"})
    policy = FakePolicy(num_updates=3)
    group = group_of(1.0, 0.0, 1.0, lengths=(4, 3, 2), template=HINT)
    (result,), measured = shaped([group], [0.5], StandingPolicy(policy), config)
    rewards = []
    for rollout in group.rollouts:
        ids = rollout.completion.prompt.training_ids, rollout.completion.token_ids
        kl = kl_sum(fake_logprobs(*ids, 3), fake_logprobs(*ids, 0), config.objective)
        rewards.append((rollout.grade.reward or 0.0) - 0.25 * kl)
    assert np.ptp(rewards) > 0.1
    assert result.advantages == pytest.approx(np.array(rewards) - np.mean(rewards), abs=1e-6)
    assert policy.journal == ["logprobs", "reference_logprobs"]
    assert measured.reference_tokens == 9 and measured.reference_kl_sum > 0


def test_a_rollout_that_is_not_trained_on_shapes_the_baseline_and_an_undecided_one_does_not() -> None:
    settings = {"objective.kl_coefficient": 0.25, "objective.kl_as": "reward", "objective.drop_truncated": True}
    config = fake_config(settings)
    cut_off, lost = group_of(1.0, finish_reason="length"), group_of(0.0, finish_reason="abort")
    group = replace(group_of(1.0, 0.0), rollouts=(*cut_off.rollouts, *lost.rollouts), advantages=(0.0, 0.0))
    ((truncated_kl, lost_kl),), measured = kl_of([group], StandingPolicy(FakePolicy(num_updates=1)), config.objective)
    assert truncated_kl > 0 and lost_kl == 0
    assert measured.reference_tokens == 4
    (result,), _ = shaped([group], [0.5], FakePolicy(num_updates=1), config)
    assert result.advantages[1] == 0
