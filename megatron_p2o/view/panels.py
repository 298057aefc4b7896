"""What the page asks for, as JSON. Numbers are as the run wrote them; the page formats."""

import json
from collections.abc import Callable, Mapping, Sequence

import msgspec

from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.report.content import report_of
from megatron_p2o.report.templates import library_trees, word_changes
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.types import PLAIN
from megatron_p2o.view.rounds import ViewedCandidate, ViewedRound
from megatron_p2o.view.runs import ViewedRun
from megatron_p2o.view.settings import differences
from megatron_p2o.view.timeline import RoundSpan, library_times, round_spans, step_spans

MAX_TIMED_STEPS = 300
"""Latest steps whose times are sent."""

MAX_REFUSALS = 200
"""Refused proposals that are sent of a round, newest first."""


def overview_panel(runs: Sequence[ViewedRun]) -> list[JsonObject]:
    """Return one object per run: who it is, how far it is, what is damaged."""
    return [_overview(run) for run in runs]


def report_panel(runs: Sequence[ViewedRun]) -> JsonObject:
    """Return what is shown of all runs together: see `report.content.Report`."""
    return msgspec.to_builtins(report_of([run.reported() for run in runs]))


class RememberedReport:
    """`report_panel`, made anew only when the files that it is made of have changed."""

    def __init__(self) -> None:
        self._made: tuple[object, JsonObject] | None = None

    def __call__(self, runs: Sequence[ViewedRun]) -> JsonObject:
        state = [run.report_state() for run in runs]
        if self._made is None or self._made[0] != state:
            self._made = state, report_panel(runs)
        return self._made[1]


def _overview(run: ViewedRun) -> JsonObject:
    lines = run.lines()
    arm, seed = run.arm_and_seed()
    return {
        "name": run.name,
        "folder": str(run.directory),
        "arm": arm,
        "seed": seed,
        "is_finished": run.results() is not None,
        "step": lines[-1].step if lines else None,
        "epoch": lines[-1].epoch if lines else None,
        "time": lines[-1].time if lines else None,
        "step_s": next(
            (line.metrics["perf/step_s"] for line in reversed(lines) if "perf/step_s" in line.metrics), None
        ),
        "num_warnings": len(run.warnings()),
        "damages": run.damages(),
    }


def metrics_panel(run: ViewedRun) -> JsonObject:
    """Return every metric as a column over the steps; null where a step did not write it."""
    lines = run.lines()
    keys = sorted({key for line in lines for key in line.metrics})
    return {
        "steps": [line.step for line in lines],
        "epochs": [line.epoch for line in lines],
        "times": [line.time for line in lines],
        "series": {key: [line.metrics.get(key) for line in lines] for key in keys},
        "num_not_finite": sum(line.num_not_finite for line in lines),
    }


def problems_panel(run: ViewedRun) -> JsonObject:
    """Return the ledger as a table: problems by tries, [step, epoch, plain solved, tries, templated solved, tries]."""
    entries, facts = run.ledger(), run.rollouts().facts
    cells: dict[str, list[list[int]]] = {}
    for entry in entries:
        counts = [entry.plain_solved, entry.plain_tries, entry.templated_solved, entry.templated_tries]
        cells.setdefault(entry.problem_id, []).append([entry.step, entry.epoch, *counts])
    internalised = set(HardSampleLedger(entries).internalised())
    return {
        "epochs": sorted({entry.epoch for entry in entries}),
        "problems": [
            {
                "id": problem_id,
                "level": facts[problem_id].level if problem_id in facts else "",
                "source": facts[problem_id].source if problem_id in facts else "",
                "is_internalised": problem_id in internalised,
                "tries": tries,
            }
            for problem_id, tries in cells.items()
        ],
    }


def problem_panel(run: ViewedRun, problem_id: str, steps: Sequence[int] = (), max_steps: int = 1) -> JsonObject:
    """Return a problem's rollouts of some steps, by default of its latest ones, and all its steps that have any.

    None when they were not written, or the problem does not exist.
    """
    index = run.rollouts()
    known = index.steps_of(problem_id)
    return {"id": problem_id, "steps": known, "rollouts": index.find(problem_id, steps or known[-max_steps:])}


def rounds_panel(run: ViewedRun) -> list[JsonObject]:
    """Return the rounds of prompt evolution, newest first, each with its candidates."""
    times = {time.epoch: time for time in _round_spans(run)}
    return [_round(found, run, times.get(found.number)) for found in reversed(run.rounds())]


def _round_spans(run: ViewedRun) -> list[RoundSpan]:
    return round_spans(run.written(), frozenset(found.number for found in run.rounds()))


def _round(found: ViewedRound, run: ViewedRun, time: RoundSpan | None) -> JsonObject:
    candidates = found.candidates()
    texts = {candidate.id: candidate.text for candidate in candidates}
    published = found.published
    library = {
        template.text
        for library in run.libraries()
        if published and library.version == published.version
        for template in library.templates
    }
    return {
        "number": found.number,
        "name": _name(found),
        "library_version": published.version if published else None,
        "ended_by": published.ended_by if published else None,
        "num_rollouts": found.num_rollouts,
        "max_rollouts": found.max_rollouts,
        "num_control_rollouts": found.num_control_rollouts,
        "num_tokens": found.num_tokens,
        "num_lineages": run.settings().get("evolution.num_lineages"),
        "lineages": msgspec.to_builtins(found.lineages()),
        "price": _price(run, time),
        "outcomes": found.outcome_counts(),
        "damage": found.damage,
        "candidates": [_candidate(candidate, texts, candidate.text in library) for candidate in candidates],
        "refusals": [
            {"proposal": refusal.proposal, "parent": refusal.parent, "text": refusal.text, "outcome": refusal.outcome}
            for refusal in found.refusals()[:MAX_REFUSALS]
        ],
    }


