"""The private folder of an engine, and the removal of what its killed processes left elsewhere."""

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from megatron_p2o.rollout.inside_sglang.launcher import LEFT_IN_SHARED_MEMORY, SHARED_MEMORY

PREFIX = "p2o-engine-"
LOCK_FILE = "in-use"
NOTES_FILE = "shared-memory"
"""Names of the engine's files in /dev/shm, one a line."""


class Scratch:
    """A folder for one engine, whose owner must call `remove`.

    A job that is ended by SIGKILL, all of it at once, removes nothing. So each folder is locked while its owner lives,
    and the next engine of the same user on this machine removes those that no one locks, with the files noted in them.
    """

    def __init__(self) -> None:
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._names: set[str] = set()
        self._guard = threading.Lock()
        unlocked = self.path / f".{LOCK_FILE}"
        self._lock = unlocked.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / LOCK_FILE)  # found by others only now that it is locked

    def note(self, files: Iterable[Path]) -> None:
        """Remember files in /dev/shm that the engine would leave behind. From any thread."""
        names = {file.name for file in files}
        with self._guard:
            if names <= self._names:
                return
            self._names |= names
            if not self._lock.closed:
                (self.path / NOTES_FILE).write_text("".join(f"{name}\n" for name in sorted(self._names)))
                return
        remove_shared(names)  # the engine was ended while it was looked at

    def remove(self) -> None:
        """Remove the folder and the files noted, after the engine has ended. Idempotent; from any thread."""
        with self._guard:
            remove_shared(self._names)
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()


def remove_abandoned() -> None:
    """Remove the folders of this user's engines whose owners are gone, and the files noted in them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            with (folder / LOCK_FILE).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                notes = folder / NOTES_FILE
                remove_shared(notes.read_text().splitlines() if notes.exists() else ())
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use, or removed by another meanwhile


def remove_shared(names: Iterable[str]) -> None:
    """Remove an engine's files in /dev/shm."""
    for name in names:
        if LEFT_IN_SHARED_MEMORY.match(name) and "/" not in name:
            (SHARED_MEMORY / name).unlink(missing_ok=True)
