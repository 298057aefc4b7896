"""The report's tables of what runs have spent: their compute accounts, and their rounds of evolution."""

from collections.abc import Mapping, Sequence

from megatron_p2o.metrics.compute import PREFIX
from megatron_p2o.report.charts import number_text
from megatron_p2o.report.runs import Run, ShownRound
from megatron_p2o.report.tables import Cell, Table

ENDINGS: Mapping[str, str] = {
    "budget": "its budget was spent",
    "no_progress": "no proposal gave a new score",
    "all_reflected": "every hard problem was reflected on",
    "deadline": "CUT OFF by evolution.round_timeout_s: depends on the machine's speed",
    "reflection_unavailable": "STOPPED: reflection did not answer, see the log",
    "service_lost": "STOPPED: its process was lost twice, see evolution/service.log",
    "too_few_hard": "too few hard problems",
}


COMPUTE: Sequence[tuple[str, str]] = (
    ("Sampled: training", "sampled_training_tokens"),
    ("minibatches", "sampled_minibatch_tokens"),
    ("development", "sampled_development_tokens"),
    ("lost trials", "sampled_lost_trial_tokens"),
    ("plain control", "sampled_control_tokens"),
    ("evaluation", "sampled_evaluation_tokens"),
    ("Reflection: read", "reflection_prompt_tokens"),
    ("written", "reflection_completion_tokens"),
    ("Trained", "trained_tokens"),
    ("Log-probs", "logprob_tokens"),
    ("Read by engines", "engine_read_tokens"),
    ("Optimizer steps", "optimizer_steps_count"),
)
"""Headings and fields of the table of compute accounts, in tokens but for the last."""

HOURS: Sequence[tuple[str, str, float]] = (
    ("Engine hours", "engine_s", 3600),
    ("Trainer hours", "trainer_s", 3600),
    ("Hours", "wall_s", 3600),
    ("GPU hours", "gpu_h", 1),
)
"""Headings, fields and units an hour of the table's times."""


NO_GPU = "no GPU"
"""GPU hours of a run that had none."""


def compute_table(runs: Sequence[Run]) -> Table | None:
    """Return the compute account of each run that has one; None when none has."""
    accounts = {run.name: _last_account(run) for run in runs if run.keys(PREFIX)}
    if not accounts:
        return None
    redone = {run.name: (run.results or {}).get("compute_redone") or {} for run in runs}
    rows: list[Sequence[Cell]] = [
        [
            name,
            *(number_text(account.get(field, 0)) for _, field in COMPUTE),
            *(_hours(account, field, per_hour) for _, field, per_hour in HOURS),
            number_text(sum(count for key, count in redone[name].items() if key.startswith("sampled_"))),
        ]
        for name, account in accounts.items()
    ]
    header = ["Run", *(heading for heading, _ in COMPUTE), *(heading for heading, *_ in HOURS), "Done again"]
    return Table(caption="Compute accounts", header=header, rows=rows)


def _hours(account: Mapping[str, float], field: str, per_hour: float) -> str:
    seconds = account.get(field, 0)
    return NO_GPU if field == "gpu_h" and not seconds else number_text(seconds / per_hour)


def _last_account(run: Run) -> Mapping[str, float]:
    return {key.removeprefix(PREFIX): run.points(key)[-1][1] for key in run.keys(PREFIX)}


def rounds_table(runs: Sequence[Run]) -> Table | None:
    """Return one table row per round, of each task where a run has several; None when no run has any."""
    has_tasks = any(round_.task for run in runs for round_ in run.rounds)
    rows = [_row(run, round_, has_tasks) for run in runs for round_ in run.rounds]
    if not rows:
        return None
    task = ["Task"] if has_tasks else []
    header = ["Run", "After epoch", *task, "Ended because", "Hard problems", "Rollouts", "Candidates", "Published"]
    header.append("Proposals by outcome")
    return Table(caption="Rounds of prompt evolution", header=header, rows=rows)


def _row(run: Run, round_: ShownRound, has_tasks: bool) -> list[Cell]:
    told = sorted(round_.outcomes.items(), key=lambda item: (-item[1], item[0]))
    return [
        run.name,
        number_text(round_.epoch),
        *([round_.task] if has_tasks else []),
        ENDINGS.get(round_.ended_by, round_.ended_by),
        _split(round_),
        number_text(round_.num_rollouts),
        number_text(round_.num_candidates),
        number_text(round_.num_templates),
        ", ".join(f"{count} {outcome}" for outcome, count in told),
    ]


def _split(round_: ShownRound) -> str:
    """Return the hard problems of a round: "60 (30 scored on, 30 shown)", or their number where none was tried."""
    dev, feedback = number_text(round_.num_dev), number_text(round_.num_feedback)
    return number_text(round_.num_hard) + (f" ({dev} scored on, {feedback} shown)" if round_.num_dev else "")
