"""Locks a run's folder for one `p2o` process at a time."""

import errno
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_p2o.files import naming
from megatron_p2o.terminal import say

LOCK_FILE = "lock"
FILES = (LOCK_FILE, "config.yaml", "hard_samples.jsonl", "history.jsonl", "metrics.jsonl", "results.json", "stop")
FOLDERS = ("answers", "checkpoints", "engines", "evaluations", "evolution", "rollouts", "templates")
"""What runs and evaluations write into their folder."""

POLL_S = 0.5

logger = logging.getLogger(__name__)


@contextmanager
def hold_run(run_dir: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the folder, which is made if need be, until the end or until this process ends, however it does.

    `patience_s`: how long to wait for another process to let it go.

    Raises:
        ValueError: another process holds it; the message says which. Or something in it is of the wrong kind.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _check_kinds(run_dir)
    path = run_dir / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        if not _lock(file, time.monotonic() + patience_s):
            file.seek(0)
            raise ValueError(
                f"{run_dir} is in use by {file.read().strip() or 'another process'}: wait until that has ended, touch "
                f"{run_dir}/stop to have training save and end, or choose another run.name (p2o eval: --output). If "
                f"it no longer exists and its machine did not release the lock, remove {path}"
            )
        with naming(path):
            file.truncate(0)
            # Past the buffer, which would be written again when the file is closed, and fail again without a name.
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _check_kinds(run_dir: Path) -> None:
    """Raise `ValueError` for a folder where a run writes a file, and the reverse: a rank would say so after minutes."""
    for name in FILES:
        if (run_dir / name).is_dir():
            raise ValueError(f"{run_dir / name} is a folder where a file belongs: move it away")
    for name in FOLDERS:
        if (run_dir / name).exists() and not (run_dir / name).is_dir():
            raise ValueError(f"{run_dir / name} is a file where a folder belongs: move it away")


def _lock(file: IO[str], deadline: float) -> bool:
    """Return whether the file is ours, tried again until `deadline`; true where it cannot be locked at all."""
    has_waited = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            if not has_waited:
                say(f"waiting for another p2o to let go of {file.name}", sys.stderr)
            has_waited = True
            time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise ValueError(f"{file.name} cannot be locked: {error}") from error
            logger.warning("%s cannot be locked (%s): nothing keeps a second p2o out of its folder", file.name, error)
            return True
