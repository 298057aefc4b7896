"""Passes the completions of a node's engines on to rank 0 as arrays: the part of the conductor that reads JSON.

Every node with engines has a relay. On rank 0's own it is a process, `python -m megatron_p2o.rollout.servers.relay`
with its key on standard input; elsewhere it is part of the node's daemon. Rank 0 opens one WebSocket per engine. A
message to the relay is an `Asked`, one from it a `Relayed`, both MessagePack; requests are answered in any order.
"""

import argparse
import asyncio
import hmac
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import numpy as np
from aiohttp import web

from megatron_p2o.processes import allow_many_files, end_with_parent
from megatron_p2o.rollout.servers.answers import GONE, AnswerUnreadable, Generation, read_answer
from megatron_p2o.terminal import set_up_logging
from megatron_p2o.types import FinishReason

HOST = "127.0.0.1"
"""Where rank 0's own relay listens."""

ENGINE_URL, ENGINE_KEY = "X-Engine-Url", "X-Engine-Key"
"""Headers that tell rank 0's own relay which engine a connection is for."""

GENERATE, PROBE = "generate", "health_generate"
"""Routes of an engine that go through the relay; both are opened by its user key."""

SERVER_INFO = "server_info"
"""The other route that its user key opens."""

FORGET = ""
"""Route of an `Asked` that rank 0 no longer waits for."""

UNREADABLE = 500
"""Status of an answer that SGLang would not give."""

WRONG_KEY = 401
"""Status for who does not have the key."""

MAX_MESSAGE_BYTES = 1 << 28
"""Far above the longest prompt or completion."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Asked(msgspec.Struct, frozen=True, array_like=True):
    """A request to an engine."""

    number: int
    """Its own on this connection."""
    path: str
    body: bytes = b""
    """JSON; none: the request is a GET."""
    num_scored: int = 0
    """As in `parse_scores`; 0: the answer is a completion."""


class Relayed(msgspec.Struct, frozen=True, array_like=True):
    """The answer to an `Asked`."""

    number: int
    status: int
    """That of the engine's answer; `GONE` when there was none."""
    words: bytes = b""
    """The engine's, unless the answer is a completion."""
    token_ids: bytes = b""
    """[R] int32"""
    logprobs: bytes = b""
    """[R] float32"""
    finish_reason: FinishReason = "abort"
    weight_versions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineAddress:
    """Where an engine of this node listens, and its user key."""

    base_url: str
    api_key: str


async def relay(request: web.Request, session: aiohttp.ClientSession, engine: EngineAddress) -> web.WebSocketResponse:
    """Answer what rank 0 asks of an engine, until rank 0 closes the connection."""
    socket = web.WebSocketResponse(compress=False, max_msg_size=MAX_MESSAGE_BYTES)
    await socket.prepare(request)
    running: dict[int, asyncio.Task[None]] = {}
    # A request that fails in a way nobody foresaw ends the connection, which rank 0 takes for the engine's loss.
    async with asyncio.TaskGroup() as tasks:
        async for message in socket:
            asked = msgspec.msgpack.decode(message.data, type=Asked)
            if asked.path == FORGET:
                if asked.number in running:
                    running[asked.number].cancel()
                continue
            running[asked.number] = task = tasks.create_task(_pass_on(asked, socket, session, engine))
            task.add_done_callback(lambda _, number=asked.number: running.pop(number))
        for task in running.values():
            task.cancel()
    return socket


async def _pass_on(
    asked: Asked, socket: web.WebSocketResponse, session: aiohttp.ClientSession, engine: EngineAddress
) -> None:
    answer = msgspec.msgpack.encode(await answer_of(asked, session, engine))
    with suppress(ConnectionError):  # rank 0 is gone, or has lost the engine
        await socket.send_bytes(answer)


async def answer_of(asked: Asked, session: aiohttp.ClientSession, engine: EngineAddress) -> Relayed:
    """Ask an engine and return its answer, read."""
    status, answer = await _http_answer(asked, session, engine)
    if status == 200 and asked.path == GENERATE:
        try:
            return packed(asked.number, read_answer(answer, asked.num_scored))
        except AnswerUnreadable as error:
            return Relayed(number=asked.number, status=UNREADABLE, words=str(error).encode())
    return Relayed(number=asked.number, status=status, words=answer)


async def _http_answer(asked: Asked, session: aiohttp.ClientSession, engine: EngineAddress) -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {engine.api_key}", "Content-Type": "application/json"}
    method = "POST" if asked.body else "GET"
    try:
        async with session.request(
            method, f"{engine.base_url}/{asked.path}", data=asked.body or None, headers=headers
        ) as answer:
            return answer.status, await answer.read()
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        return GONE, repr(error).encode()


def packed(number: int, generation: Generation) -> Relayed:
    """Return a completion as it goes to rank 0."""
    return Relayed(
        number=number,
        status=200,
        token_ids=generation.token_ids.tobytes(),
        logprobs=generation.logprobs.tobytes(),
        finish_reason=generation.finish_reason,
        weight_versions=generation.weight_versions,
    )


def unpacked(relayed: Relayed) -> Generation:
    """Return the completion that was `packed`, bit for bit, in arrays of its own."""
    return Generation(
        token_ids=np.frombuffer(relayed.token_ids, np.int32).copy(),
        logprobs=np.frombuffer(relayed.logprobs, np.float32).copy(),
        finish_reason=relayed.finish_reason,
        weight_versions=relayed.weight_versions,
    )


def checking(key: str) -> Any:
    """Return a middleware that refuses requests without `key`."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return web.Response(status=WRONG_KEY, text="wrong key")
        return await handler(request)

    return check


def engine_session() -> aiohttp.ClientSession:
    """Return an HTTP session to engines without limits of its own.

    The broker bounds the requests in flight and the wait for answers, because it knows when engines do not sample.
    """
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout())


async def serve_app(app: web.Application, address: str, port: int = 0) -> None:
    """Listen at a port of `address`, 0 for a free one, print the URL, and go on until the process is ended."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, address, port).start()
    print(f"http://{address}:{runner.addresses[0][1]}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


async def serve_relay(key: str) -> None:
    """Be the relay of rank 0's node."""
    async with engine_session() as session:

        async def connect(request: web.Request) -> web.StreamResponse:
            engine = EngineAddress(base_url=request.headers[ENGINE_URL], api_key=request.headers[ENGINE_KEY])
            return await relay(request, session, engine)

        async def health(request: web.Request) -> web.StreamResponse:
            return web.Response()

        app = web.Application(middlewares=[checking(key)])
        app.add_routes([web.get("/relay", connect), web.get("/health", health)])
        await serve_app(app, HOST)


def main() -> None:
    parser = argparse.ArgumentParser(prog="megatron_p2o.rollout.servers.relay")
    parser.add_argument("--parent", type=int, metavar="PID", required=True, help="ends with this process")
    end_with_parent(parser.parse_args().parent)
    allow_many_files()
    set_up_logging()
    key = sys.stdin.readline().strip()
    if not key:
        sys.exit("no key on standard input")
    asyncio.run(serve_relay(key))


if __name__ == "__main__":
    main()
