"""The daemon of a node without rank 0: starts engines there, passes requests on, and keeps weights for them.

That node's first rank starts it (`run.node_daemon`); rank 0 talks to it through `rollout.servers.remote`. It is the one
process of a run that listens at an address other machines reach, and only in runs of several nodes: the engines stay on
loopback behind it, because SGLang's weight routes unpickle what they are sent.
"""

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import aiohttp
from aiohttp import web

from megatron_p2o.config.tree import Config
from megatron_p2o.processes import own_host_memory
from megatron_p2o.records import from_json
from megatron_p2o.rollout.buckets.staging import MemoryFile
from megatron_p2o.rollout.servers.answers import GONE
from megatron_p2o.rollout.servers.relay import (
    GENERATE,
    PROBE,
    SERVER_INFO,
    EngineAddress,
    checking,
    engine_session,
    relay,
    serve_app,
)
from megatron_p2o.rollout.servers.server import EngineServer, EngineStartFailed
from megatron_p2o.rollout.servers.server_arguments import EnginePlace
from megatron_p2o.rollout.servers.start import start_server

USER_ROUTES = frozenset({GENERATE, PROBE, SERVER_INFO})
"""Opened by an engine's user key; the others need its admin key."""

MAX_REQUEST_BYTES = 1 << 28
"""Largest request that is passed to an engine. Weights come through /staging, in pieces."""

T = TypeVar("T")


@dataclass(slots=True)
class HostedServer:
    """A server of this node and how far it is."""

    server: EngineServer
    state: Literal["starting", "ready", "failed"] = "starting"
    error: str = ""
    """Why it failed."""


@dataclass(slots=True)
class NodeDaemon:
    """What this node holds for the run."""

    config: Config
    run_dir: Path
    key: str
    session: aiohttp.ClientSession
    """HTTP session to the engines."""
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells it from the one whose place it takes."""
    engines: dict[str, HostedServer] = field(default_factory=dict[str, HostedServer])
    staging: dict[int, MemoryFile] = field(default_factory=dict[int, MemoryFile])
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32))
    """Starting and ending servers takes seconds to minutes."""

    def application(self) -> web.Application:
        """Return the routes, all of which check the key."""
        app = web.Application(middlewares=[checking(self.key)], client_max_size=MAX_REQUEST_BYTES)
        app.add_routes(
            [
                web.post("/servers/{index}", self._start),
                web.get("/servers/{index}", self._describe),
                web.delete("/servers/{index}", self._stop),
                web.put("/staging/{slot}", self._stage),
                web.get("/memory", self._memory),
                web.get("/relays/{index}", self._relay),
                web.route("*", "/engines/{index}/{path}", self._forward),
            ]
        )
        return app

    def close(self) -> None:
        """End the engines."""
        for engine in self.engines.values():
            engine.server.stop()
        self.threads.shutdown()

    async def _start(self, request: web.Request) -> web.Response:
        """Start an engine, in the place of one that was started before, and do not wait until it is ready."""
        wanted = await request.json()
        place = from_json(EnginePlace, wanted["place"])
        old = self.engines.pop(request.match_info["index"], None)
        if old is not None:
            await self._in_thread(old.server.stop)
        server = await self._in_thread(lambda: start_server(self.config, self.run_dir, place, wanted["restart"]))
        server.begin()
        engine = self.engines[request.match_info["index"]] = HostedServer(server)
        self.threads.submit(self._wait_until_ready, engine)
        return self._description(engine)

    async def _describe(self, request: web.Request) -> web.Response:
        return self._description(self.engines[request.match_info["index"]])

    async def _stop(self, request: web.Request) -> web.Response:
        engine = self.engines[request.match_info["index"]]
        await self._in_thread(engine.server.stop)
        return self._description(engine)

    async def _stage(self, request: web.Request) -> web.Response:
        """Take a bucket of weights; the memory is kept for the next one of this slot if that fits."""
        slot, num_bytes = int(request.match_info["slot"]), int(request.headers["X-Capacity"])
        memory = self.staging.get(slot)
        if memory is None or memory.address.num_bytes < num_bytes:
            if memory is not None:
                memory.close()
            memory = self.staging[slot] = MemoryFile(num_bytes)
        room = memory.content.numpy().data
        offset = 0
        async for piece in request.content.iter_any():
            room[offset : offset + len(piece)] = piece
            offset += len(piece)
        return web.json_response(asdict(memory.address))

    async def _memory(self, request: web.Request) -> web.Response:
        return web.json_response(asdict(own_host_memory()))

    async def _relay(self, request: web.Request) -> web.StreamResponse:
        server = self.engines[request.match_info["index"]].server
        address = EngineAddress(base_url=server.base_url, api_key=server.api_key)
        return await relay(request, self.session, address)

    async def _forward(self, request: web.Request) -> web.Response:
        """Pass a request on to an engine, under the engine's own key."""
        path = request.match_info["path"]
        server = self.engines[request.match_info["index"]].server
        key = server.api_key if path in USER_ROUTES else server.admin_key
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        body = await request.read()
        try:
            async with self.session.request(
                request.method, f"{server.base_url}/{path}", data=body or None, headers=headers
            ) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            return web.Response(status=GONE, text=repr(error))

    def _wait_until_ready(self, engine: HostedServer) -> None:
        try:
            engine.server.wait_until_ready(self.config.rollout.startup_timeout_s)
            engine.state = "ready"
        except (EngineStartFailed, ValueError) as error:
            engine.error = str(error)
            engine.state = "failed"

    def _description(self, engine: HostedServer) -> web.Response:
        return web.json_response(
            {
                "daemon": self.name,
                "state": engine.state,
                "error": engine.error,
                "is_alive": engine.server.is_alive(),
                "log_tail": engine.server.log_tail(),
                "pid": engine.server.pid,
                "host_memory": asdict(engine.server.host_memory()),
            }
        )

    def _in_thread(self, call: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self.threads, call)


async def serve_node(config: Config, run_dir: Path, key: str, address: str, port: int) -> None:
    """Listen at a port of `address`, 0 for a free one, print the URL, and go on until the process is ended."""
    async with engine_session() as session:
        daemon = NodeDaemon(config=config, run_dir=run_dir, key=key, session=session)
        try:
            await serve_app(daemon.application(), address, port)
        finally:
            daemon.close()
