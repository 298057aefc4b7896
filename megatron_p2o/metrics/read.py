"""Reads the numbers of a run back from its files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_p2o.files import read_json_object
from megatron_p2o.metrics.jsonl import JsonObject, read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricLine:
    """What a line of `metrics.jsonl` says about one step, or all its lines merged; the later number of a key wins."""

    step: int
    epoch: int
    """Epoch of the step, from its first line."""
    time: str
    metrics: Mapping[str, float]
    """Finite numbers only."""
    num_not_finite: int
    """Numbers that were nan or infinite and are written as null."""


def read_metrics(path: Path) -> list[MetricLine]:
    """Return the lines of `metrics.jsonl` merged by step, in order of step."""
    lines = MetricLines()
    for line in read_records(path, _metric_line):
        lines.merge(line)
    return lines.by_step()


class MetricLines:
    """Lines of `metrics.jsonl`, merged by step as they come."""

    def __init__(self) -> None:
        self._merged: dict[int, MetricLine] = {}
        self._written: list[MetricLine] = []

    def add(self, line: JsonObject) -> None:
        """Take a line. Raise `KeyError`, `TypeError` or `ValueError` when it is none of `metrics.jsonl`."""
        self.merge(_metric_line(line))

    def merge(self, line: MetricLine) -> None:
        """Take a line that was read."""
        self._written.append(line)
        earlier = self._merged.get(line.step)
        self._merged[line.step] = (
            line
            if earlier is None
            else replace(
                line,
                epoch=earlier.epoch,
                metrics={**earlier.metrics, **line.metrics},
                num_not_finite=earlier.num_not_finite + line.num_not_finite,
            )
        )

    def by_step(self) -> list[MetricLine]:
        """Return one line per step, in order."""
        return [self._merged[step] for step in sorted(self._merged)]

    def as_written(self) -> list[MetricLine]:
        """Return all lines in the order they came."""
        return list(self._written)

    def clear(self) -> None:
        """Forget all lines."""
        self._merged.clear()
        self._written.clear()


def _metric_line(line: JsonObject) -> MetricLine:
    metrics = dict(line["metrics"])
    finite = {key: float(number) for key, number in metrics.items() if number is not None}
    return MetricLine(
        step=int(line["step"]),
        epoch=int(line["epoch"]),
        time=str(line["time"]),
        metrics=finite,
        num_not_finite=len(metrics) - len(finite),
    )


def read_object(path: Path) -> JsonObject | None:
    """Return the JSON object in `path`, or None when there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    return read_json_object(path) if path.exists() else None
