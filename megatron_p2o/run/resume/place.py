"""Finds a checkpoint's position in an epoch whose order of problems may have changed."""

from dataclasses import dataclass

from megatron_p2o.data.batches import asked_counts
from megatron_p2o.run.resume.comparison import moved_problems, setting_differences
from megatron_p2o.run_folder.made_with import MadeWith
from megatron_p2o.run_folder.state import RunState

NEW_RUN = "begin another run (run.name) from this one's weights (tools/convert_checkpoint.py)"

PER_STEP = "schedule.problems_per_step"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceInEpoch:
    """Position of a checkpoint in its epoch, before and after a change of the epoch's order."""

    batch: int
    """Batches of the epoch that were asked, in batches of the present size."""
    when: str
    """When a change of the order takes effect."""
    refusal: str = ""
    """Why it prevents going on; "" where it does not."""


def place_in_epoch(old: MadeWith, new: MadeWith, state: RunState) -> PlaceInEpoch:
    """Return the checkpoint's position in the current order of problems.

    An epoch is one shuffle of one list. What decides the order may change between two epochs; the size of a step may
    also where what was asked is a whole number of steps of the new size.
    """
    reordering = [f"{found}" for found in setting_differences(old, new) if found.effect == "order"]
    moved = moved_problems(old, new)
    names_it = bool(moved) and _weights(old) == _weights(new)  # that sizes differ follows from moved problems
    if old.mix and old.mix != new.mix and not names_it:
        reordering.append(f"tasks of data.train (problems, weight): {old.mix} -> {new.mix}")
    if not reordering and not moved:
        return PlaceInEpoch(batch=state.batch, when="the next time they are asked")
    old_size, new_size = old.settings[PER_STEP], new.settings[PER_STEP]
    num_batches = state.num_batches or _num_asked(old) // old_size
    if state.batch == 0:
        return PlaceInEpoch(batch=0, when=f"from step {state.step + 1} on, which begins epoch {state.epoch}")
    if state.batch >= num_batches:
        return PlaceInEpoch(
            batch=_num_asked(new) // new_size, when=f"from epoch {state.epoch + 1} on, which comes next"
        )
    num_asked = state.batch * old_size
    only_size = not moved and len(reordering) == 1 and old_size != new_size
    if only_size and num_asked % new_size == 0:
        return PlaceInEpoch(batch=num_asked // new_size, when=f"from step {state.step + 1} on")
    why = f" ({num_asked} problems of it were asked, no multiple of {new_size})" if only_size else ""
    last = state.step + num_batches - state.batch
    refusal = (
        f"{'; '.join([*reordering, *moved])}: an epoch is one shuffle of one list, and epoch {state.epoch} is in its "
        f"middle, after {state.batch} of {num_batches} batches{why}; put it back, or let the epoch end as it began, by "
        f"schedule.max_steps={last}, and change it then, or {NEW_RUN}"
    )
    return PlaceInEpoch(batch=state.batch, when="", refusal=refusal)


def _weights(made: MadeWith) -> list[float]:
    return [weight for _, weight in made.mix]


def _num_asked(made: MadeWith) -> int:
    """Return how many problems an epoch asks."""
    return sum(asked_counts(made.mix or [(len(made.problems), 1.0)]))
