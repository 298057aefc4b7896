"""What reflection is told about the task."""

from pathlib import Path

import pytest

from megatron_p2o.config.sections.data import TaskConfig
from megatron_p2o.config.sections.rollout import GradingConfig, WeightedFunctionConfig
from megatron_p2o.evolve.reflection.task_description import task_description_of
from megatron_p2o.testing.fakes import fake_config

TASK = "evolution.reflection.task_description"


def test_boxed_answers_need_no_task_and_other_rewards_are_not_told_of_boxes(tmp_path: Path) -> None:
    assert task_description_of(fake_config()) is None
    assert task_description_of(fake_config({"grading.function": "exact"})) == ""
    math = {"math": WeightedFunctionConfig(weight=1.0)}
    assert task_description_of(fake_config({"grading.functions": math})) is None, (
        "the mean of one reward is that reward"
    )
    assert (
        task_description_of(fake_config({"grading.functions": {**math, "exact": WeightedFunctionConfig(weight=1.0)}}))
        == ""
    )
    assert task_description_of(fake_config({TASK: "Write a palindrome."})) == "Write a palindrome."
    tasks = {"a": TaskConfig(file="a.jsonl"), "b": TaskConfig(file="b.jsonl", grading=GradingConfig(function="exact"))}
    assert task_description_of(fake_config({"data.train": tasks})) == ""
    path = tmp_path / "task.md"
    path.write_text("Write one.")
    assert task_description_of(fake_config({TASK: str(path)})) == "Write one."
    with pytest.raises(ValueError, match=r"evolution.reflection.task_description=.*none.txt cannot be read"):
        task_description_of(fake_config({TASK: str(tmp_path / "none.txt")}))
