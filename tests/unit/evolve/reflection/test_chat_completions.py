"""Reflection over HTTP, against a local server that speaks the OpenAI chat API and its failures."""

import asyncio
import contextlib
import gzip
import logging
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from megatron_p2o.config.tree import ReflectionConfig
from megatron_p2o.endpoints.bounded_client import MAX_REPLY_BYTES
from megatron_p2o.endpoints.chat import ChatEndpoint
from megatron_p2o.evolve.reflection.chat_completions import MAX_REFUSED_REQUESTS, MAX_USELESS_REPLIES, ChatCompletions
from megatron_p2o.evolve.reflection.reflection import (
    ReflectionRefused,
    ReflectionRequest,
    ReflectionUnavailable,
    with_markup_as_text,
)
from megatron_p2o.evolve.reflection.reflectors import Reflector, build_reflector

KEY = "sk-very-secret"
REQUEST = ReflectionRequest(proposal=4, parent_text="Be brave.", examples=())

Reply = Callable[[], Awaitable[web.StreamResponse]]


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

AT_ONCE = {"Retry-After-Ms": "1"}
"""Else the client waits half a second and more before it tries again."""


@dataclass
class Seen:
    """What the server was sent."""

    bodies: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


def proposals(
    num_proposals: int,
    *replies: Reply,
    key: str | None = KEY,
    request: ReflectionRequest = REQUEST,
    build: Callable[[ReflectionConfig], Reflector] | None = None,
    **config: Any,
) -> tuple[list[str | Exception], Seen]:
    """Return what proposals against a server with these replies (the last repeats) come to, and what it saw."""
    seen = Seen()

    async def handle(http: web.Request) -> web.StreamResponse:
        seen.bodies.append(await http.json())
        seen.headers.append(dict(http.headers))
        reply = replies[min(len(seen.bodies), len(replies)) - 1]
        if reply is hang_up:
            assert http.transport is not None
            http.transport.close()
        answer = await reply()
        if isinstance(answer, Stream):
            await answer.send(http)
        return answer

    async def run() -> list[str | Exception]:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        address = f"http://127.0.0.1:{port}/v1/"
        settings = ReflectionConfig(
            **{"backend": "openai", "base_url": address, "model": "m", "timeout_s": 20.0, **config}
        )
        client = build(settings) if build else ChatCompletions(settings, key, seed=1)
        outcomes: list[str | Exception] = []
        try:
            for _ in range(num_proposals):
                try:
                    outcomes.append(await client.propose(request))
                except (ReflectionRefused, ReflectionUnavailable) as error:
                    outcomes.append(error)
        finally:
            await client.close()
            await runner.cleanup()
        return outcomes

    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    return asyncio.run(run()), seen


def propose(*replies: Reply, **options: Any) -> tuple[str | Exception, Seen]:
    """Return what one proposal comes to, and what the server saw."""
    (outcome,), seen = proposals(1, *replies, **options)
    return outcome, seen


class Stream(web.StreamResponse):
    """Sends the same chunk until the client hangs up."""

    def __init__(self, chunk: bytes, pause_s: float, headers: dict[str, str]) -> None:
        super().__init__(headers=headers)
        self._chunk, self._pause_s = chunk, pause_s
        self.num_bytes = 0

    async def send(self, http: web.Request) -> None:
        await self.prepare(http)
        while http.transport is not None and not http.transport.is_closing():
            try:
                await self.write(self._chunk)
            except ConnectionError:
                return
            self.num_bytes += len(self._chunk)
            await asyncio.sleep(self._pause_s)


def stream(chunk: bytes, pause_s: float = 0.0, **headers: str) -> tuple[Reply, list[Stream]]:
    """Return a reply without end, and what was sent of each."""
    sent: list[Stream] = []

    async def reply() -> web.StreamResponse:
        sent.append(Stream(chunk, pause_s, headers))
        return sent[-1]

    return reply, sent


def test_request_carries_model_prompt_sampling_and_key() -> None:
    outcome, seen = propose(GOOD, temperature=0.3, max_tokens=77)
    assert outcome == "Draw it."
    (body,) = seen.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.3, 77)
    (message,) = body["messages"]
    assert message["role"] == "user" and "```\nBe brave.\n```" in message["content"]
    assert seen.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_the_conversation_is_noted_as_it_was_but_for_the_key() -> None:
    request = ReflectionRequest(proposal=4, parent_text="Be brave.", examples=())
    _, seen = propose(json_reply(completion(f"{KEY}, no template")), request=request)
    assert request.usage.prompt == seen.bodies[0]["messages"][0]["content"] != ""
    assert request.usage.reply == "***, no template"


