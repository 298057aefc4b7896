"""Completions through a real relay process: what arrives, and what is lost when the process ends or hangs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from aiohttp import web

from megatron_p2o.processes import allow_many_files
from megatron_p2o.rollout.engines import SglangEngines
from megatron_p2o.rollout.servers import start
from megatron_p2o.rollout.servers.answers import EngineRefused, EngineUnreachable, Generation, RequestRefused
from megatron_p2o.rollout.servers.client import EngineClient
from megatron_p2o.rollout.servers.relay_link import RelayRoute
from megatron_p2o.rollout.servers.start import HeadRelay, RelayProcess
from megatron_p2o.testing.engines.sglang_server import FakeSglangServer
from megatron_p2o.testing.fakes import FakeRenderer, fake_config, fake_problem
from megatron_p2o.types import PLAIN, SamplingParams

PROMPT = np.array([5, 6], dtype=np.int32)
SAMPLING = SamplingParams(temperature=0.5, max_new_tokens=3)
WAIT_S = 60

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Calls = Callable[[EngineClient], Awaitable[Any]]


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    with closing(HeadRelay(tmp_path_factory.mktemp("relay"))) as head:
        yield head.current()


def with_engine(handler: Handler, relay: RelayProcess | None, calls: Calls, key: str = "user") -> Any:
    """Return what `calls` makes of a client of an engine whose every route is `handler`."""

    async def run() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        route = None if relay is None else relay.route_to(url, key)
        client = EngineClient(url, key, "admin", [2], answer_timeout_s=WAIT_S, relay=route)
        try:
            return await asyncio.wait_for(calls(client), WAIT_S)
        finally:
            await client.close()
            await runner.cleanup()

    return asyncio.run(run())


def generated(client: EngineClient) -> Awaitable[Generation]:
    return client.generate(PROMPT, SAMPLING, "id-1")


def answer(tokens: list[list[Any]], **meta: Any) -> web.Response:
    known = {"output_token_logprobs": tokens, "finish_reason": {"type": "stop"}, "weight_version": "3"}
    return web.json_response({"output_ids": [], "meta_info": {**known, **meta}})


def test_a_completion_is_the_same_bit_for_bit_with_and_without_a_relay(relay: RelayProcess) -> None:
    generator = np.random.default_rng(1)
    ids, logprobs = generator.integers(0, 1 << 31, 3000), -np.exp(generator.normal(0, 20, 3000)).astype(np.float32)
    tokens: list[list[Any]] = [[float(value), int(token), None] for value, token in zip(logprobs, ids, strict=True)]
    tokens[7][0] = None
    asked: list[tuple[Any, str]] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append((await request.json(), request.headers["Authorization"]))
        return answer(tokens, weight_versions=[{"version": "3"}, {"version": "4"}])

    through, direct = (with_engine(handler, each, generated) for each in (relay, None))
    np.testing.assert_array_equal(through.token_ids, ids)
    assert (through.token_ids.dtype, through.logprobs.dtype) == (np.int32, np.float32)
    assert np.isnan(through.logprobs[7]) and through.logprobs[8] == logprobs[8]
    np.testing.assert_array_equal(through.logprobs.view(np.int32), direct.logprobs.view(np.int32))
    assert (through.finish_reason, through.weight_versions) == ("stop", (3, 4))
    assert through.token_ids.flags.writeable and through.logprobs.flags.writeable
    assert asked[0] == asked[1] and asked[0][1] == "Bearer user" and asked[0][0]["input_ids"] == [5, 6]


def test_log_probs_of_given_tokens_come_through(relay: RelayProcess) -> None:
    async def handler(request: web.Request) -> web.Response:
        return answer([], input_token_logprobs=[[None, 5, None], [-0.5, 6, None]])

    scores = with_engine(handler, relay, lambda client: client.score(PROMPT, 1, "id-1"))
    assert (scores.token_ids.tolist(), scores.logprobs.tolist()) == ([6], [-0.5])


def test_many_requests_are_answered_in_any_order(relay: RelayProcess) -> None:
    last = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        (token,) = (await request.json())["input_ids"]
        if token == 99:
            last.set()
        await last.wait()
        return answer([[-1.0, token, None]])

    async def calls(client: EngineClient) -> list[int]:
        prompts = [np.array([token], np.int32) for token in range(100)]
        done = await asyncio.gather(*(client.generate(ids, SAMPLING, f"id-{ids[0]}") for ids in prompts))
        return [int(each.token_ids[0]) for each in done]

    assert with_engine(handler, relay, calls) == list(range(100))


@pytest.mark.parametrize(
    ("status", "kind"), [(400, RequestRefused), (401, EngineRefused), (500, EngineRefused), (502, EngineUnreachable)]
)
def test_an_engine_s_refusal_comes_with_its_words(status: int, kind: type[Exception], relay: RelayProcess) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, text="input is too long")

    with pytest.raises(kind, match="input is too long") as refusal:
        with_engine(handler, relay, generated)
    assert type(refusal.value) is kind


def test_an_answer_of_another_shape_is_a_refusal(relay: RelayProcess) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"meta_info": {}})

    with pytest.raises(EngineRefused, match="not an answer of SGLang"):
        with_engine(handler, relay, generated)


def test_an_engine_that_cuts_its_connection_is_gone(relay: RelayProcess) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    with pytest.raises(EngineUnreachable):
        with_engine(handler, relay, generated)


def test_a_request_that_is_given_up_is_dropped_at_the_engine(relay: RelayProcess) -> None:
    began, dropped = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/health_generate":
            return web.Response()
        began.set()
        while request.transport is not None and not request.transport.is_closing():
            await asyncio.sleep(0.01)
        dropped.set()
        return web.Response()

    async def calls(client: EngineClient) -> None:
        task = asyncio.ensure_future(generated(client))
        await began.wait()
        with pytest.raises(TimeoutError, match=r"/health_generate: no answer within 0 s"):
            await client.probe(0)
        task.cancel()
        await dropped.wait()
        await client.probe(WAIT_S)  # the connection goes on

    with_engine(handler, relay, calls)


def test_the_relay_serves_nobody_without_its_key(relay: RelayProcess) -> None:
    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("never asked")

    for path in ("/relay", "/health", "/nothing"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(relay.url + path, timeout=WAIT_S)
    stranger = RelayProcess(process=relay.process, url=relay.url, key="another")
    with pytest.raises(EngineRefused, match="401"):
        with_engine(handler, stranger, generated)
    family = psutil.Process(relay.process.pid)
    assert relay.key not in " ".join(family.cmdline()) and relay.key not in str(family.environ())
    listening = {each.laddr.ip for each in family.net_connections() if each.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_a_relay_without_a_key_does_not_serve() -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", start.RELAY_MODULE, "--parent", str(os.getpid())],
        input="\n",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert outcome.returncode == 1 and outcome.stderr == "no key on standard input\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_relay_that_is_dead_or_hangs_is_replaced(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(HeadRelay(tmp_path)) as head:
        first = head.current()
        assert head.current() is first
        monkeypatch.setattr(start, "HEALTH_TIMEOUT_S", 1.0)
        first.process.send_signal(number)
        second = head.current()
        assert second.process.pid != first.process.pid and second.key != first.key
        assert second.is_alive() and not first.is_alive()
    assert not second.is_alive()


class RelayedServer(FakeSglangServer):
    """An engine of this node behind its relay."""

    def __init__(self, name: str, journal: list[str], reader: RelayProcess) -> None:
        super().__init__(name, journal)
        self.reader = reader
        self.relay: RelayRoute | None = reader.route_to(self.base_url, self.api_key)

    def is_alive(self) -> bool:
        return super().is_alive() and self.reader.is_alive()


def test_a_process_that_has_a_thousand_files_open_starts_a_relay(tmp_path: Path) -> None:
    """One with hundreds of engines has; select() takes no descriptor above 1023."""
    assert allow_many_files() > 1200
    with ExitStack() as files, closing(HeadRelay(tmp_path)) as head:
        opened = [files.enter_context(open(os.devnull)) for _ in range(1100)]
        assert opened[-1].fileno() > 1023
        assert head.current().answers()


def test_a_relay_that_is_killed_costs_its_engines_and_no_completion(tmp_path: Path) -> None:
    head, journal = HeadRelay(tmp_path), []
    servers = [RelayedServer(f"engine {index}", journal, head.current()) for index in range(2)]
    for server in servers:
        server.answers.clear()
    prompts = [FakeRenderer().render(fake_problem(index), PLAIN) for index in range(6)]
    engines = SglangEngines(
        fake_config({"rollout.num_engines": 2}),
        tmp_path,
        servers,
        lambda name, _: RelayedServer(name, journal, head.current()),
        stop_token_ids=[],
        releases_memory=False,
        relay=head,
    )
    with engines:
        completions = engines.generate(prompts, SamplingParams(temperature=1.0, max_new_tokens=1))
        killed = head.current()
        os.kill(killed.process.pid, signal.SIGKILL)
        done = list(completions)
        assert sorted(index for index, _ in done) == list(range(6))
        assert {(each.token_ids.tolist()[0], each.finish_reason) for _, each in done} == {(7, "length")}
        deadline = time.monotonic() + 60.0  # one engine may answer all before the other is back
        while engines.broker.num_engines < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engines.metrics()["engine/restarts_count"] == 2
        assert sorted(name for name in journal if "start" in name) == ["engine 0 start", "engine 1 start"]
    assert not killed.is_alive()
