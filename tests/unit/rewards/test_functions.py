"""How reward functions are named and found, and what they may return."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_p2o.rewards.functions import (
    RewardSpec,
    batched,
    grade_of,
    is_async,
    is_batched,
    weighted_sum,
)
from megatron_p2o.testing.answers.graded import load_function
from megatron_p2o.types import CORRECT, INCORRECT, Grade, Problem

PROBLEM = Problem(id="p", question="q", answer="1+x", columns={"minimum": 3})

FILE = """
from dataclasses import dataclass
from megatron_p2o.types import Grade

def length(problem, response, finish_reason, scale=10):
    return min(1.0, len(response) / scale)

async def later(problem, response, finish_reason):
    return True

class Judge:
    def __init__(self, bar):
        self.bar = bar
    def __call__(self, problem, response, finish_reason):
        return len(response) >= self.bar

@dataclass
class Record:
    name: str = "a"

class Scores:
    best = staticmethod(lambda problem, response, finish_reason: 1.0)

class Silent:
    def score(self, problem, response, finish_reason):
        return 1.0

class Exits:
    def __init__(self):
        raise SystemExit(3)
    def __call__(self, problem, response, finish_reason):
        return 1.0

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)

def two(problem, response):
    return 1.0

number = 7
"""


def reward_file(directory: Path, text: str = FILE) -> str:
    path = directory / "my_reward.py"
    path.write_text(text)
    return str(path)


def load(function: str, **arguments: Any) -> Any:
    return load_function(RewardSpec(function=function, arguments=arguments))


def refusal(function: str, **arguments: Any) -> str:
    with pytest.raises(ValueError) as refused:
        load(function, **arguments)
    assert str(refused.value).startswith(f"grading.function={function} ")
    return str(refused.value)


def test_a_function_is_found_in_a_file_in_a_module_and_by_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = reward_file(tmp_path)
    assert load(f"{path}:length")(PROBLEM, "abc", "stop") == 0.3
    assert load(f"{path}:length", scale=6)(PROBLEM, "abc", "stop") == 0.5
    assert load(f"{path}:Scores.best")(PROBLEM, "abc", "stop") == 1.0
    monkeypatch.syspath_prepend(tmp_path)
    assert load("my_reward:length")(PROBLEM, "abc", "stop") == 0.3
    assert load("math")(PROBLEM, r"so \boxed{x+1}", "stop") is True
    assert load("math")(PROBLEM, r"so \boxed{x+2}", "stop") is False
    assert load("math")(PROBLEM, "so x+1", "stop") is False


def test_a_package_names_its_functions_by_entry_points(installed_package: Callable[[str, str, str], Path]) -> None:
    installed_package("lengths", FILE, "[megatron_p2o.rewards]\nlong = lengths:length\n")
    assert load("long")(PROBLEM, "abc", "stop") == 0.3
    assert "reasoning_gym, long, nor" in refusal("short")


def test_a_class_becomes_one_instance_with_the_arguments(tmp_path: Path) -> None:
    judge = load(f"{reward_file(tmp_path)}:Judge", bar=3)
    assert judge(PROBLEM, "abc", "stop") is True and judge(PROBLEM, "ab", "stop") is False
    assert "must be made with grading.arguments (missing a required argument: 'bar')" in refusal(
        f"{tmp_path}/my_reward.py:Judge"
    )


def test_what_cannot_be_called_as_a_reward_function_is_refused_with_the_signature(tmp_path: Path) -> None:
    path = reward_file(tmp_path)
    expected = "must be callable as (problem, response, finish_reason)"
    assert "has the signature (problem, response) and " + expected in refusal(f"{path}:two")
    assert "has no method __call__(self, problem, response, finish_reason)" in refusal(f"{path}:Silent")
    assert "takes data_source, solution_str, ground_truth, as another library" in refusal(f"{path}:compute_score")
    assert "cannot be made (SystemExit: 3)" in refusal(f"{path}:Exits")
    assert "is int, and " + expected in refusal(f"{path}:number")
    assert "cannot be imported (AttributeError: " in refusal(f"{path}:missing")
    assert "cannot be imported (FileNotFoundError: " in refusal(f"{tmp_path}/none.py:length")
    assert "cannot be imported (ModuleNotFoundError: " in refusal("no_such_package:length")
    assert "nor package.module:callable or path/to/file.py:callable" in refusal("exakt")
    assert "nor package.module:callable" in refusal(":length")
    assert "unexpected keyword argument 'skale'" in refusal(f"{path}:length", skale=3)


def test_a_file_that_raises_is_refused_again_and_again(tmp_path: Path) -> None:
    path = reward_file(tmp_path, "raise RuntimeError('no key')")
    for _ in range(2):
        assert "cannot be imported (RuntimeError: no key)" in refusal(f"{path}:length")


def test_a_file_that_ends_the_program_is_refused(tmp_path: Path) -> None:
    path = reward_file(tmp_path, "raise SystemExit('usage: ...')")
    assert "cannot be imported (SystemExit: usage: ...)" in refusal(f"{path}:length")


def test_asynchronous_and_batched_functions_are_told_apart(tmp_path: Path) -> None:
    path = reward_file(tmp_path)
    assert is_async(load(f"{path}:later")) and not is_async(load(f"{path}:length", scale=3))

    @batched
    def lengths(
        problems: list[Problem], responses: list[str], finish_reasons: list[str], scale: int = 1
    ) -> list[float]:
        return [len(response) / scale for response in responses]

    class Lengths:
        @batched
        async def __call__(
            self, problems: list[Problem], responses: list[str], finish_reasons: list[str]
        ) -> list[float]:
            return [0.0 for _ in responses]

    assert is_batched(lengths) and not is_async(lengths)
    assert is_batched(partial(lengths, scale=3))
    assert is_batched(Lengths()) and is_async(Lengths())
    assert not is_batched(load(f"{path}:length"))


@pytest.mark.parametrize(
    ("returned", "reward"),
    [
        *((True, 1.0), (False, 0.0), (1, 1.0), (0.25, 0.25), (np.float32(0.5), 0.5), (np.bool_(True), 1.0)),
        *((Fraction(1, 4), 0.25), (Decimal("0.5"), 0.5), (np.array(0.5), 0.5), (-0.0, 0.0)),
    ],
)
def test_numbers_in_the_unit_interval_are_rewards(returned: object, reward: float) -> None:
    grade = grade_of(returned)
    assert grade == Grade(reward=reward) and isinstance(grade.reward, float)


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (math.nan, "reward nan is not in [0, 1]"),
        (1.5, "reward 1.5 is not in [0, 1]"),
        (-0.1, "reward -0.1 is not in [0, 1]"),
        (math.inf, "reward inf is not in [0, 1]"),
        (np.array([0.5, 0.5]), "only"),
        (None, "it returned NoneType, and not a float in [0, 1], a bool or a Grade"),
        ("1.0", "it returned str"),
        ({"score": 1.0}, "it returned dict"),
        ((1.0, "good"), "it returned tuple"),
    ],
)
def test_everything_else_is_undecided_with_a_reason_and_never_a_failure(returned: object, reason: str) -> None:
    grade = grade_of(returned)
    assert grade.reward is None and grade.reason.startswith(reason)


def test_a_grade_passes_as_it_is_and_refuses_what_is_no_reward() -> None:
    grade = Grade(reward=0.5, reason="half", feedback="Say more.")
    assert grade_of(grade) is grade
    with pytest.raises(ValueError, match=r"reward 2.0 is not in \[0, 1\]"):
        Grade(reward=2.0)
    assert not Grade.undecided("lost").is_decided and CORRECT.is_decided and INCORRECT.is_decided


def test_a_weighted_sum_is_a_mean_and_undecided_where_a_part_is() -> None:
    half = Grade(reward=0.5, reason="half", feedback="Say more.")
    assert weighted_sum([CORRECT, half], [3, 1]) == Grade(reward=0.875, reason="half", feedback="Say more.")
    assert weighted_sum([CORRECT, CORRECT, CORRECT], [0.1, 0.2, 0.3]).reward == 1.0
    assert weighted_sum([CORRECT, Grade.undecided("lost")], [1, 1]) == Grade.undecided("lost")