def test_a_template_that_holds_the_key_is_taken_without_it() -> None:
    outcome, _ = propose(json_reply(completion(f"```\nSay {KEY}.\n```")))
    assert outcome == "Say ***."


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        ({"usage": {"prompt_tokens": 90, "completion_tokens": 7, "total_tokens": 97}}, (90, 7, 0)),
        ({}, (0, 0, 1)),
        ({"usage": None}, (0, 0, 1)),
        ({"usage": {"prompt_tokens": 90}}, (0, 0, 1)),
        ({"usage": {"prompt_tokens": -1, "completion_tokens": True}}, (0, 0, 1)),
    ],
)
def test_what_a_reply_took_is_counted_or_said_to_be_unknown(body: dict[str, Any], taken: tuple[int, ...]) -> None:
    request = ReflectionRequest(proposal=4, parent_text="Be brave.", examples=())
    declined = completion("I cannot help with that.")
    for content in (completion("```\nDraw it.\n```"), declined):  # a useless reply has been paid for, too
        propose(json_reply({**content, **body}), request=request)
    usage = request.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.num_unknown) == tuple(2 * count for count in taken)


def test_endpoint_without_key_gets_no_authorization() -> None:
    _, seen = propose(GOOD, key=None)
    assert "Authorization" not in seen.headers[0]


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_permanent_refusal_is_not_retried_and_the_key_is_not_told(status: int) -> None:
    outcome, seen = propose(text_reply(f"bad key {KEY}", status))
    assert isinstance(outcome, ReflectionUnavailable)
    assert f"status {status}: bad key ***" in str(outcome) and KEY not in str(outcome)
    assert len(seen.bodies) == 1


def test_a_key_that_is_not_set_is_said() -> None:
    outcome, _ = propose(text_reply("no key", 401), key=None)
    assert str(outcome).endswith("status 401: no key; check $P2O_REFLECTION_API_KEY, which is not set")


@pytest.mark.parametrize(
    "failure",
    [
        json_reply({"error": "slow down"}, 429, **AT_ONCE),
        json_reply({"error": "oops"}, 500, **AT_ONCE),
        json_reply({"error": "bad gateway"}, 502, **AT_ONCE),
        json_reply({"error": "busy"}, 503, **AT_ONCE),
        hang_up,
    ],
)
def test_passing_failure_is_retried(failure: Reply) -> None:
    outcome, seen = propose(failure, GOOD)
    assert outcome == "Draw it."
    assert len(seen.bodies) == 2
    assert seen.bodies[0] == seen.bodies[1]


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (json_reply({"error": "oops"}, 500, **AT_ONCE), 'status 500: {"error": "oops"} (2 tries)'),
        (hang_up, "RemoteProtocolError: Server disconnected without sending a response. (2 tries)"),
        (never, "no answer within evolution.reflection.timeout_s=1 (2 tries)"),
    ],
)
def test_lasting_failure_ends_after_the_retries_and_is_named(failure: Reply, name: str) -> None:
    outcome, seen = propose(failure, max_retries=1, timeout_s=1.0 if failure is never else 20.0)
    assert isinstance(outcome, ReflectionUnavailable)
    assert str(outcome).endswith(name)
    assert len(seen.bodies) == 2


def test_closed_port_is_unavailable() -> None:
    config = ReflectionConfig(backend="openai", base_url="http://127.0.0.1:1/v1", model="m", max_retries=0)

    async def run() -> None:
        client = ChatCompletions(config, None, seed=1)
        try:
            await client.propose(REQUEST)
        finally:
            await client.close()

    with pytest.raises(ReflectionUnavailable, match="ConnectError"):
        asyncio.run(run())


TOO_LONG = json_reply({"error": "context too long"}, 400)
PARAMETER = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."


