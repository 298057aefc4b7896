"""A sink that fails or hangs costs its own records and one warning, nothing else."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_p2o.metrics.jsonl import read_lines
from megatron_p2o.metrics.log import MetricsLog
from megatron_p2o.metrics.sinks.guarded import GuardedSink, close_all
from megatron_p2o.metrics.sinks.record import JsonlSink, StepRecord
from megatron_p2o.metrics.values import Last

PATIENCE_S = 60.0


@dataclass
class Service:
    """Takes records; fails at the steps in `refused`."""

    refused: tuple[int, ...] = ()
    num_failing_opens: int = 0
    fails_to_close: bool = False
    taken: list[int] = field(default_factory=list)
    num_opened: int = 0
    num_closed: int = 0

    def open(self) -> "Service":
        self.num_opened += 1
        if self.num_opened <= self.num_failing_opens:
            raise ConnectionError("no route to host")
        return self

    def write(self, record: StepRecord) -> None:
        if record.step in self.refused:
            raise OSError("disk full")
        self.taken.append(record.step)

    def close(self) -> None:
        self.num_closed += 1
        if self.fails_to_close:
            raise ConnectionError("reset by peer")


def record(step: int) -> StepRecord:
    return StepRecord(step=step, epoch=0, time="2026-01-31T12:00:00+00:00", metrics={"train/loss": 0.5})


def test_a_sink_that_fails_is_warned_of_once_and_gets_the_next_records(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(refused=(2, 3), fails_to_close=True)
    sink = GuardedSink("theirs", service.open)
    for step in range(1, 6):
        sink.write(record(step))
    close_all([sink], PATIENCE_S)
    assert (service.taken, service.num_opened, service.num_closed) == ([1, 4, 5], 1, 1)
    assert sink.num_missed == 2
    (warning,) = caplog.messages
    assert warning.startswith("the metrics sink theirs failed at step 2 (OSError: disk full)")


def test_a_sink_that_cannot_be_opened_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    service = Service(num_failing_opens=2)
    sink = GuardedSink("theirs", service.open)
    for step in range(1, 5):
        sink.write(record(step))
    close_all([sink], PATIENCE_S)
    assert (service.taken, sink.num_missed, len(caplog.messages)) == ([3, 4], 2, 1)
    assert "ConnectionError: no route to host" in caplog.text


def test_sinks_that_hang_hold_up_no_step_and_the_end_once_for_all_and_no_other_sink(
    caplog: pytest.LogCaptureFixture,
) -> None:
    released = threading.Event()

    class Hanging(Service):
        def write(self, record: StepRecord) -> None:
            released.wait(PATIENCE_S)

    theirs = Service()
    sinks = [GuardedSink("first", Hanging().open), GuardedSink("second", Hanging().open)]
    sinks.append(GuardedSink("theirs", theirs.open))
    for sink in sinks:
        for step in (1, 2):
            sink.write(record(step))
    while len(theirs.taken) < 2:
        time.sleep(0.001)
    close_all(sinks, timeout_s=0.01)
    sinks[2].wait(PATIENCE_S)  # it was told to end although the first two have not
    assert theirs.num_closed == 1
    for name in ("first", "second"):
        assert f"the metrics sink {name} had not ended when the run did" in caplog.text
    released.set()


def test_metrics_jsonl_has_every_record_and_counts_those_that_a_sink_missed(tmp_path: Path) -> None:
    service = Service(refused=(1,))
    missed = threading.Event()

    class Told(Service):
        def write(self, record: StepRecord) -> None:
            if record.step == 2:
                missed.set()  # what step 1 did is counted by now
            service.write(record)

    log = MetricsLog([JsonlSink(tmp_path / "metrics.jsonl")], [GuardedSink("theirs", Told().open)])
    for step in (1, 2):
        log.write(step, 0, {"train/loss": Last(0.5)})
    assert missed.wait(PATIENCE_S)
    log.write(3, 0, {"train/loss": Last(0.5)})
    log.close()
    first, _, third = read_lines(tmp_path / "metrics.jsonl")
    assert first["metrics"] == {"train/loss": 0.5}
    assert third["metrics"] == {"train/loss": 0.5, "sinks/missed_records_count": 1.0}
    assert service.taken == [2, 3]


def test_an_error_of_metrics_jsonl_itself_ends_the_run(tmp_path: Path) -> None:
    jsonl = JsonlSink(tmp_path / "metrics.jsonl")
    log = MetricsLog([jsonl], [GuardedSink("theirs", Service().open)])
    jsonl.close()
    with pytest.raises(ValueError, match="closed file"):
        log.write(1, 0, {"train/loss": Last(0.5)})
