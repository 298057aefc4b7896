"""One worker after the other, asked by one thread: what becomes of a request whose worker is lost."""

import json
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_p2o.rewards.workers.processes import (
    FunctionRefused,
    SourceClosed,
    Worker,
    WorkerLimits,
    WorkerLost,
    WorkerSource,
)
from megatron_p2o.types import Grade

WORN_SHARE = 0.5
"""Share of the memory limit above which a worker is replaced before its next request."""

POLL_S = 0.05
"""How long a worker that may have more requests is waited for before the queue is looked into."""

UNDECIDED = {
    "out_of_time": "it used up its processor time (grading.deadline_s)",
    "timed_out": "it took too long (grading.timeout_s)",
    "out_of_memory": "it needed too much memory (grading.memory_limit_mib)",
    "crashed": "two grading workers died of it",
    "stalled": "two grading workers hung",
}
"""Outcome without a grade to the reason of the undecided grade."""

AGAIN = ("crashed", "stalled", "out_of_memory")
"""Outcomes that may be no fault of the answer: a fresh worker is asked once more."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A request and who waits for its grade."""

    request: Mapping[str, Any]
    future: Future[Grade]


Jobs = queue.Queue[Job | None]
"""None ends the thread that takes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneEvents:
    """Who is told what happens."""

    count: Callable[[str], None]
    """Called with the outcome of each request, and what else is counted."""
    raised: Callable[[Mapping[str, Any], Mapping[str, Any]], None]
    """Called with a request and the reply which says what it raised."""


class Lane:
    """Serves jobs with one worker at a time."""

    def __init__(
        self,
        source: WorkerSource,
        limits: WorkerLimits,
        recycle_after: int,
        known: Mapping[str, Any],
        events: LaneEvents,
    ) -> None:
        """Args:
        recycle_after: requests after which a worker is replaced.
        known: a request that every worker in order answers with a reward of 1.
        """
        self._source, self._limits, self._recycle_after = source, limits, recycle_after
        self._known, self._events = known, events
        self.worker: Worker | None = None

    def serve(self, jobs: Jobs) -> None:
        """Answer jobs until the workers are closed."""
        while (job := jobs.get()) is not None:
            self._serve_from(job, jobs)
        self.discard()

    def discard(self) -> int | None:
        """End the worker, if there is one; return its wait status where it is known."""
        worker, self.worker = self.worker, None
        return self._source.end(worker) if worker is not None else None

    def _serve_from(self, first: Job, jobs: Jobs) -> None:
        """Answer a job, and all that come while the worker has any, as many at once as it takes.

        Where it is lost each of those it had is asked about alone: the one that is to blame costs no other its grade.
        """
        in_flight: dict[int, Job] = {}
        try:
            worker = self._usable_worker()
            try:
                self._exchange(worker, first, jobs, in_flight)
            except WorkerLost as lost:
                outcome = self._outcome_of_loss(lost)
                left, in_flight = in_flight, {}
                first_outcome = outcome if len(left) == 1 else None
                for job in left.values():
                    self._settle(job, lambda job=job: self._grade(job.request, first_outcome))
        except BaseException as error:  # the border of a thread: who waits for a grade must hear of it, whatever it is
            for job in [first, *in_flight.values()]:
                self._fail(job, error)

    def _exchange(self, worker: Worker, first: Job, jobs: Jobs, in_flight: dict[int, Job]) -> None:
        """Give the worker the first job and those that come, and settle them, until it has none left.

        Raises `WorkerLost`; then `in_flight` holds what it had.
        """
        number, patience = 0, _Patience(worker, self._limits)
        coming: Job | None = first
        while coming is not None or in_flight:
            if coming is not None:
                if coming.future.set_running_or_notify_cancel():
                    in_flight[number] = coming
                    worker.send(line_of(coming.request, number))
                    number += 1
            elif (reply := self._reply(worker, patience, has_room=len(in_flight) < worker.max_at_once)) is not None:
                patience.renew()
                if reply["outcome"] == "out_of_memory":
                    raise WorkerLost("out_of_memory")
                job = in_flight.pop(reply["id"])
                self._settle(job, lambda job=job, reply=reply: self._grade_of(job.request, reply))
            coming = self._next(worker, jobs) if 0 < len(in_flight) < worker.max_at_once else None

    def _next(self, worker: Worker, jobs: Jobs) -> Job | None:
        """Return a job that waits, unless the worker is to be replaced before it gets another."""
        if self._is_worn(worker):
            return None
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            return None
        if job is None:
            jobs.put(None)  # for `serve`, once this worker's requests are answered
        return job

    def _reply(self, worker: Worker, patience: "_Patience", *, has_room: bool) -> dict[str, Any] | None:
        reply = worker.reply(POLL_S if has_room else patience.window_s)
        if reply is None:
            patience.check()
        return reply

    def _grade(self, request: Mapping[str, Any], outcome: str | None) -> Grade:
        """Return the grade of a request that a worker may have been lost over (`outcome`), asking fresh ones.

        One that was not decided is given to a second worker, unless it used up its time: it would do so again.
        """
        reply: dict[str, Any] = {"outcome": outcome} if outcome is not None else self._asked_alone(request)
        if reply["outcome"] in AGAIN:
            self._events.count("tried_again")
            reply = self._asked_alone(request)
        if reply["outcome"] in AGAIN:
            self._check(reply["outcome"])
        return self._grade_of(request, reply)

    def _asked_alone(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply of a worker that has nothing else to do; only an outcome where it was lost."""
        worker = self._usable_worker()
        try:
            worker.send(line_of(request, 0))
            patience = _Patience(worker, self._limits)
            while (reply := self._reply(worker, patience, has_room=False)) is None:
                pass
        except WorkerLost as lost:
            return {"outcome": self._outcome_of_loss(lost)}
        if reply["outcome"] == "out_of_memory":
            self.discard()
        return reply

    def _grade_of(self, request: Mapping[str, Any], reply: Mapping[str, Any]) -> Grade:
        """Return the grade in a reply. Raises `FunctionRefused`."""
        outcome = reply["outcome"]
        if outcome == "refused":
            self._source.refuse(FunctionRefused(reply["reason"]))
        self._events.count(outcome)
        if outcome == "graded":
            return Grade(reward=reply["reward"], reason=reply["reason"], feedback=reply["feedback"])
        if outcome == "raised":
            self._events.raised(request, reply)
            return Grade.undecided(reply["reason"])
        return Grade.undecided(UNDECIDED[outcome])

    def _outcome_of_loss(self, lost: WorkerLost) -> str:
        status = self.discard()
        return "out_of_time" if status is not None and _used_up_its_time(status) else str(lost)

    def _usable_worker(self) -> Worker:
        """Return a worker that is alive and not worn out, a fresh one if need be."""
        worker = self.worker
        if worker is not None and worker.is_alive:
            if not self._is_worn(worker):
                return worker
            self._events.count("recycled")
        self.discard()
        self.worker = self._source.fork()
        return self.worker

    def _is_worn(self, worker: Worker) -> bool:
        worn_bytes = WORN_SHARE * (self._limits.memory_limit_mib << 20)
        return worker.num_answered >= self._recycle_after or worker.peak_bytes > worn_bytes

    def _check(self, outcome: str) -> None:
        """Raise `GraderFailed` when it was not the answer, lost twice, but the workers: they lose a known one too."""
        known = self._asked_alone(self._known)
        if known.get("reward") != 1:
            self._source.fail(f"grading workers lose every answer ({outcome}; a known one: {known['outcome']})")

    def _settle(self, job: Job, grade: Callable[[], Grade]) -> None:
        try:
            job.future.set_result(grade())
        except Exception as error:  # the border of a request: who waits for its grade must hear of it, whatever it is
            self._fail(job, error)

    def _fail(self, job: Job, error: BaseException) -> None:
        if job.future.done():
            return
        if isinstance(error, SourceClosed):
            job.future.set_result(Grade.undecided("the grader was closed"))
        else:
            job.future.set_exception(error)


