"""Tries templates for prompt evolution: renders them, samples on the training engines, and grades."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from megatron_p2o.evaluation.protocol import template_with_text
from megatron_p2o.evolve.process.by_task import all_together
from megatron_p2o.evolve.process.session import EvolutionSession
from megatron_p2o.evolve.reflection.guards import TOO_LONG, is_too_long_to_count
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.trial import FreeScore, Rejection, Trial, TrialFailed
from megatron_p2o.interfaces import Grader, PromptRenderer, PromptTooLongError
from megatron_p2o.rollout.requests import settle
from megatron_p2o.types import (
    Completion,
    Grade,
    Group,
    Logprobs,
    Problem,
    Prompt,
    Rollout,
    SamplingParams,
    TokenIds,
)

Sample = Callable[[Prompt, SamplingParams], Future[Completion]]
"""Submits one rollout to the engines at evolution's priority."""

Score = Callable[[Prompt, TokenIds], Future[Completion]]
"""Submits a response to be read at evolution's priority: the completion holds its log-probs under
`prompt.sampling_ids`."""


class TrialSubmitter:
    """Implements `evolve.process.session.SubmitTrial`. Calls may come from any thread; nothing blocks.

    Cancelling the future of a trial takes its request from the engine.
    """

    def __init__(
        self,
        sample: Sample,
        renderer: PromptRenderer,
        grader: Grader,
        max_template_tokens: int,
        solved_at: float = 1.0,
        on_lost: Callable[[int], None] = lambda num_tokens: None,
        score: Score | None = None,
    ) -> None:
        """Args:
        solved_at: reward from which a trial counts as solved (`hard.solved_at`).
        on_lost: told the sampled tokens of a trial that ends without a verdict.
        score: what measures `Trial.reliance` of the trials that solve their problem; None: it is not measured.
        """
        self._score = score
        self._on_lost = on_lost
        self._solved_at = solved_at
        self._sample, self._renderer, self._grader = sample, renderer, grader
        self._max_template_tokens = max_template_tokens

    def __call__(self, template_text: str, problem: Problem, sampling: SamplingParams) -> Future[Trial | Rejection]:
        outcome: Future[Trial | Rejection] = Future()
        prompt = self._prompt(template_text, problem)
        if isinstance(prompt, Rejection):
            outcome.set_result(prompt)
            return outcome
        sampled = self._sample(prompt, sampling)
        sampled.add_done_callback(lambda done: self._grade(done, outcome))
        # Nobody waits for a cancelled trial: the engine must not go on with it.
        outcome.add_done_callback(lambda done: sampled.cancel() if done.cancelled() else None)
        return outcome

    def _prompt(self, template_text: str, problem: Problem) -> Prompt | Rejection:
        """Return the prompt; what a template adds to the plain one is its length in tokens."""
        if is_too_long_to_count(template_text, self._max_template_tokens):
            return Rejection(reason=TOO_LONG)
        try:
            prompt = self._renderer.render(problem, template_with_text(template_text))
        except PromptTooLongError:
            return Rejection(reason="its prompt is too long")
        except ValueError:  # the model's tokenizer or chat template does not take the text
            return Rejection(reason="its prompt cannot be rendered")
        if len(prompt.sampling_ids) - len(prompt.training_ids) > self._max_template_tokens:
            return Rejection(reason=TOO_LONG)
        return prompt

    def _grade(self, sampled: Future[Completion], outcome: Future[Trial | Rejection]) -> None:
        if sampled.cancelled():
            outcome.cancel()
            return
        error = sampled.exception()
        if error is not None:
            settle(outcome, TrialFailed(str(error)))
            return
        completion = sampled.result()
        if completion.is_aborted:
            self._on_lost(len(completion.token_ids))
            settle(outcome, TrialFailed("the engine gave the rollout up"))
            return
        text = self._renderer.decode(completion)
        graded = self._grader.submit(completion.prompt.problem, text, completion.finish_reason)
        graded.add_done_callback(lambda done: self._judge(completion, text, done, outcome))

    def _judge(
        self, completion: Completion, text: str, graded: Future[Grade], outcome: Future[Trial | Rejection]
    ) -> None:
        """Set the outcome of a graded rollout; one without a verdict is no score."""
        error = graded.exception()
        reward = None if error is not None else graded.result().reward
        if reward is None:
            self._on_lost(len(completion.token_ids))
            reason = str(error) if error is not None else f"the grader could not decide ({graded.result().reason})"
            settle(outcome, TrialFailed(reason))
            return
        grade = graded.result()
        solved_share = float(grade.reaches(self._solved_at))
        trial = _trial(completion, reward, solved_share, text, grade.feedback)
        if self._score is None or not trial.is_solved or not completion.prompt.template.text:
            settle(outcome, trial)
            return
        measured = measure_reliance(completion, self._score)
        measured.add_done_callback(lambda done: settle(outcome, replace(trial, reliance=done.result())))


