import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_p2o.rollout.servers.answers import EngineRefused, EngineUnreachable, Generation, RequestRefused
from megatron_p2o.rollout.servers.client import EngineClient, check_scored
from megatron_p2o.rollout.servers.server import reserve_port
from megatron_p2o.types import FinishReason, SamplingParams

PROMPT = np.array([5, 6], dtype=np.int32)
SAMPLING = SamplingParams(temperature=0.5, max_new_tokens=3, top_p=0.9)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ask(handler: Handler, sampling: SamplingParams = SAMPLING, timeout_s: float = 10.0) -> Generation:
    """Send one request to a server on a free port whose every route is `handler`."""

    async def run() -> Generation:
        app = web.Application()
        app.router.add_post("/{path}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        client = EngineClient(f"http://127.0.0.1:{port}", "user", "admin", [2, 7], answer_timeout_s=10)
        try:
            return await client.generate(PROMPT, sampling, "id-1", priority=1, timeout_s=timeout_s)
        finally:
            await client.close()
            await runner.cleanup()

    return asyncio.run(run())


def answering(requests: list[tuple[dict[str, Any], str]]) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        requests.append((await request.json(), request.headers["Authorization"]))
        meta = {
            "output_token_logprobs": [[-0.25, 9, None]],
            "finish_reason": {"type": "stop", "matched": 9},
            "weight_version": "1",
        }
        return web.json_response({"output_ids": [9], "meta_info": meta})

    return handler


def test_a_request_carries_tokens_sampling_priority_and_the_key() -> None:
    requests: list[tuple[dict[str, Any], str]] = []
    generation = ask(answering(requests))
    assert generation.token_ids.tolist() == [9]
    assert requests == [
        (
            {
                "rid": "id-1",
                "input_ids": [5, 6],
                "sampling_params": {
                    "temperature": 0.5,
                    "top_p": 0.9,
                    "max_new_tokens": 3,
                    "stop_token_ids": [2, 7],
                },
                "return_logprob": True,
                "priority": 1,
            },
            "Bearer user",
        )
    ]


def test_a_log_prob_that_json_cannot_say_is_nan() -> None:
    async def handler(request: web.Request) -> web.Response:
        meta = {
            "output_token_logprobs": [[-0.25, 9, None], [None, 4, None]],
            "finish_reason": {"type": "length"},
            "weight_version": "1",
        }
        return web.json_response({"meta_info": meta})

    generation = ask(handler)
    assert generation.token_ids.tolist() == [9, 4]
    np.testing.assert_array_equal(generation.logprobs, np.array([-0.25, np.nan], np.float32))


def test_a_seed_is_passed_when_given() -> None:
    requests: list[tuple[dict[str, Any], str]] = []
    ask(answering(requests), SamplingParams(temperature=1.0, max_new_tokens=1, seed=42))
    assert requests[0][0]["sampling_params"]["sampling_seed"] == 42


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, RequestRefused) for status in (400, 413, 422)),
        *((status, EngineRefused) for status in (401, 403, 404, 500, 503)),
    ],
)
def test_an_error_answer_is_a_refusal_with_the_server_s_words(status: int, kind: type[EngineRefused]) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, text=json.dumps({"error": "input is too long"}))

    with pytest.raises(EngineRefused, match=rf"{status} .*input is too long") as refusal:
        ask(handler)
    assert type(refusal.value) is kind


def test_a_late_answer_is_a_timeout_that_names_the_route() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    with pytest.raises(TimeoutError, match=r"/generate: no answer within 0\.05 s"):
        ask(handler, timeout_s=0.05)


def test_a_connection_that_is_cut_means_the_engine_is_gone() -> None:
    async def before_the_answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def inside_the_answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"output_ids": [')
        assert request.transport is not None
        request.transport.abort()
        return response

    for handler in (before_the_answer, inside_the_answer):
        with pytest.raises(EngineUnreachable):
            ask(handler)


def test_a_refused_connection_means_the_engine_is_gone() -> None:
    async def run() -> None:
        with reserve_port() as nobody_listens:
            client = EngineClient(
                f"http://127.0.0.1:{nobody_listens.getsockname()[1]}", "user", "admin", [], answer_timeout_s=10
            )
            try:
                await client.generate(PROMPT, SAMPLING, "id-1", timeout_s=10)
            finally:
                await client.close()

    with pytest.raises(EngineUnreachable):
        asyncio.run(run())


def scores_of(ids: list[int], reason: FinishReason = "length") -> Generation:
    return Generation(
        token_ids=np.array(ids, np.int32),
        logprobs=np.zeros(len(ids), np.float32),
        finish_reason=reason,
        weight_versions=(1,),
    )


def test_the_last_token_of_a_vocabulary_is_echoed_as_0() -> None:
    check_scored(scores_of([6, 0]), np.array([6, 255], np.int32))


def test_log_probs_of_other_tokens_are_an_error() -> None:
    with pytest.raises(EngineRefused, match="other tokens than those it was sent"):
        check_scored(scores_of([6]), np.array([7], np.int32))
    check_scored(scores_of([], "abort"), np.array([7], np.int32))


def test_an_answer_of_another_shape_is_a_refusal() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"meta_info": {"finish_reason": {"type": "stop"}}})

    with pytest.raises(EngineRefused, match=r"/generate: 500 not an answer of SGLang .*weight_version"):
        ask(handler)
