"""What a process and all its descendants take: memory and processor time, sampled while it runs."""

import subprocess
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a program took."""

    peak_bytes: int
    """Most memory of all its processes at one time; a page that several share counts once (PSS)."""
    cpu_s: float
    """Processor time of all its processes, up to the last sample of each."""
    cpu_s_by_program: Mapping[str, float]
    """The same by what they run."""


class ProcessTree:
    """Samples a process and its descendants until `stop`."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._cpu_s: dict[tuple[int, float], tuple[str, float]] = {}
        self._peak_bytes = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, daemon=True)
        self._thread.start()

    def stop(self) -> Taken:
        self._is_over.set()
        self._thread.join()
        by_program: Counter[str] = Counter()
        for program, seconds in self._cpu_s.values():
            by_program[program] += seconds
        return Taken(peak_bytes=self._peak_bytes, cpu_s=by_program.total(), cpu_s_by_program=dict(by_program))

    def _sample_on(self) -> None:
        while True:
            self._sample()
            if self._is_over.wait(SAMPLE_EVERY_S):
                return

    def _sample(self) -> None:
        held_bytes = 0
        with suppress(psutil.NoSuchProcess):
            for process in [self._root, *self._root.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    times = process.cpu_times()
                    known = process.pid, process.create_time()
                    # One that has ended and was not waited for has no command line any more.
                    program = self._cpu_s[known][0] if known in self._cpu_s else program_of(process.cmdline())
                    self._cpu_s[known] = program, times.user + times.system
                    held_bytes += process.memory_full_info().pss
        self._peak_bytes = max(self._peak_bytes, held_bytes)


def program_of(command: Sequence[str]) -> str:
    """Return what a process runs: the module after `-m`, else the first script, else the program."""
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    scripts = (part for part in command[1:] if part.endswith(".py"))
    return Path(next(scripts, command[0] if command else "ended")).name


def run_measured(
    command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path, timeout_s: float
) -> Taken:
    """Run a command to its end in `folder`, with what it prints in `log`.

    Raises:
        SystemExit: it failed, or took longer than `timeout_s`; the message holds the end of its log.
    """
    with log.open("w") as output:
        process = subprocess.Popen(command, env=dict(environment), cwd=folder, stdout=output, stderr=output)
        tree = ProcessTree(process.pid)
        try:
            status: int | str = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(60)
            status = f"no end within {timeout_s:g} s"
        finally:
            taken = tree.stop()
    if status != 0:
        raise SystemExit(f"{' '.join(command[:4])} ...: {status}\n{log.read_text()[-3000:]}")
    return taken
