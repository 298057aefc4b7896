"""The report's table of evolution rounds: why each ended, what it spent, and how its proposals did."""

from collections.abc import Mapping, Sequence

from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.report.charts import number_text
from megatron_p2o.report.runs import Run
from megatron_p2o.report.tables import Cell, Table

ENDINGS: Mapping[str, str] = {
    "budget": "its budget was spent",
    "no_progress": "no proposal gave a new score",
    "deadline": "CUT OFF by evolution.round_timeout_s: depends on the machine's speed",
    "reflection_unavailable": "STOPPED: reflection did not answer, see the log",
    "service_lost": "STOPPED: its process was lost twice, see evolution/service.log",
    "too_few_hard": "too few hard problems",
}


def rounds_table(runs: Sequence[Run]) -> Table | None:
    """Return one table row per round; None when no run has any."""
    rows = [_row(run, round_) for run in runs for round_ in run.rounds]
    if not rows:
        return None
    header = ["Run", "After epoch", "Ended because", "Rollouts", "Candidates", "Published", "Proposals by outcome"]
    return Table(caption="Rounds of prompt evolution", header=header, rows=rows)


def _row(run: Run, round_: JsonObject) -> list[Cell]:
    ended_by = str(round_.get("ended_by", ""))
    outcomes: Mapping[str, int] = round_.get("outcomes", {})
    told = sorted(outcomes.items(), key=lambda item: (-item[1], item[0]))
    return [
        run.name,
        number_text(round_.get("epoch", 0)),
        ENDINGS.get(ended_by, ended_by),
        number_text(round_.get("num_rollouts", 0)),
        number_text(round_.get("num_candidates", 0)),
        number_text(round_.get("num_templates", 0)),
        ", ".join(f"{count} {outcome}" for outcome, count in told),
    ]
