"""A process in a sandbox: its limits, what it says, and how it ends.

What ends it depends on what it does, not on how busy the machine is: its processor time, how much it writes, and how
often it is found waiting for nothing that could come.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_p2o.rewards.sandbox.namespaces import ENVIRONMENT, bubblewrap, namespaces_command, plain_command

SAMPLE_S = 0.25
"""Time between two looks at what a process does."""

LONGEST_S = 900.0
"""A process that neither computes nor sleeps for so long is not the answer's fault: the machine does not run it."""

READ_BYTES = 1 << 16
MAX_ERROR_BYTES = 1 << 14
"""Bytes of standard error that are kept, from its end."""

EVASION_S = 0.5
"""Processor time beyond the limit that shows that an answer ignores the signal by which the kernel ends it."""

OUT_OF_PROCESSOR_TIME = 128 + signal.SIGXCPU
KILLED = 128 + signal.SIGKILL
"""Exit status of what was killed. An answer cannot exit with it: the filter of system calls does not let it."""

WAITING_STATES = frozenset("StTZXI")
"""States of a thread in /proc that mean waiting: asleep, stopped or gone. R runs or is ready to; D waits for a disk."""

Ending = Literal["exited", "processor_time", "output", "waiting"]
"""How a process ended: by itself (also by a crash), or because it used up its processor time, wrote more than it may,
or waited."""


