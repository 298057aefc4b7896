"""Peaks of memory by phase, measured around the parts."""

import pytest

from megatron_p2o.metrics.clock import PhaseClock
from megatron_p2o.metrics.memory import peak_meter
from megatron_p2o.metrics.step import memory_metrics

MIB = 2**20


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


def test_resident_memory_that_was_given_back_counts_in_its_own_phase_only() -> None:
    meter = peak_meter()
    if meter is None:
        pytest.skip("this process may not reset the peak of its resident memory (/proc/self/clear_refs)")
    clock = PhaseClock(meter)
    with clock.measure("large"):
        held = bytearray(b"\1") * (256 * MIB)
        del held
    with clock.measure("small"):
        held = bytearray(b"\1") * (64 * MIB)
        del held
    with clock.measure("idle"):
        pass
    peaks = clock.take().peak_bytes
    # Two MiB for whatever the interpreter does besides.
    assert abs(peaks["large"] - peaks["idle"] - 256 * MIB) < 2 * MIB
    assert abs(peaks["small"] - peaks["idle"] - 64 * MIB) < 2 * MIB
