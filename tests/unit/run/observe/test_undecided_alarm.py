"""A step or an evaluation with too many responses that the grader could not decide is warned of."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from megatron_p2o.algorithm import StepResult, TrainState
from megatron_p2o.evaluation.outcome import GradedResponse, evaluation_metrics, evaluation_of
from megatron_p2o.metrics.step import step_metrics
from megatron_p2o.metrics.values import numbers_of
from megatron_p2o.run.observe.alarms import warn_of_undecided
from megatron_p2o.run.observe.observer import RunObserver
from megatron_p2o.testing.fakes import (
    UNDECIDED,
    FakeLibrary,
    fake_config,
    fake_problem,
    fake_rollout,
)
from megatron_p2o.types import CORRECT, INCORRECT, Group

PROBLEM = fake_problem(1)


def step_of(num_decided: int, num_undecided: int, num_aborted: int = 0) -> list[Group]:
    decided = fake_rollout(PROBLEM, reward=1)
    undecided, aborted = replace(decided, grade=UNDECIDED), fake_rollout(PROBLEM, reward=0, finish_reason="abort")
    rollouts = (*[decided] * num_decided, *[undecided] * num_undecided, *[aborted] * num_aborted)
    return [Group(problem=PROBLEM, rollouts=rollouts, advantages=(0.0,) * len(rollouts))]


@pytest.mark.parametrize(
    ("counts", "warns"),
    [((100, 0), False), ((99, 1), False), ((98, 2), True), ((98, 2, 900), True), ((9, 0, 91), False)],
)
def test_a_step_with_more_undecided_answers_than_the_alarm_is_warned_of_once(
    counts: tuple[int, ...], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_undecided(7, step_metrics(step_of(*counts), [], {}), 0.01)
    assert len(caplog.records) == warns
    if warns:
        assert "step 7: rollout: the grader could not decide 2 of 100 responses, more than alarms.undecided=0.01" in (
            caplog.text
        )


def test_an_evaluation_with_more_undecided_answers_than_the_alarm_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grades = [CORRECT, UNDECIDED, UNDECIDED, INCORRECT]
    answers = [
        GradedResponse(problem_id=PROBLEM.id, sample=number, grade=grade, finish_reason=reason, num_tokens=1)
        for number, (grade, reason) in enumerate(zip(grades, ("stop", "stop", "abort", "stop"), strict=True))
    ]
    outcome = evaluation_of(answers, [PROBLEM], 4, 0.6)
    with caplog.at_level(logging.WARNING):
        warn_of_undecided(3, evaluation_metrics({"aime": outcome, "templated_aime": outcome}), 0.3)
        warn_of_undecided(3, evaluation_metrics({"aime": outcome}), 0.4)
    assert [record.getMessage().partition(" could")[0] for record in caplog.records] == [
        "step 3: eval/aime: the grader",
        "step 3: eval/templated_aime: the grader",
    ]
    assert "1 of 3 responses" in caplog.text, "what the engines gave up was never graded"


def test_an_evaluation_without_any_verdict_is_warned_of_and_is_no_zero(
    make_observer: Callable[..., RunObserver], written: list[tuple[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    def evaluate_after_a_step(answer: str) -> None:
        settings = {"schedule.save_every_steps": 0, "evaluation.every_steps": 1, "evaluation.best_set": "aime"}
        sets = {"aime": [fake_problem(number) for number in range(5)]}
        observer = make_observer(fake_config(settings), answer=answer, evaluation_sets=sets)
        result = StepResult(groups=step_of(2, 0), hard=[], reports=[], num_batches=1)
        observer.on_step(TrainState(library=FakeLibrary(), step=1), result)

    with caplog.at_level(logging.WARNING):
        evaluate_after_a_step("?")
    assert "evaluation of aime at step 1: none of 80 responses has a verdict: it has no result" in caplog.text
    assert not any(key.startswith("eval/") for name, metrics in written if name == "metrics" for key in metrics)
    evaluate_after_a_step("no")
    assert numbers_of([metrics for name, metrics in written if name == "metrics"][-1])["eval/aime/avg"] == 0.0
