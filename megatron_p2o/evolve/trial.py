"""The result of trying a template on a problem, and the interface that runs such trials."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_p2o.types import FinishReason

SOLVED_SHARE = 0.5
"""A template that solves a problem less than half the time does not solve it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One graded rollout of a problem through a template."""

    reward: float
    """Reward in [0, 1]."""
    response_text: str
    """Without special tokens; empty when it was not kept."""
    finish_reason: FinishReason
    num_tokens: int
    """Sampled tokens."""
    weight_version: int
    """Newest policy version that sampled a token of it."""
    solved_share: float | None = None
    """Share of its rollouts that reached `hard.solved_at`. None: the reward is it, for rewards of 0 and 1."""
    feedback: str = ""
    """What the grader tells reflection about it."""
    reliance: float | None = None
    """As `Template.reliance`, of this response. None: it did not solve the problem, or was not measured."""

    @property
    def is_solved(self) -> bool:
        return is_solved(self.reward, self.solved_share)


def is_solved(reward: float, solved_share: float | None) -> bool:
    """Return whether rollouts of this mean reward, of which this share was solved, solve a problem."""
    return (reward if solved_share is None else solved_share) >= SOLVED_SHARE


def total_reward(trials: Sequence[Trial]) -> float:
    return sum(trial.reward for trial in trials)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """The template cannot be used, e.g. because the prompt would be too long; it is never cut to fit."""

    reason: str
    """One of few, by which proposals are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeScore:
    """What training rollouts already showed about a template on a problem."""

    template_text: str
    problem_id: str
    trial: Trial
    """`reward` is the mean over those rollouts; the text is one of them."""


class TemplateRejected(Exception):
    """Raised where a `Rejection` was answered."""


class TrialFailed(Exception):
    """No score could be had: the engine gave up or was lost. Not a verdict on the template."""


class TrialRunner(Protocol):
    """Samples and grades; rank 0 implements it on the training engines."""

    async def run_trial(
        self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
    ) -> Trial | Rejection:
        """Ask `problem_id` through `template_text` once.

        `sample` (any number) tells repeated rollouts of the same pair apart; 0 temperature is greedy. Raises
        `TrialFailed`.
        """
        ...
