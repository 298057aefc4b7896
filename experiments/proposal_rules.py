"""Rules of evolution for `proposals.yaml` and `tools/compare_proposals.py`: P parents with N children each, as gepa
0.1.4 proposes, and with or without waiting for all P x N. Everything else is ours."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from megatron_p2o.evolve.record.history import EndedBy
from megatron_p2o.evolve.search.core_async import MAX_BARREN, AsynchronousCore
from megatron_p2o.evolve.search.round import Round
from megatron_p2o.evolve.search.selection import PickParent, pick_parent

Rule = Callable[[Round], Coroutine[Any, Any, EndedBy]]


def shared_pick(num_children: int) -> PickParent:
    """Return a choice of parents that makes as many proposals in a row share one."""
    parent, num_left = 0, 0

    def pick(solved: Mapping[int, frozenset[str]], rng: random.Random) -> int:
        nonlocal parent, num_left
        if num_left == 0:
            parent, num_left = pick_parent(solved, rng), num_children
        num_left -= 1
        return parent

    return pick


class Iterations(AsynchronousCore):
    """As many proposals at once as there are lineages; the next ones wait for all of them."""

    async def run(self) -> EndedBy:
        await asyncio.gather(*(self._race(seed) for seed in self._round.pool.qualified()))
        num_barren = 0
        while self._ended_by is None and num_barren < MAX_BARREN:
            num_scored = self._round.history.num_scored
            picks = [self._pick() for _ in range(self._round.settings.num_lineages)]
            outcomes = await asyncio.gather(*(self._outcome_of(picked) for picked in picks))
            for picked, outcome in zip(picks, outcomes, strict=True):
                if outcome is not None:
                    self._round.end(picked.proposal, outcome)
            num_barren = num_barren + 1 if self._round.history.num_scored == num_scored else 0
        return self._ended_by or "no_progress"


def sharing(num_children: int, *, waits: bool = False) -> Rule:
    """Return a rule: as many proposals in a row share a parent, and wait for those of all lineages if it `waits`."""

    async def rule(round_: Round) -> EndedBy:
        return await (Iterations if waits else AsynchronousCore)(round_, shared_pick(num_children)).run()

    return rule


four_by_four = sharing(4)
two_by_eight = sharing(8)
iterations = sharing(1, waits=True)
four_by_four_iterations = sharing(4, waits=True)
two_by_eight_iterations = sharing(8, waits=True)
