"""An event loop whose clock jumps to the next timer: an hour of waiting takes no time.

Everything that is simulated runs on one such loop, in one thread, so that a simulation gives the same numbers each
time.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from megatron_p2o.rollout.loop_thread import BrokerLoop

T = TypeVar("T")


class SimulationStalled(RuntimeError):
    """The simulation waits for something, and nothing is left that could happen."""


class _NoWaiting(selectors.DefaultSelector):
    """Files are not waited for; time passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise SimulationStalled("nothing is left to happen, and the simulation still waits")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its time begins at 0 and passes only when nothing is left to do at the present moment."""

    def __init__(self) -> None:
        self._clock = _NoWaiting()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        # There is one thread, and nothing would wake this loop from a wait.
        return self.call_soon(callback, *args, context=context)


def simulate(main: Callable[[VirtualTimeLoop], Coroutine[Any, Any, T]]) -> T:
    """Return the outcome of `main(loop)` on a loop of its own; what it has left running is cancelled.

    Raises:
        SimulationStalled: it waits for what will not happen.
    """
    loop = VirtualTimeLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()


class SimulatedBrokerLoop(BrokerLoop):
    """The broker's loop without a thread of its own: the broker lives on the loop of the simulation."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self.loop = loop
        self.chores = set()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def run(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine. Before the loop runs, this waits for its end."""
        future: Future[T] = Future()
        if not self.loop.is_running():
            future.set_result(self.loop.run_until_complete(coroutine))
            return future
        task = self.loop.create_task(coroutine)
        task.add_done_callback(lambda done: _copy_outcome(done, future))
        return future

    def finish(self, coroutine: Coroutine[Any, Any, None], what: str) -> None:
        """Run a coroutine that waits for nothing."""
        try:
            coroutine.send(None)
        except StopIteration:
            return
        coroutine.close()
        raise SimulationStalled(f"the broker did not {what} at once")

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        self.loop.call_soon(function, *arguments)

    def close(self) -> None:
        self._is_closed = True


def _copy_outcome(task: "asyncio.Task[T]", future: "Future[T]") -> None:
    if task.cancelled():
        future.cancel()
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())
