"""Reduces the metrics of a run once and writes them to every sink."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.console import ConsoleSink
from megatron_p2o.metrics.sinks import JsonlSink, MetricSink, StepRecord, TensorBoardSink, WandbSink
from megatron_p2o.metrics.values import MetricValue, numbers_of


class MetricsLog:
    """Sends a step's metrics to every sink. Closes them when left as a context manager."""

    def __init__(
        self, sinks: Sequence[MetricSink], announce: Callable[[str], None] | None = None, num_lines: int = 0
    ) -> None:
        """`num_lines`: records that a resumed run has written before."""
        self._sinks = list(sinks)
        self._announce = announce
        self.num_lines = num_lines
        """Records so far, over all restarts: lines of metrics.jsonl."""

    def write(self, step: int, epoch: int, metrics: Mapping[str, MetricValue]) -> StepRecord:
        """Reduce `metrics`, write them everywhere, and return what was written."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = StepRecord(step=step, epoch=epoch, time=now, metrics=numbers_of(metrics))
        for sink in self._sinks:
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

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_metrics_log(
    run_directory: Path, run_name: str, logging: LoggingConfig, num_steps: int, num_kept: int = 0
) -> MetricsLog:
    """Open the sinks that `logging` asks for.

    Args:
        num_steps: steps the run will have, for the progress bar.
        num_kept: lines of metrics.jsonl that the resumed checkpoint counts; 0 starts afresh.

    Raises:
        ValueError: a sink was asked for whose package is missing. Nothing is left open or moved then.
    """
    optional: list[MetricSink] = []
    if logging.tensorboard:
        optional.append(TensorBoardSink(run_directory / "tensorboard"))
    if logging.wandb_project is not None:
        optional.append(WandbSink(logging.wandb_project, run_name, run_directory))
    sinks: list[MetricSink] = [JsonlSink(run_directory / "metrics.jsonl", num_kept), *optional]
    if not logging.console:
        return MetricsLog(sinks, num_lines=num_kept)
    console = ConsoleSink(num_steps)
    return MetricsLog([*sinks, console], console.announce, num_kept)
