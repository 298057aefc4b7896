"""The scores of a round. Every rollout is requested once, written to the journal, and then remembered."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import replace

from megatron_p2o.evolve.record.history import RoundHistory, Scored, ScoreKey, template_digest
from megatron_p2o.evolve.reflection.reflection import MAX_RESPONSE_CHARS, shorten
from megatron_p2o.evolve.search.budget import RolloutBudget
from megatron_p2o.evolve.trial import (
    FreeScore,
    Rejection,
    TemplateRejected,
    Trial,
    TrialFailed,
    TrialRunner,
)
from megatron_p2o.seeds import seed_of

LOST = Trial(reward=0.0, response_text="", finish_reason="abort", num_tokens=0, weight_version=0)
"""What a journal keeps of a rollout without a verdict, where it must not be asked again. It is no score."""


class BudgetSpent(Exception):
    """The rollouts asked for would exceed the round's budget."""


class ScoreBook:
    """Measures templates on problems, and remembers the results."""

    def __init__(
        self,
        runner: TrialRunner,
        history: RoundHistory,
        budget: RolloutBudget,
        *,
        temperature: float,
        feedback_ids: Collection[str],
        free_scores: Sequence[FreeScore] = (),
        is_loss_final: bool = False,
    ) -> None:
        """Responses are kept for `feedback_ids` only: reflection sees no others, and the journal stays small.

        `is_loss_final` journals a rollout without a verdict, so that a resumed round repeats its decisions; otherwise
        it may be asked again.
        """
        self._runner = runner
        self._history = history
        self._budget = budget
        self._temperature = temperature
        self._feedback_ids = frozenset(feedback_ids)
        self._free = {(template_digest(free.template_text), free.problem_id, ""): free.trial for free in free_scores}
        self._is_loss_final = is_loss_final
        self._in_flight: dict[ScoreKey, asyncio.Task[Trial]] = {}

    def known(self, text: str, problem_id: str, *, occasion: str = "", min_version: int = 0) -> Trial | None:
        """Return the trial of a pair on policy version `min_version` or later."""
        key = (template_digest(text), problem_id, occasion)
        trial = self._history.trials.get(key) or self._free.get(key)
        return trial if trial is not None and trial.weight_version >= min_version else None

    async def measure(
        self,
        text: str,
        problem_ids: Sequence[str],
        *,
        occasion: str = "",
        min_version: int = 0,
    ) -> list[Trial]:
        """Return one trial per problem, in order. Only unknown pairs are sampled. `occasion` distinguishes rollouts of
        one pair. Waits for all of them, then raises `TemplateRejected` or `TrialFailed` if one did. Raises
        `BudgetSpent` before anything is sampled.
        """
        known = [self.known(text, key, occasion=occasion, min_version=min_version) for key in problem_ids]
        keys = [(template_digest(text), problem_id, occasion) for problem_id in problem_ids]
        num_new = sum(e is None and key not in self._in_flight for e, key in zip(known, keys, strict=True))
        if not self._budget.try_spend(num_new):
            raise BudgetSpent(f"{self._budget.spent} of {self._budget.limit} rollouts are used")
        outcomes = await asyncio.gather(
            *(
                asyncio.shield(self._sampling(key, text))
                for key, trial in zip(keys, known, strict=True)
                if trial is None
            ),
            return_exceptions=True,
        )
        fresh: list[Trial] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            fresh.append(outcome)
        sampled = iter(fresh)
        trials = [trial if trial is not None else next(sampled) for trial in known]
        if any(trial.finish_reason == "abort" for trial in trials):
            raise TrialFailed("a rollout has no verdict")
        return trials

    def cancel(self) -> None:
        """Forget running requests: their results are no longer needed, and the history is about to be closed."""
        for task in list(self._in_flight.values()):
            task.cancel()

    def _sampling(self, key: ScoreKey, text: str) -> asyncio.Task[Trial]:
        """Return the rollout another lineage is already waiting for, or a new one."""
        if key not in self._in_flight:
            task = asyncio.ensure_future(self._sample(key, text))
            self._in_flight[key] = task
            task.add_done_callback(lambda _: self._in_flight.pop(key))
        return self._in_flight[key]

    async def _sample(self, key: ScoreKey, text: str) -> Trial:
        template, problem_id, occasion = key
        answer = await self._ask(text, problem_id, seed_of(occasion) if occasion else 0)
        is_shown = problem_id in self._feedback_ids
        kept = shorten(answer.response_text, MAX_RESPONSE_CHARS) if is_shown else ""
        trial = replace(answer, response_text=kept, feedback=answer.feedback if is_shown else "")
        self._history.add(Scored(template=template, problem_id=problem_id, occasion=occasion, trial=trial))
        return trial

    async def _ask(self, text: str, problem_id: str, sample: int) -> Trial:
        try:
            answer = await self._runner.run_trial(text, problem_id, temperature=self._temperature, sample=sample)
            if isinstance(answer, Rejection):
                raise TemplateRejected(answer.reason)
            if answer.finish_reason == "abort":
                raise TrialFailed(f"the engine gave up on problem {problem_id}")
        except TrialFailed:
            if not self._is_loss_final:
                raise
            return LOST
        return answer
