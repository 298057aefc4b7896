"""The specification of group advantages against published vectors, direct group statistics and invariances."""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2o_kernels.advantage.op import Estimator
from p2o_kernels.advantage.reference import STD_EPSILON, group_advantages_reference

ESTIMATORS: tuple[Estimator, ...] = ("grpo", "dr_grpo", "rloo")
REWARDS = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=12)
REAL_REWARDS = st.lists(st.floats(-5, 5).map(lambda value: round(value, 3)), min_size=2, max_size=12)


def group_advantages(
    rewards: list[float], estimator: Estimator, *, anchor_success_rate: float | None = None
) -> tuple[float, ...]:
    return tuple(group_advantages_reference(rewards, [True] * len(rewards), estimator, anchor_success_rate))


def directly(rewards: list[float], siblings: list[float], estimator: Estimator) -> list[float]:
    """Return the advantages of `rewards` by the textbook, in a group that is `siblings` (which contains `rewards`)."""
    mean = statistics.fmean(siblings)
    if estimator == "grpo":
        return [(reward - mean) / (statistics.stdev(siblings) + STD_EPSILON) for reward in rewards]
    if estimator == "dr_grpo":
        return [reward - mean for reward in rewards]
    return [reward - (math.fsum(siblings) - reward) / (len(siblings) - 1) for reward in rewards]


@pytest.mark.parametrize(
    ("num_solved", "success", "failure"),
    [
        (1, 2.0412, -0.4082),
        (2, 1.2910, -0.6455),
        (3, 0.9129, -0.9129),
        (4, 0.6455, -1.2910),
        (5, 0.4082, -2.0412),
    ],
)
def test_six_rollouts_give_the_published_advantages(num_solved: int, success: float, failure: float) -> None:
    advantages = group_advantages([1.0] * num_solved + [0.0] * (6 - num_solved), "grpo")
    assert advantages == pytest.approx([success] * num_solved + [failure] * (6 - num_solved), abs=5e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e6 + 0.1])
@pytest.mark.parametrize("size", [1, 2, 6, 7])
def test_equal_rewards_give_exactly_zero(estimator: Estimator, reward: float, size: int) -> None:
    assert group_advantages([reward] * size, estimator) == (0.0,) * size


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("anchor", [None, 0.0, 0.3, 1.0])
def test_a_group_without_rollouts_has_no_advantages(estimator: Estimator, anchor: float | None) -> None:
    with np.errstate(all="raise"):
        assert group_advantages([], estimator, anchor_success_rate=anchor) == ()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_large_offset_of_all_rewards_changes_nothing(estimator: Estimator) -> None:
    rewards = [0.0, 1.0, 0.0, 0.0, 1.0, 0.5]
    shifted = [reward + 1e6 for reward in rewards]
    # float64 keeps rewards near 1e6 to about 1e-10.
    assert group_advantages(shifted, estimator) == pytest.approx(group_advantages(rewards, estimator), abs=1e-8)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(rewards=REAL_REWARDS)
def test_advantages_follow_the_textbook(estimator: Estimator, rewards: list[float]) -> None:
    advantages = group_advantages(rewards, estimator)
    if len(set(rewards)) == 1:
        assert advantages == (0.0,) * len(rewards)
    else:
        assert advantages == pytest.approx(directly(rewards, rewards, estimator), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(rewards=REAL_REWARDS)
def test_group_advantages_sum_to_zero(estimator: Estimator, rewards: list[float]) -> None:
    assert math.fsum(group_advantages(rewards, estimator)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(rewards=REAL_REWARDS, order=st.randoms(use_true_random=False))
def test_permuting_the_rollouts_permutes_the_advantages(estimator: Estimator, rewards: list[float], order) -> None:
    permutation = list(range(len(rewards)))
    order.shuffle(permutation)
    advantages = group_advantages(rewards, estimator)
    permuted = group_advantages([rewards[index] for index in permutation], estimator)
    assert permuted == pytest.approx([advantages[index] for index in permutation], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(rewards=REWARDS)
def test_an_anchor_at_rate_zero_is_as_many_failed_siblings(estimator: Estimator, rewards: list[float]) -> None:
    anchored = group_advantages(rewards, estimator, anchor_success_rate=0.0)
    if not any(rewards):
        assert anchored == (0.0,) * len(rewards)
    else:
        joined = rewards + [0.0] * len(rewards)
        assert anchored == pytest.approx(directly(rewards, joined, estimator), rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("num_anchor_solved", [1, 3, 6])
@pytest.mark.parametrize("num_solved", [0, 2, 5])
def test_an_anchor_at_a_whole_number_of_successes_is_that_group(
    estimator: Estimator, num_anchor_solved: int, num_solved: int
) -> None:
    rewards = [1.0] * num_solved + [0.0] * (6 - num_solved)
    joined = rewards + [1.0] * num_anchor_solved + [0.0] * (6 - num_anchor_solved)
    anchored = group_advantages(rewards, estimator, anchor_success_rate=num_anchor_solved / 6)
    assert anchored == pytest.approx(directly(rewards, joined, estimator), rel=1e-9)


@pytest.mark.parametrize("rate", [Fraction(1, 4), Fraction(1, 10), Fraction(7, 9)])
@pytest.mark.parametrize("num_solved", [0, 1, 6])
def test_an_anchor_in_between_enters_by_its_expected_moments(rate: Fraction, num_solved: int) -> None:
    rewards = [Fraction(1)] * num_solved + [Fraction(0)] * (6 - num_solved)
    mean = (sum(rewards) + 6 * rate) / 12
    squares = sum((reward - mean) ** 2 for reward in rewards) + 6 * (rate * (1 - mean) ** 2 + (1 - rate) * mean**2)
    deviation = math.sqrt(squares / 11) + STD_EPSILON
    anchored = group_advantages([float(reward) for reward in rewards], "grpo", anchor_success_rate=float(rate))
    assert anchored == pytest.approx([float(reward - mean) / deviation for reward in rewards], rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_templated_success_is_credited_until_the_plain_prompt_succeeds_too(estimator: Estimator) -> None:
    solved = [1.0] * 6
    by_rate = [group_advantages(solved, estimator, anchor_success_rate=rate)[0] for rate in (0.0, 0.25, 0.5, 0.9)]
    assert by_rate == sorted(by_rate, reverse=True)
    assert by_rate[-1] > 0
    assert group_advantages(solved, estimator, anchor_success_rate=1.0) == (0.0,) * 6
    assert group_advantages(solved, estimator) == (0.0,) * 6


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_failing_where_the_plain_prompt_succeeds_is_discouraged(estimator: Estimator) -> None:
    assert max(group_advantages([0.0] * 6, estimator, anchor_success_rate=1.0)) < 0
    assert group_advantages([0.0] * 6, estimator, anchor_success_rate=0.0) == (0.0,) * 6
