"""A process that has math-verify loaded and warm, and forks workers from itself. Run as a file, never imported.

    python fork_server.py PARENT_PID MEMORY_LIMIT_MIB DEADLINE_S     its standard input is a socket

It writes "ready", then answers "fork", which comes with a socket for the new worker, with the worker's process id, and
"end PID" with the worker's wait status.

A worker reads one JSON request per line, {"gold": ..., "answers": [...]}, and writes one line: "correct" when every
answer equals the gold one, "incorrect", or "out_of_memory"; and the bytes of memory it has used at most. The kernel
ends it (SIGPROF) when one request has taken DEADLINE_S of processor time: alarms that a process handles itself do not
interrupt arithmetic on long integers. It starts as warm as its parent, in milliseconds: losing one costs little.
"""

import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import warnings

from megatron_p2o.processes import end_with_parent

MEMORY_ALARM = 0.75
"""Share of the memory limit in use above which "incorrect" is not believed: sympy turns a failed allocation into it."""

MAX_MESSAGE_BYTES = 64

WARM_UP = (
    ("0.5", r"\frac{1}{2}"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
    ("x^2+y^2=1", "x^2+y^2-1=0"),
    ("0<x<1", "(0,1)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\sqrt{2}+\sqrt{3}", "3.1462643699"),
    (r"\log_{2}9", r"\frac{\ln 9}{\ln 2}"),
    (r"\binom{10}{3}", "120"),
    (r"\sum_{k=1}^{3}k", "6"),
    ("2+3i", "3i+2"),
    ("x+1", "y+1"),
)
"""Gold and answer of every kind: sympy imports and builds its tables when it first meets one."""


def main() -> None:
    parent, memory_limit_mib, deadline_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    end_with_parent(parent)
    limit_bytes = memory_limit_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # With gmpy2 an overflow aborts the process, and its long operations cannot be told apart from a hang.
    os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1", OMP_NUM_THREADS="1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    from megatron_p2o.rewards.worker import is_match  # under the limits and the environment above

    for gold, answer in WARM_UP:
        is_match([answer], gold)
    # What is there now stays shared with the workers: a collection in one of them would copy it.
    gc.freeze()
    serve(socket.socket(fileno=0), limit_bytes, deadline_s)


def serve(parent: socket.socket, limit_bytes: int, deadline_s: float) -> None:
    """Fork and end workers until the parent closes its end, and then those that are left."""
    workers: set[int] = set()
    server = os.getpid()
    parent.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(parent, MAX_MESSAGE_BYTES, 1)
        command, _, argument = message.decode().partition(" ")
        if command == "fork":
            worker = os.fork()
            if worker == 0:
                parent.close()
                work(server, socket.socket(fileno=descriptors[0]), limit_bytes, deadline_s)
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


def work(server: int, connection: socket.socket, limit_bytes: int, deadline_s: float) -> None:
    """Be a worker; does not return."""
    try:
        end_with_parent(server)
        # Libraries print, and a parser that cannot read an answer says so on standard error, for every answer.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        answer_requests(connection, limit_bytes, deadline_s)
    finally:
        os._exit(0)


def answer_requests(connection: socket.socket, limit_bytes: int, deadline_s: float) -> None:
    for line in connection.makefile("rb"):
        signal.setitimer(signal.ITIMER_PROF, deadline_s)
        verdict = verdict_on(line, limit_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(f"{verdict} {peak_bytes()}\n".encode())


def verdict_on(line: bytes, limit_bytes: int) -> str:
    from megatron_p2o.rewards.worker import is_match

    try:
        request = json.loads(line)
        verdict = "correct" if is_match(request["answers"], request["gold"]) else "incorrect"
    except MemoryError:
        return "out_of_memory"
    return "out_of_memory" if verdict == "incorrect" and peak_bytes() > MEMORY_ALARM * limit_bytes else verdict


def peak_bytes() -> int:
    """Return the most address space this process has had."""
    with open("/proc/self/status") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmPeak:"))
    return peak_kib * 1024


if __name__ == "__main__":
    main()
