"""How many evolution requests an engine runs beside training.

As many as there is room for in its KV cache beside all of its training, each request at the mean length of its kind.
Where it has training, no more than make its decode steps longer by the share `evolution.max_slowdown`: k requests
beside n of training make steps longer by k / (r + n), where r requests take as long as what a step takes anyway. r
and the lengths are learnt (`throughput`). Before that r is 0, because k / n is the most by which k can slow n down, and
room is not asked for: what training needs of the cache it takes from evolution.
"""

import math
from collections.abc import Iterator

from megatron_p2o.rollout.requests import EngineHandle, GenerationRequest
from megatron_p2o.rollout.sharing.throughput import Throughput


class Allowance:
    """Counts the requests of evolution and says how many an engine may run. Lives on the loop."""

    def __init__(self, slots_per_engine: int, max_slowdown: float, throughput: Throughput) -> None:
        """`max_slowdown`: infinite leaves everything to the engines' own queues."""
        self._slots = slots_per_engine
        self._max_slowdown = max_slowdown
        self._throughput = throughput

    def of(self, engine: EngineHandle) -> int:
        """Return how many evolution requests an engine may run."""
        if math.isinf(self._max_slowdown):
            return self._slots
        room = min(self._slots, self._room(engine))
        if engine.num_training == 0:
            return max(1, math.floor(room))
        unhurried = self._max_slowdown * (engine.num_training + self._throughput.fixed_requests)
        return max(0, math.floor(min(room, unhurried)))

    def _room(self, engine: EngineHandle) -> float:
        """Return for how many requests the KV cache has room beside those of training."""
        training_tokens = self._throughput.mean_tokens("training")
        if not training_tokens:
            return math.inf
        free_tokens = engine.cache_tokens - training_tokens * engine.num_training
        return free_tokens / (self._throughput.mean_tokens("evolution") or training_tokens)

    def started(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run a request."""
        request.num_sampled = 0
        self._throughput.began(request, engine)
        engine.num_evolution += request.priority == "evolution"

    def ended(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run it no longer."""
        self._throughput.ended(request, engine)
        engine.num_pausing -= request.is_pausing
        engine.num_evolution -= request.priority == "evolution"

    def excess(self, engine: EngineHandle) -> Iterator[GenerationRequest]:
        """Yield the evolution requests that are too many for an engine, the newest first, and mark them as pausing."""
        num_left = engine.num_evolution - engine.num_pausing - self.of(engine)
        if num_left <= 0:
            return
        for request in list(reversed(engine.running)):
            if num_left > 0 and request.priority == "evolution" and not request.is_pausing:
                num_left -= 1
                request.is_pausing = True
                engine.num_pausing += 1
                yield request
