"""Decides whether and how a run goes on from its checkpoint, whose inputs may not be its own any more.

Every difference is harmless, takes effect at a named step, or is refused with the ways out. None is ignored, and none
takes effect without a message.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY, PublishedLibrary, library_path, load_library
from megatron_p2o.rl.sampling import fits_group
from megatron_p2o.run.inputs import load_inputs
from megatron_p2o.run.resume.comparison import (
    MAX_PROBLEMS_NAMED,
    Change,
    architecture_differences,
    differing,
    file_differences,
    problem_changes,
    setting_differences,
    training_files,
)
from megatron_p2o.run.resume.place import NEW_RUN, place_in_epoch
from megatron_p2o.run_folder.checkpoints import pointed_name
from megatron_p2o.run_folder.made_with import MadeWith, made_with, read_made_with, with_problems
from megatron_p2o.run_folder.results import finished_line, limit_reached, run_end
from megatron_p2o.run_folder.resume_effects import (
    CHAT_TEMPLATE,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    WHEN,
)
from megatron_p2o.run_folder.state import STATE_FILE, CheckpointError, RunState, read_state
from megatron_p2o.terminal import listed
from megatron_p2o.types import Problem

DECIDES_PROBLEMS = ("data.", "model.", "rollout.max_new_tokens", "sglang.context")
"""Begin the names of the settings that decide which problems of a file are asked."""

DECIDING_FILES = (TOKENIZER, TOKENIZER_SETTINGS, CHAT_TEMPLATE)
"""Files that decide it, too: a prompt that grows beyond the limit is not asked."""

logger = logging.getLogger(__name__)


class ResumeRefused(ValueError):
    """A run cannot resume from its checkpoint with these inputs. The message says what differs and the ways out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumption:
    """What a resumed run continues with."""

    batch: int
    """Batches of the epoch that were asked, in batches of the present size."""
    changes: Sequence[Change]


def check_resume(config: Config, run_dir: Path) -> Resumption | None:
    """Return how a run would go on with these settings; None of one that begins, or whose checkpoint does not say.

    Starts nothing and reads no weights, and the problems only where they may differ.

    Raises:
        ResumeRefused: it cannot go on with them.
        OSError, ValueError: a file that they name cannot be read.
    """
    try:
        name = pointed_name(run_dir / "checkpoints")
        checkpoint = run_dir / "checkpoints" / name
        state = read_state(checkpoint / STATE_FILE) if name else None
        old = read_made_with(checkpoint) if name else None
    except CheckpointError:
        return None  # the run names what is damaged, and takes the checkpoint before
    if state is None:
        return None
    resumed_library(run_dir, state.library_version, config.rollout.group_size)
    if old is None:
        return None
    new = replace(made_with(config, ()), problems=old.problems, mix=old.mix)
    if _may_ask_others(old, new):
        new = with_problems(new, config, load_inputs(config).train)
    return resumption(old, new, state, checkpoint)


def finished(config: Config, run_dir: Path, how: Resumption | None) -> str:
    """Return that a run has nothing left to do with these settings, and how to train on; "" where it has.

    Something is left where steps are, where its results are not those of its last step, and where a setting or a file
    has changed that results depend on. `how`: `check_resume`'s answer.
    """
    end = run_end(run_dir)
    if how is None or end is None:
        return ""
    state = read_state(run_dir / "checkpoints" / pointed_name(run_dir / "checkpoints") / STATE_FILE)
    schedule = config.schedule
    reached = limit_reached(schedule, end.num_steps, end.compute)
    is_done = state.step == end.num_steps and (bool(reached) or state.epoch >= schedule.epochs)
    if not is_done or any(change.when != WHEN["none"] for change in how.changes):
        return ""
    limit = reached or f"schedule.epochs={schedule.epochs}"
    return f"{finished_line(run_dir, state.step)}; to train on: raise {limit}"


