"""The problems of a run, by the tasks of `data.train` and the sets of `data.evaluation`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_p2o.config.callables import names_code
from megatron_p2o.config.tree import DataConfig
from megatron_p2o.data.batches import asked_counts
from megatron_p2o.data.columns import columns_of
from megatron_p2o.data.problems import load_problems
from megatron_p2o.types import Problem

MAX_REPORTED_IDS = 5
"""Ids that a message names."""


def task_problems(data: DataConfig) -> dict[str, list[Problem]]:
    """Return the problems of each task.

    Raises:
        ValueError: a file is bad, or problems of two tasks have the same id; the message names both files.
    """
    tasks = {name: load_problems(task.file, data, name) for name, task in data.train.items()}
    check_ids(tasks, data)
    return tasks


def check_ids(tasks: Mapping[str, Sequence[Problem]], data: DataConfig) -> None:
    """Raise `ValueError` when problems of two tasks have the same id: the ledger could not tell them apart."""
    owners: dict[str, str] = {}
    for name, problems in tasks.items():
        taken = [problem.id for problem in problems if problem.id in owners]
        if taken:
            other = owners[taken[0]]
            shown = ", ".join(taken[:MAX_REPORTED_IDS]) + (", ..." if len(taken) > MAX_REPORTED_IDS else "")
            raise ValueError(
                f"data.train.{name}.file={data.train[name].file} has {len(taken)} ids that data.train.{other}.file="
                f"{data.train[other].file} has, too ({shown}): make them different, or set another id_field (one "
                "without an id is known by its question)"
            )
        owners |= dict.fromkeys((problem.id for problem in problems), name)


def set_problems(data: DataConfig, name: str) -> list[Problem]:
    """Return the problems of an evaluation set. Raises `ValueError` when its file is bad."""
    return load_problems(data.evaluation[name].file, without_help(data), data.task_of_set(name))


def without_help(data: DataConfig) -> DataConfig:
    """Return the settings of evaluation sets: they are asked plainly, whatever hints or demonstrations they bring."""
    train = {name: replace(task, hints_field=None, demonstrations_field=None) for name, task in data.train.items()}
    return replace(data, train=train, hints_field=None, demonstrations_field=None)


def task_weights(data: DataConfig) -> dict[str, float] | None:
    """Return the weight of each task for `batches.epoch_batches`; None of a single one."""
    return {name: task.weight for name, task in data.train.items()} if len(data.train) > 1 else None


def num_asked(data: DataConfig, problems: Sequence[Problem]) -> dict[str, int]:
    """Return how many problems of each task an epoch asks, before an incomplete last batch is left out."""
    counts = asked_counts(data.mix(problem.task for problem in problems))
    return dict(zip(data.train, counts, strict=True))


def absent_files(data: DataConfig) -> list[str]:
    """Return the files of training problems that are not here; code that makes problems is no file."""
    return [task.file for task in data.train.values() if not names_code(task.file) and not Path(task.file).is_file()]


def num_epoch_problems(data: DataConfig) -> int:
    """Return how many problems an epoch asks, by the files of all tasks. Raises as `task_problems`."""
    problems = [problem for task in task_problems(data).values() for problem in task]
    return sum(num_asked(data, problems).values())


def mix_lines(data: DataConfig, problems: Sequence[Problem]) -> list[str]:
    """Return how many problems of each task an epoch asks, one line each; none of a single task."""
    mix = data.mix(problem.task for problem in problems)
    if len(mix) == 1:
        return []
    counts = zip(data.train, mix, asked_counts(mix), strict=True)
    return [f"data.train.{name}: an epoch asks {count} of {size} problems" for name, (size, _), count in counts]


def column_lines(data: DataConfig) -> list[str]:
    """Return which columns are taken of each file, one line each. Raises `ValueError` when a file cannot be read."""
    plain = without_help(data)
    train = zip(data.training_files.items(), map(data.of_task, data.train), strict=True)
    sets = zip(
        data.evaluation_files.items(), (plain.of_task(data.task_of_set(name)) for name in data.evaluation), strict=True
    )
    return [f"{name}: {columns_of(Path(file), columns)}" for (name, file), columns in (*train, *sets)]
