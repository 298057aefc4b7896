"""How the address and the key of a node's daemon reach rank 0, and what rank 0 makes of a daemon that is replaced."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientSession, web

from megatron_p2o.rollout.buckets.staging import StagingBuffer
from megatron_p2o.rollout.buckets.weight_message import TensorEntry
from megatron_p2o.rollout.servers import remote
from megatron_p2o.rollout.servers.daemon import NodeDaemon
from megatron_p2o.rollout.servers.remote import (
    DaemonAddress,
    NodeMirror,
    RemoteServer,
    leave_address,
    take_address,
)
from megatron_p2o.rollout.servers.server import EngineStartFailed, reserve_port
from megatron_p2o.rollout.servers.server_arguments import EnginePlace
from megatron_p2o.testing.fakes import fake_config

ADDRESS = DaemonAddress(url="http://10.0.0.2:1234", key="secret")


def test_the_key_of_a_daemon_lies_in_a_file_of_its_user_until_it_is_taken(tmp_path: Path) -> None:
    name = leave_address(tmp_path, 1, ADDRESS)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]
    assert ADDRESS.key not in name and leave_address(tmp_path, 1, ADDRESS) != name
    assert take_address(tmp_path, name, time.monotonic()) == ADDRESS
    assert not (tmp_path / name).exists()


def test_an_address_that_is_not_to_be_seen_is_waited_for_and_named(tmp_path: Path) -> None:
    name = f"daemon-1-{'0' * 32}.json"
    with pytest.raises(TimeoutError, match=rf"{name}, written by another node, .*do all nodes share {tmp_path}"):
        take_address(tmp_path, name, time.monotonic())


@pytest.mark.parametrize("name", ["../config.yaml", "daemon-1-0.json", f"x/daemon-1-{'0' * 32}.json", ""])
def test_whoever_writes_to_the_store_cannot_name_other_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no daemon"):
        take_address(tmp_path / "engines", name, time.monotonic())


@asynccontextmanager
async def listening(app: web.Application, port: int) -> AsyncIterator[None]:
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield
    finally:
        await runner.cleanup()


def engine_of(port: int, restart: int = 1) -> RemoteServer:
    address = DaemonAddress(url=f"http://127.0.0.1:{port}", key="secret")
    place = EnginePlace(index=3, node=1, slot=0)
    return RemoteServer(address, place, restart, Path("engine-3.log"), NodeMirror(address, 10))


def daemon_that(start: Callable[[dict[str, Any]], web.Response], state: str = "ready") -> web.Application:
    """Return a daemon whose engines are in `state` at once; `start` answers the order to start one."""

    async def order(request: web.Request) -> web.Response:
        return start(await request.json())

    async def describe(request: web.Request) -> web.Response:
        return web.json_response({"state": state, "is_alive": True})

    app = web.Application()
    app.add_routes([web.post("/servers/3", order), web.get("/servers/3", describe)])
    return app


def test_an_engine_whose_daemon_is_gone_is_started_by_the_one_that_takes_its_place() -> None:
    wanted: list[dict[str, Any]] = []

    def start(given: dict[str, Any]) -> web.Response:
        wanted.append(given)
        return web.json_response({"daemon": "second"})

    async def replaced() -> None:
        with reserve_port() as holder:
            port = holder.getsockname()[1]
            engine = await asyncio.to_thread(engine_of, port)
            assert not await asyncio.to_thread(engine.is_alive)
            ready = asyncio.create_task(asyncio.to_thread(engine.wait_until_ready, 60))
            async with listening(daemon_that(start), port):
                await ready
                assert await asyncio.to_thread(engine.is_alive)

    asyncio.run(replaced())
    assert [(each["restart"], each["place"]["index"]) for each in wanted] == [(1, 3)]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_daemon_that_is_not_replaced_is_named(is_stopped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DAEMON_PATIENCE_S", 1e9 if is_stopped else 0.0)
    with reserve_port() as holder:
        port = holder.getsockname()[1]
        engine = engine_of(port)
        if is_stopped:
            engine.stop()
        with pytest.raises(EngineStartFailed, match=rf"engine 3: the daemon of its node at http://127.0.0.1:{port}: "):
            engine.wait_until_ready(1e9)


def test_an_engine_that_is_stopped_while_it_starts_is_not_waited_for() -> None:
    async def stopped() -> None:
        with reserve_port() as holder:
            port = holder.getsockname()[1]
            async with listening(daemon_that(lambda given: web.json_response({"daemon": "first"}), "starting"), port):
                engine = await asyncio.to_thread(engine_of, port)
                ready = asyncio.create_task(asyncio.to_thread(engine.wait_until_ready, 600))
                await asyncio.to_thread(engine.stop)  # which the daemon refuses
                with pytest.raises(EngineStartFailed, match="engine 3 was stopped while it started"):
                    await asyncio.wait_for(ready, 60)

    asyncio.run(stopped())


def test_a_daemon_that_cannot_start_an_engine_is_not_waited_for() -> None:
    def refuse(given: dict[str, Any]) -> web.Response:
        return web.Response(status=500)

    async def refused() -> None:
        with reserve_port() as holder:
            port = holder.getsockname()[1]
            async with listening(daemon_that(refuse), port):
                with pytest.raises(EngineStartFailed, match=r"engine 3: the daemon of its node .* 500"):
                    await asyncio.to_thread(engine_of, port)

    asyncio.run(refused())


def test_weights_are_sent_to_a_daemon_once_and_again_to_the_one_that_takes_its_place(tmp_path: Path) -> None:
    bucket = StagingBuffer(0, 1024)
    bucket.clear(0)
    weight = torch.arange(12, dtype=torch.float32)
    entry = TensorEntry(name="w", dtype="float32", shape=(12,), offset_bytes=0)
    bucket.put(entry, weight, verify=False)

    async def placed() -> None:
        async with ClientSession() as session:
            daemons = [NodeDaemon(fake_config(), tmp_path, "secret", session) for _ in range(2)]
            with reserve_port() as holder:
                port = holder.getsockname()[1]
                mirror = NodeMirror(DaemonAddress(url=f"http://127.0.0.1:{port}", key="secret"), 10)
                addresses = []
                for daemon in daemons:
                    async with listening(daemon.application(), port):
                        mirror.meet(daemon.name)
                        addresses += [await mirror.place(bucket), await mirror.place(bucket)]
            assert addresses[0] == addresses[1] != addresses[2] == addresses[3]
            assert torch.equal(entry.view(daemons[1].staging[0].content), weight)

    asyncio.run(placed())
    bucket.close()


def test_a_daemon_without_a_key_does_not_serve(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_p2o.run.node_daemon", str(tmp_path / "config.yaml"), "127.0.0.1"]
    outcome = subprocess.run(
        [*command, "--parent", str(os.getpid())], input="\n", capture_output=True, text=True, timeout=300, check=False
    )
    assert outcome.returncode == 1 and outcome.stderr == "no key on standard input\n"
