"""What is learnt from requests of engines whose steps take what a test says."""

import math
from concurrent.futures import Future
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_p2o.rollout.requests import EngineHandle, GenerationRequest, Priority
from megatron_p2o.rollout.servers.answers import Generation
from megatron_p2o.rollout.sharing.throughput import NUM_TOLD, StepTime, Throughput
from megatron_p2o.testing.fakes import FakeRenderer, fake_problem
from megatron_p2o.types import PLAIN, SamplingParams

FIXED_S, REQUEST_S, TOKEN_S = 6e-3, 20e-6, 0.06e-6
REAL = StepTime(fixed_s=FIXED_S, request_s=REQUEST_S, token_s=TOKEN_S)
NUM_PROMPT = len(FakeRenderer().render(fake_problem(1), PLAIN).sampling_ids)


class Engine:
    """Decodes all of its requests at once, in virtual time."""

    def __init__(self, step: StepTime) -> None:
        self.now = SimpleNamespace(s=100.0)
        self.throughput = Throughput(lambda: self.now.s)
        self.step = step
        self.handle = EngineHandle("engine", cast(Any, None), str, 0)
        self._left: dict[GenerationRequest, int] = {}
        self._num_cached = 0

    def begin(self, num_tokens: int, priority: Priority = "training") -> None:
        prompt = FakeRenderer().render(fake_problem(1), PLAIN)
        sampling = SamplingParams(temperature=1.0, max_new_tokens=8)
        request = GenerationRequest("id", prompt, sampling, priority, Future())
        self.throughput.began(request, self.handle)
        self.handle.running[request] = cast(Any, None)
        self._left[request] = request.num_sampled = num_tokens
        self._num_cached += NUM_PROMPT

    def run(self) -> None:
        """Step until all have ended."""
        while self._left:
            num_steps, num_running = min(self._left.values()), len(self._left)
            mean_cached = self._num_cached + num_running * (num_steps - 1) / 2
            self.now.s += num_steps * self.step.of(num_running, mean_cached)
            self._num_cached += num_running * num_steps
            for request in list(self._left):
                self._left[request] -= num_steps
                if not self._left[request]:
                    self.throughput.ended(request, self.handle)
                    del self.handle.running[request], self._left[request]
                    self._num_cached -= NUM_PROMPT + request.num_sampled


def phases(engine: Engine, count: int) -> float:
    """Have steps of training sampled, 96 lognormal responses each; return the mean tokens of a request in the cache."""
    random, cached, tokens = Random(1), 0.0, 0
    for _ in range(count):
        lengths = [min(12_288, math.ceil(3000 * math.exp(random.gauss(0, 1)))) for _ in range(96)]
        for length in lengths:
            engine.begin(length)
        engine.run()
        cached += sum(length * (NUM_PROMPT + length / 2) for length in lengths)
        tokens += sum(lengths)
    return cached / tokens


def slowdown_of(engine: Engine) -> float:
    """Return what the estimate is of one request beside 96."""
    return 1 / (96 + engine.throughput.fixed_requests)


def real_slowdown(step: StepTime, cached: float) -> float:
    each_s = step.request_s + step.token_s * cached
    return each_s / (step.fixed_s + 96 * each_s)


@pytest.mark.parametrize(
    "step",
    [
        REAL,
        StepTime(fixed_s=FIXED_S, request_s=0.0, token_s=TOKEN_S),
        StepTime(fixed_s=FIXED_S, request_s=250e-6, token_s=0.0),
        StepTime(fixed_s=0.0, request_s=REQUEST_S, token_s=TOKEN_S),
    ],
    ids=["requests and tokens", "tokens alone", "requests alone", "nothing fixed"],
)
def test_what_a_request_takes_from_the_others_is_learnt(step: StepTime) -> None:
    engine = Engine(step)
    cached = phases(engine, 60)
    assert slowdown_of(engine) == pytest.approx(real_slowdown(step, cached), rel=0.05)


