"""Hard problems into those that score candidates and those that give feedback."""

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Disjoint problem ids; together all hard problems."""

    dev: tuple[str, ...]
    """Score candidates; their answers are never shown to reflection."""
    feedback: tuple[str, ...]
    """Their questions, responses and answers are shown to reflection."""


def split_sizes(num_hard: int, dev_size: int, min_problems: int) -> tuple[int, int] | None:
    """Return (development, feedback) sizes by the authors' rule; None when there is too little for a round.

    Below one and a half times `dev_size` half scores; from there on `dev_size`, but never more than half.
    """
    if num_hard < max(min_problems, 2):
        return None
    num_dev = num_hard // 2 if num_hard < int(1.5 * dev_size) else min(dev_size, num_hard // 2)
    return num_dev, num_hard - num_dev


def split_problems(problem_ids: Sequence[str], dev_size: int, min_problems: int, rng: random.Random) -> Split | None:
    """Return a random split of `problem_ids` by `split_sizes`."""
    sizes = split_sizes(len(problem_ids), dev_size, min_problems)
    if sizes is None:
        return None
    shuffled = list(problem_ids)
    rng.shuffle(shuffled)
    return Split(dev=tuple(shuffled[: sizes[0]]), feedback=tuple(shuffled[sizes[0] :]))
