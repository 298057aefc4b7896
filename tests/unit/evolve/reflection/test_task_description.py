"""What reflection is told about the task."""

from pathlib import Path

import pytest

from megatron_p2o.config.sections.data import TaskConfig
from megatron_p2o.config.sections.rollout import GradingConfig, WeightedFunctionConfig
from megatron_p2o.config.shape import ONLY_TASK
from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.process.by_task import descriptions_of
from megatron_p2o.evolve.reflection.task_description import task_description_of
from megatron_p2o.testing.fakes import fake_config

TASK = "evolution.reflection.task_description"


def described(config: Config, task: str = ONLY_TASK) -> str | None:
    return task_description_of(config, task)


def test_boxed_answers_need_no_task_and_other_rewards_are_not_told_of_boxes(tmp_path: Path) -> None:
    assert described(fake_config()) is None
    assert described(fake_config({"grading.function": "exact"})) == ""
    math = {"math": WeightedFunctionConfig(weight=1.0)}
    assert described(fake_config({"grading.functions": math})) is None, "the mean of one reward is that reward"
    assert described(fake_config({"grading.functions": {**math, "exact": WeightedFunctionConfig(weight=1.0)}})) == ""
    assert described(fake_config({TASK: "Write a palindrome."})) == "Write a palindrome."
    tasks = {"a": TaskConfig(file="a.jsonl"), "b": TaskConfig(file="b.jsonl", grading=GradingConfig(function="exact"))}
    both = fake_config({"data.train": tasks})
    assert (described(both, "a"), described(both, "b")) == (None, ""), "each has its own"
    path = tmp_path / "task.md"
    path.write_text("Write one.")
    assert described(fake_config({TASK: str(path)})) == "Write one."
    with pytest.raises(ValueError, match=r"evolution.reflection.task_description=.*none.txt cannot be read"):
        described(fake_config({TASK: str(tmp_path / "none.txt")}))


def test_a_task_may_have_a_description_of_its_own(tmp_path: Path) -> None:
    own = TaskConfig(file="a.jsonl", description=str(tmp_path / "own.txt"))
    config = fake_config({"data.train": {"a": own, "b": TaskConfig(file="b.jsonl")}, TASK: "Of all."})
    with pytest.raises(ValueError, match=r"data\.train\.a\.description=.*own.txt cannot be read"):
        described(config, "a")
    (tmp_path / "own.txt").write_text("Of a.")
    assert descriptions_of(config) == {"a": "Of a.", "b": "Of all."}
    assert descriptions_of(fake_config({TASK: "Of all."})) == {"": "Of all."}, "a single task has no name"
