"""Which problems an epoch asks by what the ledger knows of them: a curriculum.

A problem has a weight w in (0, 1], the share of the epochs in which it is asked. With s its success rate over the
epochs before (`HardSampleLedger.success_rate`: each newer group halves what older ones count), and m
`data.curriculum_min_weight`:

    unsolved    w = max(m, 1 - s)           s of plain tries: Kimi k1.5's prioritised sampling (arXiv:2501.12599)
    learnable   w = max(m, 4 s (1 - s))     s of all tries: the bound of SPEED-RL on what a group can teach, times its
                                            largest value (arXiv:2506.09016, theorem 3.1)

and w = 1 of a problem that was never tried. The problems of an epoch are drawn by systematic sampling: they lie one
after another, in the order in which the epoch asks them, on a line on which each is w long; those on which one of the
points u, u + 1, u + 2, ... falls are asked, u being drawn from [0, 1) by seed and epoch. So a problem of weight 1 is
asked in every epoch, and of the others together as many as their weights add up to, within one.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import assert_never

from megatron_p2o.config.tree import DataConfig
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.types import Problem

WeightOf = Callable[[Problem], float]
"""Returns the weight of a problem, in (0, 1]."""


def weight_of(problem: Problem, data: DataConfig, ledger: HardSampleLedger, epoch: int) -> float:
    """Return the weight of a problem in an epoch, by the ledger's entries of the epochs before."""
    match data.curriculum:
        case "none":
            return 1.0
        case "unsolved":
            rate = ledger.success_rate(problem.id, before_epoch=epoch, counted="plain")
            weight = 1.0 if rate is None else 1 - rate
        case "learnable":
            rate = ledger.success_rate(problem.id, before_epoch=epoch, counted="all")
            weight = 1.0 if rate is None else 4 * rate * (1 - rate)
        case _:
            assert_never(data.curriculum)
    return max(data.curriculum_min_weight, weight)


def asked_by_weight(weights: Sequence[float], rng: random.Random) -> list[bool]:
    """Return which of the problems with these weights are asked, by systematic sampling in their order."""
    end = rng.random()
    asked: list[bool] = []
    for weight in weights:
        start, end = end, end + weight
        asked.append(math.floor(end) > math.floor(start))
    return asked
