"""What evolution samples and takes from training, counted by hand."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_p2o.rollout.requests import EngineHandle, GenerationRequest, Priority
from megatron_p2o.rollout.sharing.meter import EvolutionMeter
from megatron_p2o.testing.fakes import FakeRenderer, fake_problem
from megatron_p2o.types import PLAIN, SamplingParams


class Scene:
    """A meter, its clock and an engine."""

    def __init__(self) -> None:
        self.now = SimpleNamespace(s=100.0)
        self.throughput = SimpleNamespace(fixed_requests=0.0)
        self.meter = EvolutionMeter(lambda: self.now.s, cast(Any, self.throughput))
        self.engine = EngineHandle("engine", cast(Any, None), str, 0)
        self.meter.note([self.engine])

    def begin(self, priority: Priority) -> GenerationRequest:
        prompt = FakeRenderer().render(fake_problem(1), PLAIN)
        sampling = SamplingParams(temperature=1.0, max_new_tokens=8)
        request = GenerationRequest("id", prompt, sampling, priority, Future())
        self.meter.begin(request, self.engine)
        self.engine.num_evolution += priority == "evolution"
        self.engine.running[request] = cast(Any, None)
        return request

    def end(self, request: GenerationRequest, num_sampled: int, is_pausing: bool = False) -> None:
        request.num_sampled, request.is_pausing = num_sampled, is_pausing
        self.meter.end(request, self.engine)
        self.engine.num_evolution -= request.priority == "evolution"
        del self.engine.running[request]


def test_engine_time_is_told_apart_by_who_has_the_engine() -> None:
    scene = Scene()
    scene.now.s += 3  # nobody
    alone = scene.begin("evolution")
    scene.now.s += 10  # evolution alone: 50 tokens a second
    training = [scene.begin("training") for _ in range(4)]
    scene.now.s += 10  # one beside four
    scene.end(alone, num_sampled=1000, is_pausing=True)
    scene.now.s += 20  # training alone
    for one in training:
        scene.end(one, num_sampled=5)
    assert scene.meter.take() == {
        "engine/evolution_tokens": 1000.0,
        "engine/evolution_pauses_count": 1.0,
        "evolution/starved_s": 0.0,
        "engine/idle_s": 3.0,
        "engine/evolution_slowdown": pytest.approx((10 / 4) / 30),
        # A fifth of ten seconds, in which evolution alone would have sampled 100 of its 1,000 tokens.
        "engine/evolution_price": pytest.approx(0.1),
    }


def test_what_evolution_takes_is_what_the_learnt_step_says() -> None:
    scene = Scene()
    scene.throughput.fixed_requests = 15.0
    alone = scene.begin("evolution")
    scene.now.s += 10  # evolution alone: 50 tokens a second
    training = [scene.begin("training") for _ in range(4)]
    scene.now.s += 10
    scene.end(alone, num_sampled=1000)
    for one in training:
        scene.end(one, num_sampled=5)
    numbers = scene.meter.take()
    assert numbers["engine/evolution_slowdown"] == pytest.approx(1 / (15 + 4))
    assert numbers["engine/evolution_price"] == pytest.approx(10 / (15 + 4 + 1) * 50 / 1000)


def test_what_was_never_so_has_no_number() -> None:
    scene = Scene()
    scene.now.s += 2
    scene.meter.note([scene.engine])
    assert scene.meter.take() == {
        "engine/evolution_tokens": 0.0,
        "engine/evolution_pauses_count": 0.0,
        "evolution/starved_s": 0.0,
        "engine/idle_s": 2.0,
    }
    assert scene.meter.take()["engine/idle_s"] == 0.0


def test_evolution_that_waits_with_nothing_running_is_starved_for_as_long() -> None:
    scene = Scene()
    scene.meter.note_waiting(True)
    scene.now.s += 15
    scene.meter.note_waiting(True)
    scene.now.s += 5
    scene.meter.note_waiting(False)
    scene.now.s += 60
    scene.meter.note_waiting(False)
    assert scene.meter.take()["evolution/starved_s"] == 20.0
    scene.begin("evolution")
    scene.meter.note_waiting(True)
    scene.now.s += 100
    scene.meter.note_waiting(True)
    assert scene.meter.take()["evolution/starved_s"] == 0.0


def test_a_lost_engine_is_no_idle_one() -> None:
    scene = Scene()
    scene.meter.forget(scene.engine)
    scene.now.s += 50
    scene.meter.note([])
    assert scene.meter.take()["engine/idle_s"] == 0.0
