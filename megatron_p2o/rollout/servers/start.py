"""Starts the servers of a run on this machine, each with its log, and the relay in front of them."""

import os
import secrets
import select
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from megatron_p2o.config.tree import Config
from megatron_p2o.processes import HostMemory, child_environment, host_memory_of
from megatron_p2o.rollout.servers.relay import ENGINE_KEY, ENGINE_URL
from megatron_p2o.rollout.servers.relay_link import RelayRoute
from megatron_p2o.rollout.servers.server import EngineServer, EngineStartFailed, Server, open_private
from megatron_p2o.rollout.servers.server_arguments import (
    EnginePlace,
    engine_places,
    longest_tokens,
    server_arguments,
)
from megatron_p2o.terminal import WaitLine, duration_text

RELAY_MODULE = "megatron_p2o.rollout.servers.relay"
LISTEN_TIMEOUT_S = 120.0
"""Time limit for a process that is to listen."""

HEALTH_TIMEOUT_S = 10.0

START_SHOWN_S = 1.0
"""Time between two looks at how many servers answer."""


def start_server(config: Config, run_dir: Path, place: EnginePlace, restart: int) -> EngineServer:
    """Start the process of an engine on this machine; see `EngineServer`. A restarted one has a log of its own.

    Raises:
        ValueError: `sglang` holds an argument that another setting decides.
    """
    arguments = server_arguments(config, place, torch.cuda.device_count())
    log_path = engine_log(run_dir, place, restart)
    return EngineServer(place.name, arguments, log_path, longest_tokens(config))


def start_servers(config: Config, run_dir: Path, num_nodes: int) -> dict[str, EngineServer]:
    """Start the processes of the engines on rank 0's machine, by name. Their imports then do not add to the start.

    They serve once `start_engines` is given them. Whoever starts them must stop them; they die with this process.
    Raises as `start_server`.
    """
    places = engine_places(config.rollout.num_engines, num_nodes)
    return {place.name: start_server(config, run_dir, place, 0) for place in places if place.node == 0}


def start_reflection_server(config: Config, run_dir: Path, num_engines_here: int) -> EngineServer:
    """Start a server of the initial policy with its tokenizer and wait for it; the caller must `stop` it.

    It speaks OpenAI's chat completions at `base_url`/v1 for the bearer of `api_key`, and its weights never change.
    `num_engines_here`: engines on this machine, whose GPUs it leaves alone while there are others.
    """
    place = EnginePlace(index=config.rollout.num_engines, node=0, slot=num_engines_here)
    arguments = server_arguments(config, place, torch.cuda.device_count())
    arguments["skip_tokenizer_init"] = False
    arguments["enable_memory_saver"] = False  # evolution goes on while the policy is trained
    server = EngineServer("reflection server", arguments, run_dir / "engines" / "reflection.log")
    with ThreadPoolExecutor(1, thread_name_prefix="reflection-start") as waits, ExitStack() as unless_it_answers:
        unless_it_answers.callback(server.stop)  # which ends the wait
        server.begin()
        wait_until_all_answer("the reflection server", [server], config.rollout.startup_timeout_s, waits)
        unless_it_answers.pop_all()
        return server


def wait_until_all_answer(what: str, servers: Sequence[Server], timeout_s: float, threads: ThreadPoolExecutor) -> None:
    """Return when every server answers, with `threads` ended, and show meanwhile how many do.

    Raises as `Server.wait_until_ready` of one that does not. The others are then still waited for, in `threads`, until
    they are stopped.
    """
    began = time.monotonic()
    futures = [threads.submit(server.wait_until_ready, timeout_s) for server in servers]
    with closing(WaitLine()) as line:
        while True:
            _, left = wait(futures, START_SHOWN_S, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
            if not left:
                threads.shutdown()
                return
            gone = duration_text(time.monotonic() - began)
            line.show(
                f"starting {what}: {len(futures) - len(left)} of {len(futures)} answer after {gone}, at most "
                f"{duration_text(timeout_s)} (rollout.startup_timeout_s)"
            )


def engine_log(run_dir: Path, place: EnginePlace, restart: int) -> Path:
    """Return where an engine's output goes."""
    suffix = f".restart-{restart}" if restart else ""
    return run_dir / "engines" / f"engine-{place.index}{suffix}.log"


@dataclass(frozen=True, kw_only=True, slots=True)
class RelayProcess:
    """A relay of this node."""

    process: "subprocess.Popen[bytes]"
    url: str
    key: str

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def answers(self) -> bool:
        """Return whether it answers, and not only lives."""
        request = urllib.request.Request(f"{self.url}/health", headers={"Authorization": f"Bearer {self.key}"})
        try:
            with urllib.request.urlopen(request, timeout=HEALTH_TIMEOUT_S):
                return True
        except OSError:
            return False

    def route_to(self, base_url: str, api_key: str) -> RelayRoute:
        """Return the route to an engine of this node."""
        headers = {"Authorization": f"Bearer {self.key}", ENGINE_URL: base_url, ENGINE_KEY: api_key}
        return RelayRoute(url=f"{self.url}/relay", headers=headers)

    def stop(self) -> None:
        """Kill it. Idempotent."""
        self.process.kill()
        self.process.wait()


class HeadRelay:
    """The relay of rank 0's node; another takes its place when it is found dead or hung. Whoever makes it closes it."""

    def __init__(self, folder: Path) -> None:
        """`folder`: where its log goes."""
        self._folder = folder
        self._lock = threading.Lock()
        self._starts = count()
        self._process: RelayProcess | None = None

    def current(self) -> RelayProcess:
        """Return a relay that answers, after starting it if need be. From any thread; it ends with the starting one.

        Raises:
            EngineStartFailed
        """
        with self._lock:
            if self._process is None or not self._process.answers():
                self._stop()
                self._process = self._start(next(self._starts))
            return self._process

    def host_memory(self) -> HostMemory:
        """Return what it holds; nothing when there is none."""
        relay = self._process
        return HostMemory() if relay is None else host_memory_of([relay.process.pid])

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _start(self, restart: int) -> RelayProcess:
        key = secrets.token_urlsafe(32)
        log_path = self._folder / (f"relay.restart-{restart}.log" if restart else "relay.log")
        process, url = start_listener([RELAY_MODULE], key, log_path, "the relay of this node")
        return RelayProcess(process=process, url=url, key=key)


def start_listener(
    arguments: Sequence[str], key: str, log_path: Path, what: str
) -> tuple["subprocess.Popen[bytes]", str]:
    """Start a Python module as a child process that ends with the calling thread, and return the URL it prints.

    Raises:
        EngineStartFailed: it did not come up.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open_private(log_path) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments, "--parent", str(os.getpid())],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError), process.stdin as pipe:  # it died: what it printed says why
        pipe.write(f"{key}\n".encode())
    listens = select.poll()  # select() takes no descriptor above 1023
    listens.register(process.stdout, select.POLLIN)
    url = process.stdout.readline().decode().strip() if listens.poll(LISTEN_TIMEOUT_S * 1000) else ""
    if not url:
        process.kill()
        process.wait()
        raise EngineStartFailed(
            f"{what} did not listen within {LISTEN_TIMEOUT_S:g} s; log: {log_path}\n{log_path.read_text()}"
        )
    return process, url
