"""One SGLang server as a child process: started, watched, and stopped without leaving anything behind."""

import contextlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_p2o.processes import HostMemory, host_memory_of_family
from megatron_p2o.rollout.inside_sglang.launcher import EXIT_BAD_ARGUMENT, shared_memory_of
from megatron_p2o.rollout.servers.client import Mirror
from megatron_p2o.rollout.servers.environment import HOST, engine_environment
from megatron_p2o.rollout.servers.relay_link import RelayRoute
from megatron_p2o.rollout.servers.scratch import Scratch

logger = logging.getLogger(__name__)

LAUNCHER = "megatron_p2o.rollout.inside_sglang.launcher"

OWN_ARGUMENTS = (
    *("host", "port", "nccl_port", "dist_init_addr", "nnodes", "node_rank"),
    *("api_key", "admin_api_key", "tokenizer_worker_num"),
)
"""Not to be set from outside. With several tokenizer workers SGLang 0.5.21 serves without checking keys."""

START_POLL_S = 0.5
KILL_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 10.0
LOG_TAIL_LINES = 30
LOG_TAIL_BYTES = 1 << 18
"""Read from the end of the log; of a long run it is large."""

LOG_NOISE = re.compile(r"Ignore import error|Warning: |warnings\.warn")


class EngineStartFailed(RuntimeError):
    """A server died or did not answer before its deadline; the message ends with the last lines of its log."""


