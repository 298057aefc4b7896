"""`exact`: the answer is the same text as the gold answer, or as one of several."""

from megatron_p2o.rewards.built_in.columns import column
from megatron_p2o.rewards.built_in.final_answer import Extract, checked_extract, final_answer, no_answer
from megatron_p2o.types import CORRECT, FinishReason, Grade, Problem


class ExactReward:
    """1 where the final answer is the gold answer character by character, else 0."""

    def __init__(self, *, extract: str = "boxed", answers_column: str | None = None, ignore_case: bool = False) -> None:
        """Prepare.

        Args:
            extract: where the answer stands in a response (`final_answer.Extract`).
            answers_column: column with a list of accepted answers; None: the gold answer alone.
            ignore_case: whether letters may differ in case.

        Raises:
            ValueError: `extract` is not known.
        """
        self._extract: Extract = checked_extract(extract, "exact")
        self._answers_column = answers_column
        self._ignore_case = ignore_case

    def __call__(self, problem: Problem, response: str, finish_reason: FinishReason) -> Grade:
        answer = final_answer(response, self._extract, finish_reason)
        if answer is None:
            return no_answer(self._extract)
        if self._normal(answer) in map(self._normal, self._accepted(problem)):
            return CORRECT
        return Grade(reward=0.0, reason="another answer", feedback="The answer is not the expected one.")

    def _accepted(self, problem: Problem) -> list[str]:
        """Return the accepted answers. Raises `ValueError` for a row that has none."""
        if self._answers_column is None:
            if problem.answer is None:
                raise ValueError(f"problem {problem.id} has no gold answer: set data.answer_field or answers_column")
            return [problem.answer]
        answers = column(problem, self._answers_column, "answers_column")
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"column {self._answers_column!r} of problem {problem.id} must be a list of texts")
        if not all(map(str.strip, answers)):  # an empty response would be right
            raise ValueError(f"column {self._answers_column!r} of problem {problem.id} holds a blank answer")
        return answers

    def _normal(self, text: str) -> str:
        return text.strip().casefold() if self._ignore_case else text.strip()
