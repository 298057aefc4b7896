"""How a worker answers requests: one JSON object a line, {"id": ..., ...}, and one line of reply to each.

A reply holds the id, "outcome" ("graded", "raised", "timed_out", "out_of_memory" or "refused"), "peak_bytes", the most
address space the process has had, and either the grade or a reason, with a traceback where something was raised.

The kernel ends the process (SIGPROF) when it has used up the processor time of an answer since the last reply: alarms
that a process handles itself do not interrupt arithmetic on long integers.
"""

import asyncio
import json
import os
import signal
import socket
import traceback
from asyncio import StreamWriter, Task
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # numpy would double the memory of workers that only do algebra
    from megatron_p2o.types import Grade

MAX_REQUEST_BYTES = 1 << 30
"""A stream without line ends is a bug."""

MAX_REASON_CHARACTERS = 2_000
MAX_FEEDBACK_CHARACTERS = 16_000
MAX_TRACEBACK_CHARACTERS = 8_000

KNOWN = "is_known"
"""Field of a request that every worker in order answers with a reward of 1."""


class Program(Protocol):
    """What grading workers do."""

    @property
    def max_at_once(self) -> int:
        """Requests a worker may have at a time; more than 1 where most of them wait for something else."""
        ...

    def begin(self) -> None:
        """Get ready, in a worker. Raises `ValueError` when that cannot be; then every request is refused."""
        ...

    async def grade(self, request: Mapping[str, Any]) -> "Grade | bool":
        """Return the grade of a request, or whether the answer is right. What raises leaves the answer undecided."""
        ...


class RequestLoop:
    """Answers the requests of one connection until it is closed."""

    def __init__(self, program: Program, deadline_s: float, timeout_s: float) -> None:
        self._program, self._deadline_s, self._timeout_s = program, deadline_s, timeout_s
        self._refusal = ""
        self._process_id = os.getpid()
        self._tasks: set[Task[None]] = set()

    async def serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_REQUEST_BYTES)
        try:
            self._program.begin()
        except ValueError as error:
            self._refusal = str(error)
        while line := await reader.readline():
            self._watch(True)
            task = asyncio.create_task(self._answer(json.loads(line), writer))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def _answer(self, request: Mapping[str, Any], writer: StreamWriter) -> None:
        outcome = await self._outcome(request)
        if os.getpid() != self._process_id:  # the function has forked: a child that came back here has no say
            os._exit(0)
        reply = {"id": request["id"], **outcome, "peak_bytes": peak_bytes()}
        writer.write(json.dumps(reply).encode() + b"\n")
        await writer.drain()

    async def _outcome(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._refusal:
            return {"outcome": "refused", "reason": self._refusal}
        if request.get(KNOWN) is True:
            return graded(True)
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return graded(await self._program.grade(request))
        except MemoryError:
            return {"outcome": "out_of_memory"}
        except Exception as error:  # the border to code of others: an answer it fails on is undecided
            if isinstance(error, TimeoutError) and limit.expired():
                return {"outcome": "timed_out"}
            return raised(error)
        except asyncio.CancelledError as error:  # raised by a function, unless the loop ends
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return raised(error)

    def _ended(self, task: Task[None]) -> None:
        self._tasks.discard(task)
        self._watch(bool(self._tasks))

    def _watch(self, is_busy: bool) -> None:
        """Allow the processor time of one answer from now on."""
        signal.setitimer(signal.ITIMER_PROF, self._deadline_s if is_busy else 0)


def graded(grade: "Grade | bool") -> dict[str, Any]:
    if isinstance(grade, bool):
        return {"outcome": "graded", "reward": float(grade), "reason": "", "feedback": ""}
    return {
        "outcome": "graded",
        "reward": None if grade.reward is None else float(grade.reward),  # a function's may be numpy's
        "reason": grade.reason[:MAX_REASON_CHARACTERS],
        "feedback": grade.feedback[:MAX_FEEDBACK_CHARACTERS],
    }


def raised(error: BaseException) -> dict[str, Any]:
    """Return the reply on an exception; its kind is its class and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    text = "".join(traceback.format_exception(error))
    return {
        "outcome": "raised",
        "kind": type(error).__name__ + place,
        "reason": f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS],
        "traceback": text[-MAX_TRACEBACK_CHARACTERS:],
    }


def peak_bytes() -> int:
    """Return the most address space this process has had."""
    with open("/proc/self/status") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmPeak:"))
    return peak_kib * 1024