class SandboxFailed(RuntimeError):
    """The sandbox cannot be made, or was lost: that says nothing about the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one process of an answer may take."""

    processor_s: int
    memory_mib: int
    scratch_mib: int
    """Files in /tmp, all together."""
    output_bytes: int
    """Standard output and standard error, or its replies, together."""
    waiting_samples: int = 40
    """Looks, `SAMPLE_S` apart, that may find every thread asleep with nothing to come: ten seconds of sleep in all."""

    def as_request(self) -> dict[str, int]:
        memory = self.memory_mib << 20
        files = {"FSIZE": self.scratch_mib << 20, "NOFILE": 64}
        return {"CPU": self.processor_s, "AS": memory, **files, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessEnd:
    """How a process ended."""

    ending: Ending
    status: int
    """Exit status; 128 and the signal's number after a signal."""
    output: bytes
    errors: bytes
    """The end of standard error."""


class SandboxedProcess:
    """One process that runs Python in a sandbox. For one thread; close it."""

    def __init__(self, request: dict[str, Any], limits: Limits, has_namespaces: bool) -> None:
        """Start it; `request` is what `inside/runner.py` reads. Raises `SandboxFailed`."""
        self._limits = limits
        self._num_bytes = 0
        self._num_waiting = 0
        self._ending: Ending = "exited"
        self._buffer, self._errors = bytearray(), bytearray()
        self._selector = selectors.DefaultSelector()
        surroundings = {"has_namespaces": has_namespaces, "parent": os.getpid(), "limits": limits.as_request()}
        encoded = json.dumps({**request, **surroundings}).encode()
        self._to_send = memoryview(b"%08d" % len(encoded) + encoded)
        self._is_last = False
        self._process = self._started(has_namespaces)

    def _started(self, has_namespaces: bool) -> "subprocess.Popen[bytes]":
        self._ready, theirs = os.pipe()
        try:
            command = self._command(has_namespaces, theirs)
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(theirs,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._ready)
            raise SandboxFailed(f"the sandbox does not start: {error}") from error
        finally:
            os.close(theirs)
        assert process.stdin and process.stdout and process.stderr
        for stream in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(stream.fileno(), False)
        self._pidfd = os.pidfd_open(process.pid)
        self._selector.register(process.stdin, selectors.EVENT_WRITE)
        for readable in (process.stdout, process.stderr, self._ready, self._pidfd):
            self._selector.register(readable, selectors.EVENT_READ)
        return process

    def _command(self, has_namespaces: bool, ready: int) -> list[str]:
        if not has_namespaces:
            return plain_command(ready)
        program = bubblewrap()
        if program is None:
            raise SandboxFailed("bubblewrap is not installed")
        return namespaces_command(program, self._limits.scratch_mib, ready)

    def __enter__(self) -> "SandboxedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        """Return when its limits hold and the answer is about to run. Raises `SandboxFailed`."""
        said, deadline = b"", time.monotonic() + LONGEST_S
        while not said:
            if time.monotonic() > deadline:
                raise SandboxFailed(f"the sandbox was not ready within {LONGEST_S:g} s")
            events = {key.fileobj for key, _ in self._turn(SAMPLE_S)}
            if self._ready in events:
                said = os.read(self._ready, 16)
                if said != b"ready":
                    self._drain()
                    told = bytes(self._errors).decode(errors="replace").strip()
                    raise SandboxFailed(f"the sandbox cannot be made: {told or 'it ended without a word'}")
            elif self._pidfd in events:
                self._selector.unregister(self._pidfd)
        self._selector.unregister(self._ready)
        os.close(self._ready)
        self._ready = -1

    def finish(self, standard_input: bytes) -> ProcessEnd:
        """Return how a program ended that was given `standard_input`, and what it wrote. Raises `SandboxFailed`."""
        self._to_send = memoryview(bytes(self._to_send) + standard_input)
        self._is_last = True
        self.wait_until_ready()
        self._run_until(lambda: False)
        return self._ended()

    def start(self) -> "dict[str, Any] | ProcessEnd":
        """Return the first message of a process that speaks in lines, or how it ended. Raises `SandboxFailed`."""
        self.wait_until_ready()
        return self.receive()

    def send(self, message: dict[str, Any]) -> None:
        """Send a line of JSON with the next `receive`."""
        self._to_send = memoryview(bytes(self._to_send) + json.dumps(message).encode() + b"\n")
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed and stdin not in self._selector.get_map():
            self._selector.register(stdin, selectors.EVENT_WRITE)

    def receive(self) -> "dict[str, Any] | ProcessEnd":
        """Return the next line of JSON, {"error": ...} for what is none, or how the process ended."""
        self._run_until(lambda: b"\n" in self._buffer)
        line, newline, rest = bytes(self._buffer).partition(b"\n")
        if not newline:
            return self._ended()
        self._buffer = bytearray(rest)
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        return message if isinstance(message, dict) else {"error": "the answer's process wrote no reply"}

    def close(self) -> None:
        """End the process, and with it everything in its sandbox."""
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        for descriptor in (self._pidfd, self._ready):
            if descriptor >= 0:
                os.close(descriptor)
        self._pidfd = self._ready = -1

    def _run_until(self, is_done: Any) -> None:
        """Pump until `is_done`, the process has ended, or it has broken a limit and is ended."""
        next_sample = time.monotonic() + SAMPLE_S
        deadline = time.monotonic() + LONGEST_S + 10 * self._limits.processor_s
        while not is_done():
            events = self._turn(SAMPLE_S)
            if any(key.fileobj == self._pidfd for key, _ in events):
                self._drain()
                return
            if self._num_bytes > self._limits.output_bytes:
                self._stop("output")
                return
            now = time.monotonic()
            if now >= next_sample:
                next_sample = now + SAMPLE_S
                broken = self._broken_limit()
                if broken:
                    self._stop(broken)
                    return
            if now > deadline:
                raise SandboxFailed("the machine does not run the answer: it neither computes nor sleeps")

    def _broken_limit(self) -> Ending | None:
        """Look at what the process and those below it do; return the limit that they have broken."""
        family = ProcessTree(self._process.pid)
        if family.processor_s > self._limits.processor_s + EVASION_S:
            return "processor_time"
        is_idle = not self._turn(0)  # what writes to a full pipe sleeps too
        self._num_waiting += is_idle and family.is_waiting
        return "waiting" if self._num_waiting >= self._limits.waiting_samples else None

    def _turn(self, timeout_s: float) -> list[tuple[selectors.SelectorKey, int]]:
        """Write and read what can be; return the events met."""
        events = self._selector.select(timeout_s)
        for key, _ in events:
            if key.fileobj is self._process.stdin:
                self._write()
            elif key.fileobj is self._process.stdout:
                self._read(key.fileobj, self._buffer)
            elif key.fileobj is self._process.stderr:
                self._read(key.fileobj, self._errors)
                del self._errors[:-MAX_ERROR_BYTES]
        return events

    def _write(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            self._to_send = self._to_send[os.write(stdin.fileno(), self._to_send[:READ_BYTES]) :]
        except BlockingIOError:
            return
        except OSError:  # it does not read what it is told, which is its own affair
            self._to_send, self._is_last = memoryview(b""), True
        if not self._to_send:
            self._selector.unregister(stdin)
            if self._is_last:
                stdin.close()

    def _read(self, stream: Any, into: bytearray) -> bool:
        """Read available output; return whether there was any."""
        try:
            part = os.read(stream.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        into += part
        self._num_bytes += len(part)
        if not part:
            self._selector.unregister(stream)
        return bool(part)

    def _drain(self) -> None:
        """Read what an ended process has left in its pipes."""
        for stream, into in ((self._process.stdout, self._buffer), (self._process.stderr, self._errors)):
            while stream in self._selector.get_map() and self._read(stream, into):
                if self._num_bytes > self._limits.output_bytes:
                    self._ending = "output"
                    return

    def _stop(self, ending: Ending) -> None:
        self._ending = ending
        self._process.kill()

    def _ended(self) -> ProcessEnd:
        code = self._process.wait()
        status = 128 - code if code < 0 else code
        ending = self._ending
        if ending == "exited" and status == OUT_OF_PROCESSOR_TIME:
            ending = "processor_time"
        elif ending == "exited" and status == KILLED:
            raise SandboxFailed("an answer's process was killed from outside: is there memory to spare?")
        return ProcessEnd(ending=ending, status=status, output=bytes(self._buffer), errors=bytes(self._errors))


class ProcessTree:
    """What a process and all below it do at a moment."""

    def __init__(self, process_id: int) -> None:
        self.processor_s = 0.0
        """Used so far by those alive."""
        self._states: list[set[str]] = []
        try:
            root = psutil.Process(process_id)
            for process in (root, *root.children(recursive=True)):
                times = process.cpu_times()
                self.processor_s += times.user + times.system
                self._states.append(thread_states(process.pid))
        except psutil.Error:  # one ends while it is looked at
            self._states.append(set())

    @property
    def is_waiting(self) -> bool:
        """Whether every thread sleeps."""
        return all(self._states) and set().union(*self._states) <= WAITING_STATES


def thread_states(process_id: int) -> set[str]:
    """Return the states of a process's threads, none when it is gone."""
    states: set[str] = set()
    try:
        for task in Path(f"/proc/{process_id}/task").iterdir():
            states.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    except OSError:
        return set()
    return states
