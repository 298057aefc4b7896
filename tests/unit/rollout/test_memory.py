"""Engines whose memory is lent to the trainer between sampling and refresh: order, and what goes wrong on the way."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_p2o.config.tree import Config, ModelConfig
from megatron_p2o.rollout.broker import Broker
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.refresh.refresh_verdict import RefreshFailed
from megatron_p2o.rollout.servers.server_arguments import does_release_memory
from megatron_p2o.testing.engines.sglang_server import FakeSglangServer, fused_model_weights
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.types import PLAIN, Problem, Prompt, SamplingParams

WAIT_S = 120
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=1)
PROMPT = Prompt(
    problem=Problem(id="1", question="", answer=""),
    template=PLAIN,
    sampling_ids=np.array([5, 6], dtype=np.int32),
    training_ids=np.array([5, 6], dtype=np.int32),
)


class Run:
    """Two engines, their servers and everything that was asked of them, in order."""

    def __init__(self, folder: Path) -> None:
        settings = {"model.path": str(folder), "rollout.stall_timeout_s": WAIT_S, "rollout.max_restarts": 1}
        settings |= {"rollout.request_timeout_s": WAIT_S}
        self.config = fake_config({**settings, "rollout.startup_timeout_s": WAIT_S, "rollout.num_engines": 2})
        self.journal: list[str] = []
        self.servers = [FakeSglangServer(f"engine {index}", self.journal) for index in range(2)]
        self.engines = SglangEngines(
            self.config, folder, self.servers, self.restart, stop_token_ids=[2], releases_memory=True
        )

    def restart(self, name: str, restart: int) -> FakeSglangServer:
        index = int(name.split()[1])
        self.servers[index] = FakeSglangServer(name, self.journal)
        return self.servers[index]

    def refresh(self, version: int) -> None:
        self.engines.refresh(self.gathered(version), version)

    def gathered(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        yield from fused_model_weights(seed)
        self.journal.append("gathered")

    def lose(self, index: int) -> None:
        """Let a server die, and the broker notice."""
        self.servers[index].stop()
        self.engines.broker.lose_engine(f"engine {index}", "its process has ended")

    def of(self, index: int) -> list[str]:
        """Return what was asked of an engine, and when the weights were gathered."""
        prefix = f"engine {index} "
        return [line.removeprefix(prefix) for line in self.journal if line.startswith((prefix, "gathered"))]

    def assert_serves(self, version: int) -> None:
        sent = dict(fused_model_weights(version))
        for server in self.servers:
            assert torch.equal(server.model.qkv, torch.cat([sent[f"{part}.weight"] for part in "qkv"]))
            assert torch.equal(server.model.norm, sent["norm.weight"])
            assert (server.version, server.released) == (str(version), set())
        answers = dict(self.engines.generate([PROMPT] * 4, SAMPLING))
        assert {answer.weight_versions for answer in answers.values()} == {(version,)}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    with closing(made.engines):
        yield made


@contextmanager
def until(condition: Callable[[], bool], what: str) -> Iterator[None]:
    yield
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_memory_comes_back_after_everything_is_gathered_and_the_cache_comes_last(run: Run) -> None:
    run.refresh(1)
    run.journal.clear()
    run.engines.release_memory()
    assert [server.released for server in run.servers] == [{"weights", "kv_cache"}] * 2
    waiting = run.engines.broker.submit(PROMPT, SAMPLING, priority="evolution")
    run.refresh(2)
    assert waiting.result(WAIT_S).weight_versions == (2,)
    for index in range(2):
        assert run.of(index) == [
            *("pause", "release kv_cache weights", "begin", "gathered", "resume weights"),
            *("pause", "end", "begin", "load", "check", "end", "version 2", "resume kv_cache", "continue"),
        ]
    assert run.journal.index("engine 1 version 2") < run.journal.index("engine 0 resume kv_cache")
    run.assert_serves(2)
    assert run.engines.metrics()["refresh/wake_s"] > 0


def test_a_refresh_of_engines_that_kept_their_memory_asks_for_none(run: Run) -> None:
    run.refresh(1)
    assert not [line for line in run.journal if "resume" in line or "release" in line]
    run.assert_serves(1)


def test_a_request_on_its_way_is_kept_and_no_engine_is_taken_for_dead(run: Run) -> None:
    for server in run.servers:
        server.answers.clear()
    with until(lambda: sum(server.num_waiting for server in run.servers) == 4, "the requests came to the engines"):
        waiting = [run.engines.broker.submit(PROMPT, SAMPLING, priority="evolution") for _ in range(4)]
    run.engines.release_memory()
    put_clock_forward(run.engines.broker)
    for server in run.servers:
        server.answers.set()
    run.refresh(1)
    assert {future.result(WAIT_S).weight_versions for future in waiting} == {(1,)}
    assert not [line for line in run.journal if "abort" in line]
    assert run.engines.metrics()["engine/restarts_count"] == 0


def put_clock_forward(broker: Broker) -> None:
    """Let the limits of a request and of a stall pass three times: a probe that begins at one fails at the next."""
    thread, clock = broker._thread, broker._clock
    real = thread.loop.time
    for turn in (1, 2, 3):
        thread.loop.time = clock._time_s = lambda turn=turn: real() + turn * WAIT_S
        for _ in range(3):  # what is due has its turn, and what that asks for
            thread.run(asyncio.sleep(0)).result(WAIT_S)


def test_an_engine_that_dies_while_its_memory_is_lent_is_started_when_it_is_back(run: Run) -> None:
    run.refresh(1)
    run.engines.release_memory()
    died, other = run.servers
    run.lose(0)
    with until(lambda: run.engines.broker.num_engines == 2, "the engine is replaced"):
        run.refresh(2)
    assert run.servers[0] is not died and run.servers[1] is other
    assert run.journal.index("engine 1 continue") < run.journal.index("engine 0 start")
    assert "engine 0 resume kv_cache" not in run.journal
    run.assert_serves(2)


def test_engines_that_all_die_while_their_memory_is_lent_come_back_with_the_new_weights(run: Run) -> None:
    run.engines.release_memory()
    run.lose(0)
    run.lose(1)
    with until(lambda: run.engines.broker.num_engines == 2, "the engines are replaced"):
        run.refresh(1)
    run.assert_serves(1)


def test_memory_is_not_lent_while_a_server_is_starting(run: Run) -> None:
    run.refresh(1)
    with until(lambda: "engine 0 start" in run.journal, "the replacement starts"):
        run.lose(0)
    run.engines.release_memory()
    assert run.engines.broker.num_engines == 2
    assert run.servers[0].released == {"weights", "kv_cache"}
    run.refresh(2)
    run.assert_serves(2)


@pytest.mark.parametrize("route", ["resume_memory_occupation", "update_weights_from_tensor", "begin_weight_update"])
def test_a_refusal_on_the_way_back_is_named_and_nothing_is_served(run: Run, route: str) -> None:
    run.refresh(1)
    run.engines.release_memory()
    run.servers[1].refused.add(route)
    with pytest.raises(RefreshFailed, match=rf"refresh to version 2: http.*/{route}: 400"):
        run.refresh(2)
    assert run.servers[1].version == "1" and run.engines.broker.version == 1
    with pytest.raises(RefreshFailed, match=route):
        list(run.engines.generate([PROMPT], SAMPLING))
    run.servers[1].refused.clear()
    run.refresh(3)
    run.assert_serves(3)


def test_a_refusal_to_lend_is_named_and_nothing_is_served(run: Run) -> None:
    run.refresh(1)
    run.servers[0].refused.add("release_memory_occupation")
    with pytest.raises(RefreshFailed, match=r"lending the engines' memory: http.*/release_memory_occupation: 400"):
        run.engines.release_memory()
    with pytest.raises(RefreshFailed, match="lending"):
        list(run.engines.generate([PROMPT], SAMPLING))


def test_an_engine_that_dies_when_its_memory_comes_back_is_replaced(run: Run) -> None:
    run.engines.release_memory()
    run.servers[0].fatal.add("resume_memory_occupation")
    with until(lambda: run.engines.broker.num_engines == 2, "the engine is replaced"):
        run.refresh(1)
    run.assert_serves(1)


def test_a_run_that_ends_while_memory_is_lent_starts_no_server(run: Run) -> None:
    run.engines.release_memory()
    run.lose(0)
    run.engines.close()
    assert "engine 0 start" not in run.journal


def test_memory_is_lent_where_that_can_be() -> None:
    def config(release: bool | None) -> Config:
        return fake_config({"rollout.release_memory": release, "model": ModelConfig(path="m")})

    assert not does_release_memory(config(None), num_gpus=0)
    assert not does_release_memory(config(False), num_gpus=8)
    with pytest.raises(ValueError, match=r"^rollout\.release_memory=true needs a GPU"):
        does_release_memory(config(True), num_gpus=0)
    with pytest.raises(ValueError, match=r"^rollout\.release_memory=true needs the package torch_memory_saver"):
        does_release_memory(config(True), num_gpus=8)


def test_refused_requests_are_given_up_and_counted(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.refresh(1)
    run.servers[1].refused.add("generate")
    asked = [replace(PROMPT, problem=Problem(id=str(number), question="", answer="")) for number in range(64)]
    completions = dict(run.engines.generate(asked, SAMPLING))
    reasons = [completions[number].finish_reason for number in range(64)]
    assert set(reasons) == {"length", "abort"}
    assert run.engines.metrics()["engine/refused_count"] == reasons.count("abort")
    assert "completions were refused by their engine; the first: engine 1 on problem" in caplog.text
    caplog.clear()
    list(run.engines.generate(asked, SAMPLING))
    run.engines.close()
    assert "were refused by their engine" in caplog.text
