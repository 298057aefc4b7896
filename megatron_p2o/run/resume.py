"""Compares the inputs of a resumed run with those that its checkpoint was made with.

Every difference is harmless, takes effect at a named step, or is refused with the ways out. None is ignored, and none
takes effect without a message.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_p2o.config.tree import Config
from megatron_p2o.data.batches import asked_counts
from megatron_p2o.evolve.record.library import EMPTY_LIBRARY, PublishedLibrary, library_path, load_library
from megatron_p2o.run.inputs import load_inputs
from megatron_p2o.run_folder.checkpoints import pointed_name
from megatron_p2o.run_folder.made_with import MadeWith, made_with, read_made_with, with_problems
from megatron_p2o.run_folder.results import finished_line, limit_reached, run_end
from megatron_p2o.run_folder.resume_effects import (
    CHAT_TEMPLATE,
    MAPPINGS,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    WHEN,
    Effect,
    effect_of,
    effect_of_file,
)
from megatron_p2o.run_folder.state import STATE_FILE, CheckpointError, RunState, read_state
from megatron_p2o.terminal import listed
from megatron_p2o.types import Problem

MAX_PROBLEMS_NAMED = 5
"""Problems that a sentence names."""

MAX_VALUE_CHARS = 60
"""Longest value that a sentence quotes."""

NEW_RUN = "begin another run (run.name) from this one's weights (tools/convert_checkpoint.py)"

CONTENT = "content "
"""Begins how a file's content is quoted."""

PER_STEP = "schedule.problems_per_step"

logger = logging.getLogger(__name__)


DECIDES_PROBLEMS = ("data.", "model.", "rollout.max_new_tokens", "sglang.context")
"""Begin the names of the settings that decide which problems of a file are asked."""

DECIDING_FILES = (TOKENIZER, TOKENIZER_SETTINGS, CHAT_TEMPLATE)
"""Files that decide it, too: a prompt that grows beyond the limit is not asked."""


