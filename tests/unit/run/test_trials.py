"""Evaluations of templates on rank 0: sampled, graded, and taken back when nobody waits for them any more."""

import logging
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest

from megatron_p2o.evolve.trial import Rejection, Trial, TrialFailed
from megatron_p2o.run.trials import TrialSubmitter
from megatron_p2o.testing.fakes import UNDECIDED, FakeRenderer, fake_problem
from megatron_p2o.types import (
    CORRECT,
    Completion,
    FinishReason,
    Grade,
    Problem,
    Prompt,
    SamplingParams,
    Template,
    TokenIds,
)

PROBLEM = fake_problem(1)
MAX_TOKENS = 40
"""A character is a token of the fake renderer, the blank line below a template two."""

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4)


class Parts:
    """An engine and a grader that answer when they are told to."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.sampled: Future[Completion] = Future()
        self.graded: Future[Grade] = Future()

    def sample(self, prompt: Prompt, sampling: SamplingParams) -> Future[Completion]:
        self.prompts.append(prompt)
        return self.sampled

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> Future[Grade]:
        return self.graded

    def trial(self, text: str = "Be brave.") -> Future[Trial | Rejection]:
        return TrialSubmitter(self.sample, FakeRenderer(), self, MAX_TOKENS)(text, PROBLEM, SAMPLING)

    def finish_sampling(self, reason: FinishReason = "stop") -> None:
        self.sampled.set_result(
            Completion(
                prompt=self.prompts[0],
                token_ids=np.arange(3, dtype=np.int32),
                logprobs=np.zeros(3, np.float32),
                finish_reason=reason,
                weight_versions=(4, 5),
            )
        )


def test_a_trial_is_the_graded_rollout() -> None:
    parts = Parts()
    outcome = parts.trial()
    parts.finish_sampling()
    assert not outcome.done()
    parts.graded.set_result(CORRECT)
    trial = outcome.result(0)
    assert isinstance(trial, Trial)
    assert (trial.reward, trial.num_tokens, trial.weight_version) == (1.0, 3, 5)


def test_a_trial_that_is_cancelled_takes_its_request_from_the_engine() -> None:
    parts = Parts()
    outcome = parts.trial()
    assert outcome.cancel()
    assert parts.sampled.cancelled(), "the broker aborts a request whose future is cancelled"


@pytest.mark.parametrize(
    "arrival",
    [
        lambda parts: parts.graded.set_result(CORRECT),
        lambda parts: parts.graded.set_result(UNDECIDED),
    ],
    ids=["verdict", "no verdict"],
)
def test_a_verdict_on_a_cancelled_trial_is_dropped_without_a_word(
    arrival: Callable[[Parts], None], caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts()
    outcome = parts.trial()
    parts.finish_sampling()
    assert outcome.cancel()
    with caplog.at_level(logging.DEBUG):
        arrival(parts)
    assert caplog.records == [], "concurrent.futures logs what a callback raises"
    assert outcome.cancelled()


def test_a_request_that_the_engine_drops_is_a_trial_that_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts()
    outcome = parts.trial()
    assert parts.sampled.cancel()
    assert outcome.cancelled() and caplog.records == []


def test_an_engine_that_fails_or_gives_up_is_no_score() -> None:
    parts = Parts()
    outcome = parts.trial()
    parts.sampled.set_exception(RuntimeError("no engine"))
    with pytest.raises(TrialFailed, match="no engine"):
        outcome.result(0)
    parts = Parts()
    outcome = parts.trial()
    parts.finish_sampling("abort")
    with pytest.raises(TrialFailed, match="gave the rollout up"):
        outcome.result(0)


@pytest.mark.parametrize("num_chars", [MAX_TOKENS - 1, MAX_TOKENS, 17 * MAX_TOKENS, 10_000_000])
def test_a_template_of_too_many_tokens_is_rejected_by_name_and_never_sampled(num_chars: int) -> None:
    parts = Parts()
    outcome = parts.trial("z" * num_chars)
    assert outcome.result(0) == Rejection(reason="longer than evolution.max_template_tokens")
    assert parts.prompts == []


def test_a_template_of_just_the_tokens_allowed_is_sampled() -> None:
    parts = Parts()
    parts.trial("z" * (MAX_TOKENS - 2))
    (prompt,) = parts.prompts
    assert len(prompt.sampling_ids) - len(prompt.training_ids) == MAX_TOKENS


def test_a_template_that_leaves_the_question_no_room_is_rejected() -> None:
    parts = Parts()
    renderer = FakeRenderer(max_prompt_tokens=len(PROBLEM.question) + 5)
    outcome = TrialSubmitter(parts.sample, renderer, parts, MAX_TOKENS)("Be brave.", PROBLEM, SAMPLING)
    assert outcome.result(0) == Rejection(reason="its prompt is too long")
    assert parts.prompts == []


def test_a_template_that_the_tokenizer_does_not_take_is_rejected() -> None:
    class Picky(FakeRenderer):
        def render(self, problem: Problem, template: Template) -> Prompt:
            raise ValueError("chat markup cannot be taken for text by this model's tokenizer")

    parts = Parts()
    outcome = TrialSubmitter(parts.sample, Picky(), parts, MAX_TOKENS)("<|x|>", PROBLEM, SAMPLING)
    assert outcome.result(0) == Rejection(reason="its prompt cannot be rendered")


class Scorer:
    """Engines that read a response when they are told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Prompt, list[int], Future[Completion]]] = []

    def __call__(self, prompt: Prompt, response: TokenIds) -> Future[Completion]:
        future: Future[Completion] = Future()
        self.asked.append((prompt, list(response), future))
        return future

    def answer(self, logprobs: list[float], reason: FinishReason = "length") -> None:
        prompt, response, future = self.asked[-1]
        future.set_result(
            Completion(
                prompt=prompt,
                token_ids=np.array(response, dtype=np.int32),
                logprobs=np.array(logprobs, dtype=np.float32),
                finish_reason=reason,
                weight_versions=(5,),
            )
        )


