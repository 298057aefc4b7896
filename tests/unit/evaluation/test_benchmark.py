"""What an interrupted evaluation compares before it goes on with the responses it has."""

from typing import Any

from megatron_p2o.config.sections.data import EvaluationSetConfig, TaskConfig
from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.evaluation.benchmark import Subject, response_settings
from megatron_p2o.evaluation.protocol import Protocol
from megatron_p2o.testing.fakes import FakeRenderer, fake_config, fake_problem

SUBJECT = Subject(path="model", weights_sha256="0" * 64, step=None)


def settings_with(**changes: Any) -> dict[str, Any]:
    tasks = {"sums": TaskConfig(file="a"), "code": TaskConfig(file="b", grading=GradingConfig(function="python"))}
    sets = {"plain": EvaluationSetConfig(file="c"), "programs": EvaluationSetConfig(file="d", task="code")}
    config = fake_config({"data.train": tasks, "data.evaluation": sets, **changes})
    protocol = Protocol(num_samples=1, temperature=0.0)
    return {
        name: response_settings(name, [fake_problem(1), fake_problem(2)], protocol, SUBJECT, FakeRenderer(), config)
        for name in sets
    }


def differing(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_answers_are_kept_only_under_the_reward_and_the_threshold_they_were_graded_with() -> None:
    before = settings_with()
    assert before["programs"]["grading.function"] == "python"
    after = settings_with(**{"grading.function": "exact", "grading.arguments": {"extract": "last_line"}})
    assert differing(before["plain"], after["plain"]) == {"grading.function", "grading.arguments"}
    assert differing(before["programs"], after["programs"]) == set()
    after = settings_with(**{"hard.solved_at": 0.5})
    assert differing(before["plain"], after["plain"]) == {"hard.solved_at"}


def test_the_number_of_graders_decides_no_grade() -> None:
    assert settings_with() == settings_with(**{"grading.num_workers": 7})
