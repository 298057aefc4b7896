"""How many evaluation rollouts a round may use."""

import math
from collections.abc import Mapping

NUM_CANDIDATES: Mapping[str, int] = {
    "light": 6,
    "medium": 12,
    "heavy": 18,
    "heavy_2": 36,
    "heavy_3": 54,
    "heavy_4": 72,
    "heavy_16": 288,
}
"""GEPA's automatic budgets by the number of candidates they are meant to try."""

FREE_ITERATIONS = 2
"""Iterations the authors do not charge."""


def automatic_budget(name: str, dev_size: int) -> int:
    """Return GEPA's rollout budget for `evolution.budget`: 11,040 for heavy_4 at 300 development problems."""
    num_candidates = NUM_CANDIDATES[name]
    num_trials = int(max(4 * math.log2(num_candidates), 1.5 * num_candidates))
    num_full_evaluations = (num_trials + 1) // 5 + 1 + (num_trials < 5)
    return dev_size + 5 * num_candidates + 35 * num_trials + num_full_evaluations * dev_size


def reference_cost(iteration: int, num_selected: int, num_accepted: int, minibatch_size: int, dev_size: int) -> int:
    """Return what the authors charge for an iteration (counted from 1).

    One minibatch per selected candidate and one development evaluation per accepted one. The second minibatch, the
    empty template's evaluation and the first two iterations are free.
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
