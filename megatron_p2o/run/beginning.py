"""Finds where a run starts: at its first step, or at its newest checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_p2o.algorithm import TrainState
from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY
from megatron_p2o.run.resume.comparison import Change
from megatron_p2o.run.resume.resumption import Resumption, of_ids, resumed_library, resumption
from megatron_p2o.run_folder.checkpoints import latest_checkpoint
from megatron_p2o.run_folder.made_with import MadeWith, made_with, read_made_with
from megatron_p2o.run_folder.state import STATE_FILE, RunState, read_state
from megatron_p2o.terminal import say
from megatron_p2o.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """What a run begins from."""

    state: TrainState
    made_with: MadeWith
    """What it is given now."""
    checkpoint: Path | None = None
    """Checkpoint that the run resumes from; None for a fresh run."""
    resumed: RunState | None = None
    """What the checkpoint says; None without one."""
    changes: Sequence[Change] = ()
    """Since the checkpoint."""
    round_problems: Sequence[Problem] = ()
    """Problems of the evolution round that ran beside training at the checkpoint; empty if none ran."""


def beginning_of(config: Config, run_dir: Path, train: Sequence[Problem]) -> Beginning:
    """Return where the run on the problems `train` starts, and print what has changed since its checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
        ResumeRefused: the run cannot resume from its checkpoint with these inputs.
    """
    made = made_with(config, train)
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return Beginning(state=TrainState(library=EMPTY_LIBRARY), made_with=made)
    resumed, before = read_state(checkpoint / STATE_FILE), read_made_with(checkpoint)
    library = resumed_library(run_dir, resumed.library_version, config.rollout.group_size)
    how = _resumption(before, made, resumed, checkpoint)
    state = TrainState(
        library=library,
        step=resumed.step,
        epoch=resumed.epoch,
        batch=how.batch,
        hard=tuple(of_ids(resumed.hard_problem_ids, train, before, checkpoint)),
    )
    return Beginning(
        state=state,
        made_with=made,
        checkpoint=checkpoint,
        resumed=resumed,
        changes=how.changes,
        round_problems=of_ids(resumed.round_problem_ids, train, before, checkpoint),
    )


def _resumption(before: MadeWith | None, made: MadeWith, resumed: RunState, checkpoint: Path) -> Resumption:
    """Return how the run goes on, and say so."""
    if before is None:
        say(f"{checkpoint} does not say what it was made with: settings, data and model count as they are now")
        return Resumption(batch=resumed.batch, changes=())
    how = resumption(before, made, resumed, checkpoint)
    for change in how.changes:
        say(f"changed since {checkpoint.name}: {change}")
    return how
