"""The actions around the steps of a run, in order. Each part is a module in this folder."""

from collections.abc import Mapping, Sequence

from megatron_p2o.algorithm import StepResult, TrainState
from megatron_p2o.config.tree import Config
from megatron_p2o.evaluation.protocol import best_templates
from megatron_p2o.metrics.step import epoch_metrics, ledger_metrics, library_metrics
from megatron_p2o.metrics.values import MetricValue
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.run.beginning import Beginning
from megatron_p2o.run.observe.alarms import Alarms, earlier_mismatches, skipped_round, warn_of_a_skipped_round
from megatron_p2o.run.observe.compute import RunCompute
from megatron_p2o.run.observe.evaluations import BestSoFar, Evaluations, best_before
from megatron_p2o.run.observe.files import RunFiles
from megatron_p2o.run.observe.progress import Progress
from megatron_p2o.run.observe.results import write_run_results
from megatron_p2o.run.observe.saving import Saver
from megatron_p2o.run.observe.step_log import StepLog, is_due
from megatron_p2o.run.parts import RunParts
from megatron_p2o.run_folder.results import limit_reached
from megatron_p2o.run_folder.state import StopRequest
from megatron_p2o.types import Problem


class RunObserver:
    """Implements `algorithm.TrainObserver` for a run directory. Lives on the conducting rank."""

    def __init__(
        self,
        config: Config,
        started: RunParts,
        files: RunFiles,
        evaluation_sets: Mapping[str, Sequence[Problem]],
        beginning: Beginning,
        stop: StopRequest,
    ) -> None:
        self._config, self._files, self._stop = config, files, stop
        self._evolution = started.evolution
        self._progress = Progress(beginning.resumed, started.compute)
        self._compute = RunCompute(started.compute, files.run_dir)
        renderer = started.parts.renderer
        self._evolution.announce_to(files.metrics.announce)
        self._log = StepLog(files, started.clock, started.processes, self._compute, renderer, config)
        self._saver = Saver(files, self._progress, started.parts.evolution, started.clock)
        self._evaluations = Evaluations(evaluation_sets, started.parts, config, self._log, started.compute)
        self._best = BestSoFar(config.evaluation, best_before(files.run_dir, config.evaluation, beginning))
        earlier = earlier_mismatches(files.run_dir) if beginning.resumed else []
        self._alarms = Alarms(config.alarms, config.objective, earlier)

    @property
    def ledger(self) -> HardSampleLedger:
        return self._files.ledger.ledger

    def on_start(self, state: TrainState) -> None:
        """Evaluate the initial policy of a fresh run."""
        if self._config.evaluation.at_start:
            self._evaluations.measure(state)
        self._log.begin_step()

    def on_step(self, state: TrainState, result: StepResult) -> None:
        self._saver.check()
        metrics = self._log.write_step(state, result)
        self._progress.count_rollouts(result.groups)
        self._evolution.observe(result.groups)
        self._note_library(state, {})
        if self._alarms.is_healthy(state.step, result, metrics):
            self._saver.confirm(state.step)
        self._alarms.check(state.step, result, metrics)
        best = None
        if is_due(state.step, self._config.evaluation.every_steps):
            best = self._best.take(state.step, self._evaluations.measure(state))
        if best is not None or is_due(state.step, self._config.schedule.save_every_steps):
            self._saver.save(state, best)
        self._log.begin_step()

    def on_epoch(self, state: TrainState, hard: Sequence[Problem]) -> None:
        is_skipped = self._is_round_skipped(state, len(hard))
        if is_skipped:
            self._tell_of_a_skipped_round(state.epoch, len(hard))
        of_epoch = {**epoch_metrics(hard, is_skipped), **ledger_metrics(self.ledger)}
        self._note_library(state, {**of_epoch, **self._log.take_phases()})
        self._log.begin_step()

    def should_stop(self, state: TrainState) -> bool:
        return self._stop.is_made() or bool(self._limit_reached(state))

    def on_stop(self, state: TrainState) -> None:
        """Save where someone has asked the run to stop, and wait until that is done. Raises `CheckpointError`."""
        self._saver.save_last(state)

    def on_end(self, state: TrainState) -> None:
        """Save, evaluate and write results.json. Raises `CheckpointError` and `OSError`."""
        if state.step > 0:
            self._saver.save(state)
        plain = self._evaluations.measure(state)
        templates = self._progress.best_templates
        templated = self._evaluations.measure(state, templates) if templates else {}
        self._saver.finish(self._best.take(state.step, plain))
        write_run_results(
            self._files, self._config, self._progress, self._compute.account(state), state, plain, templated
        )

    def way_back(self, is_newest_good: bool) -> str:
        """Return which checkpoint to go back to, and how; see `CheckpointSaver.way_back`."""
        return self._saver.way_back(is_newest_good)

    def _limit_reached(self, state: TrainState) -> str:
        return limit_reached(self._config.schedule, state.step, self._compute.account(state))

    def _tell_of_a_skipped_round(self, epoch: int, num_hard: int) -> None:
        """Warn where prompts have never evolved; after a round, or where nothing is hard, it is what was wanted."""
        min_problems = self._config.hard.min_problems
        if self._progress.first_round or num_hard == 0:
            self._log.announce(skipped_round(epoch, num_hard, min_problems))
        else:
            warn_of_a_skipped_round(epoch, num_hard, min_problems)

    def _is_round_skipped(self, state: TrainState, num_hard: int) -> bool | None:
        """Return whether the hard set is too small for evolution after an epoch; None where none would follow."""
        is_last = state.epoch >= self._config.schedule.epochs
        return None if is_last or not self._config.evolution.enabled else num_hard < self._config.hard.min_problems

    def _note_library(self, state: TrainState, metrics: Mapping[str, MetricValue]) -> None:
        """Write `metrics` and the record of a new library, then measure its best template of each task."""
        if not self._progress.is_new_library(state.library.version):
            self._log.write(state, metrics)
            return
        statistics = self._evolution.take_statistics()
        self._progress.count_round(statistics)
        library = library_metrics(state.library.version, len(state.library.templates), statistics)
        self._log.write(state, {**metrics, **library})
        best = best_templates(state.library)
        if best:
            is_measured = self._config.evaluation.with_best_template
            outcome = self._evaluations.measure(state, best) if is_measured else {}
            self._progress.note_published(best, {name: each.accuracy for name, each in outcome.items()})
