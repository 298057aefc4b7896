"""Peaks of memory by phase, measured around the parts."""

import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_p2o.metrics.clock import PhaseClock
from megatron_p2o.metrics.memory import ProcessMemory, peak_meter
from megatron_p2o.metrics.step import memory_metrics
from megatron_p2o.processes import (
    HostMemory,
    RankMemory,
    host_memory_of,
    host_memory_of_family,
    own_host_memory,
)

MIB = 2**20
NUM_READINGS = 5
"""The kernel may take pages back between two readings, when memory is short; what leaks is in all of them."""


class ScriptedMeter:
    """Says how often it was reset since it was made, times ten."""

    def __init__(self) -> None:
        self.num_resets = 0

    def reset(self) -> None:
        self.num_resets += 1

    def read(self) -> int:
        return 10 * self.num_resets


def test_a_phase_has_its_own_peak_and_the_largest_of_its_parts() -> None:
    clock = PhaseClock(ScriptedMeter())
    for phase in ("rollout", "train", "rollout"):
        with clock.measure(phase), clock.measure("inside"):
            pass
    phases = clock.take()
    assert phases.peak_bytes == {"rollout": 30, "train": 20}, "a phase inside another is part of that one's"
    assert set(phases.seconds) == {"rollout", "train", "inside"}
    assert clock.take().peak_bytes == {}
    metrics = memory_metrics(phases.peak_bytes)
    assert {key: metric.value() for key, metric in metrics.items()} == {
        "memory/rollout_peak_bytes": 30,
        "memory/train_peak_bytes": 20,
    }


def test_a_phase_that_fails_is_measured_all_the_same() -> None:
    clock = PhaseClock(ScriptedMeter())
    with pytest.raises(ZeroDivisionError), clock.measure("train"):
        _ = 1 / 0
    with clock.measure("refresh"):
        pass
    assert clock.take().peak_bytes == {"train": 10, "refresh": 20}


def held_and_given_back(num_bytes: int) -> None:
    """Make so much memory resident for a moment: a mapping of its own, because the allocator may give memory that an
    earlier test has left resident."""
    with mmap.mmap(-1, num_bytes) as held:
        for page in range(0, num_bytes, mmap.PAGESIZE):
            held[page] = 1


def test_resident_memory_that_was_given_back_counts_in_its_own_phase_only() -> None:
    meter = peak_meter()
    if meter is None:
        pytest.skip("this process may not reset the peak of its resident memory (/proc/self/clear_refs)")
    clock = PhaseClock(meter)
    held = {"large": 256 * MIB, "small": 64 * MIB}
    beside: dict[str, int] = {}
    for _ in range(NUM_READINGS):
        for phase, num_bytes in held.items():
            with clock.measure(phase):
                held_and_given_back(num_bytes)
        with clock.measure("idle"):
            pass
        peaks = clock.take().peak_bytes
        beside = {phase: abs(peaks[phase] - peaks["idle"] - num_bytes) for phase, num_bytes in held.items()}
        if max(beside.values()) < 2 * MIB:
            break
    # Two MiB for whatever the interpreter does besides.
    assert max(beside.values()) < 2 * MIB, beside


HOLDING = """
import subprocess, sys
held = bytearray(b"1") * ({mib} << 20)
child = {child}
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_family_is_a_process_and_all_below_it() -> None:
    def program(mib: int, child: str = "None") -> str:
        return HOLDING.format(mib=mib, child=child)

    below = (
        f"subprocess.Popen([sys.executable, '-c', {program(64)!r}], stdout=subprocess.PIPE); child.stdout.readline()"
    )
    command = [sys.executable, "-c", program(128, below)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        own, family = host_memory_of([process.pid]), host_memory_of_family(process.pid)
        assert process.stdin is not None
        process.stdin.close()  # the child reads the same input, and ends with it
    # An interpreter takes some 10 MiB besides.
    assert 128 * MIB < own.resident_bytes < 160 * MIB
    assert 192 * MIB < family.resident_bytes < 256 * MIB
    assert family.peak_bytes >= family.resident_bytes
    assert host_memory_of([process.pid]) == host_memory_of_family(process.pid) == HostMemory(), "it is gone"


def test_what_a_process_gave_back_is_in_its_peak_alone() -> None:
    held_and_given_back(512 * MIB)
    memory = seen = HostMemory()
    for _ in range(NUM_READINGS):
        memory, seen = own_host_memory(), host_memory_of([os.getpid()])
        if memory.resident_bytes == pytest.approx(seen.resident_bytes, rel=0.05):
            break
    assert memory.peak_bytes - memory.resident_bytes > 256 * MIB
    assert memory.resident_bytes == pytest.approx(seen.resident_bytes, rel=0.05)


def memory(resident: int, peak: int) -> HostMemory:
    return HostMemory(resident_bytes=resident, peak_bytes=peak)


def test_every_kind_of_process_has_its_memory_in_the_metrics() -> None:
    ranks = [
        RankMemory(host=memory(3, 5), gpu_peak_bytes=70, agent=memory(8, 8)),
        RankMemory(host=memory(4, 9), gpu_peak_bytes=60),
    ]
    others = {"graders": memory(2, 2), "evolution": memory(0, 0)}
    process_memory = ProcessMemory()
    expected = {
        "memory/rank_host_peak_bytes": 9,
        "memory/ranks_host_bytes": 7,
        "memory/rank_gpu_peak_bytes": 80,
        "memory/agents_host_bytes": 8,
        "memory/engine_host_peak_bytes": 30,
        "memory/engines_host_bytes": 33,
        "memory/rank_0_host_bytes": 3,
        "memory/rank_1_host_bytes": 4,
        "memory/engine_0_host_bytes": 11,
        "memory/engine_1_host_bytes": 22,
        "memory/graders_host_bytes": 2,
    }
    engines = [memory(11, 20), memory(22, 30)]
    assert process_memory.metrics(ranks, engines, others, {"train": 80, "rollout": 50}) == expected
    later = process_memory.metrics(ranks[:1], engines, others, {"train": 10})
    del expected["memory/rank_1_host_bytes"]
    assert later == expected | {"memory/ranks_host_bytes": 3}, "peaks are of the whole run"


def test_without_a_gpu_the_phases_peaks_are_host_memory() -> None:
    ranks = [RankMemory(host=memory(3, 5), gpu_peak_bytes=0)]
    numbers = ProcessMemory().metrics(ranks, [], {}, {"train": 80})
    assert numbers == {
        "memory/rank_host_peak_bytes": 80,
        "memory/ranks_host_bytes": 3,
        "memory/rank_0_host_bytes": 3,
    }


def test_the_page_has_a_meaning_for_every_number_of_memory() -> None:
    package = Path(__file__).parents[3] / "megatron_p2o"
    page = (package / "view" / "assets" / "memory.js").read_text()
    meter = (package / "run" / "observe" / "processes.py").read_text()
    others = [first or second for first, second in re.findall(r'others\["(\w+)"\]|others = \{"(\w+)"', meter)]
    assert sorted(others) == ["evolution", "graders", "relays"]
    held = HostMemory(resident_bytes=1, peak_bytes=2)
    rank = RankMemory(host=held, agent=held, gpu_peak_bytes=3)
    keys = ProcessMemory().metrics([rank], [held], dict.fromkeys(others, held), {"train": 4})
    names = {key.removeprefix("memory/").removesuffix("_bytes") for key in keys} - {"rank_0_host", "engine_0_host"}
    assert {name for name in names if not re.search(rf'"{name}", "\w|  {name}: "\w', page)} == set()
