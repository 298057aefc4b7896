"""The order in which an epoch visits the problems."""

import random
from collections.abc import Sequence

from megatron_p2o.types import Problem


def epoch_batches(
    problems: Sequence[Problem], problems_per_step: int, seed: int, epoch: int, start: int = 0
) -> list[list[Problem]]:
    """Return the batches of an epoch from batch `start` on, without the incomplete last one.

    Each epoch has its own shuffle; the same arguments give the same batches on every machine, so that a run resumes at
    any batch by its number alone.

    Raises:
        ValueError: there are fewer problems than one batch takes.
    """
    num_batches = len(problems) // problems_per_step
    if num_batches == 0:
        raise ValueError(
            f"schedule.problems_per_step={problems_per_step} exceeds the {len(problems)} problems of data.train: "
            f"set it to at most {len(problems)}"
        )
    order = list(range(len(problems)))
    # A string seed is hashed by the generator itself: neighbouring seeds and epochs do not share a stream.
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [
        [problems[index] for index in order[batch * problems_per_step : (batch + 1) * problems_per_step]]
        for batch in range(start, num_batches)
    ]