def _may_ask_others(old: MadeWith, new: MadeWith) -> bool:
    """Return whether other problems may be asked: reading them all takes a while."""
    return (
        any(old.files.get(name) != new.files.get(name) for name in (*DECIDING_FILES, *training_files(old, new)))
        or old.architecture != new.architecture
        or any(name.startswith(DECIDES_PROBLEMS) for name in differing(old.settings, new.settings))
    )


def resumption(old: MadeWith, new: MadeWith, state: RunState, checkpoint: Path) -> Resumption:
    """Return how a run continues from a checkpoint that was made with `old` and is at `state`.

    Raises:
        ResumeRefused: a difference prevents it.
    """
    differences = [*setting_differences(old, new), *file_differences(old, new)]
    place = place_in_epoch(old, new, state)
    refusals = [
        f"{found}: the checkpoint means nothing under another value; put it back, or {NEW_RUN}"
        for found in (*differences, *architecture_differences(old, new))
        if found.effect == "refused"
    ]
    refusals += [place.refusal] if place.refusal else []
    if refusals:
        raise ResumeRefused(f"{checkpoint} cannot be resumed: " + "\n  and ".join(refusals))
    whens = {**WHEN, "step": f"from step {state.step + 1} on", "order": place.when}
    changes = [Change(name=found.name, old=found.old, new=found.new, when=whens[found.effect]) for found in differences]
    return Resumption(batch=place.batch, changes=[*changes, *problem_changes(old, new, place.when)])


def resumed_library(run_dir: Path, version: int, group_size: int) -> PublishedLibrary:
    """Return the library of a checkpoint. One whose file is gone assigns nothing: everything is asked plainly.

    Raises:
        ResumeRefused: it was altered, or gives templates to groups of another size.
    """
    path = library_path(run_dir, version)
    if version == 0:
        return EMPTY_LIBRARY
    if not path.exists():
        logger.warning(
            "%s is missing: problems are asked without templates until the next round of prompt evolution", path
        )
        return PublishedLibrary(version=version)
    try:
        library = load_library(path)
    except ValueError as error:
        raise ResumeRefused(str(error)) from error
    assigned = library.assignments.items()
    other = {problem_id: len(given) for problem_id, given in assigned if not fits_group(given, group_size)}
    if other:
        size = next(iter(other.values()))
        raise ResumeRefused(
            f"rollout.group_size={group_size} but {path} gives {len(other)} problems {size} templates each, one per "
            f"rollout: set rollout.group_size={size}, or move that file away: problems are then asked without "
            "templates until the next "
            "round of prompt evolution"
        )
    return library


def is_measured_otherwise(changes: Sequence[Change], evaluation_set: str | None) -> bool:
    """Return whether scores on a set of `data.evaluation` cannot be compared with those before the changes."""
    own = f"data.evaluation.{evaluation_set}"  # its file's content goes by this name, the file's path by another
    measures = ("num_samples", "temperature", "task")
    names = (own, *(f"{section}.{measure}" for section in (own, "evaluation") for measure in measures))
    return any(change.name in names for change in changes)


def of_ids(ids: Sequence[str], problems: Sequence[Problem], made: MadeWith | None, checkpoint: Path) -> list[Problem]:
    """Return the problems of a checkpoint's lists of ids, without those that `data.train` no longer has.

    Raises:
        ResumeRefused: some are missing and the checkpoint does not say what it was made with.
    """
    by_id = {problem.id: problem for problem in problems}
    missing = [problem_id for problem_id in dict.fromkeys(ids) if problem_id not in by_id]
    if missing and made is None:
        raise ResumeRefused(
            f"{checkpoint} is in the middle of an epoch of which data.train no longer holds {len(missing)} problems "
            f"({listed(missing, MAX_PROBLEMS_NAMED)}): restore the file, or {NEW_RUN}"
        )
    return [by_id[problem_id] for problem_id in ids if problem_id in by_id]
