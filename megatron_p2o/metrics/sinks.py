"""Files and services that take the numbers of a run; `metrics.log` opens the ones the settings ask for.

`metrics.jsonl` is the truth that reports read. Each line is
`{"step": 12, "epoch": 1, "time": "2026-01-31T12:00:00+00:00", "metrics": {"train/loss": 0.5}}`; several lines may
speak of one step (an evaluation, the end of an epoch). A number that is not finite is written as null.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.metrics.jsonl import keep_lines

NEEDS_TENSORBOARD = (
    "logging.tensorboard=true needs the package tensorboard: pip install tensorboard, or set logging.tensorboard to "
    "false"
)
NEEDS_WANDB = (
    "logging.wandb_project={} needs the package wandb: pip install wandb, or set logging.wandb_project to null"
)


def missing_sink_packages(settings: LoggingConfig) -> list[str]:
    """Return one sentence for each sink that is asked for and whose package is not installed."""
    wanted = {
        "tensorboard": NEEDS_TENSORBOARD if settings.tensorboard else None,
        "wandb": NEEDS_WANDB.format(settings.wandb_project) if settings.wandb_project is not None else None,
    }
    return [sentence for name, sentence in wanted.items() if sentence is not None and not _is_installed(name)]


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name is no package


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """The numbers of one step, reduced."""

    step: int
    """Steps completed, so the first is 1; 0 holds what was measured before training."""
    epoch: int
    time: str
    """ISO 8601, UTC."""
    metrics: Mapping[str, float]


class MetricSink(Protocol):
    """Takes step records, in order of step."""

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


class TensorBoardSink:
    """Writes TensorBoard event files; needs the package `tensorboard`."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(NEEDS_TENSORBOARD) from error
        self._writer = SummaryWriter(log_dir=str(directory))

    def write(self, record: StepRecord) -> None:
        for key, number in record.metrics.items():
            self._writer.add_scalar(key, number, record.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Sends records to Weights & Biases; needs the package `wandb` and its login in the environment."""

    def __init__(self, project: str, run_name: str, directory: Path) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(NEEDS_WANDB.format(project)) from error
        # The id makes a resumed run continue its own curve instead of starting another.
        self._run = wandb.init(project=project, name=run_name, id=run_name, resume="allow", dir=str(directory))

    def write(self, record: StepRecord) -> None:
        self._run.log({**record.metrics, "epoch": record.epoch}, step=record.step)

    def close(self) -> None:
        self._run.finish()
