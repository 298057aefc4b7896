"""Evaluation sets are asked through the best template of their own task."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_p2o.algorithm import TrainState
from megatron_p2o.config.sections.data import EvaluationSetConfig, TaskConfig
from megatron_p2o.config.tree import DataConfig
from megatron_p2o.evaluation.protocol import best_templates, template_of_set
from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.metrics.compute import ComputeAccount
from megatron_p2o.run.inputs import check_hard_set, task_notice
from megatron_p2o.run.observe.progress import Progress
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.types import PLAIN, Template


def template(id: int, score: float, task: str = "") -> Template:
    return Template(id=id, text=f"{task} {id}", parent=0, score=score, task=task)


EMPTY = Template(id=0, text="", parent=None, score=0.9)
A1, A2, B3 = template(1, 0.2, "a"), template(2, 0.7, "a"), template(3, 0.4, "b")
SETS = {
    "of_a": EvaluationSetConfig(file="x", task="a"),
    "of_b": EvaluationSetConfig(file="x", task="b"),
    "of_c": EvaluationSetConfig(file="x", task="c"),
    "of_none": EvaluationSetConfig(file="x"),
}


def test_a_set_is_asked_through_the_best_template_of_its_task() -> None:
    data = DataConfig(train={name: TaskConfig(file=name) for name in "abc"}, evaluation=SETS)
    best = best_templates(PublishedLibrary(version=1, templates=(EMPTY, A2, B3, A1)))
    assert best == {"a": A2, "b": B3}
    found = {name: template_of_set(name, best, data) for name in SETS}
    assert found == {"of_a": A2, "of_b": B3, "of_c": PLAIN, "of_none": PLAIN}


def test_all_sets_of_a_run_with_a_single_task_are_asked_through_its_best() -> None:
    data = DataConfig(train={"own": TaskConfig(file="x")}, evaluation={"heldout": EvaluationSetConfig(file="x")})
    best = best_templates(PublishedLibrary(version=1, templates=(template(4, 0.5), template(5, 0.5), template(6, 0.1))))
    assert best == {"": template(4, 0.5)}, "the first of equals"
    assert template_of_set("heldout", best, data) == template(4, 0.5)
    assert best_templates(PublishedLibrary(version=1, templates=(EMPTY,))) == {}


@pytest.mark.parametrize("templates", [{"a": A2, "b": B3}, {"": template(4, 0.5)}, {}])
def test_the_best_templates_outlast_a_resume_and_an_empty_library(templates: dict[str, Template]) -> None:
    compute: Any = SimpleNamespace(account=ComputeAccount)
    progress = Progress(None, compute)
    progress.note_published(templates, {})
    progress.note_published({}, {})
    state: Any = TrainState(library=PublishedLibrary(version=1))
    kept = progress.run_state(state, None, num_ledger_entries=0, num_metrics_lines=0)
    resumed = Progress(kept, compute).best_templates
    assert {task: (each.text, each.task) for task, each in resumed.items()} == {
        task: (each.text, task) for task, each in templates.items()
    }


def test_a_run_is_refused_only_where_no_task_can_ever_evolve(tmp_path: Path) -> None:
    config = fake_config({"hard.min_problems": 20, "evolution.enabled": True, "schedule.problems_per_step": 4})
    check_hard_set(config, {"a": 20, "b": 4})
    assert task_notice(config, {"a": 20, "b": 4}) == [
        "prompts of data.train.b do not evolve: an epoch asks 4 of its problems, fewer than hard.min_problems=20"
    ]
    assert task_notice(config, {"train": 4}) == []
    with pytest.raises(ValueError, match=r"hard\.min_problems=20 must be at most the 19 .* of the largest task"):
        check_hard_set(config, {"a": 19, "b": 19})
    with pytest.raises(ValueError, match=r"at most the 16 problems of data\.train that an epoch asks, or"):
        check_hard_set(config, {"train": 19})
