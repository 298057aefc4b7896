import asyncio
import queue
import threading
from concurrent.futures import Future, wait

import numpy as np
import pytest

from megatron_p2o.rollout.broker import BrokerClosed, EnginesLost
from megatron_p2o.rollout.requests import EVERYONE, NOBODY, Priority, StoppableClock
from megatron_p2o.rollout.servers.answers import EngineRefused, EngineUnreachable
from megatron_p2o.run.trials import TrialSubmitter
from megatron_p2o.testing.engines.engine_client import (
    SAMPLING,
    WAIT_S,
    FakeClient,
    add_engine,
    broker_with,
    prompt,
    settled,
)
from megatron_p2o.testing.fakes import FakeGrader, FakeRenderer, fake_problem


def test_a_completion_carries_what_the_engine_sampled() -> None:
    with broker_with() as (broker, (client,)):
        client.release()
        asked = prompt(7)
        completion = broker.submit(asked, SAMPLING).result(WAIT_S)
    assert completion.prompt is asked
    assert completion.token_ids.tolist() == [8]
    assert completion.finish_reason == "stop"
    assert completion.weight_versions == (3,)


def test_an_engine_is_told_which_of_its_requests_go_first() -> None:
    with broker_with() as (broker, (client,)):
        client.release()
        broker.submit(prompt(7), SAMPLING, "evolution").result(WAIT_S)
        broker.submit(prompt(8), SAMPLING, "training").result(WAIT_S)
    evolution, training = client.priorities
    assert training > evolution, "the higher number goes first in SGLang"


@pytest.mark.parametrize("logprob", [np.nan, -np.inf, np.inf, 0.01])
@pytest.mark.parametrize("priority", ["training", "evolution"])
def test_a_completion_whose_log_probs_are_none_is_given_up_and_named_once_a_step(
    logprob: float, priority: Priority, caplog: pytest.LogCaptureFixture
) -> None:
    with broker_with(num_engines=2) as (broker, clients):
        clients[0].logprobs = np.array([-0.5, logprob, -0.25], np.float32)
        for client in clients:
            client.release()
        completions = [broker.submit(prompt(token), SAMPLING, priority).result(WAIT_S) for token in range(3)]
        assert [completion.finish_reason for completion in completions] == ["abort"] * 3
        assert all(len(completion.token_ids) == 0 for completion in completions)
        clients[0].logprobs = np.array([0.0, 1e-6, -1e4], np.float32)
        assert broker.submit(prompt(7), SAMPLING).result(WAIT_S).finish_reason == "stop"
        counted, later = broker.given_up.take(), broker.given_up.take()
    name = "engine/invalid_logprobs_count"
    assert (counted[name], later[name]) == (3, 0)
    assert sum(counted.values()) == 3
    (record,) = caplog.records
    assert record.message.startswith("3 completions had log-probs that are none")
    assert record.message.endswith("the first: engine 0 on problem 0")


def test_training_overtakes_evolution_that_still_waits() -> None:
    with broker_with(slots=1) as (broker, (client,)):
        first = broker.submit(prompt(1), SAMPLING, "evolution")
        later = [broker.submit(prompt(2), SAMPLING, "evolution"), broker.submit(prompt(3), SAMPLING, "training")]
        client.release()
        for future in (first, *later):
            future.result(WAIT_S)
    assert client.served == [1, 3, 2]


def test_no_engine_gets_more_requests_than_it_has_slots() -> None:
    with broker_with(num_engines=2, slots=3) as (broker, clients):
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(20)]
        settled(broker)
        assert [client.num_running for client in clients] == [3, 3]
        for client in clients:
            client.release()
        assert [future.result(WAIT_S).token_ids[0] for future in futures] == list(range(1, 21))
    assert [client.most_running for client in clients] == [3, 3]


def test_the_rollouts_of_a_problem_go_to_one_engine_while_it_has_slots() -> None:
    with broker_with(num_engines=2, slots=8) as (broker, clients):
        futures = [broker.submit(prompt(token, problem=str(token % 2)), SAMPLING) for token in range(12)]
        settled(broker)
        for client in clients:
            client.release()
        for future in futures:
            future.result(WAIT_S)
    assert [{token % 2 for token in client.served} for client in clients] == [{0}, {1}]


