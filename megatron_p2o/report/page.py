"""A self-contained, offline HTML report of one or several runs: the figures of arXiv:2603.21877 and a run's health."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_p2o.files import write_whole
from megatron_p2o.report.charts import NUM_STYLES, number_text
from megatron_p2o.report.figures import (
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
from megatron_p2o.report.runs import Run, read_run
from megatron_p2o.report.spending import compute_table, rounds_table
from megatron_p2o.report.templates import shown_problems, shown_templates
from megatron_p2o.terminal import duration_text

ASSETS = Path(__file__).parent / "assets"
"""Jinja templates, style sheet and script."""


def write_report(run_dirs: Sequence[Path], output: Path) -> list[str]:
    """Write the report of the runs, side by side, to `output` (replaced in one rename); return which files are damaged.

    Works for a run in progress and for runs that lack parts: GRPO has no templates, a first step has no evaluation.

    Raises:
        ValueError: no run was named, or one of them is not a run directory.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run directory")
    runs = [read_run(directory) for directory in run_dirs]
    write_whole(output, render(runs))
    return [sentence for run in runs for sentence in run.damages]


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


def render(runs: Sequence[Run]) -> str:
    """Return the page."""
    styles = {arm: index for index, arm in enumerate(dict.fromkeys(run.arm for run in runs))}
    script = _asset("report.js")
    # The policy lets only our own script run: text of a run could not become code even if an escape were missed.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("page.html")
        .render(
            title="P2O: " + ", ".join(styles),
            style=_asset("report.css"),
            script=script,
            script_hash=f"sha256-{digest}",
            overview=overview_of(runs, styles),
            damages=[sentence for run in runs for sentence in run.damages],
            training=training_figures(runs, styles),
            by_source=by_source(runs),
            effectiveness=effectiveness_figures(runs, styles),
            rounds=rounds_table(runs),
            templates=shown_templates(runs),
            examples=shown_problems(runs),
            ledger=ledger_of(runs),
            health=health_figures(runs, styles),
            failures=failures_table(runs),
            compute=compute_table(runs),
            time=time_table(runs),
        )
    )


def _environment() -> Environment:
    """Return the templates; text is escaped, and so is a name that a template misspells an error."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment


def _asset(name: str) -> Markup:
    """Return one of our own files, which is not escaped; nothing that was read from a run may come here."""
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


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
    if any("results.json" in sentence for sentence in run.damages):
        return "results.json damaged"
    if not run.lines:
        return "no step yet"
    return f"step {run.lines[-1].step} at {run.lines[-1].time[:16].replace('T', ' ')} UTC"


def _last(run: Run, key: str) -> str:
    points = run.points(key)
    return number_text(points[-1][1], "share") if points else ""
