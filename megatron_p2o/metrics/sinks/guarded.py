"""Keeps the failures and waits of a sink away from training."""

import logging
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread

from megatron_p2o.metrics.sinks.record import MetricSink, StepRecord

CLOSE_TIMEOUT_S = 60.0
"""Longest that the end of a run waits for its sinks, all together."""

logger = logging.getLogger(__name__)


class GuardedSink:
    """Opens a sink, writes to it and closes it in a thread of its own, so that a slow network never delays a step.

    Nothing that it raises gets out. The first failure is warned of, and every record that it did not take is counted.
    A sink that cannot be opened is tried again with the next record.
    """

    def __init__(self, name: str, open_sink: Callable[[], MetricSink]) -> None:
        self.num_missed = 0
        """Records that the sink did not take."""
        self._name, self._open = name, open_sink
        self._sink: MetricSink | None = None
        self._is_warned = False
        self._records: SimpleQueue[StepRecord | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def write(self, record: StepRecord) -> None:
        """Hand a record over; returns at once."""
        self._records.put(record)

    def end(self) -> None:
        """Have the sink closed after what was written; returns at once."""
        self._records.put(None)

    def wait(self, timeout_s: float) -> None:
        """Wait for the end, for `timeout_s` at most."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"had not ended when the run did; up to {self._records.qsize()} records are not in it")

    def _work(self) -> None:
        while (record := self._records.get()) is not None:
            try:
                if self._sink is None:
                    self._sink = self._open()
                self._sink.write(record)
            except Exception as error:  # a service's packages raise what they like
                self.num_missed += 1
                self._warn(f"failed at step {record.step} ({type(error).__name__}: {error})")
        try:
            if self._sink is not None:
                self._sink.close()
        except Exception as error:
            self._warn(f"failed to close ({type(error).__name__}: {error})")

    def _warn(self, fault: str) -> None:
        if not self._is_warned:
            self._is_warned = True
            logger.warning(
                "the metrics sink %s %s. Training goes on, metrics.jsonl has every record, and "
                "sinks/missed_records_count counts what a sink did not take",
                self._name,
                fault,
            )


def close_all(sinks: Sequence[GuardedSink], timeout_s: float = CLOSE_TIMEOUT_S) -> None:
    """Wait until all sinks have taken everything and are closed, for `timeout_s` at most in all."""
    for sink in sinks:
        sink.end()
    deadline = time.monotonic() + timeout_s
    for sink in sinks:
        sink.wait(max(0.0, deadline - time.monotonic()))
