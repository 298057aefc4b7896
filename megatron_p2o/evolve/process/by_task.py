"""Divides the hard problems of an epoch into a round for each task of `data.train`, and puts the results together.

Templates are kept by task: those of one are evolved, scored and sampled on its own problems, and reflection is told of
its own description. A task takes part where it has `hard.min_problems` hard problems. The budget of rollouts is that of
a single round on all of them, divided in proportion to the hard problems of each; so is `evolution.round_timeout_s`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.record.history import EndedBy
from megatron_p2o.evolve.reflection.task_description import task_description_of
from megatron_p2o.evolve.search.budget import automatic_budget, split_sizes
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.search.round import RoundSettings
from megatron_p2o.types import Problem

SEVERITY: tuple[EndedBy, ...] = (
    *("service_lost", "reflection_unavailable", "deadline"),
    *("budget", "no_progress", "all_reflected", "too_few_hard"),
)
"""Why rounds end, worst first."""


def problems_by_task(problems: Sequence[Problem], tasks: Sequence[str]) -> dict[str, list[Problem]]:
    """Return the problems of each task that has any, by its name, in the order of `tasks`; of a single task by ""."""
    if len(tasks) == 1:
        return {"": list(problems)}
    by_task = {task: [problem for problem in problems if problem.task == task] for task in tasks}
    return {task: own for task, own in by_task.items() if own}


def settings_by_task(
    settings: RoundSettings, num_hard: Mapping[str, int], descriptions: Mapping[str, str | None]
) -> dict[str, RoundSettings]:
    """Return the settings of each task's round: its description, and its part of rollouts and time.

    Args:
        settings: of all rounds together.
        num_hard: hard problems of each task; a single task, called "", has all settings to itself.
        descriptions: what reflection is told of each.
    """
    evolution = settings.evolution
    shares = budget_shares(settings, num_hard)
    return {
        task: replace(
            settings,
            task_description=descriptions[task],
            evolution=evolution
            if task == ""
            else replace(
                evolution,
                max_rollouts=max(1, int(total_budget(settings, sum(num_hard.values())) * shares[task])),
                round_timeout_s=evolution.round_timeout_s * (shares[task] or 1.0),
            ),
        )
        for task in num_hard
    }


def budget_shares(settings: RoundSettings, num_hard: Mapping[str, int]) -> dict[str, float]:
    """Return each task's share of rollouts and time, in proportion to its hard problems; 0 of one with too few."""
    takes_part = {
        task: number if split_sizes(number, settings.evolution.dev_size, settings.min_problems) else 0
        for task, number in num_hard.items()
    }
    total = sum(takes_part.values()) or 1
    return {task: number / total for task, number in takes_part.items()}


def total_budget(settings: RoundSettings, num_hard: int) -> int:
    """Return the rollouts of all rounds together, which are those of a single round on all hard problems."""
    evolution = settings.evolution
    sizes = split_sizes(num_hard, evolution.dev_size, settings.min_problems)
    return evolution.max_rollouts or automatic_budget(evolution.budget, sizes[0] if sizes else 1)


def descriptions_of(config: Config) -> dict[str, str | None]:
    """Return what reflection is told of each task, by name; of a single one by "". Raises as `task_description_of`."""
    tasks = list(config.data.train)
    if len(tasks) == 1:
        return {"": task_description_of(config, tasks[0])}
    return {task: task_description_of(config, task) for task in tasks}


def all_together(rounds: Sequence[RoundStats]) -> RoundStats:
    """Return the numbers of the rounds of one epoch as if they had been one; at least one round.

    Shares of development problems are weighted by these; `ended_by` is the worst.
    """
    if len(rounds) == 1:
        return rounds[0]
    num_dev = sum(each.num_dev for each in rounds)
    controlled = [each for each in rounds if each.plain_coverage is not None]
    num_controlled = sum(each.num_dev for each in controlled)
    plain = sum((each.plain_coverage or 0.0) * each.num_dev for each in controlled)
    outcomes = sum((Counter(each.outcomes) for each in rounds), Counter[str]())
    return RoundStats(
        epoch=rounds[0].epoch,
        library_version=rounds[0].library_version,
        ended_by=min(rounds, key=lambda each: SEVERITY.index(each.ended_by)).ended_by,
        num_hard=sum(each.num_hard for each in rounds),
        num_dev=num_dev,
        num_feedback=sum(each.num_feedback for each in rounds),
        num_candidates=sum(each.num_candidates for each in rounds),
        num_templates=sum(each.num_templates for each in rounds),
        num_rollouts=sum(each.num_rollouts for each in rounds),
        num_tokens=sum(each.num_tokens for each in rounds),
        best_score=max(each.best_score for each in rounds),
        coverage=sum(each.coverage * each.num_dev for each in rounds) / num_dev if num_dev else 0.0,
        plain_coverage=plain / num_controlled if num_controlled else None,
        outcomes=dict(sorted(outcomes.items())),
        num_restarts=sum(each.num_restarts for each in rounds),
        num_failed_trials=sum(each.num_failed_trials for each in rounds),
        num_unweighed=sum(each.num_unweighed for each in rounds),
        duration_s=sum(each.duration_s for each in rounds),
    )
