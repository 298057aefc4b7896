"""Follows files that another process writes: lines are read once, as they come."""

import os
from collections.abc import Callable
from pathlib import Path

DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
"""What reading a line raises that does not hold what it should."""


FileState = tuple[int, int, int]
"""Inode, size and time of the last change: another one means that a file is to be read again."""


def file_state(path: Path) -> FileState | None:
    """Return the state of a file; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class FollowedFile:
    """The whole lines of a file that grows, and that may be replaced, shortened or removed at any time."""

    def __init__(self, path: Path, restart: Callable[[], None], take: Callable[[bytes], None]) -> None:
        """Read nothing yet.

        Args:
            restart: forgets what was taken. Called when the file is another one than before, or gone.
            take: is given each new line, without its newline. A last line that is being written waits. A line whose
                content it cannot use (`DAMAGED`) is counted and left out.
        """
        self.path = path
        self.num_damaged = 0
        """Damaged lines of the file as it is now."""
        self._restart, self._take = restart, take
        self._inode, self._offset = 0, 0

    def catch_up(self) -> None:
        """Take the lines written since the last call."""
        try:
            file = self.path.open("rb")
        except OSError:
            self._begin_again(0)
            return
        with file:
            status = os.fstat(file.fileno())
            # A run that resumes at an earlier checkpoint replaces the file by one with fewer lines.
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._begin_again(status.st_ino)
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._take_whole(line[:-1])

    def _take_whole(self, line: bytes) -> None:
        try:
            self._take(line)
        except DAMAGED:
            self.num_damaged += 1

    def _begin_again(self, inode: int) -> None:
        if self._offset:
            self._restart()
        self._inode, self._offset, self.num_damaged = inode, 0, 0