class ResumeRefused(ValueError):
    """A run cannot resume from its checkpoint with these inputs. The message says what differs and the ways out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One thing that is not what the checkpoint was made with."""

    name: str
    """Dotted name of a setting, or what a file is to the model."""
    old: Any
    new: Any
    when: str
    """When the change takes effect."""

    def __str__(self) -> str:
        return f"{self.name}: {_quoted(self.old)} -> {_quoted(self.new)}: {self.when}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumption:
    """What a resumed run continues with."""

    batch: int
    """Batches of the epoch that were asked, in batches of the present size."""
    changes: Sequence[Change]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Difference:
    """The difference of one setting, and its class."""

    name: str
    old: Any
    new: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.name}: {_quoted(self.old)} -> {_quoted(self.new)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Position of a checkpoint in its epoch, before and after a change of the epoch's order."""

    batch: int
    when: str
    refusal: str = ""


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


def _training_files(old: MadeWith, new: MadeWith) -> list[str]:
    return [name for name in dict.fromkeys((*old.files, *new.files)) if name.startswith("data.train")]


def _may_ask_others(old: MadeWith, new: MadeWith) -> bool:
    """Return whether other problems may be asked: reading them all takes a while."""
    return (
        any(old.files.get(name) != new.files.get(name) for name in (*DECIDING_FILES, *_training_files(old, new)))
        or old.architecture != new.architecture
        or any(name.startswith(DECIDES_PROBLEMS) for name in _differing(old.settings, new.settings))
    )


def resumption(old: MadeWith, new: MadeWith, state: RunState, checkpoint: Path) -> Resumption:
    """Return how a run continues from a checkpoint that was made with `old` and is at `state`.

    Raises:
        ResumeRefused: a difference prevents it.
    """
    differences = [*_setting_differences(old, new), *_file_differences(old, new)]
    place = _place_in_epoch(old, new, state)
    refusals = [
        f"{found}: the checkpoint means nothing under another value; put it back, or {NEW_RUN}"
        for found in (*differences, *_architecture_differences(old, new))
        if found.effect == "refused"
    ]
    refusals += [place.refusal] if place.refusal else []
    if refusals:
        raise ResumeRefused(f"{checkpoint} cannot be resumed: " + "\n  and ".join(refusals))
    whens = {**WHEN, "step": f"from step {state.step + 1} on", "order": place.when}
    changes = [Change(name=found.name, old=found.old, new=found.new, when=whens[found.effect]) for found in differences]
    return Resumption(batch=place.batch, changes=[*changes, *_problem_changes(old, new, place.when)])


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
    other = {problem_id: len(given) for problem_id, given in library.assignments.items() if len(given) != group_size}
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


def _setting_differences(old: MadeWith, new: MadeWith) -> Iterator[_Difference]:
    for name in _differing(old.settings, new.settings):
        pair = (old.settings.get(name), new.settings.get(name))
        yield _Difference(name=name, old=pair[0], new=pair[1], effect=effect_of(name))


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ. One that only another version knows is none, a free key is."""
    names = [
        name
        for name in dict.fromkeys((*old, *new))
        if (name in old and name in new) or name.startswith(tuple(f"{mapping}." for mapping in MAPPINGS))
    ]
    return [name for name in names if old.get(name) != new.get(name)]


def _file_differences(old: MadeWith, new: MadeWith) -> Iterator[_Difference]:
    """Yield files of other content. `data.train` counts by its problems."""
    for name in sorted(old.files.keys() & new.files.keys() - {*_training_files(old, new)}):
        pair = (old.files[name], new.files[name])
        if pair[0] != pair[1]:
            before, after = (f"{CONTENT}{digest[:8]}" for digest in pair)
            yield _Difference(name=name, old=before, new=after, effect=effect_of_file(name))


def _architecture_differences(old: MadeWith, new: MadeWith) -> Iterator[_Difference]:
    for name in dict.fromkeys((*old.architecture, *new.architecture)):
        pair = (old.architecture.get(name), new.architecture.get(name))
        if pair[0] != pair[1]:
            yield _Difference(name=f"{name} of model.path", old=pair[0], new=pair[1], effect="refused")


def _place_in_epoch(old: MadeWith, new: MadeWith, state: RunState) -> _Place:
    """Return the checkpoint's position in the current order of problems.

    An epoch is one shuffle of one list. What decides the order may change between two epochs; the size of a step may
    also where what was asked is a whole number of steps of the new size.
    """
    reordering = [f"{found}" for found in _setting_differences(old, new) if found.effect == "order"]
    moved = _moved_problems(old, new)
    names_it = bool(moved) and _weights(old) == _weights(new)  # that sizes differ follows from moved problems
    if old.mix and old.mix != new.mix and not names_it:
        reordering.append(f"tasks of data.train (problems, weight): {old.mix} -> {new.mix}")
    if not reordering and not moved:
        return _Place(batch=state.batch, when="the next time they are asked")
    old_size, new_size = old.settings[PER_STEP], new.settings[PER_STEP]
    num_batches = state.num_batches or _num_asked(old) // old_size
    if state.batch == 0:
        return _Place(batch=0, when=f"from step {state.step + 1} on, which begins epoch {state.epoch}")
    if state.batch >= num_batches:
        return _Place(batch=_num_asked(new) // new_size, when=f"from epoch {state.epoch + 1} on, which comes next")
    num_asked = state.batch * old_size
    only_size = not moved and len(reordering) == 1 and old_size != new_size
    if only_size and num_asked % new_size == 0:
        return _Place(batch=num_asked // new_size, when=f"from step {state.step + 1} on")
    why = f" ({num_asked} problems of it were asked, no multiple of {new_size})" if only_size else ""
    last = state.step + num_batches - state.batch
    refusal = (
        f"{'; '.join([*reordering, *moved])}: an epoch is one shuffle of one list, and epoch {state.epoch} is in its "
        f"middle, after {state.batch} of {num_batches} batches{why}; put it back, or let the epoch end as it began, by "
        f"schedule.max_steps={last}, and change it then, or {NEW_RUN}"
    )
    return _Place(batch=state.batch, when="", refusal=refusal)


def _weights(made: MadeWith) -> list[float]:
    return [weight for _, weight in made.mix]


def _num_asked(made: MadeWith) -> int:
    """Return how many problems an epoch asks."""
    return sum(asked_counts(made.mix or [(len(made.problems), 1.0)]))


def _moved_problems(old: MadeWith, new: MadeWith) -> list[str]:
    """Return messages on a changed list of problems; empty if the ids and their order are the same."""
    ids = list(old.problems), list(new.problems)
    if ids[0] == ids[1]:
        return []
    added = [problem_id for problem_id in ids[1] if problem_id not in old.problems]
    removed = [problem_id for problem_id in ids[0] if problem_id not in new.problems]
    kinds = [
        f"{len(found)} {kind} ({listed(found, MAX_PROBLEMS_NAMED)})"
        for found, kind in ((added, "added"), (removed, "gone"))
        if found
    ]
    return [f"problems of data.train: {', '.join(kinds) or 'in another order'}"]


def _problem_changes(old: MadeWith, new: MadeWith, when: str) -> list[Change]:
    """Return the changes of problems: added or removed ids, and questions that changed under the same id."""
    edited = [name for name in old.problems if new.problems.get(name, old.problems[name]) != old.problems[name]]
    changes = [
        Change(name=text, old=len(old.problems), new=len(new.problems), when=when) for text in _moved_problems(old, new)
    ]
    if edited:
        text = f"question or answer of {len(edited)} problems of data.train ({listed(edited, MAX_PROBLEMS_NAMED)})"
        changes.append(Change(name=text, old="before", new="now", when="the next time they are asked"))
    return changes


def _quoted(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."
