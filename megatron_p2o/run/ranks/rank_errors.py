"""The one message of a failed run: ranks write their errors to the run's folder, and `launch` reports the first.

A rank that raises writes its error and traceback. If it cannot, the launcher of its node writes how it ended. All nodes
share the folder, so each can report the ranks of the others.
"""

import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_p2o.errors import DISK_FULL, expected_message
from megatron_p2o.files import write_whole
from megatron_p2o.terminal import printable, say

BEFORE_TRACEBACK = "\n\nwhere it happened, on "

STOP_TIMEOUT_S = 60
"""Time limit for the ranks to end their engines after SIGTERM before they are killed."""

SHORTEST_STOP_TIMEOUT_S = 30
"""The same where torch's agent cannot be told (torch 2.11)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LastWords:
    """What is known of a rank that failed."""

    rank: int
    message: str
    host: str
    """Host of the rank that raised; "" if the launcher wrote the record for it."""
    time_s: float
    """Time of the record, in seconds since the epoch."""


def error_file(run_dir: Path, rank: int) -> Path:
    """Return where a rank leaves what ended it."""
    return run_dir / f"error-rank-{rank}.txt"


def forget_errors(run_dir: Path) -> None:
    """Remove what the ranks of earlier starts have left."""
    for path in run_dir.glob("error-rank-*.txt"):
        path.unlink(missing_ok=True)


def host_name() -> str:
    """Return how messages call this machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def report_error(run_dir: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Leave what ended this rank in its error file, message first; print it where that cannot be written."""
    message = expected_message(error) or f"{kind.__name__}: {error}"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        free_mib = shutil.disk_usage(run_dir).free >> 20
        message += f" in or below {run_dir}, where {free_mib} MiB are free, and start the run again"
    path = error_file(run_dir, int(os.environ.get("RANK", "0")))
    where = "".join(traceback.format_exception(kind, error, trace))
    try:
        # A person reads the file on a terminal.
        write_whole(path, printable(f"{message}{BEFORE_TRACEBACK}{host_name()}:\n{where}"))
    except OSError as unwritten:
        say(f"p2o: {message}\np2o: {path} could not be written: {unwritten}", sys.stderr)


def read_words(run_dir: Path) -> list[LastWords]:
    """Return what ranks have left, and launchers for theirs."""
    words: list[LastWords] = []
    for path in run_dir.glob("error-rank-*.txt"):
        message, _, rest = path.read_text(encoding="utf-8").partition(BEFORE_TRACEBACK)
        rank, host = int(path.stem.rpartition("-")[2]), rest.partition(":\n")[0]
        words.append(LastWords(rank=rank, message=message, host=host, time_s=path.stat().st_mtime))
    return words


def failure_message(failures: Mapping[int, ProcessFailure], run_dir: Path, node: str) -> str:
    """Return which rank of the run failed first and how; the others, whose connections to it broke, are left out.

    `failures`: every failed rank of this node, including those the agent stopped afterwards. A rank that died without
    writing its error gets a record here. A rank of another node is reported once its record exists.
    """
    words = read_words(run_dir)
    words += [leave_word(rank, failures[rank], run_dir, node) for rank in silent_causes(failures, words)]
    if not words:
        rank = min(failures, key=lambda rank: failures[rank].timestamp)
        return f"p2o: rank {rank} on {node} {how_it_ended(failures[rank])}; the run is in {run_dir}"
    # Its peers may say that a rank is gone before its launcher notices.
    first = min(words, key=lambda words: (words.host != "", words.time_s))
    if not first.host:
        message, _, hint = first.message.partition("\n")
        return f"p2o: {message}; the run is in {run_dir}" + (f"\np2o: {hint}" if hint else "")
    return (
        f"p2o: {first.message}\np2o: where it happened: {error_file(run_dir, first.rank)}\n"
        f"p2o: rank {first.rank} on {first.host} failed first; the run is in {run_dir}"
    )


def silent_causes(failures: Mapping[int, ProcessFailure], words: Sequence[LastWords]) -> list[int]:
    """Return the ranks of this node that may have failed first and have left no word."""
    first_s = min(failure.timestamp for failure in failures.values())
    spoken = {each.rank for each in words}
    causes: list[int] = []
    for rank, failure in failures.items():
        # SIGTERM, and what comes so late, is the agent's.
        is_consequence = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        is_consequence |= failure.timestamp >= first_s + SHORTEST_STOP_TIMEOUT_S
        # NCCL aborts a rank whose peer is gone.
        may_follow = failure.exitcode > 0 or failure.exitcode == -signal.SIGABRT
        is_late = may_follow and any(each.time_s < failure.timestamp for each in words)
        if rank not in spoken and not is_consequence and not is_late:
            causes.append(rank)
    return causes


def leave_word(rank: int, failure: ProcessFailure, run_dir: Path, node: str) -> LastWords:
    """Say in a rank's error file how it ended, for the launchers of other nodes, and return that."""
    message = f"rank {rank} on {node} {how_it_ended(failure)}"
    if failure.exitcode == -signal.SIGKILL:
        message += "\nthe kernel sends SIGKILL when memory runs out, and says so in dmesg"
    with suppress(OSError):  # the disk is full: this node says it all the same
        write_whole(error_file(run_dir, rank), message)
    return LastWords(rank=rank, message=message, host="", time_s=failure.timestamp)


def how_it_ended(failure: ProcessFailure) -> str:
    """Return a rank's exit status or the signal that ended it, as a predicate."""
    return f"ended with status {failure.exitcode}" if failure.exitcode > 0 else f"was ended by {failure.signal_name()}"
