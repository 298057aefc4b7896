"""Reflection over HTTP, against a local server that speaks the OpenAI chat API and its failures."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from megatron_p2o.config import ReflectionConfig
from megatron_p2o.evolve.chat_completions import ChatCompletions, retry_after_s, retry_delay_s
from megatron_p2o.evolve.reflection import ReflectionRefused, ReflectionRequest, ReflectionUnavailable
from megatron_p2o.evolve.reflectors import Reflector, build_reflector

KEY = "sk-very-secret"
REQUEST = ReflectionRequest(proposal=4, parent_text="Be brave.", examples=())

Reply = Callable[[], Awaitable[web.Response]]


def completion(content: Any, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **choice}]}


def json_reply(body: Any, status: int = 200, **headers: str) -> Reply:
    async def reply() -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return reply


def text_reply(text: str, status: int = 200) -> Reply:
    async def reply() -> web.Response:
        return web.Response(text=text, status=status)

    return reply


async def never() -> web.Response:
    await asyncio.sleep(60)
    raise AssertionError("the client should have hung up")


async def hang_up() -> web.Response:
    raise ConnectionResetError


GOOD = json_reply(completion("Here:\n```\nDraw it.\n```"))


@dataclass
class Seen:
    """What the server was sent."""

    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def propose(
    *replies: Reply, key: str | None = KEY, build: Callable[[ReflectionConfig], Reflector] | None = None, **config: Any
) -> tuple[str | Exception, Seen]:
    """Return what a proposal against a server with these replies (the last repeats) comes to, and what it saw."""
    seen = Seen()

    async def handle(http: web.Request) -> web.StreamResponse:
        seen.bodies.append(await http.json())
        seen.headers.append(dict(http.headers))
        reply = replies[min(len(seen.bodies), len(replies)) - 1]
        if reply is hang_up:
            assert http.transport is not None
            http.transport.close()
        return await reply()

    async def run() -> str | Exception:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        address = f"http://127.0.0.1:{port}/v1/"
        settings = ReflectionConfig(
            **{"backend": "openai", "base_url": address, "model": "m", "timeout_s": 5.0, **config}
        )
        client = build(settings) if build else ChatCompletions(settings, key, seed=1, base_delay_s=0.001)
        try:
            return await client.propose(REQUEST)
        except (ReflectionRefused, ReflectionUnavailable) as error:
            return error
        finally:
            await client.close()
            await runner.cleanup()

    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    return asyncio.run(run()), seen


def test_request_carries_model_prompt_sampling_and_key() -> None:
    outcome, seen = propose(GOOD, temperature=0.3, max_tokens=77)
    assert outcome == "Draw it."
    (body,) = seen.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.3, 77)
    (message,) = body["messages"]
    assert message["role"] == "user" and "```\nBe brave.\n```" in message["content"]
    assert seen.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_endpoint_without_key_gets_no_authorization() -> None:
    _, seen = propose(GOOD, key=None)
    assert "Authorization" not in seen.headers[0]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_permanent_refusal_is_not_retried_and_the_key_is_not_told(status: int) -> None:
    outcome, seen = propose(text_reply(f"bad key {KEY}", status))
    assert isinstance(outcome, ReflectionUnavailable)
    assert f"status {status}: bad key ***" in str(outcome) and KEY not in str(outcome)
    assert len(seen.bodies) == 1


@pytest.mark.parametrize(
    "failure",
    [
        json_reply({"error": "slow down"}, 429),
        text_reply("oops", 500),
        text_reply("bad gateway", 502),
        text_reply("<html>not json</html>"),
        json_reply({"choices": []}),
        json_reply([1, 2]),
        json_reply(completion(None)),
        json_reply(completion("  \n")),
        json_reply(completion([{"type": "text", "text": "parts"}])),
        hang_up,
    ],
)
def test_passing_failure_is_retried(failure: Reply) -> None:
    outcome, seen = propose(failure, failure, GOOD)
    assert outcome == "Draw it."
    assert len(seen.bodies) == 3
    assert seen.bodies[0] == seen.bodies[2]


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (text_reply("oops", 500), "status 500: oops"),
        (text_reply("<html>"), "not a chat completion"),
        (json_reply(completion(None)), "an empty answer"),
        (hang_up, "ServerDisconnectedError"),
    ],
)
def test_lasting_failure_ends_after_the_retries_and_is_named(failure: Reply, name: str) -> None:
    outcome, seen = propose(failure, max_retries=2)
    assert isinstance(outcome, ReflectionUnavailable)
    assert name in str(outcome) and "(3 tries)" in str(outcome)
    assert len(seen.bodies) == 3


def test_silence_ends_in_a_time_out() -> None:
    outcome, seen = propose(never, max_retries=1, timeout_s=0.05)
    assert isinstance(outcome, ReflectionUnavailable) and "no answer within 0.05 s (2 tries)" in str(outcome)
    assert len(seen.bodies) == 2


def test_closed_port_is_unavailable() -> None:
    config = ReflectionConfig(backend="openai", base_url="http://127.0.0.1:1/v1", model="m", max_retries=1)

    async def run() -> None:
        client = ChatCompletions(config, None, seed=1, base_delay_s=0.001)
        try:
            await client.propose(REQUEST)
        finally:
            await client.close()

    with pytest.raises(ReflectionUnavailable, match="ClientConnectorError"):
        asyncio.run(run())


def test_refused_request_costs_one_proposal_only() -> None:
    outcome, seen = propose(json_reply({"error": "context too long"}, 400))
    assert isinstance(outcome, ReflectionRefused) and "status 400" in str(outcome)
    assert len(seen.bodies) == 1


def test_cut_off_answer_is_refused_not_used() -> None:
    outcome, _ = propose(json_reply(completion("```\nDraw it, and then", finish_reason="length")))
    assert isinstance(outcome, ReflectionRefused) and str(outcome) == "fence not closed"


def test_redirect_is_not_followed_with_the_key() -> None:
    outcome, seen = propose(json_reply({}, 307, Location="http://127.0.0.1:9/steal"))
    assert isinstance(outcome, ReflectionRefused) and "status 307" in str(outcome)
    assert len(seen.bodies) == 1


def test_retry_delay_doubles_with_jitter_and_honours_the_endpoint_up_to_a_bound() -> None:
    rng = random.Random(0)
    assert [retry_delay_s(3, 1.0, asked, rng) for asked in (0.0, 7.0, 1e9)] == [0.0, 7.0, 60.0]
    delays = [retry_delay_s(attempt, 1.0, None, rng) for attempt in range(9)]
    for attempt, delay in enumerate(delays):
        assert min(0.5 * 2**attempt, 60) <= delay <= min(1.5 * 2**attempt, 60)
    assert len({round(delay / 2**attempt, 6) for attempt, delay in enumerate(delays[:5])}) == 5, "jittered"


def test_server_that_asks_to_retry_at_once_is_retried_at_once() -> None:
    outcome, seen = propose(json_reply({}, 429, **{"Retry-After": "0"}), GOOD)
    assert outcome == "Draw it." and len(seen.bodies) == 2


def test_retry_after_reads_seconds_and_dates() -> None:
    assert retry_after_s(None) is None
    assert retry_after_s("2.5") == 2.5
    assert retry_after_s("-3") == 0.0
    assert retry_after_s("soon") is None
    later = retry_after_s(format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True))
    assert later is not None and 90 < later <= 100
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_self_reflection_switches_thinking_off_and_other_endpoints_are_sent_nothing_unknown() -> None:
    def build(config: ReflectionConfig) -> Reflector:
        return build_reflector(config, 1, {"P2O_REFLECTION_API_KEY": KEY})

    _, own = propose(GOOD, build=build, backend="self")
    assert own.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    _, other = propose(GOOD, build=build)
    assert set(other.bodies[0]) == {"model", "messages", "temperature", "max_tokens"}
    assert own.headers[0]["Authorization"] == other.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_backend_without_an_endpoint_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"backend=self needs evolution\.reflection\.base_url and \.model"):
        build_reflector(ReflectionConfig(backend="self"), 1, {})
    with pytest.raises(ValueError, match=r"backend=phrasebook needs evolution\.reflection\.phrases"):
        build_reflector(ReflectionConfig(backend="phrasebook"), 1, {})
