"""Rank 0's answers to the service's trial requests, kept over a restart of the service."""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from megatron_p2o.config.tree import RolloutConfig
from megatron_p2o.evolve.process.messages import TrialReply, TrialRequest
from megatron_p2o.evolve.process.service_process import ServiceProcess
from megatron_p2o.evolve.reflection.reflection import MAX_RESPONSE_CHARS, shorten
from megatron_p2o.evolve.trial import Rejection, Trial
from megatron_p2o.records import from_json, to_json
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import Problem, SamplingParams

logger = logging.getLogger(__name__)

MAX_LOGGED_FAILURES = 10
"""Per round; a lost engine fails every request, and the count says how many."""

RequestKey = tuple[str, str, float, int]
"""(template text, problem id, temperature, sample)"""


class SubmitTrial(Protocol):
    """Renders, samples and grades on rank 0."""

    def __call__(
        self, template_text: str, problem: Problem, sampling: SamplingParams, /
    ) -> "Future[Trial | Rejection]":
        """Submit one rollout and return at once; many are in flight. A prompt that is too long is a `Rejection`.

        Called from the session's own thread. The future raises when there is no verdict; that costs one trial.
        """
        ...


class TrialReplies:
    """The requests of one round that are being answered."""

    def __init__(
        self, submit_trial: SubmitTrial, problems: Mapping[str, Problem], rollout: RolloutConfig, seed: int
    ) -> None:
        """`seed` is of the round: what a request is answered with depends on it and the request alone."""
        self._submit_trial = submit_trial
        self._problems = problems
        self._rollout = rollout
        self._seed = seed
        self._submitted: dict[RequestKey, Future[Trial | Rejection]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_answered = 0
        """Requests answered so far."""
        self.num_failed = 0
        """Requests without a verdict."""

    def answer(self, service: ServiceProcess, request: TrialRequest) -> None:
        """Submit `request` and reply when it is done."""
        task = asyncio.ensure_future(self._reply(service, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget_service(self) -> None:
        """Note that the service is gone. Its requests continue, and answer the next service if it asks again."""
        for task in self._tasks:
            task.cancel()

    def cancel(self) -> None:
        """Nobody will ask any more."""
        self.forget_service()
        for future in self._submitted.values():
            future.cancel()

    async def _reply(self, service: ServiceProcess, request: TrialRequest) -> None:
        key = (request.template_text, request.problem_id, request.temperature, request.sample)
        reply = await self._reply_to(key, request.request)
        self._submitted.pop(key, None)
        self.num_answered += 1
        if reply.failure is not None:
            self.num_failed += 1
            if self.num_failed <= MAX_LOGGED_FAILURES:
                logger.warning("evolution: no verdict on problem %s: %s", request.problem_id, reply.failure)
        service.send(reply)

    async def _reply_to(self, key: RequestKey, number: int) -> TrialReply:
        try:
            future = self._submitted.get(key) or self._submit(key)
            answer = _checked(number, await asyncio.shield(asyncio.wrap_future(future)))
        except asyncio.CancelledError:
            if (future := self._submitted.get(key)) is None or not future.cancelled():
                raise  # this task was cancelled, not the trial
            return TrialReply(request=number, failure="the trial was cancelled")
        except Exception as error:  # the border to foreign code: a lost trial must not end training
            return TrialReply(request=number, failure=f"{type(error).__name__}: {error}")
        return answer

    def _submit(self, key: RequestKey) -> "Future[Trial | Rejection]":
        text, problem_id, temperature, sample = key
        sampling = SamplingParams(
            temperature=temperature,
            max_new_tokens=self._rollout.max_new_tokens,
            top_p=self._rollout.top_p if temperature > 0 else 1.0,
            seed=seed_of(self._seed, text, problem_id, sample),
        )
        future = self._submit_trial(text, self._problems[problem_id], sampling)
        self._submitted[key] = future
        return future


def _checked(number: int, answer: Trial | Rejection) -> TrialReply:
    """Return the reply with what `submit_trial` answered. Raise `ValueError` when it answered with something else."""
    if isinstance(answer, Rejection):
        reply = TrialReply(request=number, rejection=answer.reason)
    else:
        short = replace(answer, response_text=shorten(answer.response_text, MAX_RESPONSE_CHARS))
        reply = TrialReply(request=number, trial=short)
    return from_json(TrialReply, to_json(reply))
