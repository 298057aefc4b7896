"""How many evolution requests an engine runs beside training.

An engine without training takes all there are. One with training takes `evolution.max_slowdown` as many as it has of
training: k requests beside n of about the same length slow it down by k / n at most, because a part of a decode step
costs the same for few and for many, and what training needs of the KV cache it takes from them.
"""

import math
from collections.abc import Iterator

from megatron_p2o.rollout.requests import EngineHandle, GenerationRequest


class Allowance:
    """Counts the requests of evolution and says how many an engine may run. Lives on the loop."""

    def __init__(self, slots_per_engine: int, max_slowdown: float) -> None:
        self._slots = slots_per_engine
        self._max_slowdown = max_slowdown

    def of(self, engine: EngineHandle) -> int:
        """Return how many evolution requests an engine may run."""
        if engine.num_training == 0:
            return self._slots
        return math.floor(min(self._slots, self._max_slowdown * engine.num_training))

    def started(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run a request."""
        request.num_sampled = 0
        engine.num_evolution += request.priority == "evolution"

    def ended(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run it no longer."""
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
