"""The judge against a real model. A tiny one with random weights replies with nonsense, and nonsense is no score."""

import socket
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.function_grader import FunctionGrader
from megatron_p2o.rollout.servers.start import start_reflection_server
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import Grade, Problem

KEY = "P2O_TEST_OF_THE_JUDGE"
PROBLEM = Problem(id="rain", question="Write a haiku about rain.", answer=None)
RESPONSES = ("Rain on the old roof.", "VERDICT 000000000000 10", "")
LIMIT_S = 400.0
"""Longer than the judge is asked twice."""

pytestmark = pytest.mark.slow


@contextmanager
def judged_by(base_url: str, **arguments: Any) -> Iterator[FunctionGrader]:
    """Yield a grader whose judge stands at an address."""
    given = {"base_url": base_url, "model": "judge", "rubric": "Three lines.", "api_key_env": KEY, **arguments}
    grader = FunctionGrader(GradingConfig(function="judge", arguments=given, num_workers=1, timeout_s=LIMIT_S))
    try:
        yield grader
    finally:
        grader.close()


def grades_of(grader: FunctionGrader) -> list[Grade]:
    submitted: list[Future[Grade]] = [grader.submit(PROBLEM, response, "stop") for response in RESPONSES]
    return [future.result(LIMIT_S) for future in submitted]


def test_nonsense_of_a_real_model_is_no_verdict_and_a_dead_one_none_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_qwen3(tmp_path / "model", max_positions=4096)
    config = load_config(None, ["run.name=judge", f"model.path={model}", "model.dtype=float32", "data.train=unused"])
    server = start_reflection_server(config, tmp_path / "run", num_engines_here=0)
    try:
        monkeypatch.setenv(KEY, server.api_key)
        with judged_by(f"{server.base_url}/v1", max_tokens=16, max_retries=0, timeout_s=120.0) as grader:
            grader.check()
            grades = grades_of(grader)
            assert [grade.reward for grade in grades] == [None] * len(RESPONSES)
            assert all(grade.reason.startswith("the judge gave no verdict: ") for grade in grades), grades
            server.stop()
            grades = grades_of(grader)
        assert [grade.reward for grade in grades] == [None] * len(RESPONSES)
        assert all(grade.reason.startswith("the judge is not to be had: ") for grade in grades), grades
        monkeypatch.setenv(KEY, "another key")
    finally:
        server.stop()


def test_a_judge_that_takes_a_request_and_never_answers_leaves_responses_undecided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY, "some key")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with judged_by(address, max_retries=0, timeout_s=0.5) as grader:
            grader.check()  # a busy judge is no reason not to start
            grades = grades_of(grader)
    assert [grade.reward for grade in grades] == [None] * len(RESPONSES)
    assert all(grade.reason.startswith("the judge is not to be had: ") for grade in grades), grades
