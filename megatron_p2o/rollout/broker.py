"""Hands requests to engines: who goes first, where, and what happens when an engine dies.

Runs on an event loop in its own thread. The public methods may be called from any thread; the state is touched on the
loop only and needs no lock.
"""

import asyncio
import logging
import secrets
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, wait
from itertools import count
from typing import Any, TypeVar

from megatron_p2o.rollout.given_up import GivenUp, are_logprobs
from megatron_p2o.rollout.heartbeat import EngineStalled, watch
from megatron_p2o.rollout.requests import (
    EVERYONE,
    PRIORITIES,
    EngineHandle,
    GenerationRequest,
    Priority,
    StoppableClock,
    nothing_generated,
    settle,
)
from megatron_p2o.rollout.servers.client import EngineClient, EngineUnreachable, Generation, RequestRefused
from megatron_p2o.types import Completion, Prompt, SamplingParams

ABORT_GRACE_S = 10.0
"""How long an engine may take to hand over what an aborted request has so far."""

LOOP_TIMEOUT_S = 60.0
"""Limit on what only needs the loop's attention."""

STOPPED_POLL_S = 1.0
"""How often to look whether a clock that stands still goes on."""

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
    ) -> None:
        """Args:
        slots_per_engine: requests an engine decodes at once; more wait here, where priority can still be changed.
        request_timeout_s: longest wait for one completion, counted from the moment an engine gets it, without the
            time in which the gate is closed to everyone: engines then do not sample, and may have lent their memory.
        stall_timeout_s: longest time an engine may have requests and sample nothing; then it is lost.
        on_loss: told the name of an engine that is lost, once; must not block. Requests then wait for another engine
            or for `suspend`. None: nobody replaces engines, and losing the last one gives up.
        loop_timeout_s: limit on what only needs the loop's attention; more than that raises `TimeoutError`.
        """
        self._slots = slots_per_engine
        self._request_timeout_s = request_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._on_loss = on_loss
        self._loop_timeout_s = loop_timeout_s
        self._engines: list[EngineHandle] = []
        self._queues: dict[Priority, deque[GenerationRequest]] = {priority: deque() for priority in PRIORITIES}
        self._admitted = EVERYONE
        self._num_closings = 0
        self._refusal: Exception | None = None
        self._version = 0
        self._homes: dict[str, EngineHandle] = {}
        self._num_open: Counter[str] = Counter()
        self._chores: set[asyncio.Task[None]] = set()
        self.given_up = GivenUp()
        """What engines answered and nobody can use."""
        prefix = secrets.token_hex(4)
        self._ids = (f"{prefix}-{number:012d}" for number in count())
        """Of one length: SGLang aborts every request whose id begins with the one it is given."""
        self._loop = asyncio.new_event_loop()
        self._clock = StoppableClock(self._loop.time)
        self._thread = threading.Thread(target=self._loop.run_forever, name="broker", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """Policy version the engines serve."""
        return self._version

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

        Raises what `prepare` raises; the server is not used then.
        """

        async def add() -> None:
            engine = EngineHandle(name, make_client(), log_tail)
            if prepare is not None:
                try:
                    await prepare(name, engine.client)
                except BaseException:
                    await engine.client.close()
                    raise
            self._engines.append(engine)
            engine.heartbeat = self._later(self._watch(engine))
            self._dispatch()

        self._run(add()).result()

    def lose_engine(self, name: str, reason: str) -> None:
        """Stop using an engine whose process is known to be gone; its requests are sent again."""

        async def lose() -> None:
            for engine in [engine for engine in self._engines if engine.name == name]:
                self._lose(engine, reason)

        self._finish(lose(), f"give {name} up")

    def submit(self, prompt: Prompt, sampling: SamplingParams, priority: Priority = "training") -> "Future[Completion]":
        """Return a future of the completion; cancelling it aborts the request.

        A request whose engine is lost is sent to another, or waits for the one that replaces it. A request that runs
        out of time completes with finish reason "abort" and the tokens it has so far, one that the engine refuses or
        whose log-probs are none without tokens (`given_up` counts it). The future holds `EnginesLost` when no engine is
        left, and the error given to `suspend` while the engines are suspended.
        """
        future: Future[Completion] = Future()
        if self._loop.is_closed():
            future.set_exception(BrokerClosed("the broker was closed"))
            return future
        request = GenerationRequest(next(self._ids), prompt, sampling, priority, future)
        future.add_done_callback(lambda done: self._on_cancel(request) if done.cancelled() else None)
        self._loop.call_soon_threadsafe(self._enqueue, request)
        return future

    async def generate(self, prompt: Prompt, sampling: SamplingParams, priority: Priority = "training") -> Completion:
        """`submit` for a caller that runs on an event loop of its own."""
        return await asyncio.wrap_future(self.submit(prompt, sampling, priority))

    def admit(self, priorities: frozenset[Priority]) -> None:
        """Set the gate: requests of other priorities wait. Those an engine already has are not touched."""

        async def set_gate() -> None:
            self._num_closings += 1
            self._admit(priorities)

        self._finish(set_gate(), f"admit {' and '.join(sorted(priorities)) or 'nobody'}")

    def suspend(self, error: Exception) -> None:
        """Answer waiting and future requests with `error`.

        Until `serve`, when what the engines hold must not be sampled; for good when it is `EnginesLost`.
        """

        async def refuse() -> None:
            self._refuse(error)

        self._finish(refuse(), "refuse the waiting requests")

    def serve(self, version: int) -> None:
        """Open the gate to everyone, for weights of `version`."""

        async def open_gate() -> None:
            if not isinstance(self._refusal, EnginesLost):
                self._refusal = None
            self._version = version
            self._admit(EVERYONE)

        self._finish(open_gate(), f"serve version {version}")

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

        return self._run(call_all())

    def close(self) -> None:
        """Fail what is waiting, drop what is running, end the thread. Idempotent."""
        if self._loop.is_closed():
            return

        async def shut_down() -> None:
            self._refuse(BrokerClosed("the broker was closed"))
            running = [task for engine in self._engines for task in engine.running.values()]
            for tasks in (running, list(self._chores)):
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            for engine in self._engines:
                await engine.client.close()

        self._finish(shut_down(), "drop its requests and connections")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self._loop_timeout_s)
        if self._thread.is_alive():
            raise self._held_up("end")
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _finish(self, coroutine: Coroutine[Any, Any, None], what: str) -> None:
        """Run something that takes no time of its own; raise `TimeoutError` that says `what` it is when it does."""
        future = self._run(coroutine)
        done, _ = wait([future], self._loop_timeout_s)
        if not done:
            future.cancel()
            raise self._held_up(what)
        future.result()

    def _held_up(self, what: str) -> TimeoutError:
        return TimeoutError(
            f"the broker of the engines did not {what} within {self._loop_timeout_s:g} s, which takes no time by "
            "itself: either all cores of rank 0's node are taken (give the job more of them, or lower "
            "grading.num_workers), or run.directory, where it reads the engines' logs, does not answer"
        )

    def _on_cancel(self, request: GenerationRequest) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._drop, request)

    # Everything below runs on the loop.

    def _enqueue(self, request: GenerationRequest) -> None:
        if self._refusal is not None:
            settle(request.future, self._refusal)
            return
        self._num_open[request.prompt.problem.id] += 1
        self._queues[request.priority].append(request)
        self._dispatch()

    def _admit(self, priorities: frozenset[Priority]) -> None:
        self._admitted = priorities
        if priorities:
            self._clock.go()
        else:
            self._clock.stop()
        self._dispatch()

    def _dispatch(self) -> None:
        """Give waiting requests to free slots."""
        for priority in PRIORITIES:
            queue = self._queues[priority]
            while priority in self._admitted and queue:
                engine = self._engine_for(queue[0].prompt.problem.id)
                if engine is None:
                    return
                self._start(queue.popleft(), engine)

    def _engine_for(self, problem_id: str) -> EngineHandle | None:
        """Return the engine that has the problem's prompt in its cache, else the least loaded; None if all are full."""
        free = [engine for engine in self._engines if engine.num_running < self._slots]
        if not free:
            return None
        home = self._homes.get(problem_id)
        if home not in free:
            home = min(free, key=lambda engine: engine.num_running)
            self._homes[problem_id] = home
        return home

    def _start(self, request: GenerationRequest, engine: EngineHandle) -> None:
        task = self._loop.create_task(self._serve(request, engine))
        engine.running[request] = task
        task.add_done_callback(lambda done: self._on_served(request, engine, done))

    async def _serve(self, request: GenerationRequest, engine: EngineHandle) -> None:
        place = f"{engine.name} on problem {request.prompt.problem.id}"
        try:
            generation = await self._generate(request, engine)
        except RequestRefused as error:
            self.given_up.note("refused", f"{place}: {error}")
            generation = nothing_generated(self._version)
        if not are_logprobs(generation.logprobs):
            self.given_up.note("invalid_logprobs", place)
            generation = nothing_generated(self._version)
        completion = Completion(
            prompt=request.prompt,
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            finish_reason=generation.finish_reason,
            weight_versions=generation.weight_versions,
        )
        settle(request.future, completion)

    async def _generate(self, request: GenerationRequest, engine: EngineHandle) -> Generation:
        """Return what the engine sampled, cut short when the time is over."""
        client = engine.client
        answer = asyncio.ensure_future(client.generate(request.prompt.sampling_ids, request.sampling, request.id))
        try:
            if not await self._comes_in_time(answer):
                await client.abort(request.id)
            return await asyncio.wait_for(answer, ABORT_GRACE_S)
        except TimeoutError:
            logger.warning("%s did not end %s within rollout.request_timeout_s", engine.name, request.id)
            return nothing_generated(self._version)
        except asyncio.CancelledError:
            if not engine.is_lost:
                self._later(engine.client.abort(request.id))
            raise
        finally:
            answer.cancel()

    async def _comes_in_time(self, answer: "asyncio.Future[Generation]") -> bool:
        deadline_s = self._clock.now_s() + self._request_timeout_s
        while not answer.done() and (left_s := deadline_s - self._clock.now_s()) > 0:
            await asyncio.wait([answer], timeout=max(left_s, STOPPED_POLL_S) if self._clock.is_stopped else left_s)
        return answer.done()

    def _on_served(self, request: GenerationRequest, engine: EngineHandle, task: "asyncio.Task[None]") -> None:
        """Free the slot; send the request elsewhere if the engine is gone."""
        del engine.running[request]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, EngineUnreachable):
            self._lose(engine, str(error))
            error = None
        is_unanswered = engine.is_lost and error is None and not request.future.done()
        if is_unanswered and self._refusal is None:
            self._queues[request.priority].appendleft(request)
        else:
            self._close_request(request, None if request.future.done() else error or self._refusal)
        self._dispatch()

    def _close_request(self, request: GenerationRequest, error: BaseException | None) -> None:
        if error is not None:
            settle(request.future, error)
        problem_id = request.prompt.problem.id
        self._num_open[problem_id] -= 1
        if self._num_open[problem_id] == 0:
            del self._num_open[problem_id]
            self._homes.pop(problem_id, None)

    def _drop(self, request: GenerationRequest) -> None:
        """Forget a request whose future was cancelled."""
        for engine in self._engines:
            if request in engine.running:
                engine.running[request].cancel()
        if request in self._queues[request.priority]:
            self._queues[request.priority].remove(request)
            self._close_request(request, None)

    async def _watch(self, engine: EngineHandle) -> None:
        """Lose the engine when it hangs."""

        def busy_since() -> int | None:
            return self._num_closings if engine.running and self._admitted else None

        try:
            await watch(engine.client, self._stall_timeout_s, busy_since)
        except (EngineStalled, EngineUnreachable) as error:
            self._lose(engine, str(error))

    def _lose(self, engine: EngineHandle, reason: str) -> None:
        """Send nothing more to an engine and take back what it has; give up when nobody replaces the last one."""
        if engine.is_lost:
            return
        engine.is_lost = True
        self._engines.remove(engine)
        logger.warning("%s is lost: %s; last lines of its log:\n%s", engine.name, reason, engine.log_tail())
        for task in engine.running.values():
            task.cancel()
        self._later(self._retire(engine))
        if self._on_loss is not None:
            self._on_loss(engine.name)
        elif not self._engines:
            self._refuse(EnginesLost(f"all engines are lost; last lines of the last one's log:\n{engine.log_tail()}"))

    async def _retire(self, engine: EngineHandle) -> None:
        """Drop the connections of a lost engine once its requests have let go of them."""
        await asyncio.gather(*engine.running.values(), return_exceptions=True)
        if engine.heartbeat is not None:
            engine.heartbeat.cancel()
        await engine.client.close()

    def _refuse(self, error: Exception) -> None:
        self._refusal = error
        for queue in self._queues.values():
            while queue:
                self._close_request(queue.popleft(), error)

    def _later(self, chore: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something nobody waits for; its failure is logged only, and not at all where the engine is gone."""
        task = self._loop.create_task(chore)
        self._chores.add(task)
        task.add_done_callback(self._on_chore_done)
        return task

    def _on_chore_done(self, task: "asyncio.Task[None]") -> None:
        self._chores.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, EngineUnreachable):
            logger.warning("could not abort a request: %s", error)
