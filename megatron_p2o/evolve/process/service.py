"""The evolution process, which rank 0 starts with one end of a socket pair.

It holds texts only: rank 0 renders, samples on the training engines and grades. It ends with rank 0, and a crash of it
costs evolution, never training.
"""

import argparse
import asyncio
import itertools
import logging
import os
import socket
from pathlib import Path

from megatron_p2o.evolve.process.conduct import conduct_round, split_of
from megatron_p2o.evolve.process.messages import (
    MAX_LINE_BYTES,
    FinishRound,
    Message,
    Notice,
    RoundPublished,
    StartRound,
    TrialReply,
    TrialRequest,
    decode,
    encode,
)
from megatron_p2o.evolve.reflection.reflectors import build_reflector
from megatron_p2o.evolve.search.round import RoundSpec
from megatron_p2o.evolve.trial import Rejection, Trial, TrialFailed
from megatron_p2o.processes import end_with_parent
from megatron_p2o.terminal import set_up_logging


class RemoteTrialRunner:
    """Asks rank 0; any number of requests may be in flight."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[TrialReply]] = {}

    async def run_trial(
        self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
    ) -> Trial | Rejection:
        number = next(self._numbers)
        reply: asyncio.Future[TrialReply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = reply
        request = TrialRequest(
            request=number,
            template_text=template_text,
            problem_id=problem_id,
            temperature=temperature,
            sample=sample,
        )
        self._writer.write(encode(request))
        try:
            answered = await reply
        finally:
            del self._waiting[number]
        if answered.trial is not None:
            return answered.trial
        if answered.rejection is not None:
            return Rejection(reason=answered.rejection)
        raise TrialFailed(answered.failure)

    def deliver(self, reply: TrialReply) -> None:
        """Give an answer to its waiting request. An answer without one is dropped."""
        waiting = self._waiting.get(reply.request)
        if waiting is not None and not waiting.done():
            waiting.set_result(reply)


class Service:
    """Serves rounds, one at a time, until rank 0 is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, run_dir: Path) -> None:
        self._reader = reader
        self._writer = writer
        self._run_dir = run_dir
        self._runner = RemoteTrialRunner(writer)
        self._finish = asyncio.Event()

    async def serve(self) -> None:
        """Return when rank 0 closes its end. A round that raises ends the service: rank 0 sees it and its log."""
        receiving = asyncio.ensure_future(self._reader.readline())
        conducting: asyncio.Task[None] | None = None
        while True:
            waited = [receiving] if conducting is None else [receiving, conducting]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if conducting is not None and conducting.done():
                conducting.result()
                conducting = None
            if receiving.done():
                line = receiving.result()
                if not line:
                    return
                conducting = self._receive(decode(line)) or conducting
                receiving = asyncio.ensure_future(self._reader.readline())

    def _receive(self, message: Message) -> asyncio.Task[None] | None:
        match message:
            case StartRound():
                self._finish.clear()
                return asyncio.ensure_future(self._conduct(message.spec))
            case FinishRound():
                self._finish.set()
            case TrialReply():
                self._runner.deliver(message)
            case _:
                raise ValueError(f"{type(message).__name__} is not for the service")
        return None

    async def _conduct(self, spec: RoundSpec) -> None:
        split = split_of(spec)
        if split is None:
            raise ValueError(f"{len(spec.problems)} hard problems are too few for a round: rank 0 should not ask")
        reflector = build_reflector(
            spec.settings.evolution.reflection, spec.settings.seed, os.environ, spec.settings.control_tokens
        )
        try:
            stats = await conduct_round(spec, split, self._run_dir, self._runner, reflector, self._finish, self._notify)
        finally:
            await reflector.close()
        self._writer.write(encode(RoundPublished(stats=stats)))

    def _notify(self, text: str) -> None:
        logging.warning(text)
        self._writer.write(encode(Notice(text=text)))


async def serve_socket(connection: socket.socket, run_dir: Path) -> None:
    reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_LINE_BYTES)
    await Service(reader, writer, run_dir).serve()


def main() -> None:
    parser = argparse.ArgumentParser(description="Evolve templates for rank 0; not meant to be started by hand.")
    parser.add_argument("--socket-fd", type=int, required=True, help="inherited end of a socket pair")
    parser.add_argument("--parent", type=int, metavar="PID", required=True, help="ends with this process")
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args()
    end_with_parent(arguments.parent)
    set_up_logging(f"%(asctime)s {os.getpid()} %(levelname)s %(message)s")
    connection = socket.socket(fileno=arguments.socket_fd)
    try:
        asyncio.run(serve_socket(connection, arguments.run_dir))
    except (ConnectionResetError, BrokenPipeError):
        logging.warning("rank 0 is gone")


if __name__ == "__main__":
    main()
