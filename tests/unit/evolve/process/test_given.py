"""Templates from a file: which problems they serve."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_p2o.config.tree import Config, EvolutionConfig, TaskConfig
from megatron_p2o.evolve.process.given import GivenTemplates
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY
from megatron_p2o.testing.fakes import fake_config, fake_problem
from megatron_p2o.types import Problem


def config_of(path: Path, *tasks: str) -> Config:
    config = fake_config()
    data = replace(config.data, train={task: TaskConfig(file=f"{task}.jsonl") for task in tasks})
    return replace(config, data=data, evolution=EvolutionConfig(templates_file=str(path)))


def problem_of(number: int, task: str) -> Problem:
    return replace(fake_problem(number), task=task)


def test_a_template_serves_the_problems_of_its_task_alone(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps({"sums": ["Add.", "Carry."], "words": ["Spell."], "": ["Take your time."]}))
    hard = [problem_of(number, ("sums", "words", "other")[number % 3]) for number in range(60)]
    library = GivenTemplates(config_of(path, "sums", "words", "other"), path).evolve(hard, EMPTY_LIBRARY, epoch=1)
    drawn: dict[str, set[str]] = {}
    for problem in hard:
        templates = {template.text for template in library.assigned(problem)} - {""}  # of `assignment.num_plain`
        drawn.setdefault(problem.task, set()).update(templates)
    general = "Take your time."
    assert drawn == {"sums": {"Add.", "Carry.", general}, "words": {"Spell.", general}, "other": {general}}
    assert [template.task for template in library.templates] == ["sums", "sums", "words", ""]


def test_a_task_without_templates_is_asked_plainly(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps({"sums": ["Add."]}))
    hard = [problem_of(1, "sums"), problem_of(2, "words")]
    library = GivenTemplates(config_of(path, "sums", "words"), path).evolve(hard, EMPTY_LIBRARY, epoch=1)
    assert [len(library.assigned(problem)) > 0 for problem in hard] == [True, False]


def test_the_same_text_may_serve_two_tasks_and_not_one_task_twice(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps({"sums": ["Add."], "words": ["Add."]}))
    GivenTemplates(config_of(path, "sums", "words"), path)
    path.write_text(json.dumps({"sums": ["Add.", "Add."]}))
    with pytest.raises(ValueError, match="template 2 cannot be used"):
        GivenTemplates(config_of(path, "sums", "words"), path)


def test_a_single_task_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps({"sums": ["Add."]}))
    library = GivenTemplates(config_of(path, "sums"), path).evolve([fake_problem(1)], EMPTY_LIBRARY, epoch=1)
    assert [template.task for template in library.templates] == [""]
    assert library.assigned(fake_problem(1))[0].text == "Add."
