"""An SGLang engine in virtual time: continuous batching, chunked prefill, a KV cache that may be full, priorities.

It follows SGLang 0.5.21's scheduler: prefill before decode, first come first served within a priority, requests
admitted while their expected length fits, and the fewest tokens retracted when it did not. Steps between two events
are computed at once. `tests/unit/simulation` holds it to closed forms, `tools/calibrate_engine.py` to a real engine.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from megatron_p2o.rollout.servers.answers import Generation
from megatron_p2o.simulation.batch import (
    RETRACT_STEPS,
    EngineCoefficients,
    KvCache,
    NewTokenRatio,
    Sequence,
)
from megatron_p2o.types import SamplingParams, TokenIds

LengthOf = Callable[[TokenIds, SamplingParams], int]
"""How many tokens a prompt is answered with."""

RECHECK_STEPS = 10
"""Steps after which a waiting request is tried again while the expected lengths fall. SGLang tries in each step."""


@dataclass(slots=True)
class EngineCounts:
    """What an engine has done."""

    num_steps: int = 0
    """Decode steps."""
    busy_s: float = 0.0
    num_tokens: int = 0
    """Sampled."""
    num_prefilled: int = 0
    num_retracted: int = 0
    """Requests taken out of the batch because the cache was full, or for a higher priority."""


class SimulatedEngine:
    """Does to the broker what `EngineClient` does. Create it while the loop runs."""

    def __init__(
        self,
        coefficients: EngineCoefficients,
        length_of: LengthOf,
        *,
        cache_tokens: int,
        max_running: int,
        has_priorities: bool = True,
    ) -> None:
        """Args:
        cache_tokens: tokens of the KV cache.
        max_running: sequences of a batch, at most.
        has_priorities: whether a higher priority goes first and takes slots and tokens from a lower one.
        """
        self._coefficients = coefficients
        self._length_of = length_of
        self._max_running = max_running
        self._has_priorities = has_priorities
        self._cache = KvCache(cache_tokens)
        self._ratio = NewTokenRatio()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._chunked: tuple[Sequence, int] | None = None
        """The sequence whose prefill goes on in the next step, and the tokens that are left of it."""
        self._results: dict[Sequence, asyncio.Future[None]] = {}
        self._entries = count()
        self._is_paused = False
        self._wake = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())
        self.version = 0
        self.counts = EngineCounts()

    async def generate(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Generation:
        """Return a completion of as many zeros as `length_of` says, once it has been sampled."""
        sequence = Sequence(
            id=request_id,
            prompt=token_ids.tobytes(),
            num_prompt=len(token_ids),
            length=min(self._length_of(token_ids, sampling), sampling.max_new_tokens),
            limit=sampling.max_new_tokens,
            priority=priority if self._has_priorities else 0,
            entered=next(self._entries),
        )
        done = self._results[sequence] = asyncio.get_running_loop().create_future()
        begun_with = self.version
        self._waiting.append(sequence)
        self._wake.set()
        try:
            await done
        finally:
            self._results.pop(sequence, None)
        reached_limit = sequence.num_done == sequence.limit
        return Generation(
            token_ids=np.zeros(sequence.num_done, np.int32),
            logprobs=np.zeros(sequence.num_done, np.float32),
            finish_reason="abort" if sequence.is_aborted else "length" if reached_limit else "stop",
            weight_versions=tuple(dict.fromkeys((begun_with, self.version))),
        )

    async def abort(self, request_id: str) -> None:
        """End a request with what it has."""
        for sequence in [sequence for sequence in self._results if sequence.id == request_id]:
            sequence.is_aborted = True
            self._wake.set()

    async def cache_tokens(self) -> int:
        return self._cache.capacity

    async def probe(self, timeout_s: float) -> None: ...

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def pause(self) -> None:
        """Stop after the present step; running requests are computed again after `resume`."""
        self._is_paused = True
        self._wake.set()
        while self._running or self._chunked:
            await asyncio.sleep(0)
            await asyncio.sleep(self._coefficients.step_s)

    async def resume(self, version: int) -> None:
        """Go on under other weights, for which no prompt is cached."""
        self.version = version
        self._cache.flush()
        self._is_paused = False
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._drop_aborted()
            if self._is_paused:
                self._requeue(list(self._running))
            if self._is_paused or not (self._running or self._waiting or self._chunked):
                self._ratio.reset()
                await self._sleep_until_woken()
                continue
            begin = asyncio.get_running_loop().time()
            if prefilled := self._prefill_batch():
                await self._prefill(prefilled)
            else:
                await self._decode()
            self.counts.busy_s += asyncio.get_running_loop().time() - begin

    async def _sleep_until_woken(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    # Prefill

    def _prefill_batch(self) -> list[tuple[Sequence, int]]:
        """Return the sequences of the next prefill step with the tokens of each that it computes."""
        room = self._coefficients.chunk_tokens
        batch: list[tuple[Sequence, int]] = []
        expected = 0.0
        for sequence, num_tokens in self._candidates():
            if room == 0:
                break
            if sequence not in self._running:
                if not self._make_room(sequence, num_tokens, expected):
                    break
                self._waiting.remove(sequence)
                self._cache.take(sequence)
                self._running.append(sequence)
                expected += (1 - self._ratio.current) * sequence.num_kept_free
            now = min(num_tokens, room)
            room -= now
            batch.append((sequence, now))
            self._chunked = (sequence, num_tokens - now) if now < num_tokens else None
        return batch

    def _candidates(self) -> Iterator[tuple[Sequence, int]]:
        """Yield what may be prefilled next: what was begun, then the queue in its order."""
        if self._chunked:
            yield self._chunked
        for sequence in sorted(self._waiting, key=lambda one: (-one.priority, one.entered)):
            yield sequence, self._cache.num_to_prefill(sequence)

    def _make_room(self, sequence: Sequence, num_tokens: int, expected: float) -> bool:
        """Return whether a sequence can be admitted, after preempting what gives way to it.

        `expected`: what those of the same step are granted beyond their share: SGLang grants a new one all it may need.
        """
        needed = num_tokens + sequence.num_kept_free
        lower = sorted(
            # SGLang keeps what it has begun to prefill.
            (other for other in self._running if other.priority < sequence.priority and other is not self._being_cut),
            key=lambda one: (one.priority, -one.entered),
        )
        reclaimable = sum(other.num_done + other.num_kept_free * self._ratio.current for other in lower)
        if len(lower) < len(self._running) and self._room(expected) + reclaimable < needed:
            return False
        for other in lower:
            if self._has_slot and self._room(expected) >= needed:
                break
            self._retract([other])
        # Alone it is tried in any case.
        return self._has_slot and (not self._running or self._room(expected) >= needed)

    @property
    def _has_slot(self) -> bool:
        return len(self._running) < self._max_running

    @property
    def _being_cut(self) -> Sequence | None:
        return self._chunked[0] if self._chunked else None

    def _room(self, expected: float) -> float:
        reserved = sum(sequence.num_kept_free for sequence in self._running) * self._ratio.current
        return self._cache.num_free - reserved - expected

    async def _prefill(self, batch: list[tuple[Sequence, int]]) -> None:
        num_tokens = sum(tokens for _, tokens in batch)
        await asyncio.sleep(self._coefficients.prefill_s(num_tokens))
        self.counts.num_prefilled += num_tokens
        # A prefill ends with the sequence's next token.
        self._grow([sequence for sequence, _ in batch if sequence is not self._being_cut], 1)

    # Decode

    async def _decode(self) -> None:
        """Run steps until a sequence ends, the cache is full, or something comes in."""
        decoding = [sequence for sequence in self._running if sequence is not self._being_cut]
        while len(decoding) > self._cache.num_free:
            decoding = self._retract_for_room(decoding)
        if not decoding:
            return
        num_steps = min(sequence.num_left for sequence in decoding)
        num_steps = min(num_steps, self._cache.num_free // len(decoding))
        if self._waiting and self._ratio.is_falling:
            num_steps = min(num_steps, RECHECK_STEPS)
        # Each sequence reads its own prompt, whether or not it is held once for several.
        num_cached = sum(sequence.num_prompt + sequence.num_done for sequence in decoding)
        done = await self._steps(num_steps, len(decoding), num_cached)
        self.counts.num_steps += done
        self._ratio.fall(done)
        self._grow(decoding, done)

    async def _steps(self, num_steps: int, num_sequences: int, num_cached: int) -> int:
        """Let up to `num_steps` pass and return how many did: what comes in is seen between two steps."""
        loop, take = asyncio.get_running_loop(), self._coefficients
        begin = loop.time()
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), take.decode_s(num_steps, num_sequences, num_cached))
            num_steps = max(1, min(num_steps, take.num_steps_within(loop.time() - begin, num_sequences, num_cached)))
            await asyncio.sleep(begin + take.decode_s(num_steps, num_sequences, num_cached) - loop.time())
        return num_steps

    def _grow(self, sequences: list[Sequence], num_tokens: int) -> None:
        """Add sampled tokens, and end the sequences that have all of theirs."""
        for sequence in sequences:
            sequence.num_done += num_tokens
        self._cache.grow(num_tokens * len(sequences))
        self.counts.num_tokens += num_tokens * len(sequences)
        for sequence in sequences:
            if sequence.num_left <= 0:
                self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._cache.release(sequence)
        if self._being_cut is sequence:
            self._chunked = None
        if (result := self._results.get(sequence)) is not None and not result.done():
            result.set_result(None)

    def _drop_aborted(self) -> None:
        for sequence in [sequence for sequence in (*self._running, *self._waiting) if sequence.is_aborted]:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            self._end(sequence)

    def _retract_for_room(self, decoding: list[Sequence]) -> list[Sequence]:
        """Retract the lowest priorities, and of these the fewest tokens, and return those that are left."""
        order = sorted(decoding, key=lambda one: (one.priority, one.num_done, -one.num_prompt), reverse=True)
        while len(order) > 1 and self._cache.num_free < RETRACT_STEPS * len(order):
            self._retract([order.pop()])
        if self._cache.num_free < 1:
            order[0].is_aborted = True  # alone it does not fit either: SGLang gives it up
            self._end(order[0])
            return []
        self._ratio.retracted(order)
        return order

    def _retract(self, sequences: list[Sequence]) -> None:
        self.counts.num_retracted += len(sequences)
        self._requeue(sequences)

    def _requeue(self, sequences: list[Sequence]) -> None:
        """Put sequences back into the queue with the tokens they have."""
        for sequence in sequences:
            self._running.remove(sequence)
            self._cache.release(sequence)
            if self._being_cut is sequence:
                self._chunked = None
            sequence.entered = next(self._entries)
            self._waiting.append(sequence)
