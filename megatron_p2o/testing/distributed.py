"""Run a function on several gloo ranks of this machine: how the multi-rank tests start."""

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HANG_TIMEOUT_S = 1200.0
"""Ranks that run longer wait for one another for ever. No machine that is merely busy takes as long."""

GRACE_S = 3.0
"""How long the other ranks may take to finish after one has failed; their errors are reported too."""


def run_gloo_ranks(
    function: Callable[..., Any], world_size: int, *args: object, timeout_s: float = HANG_TIMEOUT_S
) -> list[Any]:
    """Return what `function(*args)` returns on each of `world_size` ranks, in rank order.

    Ranks are forked, so that what this process has imported is imported already (CPU only: a process that has used CUDA
    cannot fork). Each has torch.distributed initialised on gloo and the environment of torchrun; one thread each.
    Results must be picklable; large tensors are copied.

    Raises:
        RuntimeError: a rank raised or died; the message holds every failed rank's traceback.
        TimeoutError: some ranks did not end within `timeout_s`; they have been killed.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="gloo_ranks_") as directory:
        processes: list[BaseProcess] = []
        receivers: list[Connection] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                task = (function, args, rank, world_size, Path(directory) / "store")
                process = context.Process(target=_run_rank, args=(sender, *task), daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                receivers.append(receiver)
            outcomes = _collect(processes, receivers, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
    _raise_for_failures(outcomes, function, timeout_s)
    return [outcome[1] for outcome in outcomes if outcome is not None]


def _run_rank(
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[object, ...],
    rank: int,
    world_size: int,
    store: Path,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "WORLD_SIZE": str(world_size),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    # What the parent left to the collector must not be collected here: a process group has threads only there.
    gc.freeze()
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        outcome = pickle.dumps((True, function(*args)))
    except BaseException:  # the traceback crosses to the parent, which raises it
        outcome = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(outcome)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Forked interpreters skip teardown: at-exit hooks belong to the parent.
    os._exit(0)


def _collect(
    processes: list[BaseProcess], receivers: list[Connection], deadline: float
) -> list[tuple[bool, Any] | None]:
    """Return (succeeded, result or traceback) by rank, None for a rank that did not end in time."""
    outcomes: list[tuple[bool, Any] | None] = [None] * len(processes)
    waiting = dict(zip(receivers, range(len(receivers)), strict=True))
    while waiting and (left := deadline - time.monotonic()) > 0:
        for receiver in wait(list(waiting), timeout=left):
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            outcomes[rank] = outcome = _receive(receiver, processes[rank])
            if not outcome[0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return outcomes


def _receive(receiver: Connection, process: BaseProcess) -> tuple[bool, Any]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join(GRACE_S)
        return False, f"the process died without an exception (exit code {process.exitcode})"


def _raise_for_failures(
    outcomes: list[tuple[bool, Any] | None], function: Callable[..., Any], timeout_s: float
) -> None:
    name = getattr(function, "__name__", repr(function))
    failures = [f"rank {rank}:\n{outcome[1]}" for rank, outcome in enumerate(outcomes) if outcome and not outcome[0]]
    if failures:
        raise RuntimeError(f"{name} failed on {len(failures)} of {len(outcomes)} ranks\n" + "\n".join(failures))
    unfinished = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
    if unfinished:
        raise TimeoutError(f"{name} did not end on ranks {unfinished} within {timeout_s:g} s; they were killed")
