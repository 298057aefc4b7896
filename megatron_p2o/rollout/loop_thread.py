"""An event loop that runs in a thread of its own, and what other threads may ask of it."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from megatron_p2o.rollout.servers.answers import EngineUnreachable

T = TypeVar("T")
logger = logging.getLogger(__name__)


class BrokerLoop:
    """Runs the broker's coroutines. Whoever creates it must call `close`."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: limit on what only needs the loop's attention."""
        self._timeout_s = timeout_s
        self.loop = asyncio.new_event_loop()
        self.chores: set[asyncio.Task[None]] = set()
        """What nobody waits for and has not ended."""
        self._thread = threading.Thread(target=self.loop.run_forever, name="broker", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        return self.loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start a coroutine; from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def finish(self, coroutine: Coroutine[Any, Any, None], what: str) -> None:
        """Run something that takes no time of its own; from another thread.

        Raises:
            TimeoutError: it did not end; the message says `what` it is.
        """
        future = self.run(coroutine)
        done, _ = wait([future], self._timeout_s)
        if not done:
            future.cancel()
            raise self._held_up(what)
        future.result()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the loop soon; from any thread. Raise `RuntimeError` when the loop is closed."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def later(self, chore: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a coroutine in the background; on the loop. Its failure is only logged, and not even that if the engine
        is gone.
        """
        task = self.loop.create_task(chore)
        self.chores.add(task)
        task.add_done_callback(self._on_chore_done)
        return task

    def close(self) -> None:
        """End the thread, whose coroutines have ended; from another thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            raise self._held_up("end")
        self.loop.close()

    def _on_chore_done(self, task: "asyncio.Task[None]") -> None:
        self.chores.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, EngineUnreachable):
            logger.warning("could not abort a request: %s", error)

    def _held_up(self, what: str) -> TimeoutError:
        return TimeoutError(
            f"the broker of the engines did not {what} within {self._timeout_s:g} s, which takes no time by "
            "itself: either all cores of rank 0's node are taken (give the job more of them, or lower "
            "grading.num_workers), or run.directory, where it reads the engines' logs, does not answer"
        )
