"""Reward functions: what they are, and how a setting names them.

A reward function is any callable

    def reward(problem: Problem, response: str, finish_reason: FinishReason) -> float | bool | Grade

`problem.columns` holds all columns of its row, as JSON types. A float lies in [0, 1]. It may be asynchronous
(`async def`): many calls then run at once on one event loop per worker. Decorated with `batched` it gets lists of
problems, responses and finish reasons and returns a list. A class is made into an instance once per worker, whose
`__call__` is the reward function. Further keyword parameters are settings: `grading.arguments` gives their values (of a
class, those of `__init__`).

It runs in `rewards.workers.grading_workers`. One that raises, takes too long or returns no reward leaves its answer
undecided.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import fsum
from typing import Any, TypeVar, cast

from megatron_p2o.config.callables import CallableKind, check_callable, load_callable, made_callable
from megatron_p2o.processes import PROXY_VARIABLES, variables_named_in
from megatron_p2o.types import Grade

RewardFunction = Callable[..., Any]
"""See the module's docstring."""

Function = TypeVar("Function", bound=Callable[..., Any])

BUILT_IN: Mapping[str, str] = {
    "math": "megatron_p2o.rewards.built_in.math:math_reward",
    "exact": "megatron_p2o.rewards.built_in.exact:ExactReward",
    "regex": "megatron_p2o.rewards.built_in.regex:RegexReward",
    "json_schema": "megatron_p2o.rewards.built_in.json_schema:JsonSchemaReward",
    "python": "megatron_p2o.rewards.built_in.python:PythonReward",
    "judge": "megatron_p2o.rewards.built_in.judge:JudgeReward",
    "reasoning_gym": "megatron_p2o.rewards.built_in.reasoning_gym:ReasoningGymReward",
}
"""Short name to the callable it stands for."""

KIND = CallableKind(
    parameters=("problem", "response", "finish_reason"), built_in=BUILT_IN, entry_points="megatron_p2o.rewards"
)
"""What `grading.function` may name."""

BATCHED = replace(KIND, parameters=("problems", "responses", "finish_reasons"))
"""The same, decorated with `batched`."""

JUDGE_KEY = "P2O_JUDGE_API_KEY"
"""Environment variable with the key of `judge`, unless its arguments name another."""

FOREIGN_NAMES = frozenset({"data_source", "solution_str", "ground_truth", "extra_info", "prompts", "completions"})
"""Parameters of reward functions of verl and TRL, which take as many arguments in another order."""

_IS_BATCHED = "is_batched"


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSpec:
    """One reward function of a task, as settings name it."""

    function: str
    """A short name, `package.module:callable`, or `path/to/file.py:callable`."""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keyword arguments bound to it."""
    weight: float = 1.0
    """Weight of its reward, relative to the sum of all weights."""


def function_secrets(specs: Sequence[RewardSpec]) -> tuple[str, ...]:
    """Return the environment variables that may hold secrets and that workers which call these functions need.

    They are what arguments called `..._env` name, and for `judge` also `JUDGE_KEY` and the proxies.
    """
    of_judge = (JUDGE_KEY, *PROXY_VARIABLES) if any(spec.function == "judge" for spec in specs) else ()
    named = [name for spec in specs for name in variables_named_in(spec.arguments)]
    return (*named, *of_judge)


def batched(function: Function) -> Function:
    """Mark a reward function that takes lists of problems, responses and finish reasons and returns a list."""
    setattr(function, _IS_BATCHED, True)
    return function


def is_batched(function: RewardFunction) -> bool:
    """Whether `batched` marked it, or the `__call__` of its class."""
    return any(getattr(each, _IS_BATCHED, False) for each in _bodies(function))


def is_async(function: RewardFunction) -> bool:
    """Whether it is an `async def`, or the `__call__` of its class is."""
    return any(map(inspect.iscoroutinefunction, _bodies(function)))


def _bodies(function: RewardFunction) -> tuple[object, ...]:
    inner = function.func if isinstance(function, partial) else function
    return (inner, inner.__call__ if inspect.isclass(inner) else type(inner).__call__)


def found_function(spec: RewardSpec) -> RewardFunction:
    """Return the function or class that settings name. Imports the code that holds it.

    Raises:
        ValueError: it is not found, cannot be imported, or cannot be called as a reward function with these arguments;
            the message names `grading.function` and the signature expected.
    """
    found = load_callable(spec.function, KIND, _subject(spec))
    kind = BATCHED if is_batched(found) and not inspect.isclass(found) else KIND
    check_callable(found, kind, _subject(spec), spec.arguments, "grading.arguments")
    if kind is KIND and not inspect.isclass(found):
        _check_names(found, spec)
    return found


def made_function(found: RewardFunction, spec: RewardSpec) -> RewardFunction:
    """Return a found function with its arguments bound, or an instance of a found class.

    Raises:
        ValueError: the class raises; the message says what.
    """
    return made_callable(found, spec.arguments, _subject(spec))


def grade_of(value: object) -> Grade:
    """Return the result of a reward function as a grade. Anything but a reward in [0, 1] is undecided."""
    if isinstance(value, Grade):
        return value
    if isinstance(value, bool | int | float) or hasattr(value, "__float__"):
        try:
            return Grade(reward=float(cast(float, value)))
        except (ValueError, TypeError) as error:
            return Grade.undecided(str(error))
    return Grade.undecided(f"it returned {type(value).__name__}, and not a float in [0, 1], a bool or a Grade")


def weighted_sum(grades: Sequence[Grade], weights: Sequence[float]) -> Grade:
    """Return the weighted mean of the grades of one answer; undecided where one of them is.

    Reasons and feedback stand below one another.
    """
    for grade in grades:
        if grade.reward is None:
            return grade
    reward = fsum(weight * (grade.reward or 0.0) for grade, weight in zip(grades, weights, strict=True))
    return Grade(
        reward=reward / fsum(weights),  # exactly 1 where every reward is
        reason="\n".join(grade.reason for grade in grades if grade.reason),
        feedback="\n".join(grade.feedback for grade in grades if grade.feedback),
    )


def _check_names(function: Callable[..., Any], spec: RewardSpec) -> None:
    """Raise `ValueError` for a function whose parameters have the names that another library gives their places."""
    try:
        names = list(inspect.signature(function).parameters)[: len(KIND.parameters)]
    except ValueError:
        return
    foreign = [name for name in names if name in FOREIGN_NAMES]
    if foreign:
        raise ValueError(
            _refusal(
                spec,
                f"takes {', '.join(foreign)}, as another library calls it, and is called as {KIND.signature} here: "
                "wrap it, problem.answer is the gold answer and problem.columns the row",
            )
        )


def _subject(spec: RewardSpec) -> str:
    return f"grading.function={spec.function}"


def _refusal(spec: RewardSpec, fault: str) -> str:
    return f"{_subject(spec)} {fault}"
