"""What the conducting rank warns of, kept in the run folder: standard error is not always kept."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

PACKAGE = "megatron_p2o"

MAX_BYTES = 16 * 2**20
"""Size of the file from which further warnings go to standard error alone."""


class _WarningsFile(logging.Handler):
    """Appends one JSON line per warning."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = path.open("a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._file.tell() < MAX_BYTES:
                self._file.write(json.dumps(_line(record)) + "\n")
                self._file.flush()
        except (OSError, ValueError):  # a full disk, or closed: the warning stands on standard error
            return

    def close(self) -> None:
        super().close()
        try:
            self._file.close()
        except OSError:  # what is buffered cannot be written
            return


@contextmanager
def kept_warnings(path: Path) -> Iterator[None]:
    """Append the package's warnings to `path` until left. Raises `OSError` when it cannot be opened."""
    handler = _WarningsFile(path)
    logger = logging.getLogger(PACKAGE)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _line(record: logging.LogRecord) -> dict[str, str]:
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
