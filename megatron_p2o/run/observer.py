"""What happens around the steps of a run: numbers, rollouts, ledger, evaluations and checkpoints."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_p2o.algorithm import Parts, StepResult, TrainState
from megatron_p2o.config.tree import Config, EvaluationConfig
from megatron_p2o.evaluation.outcome import Evaluation, NothingDecided, evaluation_metrics, evaluation_record
from megatron_p2o.evaluation.protocol import best_template, evaluate, template_of
from megatron_p2o.evolve.search.publish import rounds_path
from megatron_p2o.files import write_whole
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.metrics.clock import PhaseClock
from megatron_p2o.metrics.jsonl import read_lines
from megatron_p2o.metrics.log import MetricsLog
from megatron_p2o.metrics.read import read_metrics
from megatron_p2o.metrics.rollouts import RolloutWriter
from megatron_p2o.metrics.step import (
    asked_plainly_metrics,
    epoch_metrics,
    forgotten_metrics,
    library_metrics,
    phase_metrics,
    step_metrics,
)
from megatron_p2o.metrics.values import Last, MetricValue, Sum
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry, ledger_entry
from megatron_p2o.run.alarms import (
    MISMATCH,
    HealthWatch,
    MismatchWatch,
    stop_where_nothing_was_sampled,
    warn_of_a_skipped_round,
    warn_of_forgotten,
    warn_of_skipped_updates,
    warn_of_undecided,
)
from megatron_p2o.run_folder.checkpoints import Best, CheckpointSaver, checkpoint_name, read_best
from megatron_p2o.run_folder.state import CheckpointError, LedgerFile, RunState, StopRequest
from megatron_p2o.types import PLAIN, Group, Problem, Template

logger = logging.getLogger(__name__)

RoundStatistics = Mapping[str, float]
"""Numbers of the last evolution round by name; empty when none ran since they were last asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The files a run appends to."""

    run_dir: Path
    ledger: LedgerFile
    metrics: MetricsLog
    checkpoints: CheckpointSaver
    rollouts: RolloutWriter


class RunObserver:
    """Implements `algorithm.TrainObserver` for a run directory. Lives on the conducting rank."""

    def __init__(
        self,
        *,
        config: Config,
        parts: Parts,
        files: RunFiles,
        clock: PhaseClock,
        stop: StopRequest,
        evaluation_sets: Mapping[str, Sequence[Problem]],
        observe_groups: Callable[[Sequence[Group]], None],
        keep_library: Callable[[TemplateLibrary], None],
        take_round_statistics: Callable[[], RoundStatistics],
        process_metrics: Callable[[Mapping[str, int]], Mapping[str, float]],
        resumed: RunState | None,
        is_measured_otherwise: bool = False,
    ) -> None:
        """`is_measured_otherwise`: scores on `evaluation.best_set` cannot be compared with those before the resume."""
        self._config, self._parts, self._files, self._clock, self._stop = config, parts, files, clock, stop
        self._evaluation_sets = evaluation_sets
        self._observe_groups = observe_groups
        self._keep_library = keep_library
        self._take_round_statistics = take_round_statistics
        self._process_metrics = process_metrics
        self._num_rollouts_train = resumed.num_rollouts_train if resumed else 0
        self._num_rollouts_evolution = resumed.num_rollouts_evolution if resumed else 0
        self._wall_s_before = resumed.wall_s if resumed else 0.0
        self._started = self._last_end = time.monotonic()
        self._first_round: RoundStatistics = resumed.first_round if resumed else {}
        self._published_accuracy: Mapping[str, float] = resumed.published_accuracy if resumed else {}
        self._is_resumed = resumed is not None
        self._best = None if is_measured_otherwise else _best_of_history(files.run_dir, config.evaluation, resumed)
        # An empty library, after everything was internalised, does not make the last template worth less.
        self._best_template = template_of(resumed.best_template) if resumed else PLAIN
        self._library_version = resumed.library_version if resumed else 0
        self._health = HealthWatch()
        self._mismatch = MismatchWatch(config.alarms, _earlier_mismatches(files.run_dir) if resumed else [])

    @property
    def ledger(self) -> HardSampleLedger:
        return self._files.ledger.ledger

    def on_start(self, state: TrainState) -> None:
        """Evaluate the initial policy of a fresh run."""
        if self._config.evaluation.at_start and not self._is_resumed:
            self._evaluate(state, PLAIN, "")

    def on_step(self, state: TrainState, result: StepResult) -> None:
        self._files.checkpoints.check()
        now = time.monotonic()
        phases = self._clock.take()
        seconds = {**phases.seconds, "step": now - self._last_end}
        of_processes = {name: Last(value) for name, value in self._process_metrics(phases.peak_bytes).items()}
        entries = [ledger_entry(group, state.epoch, state.step) for group in result.groups]
        metrics = {
            **step_metrics(result.groups, result.reports, seconds, phases.peak_bytes),
            "rollout/batches_count": Sum(result.num_batches),
            **asked_plainly_metrics(result.groups, state.library),
            **self._forgotten(state, entries),
        }
        self._files.metrics.write(state.step, state.epoch, {**metrics, **of_processes})
        self._files.ledger.append(entries)
        self._observe_groups(result.groups)
        self._note_library(state, {})
        self._num_rollouts_train += sum(len(group.rollouts) for group in result.groups)
        if _is_due(state.step, self._config.logging.rollouts_every_steps):
            self._files.rollouts.write(state.step, result.groups, self._parts.renderer.decode)
        warn_of_skipped_updates(state.step, result.reports)
        warn_of_undecided(state.step, metrics, self._config.alarms.undecided)
        if self._health.is_healthy(state.step, result.groups, result.reports):
            self._files.checkpoints.confirm(state.step)
        stop_where_nothing_was_sampled(state.step, result.groups)
        self._mismatch.look(state.step, metrics)
        best = None
        if _is_due(state.step, self._config.evaluation.every_steps):
            best = self._new_best(state, self._evaluate(state, PLAIN, ""))
        if best is not None or _is_due(state.step, self._config.schedule.save_every_steps):
            self.save(state, best)
        self._last_end = time.monotonic()

    def _forgotten(self, state: TrainState, entries: Sequence[LedgerEntry]) -> Mapping[str, MetricValue]:
        """Measure, and warn of, problems whose plain success is gone (see `HardSampleLedger.forgotten`)."""
        num_forgotten, num_mastered = self.ledger.forgotten(entries)
        warn_of_forgotten(state.step, num_forgotten, num_mastered, self._config.alarms.forgotten)
        return forgotten_metrics(num_forgotten, num_mastered)

    def on_epoch(self, state: TrainState, hard: Sequence[Problem]) -> None:
        is_skipped = self._is_round_skipped(state, len(hard))
        if is_skipped:
            warn_of_a_skipped_round(state.epoch, len(hard), self._config.hard.min_problems)
        self._note_library(state, {**epoch_metrics(hard, is_skipped), **phase_metrics(self._clock.take().seconds)})
        self._last_end = time.monotonic()

    def _is_round_skipped(self, state: TrainState, num_hard: int) -> bool | None:
        """Return whether the hard set is too small for evolution after an epoch; None where none would follow."""
        is_last = state.epoch >= self._config.schedule.epochs
        return None if is_last or not self._config.evolution.enabled else num_hard < self._config.hard.min_problems

    def _note_library(self, state: TrainState, metrics: Mapping[str, MetricValue]) -> None:
        """Write `metrics` and what is to be said of a library that is new, then measure its best template."""
        if state.library.version == self._library_version:
            if metrics:
                self._files.metrics.write(state.step, state.epoch, metrics)
            return
        self._library_version = state.library.version
        statistics = self._take_round_statistics()
        self._num_rollouts_evolution += int(statistics.get("num_rollouts", 0))
        self._first_round = self._first_round or statistics
        library = library_metrics(state.library.version, len(state.library.templates), statistics)
        self._files.metrics.write(state.step, state.epoch, {**metrics, **library})
        best = best_template(state.library)
        if best is not PLAIN:
            self._best_template = best
            if self._config.evaluation.with_best_template:
                outcome = self._evaluate(state, best, "templated_")
                self._published_accuracy = self._published_accuracy or _accuracies(outcome)

    def should_stop(self, state: TrainState) -> bool:
        limit = self._config.schedule.max_steps
        return self._stop.is_made() or (limit is not None and state.step >= limit)

    def save(self, state: TrainState, best: Best | None = None) -> None:
        """Begin a checkpoint of `state`; training goes on once it is copied. Raises `CheckpointError`.

        `best`: what makes it the best so far, if it is.
        """
        self._files.metrics.announce("checkpoint")
        with self._clock.measure("save"):
            self._keep_library(state.library)
            self._files.checkpoints.begin(self._run_state(state), best)

    def way_back(self, is_newest_good: bool) -> str:
        """Return `CheckpointSaver.way_back`; waits for the last checkpoint, whose failure is logged: the run ends."""
        try:
            self._files.checkpoints.finish()
        except CheckpointError as error:
            logger.warning("%s", error)
        return self._files.checkpoints.way_back(is_newest_good)

    def save_last(self, state: TrainState) -> None:
        """Write a checkpoint of `state` and wait until it is whole. Raises `CheckpointError`."""
        self.save(state)
        self._files.checkpoints.finish()

    def on_end(self, state: TrainState) -> None:
        """Save, evaluate and write results.json."""
        if state.step > 0:
            self.save(state)
        plain = self._evaluate(state, PLAIN, "")
        best = self._best_template
        templated = self._evaluate(state, best, "templated_") if best is not PLAIN else {}
        self._files.checkpoints.finish()
        last_best = self._new_best(state, plain)
        if last_best is not None:
            self._files.checkpoints.point_best(last_best)
        write_whole(self._files.run_dir / "results.json", json.dumps(self._results(state, plain, templated), indent=1))

    def _new_best(self, state: TrainState, outcome: Mapping[str, Evaluation]) -> Best | None:
        """Return and note what makes the checkpoint of this step the best so far; None when it is not."""
        settings = self._config.evaluation
        if settings.best_set is None or state.step == 0:
            return None
        score = _score(outcome.get(settings.best_set), settings)
        if score is None or (self._best is not None and score <= self._best.score):
            return None
        self._best = Best(
            checkpoint=checkpoint_name(state.step),
            step=state.step,
            set=settings.best_set,
            metric=settings.best_metric,
            score=score,
        )
        return self._best

    def _results(
        self, state: TrainState, plain: Mapping[str, Evaluation], templated: Mapping[str, Evaluation]
    ) -> dict[str, Any]:
        run_state = self._run_state(state)
        return {
            "arm": self._config.run.arm,
            "seed": self._config.run.seed,
            "num_steps": state.step,
            "evaluation": {name: evaluation_record(outcome) for name, outcome in plain.items()},
            "templated_evaluation": {name: evaluation_record(outcome) for name, outcome in templated.items()},
            "templated_accuracy_when_published": self._published_accuracy,
            "best_template": self._best_template.text,
            "first_round": dict(self._first_round),
            "rounds": list(read_lines(rounds_path(self._files.run_dir))),
            "pass_at_n_plain": self._first_round.get("pass_at_n_plain"),
            "num_internalised": len(self.ledger.internalised()),
            "num_rollouts_train": run_state.num_rollouts_train,
            "num_rollouts_evolution": run_state.num_rollouts_evolution,
            "wall_s": run_state.wall_s,
        }

    def _evaluate(self, state: TrainState, template: Template, prefix: str) -> dict[str, Evaluation]:
        self._files.metrics.announce("evaluation")
        outcome: dict[str, Evaluation] = {}
        for name, problems in self._evaluation_sets.items():
            try:
                outcome[name] = evaluate(name, problems, self._parts, self._config, template)
            except NothingDecided as error:
                logger.warning("evaluation of %s at step %d: %s: it has no outcome", prefix + name, state.step, error)
        self._clock.take()
        if outcome:
            metrics = evaluation_metrics({prefix + name: each for name, each in outcome.items()})
            self._files.metrics.write(state.step, state.epoch, metrics)
            warn_of_undecided(state.step, metrics, self._config.alarms.undecided)
        self._last_end = time.monotonic()
        return outcome

    def _run_state(self, state: TrainState) -> RunState:
        running = self._parts.evolution.running if self._parts.evolution else None
        return RunState(
            step=state.step,
            epoch=state.epoch,
            batch=state.batch,
            hard_problem_ids=tuple(problem.id for problem in state.hard),
            library_version=state.library.version,
            num_ledger_entries=self._files.ledger.num_entries,
            num_metrics_lines=self._files.metrics.num_lines,
            first_round=self._first_round,
            published_accuracy=self._published_accuracy,
            num_rollouts_train=self._num_rollouts_train,
            num_rollouts_evolution=self._num_rollouts_evolution,
            best_template=self._best_template.text,
            wall_s=self._wall_s_before + time.monotonic() - self._started,
            round_epoch=running.epoch if running else -1,
            round_problem_ids=running.problem_ids if running else (),
        )


def _best_of_history(run_dir: Path, settings: EvaluationConfig, resumed: RunState | None) -> Best | None:
    """Return the best checkpoint before the one a run resumes from; None when another measure found it."""
    best = read_best(run_dir) if resumed is not None else None
    is_ours = (
        best is not None
        and resumed is not None
        and best.step <= resumed.step
        and (best.set, best.metric) == (settings.best_set, settings.best_metric)
    )
    return best if is_ours else None


def _earlier_mismatches(run_dir: Path) -> list[float]:
    """Return what engine and trainer differed by in each step that metrics.jsonl holds."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [line.metrics[MISMATCH] for line in lines if MISMATCH in line.metrics]


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _score(outcome: Evaluation | None, settings: EvaluationConfig) -> float | None:
    """Return what decides which checkpoint is the best; None where too few answers have a verdict."""
    if outcome is None or settings.best_metric == "avg":
        return outcome.accuracy if outcome is not None else None
    return outcome.pass_at.get(str(outcome.samples_per_problem))


def _accuracies(outcome: Mapping[str, Evaluation]) -> dict[str, float]:
    return {name: each.accuracy for name, each in outcome.items()}
