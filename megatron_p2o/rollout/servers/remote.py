"""Engines on other nodes, as rank 0 sees them: through the daemon of their node."""

import asyncio
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_p2o.config.tree import Config
from megatron_p2o.processes import HostMemory
from megatron_p2o.records import from_json, from_text, to_json
from megatron_p2o.rollout.buckets.staging import StagingBuffer
from megatron_p2o.rollout.buckets.weight_message import MemoryAddress
from megatron_p2o.rollout.servers.answers import EngineUnreachable
from megatron_p2o.rollout.servers.relay_link import RelayRoute
from megatron_p2o.rollout.servers.server import EngineStartFailed, open_private
from megatron_p2o.rollout.servers.server_arguments import EnginePlace, engine_places
from megatron_p2o.rollout.servers.start import LISTEN_TIMEOUT_S, start_listener

logger = logging.getLogger(__name__)

ADDRESS_VARIABLE = "P2O_NODE_ADDRESS"
"""Environment variable: where the other nodes reach this one, if that is not where it sends from to the head."""

DAEMON_MODULE = "megatron_p2o.run.node_daemon"
ADDRESS_FILE = re.compile(r"daemon-\d+-[0-9a-f]{32}\.json")
CALL_TIMEOUT_S = 30.0
READY_POLL_S = 0.5
DAEMON_PATIENCE_S = LISTEN_TIMEOUT_S + 60
"""Longest wait for a daemon that takes the place of another."""

MAX_FAILED_STARTS = 3
"""Starts of a daemon in a row that may fail."""

END_S = 1.0
"""When a node's processes are ended together, this one is gone by then, and starts no other daemon."""

PIECE_BYTES = 1 << 22
"""Size of the pieces in which weights go to another node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DaemonAddress:
    """Address and key of the daemon of a node."""

    url: str
    key: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the daemon's answer.

        Raises:
            OSError: it is gone, silent, or refuses.
        """
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        with urllib.request.urlopen(request, timeout=CALL_TIMEOUT_S) as response:
            return json.load(response)

    def host_memory(self) -> HostMemory:
        """Return what the daemon itself holds, the weights for its engines among it; nothing when it is gone."""
        try:
            return HostMemory(**self.call("GET", "/memory"))
        except OSError:
            return HostMemory()


class NodeMirror:
    """Implements `client.Mirror`: sends each bucket to a node once, however many engines it has."""

    def __init__(self, address: DaemonAddress, timeout_s: float) -> None:
        self._address = address
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._placed: dict[int, tuple[int, asyncio.Task[MemoryAddress]]] = {}
        self._daemon = ""

    def meet(self, daemon: str) -> None:
        """Learn which process the daemon is: a new one holds nothing that was placed before. From any thread."""
        if daemon != self._daemon:
            self._daemon, self._placed = daemon, {}

    async def place(self, bucket: StagingBuffer) -> MemoryAddress:
        """Return where the bucket lies on the node; see `client.Mirror`."""
        filling, task = self._placed.get(bucket.slot, (None, None))
        has_failed = task is not None and task.done() and (task.cancelled() or task.exception() is not None)
        if task is None or filling != bucket.num_fillings or has_failed:
            task = asyncio.get_running_loop().create_task(self._send(bucket))
            self._placed[bucket.slot] = (bucket.num_fillings, task)
        return await asyncio.shield(task)

    async def _send(self, bucket: StagingBuffer) -> MemoryAddress:
        url = f"{self._address.url}/staging/{bucket.slot}"
        headers = {
            "Authorization": f"Bearer {self._address.key}",
            "X-Capacity": str(bucket.address.num_bytes),
        }
        try:
            async with (
                aiohttp.ClientSession(timeout=self._timeout) as session,
                session.put(url, data=pieces_of(bucket), headers=headers) as response,
            ):
                response.raise_for_status()
                return from_json(MemoryAddress, await response.json())
        except TimeoutError:
            raise TimeoutError(f"{url}: weights were not taken within {self._timeout.total:g} s") from None
        except aiohttp.ClientError as error:
            raise EngineUnreachable(f"{url}: {error!r}") from error


