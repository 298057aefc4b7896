"""How much evolution an engine may run beside training."""

import math
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

from megatron_p2o.rollout.requests import EngineHandle, GenerationRequest, Priority
from megatron_p2o.rollout.sharing.allowance import Allowance
from megatron_p2o.testing.fakes import FakeRenderer, fake_problem
from megatron_p2o.types import PLAIN, SamplingParams

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8)


def request(number: int, priority: Priority = "training") -> GenerationRequest:
    prompt = FakeRenderer().render(fake_problem(number), PLAIN)
    return GenerationRequest(f"request {number}", prompt, SAMPLING, priority, Future())


def allowance_of(
    max_slowdown: float, *, fixed_requests: float = 0.0, training_tokens: float = 0.0, evolution_tokens: float = 0.0
) -> Allowance:
    lengths = {"training": training_tokens, "evolution": evolution_tokens}
    known = SimpleNamespace(
        fixed_requests=fixed_requests, mean_tokens=lengths.get, began=lambda *_: None, ended=lambda *_: None
    )
    return Allowance(slots_per_engine=256, max_slowdown=max_slowdown, throughput=cast(Any, known))


def running(allowance: Allowance, num_training: int, num_evolution: int = 0, cache_tokens: int = 0) -> EngineHandle:
    engine = EngineHandle("engine", cast(Any, None), str, cache_tokens)
    kinds: list[Priority] = ["training"] * num_training + ["evolution"] * num_evolution
    for number, kind in enumerate(kinds):
        one = request(number, kind)
        allowance.started(one, engine)
        engine.running[one] = cast(Any, None)
    return engine


def test_an_engine_without_training_takes_all_and_one_with_it_a_share() -> None:
    allowance = allowance_of(0.1)
    assert allowance.of(running(allowance, 0)) == 256
    assert allowance.of(running(allowance, 50)) == 5
    assert allowance.of(running(allowance, 9)) == 0
    assert allowance_of(math.inf, training_tokens=100.0).of(running(allowance, 9, cache_tokens=100)) == 256


def test_what_a_step_takes_anyway_is_shared_by_more() -> None:
    allowance = allowance_of(0.1, fixed_requests=24.0)
    assert [allowance.of(running(allowance, number)) for number in (0, 6, 96)] == [256, 3, 12]


def test_the_cache_must_have_room_beside_training_at_its_mean_length() -> None:
    allowance = allowance_of(1.0, training_tokens=1000.0)
    engines = [running(allowance, number, cache_tokens=15_999) for number in (0, 5, 8, 12, 15, 40)]
    assert allowance.of(running(allowance, 0, cache_tokens=500)) == 1, "it would wait for ever"
    shorter = allowance_of(9.0, training_tokens=1000.0, evolution_tokens=250.0)
    assert [shorter.of(running(shorter, number, cache_tokens=16_000)) for number in (0, 5, 15)] == [64, 44, 4]
    assert [allowance.of(engine) for engine in engines] == [15, 5, 7, 3, 0, 0]


def test_the_newest_are_paused_first_and_each_once() -> None:
    allowance = allowance_of(0.1)
    engine = running(allowance, 10, num_evolution=4)
    newest_first = [one for one in reversed(engine.running) if one.priority == "evolution"]
    assert list(allowance.excess(engine)) == newest_first[:3]
    assert list(allowance.excess(engine)) == []
    for one in newest_first[:3]:
        allowance.ended(one, engine)
        del engine.running[one]
    assert (engine.num_evolution, engine.num_pausing, engine.num_training) == (1, 0, 10)
