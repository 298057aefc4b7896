"""What the page shows of all runs together: results, the figures of arXiv:2603.21877, and the runs' health."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_p2o.report.charts import NUM_STYLES, LineChart, number_text
from megatron_p2o.report.figures import (
    Ledger,
    TimeTable,
    by_source,
    effectiveness_figures,
    evaluation_keys,
    evaluation_name,
    failures_table,
    health_figures,
    ledger_of,
    partial_reward_keys,
    reward_key,
    time_table,
    training_figures,
)
from megatron_p2o.report.runs import Run
from megatron_p2o.report.spending import compute_table, rounds_table
from megatron_p2o.report.tables import Table
from megatron_p2o.report.templates import RunExamples, shown_problems
from megatron_p2o.terminal import duration_text


@dataclass(frozen=True, kw_only=True, slots=True)
class OverviewRow:
    """Progress and results of a run."""

    name: str
    style: int
    """Colour of its arm."""
    cells: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overview:
    """One row per run."""

    header: Sequence[str]
    rows: Sequence[OverviewRow]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Runs side by side. A part that the runs have nothing for is None or empty."""

    overview: Overview
    training: Sequence[LineChart]
    by_source: Table | None
    effectiveness: Sequence[LineChart]
    rounds: Table | None
    examples: Sequence[RunExamples]
    ledger: Ledger | None
    health: Sequence[LineChart]
    failures: Table
    compute: Table | None
    time: TimeTable | None


def report_of(runs: Sequence[Run]) -> Report:
    """Return the report. Works for runs in progress and for runs that lack parts: GRPO has no templates."""
    styles = {arm: index for index, arm in enumerate(dict.fromkeys(run.arm for run in runs))}
    return Report(
        overview=overview_of(runs, styles),
        training=training_figures(runs, styles),
        by_source=by_source(runs),
        effectiveness=effectiveness_figures(runs, styles),
        rounds=rounds_table(runs),
        examples=shown_problems(runs),
        ledger=ledger_of(runs),
        health=health_figures(runs, styles),
        failures=failures_table(runs),
        compute=compute_table(runs),
        time=time_table(runs),
    )


def overview_of(runs: Sequence[Run], styles: dict[str, int]) -> Overview:
    """Return one row per run: progress and results."""
    accuracies = evaluation_keys(runs)
    partial = [key for key in accuracies if key in partial_reward_keys(runs)]
    sets = [*accuracies, *map(reward_key, partial)]
    header = [
        "Run",
        *(evaluation_name(key) for key in accuracies),
        *(f"{evaluation_name(key)}, mean reward" for key in partial),
        "Train reward",
        "Rollouts: training",
        "evolution",
        "Templates published",
        "Wall time",
        "State",
    ]
    return Overview(header=header, rows=[_overview_row(run, sets, styles[run.arm] % NUM_STYLES) for run in runs])


def _overview_row(run: Run, sets: Sequence[str], style: int) -> OverviewRow:
    reward = run.points("rollout/reward_mean")
    results = run.results or {}
    # What evaluations and rounds took is known at the end.
    steps_s = run.total("perf/step_s")
    wall_time = duration_text(float(results["wall_s"])) if "wall_s" in results else f"{duration_text(steps_s)} in steps"
    cells = [
        *(_last(run, key) for key in sets),
        number_text(reward[-1][1], "share") if reward else "",
        number_text(results.get("num_rollouts_train") or run.total("rollout/rollouts_count")),
        number_text(results.get("num_rollouts_evolution") or run.total("evolution/num_rollouts")),
        _num_published(run),
        wall_time,
        _state(run),
    ]
    return OverviewRow(name=run.name, style=style, cells=cells)


def _num_published(run: Run) -> str:
    """Return how many templates the run's libraries have held; one that was published again counts once."""
    texts = {template.text for library in run.libraries for template in library.templates}
    return str(len(texts)) if run.libraries else ""


def _state(run: Run) -> str:
    if run.results is not None:
        return "finished"
    if run.is_results_damaged:
        return "results.json damaged"
    if not run.lines:
        return "no step yet"
    return f"step {run.lines[-1].step} at {run.lines[-1].time[:16].replace('T', ' ')} UTC"


def _last(run: Run, key: str) -> str:
    points = run.points(key)
    return number_text(points[-1][1], "share") if points else ""
