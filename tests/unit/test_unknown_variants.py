"""A variant of the objective that a setting may name and a formula was forgotten for is an error, never another one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_p2o.config.tree import AdvantageConfig, ObjectiveConfig
from megatron_p2o.policy.training.forward import Denominator
from megatron_p2o.rl.grouping import make_groups, train_samples
from megatron_p2o.rl.hard_samples import hard_problems
from megatron_p2o.rl.objective import compares_with_sampling, zero_stats
from megatron_p2o.testing.fakes import fake_problem, fake_rollout

UNKNOWN: Any = "median_of_means"
SIBLINGS = [fake_rollout(fake_problem(1), reward=reward) for reward in (1.0, 0.0)]
GROUPS = make_groups([SIBLINGS], AdvantageConfig(), [0.5])


def contribution(**settings: Any) -> None:
    denominator = Denominator(objective=ObjectiveConfig(**settings), num_loss_tokens=8, num_samples=2, counts_here=True)
    denominator.contribution(torch.ones(()), zero_stats(), None, 0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "use",
    [
        lambda: make_groups([SIBLINGS], AdvantageConfig(estimator=UNKNOWN), [0.5]),
        lambda: make_groups([SIBLINGS], AdvantageConfig(baseline=UNKNOWN), [0.5]),
        lambda: train_samples(GROUPS, ObjectiveConfig(context=UNKNOWN)),
        lambda: compares_with_sampling(UNKNOWN),
        lambda: hard_problems(GROUPS, 1, UNKNOWN),
        lambda: contribution(normalization=UNKNOWN),
    ],
    ids=["estimator", "baseline", "context of samples", "context of ratios", "counted", "normalization"],
)
def test_a_variant_without_a_formula_is_an_error_that_names_it(use: Callable[[], object]) -> None:
    with pytest.raises((ValueError, AssertionError), match=UNKNOWN):
        use()
