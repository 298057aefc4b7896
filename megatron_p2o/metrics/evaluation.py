"""Graded answers to a set of problems, and what they amount to."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from megatron_p2o.metrics.estimators import Interval, mean_interval, pass_at_k, powers_up_to
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.types import FinishReason, Grade, Problem, Rollout

BOOTSTRAP_SEED = 0
"""The same for every evaluation: two of them differ by their answers alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One graded answer. A set holds one per problem and sample index."""

    problem_id: str
    sample: int
    """Index among the problem's answers, from 0."""
    grade: Grade
    finish_reason: FinishReason
    """"abort": the engine gave it up; it counts as wrong, and an evaluation that is continued samples it again."""
    num_tokens: int
    level: str = ""
    source: str = ""
    response: str = ""
    """Empty where texts are not kept."""

    @property
    def is_correct(self) -> bool:
        return self.grade == "correct"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Outcome on one problem set. Intervals are of 95 %, by bootstrap over problems (`estimators.mean_interval`)."""

    num_correct: int
    num_samples: int
    """Answers in all: problems times `samples_per_problem`."""
    samples_per_problem: int
    temperature: float
    interval: Interval
    """Of the accuracy."""
    pass_at: Mapping[str, float]
    """k to pass@k by the unbiased estimator, for 1, 2, 4, ... and `samples_per_problem`."""
    pass_at_intervals: Mapping[str, Interval]
    by_source: Mapping[str, float]
    """Accuracy by `Problem.source`; empty when the problems name none."""
    by_level: Mapping[str, float]
    """Accuracy by `Problem.level`; empty when the problems name none."""
    mean_tokens: float
    """Of an answer."""
    truncated_share: float
    """Answers that reached the token limit, over answers."""
    num_grading_errors: int
    """Answers the grader could not decide; they count as wrong."""
    num_aborted: int
    """Answers the engines gave up; they count as wrong and are no grading errors."""
    correct_by_problem: Mapping[str, int]
    """Problem id to correct answers, in the order of the set."""
    num_asked_plainly: int = 0
    """Problems that were too long under the template of a templated evaluation, and asked without it."""

    @property
    def accuracy(self) -> float:
        """Correct answers over answers: avg@k, as each problem is answered k times."""
        return self.num_correct / self.num_samples


def answer_of(rollout: Rollout, sample: int, response: str = "") -> Answer:
    """Return a rollout as the `sample`-th answer to its problem."""
    completion = rollout.completion
    problem = completion.prompt.problem
    return Answer(
        problem_id=problem.id,
        sample=sample,
        grade=rollout.grade,
        finish_reason=completion.finish_reason,
        num_tokens=len(completion.token_ids),
        level=problem.level,
        source=problem.source,
        response=response,
    )


def evaluation_of(
    answers: Sequence[Answer],
    problems: Sequence[Problem],
    samples_per_problem: int,
    temperature: float,
    num_asked_plainly: int = 0,
) -> Evaluation:
    """Return what `answers`, `samples_per_problem` to each of `problems` and in any order, amount to.

    `num_asked_plainly`: problems that did not fit under the template.
    """
    assert len(answers) == len(problems) * samples_per_problem, "an answer is missing or twice there"
    correct = dict.fromkeys((problem.id for problem in problems), 0)
    for answer in answers:
        correct[answer.problem_id] += answer.is_correct
    solved = {
        k: [pass_at_k(samples_per_problem, count, k) for count in correct.values()]
        for k in powers_up_to(samples_per_problem)
    }
    averages = [count / samples_per_problem for count in correct.values()]
    is_aborted = [answer.finish_reason == "abort" for answer in answers]
    return Evaluation(
        num_correct=sum(correct.values()),
        num_samples=len(answers),
        samples_per_problem=samples_per_problem,
        temperature=temperature,
        interval=mean_interval(averages, BOOTSTRAP_SEED),
        pass_at={str(k): sum(values) / len(values) for k, values in solved.items()},
        pass_at_intervals={str(k): mean_interval(values, BOOTSTRAP_SEED) for k, values in solved.items()},
        by_source=_accuracy_by(answers, lambda answer: answer.source),
        by_level=_accuracy_by(answers, lambda answer: answer.level),
        mean_tokens=sum(answer.num_tokens for answer in answers) / len(answers),
        truncated_share=sum(answer.finish_reason == "length" for answer in answers) / len(answers),
        num_grading_errors=sum(
            answer.grade == "error" and not aborted for answer, aborted in zip(answers, is_aborted, strict=True)
        ),
        num_aborted=sum(is_aborted),
        correct_by_problem=correct,
        num_asked_plainly=num_asked_plainly,
    )


def evaluation_record(outcome: Evaluation) -> JsonObject:
    """Return the outcome as it is written to files, but for the single problems."""
    record = {"accuracy": outcome.accuracy, **asdict(outcome)}
    del record["correct_by_problem"]
    return record


def problems_digest(problems: Sequence[Problem]) -> str:
    """Return a hash of ids, questions and gold answers in whatever order: two evaluations of one set agree in it."""
    rows = sorted([problem.id, problem.question, problem.answer] for problem in problems)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _accuracy_by(answers: Sequence[Answer], label_of: Callable[[Answer], str]) -> dict[str, float]:
    labels = sorted({label_of(answer) for answer in answers} - {""})
    verdicts = {label: [answer.is_correct for answer in answers if label_of(answer) == label] for label in labels}
    return {label: sum(correct) / len(correct) for label, correct in verdicts.items()}
