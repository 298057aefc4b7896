"""What the requests of an engine take from one another, learnt from the run's own.

A decode step reads the weights once, and the KV cache of its requests: with n requests of C tokens together it takes
a + b n + c C seconds. Each request that ends tells its seconds per token, and the mean n and C over its steps. Least
squares over these give a, b and c. How many steps fell into a stretch of time, and so how far C has grown, follows
from what is known by then. The engines of a run are alike and share it. What ended long ago fades.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_p2o.rollout.requests import PRIORITIES, EngineHandle, GenerationRequest, Priority

MEMORY = 2000
"""Requests after which what one has told counts 1/e."""

NUM_TOLD = 32
"""Requests from one fit to the next."""

MAX_TIMES = 2.0
"""Seconds per token over those that are expected above which a request is left out: it was in a stall."""

MAX_DOUBTED = 256
"""Such requests in a row after which the engines have become others, and all is learnt anew."""

MIN_SPREAD = 0.1
"""Standard deviation of n or C over its mean below which it does not tell the coefficients apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a decode step."""

    fixed_s: float
    request_s: float
    """For each of its requests."""
    token_s: float
    """For each of their tokens in the cache."""

    def of(self, num_requests: float, num_tokens: float) -> float:
        return self.fixed_s + self.request_s * num_requests + self.token_s * num_tokens


class Fit:
    """Least squares of `StepTime`, the coefficients not negative."""

    def __init__(self) -> None:
        self._sums = [0.0] * 9
        """Sums of 1, n, C, n n, n C, C C, s, n s, C s: s is seconds per token, a request's weight its tokens."""

    def add(self, n: float, c: float, s: float, weight: float) -> None:
        keep = 1 - 1 / MEMORY
        products = (1.0, n, c, n * n, n * c, c * c, s, n * s, c * s)
        self._sums = [keep * known + weight * new for known, new in zip(self._sums, products, strict=True)]

    @property
    def mean_s(self) -> float:
        """Mean seconds per token; 0 before the first."""
        return self._sums[6] / self._sums[0] if self._sums[0] else 0.0

    def solve(self) -> StepTime | None:
        """Return the coefficients; None where what was told does not give them."""
        one, n, c, nn, nc, cc, *sums = np.array(self._sums) / self._sums[0]
        moments, targets = np.array([[one, n, c], [n, nn, nc], [c, nc, cc]]), np.array(sums)
        means, squares = moments[0], np.diag(moments)
        if any(squares[i] - means[i] ** 2 < (MIN_SPREAD * means[i]) ** 2 for i in (1, 2)):
            return None  # what is always alike looks as if it were fixed
        # Where the fit with both would have one take less than nothing it takes nothing.
        for columns in ([0, 1, 2], [0, 2], [0, 1]):
            found = np.zeros(3)
            scale = np.sqrt(squares[columns])
            scaled = moments[np.ix_(columns, columns)] / np.outer(scale, scale)
            try:
                found[columns] = np.linalg.solve(scaled, targets[columns] / scale) / scale
            except np.linalg.LinAlgError:
                continue
            if found[1:].max() > 0 and found[1:].min() >= 0:
                fixed_s, request_s, token_s = map(float, found)
                return StepTime(fixed_s=max(0.0, fixed_s), request_s=request_s, token_s=token_s)
        return None


