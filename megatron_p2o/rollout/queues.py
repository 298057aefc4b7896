"""Chooses the next waiting request and its engine."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence

from megatron_p2o.rollout.requests import EVERYONE, PRIORITIES, EngineHandle, GenerationRequest, Priority


class RequestQueues:
    """The requests that have no slot yet, and the engine that has each problem's prompt in its cache."""

    def __init__(self, slots_per_engine: int, allowed: Callable[[EngineHandle], int]) -> None:
        """`allowed`: how many evolution requests an engine may run."""
        self._slots = slots_per_engine
        self._allowed = allowed
        self._queues: dict[Priority, OrderedDict[GenerationRequest, None]] = {
            each: OrderedDict() for each in PRIORITIES
        }
        """In order, the next one first; a request is taken out of the middle in constant time."""
        self._homes: dict[str, EngineHandle] = {}
        self._num_open: Counter[str] = Counter()
        """Requests of each problem that have been added and not settled."""
        self.admitted: frozenset[Priority] = EVERYONE
        """Requests of other priorities wait."""

    def add(self, request: GenerationRequest) -> None:
        """Queue a new request; it is open until `settled`."""
        self._num_open[request.prompt.problem.id] += 1
        self._queues[request.priority][request] = None

    def add_again(self, request: GenerationRequest) -> None:
        """Queue an open request before the others: its engine was lost."""
        queue = self._queues[request.priority]
        queue[request] = None
        queue.move_to_end(request, last=False)

    def take(self, engines: Sequence[EngineHandle]) -> tuple[GenerationRequest, EngineHandle] | None:
        """Return the request that goes next and the engine it goes to; None while it has to wait or there is none."""
        for priority in PRIORITIES:
            queue = self._queues[priority]
            if priority in self.admitted and queue:
                engine = self._engine_for(next(iter(queue)), engines)
                return None if engine is None else (queue.popitem(last=False)[0], engine)
        return None

    def remove(self, request: GenerationRequest) -> bool:
        """Take a request out and return whether it was waiting."""
        queue = self._queues[request.priority]
        is_waiting = request in queue
        queue.pop(request, None)
        return is_waiting

    def take_all(self) -> Iterator[GenerationRequest]:
        """Yield and take out every waiting request, admitted or not."""
        for queue in self._queues.values():
            while queue:
                yield queue.popitem(last=False)[0]

    def settled(self, request: GenerationRequest) -> None:
        """Close an open request; with its last one a problem loses its engine."""
        problem_id = request.prompt.problem.id
        self._num_open[problem_id] -= 1
        if self._num_open[problem_id] == 0:
            del self._num_open[problem_id]
            self._homes.pop(problem_id, None)

    @property
    def does_evolution_wait(self) -> bool:
        return bool(self._queues["evolution"])

    def _engine_for(self, request: GenerationRequest, engines: Sequence[EngineHandle]) -> EngineHandle | None:
        """Return the engine that has the problem's prompt in its cache, else the least loaded; None if all are full."""
        free = [engine for engine in engines if self._is_free(engine, request.priority)]
        if not free:
            return None
        problem_id = request.prompt.problem.id
        home = self._homes.get(problem_id)
        if home not in free:
            # Evolution is no load to training: it gives way.
            is_training = request.priority == "training"
            home = min(free, key=lambda engine: (engine.num_training, 0 if is_training else engine.num_evolution))
            self._homes[problem_id] = home
        return home

    def _is_free(self, engine: EngineHandle, priority: Priority) -> bool:
        if priority == "training":
            return engine.num_training < self._slots
        return engine.num_running < self._slots and engine.num_evolution < self._allowed(engine)
