"""What processes hold in the machine's memory, beside what they hold on GPUs."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Pages of one or several processes; those that processes share count in each of them."""

    resident_bytes: int = 0
    """Now."""
    peak_bytes: int = 0
    """The most since they were started, or since someone reset it. Of several processes the sum of their peaks."""

    def __add__(self, other: "HostMemory") -> "HostMemory":
        return HostMemory(
            resident_bytes=self.resident_bytes + other.resident_bytes, peak_bytes=self.peak_bytes + other.peak_bytes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """What one rank of the trainer holds."""

    host: HostMemory
    gpu_peak_bytes: int
    """The most that its tensors have taken on its GPU since someone reset it; 0 without one."""


def host_memory_of(process_ids: Iterable[int]) -> HostMemory:
    """Return what the processes hold together; one that is gone holds nothing."""
    return sum(map(_of_process, process_ids), HostMemory())


def host_memory_of_family(process_id: int) -> HostMemory:
    """Return what a process and all below it hold."""
    try:
        children = psutil.Process(process_id).children(recursive=True)
    except psutil.Error:
        return HostMemory()
    return host_memory_of([process_id, *(child.pid for child in children)])


def own_host_memory() -> HostMemory:
    """Return what this process holds."""
    return host_memory_of([os.getpid()])


def _of_process(process_id: int) -> HostMemory:
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return HostMemory()
    found = {name: 1024 * int(kib) for name, kib in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", status, re.MULTILINE)}
    return HostMemory(resident_bytes=found.get("VmRSS", 0), peak_bytes=found.get("VmHWM", 0))
