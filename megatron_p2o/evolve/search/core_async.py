"""The asynchronous rules: every lineage advances on its own, without barriers, and a candidate earns its trials.

    pick a parent by its share of the solved development problems      (rng keyed by the proposal's number)
    try it on a minibatch of feedback problems         (known scores are free)
    reflect; refuse duplicates, leaks and templates that do not fit
    try the child on the same minibatch; parent and child are compared on the same policy version
    strictly better: it joins the pool and is scored in rungs on the development problems

A resumed round continues the proposals that were under way with the parent, minibatch and text they had.
"""

import asyncio
import math
from collections.abc import Sequence

from megatron_p2o.evolve.record.history import EndedBy, Picked
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionUnavailable
from megatron_p2o.evolve.search.candidate_pool import Candidate, CandidatePool
from megatron_p2o.evolve.search.round import Round
from megatron_p2o.evolve.search.score_book import BudgetSpent
from megatron_p2o.evolve.search.selection import PickParent, pick_parent
from megatron_p2o.evolve.trial import TemplateRejected, TrialFailed, total_reward

RUNG_SHARES = (2 / 15, 2 / 5, 1.0)
"""Share of the development problems tried after each rung: 40, 120 and 300 of 300. A hopeless candidate costs 40."""

MIN_RUNG = 10
"""Problems of a rung; fewer say nothing."""

MAX_BARREN = 8
"""Proposals in a row without any new score before a lineage waits for the others. When all wait, it is over."""

MAX_PAIRINGS = 3
"""Measurements of parent and child in search of a common policy version; after that the policy moves too fast."""


class AsynchronousCore:
    """Runs a `Round` to its end."""

    def __init__(self, round_: Round, pick: PickParent = pick_parent) -> None:
        """Restore the candidates that `round_` had before a kill. `pick` chooses the parent of each proposal."""
        round_.restore_candidates()
        self._round = round_
        self._pick_parent = pick
        self._open = round_.history.open_proposals()
        self._next = max(round_.history.picks, default=-1) + 1
        self._ended_by: EndedBy | None = None
        self._num_waiting = 0
        self._progress = asyncio.Event()

    async def run(self) -> EndedBy:
        """Return why it ended. Cancelling it loses nothing that was journalled."""
        await asyncio.gather(*(self._race(seed) for seed in self._round.pool.qualified()))
        async with asyncio.TaskGroup() as lineages:
            for _ in range(self._round.settings.num_lineages):
                lineages.create_task(self._lineage())
        assert self._ended_by is not None, "lineages stop only for a reason"
        return self._ended_by

    async def _lineage(self) -> None:
        num_barren = 0
        while self._ended_by is None:
            num_scored = self._round.history.num_scored
            picked = self._pick()
            outcome = await self._outcome_of(picked)
            if outcome is None:
                return
            self._round.end(picked.proposal, outcome)
            is_barren = self._round.history.num_scored == num_scored
            num_barren = num_barren + 1 if is_barren else 0
            if not is_barren:
                self._announce_progress()
            elif num_barren >= MAX_BARREN:
                await self._wait_for_progress()
            await asyncio.sleep(0)  # where everything was known already, let the others run

    def _pick(self) -> Picked:
        """Return a proposal that was under way before a kill, else a new one."""
        if self._open:
            return self._round.history.picks[self._open.pop(0)]
        rng = self._round.spec.rng(f"proposal/{self._next}")
        pool = self._round.pool
        parent = self._pick_parent({candidate.id: pool.solved(candidate.id) for candidate in pool.qualified()}, rng)
        feedback = self._round.split.feedback
        minibatch = rng.sample(feedback, min(self._round.settings.minibatch_size, len(feedback)))
        picked = Picked(proposal=self._next, parent=parent, minibatch=tuple(minibatch))
        self._next += 1
        self._round.begin(picked)
        return picked

    async def _outcome_of(self, picked: Picked) -> str | None:
        """Return how a proposal ended; None when it stays open because the round is over."""
        try:
            return await self._advance(picked)
        except BudgetSpent:
            return self._stop("budget")
        except ReflectionUnavailable as error:
            if self._ended_by is None:
                self._round.notify(f"evolution pauses until the next round: {error}")
            return self._stop("reflection_unavailable")
        except ReflectionRefused as refused:
            return f"refused: {refused}"
        except TemplateRejected as rejected:
            return f"rejected: {rejected}"
        except TrialFailed:
            return "trial failed"

    async def _advance(self, picked: Picked) -> str:
        known = self._round.history.candidate_of.get(picked.proposal)
        if known is not None:
            await self._race(self._round.pool[known])
            return "accepted"
        parent = self._round.pool[picked.parent]
        before = await self._round.book.measure(parent.text, picked.minibatch)
        if all(trial.is_solved for trial in before):
            return "parent solves all"
        text = await self._round.reflect(picked.proposal, parent, dict(zip(picked.minibatch, before, strict=True)))
        comparison = await self._compare(parent.text, text, picked.minibatch)
        if comparison != "better":
            return comparison
        await self._race(self._round.accept(picked, text))
        return "accepted"

    async def _compare(self, parent_text: str, text: str, minibatch: Sequence[str]) -> str:
        """Return whether `text` is "better" than its parent on the minibatch, measured on (nearly) one policy."""
        oldest, max_gap = 0, self._round.settings.max_version_gap
        for _ in range(MAX_PAIRINGS):
            after = await self._round.book.measure(text, minibatch, min_version=oldest)
            before = await self._round.book.measure(parent_text, minibatch, min_version=oldest)
            if total_reward(after) <= total_reward(before):
                return "not better"
            versions = {trial.weight_version for trial in (*before, *after)}
            if max(versions) - min(versions) <= max_gap:
                return "better"
            oldest = max(versions) - max_gap
        return "policy moved"

    async def _race(self, candidate: Candidate) -> None:
        """Score a candidate on more and more development problems while it promises to add something."""
        problem_ids = self._round.dev_ids(candidate)
        start = 0
        try:
            for end in rung_ends(len(problem_ids)):
                await self._round.score(candidate, problem_ids[start:end])
                if not is_promising(self._round.pool, candidate, problem_ids[:end]):
                    return
                start = end
        except TemplateRejected as rejected:
            self._round.disqualify(candidate, str(rejected))
        except (TrialFailed, BudgetSpent):
            pass  # it keeps the scores it has

    def _stop(self, reason: EndedBy) -> None:
        self._ended_by = self._ended_by or reason
        self._announce_progress()

    def _announce_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    async def _wait_for_progress(self) -> None:
        """Wait until a proposal of another lineage led to scores, or the round is over: it is when all wait."""
        self._num_waiting += 1
        if self._num_waiting == self._round.settings.num_lineages:
            self._stop("no_progress")
        else:
            await self._progress.wait()
        self._num_waiting -= 1


def rung_ends(num_problems: int) -> list[int]:
    """Return how many development problems a candidate has been scored on after each rung; the last is all."""
    ends = {min(num_problems, max(MIN_RUNG, math.ceil(share * num_problems))) for share in RUNG_SHARES}
    return sorted(ends)


def is_promising(pool: CandidatePool, candidate: Candidate, problem_ids: Sequence[str]) -> bool:
    """Return whether to go on scoring: it solves what no other does, or at least half of what the best other does."""
    asked = frozenset(problem_ids)
    mine = pool.solved(candidate.id) & asked
    others = [pool.solved(other.id) & asked for other in pool.qualified() if other.id != candidate.id]
    is_unique = bool(mine - frozenset[str]().union(*others))
    return is_unique or 2 * len(mine) >= max([1, *map(len, others)])
