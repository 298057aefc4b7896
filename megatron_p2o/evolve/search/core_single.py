"""One rewrite for each hard problem and no search: the single-turn reflection that P2O compares itself with
(arXiv:2603.21877 v3, section 4.1).

    a plain response to each hard problem, which training has shown, else a rollout of the round
    reflection on it, once, from the empty template; leaks and what is no template are refused
    what is written becomes the template of that problem alone (`publish`), untried

A problem whose rewrite is refused is asked plainly. A resumed round goes on with the problems that have none yet.
"""

import asyncio

from megatron_p2o.evolve.record.history import EndedBy, Picked
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused, ReflectionUnavailable
from megatron_p2o.evolve.search.round import Round
from megatron_p2o.evolve.trial import TemplateRejected, TrialFailed
from megatron_p2o.types import PLAIN


class SingleTurnCore:
    """Runs a `Round` to its end."""

    def __init__(self, round_: Round) -> None:
        """Restore the candidates that `round_` had before a kill."""
        round_.restore_candidates()
        self._round = round_
        self._places = asyncio.Semaphore(round_.settings.num_lineages)
        self._is_reflection_lost = False

    async def run(self) -> EndedBy:
        """Return why it ended. Cancelling it loses nothing that was journalled."""
        await asyncio.gather(*(self._rewrite(*each) for each in enumerate(self._round.split.feedback)))
        return "reflection_unavailable" if self._is_reflection_lost else "all_reflected"

    async def _rewrite(self, proposal: int, problem_id: str) -> None:
        """Ask for the template of a problem, unless it was before a kill or reflection does not answer any more."""
        async with self._places:
            if proposal in self._round.history.outcomes or self._is_reflection_lost:
                return
            picked = Picked(proposal=proposal, parent=PLAIN.id, minibatch=(problem_id,))
            self._round.begin(picked)
            try:
                outcome = await self._outcome_of(picked)
            except ReflectionUnavailable as error:
                if not self._is_reflection_lost:
                    self._round.notify(f"evolution pauses until the next round: {error}")
                self._is_reflection_lost = True
                return
            self._round.end(proposal, outcome)

    async def _outcome_of(self, picked: Picked) -> str:
        empty = self._round.pool[PLAIN.id]
        try:
            shown = await self._round.book.measure(empty.text, picked.minibatch)
            await self._round.reflect(picked.proposal, empty, dict(zip(picked.minibatch, shown, strict=True)))
        except ReflectionRefused as refused:
            return f"refused: {refused}"
        except TemplateRejected as rejected:
            return f"rejected: {rejected}"
        except TrialFailed:
            return "trial failed"
        return "accepted"
