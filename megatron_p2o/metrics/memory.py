"""Peak memory of rank 0, and memory of a run's other processes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_p2o.processes import HostMemory, RankMemory, own_host_memory

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
        peak_bytes = own_host_memory().peak_bytes
        if peak_bytes == 0:
            raise OSError("/proc shows no peak of this process's memory")
        return peak_bytes


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


class ProcessMemory:
    """Turns what a run's processes hold into metrics; keeps the peaks that resetting a phase's meter forgets."""

    def __init__(self) -> None:
        self._rank_peak_bytes = self._gpu_peak_bytes = 0

    def metrics(
        self,
        ranks: Sequence[RankMemory],
        engines: Sequence[HostMemory],
        others: Mapping[str, HostMemory],
        phase_peak_bytes: Mapping[str, int],
    ) -> dict[str, float]:
        """Return numbers by metric key.

        `memory/rank_host_peak_bytes` is of the rank that has held the most so far, `engine_host_peak_bytes` of the
        engine with all its processes; `ranks_host_bytes`, `agents_host_bytes`, `engines_host_bytes` and
        `<other>_host_bytes` are of all together and now, `rank_<i>_host_bytes` and `engine_<i>_host_bytes` of each.
        `rank_gpu_peak_bytes` is of the rank whose tensors have taken the most, where there are GPUs.

        Args:
            others: name to memory of what else runs, e.g. graders; left out where it holds nothing.
            phase_peak_bytes: of the conducting rank, as `PhaseClock` measured them before the meter was reset.
        """
        of_phases = max(phase_peak_bytes.values(), default=0)
        gpu_peak = max((rank.gpu_peak_bytes for rank in ranks), default=0)
        host_phases, gpu_phases = (0, of_phases) if gpu_peak else (of_phases, 0)
        host_peak = max((rank.host.peak_bytes for rank in ranks), default=0)
        self._rank_peak_bytes = max(self._rank_peak_bytes, host_peak, host_phases)
        self._gpu_peak_bytes = max(self._gpu_peak_bytes, gpu_peak, gpu_phases)
        numbers = {
            "rank_host_peak": self._rank_peak_bytes,
            "ranks_host": sum(rank.host.resident_bytes for rank in ranks),
            "rank_gpu_peak": self._gpu_peak_bytes,
            "agents_host": sum(rank.agent.resident_bytes for rank in ranks),
            "engine_host_peak": max((engine.peak_bytes for engine in engines), default=0),
            "engines_host": sum(engine.resident_bytes for engine in engines),
            **{f"rank_{index}_host": rank.host.resident_bytes for index, rank in enumerate(ranks)},
            **{f"engine_{index}_host": engine.resident_bytes for index, engine in enumerate(engines)},
            **{f"{name}_host": memory.resident_bytes for name, memory in others.items()},
        }
        return {f"memory/{name}_bytes": float(number) for name, number in numbers.items() if number}
