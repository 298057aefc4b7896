"""The parent's side of grading workers: the server that forks them, one worker, and the source of new ones."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from megatron_p2o.processes import child_environment
from megatron_p2o.records import to_json
from megatron_p2o.rewards.functions import RewardSpec, function_secrets

CLOSE_TIMEOUT_S = 10.0
"""Longest wait for a process that was told to end, and for the thread that drives a worker."""

NUM_STARTS = 3
"""Servers that are started for one worker before the source gives up."""

MAX_REPLY_BYTES = 1 << 16
"""Read at a time."""


class WorkerLost(Exception):
    """A worker, or the server that forks them, cannot answer; the message is how it was lost."""


class GraderFailed(RuntimeError):
    """Nothing can be graded any more."""


class FunctionRefused(ValueError):
    """A reward function that settings name cannot be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLimits:
    """What workers may take."""

    memory_limit_mib: int
    """Address space of each."""
    deadline_s: float
    """Processor time of one answer."""
    timeout_s: float
    """Wall-clock time of one answer: a backstop."""
    stall_timeout_s: float
    """A process that is to do something and gets no processor time for so long is stopped, or hangs."""


class SourceClosed(Exception):
    """The source was closed while a worker was wanted."""


class ForkServer:
    """A warm process that forks workers (`fork_server.py`). Calls must not overlap, except `stop`.

    Linux kills it when the thread that started it ends, and the workers with it.
    """

    def __init__(self, functions: Sequence[RewardSpec] | None, limits: WorkerLimits) -> None:
        """Start the process. Raises `OSError` when the machine has none to spare."""
        self._functions, self._limits = functions, limits
        self._max_at_once = 1
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = os.getpid(), limits.memory_limit_mib, limits.deadline_s, limits.timeout_s
        program = str(Path(__file__).with_name("fork_server.py"))
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", program, *map(str, arguments)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=child_environment(function_secrets(functions or ())),
                    process_group=0,  # Ctrl-C in the terminal is for the parent
                )
        except OSError:
            self._socket.close()
            raise

    def wait_until_ready(self) -> None:
        """Return when what workers need is loaded and warm. Raises `WorkerLost` and `FunctionRefused`."""
        self._ask(json.dumps({"functions": to_json(self._functions)}).encode())
        answer, _, rest = self._reply().decode(errors="replace").partition(" ")
        if answer == "refused":
            raise FunctionRefused(rest)
        self._max_at_once = int(rest)

    def fork(self) -> "Worker":
        """Return a new worker. Raises `WorkerLost`."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._ask(b"fork", theirs)
            return Worker(int(self._reply()), self, ours, self._max_at_once, self._limits.stall_timeout_s)
        except WorkerLost:
            ours.close()
            raise

    def end(self, worker: "Worker") -> int:
        """Kill and reap a worker; return its wait status. Raises `WorkerLost`."""
        self._ask(f"end {worker.pid}".encode())
        return int(self._reply())

    def stop(self) -> None:
        """End the server and every worker it has; may be called while another call waits, which is then told."""
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes who waits for a reply, as closing would not
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(CLOSE_TIMEOUT_S)

    def close(self) -> None:
        """Stop the server and close this end."""
        self.stop()
        self._socket.close()

    def _ask(self, message: bytes, descriptor: socket.socket | None = None) -> None:
        try:
            socket.send_fds(self._socket, [message], [descriptor.fileno()] if descriptor else [])
        except OSError as error:
            raise WorkerLost("crashed") from error

    def _reply(self) -> bytes:
        wait_for(self._socket, select.POLLIN, self._process.pid, self._limits.stall_timeout_s)
        return _received(self._socket)


class Worker:
    """One child of a `ForkServer`. For one thread; `is_alive` may be asked by any."""

    def __init__(
        self, pid: int, server: ForkServer, connection: socket.socket, max_at_once: int, stall_timeout_s: float
    ) -> None:
        self.pid, self.server = pid, server
        self.max_at_once = max_at_once
        """Requests it may have at a time."""
        self.num_answered = 0
        self.peak_bytes = 0
        """The most address space it has used."""
        self._socket, self._stall_timeout_s = connection, stall_timeout_s
        self._socket.setblocking(False)
        self._received = b""

    @property
    def is_alive(self) -> bool:
        descriptor = self._socket.fileno()  # its thread may close it at any time
        return descriptor >= 0 and not _events(descriptor, 0, 0.0) & (select.POLLHUP | select.POLLNVAL)

    def send(self, request: bytes) -> None:
        """Hand it a request, a line. Raises `WorkerLost`."""
        rest = memoryview(request)
        while rest:
            wait_for(self._socket, select.POLLOUT, self.pid, self._stall_timeout_s)
            try:
                rest = rest[self._socket.send(rest) :]
            except OSError as error:
                raise WorkerLost("crashed") from error

    def reply(self, timeout_s: float) -> dict[str, Any] | None:
        """Return its next reply, as `loop` describes; None when there is none in `timeout_s`. Raises `WorkerLost`."""
        end = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            if not _events(self._socket.fileno(), select.POLLIN, max(0.0, end - time.monotonic())):
                return None
            self._received += _received(self._socket)
        line, _, self._received = self._received.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        self.peak_bytes = reply["peak_bytes"]
        self.num_answered += 1
        return reply

    def processor_seconds(self) -> float:
        """Return the processor time it has used. Raises `WorkerLost`."""
        return _processor_seconds(self.pid)

    def close(self) -> None:
        """Close this end; the worker is ended by its server."""
        self._socket.close()


class WorkerSource:
    """Gives out workers and takes them back, from any thread; starts a server when there is none."""

    def __init__(self, functions: Sequence[RewardSpec] | None, limits: WorkerLimits) -> None:
        """See `grading_workers.GradingWorkers`."""
        self._functions, self._limits = functions, limits
        self._lock = threading.Lock()
        self._server: ForkServer | None = None
        self._failure: Exception | None = None
        self._is_closed = False

    def fork(self) -> Worker:
        """Return a new worker.

        Raises:
            GraderFailed: none can be started, now or before.
            FunctionRefused: a reward function cannot be used.
            SourceClosed: it is closed.
        """
        reason = ""
        with self._lock:
            for _ in range(NUM_STARTS):
                self._check()
                try:
                    return self._started().fork()
                except FunctionRefused as refused:
                    self._drop()
                    self.refuse(refused)
                except (WorkerLost, OSError) as error:
                    reason = str(error)
                    self._drop()
        self.fail(f"no grading worker starts ({reason})")

    def end(self, worker: Worker) -> int | None:
        """End a worker and return its wait status; None when its server, and it with that, is gone already."""
        with self._lock:
            worker.close()
            if self._server is None or worker.server is not self._server:
                return None
            try:
                return self._server.end(worker)
            except WorkerLost:
                self._drop()
                return None

    def fail(self, reason: str) -> NoReturn:
        """Give no more workers. Raises `GraderFailed`, or `SourceClosed` where closing it was the reason."""
        what = "import math_verify" if self._functions is None else "import megatron_p2o.rewards.functions"
        self.refuse(
            GraderFailed(
                f"{reason}: run `{sys.executable} -c '{what}'`, read what graders wrote to standard error, see that "
                "the machine has memory and processes to spare, and grading.memory_limit_mib"
            )
        )

    def refuse(self, failure: Exception) -> NoReturn:
        """Give no more workers. Raises `failure`, or `SourceClosed` where closing it was the reason."""
        self._failure = failure
        self._check()
        raise AssertionError("it has failed")

    def close(self) -> None:
        """End all workers, and wake every caller that waits for one."""
        self._is_closed = True
        server = self._server
        if server is not None:
            server.stop()
        if self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
            self._drop()
            self._lock.release()

    def _check(self) -> None:
        if self._is_closed:
            raise SourceClosed
        if self._failure is not None:
            raise self._failure

    def _started(self) -> ForkServer:
        if self._server is None:
            self._server = ForkServer(self._functions, self._limits)
            self._server.wait_until_ready()
        return self._server

    def _drop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()


def wait_for(connection: socket.socket, event: int, pid: int, stall_timeout_s: float) -> None:
    """Return when `event` is there or the other end is closed, however long that takes on a busy machine.

    Raises `WorkerLost` when process `pid` has had no processor time at all in the last of several `stall_timeout_s`: it
    is stopped, or waits for what never comes.
    """
    used_s = -1.0
    while not _events(connection.fileno(), event, stall_timeout_s):
        used_before_s, used_s = used_s, _processor_seconds(pid)
        if used_s == used_before_s:
            raise WorkerLost("stalled")


def _received(connection: socket.socket) -> bytes:
    try:
        received = connection.recv(MAX_REPLY_BYTES)
    except OSError as error:
        raise WorkerLost("crashed") from error
    if not received:
        raise WorkerLost("crashed")
    return received


def _events(descriptor: int, event: int, timeout_s: float) -> int:
    poll = select.poll()
    poll.register(descriptor, event)
    return sum(events for _, events in poll.poll(timeout_s * 1000))


def _processor_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess as error:
        raise WorkerLost("crashed") from error
    return times.user + times.system
