"""Intervals against exact binomial sums, closed forms, a search for the likeliest shares, and counted coverage."""

import math
from itertools import product

import numpy as np
import pytest

from megatron_p2o.evaluation.estimators import mcnemar_p_value
from megatron_p2o.evaluation.intervals import (
    MIN_VARIED,
    difference_interval,
    mean_interval,
    score_interval,
    share_interval,
)

Z = 1.959963984540054
"""97.5 % of a standard normal distribution lies below."""


def at_least(num_solved: int, num_problems: int, share: float) -> float:
    """Return the probability of `num_solved` or more."""
    return math.fsum(
        math.comb(num_problems, count) * share**count * (1 - share) ** (num_problems - count)
        for count in range(num_solved, num_problems + 1)
    )


@pytest.mark.parametrize(
    ("num_problems", "num_solved"), [(1, 0), (1, 1), (30, 0), (30, 1), (30, 17), (30, 30), (500, 440), (900, 3)]
)
def test_interval_of_solved_problems_is_clopper_and_pearsons(num_problems: int, num_solved: int) -> None:
    interval = mean_interval([1.0] * num_solved + [0.0] * (num_problems - num_solved), seed=3)
    if num_solved == 0:
        assert interval.low == 0.0
    else:
        assert at_least(num_solved, num_problems, interval.low) == pytest.approx(0.025, rel=1e-6)
    if num_solved == num_problems:
        assert interval.high == 1.0
    else:
        assert 1 - at_least(num_solved + 1, num_problems, interval.high) == pytest.approx(0.025, rel=1e-6)


def test_none_of_thirty_solved_may_be_more_than_a_tenth() -> None:
    assert mean_interval([0.0] * 30, 0).high == pytest.approx(1 - 0.025 ** (1 / 30)) == pytest.approx(0.1157, abs=1e-4)
    assert mean_interval([1.0] * 30, 0).low == pytest.approx(0.025 ** (1 / 30))


def test_interval_of_solved_problems_covers_every_share() -> None:
    for num_problems, share in product((5, 12), np.linspace(0.01, 0.99, 25)):
        covered = sum(
            at_least(count, num_problems, share) - at_least(count + 1, num_problems, share)
            for count in range(num_problems + 1)
            if share_interval(count, num_problems).low <= share <= share_interval(count, num_problems).high
        )
        assert covered >= 0.95


def test_shares_of_which_few_vary_get_the_interval_of_as_many_trials() -> None:
    assert mean_interval([0.25], 1) == share_interval(0.25, 1)
    assert mean_interval([0.25] * 9, 1) == share_interval(2.25, 9)
    few = [0.0] * 25 + [0.5] * (MIN_VARIED - 1)
    assert mean_interval(few, 1) == share_interval(0.5 * (MIN_VARIED - 1), 30 - (6 - MIN_VARIED))
    assert mean_interval([*few, 0.25], 1) != share_interval(sum(few) + 0.25, len(few) + 1), "a bootstrap's"


def test_a_bootstrap_is_near_the_normal_interval_and_repeats_with_its_seed() -> None:
    values = list(np.linspace(0, 1, 201))
    interval = mean_interval(values, 7)
    half = Z * np.std(values) / math.sqrt(len(values))
    # 10,000 resamples place the ends within 2 % of the half width.
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.04 * half)
    assert mean_interval(values, 7) == interval != mean_interval(values, 8)


def likeliest_share_lost(difference: float, num_gained: int, num_lost: int, num_problems: int) -> float:
    """Search the share that only the first solves, if that of the second is `difference` more."""
    shares = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]
    gained, neither = shares + difference, 1 - 2 * shares - difference
    with np.errstate(divide="ignore"):
        terms = (num_gained, gained), (num_lost, shares), (num_problems - num_gained - num_lost, neither)
        likelihood = sum(count * np.log(share) for count, share in terms if count)
    return float(shares[np.argmax(likelihood)])


@pytest.mark.parametrize(
    ("num_gained", "num_lost", "num_problems"), [(12, 2, 50), (6, 1, 8), (3, 9, 40), (40, 20, 500)]
)
def test_score_interval_ends_where_the_score_is_a_normal_quantile(
    num_gained: int, num_lost: int, num_problems: int
) -> None:
    interval = score_interval(num_gained, num_lost, num_problems)
    for difference, quantile in ((interval.low, Z), (interval.high, -Z)):
        share_lost = likeliest_share_lost(difference, num_gained, num_lost, num_problems)
        variance = (2 * share_lost + difference - difference**2) / num_problems
        score = ((num_gained - num_lost) / num_problems - difference) / math.sqrt(variance)
        assert score == pytest.approx(quantile, abs=1e-3)


def test_score_interval_of_nothing_moved_and_of_all_moved_has_a_closed_form() -> None:
    for num_problems in (5, 30, 500):
        still, all_moved = score_interval(0, 0, num_problems), score_interval(num_problems, 0, num_problems)
        bound = Z**2 / (num_problems + Z**2)
        assert (still.low, still.high) == pytest.approx((-bound, bound), rel=1e-9)
        assert (all_moved.low, all_moved.high) == pytest.approx((1 - 2 * bound, 1.0), rel=1e-9)
        lost = score_interval(0, num_problems, num_problems)
        assert (lost.low, lost.high) == pytest.approx((-1.0, 2 * bound - 1), rel=1e-9)


def test_score_interval_covers_differences_of_paired_shares() -> None:
    num_problems = 15
    outcomes = [(b, c) for b, c in product(range(num_problems + 1), repeat=2) if b + c <= num_problems]
    intervals = {outcome: score_interval(*outcome, num_problems) for outcome in outcomes}
    for gained, lost in ((0.05, 0.05), (0.3, 0.1), (0.5, 0.0), (0.02, 0.2), (0.8, 0.1), (0.25, 0.25)):
        covered = sum(
            math.comb(num_problems, b)
            * math.comb(num_problems - b, c)
            * gained**b
            * lost**c
            * (1 - gained - lost) ** (num_problems - b - c)
            for b, c in outcomes
            if intervals[b, c].low <= gained - lost <= intervals[b, c].high
        )
        assert covered >= 0.93, "about 95 %: a score interval is not exact"


def test_a_difference_that_the_test_does_not_exclude_to_be_zero_may_be_zero() -> None:
    for num_better, num_worse in product(range(12), repeat=2):
        differences = [1.0] * num_better + [-1.0] * num_worse + [0.0] * 8
        p_value = mcnemar_p_value(num_worse, num_better)
        interval = difference_interval(differences, p_value, 0)
        assert interval.low <= (num_better - num_worse) / len(differences) <= interval.high
        if p_value > 0.05:
            assert interval.low <= 0 <= interval.high
    assert difference_interval([0.0] * 30, 1.0, 0).high == pytest.approx(Z**2 / (30 + Z**2))
    assert difference_interval([0.25] * 30, 0.0, 0) == score_interval(7.5, 0, 30), (
        "a bootstrap would make a point of it"
    )


def test_differences_of_averages_are_resampled_where_enough_vary() -> None:
    differences = [0.25, -0.125, 0.5, 0.0, 0.125, 0.375, -0.25, 0.0625] * 10
    interval = difference_interval(differences, 0.0, 3)
    half = Z * np.std(differences) / math.sqrt(len(differences))
    mean = float(np.mean(differences))
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), abs=0.06 * half)
