"""Worker processes behind futures. A worker that exceeds its limits is killed, and its request is undecided.

What is limited is processor time. How long an answer takes on a busy machine decides nothing.
"""

import json
import math
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_p2o.rewards.workers import CLOSE_TIMEOUT_S, GraderFailed, SourceClosed, Worker, WorkerLost, WorkerSource
from megatron_p2o.types import CORRECT, INCORRECT, Grade

STALL_TIMEOUT_S = 120.0
"""A process that is to do something and gets no processor time for so long is stopped, or hangs."""

WORN_SHARE = 0.5
"""Share of the memory limit above which a worker is replaced before its next request."""

KNOWN = ("x+1", "1+x")
"""Gold and answer that every worker in order calls equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    request: bytes
    future: Future[Grade]


class WorkerPool:
    """Compares answers in worker processes, each driven by one thread. Nothing starts before the first request."""

    def __init__(
        self,
        num_workers: int,
        deadline_s: float,
        memory_limit_mib: int,
        recycle_after: int = 5000,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        """Prepare a pool.

        Args:
            num_workers: processes, and threads that wait for them.
            deadline_s: of processor time; a worker that takes more for one request is killed, which is undecided.
            memory_limit_mib: address-space limit of a worker.
            recycle_after: requests after which a worker is replaced: sympy's caches grow.
            stall_timeout_s: a worker that gets no processor time for so long is replaced and asked again.

        Raises:
            ValueError: a time is not positive and finite.
        """
        for name, limit in (("deadline_s", deadline_s), ("stall_timeout_s", stall_timeout_s)):
            if not (math.isfinite(limit) and limit > 0):
                raise ValueError(f"{name}={limit} must be positive and finite")
        self._source = WorkerSource(memory_limit_mib, deadline_s, stall_timeout_s)
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        worn_bytes = int(WORN_SHARE * (memory_limit_mib << 20))
        self._lanes = [_Lane(self._source, recycle_after, worn_bytes, self._count) for _ in range(num_workers)]
        self._threads = [threading.Thread(target=self._serve, args=(lane,), daemon=True) for lane in self._lanes]
        self._is_started = self._is_closed = False

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests by outcome: correct, incorrect, out_of_time, out_of_memory, crashed, stalled; how many were tried
        again, and workers that were recycled."""
        with self._lock:
            return dict(self._counts)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive."""
        workers = [lane.worker for lane in self._lanes]
        return [worker.pid for worker in workers if worker is not None and worker.is_alive]

    def submit(self, gold: str, answers: Sequence[str]) -> Future[Grade]:
        """Grade whether every answer equals `gold`. The future raises `GraderFailed` when no worker works any more.

        Raises:
            RuntimeError: the pool is closed.
        """
        job = _Job(request=_request(gold, answers), future=Future())
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the grader is closed: submit before closing it")
            self._jobs.put(job)
            if not self._is_started:
                self._is_started = True
                for thread in self._threads:
                    thread.start()
        return job.future

    def check(self) -> None:
        """Return once a worker has graded a known answer. Raises `GraderFailed` when none does."""
        if self.submit(KNOWN[0], [KNOWN[1]]).result() != CORRECT:
            raise GraderFailed(f"a grading worker does not find {KNOWN[1]} equal to {KNOWN[0]}")

    def close(self) -> None:
        """End the workers. Waiting requests are undecided."""
        with self._lock:
            self._is_closed = True
        self._source.close()
        for _ in self._threads:
            self._jobs.put(None)
        if self._is_started:
            for thread in self._threads:
                thread.join(CLOSE_TIMEOUT_S)

    def _serve(self, lane: "_Lane") -> None:
        """Answer jobs until the pool closes."""
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                grade = lane.grade(job.request)
            except SourceClosed:
                job.future.set_result(Grade.undecided("the grader was closed"))
            except (
                Exception
            ) as error:  # the border of a thread: who waits for the grade must hear of it, whatever it is
                job.future.set_exception(error)
            else:
                job.future.set_result(grade)
        lane.discard()

    def _count(self, outcome: str) -> None:
        with self._lock:
            self._counts[outcome] += 1


class _Lane:
    """One worker after the other, asked by one thread."""

    def __init__(self, source: WorkerSource, recycle_after: int, worn_bytes: int, count: Callable[[str], None]) -> None:
        self._source, self._recycle_after, self._worn_bytes, self._count = source, recycle_after, worn_bytes, count
        self.worker: Worker | None = None

    def grade(self, request: bytes) -> Grade:
        """Return the grade of a request; one that a worker did not decide is given to a second, fresh one, unless it
        used up its processor time: it would do so again."""
        outcome = self._outcome(request)
        if outcome in ("crashed", "stalled", "out_of_memory"):
            self._count("tried_again")
            outcome = self._outcome(request)
        self._count(outcome)
        if outcome == "correct" or outcome == "incorrect":
            return CORRECT if outcome == "correct" else INCORRECT
        if outcome != "out_of_time":
            self._check(outcome)
        return Grade.undecided(outcome)

    def discard(self) -> int | None:
        """End the worker, if there is one; return its wait status where it is known."""
        worker, self.worker = self.worker, None
        return self._source.end(worker) if worker is not None else None

    def _outcome(self, request: bytes) -> str:
        try:
            outcome = self._usable_worker().ask(request)
        except WorkerLost as lost:
            status = self.discard()
            return "out_of_time" if status is not None and _used_up_its_time(status) else str(lost)
        if outcome == "out_of_memory":
            self.discard()
        return outcome

    def _usable_worker(self) -> Worker:
        """Return a worker that is alive and not worn out, a fresh one if need be."""
        worker = self.worker
        if worker is not None and worker.is_alive:
            if worker.num_answered < self._recycle_after and worker.peak_bytes <= self._worn_bytes:
                return worker
            self._count("recycled")
        self.discard()
        self.worker = self._source.fork()
        return self.worker

    def _check(self, outcome: str) -> None:
        """Raise `GraderFailed` when it was not the answer, lost twice, but the workers: they lose a known one too."""
        known = self._outcome(_request(KNOWN[0], [KNOWN[1]]))
        if known != "correct":
            self._source.fail(f"grading workers lose every answer ({outcome}; a known one: {known})")


def _request(gold: str, answers: Sequence[str]) -> bytes:
    return json.dumps({"gold": gold, "answers": list(answers)}).encode() + b"\n"


def _used_up_its_time(wait_status: int) -> bool:
    return os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGPROF
