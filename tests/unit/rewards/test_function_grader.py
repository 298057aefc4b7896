"""Reward functions in their workers: what they get, what becomes of what they return or raise, and their limits."""

import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.sections.rollout import WeightedFunctionConfig
from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.processes import PROXY_VARIABLES
from megatron_p2o.rewards.function_grader import FunctionGrader
from megatron_p2o.rewards.functions import JUDGE_KEY, RewardSpec, function_secrets
from megatron_p2o.rewards.math.grader import MathGrader
from megatron_p2o.rewards.registry import make_grader
from megatron_p2o.rewards.workers.lane import UNDECIDED
from megatron_p2o.rewards.workers.processes import FunctionRefused
from megatron_p2o.types import CORRECT, INCORRECT, Grade, Problem

PATIENCE_S = 120.0
"""Longest wait for anything here; passing tests take a fraction of a second on an idle machine."""

FILE = r'''
import asyncio, os, sys, time
import numpy as np
from megatron_p2o.rewards.functions import batched
from megatron_p2o.types import Grade

def told(problem, response, finish_reason):
    seen = (problem.id, problem.question, problem.answer, dict(problem.columns), response, finish_reason)
    return Grade(reward=0.5, reason=repr(seen), feedback="Say more.")

def value(problem, response, finish_reason):
    return eval(response)

def forked(problem, response, finish_reason):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return 0.25 if child else 1.0

async def cancelled(problem, response, finish_reason):
    raise asyncio.CancelledError("shut down")

def taking(problem, response, finish_reason):
    problem.columns["tests"].clear()
    return float("minimum" in problem.columns)

def counting(problem, response, finish_reason):
    return float(len(problem.columns["tests"]) == 1)

def slow(problem, response, finish_reason):
    time.sleep(float(response))
    return 1.0

def faulty(problem, response, finish_reason):
    if response == "exit":
        sys.exit(3)
    if response == "die":
        os._exit(3)
    if response == "spin":
        while True:
            pass
    if response == "memory":
        return len([0] * 10**10)
    if response:
        raise KeyError(response)
    return True

def variable(problem, response, finish_reason, key_env="UNSET"):
    return Grade(reward=1.0, reason=os.environ.get(key_env, "") + os.environ.get("P2O_JUDGE_API_KEY", ""))

waiting = set()

async def meeting(problem, response, finish_reason):
    """Come back once as many as `response` says are here at the same time."""
    waiting.add(problem.id)
    while len(waiting) < int(response):
        await asyncio.sleep(0.01)
    return 1.0

async def mixed(problem, response, finish_reason):
    if response == "spin":
        while True:
            pass
    if response == "wait":
        await asyncio.sleep(10**6)
    await asyncio.sleep(0.3)
    return 1.0

@batched
def ranked(problems, responses, finish_reasons, bad="!"):
    if bad in responses:
        raise ValueError("bad")
    if "short" in responses:
        return []
    return [Grade(reward=len(response) / 10, reason=str(len(responses))) for response in responses]

class Broken:
    def __init__(self):
        raise OSError("no such model")
    def __call__(self, problem, response, finish_reason):
        return 1.0
'''

PROBLEM = Problem(id="p1", question="q", answer=None, columns={"minimum": 3, "tests": ["assert 1"]})


@contextmanager
def grader_of(directory: Path, function: str, **settings: Any) -> Iterator[FunctionGrader]:
    path = directory / "my_reward.py"
    path.write_text(FILE)
    wide = {"num_workers": 1, "deadline_s": PATIENCE_S, "timeout_s": PATIENCE_S, **settings}
    grader = FunctionGrader(GradingConfig(function=f"{path}:{function}", **wide))
    try:
        yield grader
    finally:
        grader.close()


def asked(grader: FunctionGrader, *responses: str) -> list[Future[Grade]]:
    return [
        grader.submit(Problem(id=f"p{number}", question="q", answer=None), response, "stop")
        for number, response in enumerate(responses)
    ]


def grades_of(grader: FunctionGrader, *responses: str) -> list[Grade]:
    return [future.result(PATIENCE_S) for future in asked(grader, *responses)]


def rewards_of(grader: FunctionGrader, *responses: str) -> list[float | None]:
    return [grade.reward for grade in grades_of(grader, *responses)]


def test_a_function_sees_the_whole_row_and_its_grade_comes_back_whole(tmp_path: Path) -> None:
    with grader_of(tmp_path, "told") as grader:
        grade = grader.submit(PROBLEM, "r\n\u00e9", "length").result(PATIENCE_S)
    seen = ("p1", "q", None, {"minimum": 3, "tests": ["assert 1"]}, "r\n\u00e9", "length")
    assert grade == Grade(reward=0.5, reason=repr(seen), feedback="Say more.")


