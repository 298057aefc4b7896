"""Problems of several tasks are graded each by its own reward."""

from concurrent.futures import Future
from typing import Any

from megatron_p2o.config.tree import EvaluationSetConfig, GradingConfig, TaskConfig
from megatron_p2o.rewards.tasks import TaskGrader, rewards_line
from megatron_p2o.testing.fakes import fake_config, fake_problem
from megatron_p2o.types import CORRECT, FinishReason, Grade, Problem

OWN, ALL = GradingConfig(num_workers=7), GradingConfig(num_workers=3)

TASKS = {
    "math": TaskConfig(file="m"),
    "code": TaskConfig(file="c", grading=OWN),
    "more": TaskConfig(file="d", grading=OWN),
}


class RecordingGrader:
    """Takes every answer for right, and remembers whose it was."""

    def __init__(self, grading: GradingConfig) -> None:
        self.grading = grading
        self.asked: list[str] = []
        self.is_closed = False
        self.worker_pids = [grading.num_workers]

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> "Future[Grade]":
        self.asked.append(problem.task)
        future: Future[Grade] = Future()
        future.set_result(CORRECT)
        return future

    def check(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


def graded(settings: dict[str, Any], *tasks: str) -> tuple[TaskGrader, list[RecordingGrader]]:
    made: list[RecordingGrader] = []

    def make(grading: GradingConfig) -> Any:
        made.append(RecordingGrader(grading))
        return made[-1]

    grader = TaskGrader(fake_config({"grading": ALL, **settings}), make)
    for number, task in enumerate(tasks):
        problem = Problem(id=str(number), question="q", answer="a", task=task)
        assert grader.submit(problem, "text", "stop").result(0) == CORRECT
    return grader, made


def test_each_task_has_its_reward_and_tasks_graded_alike_share_workers() -> None:
    grader, made = graded({"data.train": TASKS}, "math", "code", "more", "code")
    assert [(each.grading, each.asked) for each in made] == [(ALL, ["math"]), (OWN, ["code", "more", "code"])]
    assert grader.worker_pids == [3, 7]
    grader.close()
    assert all(each.is_closed for each in made)


def test_a_run_of_one_task_has_one_grader() -> None:
    _, made = graded({}, "train")
    assert [each.grading for each in made] == [ALL]
    _, made = graded({"data.train": {"only": TaskConfig(file="m", grading=OWN)}}, "only")
    assert [each.grading for each in made] == [OWN], "nothing starts that is not asked"
    assert fake_problem(0).task == ""


def test_an_evaluation_set_of_no_task_is_graded_as_the_settings_say() -> None:
    sets = {"held": EvaluationSetConfig(file="h")}
    tasks = {name: TASKS[name] for name in ("code", "more")}
    _, made = graded({"data.train": tasks, "data.evaluation": sets}, "", "code")
    assert [(each.grading, each.asked) for each in made] == [(OWN, ["code"]), (ALL, [""])]
    config = fake_config({"data.train": tasks, "grading": ALL})
    assert (config.grading_of(""), config.grading_of("code")) == (ALL, OWN)


def test_two_tasks_with_two_built_in_rewards() -> None:
    exact = GradingConfig(function="exact", arguments={"extract": "response"}, num_workers=1)
    tasks = {"math": TaskConfig(file="m"), "words": TaskConfig(file="w", grading=exact)}
    config = fake_config({"data.train": tasks, "grading": GradingConfig(num_workers=1)})
    grader = TaskGrader(config)
    try:
        grader.check()
        for task, text, is_right in (("math", r"\boxed{0.5}", True), ("words", "1/2", True), ("words", "0.5", False)):
            problem = Problem(id=task, question="q", answer="1/2", task=task)
            assert (grader.submit(problem, text, "stop").result(120).reward == 1.0) == is_right, (task, text)
    finally:
        grader.close()
    assert rewards_line(config) == "math: math, words: exact"