async def pieces_of(bucket: StagingBuffer) -> AsyncIterator[bytes]:
    """Yield the bytes of a bucket."""
    content = bucket.content.numpy().data
    for start in range(0, len(content), PIECE_BYTES):
        yield bytes(content[start : start + PIECE_BYTES])


class RemoteServer:
    """Implements `server.Server` for an engine of another node. Its keys are the daemon's, which knows the engine's."""

    def __init__(
        self, address: DaemonAddress, place: EnginePlace, restart: int, log_path: Path, mirror: NodeMirror
    ) -> None:
        """Have the daemon start the engine and return without waiting. `wait_until_ready` asks again if it is gone.

        Raises:
            EngineStartFailed: the daemon refuses.
        """
        self.name = place.name
        self.log_path = log_path
        self.base_url = f"{address.url}/engines/{place.index}"
        self.api_key = self.admin_key = address.key
        self.mirror: NodeMirror | None = mirror
        headers = {"Authorization": f"Bearer {address.key}"}
        self.relay: RelayRoute | None = RelayRoute(url=f"{address.url}/relays/{place.index}", headers=headers)
        self._address = address
        self._path = f"/servers/{place.index}"
        self._wanted = {"place": to_json(place), "restart": restart}
        self._meet = mirror.meet
        self._is_stopped = threading.Event()
        self._why_not_started = self._start()

    @property
    def pid(self) -> int:
        """Process id of the launcher, on its node."""
        return self._call("GET")["pid"]

    def is_alive(self) -> bool:
        try:
            return self._address.call("GET", self._path)["is_alive"]
        except OSError:
            return False

    def wait_until_ready(self, timeout_s: float) -> None:
        patience = time.monotonic() + min(DAEMON_PATIENCE_S, timeout_s)
        while self._why_not_started:
            if time.monotonic() > patience or self._is_stopped.wait(READY_POLL_S):
                raise EngineStartFailed(self._why_not_started)
            self._why_not_started = self._start()
        deadline = time.monotonic() + timeout_s
        while (description := self._call("GET"))["state"] != "ready":
            if description["state"] == "failed":
                raise EngineStartFailed(description["error"])
            if time.monotonic() > deadline:
                raise EngineStartFailed(f"{self.name} was not ready within rollout.startup_timeout_s={timeout_s:g}")
            if self._is_stopped.wait(READY_POLL_S):
                raise EngineStartFailed(f"{self.name} was stopped while it started")

    def log_tail(self) -> str:
        try:
            return self._address.call("GET", self._path)["log_tail"]
        except OSError as error:
            return f"the daemon of its node does not answer: {error}"

    def host_memory(self) -> HostMemory:
        try:
            return HostMemory(**self._address.call("GET", self._path)["host_memory"])
        except OSError:
            return HostMemory()

    def stop(self) -> None:
        self._is_stopped.set()
        try:
            self._address.call("DELETE", self._path)
        except OSError:
            return  # the daemon is gone, and its engines with it

    def _start(self) -> str:
        """Have the daemon start the engine; return why it does not answer, "" if it does."""
        try:
            self._meet(self._address.call("POST", self._path, self._wanted)["daemon"])
        except urllib.error.HTTPError as error:
            raise EngineStartFailed(self._told(error)) from error
        except OSError as error:
            return self._told(error)
        return ""

    def _call(self, method: str) -> dict[str, Any]:
        try:
            return self._address.call(method, self._path)
        except OSError as error:
            raise EngineStartFailed(self._told(error)) from error

    def _told(self, error: OSError) -> str:
        return f"{self.name}: the daemon of its node at {self._address.url}: {error}"


