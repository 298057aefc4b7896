"""Estimators against enumeration."""

import math
from itertools import combinations, product

import pytest

from megatron_p2o.evaluation.estimators import (
    EXACT_SIGNS,
    NUM_RESAMPLES,
    mcnemar_p_value,
    pass_at_k,
    powers_up_to,
    sign_permutation_p_value,
)


def enumerated_p_value(differences: list[float]) -> float:
    observed = abs(sum(differences)) - 1e-9
    sums = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(each >= observed for each in sums) / len(sums)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_answer() -> None:
    for num_samples, num_correct in product(range(1, 8), range(8)):
        answers = [True] * min(num_correct, num_samples) + [False] * max(0, num_samples - num_correct)
        for k in range(1, num_samples + 1):
            draws = list(combinations(answers, k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(num_samples, sum(answers), k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_refuses_more_tries_than_samples() -> None:
    with pytest.raises(ValueError, match=r"k=5 must lie in 1\.\.4"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(
    ("num_samples", "expected"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_pass_at_is_given_for_powers_of_two_and_all_samples(num_samples: int, expected: list[int]) -> None:
    assert powers_up_to(num_samples) == expected


@pytest.mark.parametrize(
    "differences", [[0.5], [0.25, -0.25], [0.1, 0.2, 0.3, -0.1], [1.0] * 6 + [-0.5] * 3, [0.0, 0.0]]
)
def test_permutation_test_is_exact_for_few_differences(differences: list[float]) -> None:
    assert sign_permutation_p_value(differences, seed=0) == pytest.approx(enumerated_p_value(differences))
    assert sign_permutation_p_value([*differences, 0.0], seed=0) == sign_permutation_p_value(differences, seed=0)


def test_permutation_test_by_random_signs_approaches_the_exact_one() -> None:
    differences = [0.125] * 26 + [-0.125] * 14
    assert len(differences) > EXACT_SIGNS
    exact = mcnemar_p_value(26, 14)
    # Four standard errors of a share of 10,000 patterns.
    tolerance = 4 * math.sqrt(exact * (1 - exact) / NUM_RESAMPLES)
    assert sign_permutation_p_value(differences, seed=5) == pytest.approx(exact, abs=tolerance)
    assert 0 < sign_permutation_p_value([1.0] * 200, seed=5) < 0.001


def test_mcnemar_is_the_exact_sign_test() -> None:
    assert mcnemar_p_value(1, 9) == 22 / 1024
    assert mcnemar_p_value(0, 0) == mcnemar_p_value(5, 5) == 1.0
    for first, second in product(range(7), repeat=2):
        assert mcnemar_p_value(first, second) == pytest.approx(enumerated_p_value([1.0] * first + [-1.0] * second))
