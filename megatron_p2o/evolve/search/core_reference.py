"""The authors' rules (arXiv:2603.21877, Alg. 3, as their production trainer has them): lineages in lock step.

    up to `num_lineages` parents from the union of the per-problem fronts
    each on its own minibatch of feedback problems, none used twice while enough are unused
    reflect on all; children on their parents' minibatches; strictly better ones on all development problems

No score is reused, no duplicate is refused. The randomness is one generator seeded by epoch + number of hard problems,
so a resumed round repeats its decisions from the start; what was measured comes from the journal. Three differences: a
template whose prompt would be too long is refused, where the authors cut the prompt; so is one that `guards` or the
reading of the reply (`reply`) refuses, where theirs need only be non-empty; a rollout without a verdict is no score,
where theirs is a failure.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_p2o.evolve.record.history import EndedBy, Picked
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionUnavailable
from megatron_p2o.evolve.search.budget import reference_cost
from megatron_p2o.evolve.search.candidate_pool import Candidate
from megatron_p2o.evolve.search.round import Round
from megatron_p2o.evolve.search.selection import reference_selection
from megatron_p2o.evolve.trial import TemplateRejected, Trial, TrialFailed, total_reward


@dataclass(frozen=True, kw_only=True, slots=True)
class _Child:
    """A proposal that got as far as a text and both trials."""

    picked: Picked
    text: str
    is_better: bool


class ReferenceCore:
    """Runs a `Round` to its end."""

    def __init__(self, round_: Round, budget: int) -> None:
        """`budget` is in the authors' unit: see `reference_cost`."""
        self._round = round_
        self._remaining = budget
        self._rng = random.Random(round_.spec.epoch + len(round_.spec.problems))
        self._used: set[str] = set()
        self._num_proposals = 0

    async def run(self) -> EndedBy:
        """Return why it ended. The iteration that overdraws the budget is completed, as the authors' is."""
        for seed in self._round.pool.qualified():
            await self._score(seed)
        iteration = 0
        while self._remaining > 0:
            iteration += 1
            parents = reference_selection(self._round.pool.fronts(), self._round.settings.num_lineages, self._rng)
            if not parents:
                return "no_progress"
            try:
                num_accepted = await self._iterate([self._pick(parent) for parent in parents])
            except ReflectionUnavailable as error:
                self._round.notify(f"evolution pauses until the next round: {error}")
                return "reflection_unavailable"
            self._remaining -= reference_cost(
                iteration,
                len(parents),
                num_accepted,
                self._round.settings.minibatch_size,
                len(self._round.split.dev),
            )
        return "budget"

    def _pick(self, parent: int) -> Picked:
        """Return the next proposal with its minibatch; once too few problems are unused, all are drawn from."""
        feedback = self._round.split.feedback
        size = min(self._round.settings.minibatch_size, len(feedback))
        unused = [problem_id for problem_id in feedback if problem_id not in self._used]
        minibatch = self._rng.sample(unused if len(unused) >= size else feedback, size)
        self._used.update(minibatch)
        picked = Picked(proposal=self._num_proposals, parent=parent, minibatch=tuple(minibatch))
        self._num_proposals += 1
        self._round.begin(picked)
        return picked

    async def _iterate(self, picks: Sequence[Picked]) -> int:
        """Advance all lineages by one proposal; return how many were accepted. Raises `ReflectionUnavailable`."""
        outcomes = await asyncio.gather(*(self._propose(picked) for picked in picks), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        better = [child for child in outcomes if isinstance(child, _Child) and child.is_better]
        candidates = [self._round.accept(child.picked, child.text) for child in better]
        await asyncio.gather(*(self._score(candidate) for candidate in candidates))
        for picked, outcome in zip(picks, outcomes, strict=True):
            self._round.end(picked.proposal, outcome if isinstance(outcome, str) else _verdict(outcome))
        return len(candidates)

    async def _propose(self, picked: Picked) -> "_Child | str":
        """Return the child with its comparison, or why there is none."""
        parent = self._round.pool[picked.parent]
        try:
            before = await self._measure(parent.text, picked, "before")
            text = await self._round.reflect(picked.proposal, parent, dict(zip(picked.minibatch, before, strict=True)))
            after = await self._measure(text, picked, "after")
        except ReflectionRefused as refused:
            return f"refused: {refused}"
        except TemplateRejected as rejected:
            return f"rejected: {rejected}"
        except TrialFailed:
            return "trial failed"
        return _Child(picked=picked, text=text, is_better=total_reward(after) > total_reward(before))

    async def _measure(self, text: str, picked: Picked, when: str) -> list[Trial]:
        return await self._round.book.measure(text, picked.minibatch, occasion=f"{picked.proposal}/{when}")

    async def _score(self, candidate: Candidate) -> None:
        try:
            await self._round.score(candidate, self._round.dev_ids(candidate))
        except TemplateRejected as rejected:
            self._round.disqualify(candidate, str(rejected))
        except TrialFailed:
            pass  # it keeps the scores it has


def _verdict(child: object) -> str:
    return "accepted" if isinstance(child, _Child) and child.is_better else "not better"
