"""What an engine holds at a moment, and what its steps take: arithmetic without a clock."""

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCoefficients:
    """What the steps of an engine take, in seconds."""

    step_s: float
    """A decode step of nothing: launches, and reading the weights."""
    sequence_s: float
    """For each sequence of a decode step."""
    cached_token_s: float
    """For each token of the KV cache that a decode step attends to."""
    prefill_step_s: float
    """A prefill step of nothing."""
    prefill_token_s: float
    """For each token of a prefill step."""
    chunk_tokens: int = 8192
    """Tokens of a prefill step, at most."""

    def decode_s(self, num_steps: int, num_sequences: int, num_cached: int) -> float:
        """Return what steps take during which the sequences stay the same and each grows by a token a step."""
        step = self.step_s + self.sequence_s * num_sequences + self.cached_token_s * num_cached
        growth = self.cached_token_s * num_sequences
        return num_steps * step + growth * num_steps * (num_steps - 1) / 2

    def num_steps_within(self, seconds: float, num_sequences: int, num_cached: int) -> int:
        """Return how many steps have begun after `seconds`: the smallest number that takes at least so long."""
        step = self.step_s + self.sequence_s * num_sequences + self.cached_token_s * num_cached
        growth = self.cached_token_s * num_sequences
        linear = step - growth / 2
        root = math.sqrt(linear * linear + 2 * growth * seconds)
        steps = (root - linear) / growth if growth > 0 else seconds / step
        return max(0, math.ceil(steps - 1e-9))

    def prefill_s(self, num_tokens: int) -> float:
        return self.prefill_step_s + self.prefill_token_s * num_tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """A request inside an engine."""

    id: str
    prompt: bytes
    """What the prompt is, for the prefix cache."""
    num_prompt: int
    length: int
    """Tokens that it will have sampled when it ends."""
    limit: int
    """Tokens that it may sample, for all that the engine knows."""
    priority: int
    entered: int
    """Place in the order of all that entered the queue."""
    num_done: int = 0
    is_aborted: bool = False

    @property
    def num_left(self) -> int:
        return self.length - self.num_done

    @property
    def num_kept_free(self) -> int:
        """Tokens that SGLang expects it to need, at most, before its ratio of real to possible lengths."""
        return min(self.limit - self.num_done, CLIP_TOKENS)


CLIP_TOKENS = 4096
"""Most tokens that SGLang keeps free for the rest of a response (SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION)."""

RETRACT_STEPS = 20
"""Steps for which SGLang makes room when the cache is full (SGLANG_RETRACT_DECODE_STEPS)."""


class NewTokenRatio:
    """SGLang's guess of how much of their limit running requests will use: falls step by step, rises when wrong."""

    INIT, MIN, DECAY_STEPS = 0.7, 0.7 * 0.14, 600

    def __init__(self) -> None:
        self.current = self.INIT

    @property
    def is_falling(self) -> bool:
        return self.current > self.MIN

    def fall(self, num_steps: int) -> None:
        self.current = max(self.MIN, self.current - num_steps * (self.INIT - self.MIN) / self.DECAY_STEPS)

    def retracted(self, kept: Iterable[Sequence]) -> None:
        """Guess anew from the sequences that a retraction has left."""
        kept = list(kept)
        num_done = sum(sequence.num_done for sequence in kept)
        limits = sum(sequence.limit for sequence in kept)
        self.current = min(1.0, (num_done + RETRACT_STEPS * len(kept)) / (limits + 1))

    def reset(self) -> None:
        self.current = self.INIT


class KvCache:
    """Tokens of running sequences and of prompts. A prompt that runs several times is held once.

    Prompts of no running sequence stay until their room is needed, the least recently used first out.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_held = 0
        """Tokens of running sequences, and of their prompts."""
        self._users: Counter[bytes] = Counter()
        self._idle: OrderedDict[bytes, int] = OrderedDict()
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        """Tokens that are free, or can be freed at once."""
        return self.capacity - self.num_held

    def num_to_prefill(self, sequence: Sequence) -> int:
        """Return the tokens that must be computed before the sequence goes on: at least one."""
        self._evict()
        is_cached = self._users[sequence.prompt] > 0 or sequence.prompt in self._idle
        return max(1, sequence.num_done + (0 if is_cached else sequence.num_prompt))

    def take(self, sequence: Sequence) -> None:
        self.num_held += sequence.num_done
        if self._users[sequence.prompt] == 0:
            self.num_held += sequence.num_prompt
            self._num_idle -= self._idle.pop(sequence.prompt, 0)
        self._users[sequence.prompt] += 1

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out; its prompt stays until the room is needed."""
        self.num_held -= sequence.num_done
        self._users[sequence.prompt] -= 1
        if self._users[sequence.prompt] == 0:
            del self._users[sequence.prompt]
            self.num_held -= sequence.num_prompt
            self._idle[sequence.prompt] = sequence.num_prompt
            self._num_idle += sequence.num_prompt

    def grow(self, num_tokens: int) -> None:
        self.num_held += num_tokens

    def flush(self) -> None:
        """Forget the prompts of no running sequence."""
        self._idle.clear()
        self._num_idle = 0

    def _evict(self) -> None:
        while self._num_idle > self.num_free:
            _, size = self._idle.popitem(last=False)
            self._num_idle -= size