class Server(Protocol):
    """A server as the rest of the program sees it."""

    @property
    def name(self) -> str:
        """The name that errors use, e.g. "engine 0"."""
        ...

    @property
    def log_path(self) -> Path: ...

    @property
    def base_url(self) -> str: ...

    @property
    def api_key(self) -> str:
        """Opens /generate and the OpenAI routes."""
        ...

    @property
    def admin_key(self) -> str:
        """Opens the weight routes."""
        ...

    @property
    def mirror(self) -> Mirror | None:
        """Brings weights to the machine of the server; None when that is the trainer's."""
        ...

    @property
    def relay(self) -> RelayRoute | None:
        """How completions come from its node; None: as JSON, straight from the server."""
        ...

    def is_alive(self) -> bool:
        """Return whether the server process runs, and the relay before it."""
        ...

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return when the server answers; raise `EngineStartFailed` when it ended or `timeout_s` passed."""
        ...

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        ...

    def host_memory(self) -> HostMemory:
        """Return what the server and all it started hold; nothing when it is gone."""
        ...

    def stop(self) -> None:
        """Kill the server and all it started. Idempotent; from any thread."""
        ...


class EngineServer:
    """A running SGLang server. Whoever creates it owns it and must call `stop`; it dies with its parent anyway."""

    def __init__(self, name: str, arguments: Mapping[str, Any], log_path: Path, expected_cache_tokens: int = 0) -> None:
        """Start the process, which imports SGLang, and return without waiting; call `begin` next.

        Until then the log has a name of its own, so that a run that does not come to begin keeps the log of the last.

        Args:
            name: how errors call it, e.g. "engine 0".
            arguments: fields of SGLang's ServerArgs, `OWN_ARGUMENTS` excepted.
            log_path: receives everything the server prints; readable by this user only.
            expected_cache_tokens: a KV cache for fewer is warned of when the server is ready.

        Raises:
            ValueError: `arguments` sets something that is decided here.
        """
        for key in OWN_ARGUMENTS:
            if key in arguments:
                raise ValueError(f"sglang.{key} is decided by the program: remove it")
        self.name = name
        self._named_log_path = log_path
        self.log_path = log_path.with_name(f"{log_path.name}.starting")
        self.api_key = secrets.token_urlsafe(32)
        """Opens /generate and the OpenAI routes."""
        self.admin_key = secrets.token_urlsafe(32)
        """Opens the weight routes."""
        self.mirror: Mirror | None = None
        self.relay: RelayRoute | None = None
        self._relay_is_alive: Callable[[], bool] = bool
        self._expected_cache_tokens = expected_cache_tokens
        # SGLang would choose the second by itself, let it go and bind it seconds later, when others may have it.
        self._ports = {"port": reserve_port(), "nccl_port": reserve_port()}
        self.base_url = f"http://{HOST}:{self._ports['port'].getsockname()[1]}"
        self._scratch = Scratch()
        self._lock = threading.RLock()
        self._is_stopped = threading.Event()
        self._process = self._start(arguments)

    @property
    def pid(self) -> int:
        """Process id of the launcher, which leads its own session and process group."""
        return self._process.pid

    def begin(self) -> None:
        """Have the process load the model and serve, without waiting; call `wait_until_ready` next. Idempotent."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        self.log_path = self.log_path.rename(self._named_log_path)
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:  # it died: wait_until_ready says why
            pipe.write(b"\n")

    def serve_through(self, relay: RelayRoute, is_alive: Callable[[], bool]) -> None:
        """Have completions come through a relay, whose end is then the engine's."""
        self.relay, self._relay_is_alive = relay, is_alive

    def is_alive(self) -> bool:
        return self._runs() and (self.relay is None or self._relay_is_alive())

    def _runs(self) -> bool:
        """Return whether the process runs. Does not reap it, so that its group's id stays ours until `stop`."""
        with self._lock:
            if self._process.returncode is not None:
                return False
            try:
                return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            except ChildProcessError:  # foreign code in this process has reaped it
                return False

    def wait_until_ready(self, timeout_s: float) -> None:
        """Return when the server answers requests that carry its key.

        Raises:
            ValueError: an argument is unknown to the installed SGLang.
            EngineStartFailed: the process ended, or `timeout_s` passed. It is stopped then.
        """
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            self._scratch.note(shared_memory_of(self.pid))
            if self._is_stopped.is_set():
                raise EngineStartFailed(f"{self.name} was stopped while it started")
            if not self._runs():
                raise self._start_error("ended while starting")
            if time.monotonic() > deadline:
                raise self._start_error(f"did not answer within rollout.startup_timeout_s={timeout_s:g}")
            self._is_stopped.wait(START_POLL_S)
        self._ports["port"].close()  # the server has it
        self._scratch.note(shared_memory_of(self.pid))
        self._warn_of_a_small_cache()

    def log_tail(self) -> str:
        """Return the last lines of the log, without the noise of optional imports."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if not LOG_NOISE.search(line)][-LOG_TAIL_LINES:])

    def host_memory(self) -> HostMemory:
        return host_memory_of_family(self.pid)

    def stop(self) -> None:
        """Kill the server and all it started: it holds nothing worth the seconds of an orderly end.

        Idempotent; from any thread. What waits for it to be ready ends, also where the process cannot be killed.
        """
        self._is_stopped.set()
        with self._lock:
            if self._process.returncode is not None:
                return
            if self._runs():
                self._scratch.note(shared_memory_of(self.pid))
            with contextlib.suppress(ProcessLookupError):  # it was reaped, see `_runs`, and all it started has ended
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait(timeout=KILL_TIMEOUT_S)
            assert self._process.stdin is not None
            if not self._process.stdin.closed:  # it did not begin
                self._process.stdin.close()
                self.log_path.unlink(missing_ok=True)
        self._release_ports()
        self._scratch.remove()

    def _start(self, arguments: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        settings = {
            "parent_pid": os.getpid(),
            "scratch": str(self._scratch.path),
            "arguments": {
                **arguments,
                "host": HOST,
                **{name: holder.getsockname()[1] for name, holder in self._ports.items()},
                "api_key": self.api_key,
                "admin_api_key": self.admin_key,
            },
        }
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open_private(self.log_path) as log:
            process = subprocess.Popen(
                [sys.executable, "-m", LAUNCHER],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=engine_environment(arguments, self._scratch.path, self._ports["nccl_port"].getsockname()[1]),
                start_new_session=True,
                bufsize=0,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: wait_until_ready will say why
            process.stdin.write(json.dumps(settings).encode() + b"\n")
        return process

    def _release_ports(self) -> None:
        for holder in self._ports.values():
            holder.close()

    def _warn_of_a_small_cache(self) -> None:
        # SGLang takes less than it may where its GPU has less, and cuts responses to the length of the cache.
        try:
            tokens = self.cache_tokens() if self._expected_cache_tokens else 0
        except OSError:
            return  # it has just died: who watches it will say so
        if tokens < self._expected_cache_tokens:
            logger.warning(
                "the KV cache of %s holds %d tokens, fewer than a prompt and its response may have "
                "(data.max_prompt_tokens + rollout.max_new_tokens = %d): longer responses are cut off",
                self.name,
                tokens,
                self._expected_cache_tokens,
            )

    def _answers(self) -> bool:
        """/health says that warm-up is over; /model_info that this is our server, because it checks the key."""
        try:
            self._get("/health")
            self._get("/model_info")
        except OSError:
            return False
        return True

    def cache_tokens(self) -> int:
        """Return how many tokens the KV cache holds. Only once the server is ready.

        Raises:
            OSError: it does not answer any more.
        """
        return json.loads(self._get("/server_info"))["max_total_num_tokens"]

    def _get(self, path: str) -> bytes:
        request = urllib.request.Request(self.base_url + path, headers={"Authorization": f"Bearer {self.api_key}"})
        with urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S) as response:
            return response.read()

    def _start_error(self, what: str) -> Exception:
        tail = self.log_tail()
        self.stop()
        if self._process.returncode == EXIT_BAD_ARGUMENT:
            return ValueError(tail.splitlines()[-1])
        return EngineStartFailed(f"{self.name} {what}; last lines of {self.log_path}:\n{tail}")


def reserve_port() -> socket.socket:
    """Return a socket that holds a free loopback port without listening on it.

    While it is open no other process is given the port, yet a server that sets SO_REUSEADDR (every HTTP server does)
    can bind it and listen: two runs on one machine cannot collide between choosing and using a port.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((HOST, 0))
    return holder


def open_private(path: Path) -> IO[bytes]:
    """Open a new or emptied file that only this user can read."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode=0o600), "wb")
