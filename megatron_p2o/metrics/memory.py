"""The most memory this process holds at a time: on its GPU, or without one in the machine's memory."""

import re
from pathlib import Path
from typing import Protocol

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What the kernel takes for "the peak is what is resident now" (proc(5))."""


class PeakMeter(Protocol):
    """Measures a peak from `reset` on."""

    def reset(self) -> None: ...

    def read(self) -> int:
        """Return the peak since `reset`, in bytes."""
        ...


class AllocatedOnGpu:
    """What torch has allocated for tensors on the current device; engines and NCCL are not in it."""

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def read(self) -> int:
        return torch.cuda.max_memory_allocated()


class ResidentInMemory:
    """Pages of this process in the machine's memory, the weights that are staged for engines among them."""

    def reset(self) -> None:
        CLEAR_REFS.write_text(RESET_PEAK)

    def read(self) -> int:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        if found is None:
            raise OSError(f"{STATUS} shows no VmHWM")
        return 1024 * int(found[1])


def peak_meter() -> PeakMeter | None:
    """Return what measures the peak here; None where a process may not reset its own."""
    if torch.cuda.is_available():
        return AllocatedOnGpu()
    meter = ResidentInMemory()
    try:
        meter.reset()
        meter.read()
    except OSError:
        return None
    return meter