def test_refused_request_costs_one_proposal_only() -> None:
    (first, second), seen = proposals(2, TOO_LONG, GOOD)
    assert isinstance(first, ReflectionRefused) and str(first) == "the endpoint refuses with status 400"
    assert second == "Draw it."
    assert len(seen.bodies) == 2, "asked again it would be refused again"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_endpoint_that_refuses_every_request_is_quoted_after_a_few(status: int) -> None:
    outcomes, seen = proposals(MAX_REFUSED_REQUESTS, json_reply({"error": {"message": PARAMETER}}, status))
    assert len(seen.bodies) == MAX_REFUSED_REQUESTS == 5
    assert all(isinstance(outcome, ReflectionRefused) for outcome in outcomes[:-1])
    assert isinstance(outcomes[-1], ReflectionUnavailable)
    assert f"status {status}" in str(outcomes[-1]) and "Use 'max_completion_tokens' instead" in str(outcomes[-1])


def test_a_good_reply_between_refusals_begins_the_count_anew() -> None:
    few = [TOO_LONG] * (MAX_REFUSED_REQUESTS - 1)
    outcomes, _ = proposals(2 * len(few) + 1, *few, GOOD, TOO_LONG)
    assert not any(isinstance(outcome, ReflectionUnavailable) for outcome in outcomes)


def test_model_whose_replies_are_never_whole_is_given_up_and_the_setting_is_named() -> None:
    outcomes, seen = proposals(MAX_USELESS_REPLIES, json_reply(completion("Let me think", finish_reason="length")))
    assert len(seen.bodies) == MAX_USELESS_REPLIES
    assert {str(outcome) for outcome in outcomes[:-1]} == {"cut off: raise evolution.reflection.max_tokens"}
    assert isinstance(outcomes[-1], ReflectionUnavailable)
    assert "evolution.reflection.max_tokens" in str(outcomes[-1])


@pytest.mark.parametrize(
    "bad",
    [
        text_reply("<html>not json</html>"),
        text_reply("[" * 100_000),
        text_reply('{"choices": [{"message": {"content": "a \\ud800 b"}}]}'),
        json_reply(completion(None)),
        json_reply(completion("I'm sorry, but I can't help with that.")),
    ],
)
def test_a_bad_reply_costs_itself(bad: Reply) -> None:
    (first, second), seen = proposals(2, bad, GOOD)
    assert isinstance(first, ReflectionRefused) and second == "Draw it."
    assert len(seen.bodies) == 2


@pytest.mark.parametrize("charset", ["zlib_codec", "hex_codec", "bz2_codec", "idna", "undefined", "utf-16", "punycode"])
def test_text_is_utf_8_whatever_charset_a_reply_declares(charset: str) -> None:
    def named(status: int, body: str) -> Reply:
        async def reply() -> web.Response:
            headers = {"Content-Type": f"application/json; charset={charset}"}
            return web.Response(body=body.encode() + b"\xff", status=status, headers=headers)

        return reply

    (first, page, second), seen = proposals(3, named(400, '{"error": "é"}'), named(200, "<html>é"), GOOD)
    assert isinstance(first, ReflectionRefused) and first.detail == 'status 400: {"error": "é"}\ufffd'
    assert isinstance(page, ReflectionRefused) and page.detail.startswith("<html>é")
    assert second == "Draw it." and len(seen.bodies) == 3


def test_an_error_of_the_client_that_nobody_expects_costs_one_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> bytes:
        raise AssertionError(f"decoder of {KEY}")

    monkeypatch.setattr(ChatEndpoint, "_post", fail)
    outcome, _ = propose(GOOD)
    assert isinstance(outcome, ReflectionRefused) and str(outcome) == "the client fails with AssertionError"
    assert outcome.detail == "decoder of ***"


def test_a_page_that_echoes_the_key_is_quoted_without_it() -> None:
    outcome, _ = propose(text_reply(f"<html>signed in with {KEY}</html>"))
    assert isinstance(outcome, ReflectionRefused) and outcome.detail == "<html>signed in with ***</html>"


# Size


@pytest.mark.parametrize("status", [200, 400])
def test_reply_without_end_is_left_when_it_is_too_large(status: int) -> None:
    reply, sent = stream(b" " * (1 << 20))

    async def with_status() -> web.StreamResponse:
        response = await reply()
        response.set_status(status)
        return response

    outcome, _ = propose(with_status)
    assert isinstance(outcome, ReflectionRefused) and str(outcome) == "too large or packed"
    assert outcome.detail == f"more than {MAX_REPLY_BYTES} bytes"
    assert len(sent) == 1 and sent[0].num_bytes < 4 * MAX_REPLY_BYTES, "what lies in buffers between the two"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_packed_reply_without_end_is_left_when_what_it_unpacks_to_is_too_large(encoding: str) -> None:
    packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    bomb = packer.compress(b" " * (3 * MAX_REPLY_BYTES)) + packer.flush()
    assert len(bomb) < MAX_REPLY_BYTES / 8
    reply, _ = stream(bomb, 0.01, **{"Content-Encoding": encoding})
    outcome, _ = propose(reply)
    assert isinstance(outcome, ReflectionRefused) and outcome.detail == f"more than {MAX_REPLY_BYTES} bytes"


