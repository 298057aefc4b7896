"""Reduces the metrics of a run once and writes them to every sink."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.console import ConsoleSink
from megatron_p2o.metrics.jsonl import read_records
from megatron_p2o.metrics.sinks.guarded import GuardedSink, close_all
from megatron_p2o.metrics.sinks.record import JsonlSink, MetricSink, SinkContext, StepRecord
from megatron_p2o.metrics.sinks.registry import run_id_of, wanted_sinks
from megatron_p2o.metrics.values import MetricValue, numbers_of

NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


class MetricsLog:
    """Sends a step's metrics to every sink. Closes them when left as a context manager."""

    def __init__(
        self,
        sinks: Sequence[MetricSink],
        guarded: Sequence[GuardedSink] = (),
        announce: Callable[[str], None] | None = None,
        num_lines: int = 0,
    ) -> None:
        """Take the sinks: an error of one of `sinks` ends the run, `guarded` ones keep theirs to themselves.

        Args:
            num_lines: records that a resumed run has written before.
        """
        self._sinks, self._guarded = list(sinks), list(guarded)
        self._announce = announce
        self.num_lines = num_lines
        """Records so far, over all restarts: lines of metrics.jsonl."""

    def write(self, step: int, epoch: int, metrics: Mapping[str, MetricValue]) -> StepRecord:
        """Reduce `metrics`, write them everywhere, and return what was written."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        numbers = numbers_of(metrics)
        num_missed = sum(sink.num_missed for sink in self._guarded)
        if num_missed:
            numbers = {**numbers, "sinks/missed_records_count": float(num_missed)}
        record = StepRecord(step=step, epoch=epoch, time=now, metrics=numbers)
        for sink in (*self._sinks, *self._guarded):
            sink.write(record)
        self.num_lines += 1
        return record

    def announce(self, activity: str) -> None:
        """Tell the person watching what the run is doing now ("prompt evolution"); silent without a console."""
        if self._announce is not None:
            self._announce(activity)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        close_all(self._guarded)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_metrics_log(
    run_directory: Path,
    run_name: str,
    logging: LoggingConfig,
    num_steps: int,
    num_kept: int = 0,
    settings: Mapping[str, Any] = NO_SETTINGS,
) -> MetricsLog:
    """Open the sinks that `logging` asks for.

    Args:
        num_steps: steps the run will have, for the progress bar.
        num_kept: lines of metrics.jsonl that the resumed checkpoint counts; 0 starts afresh.
        settings: the resolved settings, nested, for the sinks that show them.

    Raises:
        ValueError: a sink that was asked for cannot be had. Nothing is left open or moved then.
    """
    wanted = wanted_sinks(logging)
    run_id = run_id_of(run_directory) if wanted else ""
    jsonl = JsonlSink(run_directory / "metrics.jsonl", num_kept)
    guarded: list[GuardedSink] = []
    if wanted:
        kept_steps = read_records(run_directory / "metrics.jsonl", lambda line: int(line["step"]))
        context = SinkContext(
            run_name=run_name,
            run_id=run_id,
            run_directory=run_directory,
            settings=settings,
            first_step=max(kept_steps, default=-1) + 1,
        )
        guarded = [GuardedSink(name, partial(open_sink, context)) for name, open_sink in wanted.items()]
    if not logging.console:
        return MetricsLog([jsonl], guarded, num_lines=num_kept)
    console = ConsoleSink(num_steps)
    return MetricsLog([jsonl, console], guarded, console.announce, num_kept)
