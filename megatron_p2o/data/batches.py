"""The order in which an epoch visits the problems, of one task or of several that are mixed.

An epoch asks every problem of the tasks with the largest weight, and of another task the share of its weight: a part
that goes on where the last epoch's ended, so that all its problems are asked before one is asked again. Each task is
shuffled anew each epoch and then spread evenly over the epoch, so that every batch holds the tasks in about their
proportions: of n tasks none is off by more than n / 2 + 1 problems. A curriculum leaves some of these problems out
(`data.curriculum`), of each task by itself.
"""

import random
from collections.abc import Mapping, Sequence

from megatron_p2o.data.curriculum import WeightOf, asked_by_weight
from megatron_p2o.types import Problem


def epoch_batches(
    problems: Sequence[Problem],
    problems_per_step: int,
    seed: int,
    epoch: int,
    start: int = 0,
    weights: Mapping[str, float] | None = None,
    weight_of: WeightOf | None = None,
) -> list[list[Problem]]:
    """Return the batches of an epoch from batch `start` on, without the incomplete last one.

    The same arguments give the same batches on every machine, so that a run resumes at any batch by its number alone.

    Args:
        weights: of the tasks, by `Problem.task`; None: the problems are one task.
        weight_of: of a problem, by the curriculum; None: without one. Where all weights together are less than a batch,
            what was left out fills it up.

    Raises:
        ValueError: there are fewer problems than one batch takes.
    """
    tasks = _tasks_of(problems, weights)
    counts = asked_counts(list(zip(map(len, tasks), (weights or {"": 1.0}).values(), strict=True)))
    num_batches = sum(counts) // problems_per_step
    if num_batches == 0:
        raise ValueError(
            f"schedule.problems_per_step={problems_per_step} exceeds the {sum(counts)} problems of data.train that an "
            f"epoch asks: set it to at most {sum(counts)}"
        )
    asked = [
        _shuffled(_part(task, count, seed, epoch, index), seed, epoch, index)
        for index, (task, count) in enumerate(zip(tasks, counts, strict=True))
    ]
    order = _side_by_side(asked) if weight_of is None else _thinned(asked, weight_of, problems_per_step, seed, epoch)
    starts = range(start * problems_per_step, len(order) - problems_per_step + 1, problems_per_step)
    return [order[first : first + problems_per_step] for first in starts]


def asked_counts(mix: Sequence[tuple[int, float]]) -> list[int]:
    """Return how many problems of each task an epoch asks, at least one of each; `mix`: sizes and weights."""
    largest = max(weight for _, weight in mix)
    return [max(1, round(size * (weight / largest))) for size, weight in mix]


def _tasks_of(problems: Sequence[Problem], weights: Mapping[str, float] | None) -> list[list[Problem]]:
    if weights is None:
        return [list(problems)]
    return [[problem for problem in problems if problem.task == task] for task in weights]


def _part(task: Sequence[Problem], count: int, seed: int, epoch: int, index: int) -> list[Problem]:
    """Return the problems of a task that are asked in an epoch, going round an order that is the run's."""
    if count == len(task):
        return list(task)
    order = list(task)
    random.Random(f"{seed}/part/{index}").shuffle(order)
    return [order[(epoch * count + place) % len(order)] for place in range(count)]


def _shuffled(problems: list[Problem], seed: int, epoch: int, index: int) -> list[Problem]:
    # A string seed is hashed by the generator itself: neighbouring seeds and epochs do not share a stream.
    random.Random(f"{seed}/{epoch}" if index == 0 else f"{seed}/{epoch}/{index}").shuffle(problems)
    return problems


def _thinned(
    tasks: Sequence[Sequence[Problem]], weight_of: WeightOf, at_least: int, seed: int, epoch: int
) -> list[Problem]:
    """Return the problems of each task that the curriculum has the epoch ask, `at_least` so many, side by side."""
    asked: list[list[Problem]] = []
    left_out: list[list[Problem]] = []
    for index, task in enumerate(tasks):
        rng = random.Random(f"{seed}/{epoch}/curriculum/{index}")
        is_asked = asked_by_weight([weight_of(problem) for problem in task], rng)
        asked.append([problem for problem, is_in in zip(task, is_asked, strict=True) if is_in])
        left_out.append([problem for problem, is_in in zip(task, is_asked, strict=True) if not is_in])
    order = _side_by_side(asked)
    return [*order, *_side_by_side(left_out)[: max(0, at_least - len(order))]]


def _side_by_side(tasks: Sequence[Sequence[Problem]]) -> list[Problem]:
    """Return all problems, each task spread evenly over the whole."""
    placed = [
        ((place + 0.5) / len(task), index, problem)
        for index, task in enumerate(tasks)
        for place, problem in enumerate(task)
    ]
    return [problem for _, _, problem in sorted(placed, key=lambda item: item[:2])]
