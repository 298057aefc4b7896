"""The outcome of several finished runs as one table: every arm, every seed."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.table import Table

from megatron_p2o.files import write_whole
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.report.runs import read_results
from megatron_p2o.report.spending import NO_GPU
from megatron_p2o.terminal import table_console

SPENT: tuple[tuple[str, str], ...] = (
    ("plain pass@N", "pass_at_n_plain"),
    ("training rollouts", "num_rollouts_train"),
    ("evolution rollouts", "num_rollouts_evolution"),
    ("sampled tokens", "learning_tokens"),
    ("trained tokens", "trained_tokens"),
    ("GPU hours", "gpu_h"),
    ("seconds", "wall_s"),
)
"""Heading and key of the table's last columns. `plain pass@N`: of the problems that chose the first round's templates,
the share that as many plain samples solved as the round took (`evolution.plain_control`). `sampled tokens`: what a
budget in tokens limits (`ComputeAccount.learning_tokens`)."""


MEASURES: Mapping[str, str] = {
    "accuracy": "",
    "template_accuracy": ", best template",
    "reward": ", mean reward",
    "template_reward": ", mean reward, best template",
}
"""What is told of each set, and the end of its heading."""


def summarize(run_dirs: Sequence[Path]) -> JsonObject:
    """Return the results of finished runs.

    `runs` has one object per run, ordered by arm as first named and by seed: `accuracy` of every set of problems asked
    plainly, `template_accuracy` of every set asked through the run's best template, null for a number it does not have,
    and the mean rewards `reward` and `template_reward` of the sets whose rewards are not all 0 and 1;
    `arms` the mean, lowest and highest of each over an arm's seeds; `unfinished` the runs without results.json;
    `damaged` what is wrong with the results.json of others, by run.
    """
    rows: list[JsonObject] = []
    unfinished: list[str] = []
    damaged: dict[str, str] = {}
    for directory in run_dirs:
        try:
            results = read_results(directory)
            if results is None:
                unfinished.append(directory.name)
            else:
                rows.append(_row(directory, results))
        except ValueError as error:
            damaged[directory.name] = str(error)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    rows.sort(key=lambda row: (arms.index(row["arm"]), row["seed"]))
    return {
        "runs": rows,
        "arms": {arm: _over_seeds([row for row in rows if row["arm"] == arm]) for arm in arms},
        "unfinished": unfinished,
        "damaged": damaged,
    }


def write_summary(run_dirs: Sequence[Path], output: Path) -> JsonObject:
    """Write `summarize(run_dirs)` to `output` in one rename, and return it."""
    summary = summarize(run_dirs)
    write_whole(output, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def print_table(summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print every run as a row: drawn on a terminal, aligned plain text anywhere else."""
    console = table_console(stream)
    table = Table(box=SIMPLE if console.is_terminal else None, pad_edge=False)
    columns = list(_columns(summary["runs"]))
    for heading, _ in columns:
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for row in summary["runs"]:
        table.add_row(*(cell_of(row) for _, cell_of in columns))
    console.print(table)
    for name in summary["unfinished"]:
        console.print(f"{name} has not finished: it wrote no results.json", soft_wrap=True)
    for name, sentence in summary["damaged"].items():
        console.print(f"{name} is left out: {sentence}", soft_wrap=True)


def _columns(rows: Sequence[JsonObject]) -> Iterator[tuple[str, Callable[[JsonObject], str]]]:
    """Yield heading and cell of each column: one for every set that a run measured, plainly or by its best template."""
    yield "arm", lambda row: row["arm"]
    yield "seed", lambda row: str(row["seed"])
    for asked, suffix in MEASURES.items():
        for name in _sets(rows, asked):
            yield name + suffix, lambda row, asked=asked, name=name: _cell(name, row.get(asked, {}).get(name))
    for heading, key in SPENT:
        if any(row[key] is not None for row in rows):
            yield heading, lambda row, key=key: _cell(key, row[key])


def _sets(rows: Sequence[JsonObject], asked: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get(asked, {})))


def _row(directory: Path, results: JsonObject) -> JsonObject:
    if "arm" not in results or "seed" not in results:
        raise ValueError(f"{directory / 'results.json'} must name arm and seed: restore it")
    evaluation, templated = results.get("evaluation") or {}, results.get("templated_evaluation") or {}
    rewards = {"reward": _partial_rewards(evaluation), "template_reward": _partial_rewards(templated)}
    compute = results.get("compute") or {}
    spent = {**results, **{name: compute.get(name) for name in ("learning_tokens", "trained_tokens", "gpu_h")}}
    return {
        "arm": str(results["arm"]),
        "seed": int(results["seed"]),
        "accuracy": _accuracies(evaluation),
        "template_accuracy": _accuracies(templated),
        **{asked: found for asked, found in rewards.items() if found},
        **{key: spent.get(key) for _, key in SPENT},
        "compute": compute,
        "evaluation": evaluation,
    }


def _accuracies(evaluation: Mapping[str, JsonObject]) -> dict[str, float]:
    return {name: outcome["accuracy"] for name, outcome in evaluation.items()}


def _partial_rewards(evaluation: Mapping[str, JsonObject]) -> dict[str, float]:
    """Return the mean rewards of the sets whose accuracy does not tell them."""
    return {name: outcome["mean_reward"] for name, outcome in evaluation.items() if outcome.get("has_partial_rewards")}


def _over_seeds(rows: Sequence[JsonObject]) -> JsonObject:
    spreads = {
        asked: {
            name: _spread([row[asked][name] for row in rows if name in row.get(asked, {})])
            for name in _sets(rows, asked)
        }
        for asked in MEASURES
        if any(asked in row for row in rows)
    }
    return {"seeds": [row["seed"] for row in rows], **spreads}


def _spread(values: Sequence[float]) -> JsonObject:
    return {"mean": fmean(values), "lowest": min(values), "highest": max(values)}


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "gpu_h" and not value:
        return NO_GPU
    if key == "wall_s":
        return f"{value:.0f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
