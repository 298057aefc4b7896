"""Replaces engines that die or hang."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from megatron_p2o.rollout.broker import EnginesLost
from megatron_p2o.rollout.refresh.refresh_verdict import RefreshFailed
from megatron_p2o.rollout.servers.answers import EngineRefused, EngineUnreachable
from megatron_p2o.rollout.servers.server import EngineStartFailed, Server

logger = logging.getLogger(__name__)


class Supervisor:
    """Owns the servers of a run and keeps them running."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        start: Callable[[str, int], Server],
        join: Callable[[Server], None],
        lose: Callable[[str, str], None],
        give_up: Callable[[EnginesLost], None],
        max_restarts: int,
        startup_timeout_s: float,
        poll_s: float = 1.0,
    ) -> None:
        """Args:
        servers: all ready; owned from now on.
        start: makes the server that replaces one, given its name and how many restarts that makes in the whole run.
        join: gives a server that is ready the current weights, then requests.
        lose: told (name, reason) of a server whose process has ended; calls `replace` in turn if that is news.
        give_up: called when all servers are lost and none may be started any more.
        poll_s: how often to look whether the processes live.
        """
        self._servers = {server.name: server for server in servers}
        self._start, self._join, self._lose, self._give_up = start, join, lose, give_up
        self._max_restarts = max_restarts
        self._startup_timeout_s = startup_timeout_s
        self._poll_s = poll_s
        self._attempts: Counter[str] = Counter()
        self._num_restarts: Counter[str] = Counter()
        self._down: set[str] = set()
        self._given_up: dict[str, str] = {}
        self._closing = threading.Event()
        self._turn = threading.Condition()
        """Guards the two fields below. It is notified of every change to them, and of the end."""
        self._is_held = False
        self._starting: set[str] = set()
        self._threads = ThreadPoolExecutor(max(1, len(servers)), thread_name_prefix="engine-restart")
        self._watcher = threading.Thread(target=self._watch, name="engine-watch", daemon=True)
        self._watcher.start()

    @property
    def servers(self) -> list[Server]:
        """The latest server of each engine."""
        return list(self._servers.values())

    @property
    def num_restarts(self) -> int:
        """Number of restarts in the whole run, including failed ones."""
        return self._num_restarts.total()

    def replace(self, name: str) -> None:
        """Kill an engine and start another in its place. Returns at once; may be called from any thread."""
        self._down.add(name)
        if not self._closing.is_set():
            self._threads.submit(self._replace, name).add_done_callback(partial(self._on_replaced, name))

    def renew(self) -> None:
        """Reset the counts of restarts, at a refresh."""
        self._attempts.clear()

    def hold(self, timeout_s: float) -> None:
        """Start no server until `let_go`: its memory is lent. Returns when none is being started any more.

        Raises:
            TimeoutError: one still is after `timeout_s`.
        """
        with self._turn:
            self._is_held = True
            if not self._turn.wait_for(lambda: not self._starting, timeout_s):
                raise TimeoutError(f"{', '.join(sorted(self._starting))}: not restarted after {timeout_s:g} s")

    def let_go(self) -> None:
        """Start the servers that are missing, if `hold` has kept any from it. Idempotent."""
        with self._turn:
            self._is_held = False
            self._turn.notify_all()

    def close(self) -> None:
        """End all servers and everything they started. Idempotent."""
        self._closing.set()
        with self._turn:
            self._turn.notify_all()
        stop_all(self.servers)
        self._threads.shutdown(wait=True)
        stop_all(self.servers)
        self._watcher.join()

    def _watch(self) -> None:
        """Notice engines that die without a request to show it."""
        while not self._closing.wait(self._poll_s):
            for name, server in list(self._servers.items()):
                if name not in self._down and not server.is_alive():
                    self._lose(name, "its process has ended")

    def _replace(self, name: str) -> None:
        last_words = f"last lines of {self._servers[name].log_path}:\n{self._servers[name].log_tail()}"
        while not self._closing.is_set():
            self._servers[name].stop()  # also while memory is lent: a server that hangs may hold some of it
            if self._attempts[name] >= self._max_restarts:
                self._abandon(name, last_words)
                return
            self._attempts[name] += 1
            self._num_restarts[name] += 1
            try:
                with self._started_in_turn(name):
                    self._start_and_join(name)
                return
            except (EngineStartFailed, RefreshFailed, EngineRefused, EngineUnreachable, TimeoutError) as error:
                last_words = str(error)
                logger.warning("restart %d of %s failed: %s", self._attempts[name], name, error)

    @contextmanager
    def _started_in_turn(self, name: str) -> Iterator[None]:
        """Wait until no one holds servers back, and let `hold` wait for the end of this."""
        with self._turn:  # without a limit: a holder of servers releases them or closes
            self._turn.wait_for(lambda: not self._is_held or self._closing.is_set())
            self._starting.add(name)
        try:
            yield
        finally:
            with self._turn:
                self._starting.discard(name)
                self._turn.notify_all()

    def _start_and_join(self, name: str) -> None:
        if self._closing.is_set():
            return
        server = self._servers[name] = self._start(name, self._num_restarts[name])
        if self._closing.is_set():
            server.stop()
        server.wait_until_ready(self._startup_timeout_s)
        self._down.discard(name)
        self._join(server)
        logger.warning("%s was restarted and serves again", name)

    def _on_replaced(self, name: str, outcome: Future[None]) -> None:
        error = outcome.exception()
        if error is not None and not self._closing.is_set():
            self._abandon(name, f"{type(error).__name__}: {error}")

    def _abandon(self, name: str, last_words: str) -> None:
        self._given_up[name] = last_words
        logger.warning("%s is given up after %d restarts: %s", name, self._attempts[name], last_words)
        if len(self._given_up) == len(self._servers):
            reasons = "\n".join(f"{lost}: {words}" for lost, words in sorted(self._given_up.items()))
            self._give_up(
                EnginesLost(
                    f"all {len(self._servers)} engines are lost, each after rollout.max_restarts={self._max_restarts} "
                    f"restarts:\n{reasons}"
                )
            )


def stop_all(servers: Sequence[Server]) -> None:
    """Stop servers side by side: each may take seconds."""
    if servers:
        with ThreadPoolExecutor(len(servers)) as threads:
            list(threads.map(lambda server: server.stop(), servers))