class Fading:
    """A mean of what the last `MEMORY` requests or so told."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        keep = 1 - 1 / MEMORY
        self._sum = keep * self._sum + weight * value
        self._weight = keep * self._weight + weight

    @property
    def mean(self) -> float:
        """0 before the first."""
        return self._sum / self._weight if self._weight else 0.0


@dataclass(slots=True)
class _Load:
    """What an engine has done since it was idle."""

    noted_s: float
    steps: float = 0.0
    request_steps: float = 0.0
    """Requests, summed over the steps."""
    token_steps: float = 0.0
    """Their tokens in the cache, summed over the steps."""
    offset: float = 0.0
    """Their tokens in the cache, less `steps` for each."""


class Throughput:
    """Told before requests come and go. Lives on the loop."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        """`now_s`: a clock that stands still while the gate is closed to everyone."""
        self._now_s = now_s
        self._loads: dict[EngineHandle, _Load] = {}
        self._begun: dict[GenerationRequest, tuple[int, _Load]] = {}
        """Tokens of each running request when it began, what was kept of it included, and the load of its engine."""
        self._fit = Fit()
        self._num_told = self._num_doubted = 0
        self._step: StepTime | None = None
        """None until it is learnt."""
        self._cached = Fading()
        """Tokens of a request in the cache, mean over its steps, weighted by them."""
        self._lengths = {priority: Fading() for priority in PRIORITIES}
        """Tokens of a request that has ended, prompt and response."""

    @property
    def fixed_requests(self) -> float:
        """How many requests of mean size take as long as what a step takes anyway. 0 until it is learnt: as if a step
        took as long as it has requests, which is the most that one can take from the others.
        """
        if self._step is None:
            return 0.0
        return self._step.fixed_s / (self._step.request_s + self._step.token_s * self._cached.mean)

    def mean_tokens(self, priority: Priority) -> float:
        """Return the mean length of a request when it has ended, with its prompt; 0 before the first."""
        return self._lengths[priority].mean

    def began(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run a request."""
        load = self._passed(engine)
        num_tokens = len(request.token_ids)
        load.offset += num_tokens - load.steps
        self._begun[request] = num_tokens, replace(load)

    def ended(self, request: GenerationRequest, engine: EngineHandle) -> None:
        """Note that an engine is about to run it no longer, and learn from it what it sampled."""
        (num_before, then), now = self._begun.pop(request), self._passed(engine)
        num_sampled = request.num_sampled
        now.offset -= num_before - then.steps
        if len(engine.running) == 1:
            del self._loads[engine]
        steps = now.steps - then.steps
        if num_sampled == 0 or steps == 0:
            return
        n, c = ((now.request_steps - then.request_steps) / steps, (now.token_steps - then.token_steps) / steps)
        seconds = (now.noted_s - then.noted_s) / num_sampled
        self._cached.add(num_before + num_sampled / 2, num_sampled)
        if not request.is_pausing:
            self._lengths[request.priority].add(num_before + num_sampled)
        self._learn(n, c, seconds, num_sampled)

    def _learn(self, n: float, c: float, seconds: float, weight: int) -> None:
        if self._step is not None and seconds > MAX_TIMES * self._step.of(n, c):
            self._num_doubted += 1
            if self._num_doubted < MAX_DOUBTED:
                return
            self._fit, self._step = Fit(), None
        self._num_doubted = 0
        self._fit.add(n, c, seconds, weight)
        self._num_told += 1
        if self._num_told % NUM_TOLD == 0:
            before, self._step = self._step, self._fit.solve() or self._step
            if before is None and self._step is not None:
                self._fit = Fit()  # how far C had grown was a guess until now

    def _passed(self, engine: EngineHandle) -> _Load:
        """Return an engine's load, brought to the present."""
        now_s, num_running = self._now_s(), len(engine.running)
        load = self._loads.setdefault(engine, _Load(now_s))
        tokens = load.offset + num_running * load.steps
        steps = self._steps_in(now_s - load.noted_s, num_running, tokens)
        load.request_steps += steps * num_running
        load.token_steps += steps * (tokens + num_running * steps / 2)
        load.steps += steps
        load.noted_s = now_s
        return load

    def _steps_in(self, seconds: float, num_requests: int, num_tokens: float) -> float:
        """Return the decode steps in which each request grows by a token."""
        if self._step is None:
            return seconds / (self._fit.mean_s or 1.0)
        step_s, growth_s = self._step.of(num_requests, num_tokens), self._step.token_s * num_requests
        # seconds = steps * step_s + growth_s * steps ** 2 / 2
        return 2 * seconds / (step_s + math.sqrt(step_s**2 + 2 * growth_s * seconds)) if seconds else 0.0
