"""Logs a run: metrics, the ledger of its problems, and rollouts."""

import time
from collections.abc import Mapping, Sequence

from megatron_p2o.algorithm import StepResult, TrainState
from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import PromptRenderer
from megatron_p2o.metrics.clock import PhaseClock
from megatron_p2o.metrics.compute import compute_metrics
from megatron_p2o.metrics.step import (
    asked_plainly_metrics,
    forgotten_metrics,
    hint_metrics,
    phase_metrics,
    shifts_by_rollout,
    step_metrics,
    template_effect_metrics,
)
from megatron_p2o.metrics.values import Last, MetricValue, Sum
from megatron_p2o.rl.hard_samples import ledger_entry
from megatron_p2o.rl.objective import samples_plainly
from megatron_p2o.rl.sampling import given_templates, hint_level, uses_hints
from megatron_p2o.run.observe.compute import RunCompute
from megatron_p2o.run.observe.files import RunFiles
from megatron_p2o.run.observe.processes import ProcessMeter
from megatron_p2o.types import Group


class StepLog:
    """Writes down what a run does, step by step."""

    def __init__(
        self,
        files: RunFiles,
        clock: PhaseClock,
        processes: ProcessMeter,
        compute: RunCompute,
        renderer: PromptRenderer,
        config: Config,
    ) -> None:
        self._files, self._clock, self._processes, self._renderer = files, clock, processes, renderer
        self._compute = compute
        self._config = config
        self._step_began = time.monotonic()

    def begin_step(self) -> None:
        """Note the end of the work between two steps: a step's seconds count from here."""
        self._step_began = time.monotonic()

    def write_step(self, state: TrainState, result: StepResult) -> Mapping[str, MetricValue]:
        """Write a step's numbers, what became of its problems and, where they are due, its rollouts.

        Returns the numbers, less those of processes.
        """
        phases = self._clock.take()
        seconds = {**phases.seconds, "step": time.monotonic() - self._step_began}
        of_processes = {name: Last(value) for name, value in self._processes.metrics(phases.peak_bytes).items()}
        entries = [ledger_entry(group, state.epoch, state.step) for group in result.groups]
        metrics = {
            **step_metrics(result.groups, result.reports, seconds, phases.peak_bytes),
            "rollout/batches_count": Sum(result.num_batches),
            **self._template_metrics(state, result.groups),
            **forgotten_metrics(*self._files.ledger.ledger.forgotten(entries)),
            **template_effect_metrics(entries),
        }
        shifts = shifts_by_rollout(result.reports)
        if shifts:
            metrics["template/library_version"] = Last(state.library.version)
        self.write(state, {**metrics, **of_processes})
        self._files.ledger.append(entries)
        if is_due(state.step, self._config.logging.rollouts_every_steps):
            self._files.rollouts.write(state.step, result.groups, self._renderer, shifts)
        return metrics

    def _template_metrics(self, state: TrainState, groups: Sequence[Group]) -> Mapping[str, MetricValue]:
        """Return what became of the templates and hints of a step that is not in the ledger yet."""
        ledger, config, metrics = self._files.ledger.ledger, self._config, dict[str, MetricValue]()
        problems = [group.problem for group in groups]
        if not samples_plainly(config.objective.context):
            given = [given_templates(problem, state.library, ledger, config) for problem in problems]
            metrics |= asked_plainly_metrics(groups, given)
        if uses_hints(config.data):
            metrics |= hint_metrics(problems, [hint_level(problem, ledger, config) for problem in problems])
        return metrics

    def write(self, state: TrainState, metrics: Mapping[str, MetricValue]) -> None:
        """Write numbers of `state`, and what has been spent until now; none are no line."""
        if metrics:
            spent = compute_metrics(self._compute.account(state))
            self._files.metrics.write(state.step, state.epoch, {**metrics, **spent})

    def take_phases(self) -> Mapping[str, MetricValue]:
        """Return what the phases since the last step or call took."""
        return phase_metrics(self._clock.take().seconds)

    def announce(self, activity: str) -> None:
        """Tell the person watching what the run is doing now."""
        self._files.metrics.announce(activity)


def is_due(step: int, every: int) -> bool:
    """Return whether an action of every N steps is due after this step; N = 0 means never."""
    return every > 0 and step % every == 0
