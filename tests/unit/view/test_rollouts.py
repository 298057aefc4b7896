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
    steps = index.steps_of(problem_id)[-max_steps:]
    return [(line["step"], line["response"]) for line in index.find(problem_id, steps)]


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
    assert [line["reward"] for line in index.find("a", [1])] == [1.0, None]


def test_a_damaged_line_costs_itself_also_within_its_group(folder: Path) -> None:
    path = write(folder, 1, *(rollout("a", text) for text in ("first", "second", "third")), rollout("b", "x"))
    first, second, third, other = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:40] + b"\n" + third + b'{"problem_id": "a", ' + b"[" * 50_000 + b"\n" + other)
    index = RolloutIndex(folder)
    assert found(index, "a") == [(1, "first"), (1, "third")]
    assert found(index, "b") == [(1, "x")]


def test_lines_of_another_file_in_the_place_of_the_indexed_one_are_not_taken(folder: Path) -> None:
    path = write(folder, 1, rollout("a", "one"), rollout("a", "two"))
    index = RolloutIndex(folder)
    index.catch_up()
    path.write_bytes(path.read_bytes().replace(b'"problem_id": "a"', b'"problem_id": "b"'))
    assert index.find("a", [1]) == []


@pytest.mark.parametrize("problem_id", ['quote " and \\', "é ☃", "half \ud83d", ""])
def test_a_problem_is_found_by_whatever_its_id_holds(folder: Path, problem_id: str) -> None:
    write(folder, 1, rollout("a", "x"), rollout(problem_id, "1"), rollout(problem_id, "2"), rollout("b", "y"))
    assert found(RolloutIndex(folder), problem_id) == [(1, "1"), (1, "2")]


def test_a_run_without_rollouts_has_none(tmp_path: Path) -> None:
    assert found(RolloutIndex(tmp_path / "rollouts"), "a") == []
