"""Charts and tables of the report: Figures 3 and 4 of arXiv:2603.21877, the ledger, and a run's health."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_p2o.metrics.compute import PREFIX
from megatron_p2o.report.charts import Line, LineChart, Unit, line_chart, number_text
from megatron_p2o.report.effectiveness import (
    Effectiveness,
    LedgerSummary,
    effectiveness_by_epoch,
    plain_success_of_hard,
    summarize_ledger,
)
from megatron_p2o.report.runs import Points, Run
from megatron_p2o.report.tables import Cell, Table

Styles = dict[str, int]
"""Arm to line style."""

TEMPLATED = "eval/templated_"
"""Begin of the keys of evaluations through a template."""

FAILURES = (
    ("rollout/grade_error_count", "Grader could not decide"),
    ("rollout/aborted_count", "Rollouts given up on"),
    ("engine/invalid_logprobs_count", "Completions whose log-probs are none"),
    ("engine/refused_count", "Requests that an engine refused"),
    ("train/non_finite_updates_count", "Updates skipped: gradient not finite"),
)
"""Counts and their headings in the table of a run's failures."""

PHASES = tuple(f"perf/{phase}_s" for phase in ("rollout", "grade", "logprobs", "train", "refresh", "step", "evolution"))
"""Phases in the order they come in; others follow."""

NUM_IDS_SHOWN = 40
"""Problem ids listed in the ledger's section."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Internalised:
    """The problems that one run has internalised."""

    name: str
    """Name of the run."""
    num_problems: int
    table: Table
    """The first of them."""
    num_left_out: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What became of the problems."""

    table: Table
    internalised: Sequence[Internalised]
    """Internalised templates, for the runs that have any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTime:
    """Seconds that a phase took in total."""

    text: str
    share: float
    """Share of the run's longest phase."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTime:
    """Where the time of a run went."""

    name: str
    phases: Sequence[PhaseTime]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeTable:
    """Where the time of all runs went."""

    header: Sequence[str]
    rows: Sequence[RunTime]


def training_figures(runs: Sequence[Run], styles: Styles) -> list[LineChart]:
    """Return training reward and plain accuracy over steps and over rollouts spent (Figure 3)."""
    charts = [
        _key_chart(runs, styles, "rollout/reward_mean", "Training reward", "Mean reward of a step's rollouts.", "share")
    ]
    for key in evaluation_keys(runs):
        name = evaluation_name(key)
        if key.startswith(TEMPLATED):
            note = "Held-out problems asked through the best template of the library then in force."
            charts.append(_key_chart(runs, styles, key, f"Accuracy {name}", note, "share"))
            charts += _reward_chart(runs, styles, key)
            continue
        note = "Held-out problems asked plainly, share of correct samples."
        charts.append(_key_chart(runs, styles, key, f"Accuracy: {name}", note, "share"))
        charts += _reward_chart(runs, styles, key)
        spent = LineChart(
            title=f"Accuracy by rollouts spent: {name}",
            note="The same numbers over all rollouts so far, those of prompt evolution included.",
            x_label="rollouts",
            unit="share",
            lines=_lines(runs, styles, lambda run, key=key: over_rollouts(run, key)),
        )
        charts.append(line_chart(spent))
        charts += _by_compute(runs, styles, key, name)
    for level in sorted({key for run in runs for key in run.keys("rollout/reward_level_")}):
        name = level.removeprefix("rollout/reward_level_")
        note = "Mean reward of the training rollouts of this level, templated ones included."
        charts.append(_key_chart(runs, styles, level, f"Training reward: {name}", note, "share"))
    return charts


def _reward_chart(runs: Sequence[Run], styles: Styles, key: str) -> list[LineChart]:
    """Return the mean reward on the set of an evaluation key, where its rewards are not all 0 and 1."""
    if key not in partial_reward_keys(runs):
        return []
    title = f"Mean reward {'' if key.startswith(TEMPLATED) else 'of '}{evaluation_name(key)}"
    note = "Of the same responses. A reward counts as correct from hard.solved_at on."
    return [_key_chart(runs, styles, reward_key(key), title, note, "share")]


def reward_key(key: str) -> str:
    """Return the metric of the mean reward beside an evaluation key."""
    return f"{key.removesuffix('/avg')}/reward_mean"