class _Patience:
    """How long a worker that has requests is waited for."""

    def __init__(self, worker: Worker, limits: WorkerLimits) -> None:
        self._worker = worker
        # One that has several ends each of them itself at the limit.
        self._timeout_s = limits.timeout_s if worker.max_at_once == 1 else 2 * limits.timeout_s
        self._stall_timeout_s = limits.stall_timeout_s
        self.renew()

    @property
    def window_s(self) -> float:
        """Seconds until `check` has something to say."""
        return max(0.0, min(self._next_look, self._end) - time.monotonic())

    def renew(self) -> None:
        """Begin anew: it has answered."""
        now = time.monotonic()
        self._end, self._next_look = now + self._timeout_s, now + self._stall_timeout_s
        self._used_s = -1.0

    def check(self) -> None:
        """Raise `WorkerLost` when it has taken too long, or had no processor time in the last of several windows."""
        now = time.monotonic()
        if now >= self._end:
            raise WorkerLost("timed_out")
        if now >= self._next_look:
            used_before_s, self._used_s = self._used_s, self._worker.processor_seconds()
            self._next_look = now + self._stall_timeout_s
            if self._used_s == used_before_s:
                raise WorkerLost("stalled")


def line_of(request: Mapping[str, Any], number: int) -> bytes:
    return json.dumps({**request, "id": number}).encode() + b"\n"


def _used_up_its_time(wait_status: int) -> bool:
    return os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGPROF
