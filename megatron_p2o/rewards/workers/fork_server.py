"""A process that has a program loaded and warm, and forks workers from itself. Run as a file, never imported.

    python fork_server.py PARENT_PID MEMORY_LIMIT_MIB DEADLINE_S TIMEOUT_S     its standard input is a socket

Its first message is what the workers do: {"functions": [...]}, the reward functions to call, or {"functions": null} for
the algebra of `MathGrader`. It answers "ready N", N being the requests a worker may have at a time, or "refused WHY".
Then it answers "fork", which comes with a socket for the new worker, with the worker's process id, and "end PID" with
the worker's wait status.

What a worker reads and writes stands in `loop.py`. It starts as warm as its parent, in milliseconds: losing one costs
little.
"""

import asyncio
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import warnings
from typing import TYPE_CHECKING

from megatron_p2o.processes import end_with_parent

if TYPE_CHECKING:
    from megatron_p2o.rewards.workers.loop import Program

MAX_MESSAGE_BYTES = 64
MAX_PROGRAM_BYTES = 1 << 18
MAX_REFUSAL_BYTES = 8_000


def main() -> None:
    parent, memory_limit_mib = int(sys.argv[1]), int(sys.argv[2])
    deadline_s, timeout_s = float(sys.argv[3]), float(sys.argv[4])
    end_with_parent(parent)
    limit_bytes = memory_limit_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # With gmpy2 an overflow aborts the process, and its long operations cannot be told apart from a hang.
    os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1", OMP_NUM_THREADS="1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    connection = socket.socket(fileno=0)
    try:
        program = loaded(json.loads(connection.recv(MAX_PROGRAM_BYTES)), limit_bytes)
    except ValueError as error:
        connection.send(f"refused {error}".encode()[:MAX_REFUSAL_BYTES])
        return
    # What is there now stays shared with the workers: a collection in one of them would copy it.
    gc.freeze()
    connection.send(f"ready {program.max_at_once}".encode())
    serve(connection, program, deadline_s, timeout_s)


def loaded(description: dict[str, object], memory_limit_bytes: int) -> "Program":
    """Import what workers need, under the limits and the environment above. Raises `ValueError`."""
    if description["functions"] is None:
        from megatron_p2o.rewards.workers.algebra import Algebra

        return Algebra(memory_limit_bytes)
    from megatron_p2o.records import from_json
    from megatron_p2o.rewards.functions import RewardSpec
    from megatron_p2o.rewards.workers.calls import Calls

    return Calls(from_json(list[RewardSpec], description["functions"]))


def serve(parent: socket.socket, program: "Program", deadline_s: float, timeout_s: float) -> None:
    """Fork and end workers until the parent closes its end, and then those that are left."""
    workers: set[int] = set()
    server = os.getpid()
    while True:
        message, descriptors, _, _ = socket.recv_fds(parent, MAX_MESSAGE_BYTES, 1)
        command, _, argument = message.decode().partition(" ")
        if command == "fork":
            worker = os.fork()
            if worker == 0:
                parent.close()
                work(server, socket.socket(fileno=descriptors[0]), program, deadline_s, timeout_s)
            os.close(descriptors[0])
            workers.add(worker)
            parent.send(str(worker).encode())
        elif command == "end":
            workers.remove(int(argument))
            parent.send(str(ended(int(argument))).encode())
        else:
            break
    for worker in workers:
        ended(worker)


def ended(worker: int) -> int:
    """Kill a worker, unless it has died before, and return its wait status."""
    os.kill(worker, signal.SIGKILL)  # nobody else has its id: the dead keep theirs until they are waited for
    return os.waitpid(worker, 0)[1]


def work(server: int, connection: socket.socket, program: "Program", deadline_s: float, timeout_s: float) -> None:
    """Be a worker; does not return."""
    try:
        end_with_parent(server)
        # Libraries print, and a parser that cannot read an answer says so on standard error, for every answer.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        from megatron_p2o.rewards.workers.loop import RequestLoop

        asyncio.run(RequestLoop(program, deadline_s, timeout_s).serve(connection))
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