def test_a_full_engine_does_not_hold_up_its_group() -> None:
    with broker_with(num_engines=2, slots=4) as (broker, clients):
        futures = [broker.submit(prompt(token, problem="same"), SAMPLING) for token in range(6)]
        settled(broker)
        assert [client.num_running for client in clients] == [4, 2]
        for client in clients:
            client.release()
        for future in futures:
            future.result(WAIT_S)


def test_a_closed_gate_holds_new_requests_and_leaves_running_ones_alone() -> None:
    with broker_with() as (broker, (client,)):
        running = broker.submit(prompt(1), SAMPLING)
        broker.admit(NOBODY)
        held = broker.submit(prompt(2), SAMPLING)
        client.release()
        running.result(WAIT_S)
        assert not held.done()
        broker.admit(EVERYONE)
        assert held.result(WAIT_S).token_ids.tolist() == [3]


def test_the_gate_can_admit_evolution_alone() -> None:
    with broker_with() as (broker, (client,)):
        client.release()
        broker.admit(frozenset({"evolution"}))
        training = broker.submit(prompt(1), SAMPLING, "training")
        evolution = broker.submit(prompt(2), SAMPLING, "evolution")
        evolution.result(WAIT_S)
        assert not training.done()
        broker.serve(version=1)
        training.result(WAIT_S)


def test_requests_of_an_engine_that_dies_are_sampled_by_another_once() -> None:
    with broker_with(num_engines=2, slots=4) as (broker, clients):
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(8)]
        settled(broker)
        clients[0].die()
        clients[1].release()
        assert [future.result(WAIT_S).token_ids[0] for future in futures] == list(range(1, 9))
        assert broker.num_engines == 1
    assert clients[0].served == []
    assert sorted(clients[1].served) == list(range(8))


def test_losing_the_last_engine_that_nobody_replaces_fails_every_request_with_its_log() -> None:
    with broker_with(num_engines=2, slots=1) as (broker, clients):
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(5)]
        settled(broker)
        for client in clients:
            client.die()
        for future in futures:
            with pytest.raises(EnginesLost, match=r"all engines are lost.*\nlog of engine 1"):
                future.result(WAIT_S)
        with pytest.raises(EnginesLost):
            broker.submit(prompt(9), SAMPLING).result(WAIT_S)


def test_requests_wait_for_the_engine_that_replaces_the_last_one() -> None:
    lost: queue.SimpleQueue[str] = queue.SimpleQueue()
    with broker_with(slots=2, on_loss=lost.put) as (broker, clients):
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(4)]
        settled(broker)
        clients[0].release(1)
        futures[0].result(WAIT_S)
        clients[0].die()
        assert lost.get(timeout=WAIT_S) == "engine 0"
        assert not any(future.done() for future in futures[1:])
        add_engine(broker, 0, clients)
        clients[1].release()
        assert [future.result(WAIT_S).token_ids[0] for future in futures] == [1, 2, 3, 4]
    assert sorted(clients[1].served) == [1, 2, 3], "what was finished is kept"


def test_an_engine_that_hangs_is_lost_and_its_requests_are_sampled_by_another() -> None:
    with broker_with(num_engines=2, slots=4, stall_timeout_s=0.2) as (broker, clients):
        clients[0].is_hung = True
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(8)]
        settled(broker)
        clients[1].release()
        assert [future.result(WAIT_S).token_ids[0] for future in futures] == list(range(1, 9))
        assert broker.num_engines == 1
    assert clients[0].aborted == [], "nothing is said to an engine that does not answer"


def test_an_engine_that_samples_while_requests_wait_long_is_kept() -> None:
    with broker_with(slots=1, stall_timeout_s=0.02) as (broker, (client,)):
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(2)]
        assert not wait(futures, timeout=0.2).done, "ten times the limit"
        assert broker.num_engines == 1
        client.release()
        futures[1].result(WAIT_S)


@pytest.mark.parametrize("gate", [EVERYONE, NOBODY], ids=["idle", "paused"])
def test_an_engine_that_should_not_sample_is_not_probed(gate: frozenset) -> None:
    with broker_with(stall_timeout_s=0.02) as (broker, (client,)):
        if gate == NOBODY:
            broker.submit(prompt(1), SAMPLING)
        broker.admit(gate)
        client.is_hung = True
        assert not wait([Future()], timeout=0.2).done
        assert broker.num_engines == 1