def test_an_engine_that_becomes_another_is_learnt_in_the_place_of_what_it_was() -> None:
    engine = Engine(REAL)
    phases(engine, 20)
    engine.step = StepTime(fixed_s=5 * FIXED_S, request_s=REQUEST_S, token_s=TOKEN_S)
    cached = phases(engine, 100)
    assert slowdown_of(engine) == pytest.approx(real_slowdown(engine.step, cached), rel=0.1)


def test_as_many_requests_at_all_times_do_not_look_as_if_they_were_fixed() -> None:
    engine, random = Engine(StepTime(fixed_s=FIXED_S, request_s=250e-6, token_s=2e-9)), Random(1)
    for _ in range(200):
        length = random.randint(100, 8000)
        for _ in range(16):
            engine.begin(length)
        engine.run()
    assert engine.throughput.fixed_requests == 0


def test_a_stall_costs_little_of_what_is_known() -> None:
    engine = Engine(REAL)
    cached = phases(engine, 20)
    for _ in range(96):
        engine.begin(1000)
    engine.now.s += 60
    engine.run()
    phases(engine, 5)
    assert slowdown_of(engine) == pytest.approx(real_slowdown(REAL, cached), rel=0.1)


@pytest.mark.parametrize(
    ("step", "counts"),
    [
        (REAL, (NUM_TOLD - 1,)),
        (REAL, (8,) * 20),
        (StepTime(fixed_s=FIXED_S, request_s=0.0, token_s=0.0), (8, 64, 8, 64)),
    ],
    ids=["too few", "always alike", "a request takes nothing from the others"],
)
def test_what_cannot_be_told_is_taken_as_if_every_request_cost_a_whole_one(
    step: StepTime, counts: tuple[int, ...]
) -> None:
    engine = Engine(step)
    for count in counts:
        for _ in range(count):
            engine.begin(100)
        engine.run()
    assert engine.throughput.fixed_requests == 0


def test_the_length_of_a_kind_is_that_of_its_requests_with_their_prompts() -> None:
    engine = Engine(REAL)
    assert engine.throughput.mean_tokens("training") == 0
    for num_tokens in (100, 300):
        engine.begin(num_tokens)
        engine.begin(7000, "evolution")
    engine.run()
    assert engine.throughput.mean_tokens("training") == pytest.approx(NUM_PROMPT + 200, rel=1e-3)
    assert engine.throughput.mean_tokens("evolution") == pytest.approx(NUM_PROMPT + 7000, rel=1e-3)


def test_what_was_kept_of_a_paused_request_is_in_the_cache_when_it_goes_on() -> None:
    engine = Engine(REAL)
    for num_tokens in (40, 100):
        engine.begin(num_tokens)
    first, second = engine.handle.running
    engine.now.s += 40 * REAL.of(2, 2 * NUM_PROMPT + 39)
    first.is_pausing = True
    ids, logprobs = np.zeros(40, np.int32), np.zeros(40, np.float32)
    first.keep(Generation(token_ids=ids, logprobs=logprobs, finish_reason="abort", weight_versions=(0,)))
    engine.throughput.ended(first, engine.handle)
    del engine.handle.running[first]
    assert engine.throughput.mean_tokens("training") == 0, "it has not ended"
    engine.throughput.began(first, engine.handle)
    engine.handle.running[first] = cast(Any, None)
    second.num_sampled = 40
    engine.throughput.ended(second, engine.handle)
    del engine.handle.running[second]
    load = engine.throughput._loads[engine.handle]
    assert load.offset + load.steps == pytest.approx(NUM_PROMPT + 39)


def test_what_has_ended_is_forgotten_and_what_sampled_nothing_tells_nothing() -> None:
    engine = Engine(REAL)
    engine.begin(0)
    (request,) = engine.handle.running
    engine.throughput.ended(request, engine.handle)
    assert engine.throughput.mean_tokens("training") == 0
    assert not engine.throughput._begun and not engine.throughput._loads
