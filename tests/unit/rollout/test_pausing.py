"""Evolution that gives way to training: what it keeps, and how it goes on."""

import time
from collections.abc import Callable

import pytest

from megatron_p2o.testing.engines.engine_client import SAMPLING, WAIT_S, broker_with, prompt, settled
from megatron_p2o.types import SamplingParams


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_evolution_is_paused_for_training_and_goes_on_from_its_tokens() -> None:
    with broker_with(max_slowdown=0.0) as (broker, (client,)):
        evolution = broker.submit(prompt(7, 9), SAMPLING, "evolution")
        settled(broker)
        training = broker.submit(prompt(20), SAMPLING)
        wait_until(lambda: 7 in client.served)
        assert not evolution.done()
        client.release(1)
        assert training.result(WAIT_S).token_ids.tolist() == [21]
        client.release()
        completion = evolution.result(WAIT_S)
    # The engine answered [7, 9] with [8, 10] when it was paused. The last token is sampled again: the engine answers
    # [7, 9, 8] with [8, 10, 9].
    assert completion.token_ids.tolist() == [8, 8, 10, 9]
    assert completion.finish_reason == "stop"
    assert completion.prompt.sampling_ids.tolist() == [7, 9]
    numbers = broker.meter.take()
    assert (numbers["engine/evolution_tokens"], numbers["engine/evolution_pauses_count"]) == (5.0, 1.0)


def test_what_was_paused_keeps_its_tokens_when_the_engine_is_lost() -> None:
    with broker_with(num_engines=2, slots=1, max_slowdown=0.0, on_loss=lambda name: None) as (broker, clients):
        first, second = clients
        training = [broker.submit(prompt(20), SAMPLING)]  # on the first engine
        evolution = broker.submit(prompt(7, 9), SAMPLING, "evolution")
        settled(broker)
        training.append(broker.submit(prompt(21), SAMPLING))
        wait_until(lambda: 7 in second.served)  # it has handed over what it had
        second.die()
        first.release()
        assert [future.result(WAIT_S).token_ids.tolist() for future in training] == [[21], [22]]
        assert evolution.result(WAIT_S).token_ids.tolist() == [8, 8, 10, 9]


def test_an_engine_lost_before_it_hands_over_what_was_paused_has_it_started_anew() -> None:
    with broker_with(num_engines=2, slots=1, max_slowdown=0.0, on_loss=lambda name: None) as (broker, clients):
        first, second = clients
        training = [broker.submit(prompt(20), SAMPLING)]  # on the first engine
        evolution = broker.submit(prompt(7, 9), SAMPLING, "evolution")
        settled(broker)
        second.is_gone = True  # it answers the abort by a broken connection
        training.append(broker.submit(prompt(21), SAMPLING))
        wait_until(lambda: broker.num_engines == 1)
        first.release()
        assert [future.result(WAIT_S).token_ids.tolist() for future in training] == [[21], [22]]
        assert evolution.result(WAIT_S).token_ids.tolist() == [8, 10]
        assert broker.meter.take()["engine/evolution_pauses_count"] == 1.0


def test_a_response_that_was_full_when_it_was_paused_is_not_asked_for_no_token_at_all() -> None:
    one_token = SamplingParams(temperature=1.0, max_new_tokens=1)
    with broker_with(max_slowdown=0.0) as (broker, (client,)):
        evolution = broker.submit(prompt(7), one_token, "evolution")
        settled(broker)
        training = broker.submit(prompt(20), SAMPLING)
        wait_until(lambda: 7 in client.served)
        client.release()
        assert training.result(WAIT_S).token_ids.tolist() == [21]
        assert evolution.result(WAIT_S).token_ids.tolist() == [8]
        assert client.most_tokens_asked_for[7] == [1, 1]


@pytest.mark.parametrize(
    ("tokens", "versions"), [((7,), (4,)), ((7, 9), (3, 4))], ids=["none of the old version", "one of each"]
)
def test_a_response_names_the_versions_that_its_tokens_are_of(
    tokens: tuple[int, ...], versions: tuple[int, ...]
) -> None:
    with broker_with(max_slowdown=0.0) as (broker, (client,)):
        evolution = broker.submit(prompt(*tokens), SAMPLING, "evolution")  # it has one token when it is paused
        settled(broker)
        training = broker.submit(prompt(20), SAMPLING)
        wait_until(lambda: 7 in client.served)
        client.release(1)
        training.result(WAIT_S)
        client.version = 4
        client.release()
        completion = evolution.result(WAIT_S)
    assert completion.weight_versions == versions


def test_cancelling_a_paused_request_forgets_it() -> None:
    with broker_with(max_slowdown=0.0) as (broker, (client,)):
        evolution = broker.submit(prompt(7), SAMPLING, "evolution")
        settled(broker)
        training = broker.submit(prompt(20), SAMPLING)
        wait_until(lambda: 7 in client.served)
        evolution.cancel()
        client.release()
        assert training.result(WAIT_S).token_ids.tolist() == [21]
        settled(broker)
        assert client.served == [7, 20]


def test_evolution_runs_beside_training_as_far_as_it_may() -> None:
    with broker_with(slots=8, max_slowdown=0.5) as (broker, (client,)):
        training = [broker.submit(prompt(20 + number), SAMPLING) for number in range(4)]
        evolution = [broker.submit(prompt(40 + number), SAMPLING, "evolution") for number in range(4)]
        settled(broker)
        assert client.num_running == 4 + 2
        client.release()
        for future in (*training, *evolution):
            future.result(WAIT_S)
        assert client.aborted == []


def test_what_evolution_has_read_was_not_sampled() -> None:
    with broker_with(max_slowdown=1.0) as (broker, _):
        completion = broker.submit(prompt(7, 9, 11), SAMPLING, "evolution", num_scored=2).result(WAIT_S)
        settled(broker)
        assert completion.token_ids.tolist() == [9, 11]
        assert broker.meter.take()["engine/evolution_tokens"] == 0
        assert broker._allowance._throughput.mean_tokens("evolution") == 0
