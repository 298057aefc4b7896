"""Measures time and memory of the phases of a step, around the parts and not inside the algorithm."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_p2o.interfaces import Grader, NamedWeights, Policy, PromptEvolution, RolloutEngines, TemplateLibrary
from megatron_p2o.metrics.compute import ComputeMeter
from megatron_p2o.metrics.memory import PeakMeter
from megatron_p2o.types import (
    Completion,
    FinishReason,
    Grade,
    Logprobs,
    Problem,
    Prompt,
    RunningRound,
    SamplingParams,
    TokenIds,
    TrainSample,
    UpdateReport,
)


@dataclass(frozen=True, slots=True)
class Phases:
    """What phases took, by name."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    peak_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """The most memory held at a time; not of phases inside others, nor where that cannot be measured."""


class PhaseClock:
    """Adds up seconds and finds the peak of memory by phase until they are taken. For one thread."""

    def __init__(self, meter: PeakMeter | None = None) -> None:
        """`meter`: None measures no memory."""
        self._meter = meter
        self._depth = 0
        self._phases = Phases()

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `phase`."""
        meter = self._meter if self._depth == 0 else None
        self._depth += 1
        if meter is not None:
            meter.reset()
        start = time.monotonic()
        try:
            yield
        finally:
            seconds, peaks = self._phases.seconds, self._phases.peak_bytes
            seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - start
            self._depth -= 1
            if meter is not None:
                peaks[phase] = max(peaks.get(phase, 0), meter.read())

    def take(self) -> Phases:
        """Return what phases took since the last call and start again from nothing."""
        phases, self._phases = self._phases, Phases()
        return phases


class TimedPolicy:
    """A policy whose log-probs and updates count as `logprobs` and `train`; everything else is not measured.

    `compute` counts their tokens.
    """

    def __init__(self, policy: Policy, clock: PhaseClock, compute: ComputeMeter) -> None:
        self._policy, self._clock, self._compute = policy, clock, compute
        self.weights, self.save, self.load = policy.weights, policy.save, policy.load

    def update(
        self, samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, num_loss_tokens: int
    ) -> UpdateReport:
        with self._clock.measure("train"), self._compute.training():
            report = self._policy.update(samples, old_logprobs, num_loss_tokens)
        self._compute.count_update(samples, report)
        return report

    def logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        return self._scored(self._policy.logprobs, samples)

    def reference_logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        return self._scored(self._policy.reference_logprobs, samples)

    def _scored(
        self, logprobs: Callable[[Sequence[TrainSample]], list[Logprobs]], samples: Sequence[TrainSample]
    ) -> list[Logprobs]:
        with self._clock.measure("logprobs"), self._compute.training():
            rows = logprobs(samples)
        self._compute.count_logprobs(samples)
        return rows


class TimedEngines:
    """An engine whose generation counts as `rollout`, its log-probs of given texts as `score`, and its change to new
    weights as `refresh`.

    `compute` counts the tokens of its completions, and those it reads for log-probs.
    """

    def __init__(self, engines: RolloutEngines, clock: PhaseClock, compute: ComputeMeter) -> None:
        self._engines, self._clock, self._compute = engines, clock, compute

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, places: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        with self._clock.measure("rollout"):
            for index, completion in self._engines.generate(prompts, sampling, places):
                self._compute.count_sampled(len(completion.token_ids))
                yield index, completion

    def score(self, prompts: Sequence[Prompt], responses: Sequence[TokenIds]) -> list[Logprobs | None]:
        with self._clock.measure("score"):
            scores = self._engines.score(prompts, responses)
        num_tokens = sum(len(prompt.sampling_ids) + len(ids) for prompt, ids in zip(prompts, responses, strict=True))
        self._compute.count_read(num_tokens)
        return scores

    def release_memory(self) -> None:
        with self._clock.measure("refresh"):
            self._engines.release_memory()

    def refresh(self, weights: NamedWeights, version: int) -> None:
        with self._clock.measure("refresh"):
            self._engines.refresh(weights, version)


class TimedGrader:
    """A grader of which only the waiting after the last completion counts, as `grade`."""

    def __init__(self, grader: Grader, clock: PhaseClock) -> None:
        self._grader, self._clock = grader, clock

    def submit(self, problem: Problem, text: str, finish_reason: FinishReason) -> Future[Grade]:
        return TimedFuture(self._grader.submit(problem, text, finish_reason), self._clock)


class TimedFuture(Future[Grade]):
    """A verdict that arrives with that of the grader, and whose waiting is measured."""

    def __init__(self, inner: Future[Grade], clock: PhaseClock) -> None:
        super().__init__()
        self._inner, self._clock = inner, clock
        inner.add_done_callback(self._follow)

    def result(self, timeout: float | None = None) -> Grade:
        with self._clock.measure("grade"):
            return super().result(timeout)

    def cancel(self) -> bool:
        """Cancel the grader's future, which cancels this one. Return whether that was possible."""
        return self._inner.cancel()

    def running(self) -> bool:
        return self._inner.running()

    def _follow(self, inner: Future[Grade]) -> None:
        if inner.cancelled():
            super().cancel()
            self.set_running_or_notify_cancel()
        elif (error := inner.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(inner.result())


class TimedEvolution:
    """Prompt evolution that counts as `evolution`."""

    def __init__(self, evolution: PromptEvolution, clock: PhaseClock) -> None:
        self._evolution, self._clock = evolution, clock

    def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> TemplateLibrary:
        with self._clock.measure("evolution"):
            return self._evolution.evolve(hard, library, epoch)

    def newest(self, library: TemplateLibrary) -> TemplateLibrary:
        return self._evolution.newest(library)

    @property
    def running(self) -> RunningRound | None:
        return self._evolution.running