def _price(run: ViewedRun, time: RoundSpan | None) -> JsonObject:
    """Return what a round took from training: over the steps beside it, or the seconds that training waited for it."""
    waited_s = None if time is None or time.is_beside or time.end_s is None else time.end_s - time.begin_s
    lines = run.written()
    beside = [] if time is None else [step for step in step_spans(lines) if time.is_beside_step(step)]
    metrics = {line.step: line.metrics for line in run.lines()}
    return {
        "waited_s": waited_s,
        "steps": [step.step for step in beside],
        "prices": [metrics[step.step].get("engine/evolution_price") for step in beside],
        "slowdowns": [metrics[step.step].get("engine/evolution_slowdown") for step in beside],
    }


def _name(found: ViewedRound) -> str:
    return f"{found.number} {found.task}".strip()


def _candidate(candidate: ViewedCandidate, texts: dict[int, str], is_published: bool) -> JsonObject:
    parent = PLAIN.text if candidate.parent is None else texts.get(candidate.parent, "")
    return {
        "id": candidate.id,
        "proposal": candidate.proposal,
        "parent": candidate.parent,
        "text": candidate.text,
        "changes": [[span.kind, span.text] for span in word_changes(parent, candidate.text)],
        "minibatch": candidate.minibatch,
        "is_published": is_published,
        "disqualified": candidate.disqualified,
        "mean_score": candidate.mean_score,
        "scores": {
            problem_id: [score.mean, score.num_trials] for problem_id, score in sorted(candidate.scores.items())
        },
    }


def libraries_panel(run: ViewedRun) -> list[JsonObject]:
    """Return the published templates as trees, the newest library first: see `report.templates.LibraryTree`."""
    return msgspec.to_builtins(library_trees(run.reported()))


def reflection_panel(run: ViewedRun, round_name: str, proposal: int) -> JsonObject | None:
    """Return what reflection was shown for a proposal and what it wrote; None where there is nothing."""
    found = next((each for each in run.rounds() if _name(each) == round_name), None)
    reflection = found.reflection(proposal) if found is not None else None
    if reflection is None:
        return None
    facts = run.rollouts().facts
    return {
        "parent": reflection.parent,
        "parent_text": reflection.parent_text,
        "examples": [
            {
                "problem_id": problem_id,
                "question": facts[problem_id].question if problem_id in facts else None,
                "response": trial.response_text if trial else None,
                "reward": trial.reward if trial else None,
                "feedback": trial.feedback if trial else "",
                "finish_reason": trial.finish_reason if trial else None,
            }
            for problem_id, trial in reflection.examples.items()
        ],
        "text": reflection.text,
        "refusal": reflection.refusal,
        "prompt_tokens": reflection.prompt_tokens,
        "completion_tokens": reflection.completion_tokens,
        "prompt": reflection.prompt,
        "reply": reflection.reply,
        "backend": run.settings().get("evolution.reflection.backend"),
    }


def engines_panel(run: ViewedRun) -> JsonObject:
    """Return the latest state that each engine wrote of itself, and what the run has counted of all."""
    lines = run.lines()
    latest: dict[str, float] = {}
    for line in lines:
        latest.update(line.metrics)
    return {
        "version": lines[-1].step if lines else None,
        "restarts": latest.get("engine/restarts_count"),
        "engines": [
            {
                "name": state.name,
                "time": state.time,
                "running": state.num_running,
                "waiting": state.num_waiting,
                "kv_share": state.kv_share,
                "tokens_per_s": state.tokens_per_s,
                "host_bytes": latest.get(f"memory/engine_{number}_host_bytes"),
            }
            for number, state in enumerate(run.engines())
        ],
    }


def timeline_panel(run: ViewedRun) -> JsonObject:
    """Return when the latest steps with their phases, and the rounds of prompt evolution, took place.

    Times are in seconds since 1970; the end of a round that has none yet is null.
    """
    lines = run.written()
    return {
        "steps": msgspec.to_builtins(step_spans(lines)[-MAX_TIMED_STEPS:]),
        "rounds": msgspec.to_builtins(_round_spans(run)),
        "libraries": library_times(lines),
    }


def settings_panel(runs: Sequence[ViewedRun]) -> JsonObject:
    """Return the settings in which the runs differ from the defaults or from one another."""
    return {"runs": [run.name for run in runs], "rows": differences([run.settings() for run in runs])}


def warnings_panel(run: ViewedRun) -> list[JsonObject]:
    """Return what the run warned of, newest first."""
    return list(run.warnings())[::-1]


OF_ALL: Mapping[str, Callable[[Sequence[ViewedRun]], object]] = {
    "runs": overview_panel,
    "report": report_panel,
    "settings": settings_panel,
}
"""What is asked about all runs, by the last part of its address."""

OF_RUN: Mapping[str, Callable[[ViewedRun], object]] = {
    "metrics": metrics_panel,
    "timeline": timeline_panel,
    "problems": problems_panel,
    "rounds": rounds_panel,
    "libraries": libraries_panel,
    "engines": engines_panel,
    "warnings": warnings_panel,
}
"""What is asked about one run."""


def encoded(panel: object) -> bytes:
    """Return a panel as JSON."""
    # Half surrogates, which JSON can escape, have no UTF-8.
    return json.dumps(panel, ensure_ascii=False, allow_nan=False).encode(errors="replace")