def test_what_is_no_reward_is_undecided_and_says_why(tmp_path: Path) -> None:
    with grader_of(tmp_path, "value") as grader:
        assert rewards_of(grader, "0.25", "True", "0", "1") == [0.25, 1.0, 0.0, 1.0]
        assert rewards_of(grader, "Grade(reward=np.float32(0.5))", "Grade(reward=True)") == [0.5, 1.0]
        bad = grades_of(grader, "float('nan')", "1.5", "None", "'1'", "Grade(reward=-1)")
    assert [grade.reward for grade in bad] == [None] * 5
    assert [grade.reason for grade in bad] == [
        "reward nan is not in [0, 1]: scale it, or return None for no verdict",
        "reward 1.5 is not in [0, 1]: scale it, or return None for no verdict",
        "it returned NoneType, and not a float in [0, 1], a bool or a Grade",
        "it returned str, and not a float in [0, 1], a bool or a Grade",
        "ValueError: reward -1 is not in [0, 1]: scale it, or return None for no verdict",
    ]


def test_an_exception_is_undecided_and_its_traceback_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with grader_of(tmp_path, "faulty") as grader:
        grades = grades_of(grader, "a", "", "b", "exit", "c")
        assert grader.counts == {"raised": 4, "graded": 1}
    assert grades[0] == Grade.undecided("KeyError: 'a'") and grades[1] == CORRECT
    assert [grade.reward for grade in grades[2:]] == [None] * 3
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and caplog.records[0].levelno == logging.ERROR
    assert "problem p0" in told[0] and "raise KeyError(response)" in told[0] and "KeyError: 'a'" in told[0]
    assert "it called sys.exit(3)" in told[1]
    assert "3 times KeyError at " in told[2]


def test_the_limits_of_workers_hold_for_functions_and_their_neighbours_are_graded(tmp_path: Path) -> None:
    with grader_of(tmp_path, "faulty", deadline_s=1.0, memory_limit_mib=2048) as grader:
        died, right, spun, also_right, filled = grades_of(grader, "die", "", "spin", "", "memory")
    assert died == Grade.undecided(UNDECIDED["crashed"])
    assert spun == Grade.undecided(UNDECIDED["out_of_time"])
    assert filled == Grade.undecided(UNDECIDED["out_of_memory"])
    assert right == also_right == CORRECT


def test_a_child_of_a_function_gives_no_grade(tmp_path: Path) -> None:
    with grader_of(tmp_path, "forked") as grader:
        assert rewards_of(grader, *"abcd") == [0.25] * 4


def test_a_function_that_is_cancelled_is_undecided_at_once(tmp_path: Path) -> None:
    with grader_of(tmp_path, "cancelled") as grader:
        assert grades_of(grader, "a", "b") == [Grade.undecided("CancelledError: shut down")] * 2


def test_a_function_that_never_returns_meets_the_wall_clock(tmp_path: Path) -> None:
    with grader_of(tmp_path, "slow", timeout_s=5.0) as grader:
        asleep, right = grades_of(grader, "1000000", "0")
    assert asleep == Grade.undecided("it took too long (grading.timeout_s)") and right == CORRECT


def test_asynchronous_calls_run_at_the_same_time_in_one_worker(tmp_path: Path) -> None:
    with grader_of(tmp_path, "meeting") as grader:
        assert rewards_of(grader, *["64"] * 64) == [1.0] * 64
        assert len(grader.worker_pids) == 1


def test_one_bad_asynchronous_call_costs_no_other_its_grade(tmp_path: Path) -> None:
    with grader_of(tmp_path, "mixed", deadline_s=1.0) as grader:
        first, spun, *others = grades_of(grader, "", "spin", "", "", "")
    assert spun == Grade.undecided(UNDECIDED["out_of_time"])
    assert [first, *others] == [CORRECT] * 4


def test_an_asynchronous_call_that_waits_for_ever_is_given_up_alone(tmp_path: Path) -> None:
    with grader_of(tmp_path, "mixed", timeout_s=6.0) as grader:
        waited, *others = grades_of(grader, "wait", "", "")
        assert grader.counts == {"timed_out": 1, "graded": 2}
    assert waited == Grade.undecided(UNDECIDED["timed_out"]) and others == [CORRECT] * 2