def solved_trial(scorer: Scorer, text: str = "Be brave.", grade: Grade = CORRECT) -> Future[Trial | Rejection]:
    parts = Parts()
    submit = TrialSubmitter(parts.sample, FakeRenderer(), parts, MAX_TOKENS, score=scorer)
    outcome = submit(text, PROBLEM, SAMPLING)
    parts.finish_sampling()
    parts.graded.set_result(grade)
    return outcome


def reliance(outcome: Future[Trial | Rejection]) -> float | None:
    trial = outcome.result(0)
    assert isinstance(trial, Trial) and trial.reward == 1.0
    return trial.reliance


def test_the_reliance_of_a_solution_is_what_it_loses_without_its_template() -> None:
    scorer = Scorer()
    outcome = solved_trial(scorer)
    scorer.answer([-0.25, -0.5, -1.0])
    assert not outcome.done()
    scorer.answer([-0.5, -4.0, -1.0])
    assert reliance(outcome) == (-0.25 - 3.5 - 0.0) / 3
    (templated, response, _), (plain, again, _) = scorer.asked
    assert response == again == [0, 1, 2]
    assert list(plain.sampling_ids) == list(templated.training_ids) != list(templated.sampling_ids)


@pytest.mark.parametrize("num_answered", [0, 1])
@pytest.mark.parametrize("how", ["refused", "lost", "dropped"])
def test_a_trial_whose_response_the_engines_do_not_read_stays_a_score(num_answered: int, how: str) -> None:
    scorer = Scorer()
    outcome = solved_trial(scorer)
    if num_answered:
        scorer.answer([-1.0, -1.0, -1.0])
    if how == "refused":
        scorer.answer([], "abort")
    elif how == "lost":
        scorer.asked[-1][2].set_exception(RuntimeError("no engine"))
    else:
        scorer.asked[-1][2].cancel()
    assert reliance(outcome) is None and len(scorer.asked) == 1 + num_answered


def test_only_solutions_through_a_template_are_read_again() -> None:
    scorer = Scorer()
    failed = solved_trial(scorer, grade=Grade(reward=0.0)).result(0)
    assert isinstance(failed, Trial) and failed.reliance is None
    assert reliance(solved_trial(scorer, text="")) is None
    assert scorer.asked == []


def test_a_trial_that_is_cancelled_while_its_response_is_read_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer()
    outcome = solved_trial(scorer)
    assert outcome.cancel()
    scorer.answer([-1.0, -1.0, -1.0])
    scorer.answer([-1.0, -1.0, -1.0])
    assert caplog.records == [] and outcome.cancelled()