def measure_reliance(completion: Completion, score: Score) -> Future[float | None]:
    """Return a future of `Trial.reliance`: the engines read the response under its template, then without it.

    None where they do not give its log-probs.
    """
    reliance: Future[float | None] = Future()
    prompt, response = completion.prompt, completion.token_ids
    plain = replace(prompt, sampling_ids=prompt.training_ids)

    def under_template(done: Future[Completion]) -> None:
        templated = _logprobs(done)
        if templated is None or not len(templated):
            reliance.set_result(None)
        else:
            score(plain, response).add_done_callback(lambda done: without(templated, done))

    def without(templated: Logprobs, done: Future[Completion]) -> None:
        bare = _logprobs(done)
        reliance.set_result(None if bare is None else float(np.mean(bare - templated, dtype=np.float64)))

    score(prompt, response).add_done_callback(under_template)
    return reliance


def _logprobs(scored: Future[Completion]) -> Logprobs | None:
    """Return the log-probs of a text; None where the engines were lost, refused it or took too long."""
    if scored.cancelled() or scored.exception() is not None or scored.result().is_aborted:
        return None
    return scored.result().logprobs


def _trial(completion: Completion, reward: float, solved_share: float, text: str, feedback: str) -> Trial:
    return Trial(
        reward=reward,
        solved_share=solved_share,
        feedback=feedback,
        response_text=text,
        finish_reason=completion.finish_reason,
        num_tokens=len(completion.token_ids),
        weight_version=completion.weight_versions[-1],
    )


class EvolutionLink:
    """What passes between training and prompt evolution besides rounds: scores go in, numbers come out."""

    def __init__(self, session: EvolutionSession | None, decode: Callable[[Completion], str]) -> None:
        """`session`: None without evolution."""
        self._session, self._decode = session, decode

    def announce_to(self, announce: Callable[[str], None]) -> None:
        """Have the beginning and the progress of a round that training waits for announced."""
        if self._session is not None:
            self._session.announce = announce

    def observe(self, groups: Sequence[Group]) -> None:
        """Tell evolution how the templates of training rollouts did."""
        if self._session is not None:
            for score in free_scores(groups, self._decode):
                self._session.observe(score)

    def take_statistics(self) -> Mapping[str, float]:
        """Return the numbers of the last round by name; empty when none ran since they were last asked for."""
        if self._session is None:
            return {}
        rounds, self._session.last_rounds = self._session.last_rounds, ()
        return round_statistics(rounds)


def free_scores(groups: Sequence[Group], decode: Callable[[Completion], str]) -> list[FreeScore]:
    """Return what training rollouts already say about each (template, problem): the mean reward of those
    that were decided, and one answer."""
    scores: list[FreeScore] = []
    for group in groups:
        by_template: dict[str, list[Rollout]] = {}
        for rollout in group.rollouts:
            if rollout.is_decided:
                by_template.setdefault(rollout.completion.prompt.template.text, []).append(rollout)
        for text, rollouts in by_template.items():
            shown = rollouts[0].completion
            mean_reward = sum(rollout.reward for rollout in rollouts) / len(rollouts)
            solved_share = sum(rollout.is_solved for rollout in rollouts) / len(rollouts)
            trial = _trial(shown, mean_reward, solved_share, decode(shown), rollouts[0].grade.feedback)
            scores.append(FreeScore(template_text=text, problem_id=group.problem.id, trial=trial))
    return scores


def round_statistics(rounds: Sequence[RoundStats]) -> dict[str, float]:
    """Return the numbers of the rounds of an epoch, together, for the metrics `evolution/<name>`; empty without one.

    With several tasks also the main ones of each, as `<task>/<name>`.
    """
    if not rounds:
        return {}
    stats = all_together(rounds)
    numbers: dict[str, float] = {
        "pool_size": stats.num_candidates,
        "best_score": stats.best_score,
        "coverage": stats.coverage,
        "num_rollouts": stats.num_rollouts,
        "num_templates": stats.num_templates,
        "num_restarts": stats.num_restarts,
        "num_failed_trials": stats.num_failed_trials,
        "num_unweighed": stats.num_unweighed,
        "num_proposals": stats.num_proposals,
        "num_accepted": stats.outcomes.get("accepted", 0),
        "num_refused": stats.num_refused,
        "is_cut_off": float(stats.ended_by == "deadline"),
        "is_reflection_lost": float(stats.ended_by == "reflection_unavailable"),
        "round_s": stats.duration_s,
    }
    if stats.plain_coverage is not None:
        numbers["pass_at_n_plain"] = stats.plain_coverage
    for each in rounds:
        if each.task:
            numbers |= {f"{each.task}/{name}": number for name, number in _numbers_of_a_task(each).items()}
    return numbers


def _numbers_of_a_task(stats: RoundStats) -> dict[str, float]:
    return {
        "hard_problems": stats.num_hard,
        "num_rollouts": stats.num_rollouts,
        "num_templates": stats.num_templates,
        "best_score": stats.best_score,
        "coverage": stats.coverage,
    }