def test_a_batched_function_gets_what_waits_and_is_asked_singly_where_it_fails(tmp_path: Path) -> None:
    with grader_of(tmp_path, "ranked") as grader:
        grades = grades_of(grader, *["a" * (number % 11) for number in range(40)])
        assert [grade.reward for grade in grades] == [(number % 11) / 10 for number in range(40)]
        assert max(int(grade.reason) for grade in grades) > 1, "batches"
        assert rewards_of(grader, "a", "!", "aa") == [0.1, None, 0.2]
        (short,) = grades_of(grader, "short")
    assert short == Grade.undecided("ValueError: a batch of 1 answers got 0 rewards: return one for each")


def test_workers_get_the_secrets_that_arguments_name_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "mine-of-own")
    monkeypatch.setenv("OTHER_API_KEY", "of-another")
    monkeypatch.setenv(JUDGE_KEY, "of-the-judge")
    with grader_of(tmp_path, "variable", arguments={"key_env": "MY_API_KEY"}) as grader:
        assert grades_of(grader, "")[0].reason == "mine-of-own"
    with grader_of(tmp_path, "variable") as grader:
        assert grades_of(grader, "")[0].reason == ""


def test_the_key_of_the_judge_reaches_the_judge_alone() -> None:
    judge, own = RewardSpec(function="judge"), RewardSpec(function="python", arguments={"key_env": "MY_API_KEY"})
    assert function_secrets([own]) == ("MY_API_KEY",)
    assert function_secrets([judge]) == (JUDGE_KEY, *PROXY_VARIABLES)


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("missing", {}, "cannot be imported (AttributeError: "),
        ("Broken", {}, "cannot be made (OSError: no such model)"),
        ("told", {"arguments": {"scale": 3}}, "must be callable as (problem, response, finish_reason) "),
    ],
)
def test_a_function_that_cannot_be_used_is_named_at_the_check_and_by_every_grade(
    tmp_path: Path, function: str, settings: Mapping[str, Any], message: str
) -> None:
    with grader_of(tmp_path, function, **settings) as grader:
        for ask in (grader.check, lambda: grader.submit(PROBLEM, "r", "stop").result(PATIENCE_S)):
            with pytest.raises(FunctionRefused) as refused:
                ask()
            assert str(refused.value).startswith(f"grading.function={tmp_path}/my_reward.py:{function} ")
            assert message in str(refused.value)
            assert isinstance(refused.value, ValueError), "told in one line"


def test_check_calls_no_function(tmp_path: Path) -> None:
    with grader_of(tmp_path, "faulty") as grader:
        grader.check()
        assert grader.counts == {"graded": 1}


def test_closing_leaves_what_runs_and_waits_undecided(tmp_path: Path) -> None:
    with grader_of(tmp_path, "mixed") as grader:
        futures = asked(grader, *["wait"] * 100)
        end = time.monotonic() + PATIENCE_S
        while not futures[63].running():
            assert time.monotonic() < end
            time.sleep(0.02)
        grader.close()
        assert [future.result(PATIENCE_S) for future in futures] == [Grade.undecided("the grader was closed")] * 100


def test_a_function_that_changes_the_row_changes_it_for_no_other(tmp_path: Path) -> None:
    path = tmp_path / "my_reward.py"
    path.write_text(FILE)
    functions = {f"{path}:{name}": WeightedFunctionConfig(weight=1.0) for name in ("taking", "counting")}
    grader = make_grader(GradingConfig(functions=functions, num_workers=1, deadline_s=PATIENCE_S))
    try:
        assert [grader.submit(PROBLEM, "r", "stop").result(PATIENCE_S) for _ in range(2)] == [CORRECT] * 2
    finally:
        grader.close()


def test_several_functions_make_a_weighted_mean_each_with_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "my_reward.py"
    path.write_text(FILE)
    functions = {
        "math": WeightedFunctionConfig(weight=3.0),
        f"{path}:ranked": WeightedFunctionConfig(weight=1.0, arguments={"bad": "?"}),
    }
    grader = make_grader(GradingConfig(functions=functions, num_workers=1, deadline_s=PATIENCE_S))
    try:
        problem = Problem(id="p", question="q", answer="7")
        responses = [r"\boxed{7}", r"\boxed7 ", "!", "?"]
        grades = [grader.submit(problem, response, "stop").result(PATIENCE_S) for response in responses]
        assert [grade.reward for grade in grades] == [0.975, 0.95, 0.025, None]
    finally:
        grader.close()


def test_math_alone_needs_no_worker_for_most_answers() -> None:
    grader = make_grader(GradingConfig())
    try:
        assert isinstance(grader, MathGrader)
        problem = Problem(id="p", question="q", answer="7")
        assert grader.submit(problem, r"\boxed{7}", "stop").result(0) == CORRECT
        assert grader.submit(problem, r"\boxed{8}", "stop").result(0) == INCORRECT
        assert grader.worker_pids == []
    finally:
        grader.close()