def partial_reward_keys(runs: Sequence[Run]) -> set[str]:
    """Return the evaluation keys whose rewards were not all 0 and 1 at the end of some run."""
    parts = (("evaluation", "eval/"), ("templated_evaluation", TEMPLATED))
    return {
        f"{prefix}{name}/avg"
        for run in runs
        for part, prefix in parts
        for name, outcome in ((run.results or {}).get(part) or {}).items()
        if outcome.get("has_partial_rewards")
    }


def evaluation_keys(runs: Sequence[Run]) -> list[str]:
    """Return the evaluations any run made, plain ones first."""
    keys = {key for run in runs for key in run.keys("eval/") if key.endswith("/avg")}
    return sorted(keys, key=lambda key: (key.startswith(TEMPLATED), key))


def evaluation_name(key: str) -> str:
    """Return how the report calls an evaluation key."""
    name = key.removeprefix("eval/").removesuffix("/avg").replace("_", " ")
    return f"with template: {name.removeprefix('templated ')}" if key.startswith(TEMPLATED) else name


def by_source(runs: Sequence[Run]) -> Table | None:
    """Return the final accuracy by source of the problems; None before a run has finished."""
    rows: list[list[Cell]] = []
    is_partial = bool(partial_reward_keys(runs))
    for run in runs:
        for part, asked in (("evaluation", "plainly"), ("templated_evaluation", "with template")):
            for name, outcome in sorted(((run.results or {}).get(part) or {}).items()):
                sources = sorted(outcome.get("by_source", {}).items())
                found = ", ".join(f"{source} {number_text(share, 'share')}" for source, share in sources)
                accuracy, interval = number_text(outcome["accuracy"], "share"), _interval_text(outcome.get("interval"))
                mean = outcome.get("mean_reward")
                reward = ["" if mean is None else number_text(mean, "share")] if is_partial else []
                rows.append([run.name, name.replace("_", " "), asked, accuracy, interval, *reward, found])
    if not rows:
        return None
    reward = ["Mean reward"] if is_partial else []
    header = ["Run", "Problems", "Asked", "Accuracy", "95 % interval", *reward, "By source"]
    return Table(caption="Final accuracy by source of the problems", header=header, rows=rows)


def _interval_text(interval: Mapping[str, float] | None) -> str:
    """Return the ends of a confidence interval; "" where the run gave none."""
    return "" if interval is None else " to ".join(number_text(interval[end], "share") for end in ("low", "high"))


def over_rollouts(run: Run, key: str) -> Points:
    """Return (rollouts spent until then, number) wherever `key` was written."""
    spent = 0.0
    points: Points = []
    for line in run.lines:
        spent += line.metrics.get("rollout/rollouts_count", 0.0) + line.metrics.get("evolution/num_rollouts", 0.0)
        if key in line.metrics:
            points.append((spent, line.metrics[key]))
    return points


def by_epoch(run: Run, key: str) -> Points:
    """Return (epoch, number): the last one that was written in each epoch."""
    return list(
        {line.epoch: (float(line.epoch), line.metrics[key]) for line in run.lines if key in line.metrics}.values()
    )


def effectiveness_figures(runs: Sequence[Run], styles: Styles) -> list[LineChart]:
    """Return what templates achieve and the decline of intractable problems (Figure 4)."""
    hard = LineChart(
        title="Intractable problems",
        note="Size of the hard set at the end of each epoch.",
        x_label="epoch",
        unit="number",
        lines=_lines(runs, styles, lambda run: by_epoch(run, "hard/set_size")),
    )
    kept = LineChart(
        title="Plain success on hard problems",
        note="Problems without a plain success when first asked: mean success rate of their plain rollouts since.",
        x_label="epoch",
        unit="share",
        lines=_lines(runs, styles, lambda run: plain_success_of_hard(run.ledger)),
    )
    charts = [line_chart(hard), line_chart(kept)]
    for run in runs:
        compared = effectiveness_by_epoch(run.ledger)
        if compared:
            charts.append(line_chart(_effectiveness_chart(run, compared)))
    covered = [
        Line(name=f"{run.name}: {name}", style=style, points=run.points(key))
        for run in runs
        for key, name, style in (
            ("evolution/best_score", "best template", 0),
            ("evolution/coverage", "all templates together", 1),
            ("evolution/pass_at_n_plain", "as many plain samples", 2),
        )
    ]
    if any(line.points for line in covered):
        note = "Share of the development problems solved after a round, and by plain sampling at equal budget."
        charts.append(line_chart(LineChart(title="Evolution", note=note, x_label="step", unit="share", lines=covered)))
    return charts


