"""Which request goes next, and where: the rules without an event loop."""

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import pytest

from megatron_p2o.rollout.queues import RequestQueues
from megatron_p2o.rollout.requests import EVERYONE, NOBODY, EngineHandle, GenerationRequest, Priority
from megatron_p2o.testing.fakes import FakeRenderer, fake_problem
from megatron_p2o.types import PLAIN, SamplingParams


def request(number: int, priority: Priority = "training", template: str = "") -> GenerationRequest:
    prompt = FakeRenderer().render(fake_problem(number), replace(PLAIN, text=template))
    sampling = SamplingParams(temperature=1.0, max_new_tokens=8)
    return GenerationRequest(f"request {number}", prompt, sampling, priority, Future())


def queues_with(slots: int, num_allowed: int = 100) -> RequestQueues:
    return RequestQueues(slots, lambda engine: num_allowed)


def engine(name: str) -> EngineHandle:
    return EngineHandle(name, cast(Any, None), str, 0)


def start(queues: RequestQueues, *engines: EngineHandle) -> tuple[GenerationRequest, str] | None:
    """Give the next request its slot, as the broker does."""
    taken = queues.take(engines)
    if taken is None:
        return None
    one, where = taken
    where.running[one] = cast("asyncio.Task[None]", None)
    where.num_evolution += one.priority == "evolution"
    return one, where.name


def test_training_goes_first_whatever_came_first() -> None:
    queues, only = queues_with(8), engine("a")
    late, early = request(1), request(2, "evolution")
    queues.add(early)
    queues.add(late)
    assert [start(queues, only), start(queues, only), start(queues, only)] == [(late, "a"), (early, "a"), None]


def test_a_priority_that_is_not_admitted_waits_and_others_pass_it() -> None:
    queues, only = queues_with(8), engine("a")
    training, evolution = request(1), request(2, "evolution")
    queues.add(training)
    queues.add(evolution)
    queues.admitted = NOBODY
    assert start(queues, only) is None
    queues.admitted = frozenset[Priority]({"evolution"})
    assert [start(queues, only), start(queues, only)] == [(evolution, "a"), None]
    queues.admitted = EVERYONE
    assert start(queues, only) == (training, "a")


def test_evolution_does_not_take_the_slot_that_training_waits_for() -> None:
    queues, only = queues_with(1), engine("a")
    for each in (request(1), request(2), request(3, "evolution")):
        queues.add(each)
    assert start(queues, only) is not None
    assert start(queues, only) is None


def test_a_problem_keeps_its_engine_until_its_last_request_has_settled() -> None:
    queues, a, b = queues_with(2), engine("a"), engine("b")
    first, second, third, other = request(1), request(1), request(1), request(2)
    for each in (first, other, second):
        queues.add(each)
    assert start(queues, a, b) == (first, "a")
    assert start(queues, a, b) == (other, "b")  # the least loaded
    b.running.clear()
    assert start(queues, a, b) == (second, "a")  # where the prompt is cached, though b is idle
    queues.add(third)
    assert start(queues, a, b) == (third, "b")  # a is full: the problem moves
    a.running.clear()
    b.running.clear()
    for each in (first, second, third):
        queues.settled(each)
    queues.add(again := request(1))
    assert start(queues, a, b) == (again, "a")


def test_a_request_of_a_lost_engine_goes_before_the_others() -> None:
    queues, only = queues_with(8), engine("a")
    for each in (lost := request(1), waiting := request(2)):
        queues.add(each)
    assert start(queues, only) == (lost, "a")
    queues.add_again(lost)
    assert [start(queues, only), start(queues, only)] == [(lost, "a"), (waiting, "a")]


def test_removing_one_of_many_requests_compares_it_with_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    comparisons: list[object] = []
    queues = queues_with(8)
    many = [request(number) for number in range(100)]
    for each in many:
        queues.add(each)
    monkeypatch.setattr(GenerationRequest, "__eq__", lambda self, other: comparisons.append(other) or self is other)
    monkeypatch.setattr(GenerationRequest, "__hash__", object.__hash__)
    for each in reversed(many):
        assert queues.remove(each)
    assert not comparisons and not list(queues.take_all())


def test_a_request_is_removed_once_and_only_while_it_waits() -> None:
    queues, only = queues_with(8), engine("a")
    for each in (gone := request(1), kept := request(2, "evolution")):
        queues.add(each)
    assert queues.remove(gone) and not queues.remove(gone)
    assert list(queues.take_all()) == [kept]
    assert start(queues, only) is None


def test_the_few_trials_of_a_fresh_template_go_before_the_many_of_another() -> None:
    queues, only = queues_with(100), engine("a")
    many = [request(number, "evolution", "known") for number in range(5)]
    few = [request(number, "evolution", "fresh") for number in range(3)]
    for each in (*many, *few):
        queues.add(each)
    taken = [one for one, _ in iter(lambda: start(queues, only), None)]
    assert taken == [*few, *many]


def test_training_is_served_in_its_order_whatever_its_templates() -> None:
    queues, only = queues_with(100), engine("a")
    requests = [request(number, "training", "often" if number % 3 else "once") for number in range(6)]
    for each in requests:
        queues.add(each)
    assert [one for one, _ in iter(lambda: start(queues, only), None)] == requests


def test_what_was_paused_goes_before_the_others_of_its_template() -> None:
    queues, only = queues_with(100), engine("a")
    waiting = [request(number, "evolution", "one") for number in range(2)]
    for each in (*waiting, paused := request(7, "evolution", "one")):
        queues.add(each)
    assert queues.remove(paused)
    queues.add_again(paused)
    assert [one for one, _ in iter(lambda: start(queues, only), None)] == [paused, *waiting]


def test_evolution_waits_where_it_would_be_too_much_and_takes_no_slot_from_training() -> None:
    queues, a, b = queues_with(2, num_allowed=1), engine("a"), engine("b")
    evolution = [request(number, "evolution") for number in range(3)]
    for each in evolution:
        queues.add(each)
    assert [start(queues, a, b), start(queues, a, b), start(queues, a, b)] == [
        (evolution[0], "a"),
        (evolution[1], "b"),
        None,
    ]
    training = [request(10 + number) for number in range(5)]
    for each in training:
        queues.add(each)
    # Two slots each, which evolution does not count against; and the engine with less training, whatever else it runs.
    assert [taken[1] for taken in iter(lambda: start(queues, a, b), None)] == ["a", "b", "a", "b"]
