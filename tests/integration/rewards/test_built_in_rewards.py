"""Built-in rewards in the workers of a run: what is undecided there, and that nothing is left behind."""

from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.function_grader import FunctionGrader
from megatron_p2o.rewards.sandbox.process import Limits, SandboxFailed
from megatron_p2o.rewards.sandbox.verdict import Sandbox, check_sandbox
from megatron_p2o.types import Grade, Problem


def graded(function: str, columns: dict[str, Any], *responses: str, **arguments: Any) -> list[Grade]:
    grader = FunctionGrader(GradingConfig(function=function, arguments=arguments, num_workers=2))
    problem = Problem(id="p", question="q", answer=None, columns=columns)
    try:
        grader.check()
        return [future.result() for future in [grader.submit(problem, each, "stop") for each in responses]]
    finally:
        grader.close()


def test_a_pattern_that_backtracks_without_end_leaves_its_answer_undecided_and_says_so() -> None:
    endless, right, wrong = graded("regex", {}, "a" * 60 + "!", "aaa", "b", pattern="(a+)+", is_whole=True)
    assert endless.reward is None
    assert "processor time" in endless.reason
    assert (right.reward, wrong.reward) == (1.0, 0.0)


def sandbox_here() -> str:
    limits = Limits(processor_s=2, memory_mib=256, scratch_mib=4, output_bytes=1 << 16)
    try:
        check_sandbox(Sandbox(limits=limits, has_namespaces=True))
    except SandboxFailed:
        return "limits"
    return "namespaces"


CODES = {
    "right": "def add(a, b):\n    return a + b",
    "wrong": "def add(a, b):\n    return 0",
    "endless": "while True: pass",
    "loud": "while True: print('x' * 10000)",
    "greedy": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "dead": "import os\nos._exit(0)",
}


def test_answers_that_exhaust_everything_are_wrong_and_cost_no_other_its_grade(tmp_path: Path) -> None:
    columns = {"entry_point": "add", "tests": [{"args": [2, 3], "expected": 5}]}
    small = {"sandbox": sandbox_here(), "processor_s": 1, "memory_mib": 128, "scratch_mib": 1}
    codes = [*CODES.values(), *CODES.values()]
    grades = graded("python", columns, *(f"```python\n{code}\n```" for code in codes), **small)
    rewards = dict(zip(CODES, [grade.reward for grade in grades[: len(CODES)]], strict=True))
    assert rewards == {name: float(name == "right") for name in CODES}
    assert grades[len(CODES) :] == grades[: len(CODES)]
    names = [process.name() for process in psutil.Process().children(recursive=True)]
    assert "bwrap" not in names


def test_a_sandbox_that_cannot_be_made_is_told_before_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="bubblewrap is not installed"):
        graded("python", {}, "x")