def test_an_engine_that_leaves_a_call_unanswered_is_lost() -> None:
    async def call(name: str, client: FakeClient) -> int:
        if client.is_hung:
            raise TimeoutError("no answer within 1 s")
        return 3

    with broker_with(num_engines=2) as (broker, clients):
        clients[0].is_hung = True
        assert broker.call_every_engine(call).result(WAIT_S) == {"engine 1": 3}
        assert broker.num_engines == 1


def test_an_engine_that_cannot_be_prepared_is_not_used() -> None:
    async def refuse(name: str, client: FakeClient) -> None:
        raise EngineRefused(f"{name} is not ready")

    with broker_with(num_engines=0, on_loss=lambda name: None) as (broker, _):
        future = broker.submit(prompt(1), SAMPLING)
        with pytest.raises(EngineRefused, match="engine 7 is not ready"):
            broker.add_engine("engine 7", FakeClient, str, refuse)
        assert broker.num_engines == 0
        assert not future.done()


def test_a_request_out_of_time_completes_as_aborted_with_its_tokens() -> None:
    with broker_with(request_timeout_s=0.05) as (broker, (client,)):
        completion = broker.submit(prompt(4), SAMPLING).result(WAIT_S)
    assert completion.finish_reason == "abort"
    assert completion.token_ids.tolist() == [5]
    assert len(client.aborted) == 1


def test_a_request_whose_abort_is_not_answered_completes_without_tokens() -> None:
    with broker_with(request_timeout_s=0.05) as (broker, (client,)):
        client.ignores_abort = True
        completion = broker.submit(prompt(4), SAMPLING).result(WAIT_S)
    assert completion.finish_reason == "abort"
    assert completion.token_ids.size == completion.logprobs.size == 0


def test_a_clock_that_was_stopped_has_lost_that_time() -> None:
    now_s = 100.0
    clock = StoppableClock(lambda: now_s)
    clock.go()
    start_s = clock.now_s()
    now_s += 2
    clock.stop()
    now_s += 50
    clock.stop()
    assert clock.is_stopped and clock.now_s() - start_s == 2
    clock.go()
    assert not clock.is_stopped
    now_s += 3
    assert clock.now_s() - start_s == 5


def test_a_loop_that_is_held_up_is_an_error_that_says_of_what() -> None:
    is_held, may_go_on = threading.Event(), threading.Event()

    def make_client() -> FakeClient:
        is_held.set()
        may_go_on.wait(WAIT_S)
        return FakeClient()

    with broker_with() as (broker, _):
        adding = threading.Thread(target=broker.add_engine, args=("engine 1", make_client, str))
        adding.start()
        assert is_held.wait(WAIT_S)
        broker._thread._timeout_s = 0.05
        with pytest.raises(TimeoutError, match=r"did not admit nobody within 0\.05 s.*grading\.num_workers.*run\.dir"):
            broker.admit(NOBODY)
        with pytest.raises(TimeoutError, match=r"did not serve version 3 within 0\.05 s"):
            broker.serve(3)
        broker._thread._timeout_s = WAIT_S
        may_go_on.set()
        adding.join()


def test_a_refused_request_is_given_up_alone_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with broker_with() as (broker, (client,)):
        client.release()
        bad = [broker.submit(prompt(-1, problem=f"p{number}"), SAMPLING) for number in range(100)]
        good = broker.submit(prompt(1), SAMPLING)
        completions = [future.result(WAIT_S) for future in bad]
        assert {(each.finish_reason, len(each.token_ids)) for each in completions} == {("abort", 0)}
        assert good.result(WAIT_S).token_ids.tolist() == [2]
        assert broker.num_engines == 1
        counted = broker.given_up.take()
    assert counted["engine/refused_count"] == 100
    (record,) = caplog.records
    assert record.message == "100 completions were refused by their engine; the first: engine 0 on problem p0: 400 no"


