"""The one message a failed run ends with: ranks leave word in the run's folder, `launch` tells who failed first."""

import errno
import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_p2o.files import write_whole

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

BEFORE_TRACEBACK = "\n\nwhere it happened:\n"

STOP_TIMEOUT_S = 60
"""How long the ranks may take to end their engines after SIGTERM before they are killed."""


def error_file(run_dir: Path, rank: int) -> Path:
    """Return where a rank leaves what ended it."""
    return run_dir / f"error-rank-{rank}.txt"


def report_error(run_dir: Path, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Leave what ended this rank in its error file, message first; print it where that cannot be written."""
    message = f"{kind.__name__}: {error}"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        free_mib = shutil.disk_usage(run_dir).free >> 20
        message += f" in or below {run_dir}, with {free_mib} MiB free there: free some space and start the run again"
    path = error_file(run_dir, int(os.environ.get("RANK", "0")))
    try:
        write_whole(path, f"{message}{BEFORE_TRACEBACK}{''.join(traceback.format_exception(kind, error, trace))}")
    except OSError as unwritten:
        print(f"p2o: {message}\np2o: {path} could not be written: {unwritten}", file=sys.stderr, flush=True)


def failure_message(failures: Mapping[int, ProcessFailure], run_dir: Path, node: str) -> str:
    """Return which rank failed first and how; the others, whose connections to it broke, are left out.

    `failures`: of this node's ranks, by rank, those included that the agent ended because one had failed.
    """
    first_s = min(failure.timestamp for failure in failures.values())

    def order(rank: int) -> tuple[bool, bool, float]:
        # A rank that a signal ends leaves no word, but its peers do. SIGTERM, and what comes so late, is the agent's.
        failure, words = failures[rank], error_file(run_dir, rank)
        is_consequence = failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)
        is_consequence |= failure.timestamp >= first_s + STOP_TIMEOUT_S
        return is_consequence, failure.exitcode > 0, words.stat().st_mtime if words.exists() else math.inf

    rank = min(failures, key=order)
    failure, words = failures[rank], error_file(run_dir, rank)
    how = f"ended with status {failure.exitcode}" if failure.exitcode > 0 else f"was ended by {failure.signal_name()}"
    lines = [f"p2o: rank {rank} on {node} {how}; the run is in {run_dir}"]
    if failure.exitcode == -signal.SIGKILL:
        lines.append("p2o: the kernel sends SIGKILL when memory runs out, and says so in dmesg")
    elif words.exists():
        message = words.read_text(encoding="utf-8").partition(BEFORE_TRACEBACK)[0]
        lines = [f"p2o: {message}", f"p2o: where it happened: {words}", *lines]
    return "\n".join(lines)
