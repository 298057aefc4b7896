"""Sends requests to engines: their order, their engine, and what happens if an engine dies.

Runs on an event loop in its own thread. The public methods may be called from any thread; the state is touched on the
loop only and needs no lock.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from itertools import count
from typing import TypeVar

from megatron_p2o.rollout.generation import TimedGeneration, pause
from megatron_p2o.rollout.given_up import GivenUp, are_logprobs
from megatron_p2o.rollout.heartbeat import EngineStalled, watch
from megatron_p2o.rollout.loop_thread import BrokerLoop
from megatron_p2o.rollout.queues import RequestQueues
from megatron_p2o.rollout.requests import (
    EVERYONE,
    BusyTime,
    EngineHandle,
    GenerationRequest,
    Priority,
    StoppableClock,
    nothing_generated,
    settle,
)
from megatron_p2o.rollout.servers.answers import EngineUnreachable, RequestRefused
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.rollout.sharing.allowance import Allowance
from megatron_p2o.rollout.sharing.meter import EvolutionMeter
from megatron_p2o.rollout.sharing.throughput import Throughput
from megatron_p2o.types import Completion, Prompt, SamplingParams

LOOP_TIMEOUT_S = 60.0
"""Limit on what only needs the loop's attention."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class EnginesLost(RuntimeError):
    """No engine is left; the message ends with the last lines of their logs."""


class BrokerClosed(RuntimeError):
    """The broker was closed while requests were waiting, or before they came."""


