"""Worker processes behind futures. A worker that exceeds its limits is killed, and its request is undecided.

What is limited is processor time. How long an answer takes on a busy machine decides nothing, up to a backstop.
"""

import math
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import fields
from typing import Any

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.functions import RewardSpec
from megatron_p2o.rewards.workers.lane import Job, Jobs, Lane, LaneEvents
from megatron_p2o.rewards.workers.processes import CLOSE_TIMEOUT_S, GraderFailed, WorkerLimits, WorkerSource
from megatron_p2o.types import CORRECT, Grade

STALL_TIMEOUT_S = 120.0
"""Time without processor time after which a process that only computes is stopped, or hangs."""

FEWEST_WORKERS, MOST_WORKERS = 2, 64
"""Bounds of the number of workers that follows the cores: each is a thread of rank 0, too."""

Raised = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Called from any thread with a request and the reply of `loop` which says what it raised."""


class GradingWorkers:
    """Grades requests in worker processes, each driven by one thread. Nothing starts before the first request."""

    def __init__(
        self,
        functions: Sequence[RewardSpec] | None,
        limits: WorkerLimits,
        num_workers: int,
        known: Mapping[str, Any],
        recycle_after: int = 5000,
        raised: Raised = lambda request, reply: None,
    ) -> None:
        """Prepare the workers.

        Args:
            functions: the reward functions that workers call; None: they compare by algebra.
            num_workers: processes, and threads that wait for them.
            known: a request that every worker in order answers with a reward of 1.
            recycle_after: requests after which a worker is replaced: sympy's caches grow.

        Raises:
            ValueError: a limit is not positive and finite.
        """
        for field in fields(limits):
            limit = getattr(limits, field.name)
            if not (math.isfinite(limit) and limit > 0):
                raise ValueError(f"{field.name}={limit} must be positive and finite")
        self._known = known
        self._source = WorkerSource(functions, limits)
        self._jobs: Jobs = queue.Queue()
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        events = LaneEvents(count=self._count, raised=raised)
        self._lanes = [Lane(self._source, limits, recycle_after, known, events) for _ in range(num_workers)]
        self._threads = [threading.Thread(target=lane.serve, args=(self._jobs,), daemon=True) for lane in self._lanes]
        self._is_started = self._is_closed = False

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests by outcome: graded, raised, out_of_time, timed_out, out_of_memory, crashed, stalled; how many were
        tried again, and workers that were recycled."""
        with self._lock:
            return dict(self._counts)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers alive."""
        workers = [lane.worker for lane in self._lanes]
        return [worker.pid for worker in workers if worker is not None and worker.is_alive]

    def submit(self, request: Mapping[str, Any]) -> Future[Grade]:
        """Have a worker grade a request, a JSON object.

        The future raises `GraderFailed` when no worker works any more, `FunctionRefused` when a reward function cannot
        be used.

        Raises:
            RuntimeError: the workers are closed.
        """
        job = Job(request=request, future=Future())
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
        """Return once a worker has graded a known answer. Raises as the futures of `submit`."""
        grade = self.submit(self._known).result()
        if grade != CORRECT:
            raise GraderFailed(f"a grading worker does not grade a known answer: {grade.reason or grade.reward}")

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

    def _count(self, outcome: str) -> None:
        with self._lock:
            self._counts[outcome] += 1


def num_workers_here(config: GradingConfig) -> int:
    """Return `grading.num_workers`; unless it says so, half of the cores this process may use, within bounds."""
    if config.num_workers is not None:
        return config.num_workers
    return min(MOST_WORKERS, max(FEWEST_WORKERS, len(os.sched_getaffinity(0)) // 2))


def worker_limits(config: GradingConfig, stall_timeout_s: float = STALL_TIMEOUT_S) -> WorkerLimits:
    return WorkerLimits(
        memory_limit_mib=config.memory_limit_mib,
        deadline_s=config.deadline_s,
        timeout_s=config.timeout_s,
        stall_timeout_s=stall_timeout_s,
    )