def ledger_of(runs: Sequence[Run]) -> Ledger | None:
    """Return what became of the problems, and which were internalised; None when no run has a ledger."""
    with_ledger = [run for run in runs if run.ledger]
    if not with_ledger:
        return None
    header = ["Run", "Problems", "Hard when first asked", "First solved by template", "Internalised", "Never solved"]
    summaries = [(run, summarize_ledger(run.ledger)) for run in with_ledger]
    rows = [_ledger_row(run, summary) for run, summary in summaries]
    return Ledger(
        table=Table(caption="Hard-sample ledger", header=header, rows=rows),
        internalised=[_internalised(run, summary) for run, summary in summaries if summary.internalised],
    )


def health_figures(runs: Sequence[Run], styles: Styles) -> list[LineChart]:
    """Return the charts that show whether a run can be trusted, and whether it wastes work."""
    shown: tuple[tuple[str, str, str, Unit], ...] = (
        ("mismatch/logprob_abs_mean", "Engine and trainer: mean", "Mean |log-prob difference| per token.", "number"),
        ("mismatch/logprob_abs_max", "Engine and trainer: worst token", "Largest |log-prob difference|.", "number"),
        ("mismatch/kl_mean", "KL of engine and trainer", "Estimate, nats per token.", "number"),
        ("mismatch/importance_capped_share", "Truncated importance weights", "Share of the weighted tokens.", "share"),
        ("train/loss", "Loss", "Mean over the optimizer steps.", "number"),
        ("train/grad_norm", "Gradient norm", "Before clipping, mean over the optimizer steps.", "number"),
        ("train/entropy_mean", "Entropy", "Nats per trained token.", "number"),
        ("train/ratio_mask_kept_share", "Context-ratio mask", "Templated tokens that keep their gradient.", "share"),
        (
            "train/ratio_mask_dropped_shift_share",
            "What the mask keeps from training",
            "Of what templates add to the log-probs of successes.",
            "share",
        ),
        (
            "template/shift_per_token",
            "What templates still buy",
            "Nats per token that they add to responses.",
            "number",
        ),
        ("distill/gain_per_token", "Gain of plain responses", "Nats per token that their teachers add.", "number"),
        ("hard/hurt_share", "Hurt by their template", "Solved without and failed with it.", "share"),
        ("hard/forgotten_share", "Forgotten problems", "Mastered before, failed by every plain try now.", "share"),
        ("train/clipped_share", "Clipped tokens", "Share of the trained tokens.", "share"),
        ("rollout/zero_advantage_groups_share", "Groups without gradient", "Every advantage is zero.", "share"),
        ("rollout/response_tokens_mean", "Response length", "Mean tokens per rollout.", "number"),
        ("rollout/truncated_share", "Truncated rollouts", "Share of the step's rollouts.", "share"),
    )
    return [
        _key_chart(runs, styles, key, title, note, unit)
        for key, title, note, unit in shown
        if any(run.points(key) for run in runs)
    ]


def failures_table(runs: Sequence[Run]) -> Table:
    """Return how often each kind of failure happened, one row per run."""
    header = ["Run", *(name for _, name in FAILURES), "Numbers not finite"]
    rows = [
        [
            run.name,
            *(number_text(run.total(key)) for key, _ in FAILURES),
            sum(line.num_not_finite for line in run.lines),
        ]
        for run in runs
    ]
    return Table(caption="What failed, over the whole run", header=header, rows=rows)


def time_table(runs: Sequence[Run]) -> TimeTable | None:
    """Return the seconds each phase took in total; None when nothing was timed."""
    keys = {key for run in runs for key in run.keys("perf/") if key.endswith("_s") and "_per_s" not in key}
    phases = sorted(keys, key=lambda key: (PHASES.index(key) if key in PHASES else len(PHASES), key))
    if not phases:
        return None
    rows: list[RunTime] = []
    for run in runs:
        totals = {phase: run.total(phase) for phase in phases}
        longest = max(totals.values()) or 1.0
        times = [PhaseTime(text=number_text(round(s, 1)), share=s / longest) for s in totals.values()]
        rows.append(RunTime(name=run.name, phases=times))
    header = ["Run", *(phase.removeprefix("perf/").removesuffix("_s") for phase in phases)]
    return TimeTable(header=header, rows=rows)