class Broker:
    """Owns the slots of all engines, the gate in front of them, and the policy version they serve."""

    def __init__(
        self,
        *,
        slots_per_engine: int,
        request_timeout_s: float,
        stall_timeout_s: float,
        on_loss: Callable[[str], None] | None = None,
        loop_timeout_s: float = LOOP_TIMEOUT_S,
        max_slowdown: float = math.inf,
        thread: BrokerLoop | None = None,
    ) -> None:
        """Args:
        slots_per_engine: requests an engine decodes at once; more wait here, where priority can still be changed.
        request_timeout_s: longest wait for one completion, counted from the moment an engine gets it, without the
            time in which the gate is closed to everyone: engines then do not sample, and may have lent their memory.
        stall_timeout_s: longest time an engine may have requests and sample nothing; then it is lost.
        on_loss: told the name of an engine that is lost, once; must not block. Requests then wait for another engine
            or for `suspend`. None: nobody replaces engines, and losing the last one gives up.
        loop_timeout_s: limit on what only needs the loop's attention; more than that raises `TimeoutError`.
        max_slowdown: `evolution.max_slowdown`; by default evolution takes every free slot.
        thread: where it lives; None: in a thread of its own.
        """
        self._stall_timeout_s = stall_timeout_s
        self._on_loss = on_loss
        self._engines: list[EngineHandle] = []
        self._num_closings = 0
        self._refusal: Exception | None = None
        self._version = 0
        self.given_up = GivenUp()
        """What engines answered and nobody can use."""
        prefix = secrets.token_hex(4)
        self._ids = (f"{prefix}-{number:012d}" for number in count())
        """Request ids of one length, because SGLang aborts every request whose id begins with the given one."""
        self._thread = thread or BrokerLoop(loop_timeout_s)
        self._clock = StoppableClock(self._thread.loop.time)
        throughput = Throughput(self._clock.now_s)
        self._allowance = Allowance(slots_per_engine, max_slowdown, throughput)
        self._queues = RequestQueues(slots_per_engine, self._allowance.of)
        self._busy = BusyTime(self._clock.now_s)
        self.meter = EvolutionMeter(self._clock.now_s, throughput)
        """What evolution samples, and what that takes from training."""
        self._generation = TimedGeneration(self._clock, request_timeout_s, self._thread.later)

    @property
    def version(self) -> int:
        """Policy version the engines serve."""
        return self._version

    @property
    def busy_s(self) -> float:
        """Seconds in which an engine had requests, summed over engines; not while the gate is closed to everyone."""
        return self._busy.total_s()

    @property
    def num_engines(self) -> int:
        """Engines that are not lost."""
        return len(self._engines)

    def add_engine(
        self,
        name: str,
        make_client: Callable[[], EngineClient],
        log_tail: Callable[[], str],
        prepare: Callable[[str, EngineClient], Awaitable[None]] | None = None,
    ) -> None:
        """Start using a server. `make_client` and `prepare`, which comes before any request, are called on the loop.

        Raises what `prepare` and `EngineClient.cache_tokens` raise; the server is not used then.
        """

        async def add() -> None:
            client = make_client()
            async with AsyncExitStack() as unless_prepared:
                unless_prepared.push_async_callback(client.close)
                if prepare is not None:
                    await prepare(name, client)
                engine = EngineHandle(name, client, log_tail, await client.cache_tokens())
                unless_prepared.pop_all()
            self._engines.append(engine)
            self.meter.note([engine])
            engine.heartbeat = self._thread.later(self._watch(engine))
            self._dispatch()

        self._thread.run(add()).result()

    def lose_engine(self, name: str, reason: str) -> None:
        """Stop using an engine whose process is known to be gone; its requests are sent again."""

        async def lose() -> None:
            for engine in [engine for engine in self._engines if engine.name == name]:
                self._lose(engine, reason)

        self._thread.finish(lose(), f"give {name} up")

    def submit(
        self, prompt: Prompt, sampling: SamplingParams, priority: Priority = "training", num_scored: int = 0
    ) -> "Future[Completion]":
        """Return a future of the completion; cancelling it aborts the request.

        With `num_scored` above 0 the completion holds that many of the prompt's own last tokens and their log-probs at
        temperature 1; nothing is sampled.

        A request whose engine is lost is sent to another, or waits for the one that replaces it. A request that runs
        out of time completes with finish reason "abort" and the tokens it has so far, one that the engine refuses or
        whose log-probs are none without tokens (`given_up` counts it). The future holds `EnginesLost` when no engine is
        left, and the error given to `suspend` while the engines are suspended.
        """
        future: Future[Completion] = Future()
        if self._thread.is_closed:
            future.set_exception(BrokerClosed("the broker was closed"))
            return future
        request = GenerationRequest(next(self._ids), prompt, sampling, priority, future, num_scored)
        future.add_done_callback(lambda done: self._on_cancel(request) if done.cancelled() else None)
        self._thread.call(self._enqueue, request)
        return future

    async def generate(self, prompt: Prompt, sampling: SamplingParams, priority: Priority = "training") -> Completion:
        """`submit` for a caller that runs on an event loop of its own."""
        return await asyncio.wrap_future(self.submit(prompt, sampling, priority))

    def admit(self, priorities: frozenset[Priority]) -> None:
        """Set the gate: requests of other priorities wait. Those an engine already has are not touched."""

        async def set_gate() -> None:
            self._num_closings += 1
            self._admit(priorities)

        self._thread.finish(set_gate(), f"admit {' and '.join(sorted(priorities)) or 'nobody'}")

    def suspend(self, error: Exception) -> None:
        """Answer waiting and future requests with `error`.

        Until `serve`, when what the engines hold must not be sampled; for good when it is `EnginesLost`.
        """

        async def refuse() -> None:
            self._refuse(error)

        self._thread.finish(refuse(), "refuse the waiting requests")

    def serve(self, version: int) -> None:
        """Open the gate to everyone, for weights of `version`."""

        async def open_gate() -> None:
            if not isinstance(self._refusal, EnginesLost):
                self._refusal = None
            self._version = version
            self._admit(EVERYONE)

        self._thread.finish(open_gate(), f"serve version {version}")

    def call_every_engine(self, call: Callable[[str, EngineClient], Awaitable[T]]) -> "Future[dict[str, T]]":
        """Run `call(name, client)` for all engines at once; the result is by name.

        An engine that turns out to be gone, or that runs out of time, is lost and left out. The future holds
        `EnginesLost` when there is none and none will come, else the first other error.
        """

        async def attempt(engine: EngineHandle) -> tuple[str, T] | None:
            try:
                return engine.name, await call(engine.name, engine.client)
            except (EngineUnreachable, TimeoutError) as error:
                self._lose(engine, str(error))
                return None

        async def call_all() -> dict[str, T]:
            answers = await asyncio.gather(*map(attempt, list(self._engines)), return_exceptions=True)
            if isinstance(self._refusal, EnginesLost):
                raise self._refusal
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            return dict(answer for answer in answers if isinstance(answer, tuple))

        return self._thread.run(call_all())

    def close(self) -> None:
        """Fail waiting requests, drop running ones, end the thread. Idempotent."""
        if self._thread.is_closed:
            return

        async def shut_down() -> None:
            self._refuse(BrokerClosed("the broker was closed"))
            running = [task for engine in self._engines for task in engine.running.values()]
            for tasks in (running, list(self._thread.chores)):
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for engine in self._engines:
                await engine.client.close()

        self._thread.finish(shut_down(), "drop its requests and connections")
        self._thread.close()

    def _on_cancel(self, request: GenerationRequest) -> None:
        if not self._thread.is_closed:
            self._thread.call(self._drop, request)

    # Everything below runs on the loop.

    def _enqueue(self, request: GenerationRequest) -> None:
        if self._refusal is not None:
            settle(request.future, self._refusal)
            return
        self._queues.add(request)
        self._dispatch()

    def _admit(self, priorities: frozenset[Priority]) -> None:
        self._queues.admitted = priorities
        if priorities:
            self._clock.go()
        else:
            self._clock.stop()
        self.meter.note(self._engines)
        for engine in self._engines:
            self._pause_excess(engine)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting requests to free slots."""
        while (next_one := self._queues.take(self._engines)) is not None:
            self._start(*next_one)
        self.meter.note_waiting(self._queues.does_evolution_wait)

    def _start(self, request: GenerationRequest, engine: EngineHandle) -> None:
        task = self._thread.loop.create_task(self._serve(request, engine))
        self.meter.begin(request, engine)
        self._allowance.started(request, engine)
        engine.running[request] = task
        self._busy.note(engine)
        task.add_done_callback(lambda done: self._on_served(request, engine, done))
        self._pause_excess(engine)

    def _pause_excess(self, engine: EngineHandle) -> None:
        """Take evolution from an engine where it has become too much for training."""
        if not engine.is_lost and self._queues.admitted:
            for request in self._allowance.excess(engine):
                self._thread.later(pause(request, engine))

    async def _serve(self, request: GenerationRequest, engine: EngineHandle) -> None:
        place = f"{engine.name} on problem {request.prompt.problem.id}"
        try:
            generation = await self._generation.generate(request, engine)
        except RequestRefused as error:
            self.given_up.note("refused", f"{place}: {error}")
            generation = None
        if generation is not None and not are_logprobs(generation.logprobs):
            self.given_up.note("invalid_logprobs", place)
            generation = None
        if generation is None:
            generation = nothing_generated(self._version)
        request.num_sampled = 0 if request.num_scored else len(generation.token_ids)
        generation = request.joined(generation)
        if request.is_pausing and generation.finish_reason == "abort":
            request.keep(generation)
            return
        completion = Completion(
            prompt=request.prompt,
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_versions=generation.weight_versions,
        )
        settle(request.future, completion)

    def _on_served(self, request: GenerationRequest, engine: EngineHandle, task: "asyncio.Task[None]") -> None:
        """Free the slot; have the request wait for another if it was paused, or the engine is gone."""
        self.meter.end(request, engine)
        self._allowance.ended(request, engine)
        del engine.running[request]
        self._busy.note(engine)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, EngineUnreachable):
            self._lose(engine, str(error))
            error = None
        is_unanswered = (engine.is_lost or request.is_pausing) and error is None and not request.future.done()
        request.is_pausing = False
        if is_unanswered and self._refusal is None:
            request.id = next(self._ids)
            self._queues.add_again(request)
        else:
            self._close_request(request, None if request.future.done() else error or self._refusal)
        self._pause_excess(engine)
        self._dispatch()

    def _close_request(self, request: GenerationRequest, error: BaseException | None) -> None:
        if error is not None:
            settle(request.future, error)
        self._queues.settled(request)

    def _drop(self, request: GenerationRequest) -> None:
        """Forget a request whose future was cancelled."""
        for engine in self._engines:
            if request in engine.running:
                engine.running[request].cancel()
        if self._queues.remove(request):
            self._close_request(request, None)

    async def _watch(self, engine: EngineHandle) -> None:
        """Lose the engine when it hangs."""

        def busy_since() -> int | None:
            return self._num_closings if engine.running and self._queues.admitted else None

        try:
            await watch(engine.client, self._stall_timeout_s, busy_since)
        except (EngineStalled, EngineUnreachable) as error:
            self._lose(engine, str(error))

    def _lose(self, engine: EngineHandle, reason: str) -> None:
        """Stop using an engine and take its requests back. Fail them if it was the last and is not replaced."""
        if engine.is_lost:
            return
        engine.is_lost = True
        self._engines.remove(engine)
        logger.warning("%s is lost: %s; last lines of its log:\n%s", engine.name, reason, engine.log_tail())
        for task in engine.running.values():
            task.cancel()
        self._thread.later(self._retire(engine))
        if self._on_loss is not None:
            self._on_loss(engine.name)
        elif not self._engines:
            self._refuse(EnginesLost(f"all engines are lost; last lines of the last one's log:\n{engine.log_tail()}"))

    async def _retire(self, engine: EngineHandle) -> None:
        """Drop the connections of a lost engine once its requests have let go of them."""
        await asyncio.gather(*engine.running.values(), return_exceptions=True)
        self.meter.forget(engine)
        if engine.heartbeat is not None:
            engine.heartbeat.cancel()
        await engine.client.close()

    def _refuse(self, error: Exception) -> None:
        self._refusal = error
        for request in self._queues.take_all():
            self._close_request(request, error)
