"""The parent's side of grading workers: the server that forks them, one worker, and the source of new ones."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import psutil

from megatron_p2o.processes import child_environment

CLOSE_TIMEOUT_S = 10.0
"""Longest wait for a process that was told to end, and for the thread that drives a worker."""

NUM_STARTS = 3
"""Servers that are started for one worker before the source gives up."""

MAX_REPLY_BYTES = 64


class WorkerLost(Exception):
    """A worker, or the server that forks them, cannot answer; the message is how it was lost."""


class GraderFailed(RuntimeError):
    """Nothing can be graded any more."""


class SourceClosed(Exception):
    """The source was closed while a worker was wanted."""


class ForkServer:
    """A warm process that forks workers (`fork_server.py`). Calls must not overlap, except `stop`.

    Linux kills it when the thread that started it ends, and the workers with it.
    """

    def __init__(self, memory_limit_mib: int, deadline_s: float, stall_timeout_s: float) -> None:
        """Start the process. Raises `OSError` when the machine has none to spare."""
        self._stall_timeout_s = stall_timeout_s
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = str(Path(__file__).with_name("fork_server.py"))
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", program, str(os.getpid()), str(memory_limit_mib), str(deadline_s)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=child_environment(),
                    process_group=0,  # Ctrl-C in the terminal is for the parent
                )
        except OSError:
            self._socket.close()
            raise

    def wait_until_ready(self) -> None:
        """Return when math-verify is loaded and warm. Raises `WorkerLost`."""
        self._reply()

    def fork(self) -> "Worker":
        """Return a new worker. Raises `WorkerLost`."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._ask(b"fork", theirs)
            return Worker(int(self._reply()), self, ours, self._stall_timeout_s)
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
        wait_for(self._socket, select.POLLIN, self._process.pid, self._stall_timeout_s)
        return _received(self._socket)


class Worker:
    """One child of a `ForkServer`. For one thread; `is_alive` may be asked by any."""

    def __init__(self, pid: int, server: ForkServer, connection: socket.socket, stall_timeout_s: float) -> None:
        self.pid, self.server = pid, server
        self.num_answered = 0
        self.peak_bytes = 0
        """The most address space it has used."""
        self._socket, self._stall_timeout_s = connection, stall_timeout_s
        self._socket.setblocking(False)

    @property
    def is_alive(self) -> bool:
        descriptor = self._socket.fileno()  # its thread may close it at any time
        return descriptor >= 0 and not _events(descriptor, 0, 0.0) & (select.POLLHUP | select.POLLNVAL)

    def ask(self, request: bytes) -> str:
        """Return its verdict on a line: "correct", "incorrect" or "out_of_memory". Raises `WorkerLost`."""
        self._send(request)
        verdict, peak_bytes = self._line().split()
        self.peak_bytes = int(peak_bytes)
        self.num_answered += 1
        return verdict.decode()

    def close(self) -> None:
        """Close this end; the worker is ended by its server."""
        self._socket.close()

    def _send(self, request: bytes) -> None:
        rest = memoryview(request)
        while rest:
            wait_for(self._socket, select.POLLOUT, self.pid, self._stall_timeout_s)
            try:
                rest = rest[self._socket.send(rest) :]
            except OSError as error:
                raise WorkerLost("crashed") from error

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            wait_for(self._socket, select.POLLIN, self.pid, self._stall_timeout_s)
            line += _received(self._socket)
        return line


class WorkerSource:
    """Gives out workers and takes them back, from any thread; starts a server when there is none."""

    def __init__(self, memory_limit_mib: int, deadline_s: float, stall_timeout_s: float) -> None:
        """See `pool.WorkerPool`."""
        self._limits = memory_limit_mib, deadline_s, stall_timeout_s
        self._lock = threading.Lock()
        self._server: ForkServer | None = None
        self._failure = ""
        self._is_closed = False

    def fork(self) -> Worker:
        """Return a new worker.

        Raises:
            GraderFailed: none can be started, now or before.
            SourceClosed: it is closed.
        """
        reason = ""
        with self._lock:
            for _ in range(NUM_STARTS):
                self._check()
                try:
                    return self._started().fork()
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
        self._failure = (
            f"{reason}: run `{sys.executable} -c 'import math_verify'`, read what graders wrote to standard error, see "
            "that the machine has memory and processes to spare, and grading.memory_limit_mib"
        )
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
        if self._failure:
            raise GraderFailed(self._failure)

    def _started(self) -> ForkServer:
        if self._server is None:
            self._server = ForkServer(*self._limits)
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
