"""The broker's records of a running completion and of its engine."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np

from megatron_p2o.rollout.servers.answers import Generation
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.types import Completion, Prompt, SamplingParams, TokenIds

Outcome = TypeVar("Outcome")

Priority = Literal["training", "evolution"]
"""Training goes first; evolution takes the slots that training leaves idle."""

PRIORITY_IN_ENGINE: Mapping[Priority, int] = {"training": 1, "evolution": 0}
"""In an engine's own queue, where a higher number goes first and takes KV cache from a lower one."""

PRIORITIES: tuple[Priority, ...] = ("training", "evolution")
EVERYONE: frozenset[Priority] = frozenset(PRIORITIES)
NOBODY: frozenset[Priority] = frozenset()


@dataclass(slots=True, eq=False)
class GenerationRequest:
    """A completion in progress."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    priority: Priority
    future: "Future[Completion]"
    num_scored: int = 0
    """Last tokens of the prompt whose log-probs are asked for, instead of a completion; 0: a completion."""
    kept: Generation | None = None
    """What engines sampled before it was paused; None when it never was."""
    is_pausing: bool = False
    """Whether its engine was asked to hand over what it has."""
    num_sampled: int = 0
    """Tokens that its engine has sampled, without what was kept."""

    @property
    def token_ids(self) -> TokenIds:
        """[P + K] the prompt and what was kept: what the engine goes on from."""
        ids = self.prompt.sampling_ids
        return ids if self.kept is None else np.concatenate([ids, self.kept.token_ids])

    @property
    def sampling_left(self) -> SamplingParams:
        """How to sample what is left of it."""
        num_kept = 0 if self.kept is None else len(self.kept.token_ids)
        return replace(self.sampling, max_new_tokens=self.sampling.max_new_tokens - num_kept)

    def keep(self, generation: Generation) -> None:
        """Keep what it has when it is paused: all but the last token.

        An engine that is told to stop does not look at whether the last token ends the response. It is sampled again.
        Where it was the only one nothing is kept, no weight version either: no token of the response is from it.
        """
        kept = replace(generation, token_ids=generation.token_ids[:-1], logprobs=generation.logprobs[:-1])
        self.kept = kept if len(kept.token_ids) else None

    def joined(self, generation: Generation) -> Generation:
        """Return what was kept with what came after it."""
        kept = self.kept
        if kept is None:
            return generation
        return Generation(
            token_ids=np.concatenate([kept.token_ids, generation.token_ids]),
            logprobs=np.concatenate([kept.logprobs, generation.logprobs]),
            finish_reason=generation.finish_reason,
            weight_versions=tuple(dict.fromkeys((*kept.weight_versions, *generation.weight_versions))),
        )


@dataclass(slots=True, eq=False)
class EngineHandle:
    """One server as the broker sees it; a server that replaces another is a new engine of the same name."""

    name: str
    client: EngineClient
    log_tail: Callable[[], str]
    cache_tokens: int
    """Tokens that its KV cache holds."""
    running: dict[GenerationRequest, "asyncio.Task[None]"] = field(
        default_factory=dict[GenerationRequest, "asyncio.Task[None]"]
    )
    heartbeat: "asyncio.Task[None] | None" = None
    """The task that watches the engine; None until the engine is used."""
    is_lost: bool = False
    num_evolution: int = 0
    """Running requests of evolution."""
    num_pausing: int = 0
    """Those of them that it was asked to hand over."""

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_training(self) -> int:
        return len(self.running) - self.num_evolution


class StoppableClock:
    """Seconds of another clock, without those for which this one was stopped."""

    def __init__(self, time_s: Callable[[], float]) -> None:
        self._time_s = time_s
        self._lost_s = 0.0
        self._stopped_at_s: float | None = None
        """Time at which the clock was stopped; None while it runs."""

    @property
    def is_stopped(self) -> bool:
        return self._stopped_at_s is not None

    def now_s(self) -> float:
        now_s = self._time_s() if self._stopped_at_s is None else self._stopped_at_s
        return now_s - self._lost_s

    def stop(self) -> None:
        """Stand still until `go`. Idempotent."""
        if self._stopped_at_s is None:
            self._stopped_at_s = self._time_s()

    def go(self) -> None:
        """Go on. Idempotent."""
        if self._stopped_at_s is not None:
            self._lost_s += self._time_s() - self._stopped_at_s
            self._stopped_at_s = None


class BusyTime:
    """Seconds in which engines had requests, summed over engines."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._ended_s = 0.0
        self._since: dict[EngineHandle, float] = {}

    def note(self, engine: EngineHandle) -> None:
        """Take in that an engine's requests have changed."""
        if engine.running:
            self._since.setdefault(engine, self._now_s())
        elif engine in self._since:
            self._ended_s += self._now_s() - self._since.pop(engine)

    def total_s(self) -> float:
        """Return the seconds so far. From any thread."""
        now_s = self._now_s()
        return self._ended_s + sum(now_s - since_s for since_s in list(self._since.values()))


def settle(future: "Future[Outcome]", outcome: Outcome | BaseException) -> None:
    """Set the outcome of a future unless its owner has cancelled it."""
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        assert future.cancelled()


def nothing_generated(version: int) -> Generation:
    """Return what a request is given up with when the engine does not even answer the abort."""
    return Generation(
        token_ids=np.empty(0, dtype=np.int32),
        logprobs=np.empty(0, dtype=np.float32),
        finish_reason="abort",
        weight_versions=(version,),
    )
