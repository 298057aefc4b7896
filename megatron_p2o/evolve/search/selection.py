"""Selects the candidates to reflect on next, from the fronts of the development problems."""

import random
from collections import Counter
from collections.abc import Callable, Mapping

PickParent = Callable[[Mapping[int, frozenset[str]], random.Random], int]
"""Takes every candidate with the development problems it solves, and the generator of the proposal; returns one."""

EXPLORATION_SHARE = 0.2
"""Chance of a uniform draw: lets a candidate without any front advance, the empty template above all."""


def reference_selection(fronts: Mapping[str, frozenset[int]], width: int, rng: random.Random) -> list[int]:
    """Return the parents of one lock-step iteration, by the authors' rule.

    The union of all fronts, ties included (also those at reward 0); when it is larger than `width`, `width` of them
    without replacement, weighted by the number of fronts a candidate is on. No dominance filter.
    """
    counts = Counter(candidate for front in fronts.values() for candidate in sorted(front))
    if len(counts) <= width:
        return sorted(counts)
    remaining = dict(sorted(counts.items()))
    chosen: list[int] = []
    for _ in range(width):
        candidate = rng.choices(list(remaining), list(remaining.values()))[0]
        del remaining[candidate]
        chosen.append(candidate)
    return chosen


def front_credit(solved: Mapping[int, frozenset[str]]) -> dict[int, float]:
    """Return each candidate's share of the solved problems: the candidates that solve a problem share its credit
    equally. `solved` maps every candidate to the problems it solves. An unsolved problem gives no credit.
    """
    num_solvers = Counter(problem_id for problem_ids in solved.values() for problem_id in problem_ids)
    return {
        candidate: sum(1 / num_solvers[problem_id] for problem_id in sorted(problem_ids))
        for candidate, problem_ids in solved.items()
    }


def pick_parent(solved: Mapping[int, frozenset[str]], rng: random.Random) -> int:
    """Return one parent: by credit, or uniformly with `EXPLORATION_SHARE` and while nothing is solved."""
    credit = front_credit(solved)
    explores = rng.random() < EXPLORATION_SHARE
    if explores or sum(credit.values()) == 0:
        return rng.choice(list(credit))
    return rng.choices(list(credit), list(credit.values()))[0]