def meet_daemons(config: Config, config_path: Path) -> list[DaemonAddress]:
    """Start this node's daemon if it is this rank's to start; on rank 0 return all daemons. All ranks must call.

    A node that has engines but not rank 0 has a daemon. Its first rank starts it and leaves address and key in a file
    of the run's folder that only its user can read, and the name of that file in torch.distributed's store, which
    anybody in the nodes' network can read.

    Raises:
        EngineStartFailed: a daemon did not come up.
        TimeoutError: a file is not to be seen here.
    """
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    last_node = engine_places(config.rollout.num_engines, num_nodes)[-1].node
    if last_node == 0:
        return []
    store, node = _get_default_store(), int(os.environ["GROUP_RANK"])
    folder = config_path.parent / "engines"
    if dist.get_rank() == 0:
        keys = [f"{DAEMON_MODULE}/{other}" for other in range(1, last_node + 1)]
        deadline = time.monotonic() + config.parallel.timeout_s
        store.wait(keys, timedelta(seconds=config.parallel.timeout_s))
        return [take_address(folder, store.get(key).decode(), deadline) for key in keys]
    if 0 < node <= last_node and os.environ["LOCAL_RANK"] == "0":
        daemon = KeptDaemon(config_path, node, os.environ["MASTER_ADDR"])
        store.set(f"{DAEMON_MODULE}/{node}", leave_address(folder, node, daemon.address))
    return []


def leave_address(folder: Path, node_rank: int, address: DaemonAddress) -> str:
    """Write how to reach a daemon to a new file that only this user can read, and return its name."""
    name = f"daemon-{node_rank}-{secrets.token_hex(16)}.json"
    with open_private(folder / f".{name}") as file:
        file.write(json.dumps(to_json(address)).encode())
    (folder / f".{name}").rename(folder / name)
    return name


def take_address(folder: Path, name: str, deadline: float) -> DaemonAddress:
    """Return what `leave_address` has written, perhaps on another machine, and remove it.

    Raises:
        TimeoutError: it is not to be seen by `deadline`, in time.monotonic().
        ValueError: `name` is not one of `leave_address`.
    """
    if not ADDRESS_FILE.fullmatch(name):
        raise ValueError(f"{name!r} in the store of the ranks names no daemon: somebody else writes to it")
    path = folder / name
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}, written by another node, cannot be seen here: do all nodes share {folder}?")
        os.listdir(folder)  # has a network filesystem look again
        time.sleep(READY_POLL_S)
    address = from_text(DaemonAddress, path.read_bytes())
    path.unlink()
    return address


class KeptDaemon:
    """The daemon of this node, which ends with this process. When it ends before, another takes its place.

    That has its address and its key: rank 0 finds it where the other was, and has its engines started again.
    """

    def __init__(self, config_path: Path, node_rank: int, head_address: str) -> None:
        """Start it.

        Raises:
            EngineStartFailed: it did not come up.
        """
        self._config_path, self._node_rank = config_path, node_rank
        self._host = os.environ.get(ADDRESS_VARIABLE) or own_address(head_address)
        self._key = secrets.token_urlsafe(32)
        self._is_closed = threading.Event()
        self.process, url = self._start(restart=0, port=0)
        self.address = DaemonAddress(url=url, key=self._key)
        self._watcher = threading.Thread(target=self._watch, name="daemon-watch", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """End it for good."""
        self._is_closed.set()
        self.process.kill()
        self._watcher.join()

    def _watch(self) -> None:
        port, restart, num_failed = int(self.address.url.rpartition(":")[2]), 0, 0
        while num_failed < MAX_FAILED_STARTS:
            status = self.process.wait()
            if self._is_closed.wait(END_S):
                return
            restart += 1
            logger.warning("the daemon of node %d ended with status %d; it is started again", self._node_rank, status)
            try:
                self.process, _ = self._start(restart, port)
                num_failed = 0
                if self._is_closed.is_set():
                    self.process.kill()
            except EngineStartFailed as error:
                num_failed += 1
                logger.warning("%s", error)

    def _start(self, restart: int, port: int) -> tuple["subprocess.Popen[bytes]", str]:
        suffix = f".restart-{restart}" if restart else ""
        log_path = self._config_path.parent / "engines" / f"daemon-{self._node_rank}{suffix}.log"
        what = (
            f"the daemon of node {self._node_rank} at {self._host} (set {ADDRESS_VARIABLE} if that is not this node's "
            "address)"
        )
        arguments = [DAEMON_MODULE, str(self._config_path), self._host, "--port", str(port)]
        return start_listener(arguments, self._key, log_path, what)


def own_address(head_address: str) -> str:
    """Return the address this machine sends from when it talks to the head."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head_address, 9))  # a datagram socket sends nothing to connect
        return probe.getsockname()[0]
