"""The results of a run that has ended.

runs/<name>/results.json         what came of it, written last
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_p2o.config.tree import ScheduleConfig
from megatron_p2o.files import read_json_object, write_whole
from megatron_p2o.metrics.compute import ComputeAccount
from megatron_p2o.metrics.read import MetricLine, read_metrics
from megatron_p2o.records import from_json

HARD = "hard/set_size"
"""Metric key of the number of hard problems after an epoch."""

RESULTS_FILE = "results.json"


def write_results_file(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Write the results of a run. Raises `OSError`."""
    write_whole(run_dir / RESULTS_FILE, json.dumps(results, indent=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnd:
    """Where a run ended, as its results say."""

    num_steps: int
    compute: ComputeAccount = field(default_factory=ComputeAccount)


def run_end(run_dir: Path) -> RunEnd | None:
    """Return where a run's results were written; None where there are none that can be read."""
    try:
        return from_json(RunEnd, read_json_object(run_dir / RESULTS_FILE), skips_unknown=True)
    except (OSError, ValueError):
        return None


def limit_reached(schedule: ScheduleConfig, num_steps: int, spent: ComputeAccount) -> str:
    """Return the limit that ends a run after so many steps, as "schedule.max_steps=40"; "" for none."""
    limits: dict[str, tuple[float | None, float]] = {
        "max_steps": (schedule.max_steps, num_steps),
        "max_tokens": (schedule.max_tokens, spent.learning_tokens),
        "max_hours": (schedule.max_hours, spent.wall_s / 3600),
    }
    return next(
        (f"schedule.{name}={limit}" for name, (limit, now) in limits.items() if limit is not None and now >= limit), ""
    )


def outcome_lines(run_dir: Path) -> list[str]:
    """Return what a run has changed, one line each: accuracy on every set at the first and the last evaluation, and the
    hard problems of the first and the last epoch."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    found: list[str] = []
    for key in sorted({key for line in lines for key in line.metrics}):
        name = _set_of(key)
        if name is not None:
            found.append(f"accuracy on {name}, asked plainly: {_change(lines, key, '.3f')}")
    if any(HARD in line.metrics for line in lines):
        found.append(f"hard problems: {_change(lines, HARD, '.0f')}")
    return found


def _set_of(key: str) -> str | None:
    """Return the evaluation set whose accuracy a metric is, asked without a template; None for other metrics."""
    area, _, rest = key.partition("/")
    name, _, measure = rest.rpartition("/")
    return name if area == "eval" and measure == "avg" and name and not name.startswith("templated_") else None


def _change(lines: Sequence[MetricLine], key: str, layout: str) -> str:
    found = [line for line in lines if key in line.metrics]
    first, last = (f"{line.metrics[key]:{layout}} at step {line.step}" for line in (found[0], found[-1]))
    return first if len(found) == 1 else f"{first}, {last}"


def finished_line(run_dir: Path, num_steps: int) -> str:
    """Return what to say of a run that has ended, and how to look at it."""
    return (
        f"finished after {num_steps} steps: results are in {run_dir / RESULTS_FILE}; "
        f"to look at them: p2o view {run_dir}, or p2o report {run_dir}"
    )
