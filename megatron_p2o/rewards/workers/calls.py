"""What workers of `FunctionGrader` do: call reward functions. Runs in processes that may be killed at any time."""

import asyncio
import inspect
from asyncio import Future
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from megatron_p2o.records import from_json
from megatron_p2o.rewards.functions import (
    RewardFunction,
    RewardSpec,
    found_function,
    grade_of,
    is_async,
    is_batched,
    made_function,
    weighted_sum,
)
from megatron_p2o.types import FinishReason, Grade, Problem

MAX_AT_ONCE = 64
"""Answers that one worker has at a time where its function is asynchronous or takes batches."""

GATHERING_S = 0.01
"""How long a batch is gathered, from its first answer on."""


class FunctionExited(Exception):
    """A reward function wanted to end its process."""


Question = tuple[Problem, str, FinishReason]


class Calls:
    """A `loop.Program`. A request is {"problem": {...}, "response": ..., "finish_reason": ...}."""

    def __init__(self, specs: Sequence[RewardSpec]) -> None:
        """Import the functions. Raises `ValueError` as `functions.found_function`."""
        self._specs = specs
        self._found = [found_function(spec) for spec in specs]
        self._functions: list[RewardFunction | _Batcher] = []

    @property
    def max_at_once(self) -> int:
        return MAX_AT_ONCE if any(is_async(found) or is_batched(found) for found in self._found) else 1

    def begin(self) -> None:
        """Make the instances of classes. Raises `ValueError` as `functions.made_function`."""
        functions = [made_function(found, spec) for found, spec in zip(self._found, self._specs, strict=True)]
        self._functions = [_Batcher(function) if is_batched(function) else function for function in functions]

    async def grade(self, request: Mapping[str, Any]) -> Grade:
        """Return the weighted mean of what the functions return; they are asked at the same time."""
        problem = from_json(Problem, request["problem"], skips_unknown=True)
        # One that changes the columns of its problem changes them for itself.
        problems = [problem, *(deepcopy(problem) for _ in self._functions[1:])]
        said = request["response"], request["finish_reason"]
        asked = [(own, *said) for own in problems]
        returned = await asyncio.gather(*map(_returned, self._functions, asked))
        grades = [grade_of(value) for value in returned]
        return grades[0] if len(grades) == 1 else weighted_sum(grades, [spec.weight for spec in self._specs])


async def _returned(function: "RewardFunction | _Batcher", question: Question) -> object:
    try:
        value = function(*question)
        return await value if inspect.isawaitable(value) else value
    except SystemExit as error:  # would end the event loop, and with it the answers beside this one
        raise FunctionExited(f"it called sys.exit({error.code})") from error


class _Batcher:
    """A batched function as one that is asked about single answers."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._waiting: list[tuple[Question, Future[object]]] = []

    async def __call__(self, *question: Any) -> object:
        answer: Future[object] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(GATHERING_S, self._begin)
        return await answer

    def _begin(self) -> None:
        batch, self._waiting = self._waiting, []
        task = asyncio.ensure_future(self._settle(batch))
        task.add_done_callback(lambda done: done.exception())

    async def _settle(self, batch: Sequence[tuple[Question, Future[object]]]) -> None:
        try:
            values = await self._values([question for question, _ in batch])
        except (Exception, SystemExit) as error:  # code of others: of several answers each is asked about alone
            if len(batch) > 1:
                for item in batch:
                    await self._settle([item])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error if isinstance(error, Exception) else FunctionExited(repr(error)))
            return
        for (_, answer), value in zip(batch, values, strict=True):
            if not answer.done():
                answer.set_result(value)

    async def _values(self, questions: Sequence[Question]) -> list[object]:
        problems, responses, reasons = (list(column) for column in zip(*questions, strict=True))
        returned = self._function(problems, responses, reasons)
        values = list(await returned if inspect.isawaitable(returned) else returned)
        if len(values) != len(questions):
            raise ValueError(f"a batch of {len(questions)} answers got {len(values)} rewards: return one for each")
        return values
