"""A self-contained, offline HTML report of one or several runs: the figures of arXiv:2603.21877 and a run's health."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.files import write_whole
from megatron_p2o.report.charts import NUM_STYLES, number_text
from megatron_p2o.report.figures import (
    effectiveness_section,
    evaluation_keys,
    evaluation_name,
    health_section,
    ledger_section,
    time_section,
    training_section,
)
from megatron_p2o.report.markup import Child, Html, element, join, raw_text, table
from megatron_p2o.report.rounds import rounds_section
from megatron_p2o.report.runs import Run, read_run
from megatron_p2o.report.templates import examples_section, templates_section


def write_report(run_dirs: Sequence[Path], output: Path) -> None:
    """Write the report of the runs, side by side, to `output` (replaced in one rename).

    Works for a run in progress and for runs that lack parts: GRPO has no templates, a first step has no evaluation.

    Raises:
        ValueError: no run was named, one of them is not a run directory, or a file in it is damaged.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run directory")
    runs = [read_run(directory) for directory in run_dirs]
    write_whole(output, render(runs))


def render(runs: Sequence[Run]) -> str:
    """Return the page."""
    styles = {arm: index for index, arm in enumerate(dict.fromkeys(run.arm for run in runs))}
    title = "P2O: " + ", ".join(styles)
    sections = [
        overview_section(runs, styles),
        training_section(runs, styles),
        effectiveness_section(runs, styles),
        rounds_section(runs),
        templates_section(runs),
        examples_section(runs),
        ledger_section(runs, styles),
        health_section(runs, styles),
        time_section(runs),
    ]
    shown = [section for section in sections if section is not None]
    body = element("body", element("header", element("h1", title)), element("main", shown), element("div", id="hover"))
    return f"<!DOCTYPE html>\n{element('html', _head(title), body, _script(), lang='en')}\n"


def overview_section(runs: Sequence[Run], styles: dict[str, int]) -> Html:
    """Return one table row per run: how far it is and what it reached."""
    sets = evaluation_keys(runs)
    header = [
        "Run",
        *(evaluation_name(key) for key in sets),
        "Train reward",
        "Rollouts: training",
        "evolution",
        "Templates published",
        "Wall time",
        "State",
    ]
    rows = [_overview_row(run, sets, styles) for run in runs]
    note = "Accuracies are the latest evaluation of the run; training reward is its last step's mean."
    return element(
        "section", element("h2", "Overview"), element("p", note), table(header, rows, "Overview of the runs")
    )


def _overview_row(run: Run, sets: Sequence[str], styles: dict[str, int]) -> list[Child]:
    swatch = element("span", class_=f"swatch s{styles[run.arm] % NUM_STYLES}", aria_hidden="true")
    reward = run.points("rollout/reward_mean")
    results = run.results or {}
    # What evaluations and rounds took is known at the end.
    steps_s = run.total("perf/step_s")
    wall_time = duration_text(float(results["wall_s"])) if "wall_s" in results else f"{duration_text(steps_s)} in steps"
    return [
        join(swatch, run.name),
        *(_last(run, key) for key in sets),
        number_text(reward[-1][1], "share") if reward else "",
        number_text(results.get("num_rollouts_train") or run.total("rollout/rollouts_count")),
        number_text(results.get("num_rollouts_evolution") or run.total("evolution/num_rollouts")),
        _num_published(run),
        wall_time,
        _state(run),
    ]


def _num_published(run: Run) -> str:
    """Return how many templates the run's libraries have held; one that was published again counts once."""
    texts = {template.text for library in run.libraries for template in library.templates}
    return str(len(texts)) if run.libraries else ""


def duration_text(seconds: float) -> str:
    """Return a duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _state(run: Run) -> str:
    if run.results is not None:
        return "finished"
    if not run.lines:
        return "no step yet"
    return f"step {run.lines[-1].step} at {run.lines[-1].time[:16].replace('T', ' ')} UTC"


def _last(run: Run, key: str) -> str:
    points = run.points(key)
    return number_text(points[-1][1], "share") if points else ""


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _head(title: str) -> Html:
    # The policy lets only our own script run: text of a run could not become code even if an escape were missed.
    digest = base64.b64encode(hashlib.sha256(_asset("report.js").encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        raw_text("style", _asset("report.css")),
    )


def _script() -> Html:
    return raw_text("script", _asset("report.js"))