def packed_reply(content: bytes, encoding: str) -> Reply:
    async def reply() -> web.Response:
        return web.Response(body=content, headers={"Content-Encoding": encoding})

    return reply


def test_packed_reply_is_read_though_nobody_asked_for_it() -> None:
    good = b'{"choices": [{"message": {"content": "Draw it."}}]}'
    outcome, seen = propose(packed_reply(gzip.compress(good), "gzip"))
    assert outcome == "Draw it." and seen.headers[0]["Accept-Encoding"] == "identity"
    for content, encoding in ((good, "br"), (good, "zstd"), (b"not gzip", "gzip")):
        outcome, _ = propose(packed_reply(content, encoding))
        assert isinstance(outcome, ReflectionRefused) and "packed" in outcome.detail


def test_reply_that_trickles_for_ever_is_left_at_the_time_limit() -> None:
    reply, sent = stream(b" ", 0.02)
    outcome, _ = propose(reply, timeout_s=4.0)
    assert isinstance(outcome, ReflectionRefused)
    assert str(outcome) == "not complete within evolution.reflection.timeout_s" and len(sent) == 1


@pytest.mark.parametrize(("status", "failure"), [(400, ReflectionRefused), (401, ReflectionUnavailable)])
def test_error_that_trickles_for_ever_is_told_by_its_status(status: int, failure: type[Exception]) -> None:
    reply, sent = stream(b"x", 0.02)

    async def with_status() -> web.StreamResponse:
        response = await reply()
        response.set_status(status)
        return response

    outcome, _ = propose(with_status, timeout_s=3.0)
    assert isinstance(outcome, failure) and len(sent) == 1
    detail = outcome.detail if isinstance(outcome, ReflectionRefused) else str(outcome)
    assert f"status {status}: xx" in detail


def test_busy_endpoint_whose_error_trickles_is_tried_again_as_often_as_set() -> None:
    reply, sent = stream(b"x", 0.02, **AT_ONCE)

    async def busy() -> web.StreamResponse:
        response = await reply()
        response.set_status(503)
        return response

    outcome, _ = propose(busy, timeout_s=3.0, max_retries=1)
    assert isinstance(outcome, ReflectionUnavailable) and outcome.is_passing and len(sent) == 2


def test_head_that_trickles_for_ever_is_no_answer() -> None:
    """Every byte comes within the limit of a single read."""
    num_connections = 0

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        writer.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof() and not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        config = ReflectionConfig(backend="openai", base_url=address, model="m", timeout_s=2.0, max_retries=1)
        client = ChatCompletions(config, KEY, seed=1)
        try:
            await client.propose(REQUEST)
        finally:
            await client.close()
            server.close()

    with pytest.raises(ReflectionUnavailable, match=r"no answer within evolution.reflection.timeout_s=2 \(2 tries\)"):
        asyncio.run(run())
    assert num_connections == 2


# The request


def test_redirect_is_not_followed_with_the_key() -> None:
    outcome, seen = propose(json_reply({}, 307, Location="http://127.0.0.1:9/steal"))
    assert isinstance(outcome, ReflectionUnavailable) and "status 307" in str(outcome)
    assert len(seen.bodies) == 1


def test_text_that_cannot_be_sent_is_replaced() -> None:
    outcome, seen = propose(GOOD, request=ReflectionRequest(proposal=1, parent_text="half \ud83d a pair", examples=()))
    assert outcome == "Draw it."
    assert "half ? a pair" in seen.bodies[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({}, {"temperature": 0.6, "max_tokens": 2048}),
        ({"temperature": None}, {"max_tokens": 2048}),
        (
            {
                "temperature": None,
                "max_tokens": None,
                "extra_body": {"max_completion_tokens": 9, "reasoning": {"a": 1}},
            },
            {"max_completion_tokens": 9, "reasoning": {"a": 1}},
        ),
    ],
)
def test_fields_that_an_endpoint_refuses_can_be_left_out_and_others_added(
    settings: dict[str, Any], fields: dict[str, Any]
) -> None:
    _, seen = propose(GOOD, **settings)
    (body,) = seen.bodies
    assert {name: value for name, value in body.items() if name not in ("model", "messages")} == fields


