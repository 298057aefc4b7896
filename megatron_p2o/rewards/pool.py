"""Worker processes that can be killed at a deadline, behind futures."""

import json
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from megatron_p2o.processes import child_environment
from megatron_p2o.types import Grade

STARTUP_TIMEOUT_S = 120.0
"""Longest wait for a worker to import math-verify; about two seconds on an idle machine."""

CLOSE_TIMEOUT_S = 10.0
"""Longest wait for a killed worker and for the thread that drives it."""

WORN_SHARE = 0.5
"""Share of the memory limit above which a worker is replaced before its next request."""

logger = logging.getLogger(__name__)


class _WorkerLostError(Exception):
    """A worker cannot answer; the message is the outcome it is counted as."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    request: bytes
    future: Future[Grade]


class _Worker:
    """One child process. Used by the thread that starts it: Linux kills the child when that thread ends."""

    def __init__(self, memory_limit_mib: int) -> None:
        program = str(Path(__file__).with_name("worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-P", program, str(os.getpid()), str(memory_limit_mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            bufsize=0,
            process_group=0,  # Ctrl-C in the terminal is for the parent
        )
        self._memory_limit_bytes = memory_limit_mib << 20
        self._peak_bytes = 0
        self.num_answered = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_worn(self) -> bool:
        return self._peak_bytes > WORN_SHARE * self._memory_limit_bytes

    def wait_until_ready(self) -> None:
        try:
            self._read_line(STARTUP_TIMEOUT_S)
        except _WorkerLostError as error:
            logger.error("a grading worker did not start (%s): run `%s -c 'import math_verify'`", error, sys.executable)
            raise _WorkerLostError("not_started") from error

    def ask(self, request: bytes, deadline_s: float) -> str:
        """Return the worker's verdict: "correct", "incorrect" or "out_of_memory"."""
        assert self._process.stdin is not None, "opened as a pipe"
        try:
            self._process.stdin.write(request)  # never blocks: a pipe holds more than `MAX_REQUEST_CHARACTERS` need
        except BrokenPipeError as error:
            raise _WorkerLostError("crashed") from error
        verdict, peak_bytes = self._read_line(deadline_s).split()
        self._peak_bytes = int(peak_bytes)
        self.num_answered += 1
        return verdict

    def kill(self) -> None:
        self._process.kill()

    def discard(self) -> None:
        """Kill, reap and close; only the thread that reads from the worker may."""
        self._process.kill()
        self._process.wait(CLOSE_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None, "opened as a pipe"
            stream.close()

    def _read_line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None, "opened as a pipe"
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        received = b""
        while not received.endswith(b"\n"):
            remaining_s = max(0.0, deadline - time.monotonic())
            if not poll.poll(remaining_s * 1000):
                raise _WorkerLostError("killed")
            chunk = os.read(descriptor, 4096)
            if not chunk:
                raise _WorkerLostError("crashed")
            received += chunk
        return received.decode().strip()


class WorkerPool:
    """Compares answers in worker processes, each driven by one thread. Nothing starts before the first request."""

    def __init__(self, num_workers: int, deadline_s: float, memory_limit_mib: int, recycle_after: int = 5000) -> None:
        """Prepare a pool.

        Args:
            num_workers: processes, and threads that wait for them.
            deadline_s: a worker that takes longer for one request is killed and the grade is "error".
            memory_limit_mib: address-space limit of a worker.
            recycle_after: requests after which a worker is replaced: sympy's caches grow.
        """
        self._deadline_s = deadline_s
        self._memory_limit_mib = memory_limit_mib
        self._recycle_after = recycle_after
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(num_workers)]
        self._workers: set[_Worker] = set()
        self._counts: Counter[str] = Counter()
        self._is_started = self._is_closed = False
        self._lock = threading.Lock()

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests by outcome: correct, incorrect, killed (deadline), crashed, out_of_memory, not_started; and
        the workers that were recycled."""
        with self._lock:
            return dict(self._counts)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive."""
        with self._lock:
            return [worker.pid for worker in self._workers if worker.is_alive]

    def submit(self, gold: str, answers: Sequence[str]) -> Future[Grade]:
        """Grade whether every answer equals `gold`; the future never raises.

        Raises:
            RuntimeError: the pool is closed.
        """
        request = json.dumps({"gold": gold, "answers": list(answers)}).encode() + b"\n"
        job = _Job(request=request, future=Future())
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the grader is closed: submit before closing it")
            self._jobs.put(job)
            if not self._is_started:
                self._is_started = True
                for thread in self._threads:
                    thread.start()
        return job.future

    def close(self) -> None:
        """Kill the workers; what is still waiting is graded "error"."""
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.kill()
        for _ in self._threads:
            self._jobs.put(None)
        if self._is_started:
            for thread in self._threads:
                thread.join(CLOSE_TIMEOUT_S)

    def _serve(self) -> None:
        """Answer jobs with one worker after the other until the pool closes."""
        worker: _Worker | None = None
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            worker, outcome = self._usable(worker), "not_started"
            if worker is not None:
                outcome = self._outcome(worker, job)
            if outcome not in ("correct", "incorrect"):
                self._discard(worker)
                worker = None
            self._count(outcome)
            job.future.set_result(outcome if outcome in ("correct", "incorrect") else "error")
        self._discard(worker)

    def _outcome(self, worker: _Worker, job: _Job) -> str:
        try:
            if worker.num_answered == 0:
                worker.wait_until_ready()
            return worker.ask(job.request, self._deadline_s)
        except _WorkerLostError as error:
            return str(error)

    def _usable(self, worker: _Worker | None) -> _Worker | None:
        """Return a worker that is alive and not worn out, a fresh one if need be; None when the pool is closed or
        the machine has no process to spare."""
        if worker is not None and worker.is_alive:
            if worker.num_answered < self._recycle_after and not worker.is_worn:
                return worker
            self._count("recycled")
        self._discard(worker)
        with self._lock:
            if self._is_closed:
                return None
            try:
                worker = _Worker(self._memory_limit_mib)
            except OSError as error:
                logger.error("a grading worker did not start: %s", error)
                return None
            self._workers.add(worker)
        return worker

    def _discard(self, worker: _Worker | None) -> None:
        if worker is not None:
            with self._lock:
                self._workers.discard(worker)
            worker.discard()

    def _count(self, outcome: str) -> None:
        with self._lock:
            self._counts[outcome] += 1
