"""The outcome of several finished runs as one table: every arm, every seed."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_p2o.files import write_whole
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.metrics.runs import read_object

HARD_SET, EASY_SET = "heldout_hard", "heldout_easy"
"""Names under `data.evaluation` whose accuracy the summary gives."""

COLUMNS: tuple[tuple[str, str], ...] = (
    ("arm", "arm"),
    ("seed", "seed"),
    ("hard, plain", "plain_hard_accuracy"),
    ("easy, plain", "plain_easy_accuracy"),
    ("hard, best template", "template_hard_accuracy"),
    ("hard, plain pass@N", "pass_at_n_plain"),
    ("rollouts", "num_rollouts_train"),
    ("of evolution", "num_rollouts_evolution"),
    ("seconds", "wall_s"),
)
"""Heading and key of the printed table."""

PLAIN_TEXT_WIDTH = 140
"""Columns of the table where there is no terminal whose width would count."""


def summarize(run_dirs: Sequence[Path]) -> JsonObject:
    """Return the results of finished runs.

    `runs` has one object per run, ordered by arm as first named and by seed, with null for what a run did not measure;
    `arms` the mean, lowest and highest accuracy over an arm's seeds; `unfinished` the runs without results.json.

    Raises:
        ValueError: a results.json is damaged or says neither arm nor seed.
    """
    found = {directory: read_object(directory / "results.json") for directory in run_dirs}
    rows = [_row(directory, results) for directory, results in found.items() if results is not None]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    rows.sort(key=lambda row: (arms.index(row["arm"]), row["seed"]))
    return {
        "runs": rows,
        "arms": {arm: _over_seeds([row for row in rows if row["arm"] == arm]) for arm in arms},
        "unfinished": [directory.name for directory, results in found.items() if results is None],
    }


def write_summary(run_dirs: Sequence[Path], output: Path) -> JsonObject:
    """Write `summarize(run_dirs)` to `output` in one rename, and return it."""
    summary = summarize(run_dirs)
    write_whole(output, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def print_table(summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print every run as a row: drawn on a terminal, aligned plain text anywhere else."""
    target = stream or sys.stdout
    is_terminal = target.isatty()
    width = None if is_terminal else PLAIN_TEXT_WIDTH
    console = Console(file=target, width=width, highlight=False, markup=False)
    table = Table(box=SIMPLE if is_terminal else None, pad_edge=False)
    for heading, key in COLUMNS:
        table.add_column(heading, justify="left" if key == "arm" else "right")
    for row in summary["runs"]:
        table.add_row(*(_cell(key, row[key]) for _, key in COLUMNS))
    console.print(table)
    for name in summary["unfinished"]:
        console.print(f"{name} has not finished: it wrote no results.json", soft_wrap=True)


def _row(directory: Path, results: JsonObject) -> JsonObject:
    if "arm" not in results or "seed" not in results:
        raise ValueError(f"{directory / 'results.json'} must name arm and seed: run the training again")
    evaluation = results.get("evaluation") or {}
    return {
        "arm": str(results["arm"]),
        "seed": int(results["seed"]),
        "plain_hard_accuracy": evaluation.get(HARD_SET, {}).get("accuracy"),
        "plain_easy_accuracy": evaluation.get(EASY_SET, {}).get("accuracy"),
        **{
            key: results.get(key)
            for key in (
                "template_hard_accuracy",
                "pass_at_n_plain",
                "num_rollouts_train",
                "num_rollouts_evolution",
                "wall_s",
            )
        },
        "evaluation": evaluation,
    }


def _over_seeds(rows: Sequence[JsonObject]) -> JsonObject:
    return {
        "seeds": [row["seed"] for row in rows],
        "plain_hard_accuracy": _spread(row["plain_hard_accuracy"] for row in rows),
        "plain_easy_accuracy": _spread(row["plain_easy_accuracy"] for row in rows),
    }


def _spread(values: Iterable[float | None]) -> JsonObject | None:
    known = [value for value in values if value is not None]
    return {"mean": fmean(known), "lowest": min(known), "highest": max(known)} if known else None


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "wall_s":
        return f"{value:.0f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
