"""Counts and results of a run over all its starts: the part of its state that is no training cursor."""

from collections.abc import Mapping, Sequence

from megatron_p2o.algorithm import TrainState
from megatron_p2o.evaluation.protocol import template_with_text
from megatron_p2o.metrics.compute import ComputeMeter
from megatron_p2o.run_folder.state import RunState
from megatron_p2o.types import PLAIN, Group, RunningRound, Template

RoundStatistics = Mapping[str, float]
"""Numbers of the last evolution round by name; empty when none ran since they were last asked for."""


class Progress:
    """The counts of a run. Begins with those of the checkpoint that the run goes on from."""

    def __init__(self, resumed: RunState | None, compute: ComputeMeter) -> None:
        self._compute = compute
        self.num_rollouts_train = resumed.num_rollouts_train if resumed else 0
        self.num_rollouts_evolution = resumed.num_rollouts_evolution if resumed else 0
        self.first_round: RoundStatistics = resumed.first_round if resumed else {}
        self.published_accuracy: Mapping[str, float] = resumed.published_accuracy if resumed else {}
        """Accuracy by evaluation set under the first published template that was measured; empty before."""
        self.best_templates: Mapping[str, Template] = _templates_of(resumed) if resumed else {}
        """Best template of each task, of the last library that had any for it; of a single task by "". An empty
        library, after everything was internalised, does not replace them."""
        self._library_version = resumed.library_version if resumed else 0

    def count_rollouts(self, groups: Sequence[Group]) -> None:
        self.num_rollouts_train += sum(len(group.rollouts) for group in groups)

    def is_new_library(self, version: int) -> bool:
        """Return whether the library of this version has not been seen before, and note that it has."""
        is_new = version != self._library_version
        self._library_version = version
        return is_new

    def count_round(self, statistics: RoundStatistics) -> None:
        self.num_rollouts_evolution += int(statistics.get("num_rollouts", 0))
        self.first_round = self.first_round or statistics

    def note_published(self, templates: Mapping[str, Template], accuracy: Mapping[str, float]) -> None:
        """Note the best templates of a new library by task and, where they were measured, their accuracy by set."""
        self.best_templates = {**self.best_templates, **templates}
        self.published_accuracy = self.published_accuracy or accuracy

    def run_state(
        self, state: TrainState, running: RunningRound | None, *, num_ledger_entries: int, num_metrics_lines: int
    ) -> RunState:
        """Return what a checkpoint of `state` says; `running`: the round of evolution beside training, if any."""
        compute = self._compute.account()
        return RunState(
            step=state.step,
            epoch=state.epoch,
            batch=state.batch,
            num_batches=state.num_batches,
            hard_problem_ids=tuple(problem.id for problem in state.hard),
            library_version=state.library.version,
            num_ledger_entries=num_ledger_entries,
            num_metrics_lines=num_metrics_lines,
            first_round=self.first_round,
            published_accuracy=self.published_accuracy,
            num_rollouts_train=self.num_rollouts_train,
            num_rollouts_evolution=self.num_rollouts_evolution,
            best_template=self.best_templates.get("", PLAIN).text,
            best_templates={task: template.text for task, template in self.best_templates.items() if task},
            wall_s=compute.wall_s,
            compute=compute,
            round_epoch=running.epoch if running else -1,
            round_problem_ids=running.problem_ids if running else (),
        )


def _templates_of(state: RunState) -> dict[str, Template]:
    texts = {"": state.best_template, **state.best_templates}
    return {task: template_with_text(text, task) for task, text in texts.items() if text}
