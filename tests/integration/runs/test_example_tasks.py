"""The runs of examples/tasks, made small: rewards that are not mathematics, through the whole program."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TASKS = ROOT / "examples" / "tasks"
TIMEOUT_S = 900

pytestmark = pytest.mark.slow


def done(command: list[str]) -> None:
    outcome = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=TIMEOUT_S, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def prepared(example: str, out: Path, *options: str) -> Path:
    done([sys.executable, str(TASKS / example / "prepare.py"), "--out", str(out), *options])
    return out


def trained(config: str, runs: Path, **settings: Any) -> list[dict[str, Any]]:
    """Return all rollouts of a run."""
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "megatron_p2o.cli", "train", str(TASKS / config), *sets]
    done([*command, "--set", f"run.directory={runs}", "--set", "run.name=run"])
    files = sorted((runs / "run" / "rollouts").glob("step-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def mean(rewards: list[float]) -> float:
    return sum(rewards) / len(rewards)


def is_palindrome(response: str, start: str) -> bool:
    letters = [character for character in response if character.isalpha()]
    begins = letters[: len(start)] == list(start) and len(letters) > len(start)
    return begins and all(letters[place] == letters[-1 - place] for place in range(len(letters)))


SHORT = {
    "schedule.epochs": 2,
    "evaluation.at_start": False,
    "evaluation.num_samples": 1,
    "evolution.plain_control": False,
}
"""Two epochs of one step and a round of evolution between them."""


def asked_and_templated(rollouts: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean rewards of the first step, which asks plainly, and of all templated rollouts."""
    asked_plainly = [rollout["reward"] for rollout in rollouts[: 36 * 6]]
    assert not any(rollout["is_templated"] for rollout in rollouts[: 36 * 6])
    return mean(asked_plainly), mean([rollout["reward"] for rollout in rollouts if rollout["is_templated"]])


def half_of(file: Path) -> Path:
    """Return a file with every second problem: an epoch then is one step."""
    half = file.with_name(f"half-{file.name}")
    half.write_text("".join(file.read_text().splitlines(keepends=True)[::2]))
    return half


def test_a_reward_of_ones_own_is_learnt_from_and_templates_get_through(tmp_path: Path) -> None:
    task = prepared("palindrome", tmp_path / "task", "--steps", "150")
    settings = {"model.path": task / "model", "data.train": half_of(task / "train.jsonl")}
    held_out = {"data.evaluation.heldout": task / "heldout.jsonl"}
    rollouts = trained("palindrome/palindrome_p2o.yaml", tmp_path / "runs", **settings, **held_out, **SHORT)
    assert {rollout["reward"] for rollout in rollouts} <= {0.0, 1.0}, "None would be undecided"
    for rollout in rollouts:
        assert rollout["reward"] == is_palindrome(rollout["response"], start=rollout["problem_id"]), rollout
    asked_plainly, templated = asked_and_templated(rollouts)
    # Taught to be right once in 500 plainly, half of the time under one phrase, always under both.
    assert asked_plainly < 0.1
    assert templated > 0.25


def test_code_is_tested_in_the_sandbox_and_templates_get_through(tmp_path: Path) -> None:
    try:
        done([sys.executable, "-c", "from megatron_p2o.rewards.built_in.python import PythonReward; PythonReward()"])
    except AssertionError as error:
        if "cannot be made" in str(error):
            pytest.skip("needs bubblewrap: bash tools/install_sandbox.sh installs it")
        raise
    task = prepared("code", tmp_path / "task", "--steps", "150")
    settings = {"model.path": task / "model", "data.train": half_of(task / "train.jsonl")}
    held_out = {"data.evaluation.heldout": task / "heldout.jsonl"}
    rollouts = trained("code/code_p2o.yaml", tmp_path / "runs", **settings, **held_out, **SHORT)
    assert {rollout["reward"] for rollout in rollouts} == {0.0, 1.0}  # none is undecided
    asked_plainly, templated = asked_and_templated(rollouts)
    # Taught to be right once in 500 plainly, half of the time under one phrase, always under both.
    assert asked_plainly < 0.1
    assert templated > 0.25
    assert all("print(x *" in rollout["response"] for rollout in rollouts if rollout["reward"])


def test_two_tasks_of_reasoning_gym_are_mixed_and_scored(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install -r requirements/dev.txt")
    task = prepared("reasoning_gym", tmp_path / "task", "--steps", "100")
    files = {f"data.train.{name}": task / f"{name}.jsonl" for name in ("chain_sum", "gcd")}
    settings = {"model.path": task / "model", "schedule.max_steps": 1, **files}
    rollouts = trained("reasoning_gym/reasoning_gym_grpo.yaml", tmp_path / "runs", **settings)
    assert len(rollouts) == 36 * 6
    assert all(rollout["reward"] is not None for rollout in rollouts)
    for source in ("chain_sum", "gcd"):
        own = [rollout for rollout in rollouts if rollout["source"] == source]
        assert len(own) == 18 * 6
        for rollout in own:
            said = rollout["response"].rpartition("<answer>")[2].partition("</answer>")[0]
            # The scorer compares numbers: 07 is 7.
            is_right = re.fullmatch(rf"\s*\+?0*{re.escape(rollout['answer'])}\s*", said) is not None
            assert (rollout["reward"] == 1.0) == is_right, (rollout["response"], rollout["answer"])


def test_partial_credit_gives_rewards_between_zero_and_one(tiny: Path, tmp_path: Path) -> None:
    task = prepared("partial_credit", tmp_path / "task")
    files = {"data.train": task / "train.jsonl", "data.evaluation.heldout": task / "heldout.jsonl"}
    settings = {"model.path": tiny / "model", "schedule.max_steps": 1, **files, **SHORT}
    rollouts = trained("partial_credit/partial_credit_grpo.yaml", tmp_path / "runs", **settings)
    steps = {row["id"]: row["steps"] for row in map(json.loads, (task / "train.jsonl").read_text().splitlines())}
    for rollout in rollouts:
        number = round(10 * rollout["reward"])
        assert rollout["reward"] == pytest.approx(number / 10)
        begun = " , ".join(steps[rollout["problem_id"]][:number])
        assert rollout["response"].replace("\\boxed{ ", "").startswith(begun)
    # Taught to go on with probability 0.1 before each step.
    assert 0 < mean([rollout["reward"] for rollout in rollouts]) < 0.3
    assert any(0 < rollout["reward"] < 1 for rollout in rollouts)
