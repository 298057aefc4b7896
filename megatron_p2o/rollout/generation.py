"""Runs one request at one engine within its time limit, and aborts it afterwards."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from megatron_p2o.rollout.requests import PRIORITY_IN_ENGINE, EngineHandle, GenerationRequest, StoppableClock
from megatron_p2o.rollout.servers.answers import Generation
from megatron_p2o.rollout.servers.client import EngineClient

ABORT_GRACE_S = 10.0
"""Time limit for an engine to return what an aborted request has so far."""

STOPPED_POLL_S = 1.0
"""Interval at which a stopped clock is checked."""

PAUSE_RETRY_S = 1.0
"""Time after which an engine is asked again to hand a request over: it may have been asked before it had it."""

logger = logging.getLogger(__name__)


class TimedGeneration:
    """Has engines sample, each request for a limited time."""

    def __init__(
        self, clock: StoppableClock, timeout_s: float, later: Callable[[Coroutine[Any, Any, None]], object]
    ) -> None:
        """Args:
        timeout_s: longest wait for an engine's answer, by `clock`.
        later: runs a coroutine in the background.
        """
        self._clock = clock
        self._timeout_s = timeout_s
        self._later = later

    async def generate(self, request: GenerationRequest, engine: EngineHandle) -> Generation | None:
        """Return what the engine sampled, cut short when the time is over; None when it does not hand even that over.

        Raises what the engine's client raises. Cancelled, it has the engine drop the request.
        """
        client = engine.client
        answer = asyncio.ensure_future(_asked(client, request))
        try:
            if not await self._comes_in_time(answer):
                await client.abort(request.id)
            return await asyncio.wait_for(answer, ABORT_GRACE_S)
        except TimeoutError:
            logger.warning("%s did not end %s within rollout.request_timeout_s", engine.name, request.id)
            return None
        except asyncio.CancelledError:
            if not engine.is_lost:
                self._later(client.abort(request.id))
            raise
        finally:
            answer.cancel()

    async def _comes_in_time(self, answer: "asyncio.Future[Generation]") -> bool:
        deadline_s = self._clock.now_s() + self._timeout_s
        while not answer.done() and (left_s := deadline_s - self._clock.now_s()) > 0:
            await asyncio.wait([answer], timeout=max(left_s, STOPPED_POLL_S) if self._clock.is_stopped else left_s)
        return answer.done()


def _asked(client: EngineClient, request: GenerationRequest) -> Coroutine[Any, Any, Generation]:
    ids = request.token_ids
    if request.num_scored:
        return client.score(ids, request.num_scored, request.id, priority=PRIORITY_IN_ENGINE[request.priority])
    return client.generate(ids, request.sampling_left, request.id, priority=PRIORITY_IN_ENGINE[request.priority])


async def pause(request: GenerationRequest, engine: EngineHandle) -> None:
    """Have an engine end a request that `is_pausing`, with what it has so far."""
    request_id = request.id
    while request.is_pausing and request.id == request_id and not engine.is_lost:
        await engine.client.abort(request_id)
        await asyncio.sleep(PAUSE_RETRY_S)
