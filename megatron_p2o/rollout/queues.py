"""Chooses the next waiting request and its engine."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter

from megatron_p2o.rollout.requests import EVERYONE, PRIORITIES, EngineHandle, GenerationRequest, Priority


class WaitingRequests:
    """Requests of one priority. Of several jobs the one with the fewest waiting goes first, each in its order."""

    def __init__(self, job_of: Callable[[GenerationRequest], str]) -> None:
        """`job_of`: which job a request is part of."""
        self._job_of = job_of
        self._jobs: dict[str, OrderedDict[GenerationRequest, None]] = {}
        """By job, none empty; a request is taken out of the middle in constant time."""

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def add(self, request: GenerationRequest, *, is_first: bool = False) -> None:
        """Queue a request as the last of its job, or the first."""
        job = self._jobs.setdefault(self._job_of(request), OrderedDict())
        job[request] = None
        job.move_to_end(request, last=not is_first)

    def next(self) -> GenerationRequest:
        """Return the request that goes next; there must be one."""
        return next(iter(min(self._jobs.values(), key=len)))

    def remove(self, request: GenerationRequest) -> bool:
        """Take a request out and return whether it was waiting."""
        name = self._job_of(request)
        job = self._jobs.get(name, {})
        if request not in job:
            return False
        del job[request]
        if not job:
            del self._jobs[name]
        return True


JOB_OF: Mapping[Priority, Callable[[GenerationRequest], str]] = {
    "training": lambda request: "",
    "evolution": lambda request: request.prompt.template.text,
}
"""Training is served in its order. Evolution tries few problems through a fresh template before it decides to try many:
the few go first, so that 300 development problems of one template keep no other waiting."""


class RequestQueues:
    """The requests that have no slot yet, and the engine that has each problem's prompt in its cache."""

    def __init__(self, slots_per_engine: int, allowed: Callable[[EngineHandle], int]) -> None:
        """`allowed`: how many evolution requests an engine may run."""
        self._slots = slots_per_engine
        self._allowed = allowed
        self._queues = {priority: WaitingRequests(JOB_OF[priority]) for priority in PRIORITIES}
        self._homes: dict[str, EngineHandle] = {}
        self._num_open: Counter[str] = Counter()
        """Requests of each problem that have been added and not settled."""
        self.admitted: frozenset[Priority] = EVERYONE
        """Requests of other priorities wait."""

    def add(self, request: GenerationRequest) -> None:
        """Queue a new request; it is open until `settled`."""
        self._num_open[request.prompt.problem.id] += 1
        self._queues[request.priority].add(request)

    def add_again(self, request: GenerationRequest) -> None:
        """Queue an open request before the others of its job: it was paused, or its engine was lost."""
        self._queues[request.priority].add(request, is_first=True)

    def take(self, engines: Sequence[EngineHandle]) -> tuple[GenerationRequest, EngineHandle] | None:
        """Return the request that goes next and the engine it goes to; None while it has to wait or there is none."""
        for priority in PRIORITIES:
            queue = self._queues[priority]
            if priority in self.admitted and queue:
                request = queue.next()
                engine = self._engine_for(request, engines)
                if engine is None:
                    return None
                queue.remove(request)
                return request, engine
        return None

    def remove(self, request: GenerationRequest) -> bool:
        """Take a request out and return whether it was waiting."""
        return self._queues[request.priority].remove(request)

    def take_all(self) -> Iterator[GenerationRequest]:
        """Yield and take out every waiting request, admitted or not."""
        for queue in self._queues.values():
            while queue:
                request = queue.next()
                queue.remove(request)
                yield request

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
        problem_id = request.prompt.problem.id
        home = self._homes.get(problem_id)
        if home is not None and not home.is_lost and self._is_free(home, request.priority):
            return home  # before hundreds of engines are looked at
        least = self._least_loaded(engines, request.priority)
        if least is not None:
            self._homes[problem_id] = least
        return least

    def _least_loaded(self, engines: Sequence[EngineHandle], priority: Priority) -> EngineHandle | None:
        if priority == "training":  # evolution is no load to it: that gives way
            least = min(engines, key=attrgetter("num_training"), default=None)
            return least if least is not None and self._is_free(least, priority) else None
        free = [engine for engine in engines if self._is_free(engine, priority)]
        return min(free, key=attrgetter("num_training", "num_evolution"), default=None)

    def _is_free(self, engine: EngineHandle, priority: Priority) -> bool:
        if priority == "training":
            return engine.num_training < self._slots
        return engine.num_running < self._slots and engine.num_evolution < self._allowed(engine)
