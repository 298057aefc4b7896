"""The number of trials that a round may make, and its split of the hard problems."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

FREE_ITERATIONS = 2
"""Iterations the authors do not charge."""


def automatic_budget(num_candidates: int, dev_size: int) -> int:
    """Return GEPA's rollout budget for `evolution.budget`: 11,040 for 72 candidates and 300 development problems."""
    num_proposals = int(max(4 * math.log2(num_candidates), 1.5 * num_candidates))
    num_full_trials = (num_proposals + 1) // 5 + 1 + (num_proposals < 5)
    return dev_size + 5 * num_candidates + 35 * num_proposals + num_full_trials * dev_size


def reference_cost(iteration: int, num_selected: int, num_accepted: int, minibatch_size: int, dev_size: int) -> int:
    """Return what the authors charge for an iteration (counted from 1).

    One minibatch per selected candidate and all development problems per accepted one. The second minibatch, the trials
    of the empty template and the first two iterations are free.
    """
    if iteration <= FREE_ITERATIONS:
        return 0
    return minibatch_size * num_selected + dev_size * num_accepted


class RolloutBudget:
    """Counts every rollout of a round and refuses those that would exceed the limit."""

    def __init__(self, limit: int, spent: int = 0) -> None:
        self.limit = limit
        self.spent = spent

    def try_spend(self, num_rollouts: int) -> bool:
        """Charge `num_rollouts` and return True, or charge nothing and return False."""
        if self.spent + num_rollouts > self.limit:
            return False
        self.spent += num_rollouts
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSplit:
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


def split_problems(
    problem_ids: Sequence[str], dev_size: int, min_problems: int, rng: random.Random
) -> RoundSplit | None:
    """Return a random split of `problem_ids` by `split_sizes`."""
    sizes = split_sizes(len(problem_ids), dev_size, min_problems)
    if sizes is None:
        return None
    shuffled = list(problem_ids)
    rng.shuffle(shuffled)
    return RoundSplit(dev=tuple(shuffled[: sizes[0]]), feedback=tuple(shuffled[sizes[0] :]))
