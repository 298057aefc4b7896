"""The index of rollouts: finds the lines of a problem, and follows what a resumed run does to the folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.view.rollouts import ProblemFacts, RolloutIndex


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rollouts").mkdir()
    return tmp_path / "rollouts"


def write(folder: Path, step: int, *rollouts: dict[str, Any]) -> Path:
    path = folder / f"step-{step:06d}.jsonl"
    partial = folder / ".partial"
    partial.write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts), encoding="utf-8")
    partial.replace(path)
    return path


def rollout(problem_id: str, response: str) -> dict[str, Any]:
    return {
        "problem_id": problem_id,
        "question": "2 + 2?",
        "level": "easy",
        "source": "sums",
        "response": response,
        "reward": 1.0,
    }


def found(index: RolloutIndex, problem_id: str, max_steps: int = 10) -> list[tuple[int, str]]:
    index.catch_up()
    return [(line["step"], line["response"]) for line in index.find(problem_id, max_steps)]


def test_the_rollouts_of_a_problem_are_found_in_order(folder: Path) -> None:
    write(folder, 2, rollout("a", "later ☃"), rollout("b", "x"), rollout("a", "apart"))
    write(folder, 1, rollout("b", "y"), rollout("a", "first"))
    index = RolloutIndex(folder)
    assert found(index, "a") == [(1, "first"), (2, "later ☃"), (2, "apart")]
    assert found(index, "a", max_steps=1) == [(2, "later ☃"), (2, "apart")]
    assert found(index, "unknown") == []
    assert index.facts["b"] == ProblemFacts(question="2 + 2?", level="easy", source="sums")


def test_a_step_that_is_done_again_replaces_the_old_one(folder: Path) -> None:
    path = write(folder, 1, rollout("a", "old"))
    index = RolloutIndex(folder)
    assert found(index, "a") == [(1, "old")]
    path.unlink()
    assert found(index, "a") == []
    write(folder, 1, rollout("a", "new"), rollout("b", "also"))
    assert found(index, "a") == [(1, "new")]


def test_a_damaged_line_is_passed_over_and_no_number_is_null(folder: Path) -> None:
    path = write(folder, 1, rollout("a", "good"), {**rollout("a", "nan"), "reward": float("nan")})
    path.write_bytes(b"{broken\n" + path.read_bytes())
    index = RolloutIndex(folder)
    index.catch_up()
    assert [line["reward"] for line in index.find("a", 1)] == [1.0, None]


def test_a_run_without_rollouts_has_none(tmp_path: Path) -> None:
    assert found(RolloutIndex(tmp_path / "rollouts"), "a") == []
