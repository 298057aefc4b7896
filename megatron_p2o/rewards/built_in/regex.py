"""`regex`: the answer matches a regular expression."""

import re

from megatron_p2o.rewards.built_in.columns import column
from megatron_p2o.rewards.built_in.final_answer import Extract, checked_extract, final_answer, no_answer
from megatron_p2o.types import CORRECT, FinishReason, Grade, Problem


class RegexReward:
    """1 where the answer matches, else 0.

    A pattern that backtracks without end over some answer uses up `grading.deadline_s`: that answer is undecided.
    """

    def __init__(
        self,
        *,
        pattern: str | None = None,
        pattern_column: str | None = None,
        extract: str = "response",
        is_whole: bool = False,
    ) -> None:
        """Prepare.

        Args:
            pattern: regular expression of Python's `re`, for all problems.
            pattern_column: column with each problem's own, instead.
            extract: where the answer stands in a response (`final_answer.Extract`).
            is_whole: whether all of the answer must match; False: some part of it.

        Raises:
            ValueError: not exactly one of the patterns is given, or it is none, or `extract` is not known.
        """
        if (pattern is None) == (pattern_column is None):
            raise ValueError("regex needs either pattern, for all problems, or pattern_column, each problem's own")
        self._pattern = None if pattern is None else compiled(pattern, "regex pattern")
        self._pattern_column = pattern_column
        self._extract: Extract = checked_extract(extract, "regex")
        self._is_whole = is_whole

    def __call__(self, problem: Problem, response: str, finish_reason: FinishReason) -> Grade:
        answer = final_answer(response, self._extract, finish_reason)
        if answer is None:
            return no_answer(self._extract)
        pattern = self._pattern_of(problem)
        if pattern.fullmatch(answer) if self._is_whole else pattern.search(answer):
            return CORRECT
        # A problem's own pattern may hold its answer.
        required = f" {pattern.pattern}" if self._pattern is not None else " of this problem"
        return Grade(
            reward=0.0, reason="no match", feedback=f"The answer does not match the required pattern{required}."
        )

    def _pattern_of(self, problem: Problem) -> re.Pattern[str]:
        if self._pattern is not None:
            return self._pattern
        name = self._pattern_column or ""
        text = column(problem, name, "pattern_column")
        if not isinstance(text, str):
            raise ValueError(f"column {name!r} of problem {problem.id} must be a text")
        return compiled(text, f"column {name!r} of problem {problem.id}")


def compiled(pattern: str, what: str) -> re.Pattern[str]:
    """Return the pattern, which `re` keeps. Raises `ValueError` when it is none, or blank: that matches all."""
    if not pattern.strip():
        raise ValueError(f"{what}={pattern!r} is blank, which every answer matches: write a pattern")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{what}={pattern!r:.200} is no regular expression: {error}") from error
