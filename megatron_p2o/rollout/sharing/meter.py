"""What evolution samples on the engines, and what that takes from training: numbers of each step."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from megatron_p2o.rollout.requests import EngineHandle, GenerationRequest
from megatron_p2o.rollout.sharing.throughput import Throughput


class EvolutionMeter:
    """Measures engine seconds by who has the engine. Tell it before requests come and go. Lives on the loop."""

    def __init__(self, now_s: Callable[[], float], throughput: Throughput) -> None:
        """`now_s`: a clock that stands still while the gate is closed to everyone."""
        self._now_s = now_s
        self._throughput = throughput
        self._lock = threading.Lock()
        self._sums: defaultdict[str, float] = defaultdict(float)
        """Since the last `take`."""
        self._noted_s: dict[EngineHandle, float] = {}
        self._alone_s: defaultdict[EngineHandle, float] = defaultdict(float)
        """Seconds in which evolution had the engine to itself, in the whole run."""
        self._begun: dict[GenerationRequest, tuple[float, float]] = {}
        """When each running request of evolution began, and the seconds alone that its engine had by then."""
        self._alone_tokens = self._total_alone_s = 0.0
        self._waits_since_s: float | None = None
        """When evolution began to wait with nothing of it running; None while it does not."""

    def note(self, engines: Iterable[EngineHandle]) -> None:
        """Take in the time in which these engines had the requests that they have."""
        now_s = self._now_s()
        for engine in engines:
            passed_s = now_s - self._noted_s.get(engine, now_s)
            self._noted_s[engine] = now_s
            self._pass(engine, passed_s)

    def begin(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run a request."""
        self.note([engine])
        if request.priority == "evolution":
            self._begun[request] = self._now_s(), self._alone_s[engine]

    def end(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run it no longer."""
        self.note([engine])
        if request.priority == "evolution":
            began_s, alone_s = self._begun.pop(request)
            self._add(tokens=request.num_sampled, pauses_count=request.is_pausing)
            if (took_s := self._now_s() - began_s) > 0:
                self._alone_tokens += request.num_sampled * (self._alone_s[engine] - alone_s) / took_s

    def forget(self, engine: EngineHandle) -> None:
        """Forget an engine that has no request left."""
        self._noted_s.pop(engine, None)
        self._alone_s.pop(engine, None)

    def note_waiting(self, does_wait: bool) -> None:
        """Note whether evolution waits for an engine."""
        now_s = self._now_s()
        if self._waits_since_s is not None:
            self._add(starved_s=now_s - self._waits_since_s)
        self._waits_since_s = now_s if does_wait and not self._begun else None

    def take(self) -> Mapping[str, float]:
        """Return the numbers since the last call, by metric key; from any thread.

        What was never so has no number: no slowdown of training that did not run, no price of no tokens.
        """
        with self._lock:
            sums, self._sums = self._sums, defaultdict(float)
        numbers = {
            "engine/evolution_tokens": sums["tokens"],
            "engine/evolution_pauses_count": sums["pauses_count"],
            "engine/idle_s": sums["idle_s"],
            "evolution/starved_s": sums["starved_s"],
        }
        if sums["training_s"]:
            numbers["engine/evolution_slowdown"] = sums["slowdown_s"] / sums["training_s"]
        if sums["tokens"] and self._total_alone_s:
            alone_tokens_per_s = self._alone_tokens / self._total_alone_s
            numbers["engine/evolution_price"] = sums["taken_s"] * alone_tokens_per_s / sums["tokens"]
        return numbers

    def _pass(self, engine: EngineHandle, seconds: float) -> None:
        training, evolution = engine.num_training, engine.num_evolution
        if training:
            without = training + self._throughput.fixed_requests
            self._add(
                training_s=seconds,
                slowdown_s=seconds * evolution / without,
                taken_s=seconds * evolution / (without + evolution),
            )
        elif evolution:
            self._alone_s[engine] += seconds
            self._total_alone_s += seconds
        else:
            self._add(idle_s=seconds)

    def _add(self, **numbers: float) -> None:
        with self._lock:
            for name, number in numbers.items():
                self._sums[name] += number
