"""Shows the progress of a run on the terminal."""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_p2o.metrics.sinks.record import StepRecord
from megatron_p2o.terminal import SafeConsole, duration_text, printable

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("reward", "rollout/reward_mean", ".3f"),
    ("plain", "rollout/reward_plain", ".3f"),
    ("templated", "rollout/reward_templated", ".3f"),
    ("hard", "hard/set_size", ".0f"),
    ("templates in force", "library/num_templates", ".0f"),
    ("loss", "train/loss", "+.4f"),
    ("grad", "train/grad_norm", ".3g"),
    ("flat", "rollout/zero_advantage_groups_share", ".2f"),
    ("updates not finite", "train/non_finite_updates_count", ".0f"),
    ("tokens/s", "perf/rollout_tokens_per_s", ".0f"),
    ("s", "perf/step_s", ".1f"),
)
"""Label, key and format of what a row shows, in order. `flat`: groups whose advantages are all zero, which no update
learns from."""

SILENT_AT_ZERO = {"train/non_finite_updates_count"}


STEP_KEY = "perf/step_s"
"""Metric of every row that ends a step."""

NUM_PACED = 20
"""Steps by whose time the rest of a run is estimated."""


class TimeLeft:
    """Estimates how long a run goes on, by the time from step to step: what lies between two steps is in it."""

    def __init__(self, num_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_steps, self._clock = num_steps, clock
        self._steps: deque[tuple[int, float]] = deque(maxlen=NUM_PACED + 1)

    def after(self, record: StepRecord) -> str:
        """Return "about 5 min 20 s left" after a step; "" after the last one and for other records."""
        if STEP_KEY not in record.metrics or record.step >= self._num_steps:
            return ""
        now = self._clock()
        if not self._steps:  # the step itself is all that is known
            self._steps.append((record.step - 1, now - record.metrics[STEP_KEY]))
        self._steps.append((record.step, now))
        first, began = self._steps[0]
        seconds = (now - began) / max(1, record.step - first) * (self._num_steps - record.step)
        return f"about {duration_text(seconds)} left"


class ConsoleSink:
    """One compact row per record, under a live progress bar on a terminal; plain lines, which tell the time left,
    anywhere else."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._num_steps = num_steps
        self._time_left = TimeLeft(num_steps)
        self._console = SafeConsole(file=stream or sys.stderr, soft_wrap=True, highlight=False, markup=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=num_steps)
        self._progress.start()

    def write(self, record: StepRecord) -> None:
        self._progress.update(self._task, completed=record.step)
        left = "" if self._console.is_terminal else self._time_left.after(record)
        row = f"step {record.step:>4}/{self._num_steps}  epoch {record.epoch}  {row_of(record)}"
        self._progress.console.print(f"{row}  {left}" if left else row)

    def announce(self, activity: str) -> None:
        """Say what the run is doing now: beside the bar on a terminal, as a line elsewhere."""
        self._progress.update(self._task, description=printable(activity))
        if not self._console.is_terminal:
            self._console.print(activity)

    def close(self) -> None:
        self._progress.stop()


def row_of(record: StepRecord) -> str:
    """Return the record's numbers on one line; keys it does not hold take no room. Evaluations come first."""
    cells = [
        f"{key.removesuffix('/avg')} {number:.3f}"
        for key, number in sorted(record.metrics.items())
        if key.startswith("eval/") and key.endswith("/avg")
    ]
    for label, key, layout in COLUMNS:
        if key in record.metrics and not (key in SILENT_AT_ZERO and record.metrics[key] == 0):
            cells.append(f"{label} {record.metrics[key]:{layout}}")
    return "  ".join(cells)
