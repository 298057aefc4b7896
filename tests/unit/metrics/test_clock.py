"""Parts that are measured behave as the parts themselves."""

from concurrent.futures import Future, wait

import numpy as np
import pytest

from megatron_p2o.metrics.clock import PhaseClock, TimedEngines, TimedGrader
from megatron_p2o.metrics.compute import ComputeMeter
from megatron_p2o.rl.sampling import SamplingParts, graded_rollouts
from megatron_p2o.testing.fakes import FakeEngines, FakeGrader, FakeRenderer, FakeReply, fake_problem
from megatron_p2o.types import CORRECT, INCORRECT, PLAIN, FinishReason, Grade, Problem, SamplingParams

PROBLEM = fake_problem(1)


class Later:
    """A grader that answers when it is told to."""

    def __init__(self) -> None:
        self.verdict: Future[Grade] = Future()

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> Future[Grade]:
        return self.verdict


def submitted() -> tuple[Future[Grade], Future[Grade]]:
    """Return a grader's future and the measured one around it."""
    later = Later()
    return later.verdict, TimedGrader(later, PhaseClock()).submit(PROBLEM, "yes", "stop")


def test_a_measured_verdict_is_done_when_the_verdict_is() -> None:
    inner, measured = submitted()
    told: list[Grade] = []
    measured.add_done_callback(lambda done: told.append(done.result()))
    assert not measured.done() and not measured.running() and not wait([measured], 0).done
    assert inner.set_running_or_notify_cancel()
    assert measured.running()
    inner.set_result(CORRECT)
    assert measured.done() and not measured.running() and wait([measured], 0).done == {measured}
    assert measured.result(0) == CORRECT and measured.exception(0) is None and told == [CORRECT]


def test_a_measured_verdict_fails_as_the_verdict_does() -> None:
    inner, measured = submitted()
    inner.set_exception(RuntimeError("no worker starts"))
    assert isinstance(measured.exception(0), RuntimeError)
    with pytest.raises(RuntimeError, match="no worker starts"):
        measured.result(0)


@pytest.mark.parametrize("outer_first", [True, False])
def test_cancelling_a_measured_verdict_cancels_the_verdict(outer_first: bool) -> None:
    inner, measured = submitted()
    assert (measured if outer_first else inner).cancel()
    assert inner.cancelled() and measured.cancelled()
    assert wait([measured], 0).done == {measured}


def test_a_verdict_that_is_being_found_cannot_be_cancelled() -> None:
    inner, measured = submitted()
    assert inner.set_running_or_notify_cancel()
    assert not measured.cancel() and not measured.cancelled()
    inner.set_result(INCORRECT)
    assert measured.result(0) == INCORRECT


def test_rollouts_are_handed_on_while_others_are_still_sampled() -> None:
    engines = FakeEngines(reply=lambda prompt, index: FakeReply(text="yes"))
    renderer = FakeRenderer()
    parts = SamplingParts(
        engines=engines, grader=TimedGrader(FakeGrader(), PhaseClock()), renderer=renderer, solved_at=1.0
    )
    rollouts = graded_rollouts(
        [renderer.render(PROBLEM, PLAIN)] * 3, SamplingParams(temperature=1, max_new_tokens=4), parts
    )
    drawn: list[str] = []
    engines.reply = lambda prompt, index: drawn.append("") or FakeReply(text="yes")
    next(rollouts)
    assert len(drawn) == 1


def test_what_engines_read_for_log_probs_is_counted_with_its_prompts_and_sampled_nothing() -> None:
    engines = FakeEngines(reply=lambda prompt, index: FakeReply(text="yes"))
    compute, clock = ComputeMeter(), PhaseClock()
    timed = TimedEngines(engines, clock, compute)
    prompts = [FakeRenderer().render(problem, PLAIN) for problem in (PROBLEM, fake_problem(22))]
    responses = [np.arange(1, size, dtype=np.int32) for size in (4, 6)]
    scores = timed.score(prompts, responses)
    assert [None if row is None else len(row) for row in scores] == [3, 5]
    spent = compute.account()
    assert spent.engine_read_tokens == len("question 1") + 3 + len("question 22") + 5
    assert spent.sampled_training_tokens == spent.learning_tokens == 0
    assert set(clock.take().seconds) == {"score"}
