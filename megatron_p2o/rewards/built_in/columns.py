"""Reads what a reward function needs from the row of its problem."""

from typing import Any

from megatron_p2o.types import Problem


def column(problem: Problem, name: str, argument: str) -> Any:
    """Return a column of the problem's row. Raises `ValueError` when it has none of that name."""
    if problem.columns.get(name) is None:
        raise ValueError(
            f"problem {problem.id} has no column {name!r} ({argument}); it has {', '.join(problem.columns)}"
        )
    return problem.columns[name]
