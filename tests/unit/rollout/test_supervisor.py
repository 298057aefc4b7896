import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_p2o.rollout.broker import EnginesLost
from megatron_p2o.rollout.refresh.refresh_verdict import RefreshFailed
from megatron_p2o.rollout.servers.server import EngineStartFailed
from megatron_p2o.rollout.supervisor import Supervisor

WAIT_S = 120


class FakeServer:
    """A server process that lives until it is told to die."""

    log_path = Path("log")

    def __init__(self, name: str, number: int = 0, starts: bool = True) -> None:
        self.name, self.number, self.starts = name, number, starts
        self.is_running = True

    def is_alive(self) -> bool:
        return self.is_running

    def wait_until_ready(self, timeout_s: float) -> None:
        if not self.starts:
            raise EngineStartFailed(f"{self.name} ended while starting: no memory")

    def log_tail(self) -> str:
        return f"words of {self.name}"

    def stop(self) -> None:
        self.is_running = False


class Run:
    """What the supervisor does to the rest of a run."""

    def __init__(self) -> None:
        self.joined: queue.SimpleQueue[FakeServer] = queue.SimpleQueue()
        self.given_up: queue.SimpleQueue[EnginesLost] = queue.SimpleQueue()
        self.failing_starts = self.failing_joins = 0
        self.supervisor: Supervisor

    def start(self, name: str, number: int) -> FakeServer:
        self.failing_starts -= 1
        return FakeServer(name, number, starts=self.failing_starts < 0)

    def join(self, server: FakeServer) -> None:
        self.failing_joins -= 1
        if self.failing_joins >= 0:
            raise RefreshFailed("other weights than it was sent")
        self.joined.put(server)

    def lose(self, name: str, reason: str) -> None:
        self.supervisor.replace(name)


@contextmanager
def supervised(*servers: FakeServer, max_restarts: int = 2) -> Iterator[Run]:
    run = Run()
    run.supervisor = Supervisor(
        servers,
        start=run.start,
        join=run.join,
        lose=run.lose,
        give_up=run.given_up.put,
        max_restarts=max_restarts,
        startup_timeout_s=1,
        poll_s=0.02,
    )
    try:
        yield run
    finally:
        run.supervisor.close()


def test_a_server_that_dies_idle_is_noticed_and_replaced() -> None:
    first, other = FakeServer("engine 0"), FakeServer("engine 1")
    with supervised(first, other) as run:
        first.is_running = False
        replacement = run.joined.get(timeout=WAIT_S)
        assert (replacement.name, replacement.number) == ("engine 0", 1)
        assert run.supervisor.num_restarts == 1
        assert run.supervisor.servers == [replacement, other]
    assert not replacement.is_running and not other.is_running
    assert run.joined.empty() and run.given_up.empty()


@pytest.mark.parametrize("failing", ["failing_starts", "failing_joins"])
def test_a_restart_that_fails_is_tried_again(failing: str) -> None:
    with supervised(FakeServer("engine 0")) as run:
        setattr(run, failing, 1)
        run.supervisor.replace("engine 0")
        assert run.joined.get(timeout=WAIT_S).number == 2
        assert run.given_up.empty()


def test_all_engines_beyond_their_restarts_is_one_error_with_what_each_said() -> None:
    with supervised(FakeServer("engine 0"), FakeServer("engine 1")) as run:
        run.failing_starts = 4
        run.supervisor.replace("engine 0")
        run.supervisor.replace("engine 1")
        message = str(run.given_up.get(timeout=WAIT_S))
        assert message.startswith("all 2 engines are lost, each after rollout.max_restarts=2 restarts")
        assert "engine 0: engine 0 ended while starting: no memory\nengine 1: engine 1 ended while" in message
        assert run.supervisor.num_restarts == 4
        assert run.joined.empty()


def test_without_restarts_the_error_shows_the_log_of_the_first_server() -> None:
    with supervised(FakeServer("engine 0"), max_restarts=0) as run:
        run.supervisor.replace("engine 0")
        assert "last lines of log:\nwords of engine 0" in str(run.given_up.get(timeout=WAIT_S))


def test_a_refresh_in_between_forgives_past_restarts() -> None:
    with supervised(FakeServer("engine 0"), max_restarts=1) as run:
        for number in (1, 2, 3):
            run.supervisor.replace("engine 0")
            assert run.joined.get(timeout=WAIT_S).number == number
            run.supervisor.renew()


def test_closing_ends_a_server_that_is_starting() -> None:
    stopped = threading.Event()

    class SlowServer(FakeServer):
        def wait_until_ready(self, timeout_s: float) -> None:
            starting.set()
            assert stopped.wait(WAIT_S)
            raise EngineStartFailed("stopped")

        def stop(self) -> None:
            super().stop()
            stopped.set()

    starting = threading.Event()
    with supervised(FakeServer("engine 0")) as run:
        run.supervisor._start = lambda name, number: SlowServer(name)
        run.supervisor.replace("engine 0")
        assert starting.wait(WAIT_S)
    assert run.joined.empty() and run.given_up.empty()
    assert not run.supervisor.servers[0].is_running


def test_a_server_that_is_up_but_waits_for_its_weights_is_named_too() -> None:
    joining, may_join = threading.Event(), threading.Event()

    def join(server: FakeServer) -> None:
        joining.set()
        assert may_join.wait(WAIT_S)

    with supervised(FakeServer("engine 0"), FakeServer("engine 1")) as run:
        run.supervisor._join = join
        run.supervisor.replace("engine 1")
        assert joining.wait(WAIT_S)
        with pytest.raises(TimeoutError, match=r"engine 1: not restarted after 0\.05 s"):
            run.supervisor.hold(0.05)
        may_join.set()


def test_no_server_is_started_while_held_and_one_that_starts_too_long_is_named() -> None:
    ready = threading.Event()

    class SlowServer(FakeServer):
        def wait_until_ready(self, timeout_s: float) -> None:
            starting.set()
            assert ready.wait(WAIT_S)

    starting = threading.Event()
    with supervised(FakeServer("engine 0"), FakeServer("engine 1")) as run:
        run.supervisor._start = lambda name, number: SlowServer(name)
        run.supervisor.replace("engine 0")
        assert starting.wait(WAIT_S)
        with pytest.raises(TimeoutError, match=r"engine 0: not restarted after 0\.05 s"):
            run.supervisor.hold(0.05)
        ready.set()
        run.supervisor.hold(WAIT_S)
        assert run.joined.get(timeout=WAIT_S).name == "engine 0"
        run.supervisor.replace("engine 1")
        with pytest.raises(queue.Empty):
            run.joined.get(timeout=0.1)
        run.supervisor.let_go()
        assert run.joined.get(timeout=WAIT_S).name == "engine 1"
