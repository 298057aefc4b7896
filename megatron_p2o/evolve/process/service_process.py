"""Rank 0's handle of the evolution process, and the thread from which rank 0 talks to it."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from megatron_p2o.evolve.process.messages import MAX_LINE_BYTES, Message, decode, encode

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

STOP_GRACE_S = 5.0
"""For the service to end by itself once its socket is closed; then it is killed."""


class ServiceLost(Exception):
    """The evolution process ended, or answers no more."""


class ServiceProcess:
    """A running `megatron_p2o.evolve.process.service`."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: Path
    ) -> None:
        self.process_id = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer
        self._log = log

    @classmethod
    async def start(cls, run_dir: Path, environment: Mapping[str, str]) -> "ServiceProcess":
        """Start it in a process group of its own. It dies with the calling thread: call from one that lives on."""
        ours, theirs = socket.socketpair()
        log = run_dir / "evolution" / "service.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_p2o.evolve.process.service", "--parent", str(os.getpid())]
        with theirs, log.open("ab") as output:
            process = subprocess.Popen(
                [*command, "--socket-fd", str(theirs.fileno()), "--run-dir", str(run_dir)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment),
                start_new_session=True,
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        return cls(process, reader, writer, log)

    def send(self, message: Message) -> None:
        """Queue a message. A lost service shows in `receive`."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def receive(self) -> Message:
        """Return the next message. Raise `ServiceLost` when the process is gone."""
        try:
            line = await self._reader.readline()
        except ConnectionError as error:
            raise ServiceLost(f"the evolution service hung up ({error}): see {self._log}") from error
        if not line.endswith(b"\n"):
            raise ServiceLost(f"the evolution service (process {self.process_id}) ended: see {self._log}")
        return decode(line)

    async def stop(self) -> None:
        """Close the socket, wait, and kill what has not ended."""
        self._writer.close()
        try:
            await asyncio.to_thread(self._process.wait, STOP_GRACE_S)
            return
        except subprocess.TimeoutExpired:
            self._process.kill()
        try:
            await asyncio.to_thread(self._process.wait, STOP_GRACE_S)
        except subprocess.TimeoutExpired:  # stuck in the kernel: it dies when it comes back, and nobody talks to it
            logger.warning("evolution: process %d does not end after SIGKILL", self.process_id)


async def _cancel_other_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class LoopThread:
    """A thread that runs an event loop until it is closed; does not keep the interpreter alive."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Result]) -> "Future[Result]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, timeout_s: float) -> None:
        """Cancel what still runs in the loop, and stop it; what will not end in `timeout_s` is abandoned."""
        with suppress(TimeoutError):
            self.submit(_cancel_other_tasks()).result(timeout_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._loop.close()