@pytest.mark.parametrize("error", [EngineUnreachable("cut"), EngineRefused("500 no")])
def test_aborts_that_find_the_engine_gone_say_nothing(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with broker_with(slots=50) as (broker, (client,)):

        async def fail(request_id: str) -> None:
            raise error

        client.abort = fail  # pyright: ignore[reportAttributeAccessIssue]
        futures = [broker.submit(prompt(number), SAMPLING) for number in range(50)]
        settled(broker)
        for future in futures:
            future.cancel()
        settled(broker)
        while broker._thread.chores - {engine.heartbeat for engine in broker._engines}:
            settled(broker)
    warned = [record for record in caplog.records if "could not abort" in record.message]
    assert len(warned) == (0 if isinstance(error, EngineUnreachable) else 50)


def test_an_engine_that_refuses_everybody_is_an_error() -> None:
    with broker_with() as (broker, (client,)):
        client.release()
        with pytest.raises(EngineRefused, match="401 no key"):
            broker.submit(prompt(-2), SAMPLING).result(WAIT_S)


def test_nothing_is_served_while_suspended() -> None:
    with broker_with(slots=1) as (broker, (client,)):
        running = broker.submit(prompt(1), SAMPLING)
        waiting = broker.submit(prompt(2), SAMPLING)
        broker.suspend(RuntimeError("bad weights"))
        for future in (waiting, broker.submit(prompt(3), SAMPLING)):
            with pytest.raises(RuntimeError, match="bad weights"):
                future.result(WAIT_S)
        client.release()
        running.result(WAIT_S)
        broker.serve(version=5)
        assert broker.version == 5
        assert broker.submit(prompt(4), SAMPLING).result(WAIT_S).token_ids.tolist() == [5]
    assert client.served == [1, 4]


def test_cancelling_a_future_aborts_the_request_and_frees_its_slot() -> None:
    with broker_with(slots=1) as (broker, (client,)):
        running = broker.submit(prompt(1), SAMPLING)
        queued = broker.submit(prompt(2), SAMPLING)
        last = broker.submit(prompt(3), SAMPLING)
        settled(broker)
        assert queued.cancel() and running.cancel()
        settled(broker)
        client.release()
        last.result(WAIT_S)
    assert client.served == [3]
    assert len(client.aborted) == 1


def test_a_trial_that_is_cancelled_leaves_the_engine_and_its_slot() -> None:
    """A round of evolution that is cut off cancels what it waits for."""
    with broker_with(slots=1) as (broker, (client,)):
        submit_trial = TrialSubmitter(
            lambda asked, sampling: broker.submit(asked, sampling, priority="evolution"),
            FakeRenderer(),
            FakeGrader(),
            max_template_tokens=100,
        )
        running, queued = (submit_trial(f"Template {number}.", fake_problem(number), SAMPLING) for number in (1, 2))
        settled(broker)
        # The other way round the slot that is given back may be taken by the one in the queue.
        assert queued.cancel() and running.cancel()
        last = broker.submit(prompt(3), SAMPLING)
        settled(broker)
        client.release()
        last.result(WAIT_S)
    assert client.served == [3]
    assert len(client.aborted) == 1


def test_aborting_one_request_leaves_those_with_similar_ids_alone() -> None:
    with broker_with(slots=200) as (broker, (client,)):
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(120)]
        settled(broker)
        futures[1].cancel()
        settled(broker)
        client.release()
        del futures[1]
        assert {future.result(WAIT_S).finish_reason for future in futures} == {"stop"}
    assert len(client.aborted) == 1


def test_closing_fails_what_runs_and_waits_and_ends_the_thread() -> None:
    before = set(threading.enumerate())
    with broker_with(slots=1) as (broker, _):
        futures = [broker.submit(prompt(token), SAMPLING) for token in range(2)]
        settled(broker)
        broker.close()
        for future in (*futures, broker.submit(prompt(3), SAMPLING)):
            with pytest.raises(BrokerClosed):
                future.result(WAIT_S)
    assert set(threading.enumerate()) <= before


def test_coroutines_of_another_loop_can_wait_for_completions() -> None:
    with broker_with() as (broker, (client,)):
        client.release()

        async def ask() -> list[int]:
            completions = await asyncio.gather(*(broker.generate(prompt(token), SAMPLING) for token in (1, 2)))
            return [int(completion.token_ids[0]) for completion in completions]

        assert asyncio.run(ask()) == [2, 3]


def test_a_call_to_every_engine_leaves_out_those_that_are_gone() -> None:
    async def name_of(name: str, client: FakeClient) -> str:
        if client.is_gone:
            raise EngineUnreachable("connection refused")
        return name.upper()

    with broker_with(num_engines=2) as (broker, clients):
        clients[0].is_gone = True
        assert broker.call_every_engine(name_of).result(WAIT_S) == {"engine 1": "ENGINE 1"}
        clients[1].is_gone = True
        with pytest.raises(EnginesLost):
            broker.call_every_engine(name_of).result(WAIT_S)