def test_account_of_the_environment_is_not_told_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://of.another.account")
    _, seen = propose(GOOD, key=None)
    assert not any("of.another.account" in value for value in seen.headers[0].values())
    assert not {"authorization", "openai-organization", "openai-project"} & {name.lower() for name in seen.headers[0]}


class Proxy:
    """A plain HTTP proxy on this machine that answers itself; notes the addresses it was asked for."""

    def __init__(self) -> None:
        self.addresses: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.addresses.append(head.split()[1].decode())
        body = b'{"choices": [{"message": {"content": "Draw it."}}]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()


def test_proxy_of_the_environment_leads_to_endpoints_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy()

    async def run() -> str:
        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        config = ReflectionConfig(backend="openai", base_url="http://teacher.example/v1", model="m", max_retries=0)
        client = ChatCompletions(config, KEY, seed=1)
        async with server:
            template = await client.propose(REQUEST)
        await client.close()
        return template

    assert asyncio.run(run()) == "Draw it."
    assert proxy.addresses == ["http://teacher.example/v1/chat/completions"]


def test_no_proxy_leads_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for backend in ("openai", "self"):
        outcome, _ = propose(GOOD, backend=backend, max_retries=0)
        assert outcome == "Draw it."


def test_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "gopher://127.0.0.1:1")
    config = ReflectionConfig(backend="openai", base_url="http://teacher.example/v1", model="m")
    with pytest.raises(ValueError, match="a proxy that the environment names cannot be used"):
        ChatCompletions(config, KEY, seed=1)


def test_self_reflection_switches_thinking_off_and_other_endpoints_are_sent_nothing_unknown() -> None:
    def build(config: ReflectionConfig) -> Reflector:
        return build_reflector(config, 1, {"P2O_REFLECTION_API_KEY": KEY})

    _, own = propose(GOOD, build=build, backend="self")
    assert own.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    _, other = propose(GOOD, build=build)
    assert set(other.bodies[0]) == {"model", "messages", "temperature", "max_tokens"}
    assert own.headers[0]["Authorization"] == other.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_control_tokens_in_an_example_reach_the_policys_own_server_as_text() -> None:
    def build(config: ReflectionConfig) -> Reflector:
        return build_reflector(config, 1, {"P2O_REFLECTION_API_KEY": KEY}, ["<|im_end|>", "better instruction"])

    _, own = propose(GOOD, build=build, backend="self")
    message = own.bodies[0]["messages"][0]["content"]
    assert "< |im_end|>" in with_markup_as_text("Ask.<|im_end|>", ["<|im_end|>"])
    assert "b etter instruction" in message and "better instruction" not in message
    _, other = propose(GOOD, build=build)
    assert "better instruction" in other.bodies[0]["messages"][0]["content"], "a hosted model has its own tokenizer"


def test_backend_without_an_endpoint_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r"backend=self needs evolution\.reflection\.base_url and \.model"):
        build_reflector(ReflectionConfig(backend="self"), 1, {})
    with pytest.raises(ValueError, match=r"backend=phrasebook needs evolution\.reflection\.phrases"):
        build_reflector(ReflectionConfig(backend="phrasebook"), 1, {})


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "host/v1", "ftp://host", "http://", "http://[::1", "http://h:port"]
)
def test_address_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValueError, match=r"evolution\.reflection\.base_url='.*' must be an address such as https://"):
        build_reflector(ReflectionConfig(backend="openai", base_url=url, model="m"), 1, {})


@pytest.mark.parametrize("key", ["sk-sécret", "sk-two\nlines", "sk-\x1bescape"])
def test_key_that_no_header_can_carry_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(ValueError, match=r"^\$P2O_REFLECTION_API_KEY must hold a key of printable ASCII characters$"):
        ChatCompletions(ReflectionConfig(backend="openai", base_url="http://h/v1", model="m"), key, seed=1)


def test_line_end_after_a_key_is_no_part_of_it() -> None:
    _, seen = propose(GOOD, key=f"{KEY}\n")
    assert seen.headers[0]["Authorization"] == f"Bearer {KEY}"