def _by_compute(runs: Sequence[Run], styles: Styles, key: str, name: str) -> list[LineChart]:
    """Return the accuracy `key` over tokens and over hours; nothing of runs without compute accounts."""
    if not any(run.keys(PREFIX) for run in runs):
        return []
    axes = (
        ("tokens", "learning_tokens", 1.0, "Tokens sampled to learn: by training, trials of templates and reflection."),
        ("hours", "wall_s", 3600.0, "Hours since the run began, evaluations included."),
    )
    return [
        line_chart(
            LineChart(
                title=f"Accuracy by {unit}: {name}",
                note=note,
                x_label=unit,
                unit="share",
                lines=_lines(runs, styles, lambda run, field=field, per=per: over_compute(run, key, field, per)),
            )
        )
        for unit, field, per, note in axes
    ]


def over_compute(run: Run, key: str, field: str, per: float) -> Points:
    """Return (what had been spent of `field`, in units of `per`; number) wherever `key` was written."""
    spent = PREFIX + field
    return [
        (line.metrics[spent] / per, line.metrics[key])
        for line in run.written
        if key in line.metrics and spent in line.metrics
    ]


def _lines(runs: Sequence[Run], styles: Styles, points_of: Callable[[Run], Points]) -> list[Line]:
    return [Line(name=run.name, style=styles[run.arm], points=points_of(run)) for run in runs]


def _key_chart(runs: Sequence[Run], styles: Styles, key: str, title: str, note: str, unit: Unit) -> LineChart:
    lines = _lines(runs, styles, lambda run: run.points(key))
    return line_chart(LineChart(title=title, note=note, x_label="step", unit=unit, lines=lines))


def _effectiveness_chart(run: Run, compared: Sequence[Effectiveness]) -> LineChart:
    k = min(epoch.k for epoch in compared)
    shown: list[tuple[str, int, Callable[[Effectiveness], float]]] = [
        ("template, pass@1", 0, lambda epoch: epoch.templated_at_1),
        ("plain, pass@1", 1, lambda epoch: epoch.plain_at_1),
    ]
    if k > 1:
        shown += [
            (f"template, pass@{k}", 2, lambda epoch: epoch.templated_at_k),
            (f"plain, pass@{k}", 3, lambda epoch: epoch.plain_at_k),
        ]
    return LineChart(
        title=f"With and without template: {run.name}",
        note=f"Problems asked both ways in an epoch; {compared[-1].num_problems} in the last.",
        x_label="epoch",
        unit="share",
        lines=[
            Line(name=name, style=style, points=[(epoch.epoch, rate(epoch)) for epoch in compared])
            for name, style, rate in shown
        ],
    )


def _ledger_row(run: Run, summary: LedgerSummary) -> list[Cell]:
    return [
        run.name,
        summary.num_problems,
        summary.num_hard_at_first,
        summary.num_solved_by_template_first,
        len(summary.internalised),
        summary.num_never_solved,
    ]


def _internalised(run: Run, summary: LedgerSummary) -> Internalised:
    ids = summary.internalised
    shown = ids[:NUM_IDS_SHOWN]
    rows = [[problem_id, _history(run, problem_id)] for problem_id in shown]
    header = ["Problem", "Solved of tried, by epoch"]
    return Internalised(
        name=run.name,
        num_problems=len(ids),
        table=Table(caption=f"Internalised problems of {run.name}", header=header, rows=rows),
        num_left_out=len(ids) - len(shown),
    )


def _history(run: Run, problem_id: str) -> str:
    parts: list[str] = []
    for entry in run.ledger:
        if entry.problem_id != problem_id:
            continue
        plain = f"plain {entry.plain_solved}/{entry.plain_tries}" if entry.plain_tries else ""
        templated = f"template {entry.templated_solved}/{entry.templated_tries}" if entry.templated_tries else ""
        parts.append(f"{entry.epoch}: " + ", ".join(part for part in (plain, templated) if part))
    return "; ".join(parts)
