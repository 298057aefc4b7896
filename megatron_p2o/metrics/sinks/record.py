"""What a sink takes and is told, and `metrics.jsonl`, the sink that every run has.

`metrics.jsonl` is the truth that reports read. Each line is
`{"step": 12, "epoch": 1, "time": "2026-01-31T12:00:00+00:00", "metrics": {"train/loss": 0.5}}`; several lines may
speak of one step (an evaluation, the end of an epoch). A number that is not finite is written as null.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_p2o.metrics.jsonl import keep_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """The numbers of one step, reduced."""

    step: int
    """Steps completed, so the first is 1; 0 holds what was measured before training."""
    epoch: int
    time: str
    """ISO 8601, UTC."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkContext:
    """What a sink is told when it is opened."""

    run_name: str
    """`run.name`. Several runs may have the same."""
    run_id: str
    """Twelve hexadecimal digits. Another one for every run folder, the same after each resume."""
    run_directory: Path
    settings: Mapping[str, Any]
    """The resolved settings, nested as in the file."""
    first_step: int
    """Smallest step that may follow. Later ones that the sink has from before are done again."""


class MetricSink(Protocol):
    """Takes step records. All calls come from one thread."""

    def write(self, record: StepRecord) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends to `metrics.jsonl`, one flushed line per record."""

    def __init__(self, path: Path, num_kept: int = 0) -> None:
        """Open `path` for a run whose checkpoint counts `num_kept` lines.

        Later lines, of what will be done again, and a line torn by a kill move to `<name>.discarded` beside it. The
        default, 0, starts afresh.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_lines(path, num_kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: StepRecord) -> None:
        finite = {key: number if math.isfinite(number) else None for key, number in record.metrics.items()}
        line = {"step": record.step, "epoch": record.epoch, "time": record.time, "metrics": finite}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
