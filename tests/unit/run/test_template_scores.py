"""What rollouts say about templates: an answer without a verdict says nothing."""

from concurrent.futures import Future
from dataclasses import replace

import pytest

from megatron_p2o.evolve.trial import TrialFailed
from megatron_p2o.rl.sampling import SamplingParts, graded_rollouts
from megatron_p2o.run.trials import TrialSubmitter, free_scores
from megatron_p2o.testing.fakes import (
    UNDECIDED,
    FakeEngines,
    FakeGrader,
    FakeRenderer,
    FakeReply,
    fake_problem,
    fake_rollout,
)
from megatron_p2o.types import Completion, FinishReason, Grade, Group, Problem, Prompt, SamplingParams, Template

HINT = Template(id=1, text="Go on.", parent=0)
PROBLEM = fake_problem(1)
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=4)


class BrokenGrader:
    """A grader whose workers cannot be started."""

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> Future[Grade]:
        verdict: Future[Grade] = Future()
        verdict.set_exception(RuntimeError("no worker starts"))
        return verdict


def sampled(prompt: Prompt, sampling: SamplingParams) -> Future[Completion]:
    engines = FakeEngines(reply=lambda prompt, index: FakeReply(text="?"))
    completion: Future[Completion] = Future()
    completion.set_result(dict(engines.generate([prompt], sampling))[0])
    return completion


@pytest.mark.parametrize(
    ("grader", "reason"), [(FakeGrader(), "the grader could not decide"), (BrokenGrader(), "no worker starts")]
)
def test_an_evaluation_without_a_verdict_is_no_score(grader: FakeGrader | BrokenGrader, reason: str) -> None:
    outcome = TrialSubmitter(sampled, FakeRenderer(), grader, 1000)(HINT.text, PROBLEM, SAMPLING)
    with pytest.raises(TrialFailed, match=reason):
        outcome.result(0)


def test_free_scores_are_over_the_answers_that_were_decided() -> None:
    solved, failed = (fake_rollout(PROBLEM, reward=reward, template=HINT) for reward in (1, 0))
    undecided = replace(failed, grade=UNDECIDED)
    aborted = fake_rollout(PROBLEM, reward=0, template=HINT, finish_reason="abort")
    siblings = (undecided, solved, aborted, failed, solved, replace(fake_rollout(PROBLEM, reward=0), grade=UNDECIDED))
    (score,) = free_scores([Group(problem=PROBLEM, rollouts=siblings, advantages=(0.0,) * 6)], lambda completion: "")
    assert score.template_text == HINT.text, "the plain prompt has no decided answer and no score"
    assert score.trial.reward == pytest.approx(2 / 3)


def test_a_grader_that_cannot_work_ends_the_step() -> None:
    engines = FakeEngines(reply=lambda prompt, index: FakeReply(text="yes"))
    parts = SamplingParts(engines=engines, grader=BrokenGrader(), renderer=FakeRenderer(), solved_at=1.0)
    with pytest.raises(RuntimeError, match="no worker starts"):
        list(graded_rollouts([FakeRenderer().render(PROBLEM, HINT)], SAMPLING, parts))


def test_free_scores_of_partial_rewards_keep_the_mean_and_the_solved_share() -> None:
    siblings = tuple(
        replace(fake_rollout(PROBLEM, reward=reward, template=HINT), solved_at=0.5) for reward in (0.4, 0.4, 0.8)
    )
    (score,) = free_scores([Group(problem=PROBLEM, rollouts=siblings, advantages=(0.0,) * 3)], lambda completion: "")
    assert score.trial.reward == pytest.approx(1.6 / 3)
    assert score.trial.solved_share == pytest.approx(1 / 3) and not score.trial.is_solved
