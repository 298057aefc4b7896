"""Graded responses to a set of problems, and the statistics over them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum

from megatron_p2o.evaluation.estimators import pass_at_k, powers_up_to
from megatron_p2o.evaluation.intervals import Interval, mean_interval
from megatron_p2o.files import json_digest
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.metrics.values import Last, Mean, MetricValue, Sum
from megatron_p2o.types import FinishReason, Grade, Problem, Rollout

BOOTSTRAP_SEED = 0
"""The same for every evaluation: two of them differ by their responses alone."""


class NothingDecided(RuntimeError):
    """No response of a set has a verdict: there is no outcome."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradedResponse:
    """One graded response to a problem of a set. A set holds one per problem and sample index."""

    problem_id: str
    sample: int
    """Index among the problem's responses, from 0."""
    grade: Grade
    finish_reason: FinishReason
    """"abort": the engine gave it up."""
    num_tokens: int
    level: str = ""
    source: str = ""
    response: str = ""
    """Empty where texts are not kept."""
    solved_at: float = 1.0
    """Reward from which it counts as correct (`hard.solved_at`)."""

    @property
    def is_correct(self) -> bool:
        return self.is_decided and self.grade.reaches(self.solved_at)

    @property
    def is_decided(self) -> bool:
        """Whether there is a verdict. A response without one counts neither way, and an evaluation that is continued
        samples it again."""
        return self.grade.is_decided and self.finish_reason != "abort"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Outcome on one problem set: of the responses with a verdict. Intervals are those of `evaluation.intervals`."""

    num_correct: int
    num_decided: int
    """Responses with a verdict."""
    num_samples: int
    """Responses in all: problems times `samples_per_problem`."""
    samples_per_problem: int
    temperature: float
    accuracy: float
    """avg@k: the mean over problems of the correct share of their decided responses, as `pass_at["1"]`."""
    interval: Interval
    """Interval of the accuracy."""
    pass_at: Mapping[str, float]
    """k to pass@k by the unbiased estimator, for 1, 2, 4, ... and `samples_per_problem`: the mean over the problems
    that have at least k decided responses. Without such problems k is left out."""
    pass_at_intervals: Mapping[str, Interval]
    pass_at_num_problems: Mapping[str, int]
    """k to the problems that pass@k is over."""
    by_source: Mapping[str, float]
    """Accuracy by `Problem.source`; empty when the problems name none."""
    by_level: Mapping[str, float]
    """Accuracy by `Problem.level`; empty when the problems name none."""
    mean_reward: float
    """Mean over the responses with a verdict. It differs from the correct share where rewards lie between 0 and 1."""
    mean_tokens: float
    """Mean length of the responses that were not aborted."""
    truncated_share: float
    """Responses that reached the token limit, over those that were not aborted."""
    num_grading_errors: int
    """Responses the grader could not decide."""
    num_aborted: int
    """Responses the engines gave up; they are no grading errors."""
    correct_by_problem: Mapping[str, int]
    """Problem id to correct responses, in the order of the set."""
    decided_by_problem: Mapping[str, int]
    """Problem id to responses with a verdict."""
    reward_by_problem: Mapping[str, float]
    """Problem id to the sum of their rewards: `correct_by_problem` where all are 0 or 1."""
    has_partial_rewards: bool
    """Whether some reward is neither 0 nor 1: then the accuracy does not tell the mean reward."""
    num_asked_plainly: int = 0
    """Problems that were too long under the template of a templated evaluation, and asked without it."""


def graded_response(rollout: Rollout, sample: int, response: str = "") -> GradedResponse:
    """Return a rollout as the `sample`-th response to its problem."""
    completion = rollout.completion
    problem = completion.prompt.problem
    return GradedResponse(
        problem_id=problem.id,
        sample=sample,
        grade=rollout.grade,
        solved_at=rollout.solved_at,
        finish_reason=completion.finish_reason,
        num_tokens=len(completion.token_ids),
        level=problem.level,
        source=problem.source,
        response=response,
    )


def evaluation_of(
    responses: Sequence[GradedResponse],
    problems: Sequence[Problem],
    samples_per_problem: int,
    temperature: float,
    num_asked_plainly: int = 0,
) -> Evaluation:
    """Return what `responses`, `samples_per_problem` to each of `problems` and in any order, amount to.

    `num_asked_plainly`: problems that did not fit under the template.

    Raises:
        NothingDecided: none of them has a verdict.
    """
    assert len(responses) == len(problems) * samples_per_problem, "a response is missing or twice there"
    decided = dict.fromkeys((problem.id for problem in problems), 0)
    correct = dict(decided)
    for response in responses:
        decided[response.problem_id] += response.is_decided
        correct[response.problem_id] += response.is_decided and response.is_correct
    rewards = [
        response.grade.reward for response in responses if response.is_decided and response.grade.reward is not None
    ]
    finished = [response for response in responses if response.finish_reason != "abort"]
    solved = _solved_in_tries(correct, decided, samples_per_problem)
    pass_at = {k: sum(values) / len(values) for k, values in solved.items()}
    intervals = {k: mean_interval(values, BOOTSTRAP_SEED) for k, values in solved.items()}
    return Evaluation(
        num_correct=sum(correct.values()),
        num_decided=sum(decided.values()),
        num_samples=len(responses),
        samples_per_problem=samples_per_problem,
        temperature=temperature,
        accuracy=pass_at["1"],
        interval=intervals["1"],
        pass_at=pass_at,
        pass_at_intervals=intervals,
        pass_at_num_problems={k: len(values) for k, values in solved.items()},
        by_source=_accuracy_by({response.problem_id: response.source for response in responses}, correct, decided),
        by_level=_accuracy_by({response.problem_id: response.level for response in responses}, correct, decided),
        mean_reward=sum(rewards) / len(rewards),
        mean_tokens=sum(response.num_tokens for response in finished) / len(finished),
        truncated_share=sum(response.finish_reason == "length" for response in finished) / len(finished),
        num_grading_errors=len(finished) - sum(decided.values()),
        num_aborted=len(responses) - len(finished),
        correct_by_problem=correct,
        decided_by_problem=decided,
        reward_by_problem=_rewards_by_problem(responses, problems),
        has_partial_rewards=any(reward not in (0.0, 1.0) for reward in rewards),
        num_asked_plainly=num_asked_plainly,
    )


def _rewards_by_problem(responses: Sequence[GradedResponse], problems: Sequence[Problem]) -> dict[str, float]:
    rewards = {problem.id: list[float]() for problem in problems}
    for response in responses:
        if response.is_decided and response.grade.reward is not None:
            rewards[response.problem_id].append(response.grade.reward)
    return {problem_id: fsum(values) for problem_id, values in rewards.items()}


def _solved_in_tries(
    correct: Mapping[str, int], decided: Mapping[str, int], samples_per_problem: int
) -> dict[str, list[float]]:
    """Return k to pass@k of each problem that has k decided responses, for every k that some problem has.

    Raises:
        NothingDecided: no problem has any.
    """
    if not any(decided.values()):
        raise NothingDecided(f"none of {len(decided) * samples_per_problem} responses has a verdict")
    return {
        str(k): [pass_at_k(count, correct[key], k) for key, count in decided.items() if count >= k]
        for k in powers_up_to(samples_per_problem)
        if k <= max(decided.values())
    }


def evaluation_record(outcome: Evaluation) -> JsonObject:
    """Return the outcome as it is written to files, without the single problems.

    `has_partial_rewards` is there where it is true.
    """
    record = asdict(outcome)
    del record["correct_by_problem"], record["decided_by_problem"], record["reward_by_problem"]
    if not outcome.has_partial_rewards:
        del record["has_partial_rewards"]
    return record


def problems_record(outcome: Evaluation) -> JsonObject:
    """Return what paired comparisons need of the single problems.

    `reward_by_problem`, each one's sum of rewards, is there where the numbers of correct responses do not tell it.
    """
    rewards = {"reward_by_problem": dict(outcome.reward_by_problem)} if outcome.has_partial_rewards else {}
    return {
        "correct_by_problem": dict(outcome.correct_by_problem),
        "decided_by_problem": dict(outcome.decided_by_problem),
        **rewards,
    }


def problems_digest(problems: Sequence[Problem]) -> str:
    """Return a hash of ids, questions and gold answers that does not depend on their order. Evaluations of the same set
    have the same hash."""
    rows = sorted([problem.id, problem.question, problem.answer or ""] for problem in problems)
    return json_digest(rows)


def _accuracy_by(labels: Mapping[str, str], correct: Mapping[str, int], decided: Mapping[str, int]) -> dict[str, float]:
    """Return the accuracy by label (problem id to label) of the problems that have a decided response."""
    shares: dict[str, list[float]] = {}
    for key, label in labels.items():
        if label and decided[key]:
            shares.setdefault(label, []).append(correct[key] / decided[key])
    return {label: sum(values) / len(values) for label, values in sorted(shares.items())}


def evaluation_metrics(outcomes: Mapping[str, Evaluation]) -> dict[str, MetricValue]:
    """Return `eval/<set>/avg`, the accuracy, `eval/<set>/reward_mean`,
    `eval/<set>/pass_at_<k>` for k beyond 1, and `eval/<set>/undecided_share`
    and `aborted_count`: responses that the grader could not decide, over those it was given, and that engines gave up.

    Where problems were too long under the evaluation's template, `eval/<set>/asked_plainly_count` says how many.
    """
    metrics: dict[str, MetricValue] = {}
    for name, outcome in outcomes.items():
        num_problems = outcome.pass_at_num_problems["1"]
        metrics[f"eval/{name}/avg"] = Mean(outcome.accuracy * num_problems, num_problems)
        metrics[f"eval/{name}/reward_mean"] = Mean(outcome.mean_reward * outcome.num_decided, outcome.num_decided)
        num_graded = outcome.num_samples - outcome.num_aborted
        metrics[f"eval/{name}/undecided_share"] = Mean(outcome.num_grading_errors, num_graded)
        metrics[f"eval/{name}/aborted_count"] = Sum(outcome.num_aborted)
        metrics |= {f"eval/{name}/pass_at_{k}": Last(share) for k, share in outcome.pass_at.items() if k != "1"}
        if outcome.num_asked_plainly:
            metrics[f"eval/{name}/asked_plainly_count"] = Last(outcome.num_asked_plainly)
    return metrics
