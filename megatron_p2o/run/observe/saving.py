"""Saves checkpoints, each with the state of the run and its template library."""

import logging
from pathlib import Path

from megatron_p2o.algorithm import TrainState
from megatron_p2o.evolve.record.library import PublishedLibrary, library_path
from megatron_p2o.interfaces import PromptEvolution, TemplateLibrary
from megatron_p2o.metrics.clock import PhaseClock
from megatron_p2o.run.observe.files import RunFiles
from megatron_p2o.run.observe.progress import Progress
from megatron_p2o.run_folder.checkpoints import Best
from megatron_p2o.run_folder.state import CheckpointError, RunState

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run."""

    def __init__(
        self, files: RunFiles, progress: Progress, evolution: PromptEvolution | None, clock: PhaseClock
    ) -> None:
        self._files, self._progress, self._evolution, self._clock = files, progress, evolution, clock

    def save(self, state: TrainState, best: Best | None = None) -> None:
        """Begin a checkpoint of `state`; training goes on once it is copied. Raises `CheckpointError`.

        `best`: what makes it the best so far, if it is.
        """
        self._files.metrics.announce("checkpoint")
        with self._clock.measure("save"):
            keep_library(state.library, self._files.run_dir)
            self._files.checkpoints.begin(self._run_state(state), best)

    def save_last(self, state: TrainState) -> None:
        """Write a checkpoint of `state` and wait until it is whole. Raises `CheckpointError`."""
        self.save(state)
        self._files.checkpoints.finish()

    def finish(self, best: Best | None) -> None:
        """Wait until the last checkpoint is whole, and make it the best where it is. Raises `CheckpointError`."""
        self._files.checkpoints.finish()
        if best is not None:
            self._files.checkpoints.point_best(best)

    def check(self) -> None:
        """Raise `CheckpointError` if the last checkpoint has failed. Does not wait."""
        self._files.checkpoints.check()

    def confirm(self, step: int) -> None:
        """Note that `step` was healthy: so is the checkpoint before it."""
        self._files.checkpoints.confirm(step)

    def way_back(self, is_newest_good: bool) -> str:
        """Return `CheckpointSaver.way_back`; waits for the last checkpoint, whose failure is logged: the run ends."""
        try:
            self._files.checkpoints.finish()
        except CheckpointError as error:
            logger.warning("%s", error)
        return self._files.checkpoints.way_back(is_newest_good)

    def _run_state(self, state: TrainState) -> RunState:
        return self._progress.run_state(
            state,
            self._evolution.running if self._evolution else None,
            num_ledger_entries=self._files.ledger.num_entries,
            num_metrics_lines=self._files.metrics.num_lines,
        )


def keep_library(library: TemplateLibrary, run_dir: Path) -> None:
    """Write a library that no round has published: a cleared one, which a checkpoint refers to all the same."""
    if isinstance(library, PublishedLibrary) and not library_path(run_dir, library.version).exists():
        library.save(run_dir)
