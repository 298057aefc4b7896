"""Rank 0's answers to the service's evaluation requests, kept over a restart of the service."""

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Protocol

from megatron_p2o.config import RolloutConfig
from megatron_p2o.evolve.evaluation import Evaluation, Rejection
from megatron_p2o.evolve.messages import EvaluateReply, EvaluateRequest
from megatron_p2o.evolve.service_process import ServiceProcess
from megatron_p2o.types import Problem, SamplingParams

logger = logging.getLogger(__name__)

RequestKey = tuple[str, str, float, int]
"""(template text, problem id, temperature, sample)"""


class Evaluate(Protocol):
    """Renders, samples and grades on rank 0."""

    def __call__(
        self, template_text: str, problem: Problem, sampling: SamplingParams, /
    ) -> "Future[Evaluation | Rejection]":
        """Submit one rollout; many are in flight at once. A prompt that is too long is a `Rejection`.

        The future raises when there is no verdict; that costs the one evaluation.
        """
        ...


class Answers:
    """The requests of one round that are being answered."""

    def __init__(self, evaluate: Evaluate, problems: Mapping[str, Problem], rollout: RolloutConfig) -> None:
        self._evaluate = evaluate
        self._problems = problems
        self._rollout = rollout
        self._submitted: dict[RequestKey, Future[Evaluation | Rejection]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_failed = 0
        """Requests without a verdict."""

    def answer(self, service: ServiceProcess, request: EvaluateRequest) -> None:
        """Submit `request` and reply when it is done."""
        task = asyncio.ensure_future(self._reply(service, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget_service(self) -> None:
        """The service that asked is gone; what it asked for goes on and answers the next one, should it ask again."""
        for task in self._tasks:
            task.cancel()

    def cancel(self) -> None:
        """Nobody will ask any more."""
        self.forget_service()
        for future in self._submitted.values():
            future.cancel()

    async def _reply(self, service: ServiceProcess, request: EvaluateRequest) -> None:
        key = (request.template_text, request.problem_id, request.temperature, request.sample)
        reply = await self._reply_to(key, request.request)
        self._submitted.pop(key, None)
        if reply.failure is not None:
            self.num_failed += 1
            logger.warning("evolution: no verdict on problem %s: %s", request.problem_id, reply.failure)
        service.send(reply)

    async def _reply_to(self, key: RequestKey, number: int) -> EvaluateReply:
        try:
            future = self._submitted.get(key) or self._submit(key)
            answer = await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            if (future := self._submitted.get(key)) is None or not future.cancelled():
                raise  # this task was cancelled, not the evaluation
            return EvaluateReply(request=number, failure="the evaluation was cancelled")
        except Exception as error:  # the border to foreign code: a lost evaluation must not end training
            return EvaluateReply(request=number, failure=f"{type(error).__name__}: {error}")
        if isinstance(answer, Rejection):
            return EvaluateReply(request=number, rejection=answer.reason)
        return EvaluateReply(request=number, evaluation=answer)

    def _submit(self, key: RequestKey) -> "Future[Evaluation | Rejection]":
        text, problem_id, temperature, _ = key
        sampling = SamplingParams(
            temperature=temperature,
            max_new_tokens=self._rollout.max_new_tokens,
            top_p=self._rollout.top_p if temperature > 0 else 1.0,
        )
        future = self._evaluate(text, self._problems[problem_id], sampling)
        self._submitted[key] = future
        return future
