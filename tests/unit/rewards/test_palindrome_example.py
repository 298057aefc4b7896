"""The reward of examples/tasks/palindrome counts palindromes that begin as the row says."""

import runpy
from pathlib import Path

import pytest

from megatron_p2o.types import Grade, Problem

REWARD = Path(__file__).parents[3] / "examples" / "tasks" / "palindrome" / "reward.py"
PROBLEM = Problem(id="bd", question="q", answer=None, columns={"letters": "bd"})


@pytest.mark.parametrize("response", ["b d d b", "b d b", "B, d: D b!", "b d f d b"])
def test_any_palindrome_that_goes_on_from_the_letters_is_right(response: str) -> None:
    assert runpy.run_path(str(REWARD))["palindrome"](PROBLEM, response, "stop") == 1.0


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("b d b d", "'bdbd' read backwards is 'dbdb'."),
        ("f d d f", "'fddf' does not go on from 'bd'."),
        ("b d", "'bd' does not go on from 'bd'."),
        ("", "'' does not go on from 'bd'."),
    ],
)
def test_anything_else_is_wrong_and_the_feedback_says_why(response: str, feedback: str) -> None:
    grade = runpy.run_path(str(REWARD))["palindrome"](PROBLEM, response, "stop")
    assert grade == Grade(reward=0.0, feedback=feedback)
