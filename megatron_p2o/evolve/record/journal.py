"""An append-only file of JSON records that survives a kill at any byte: each line carries its length and checksum."""

import itertools
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Records of one round on disk. One process writes; each record is one `write` call, in order."""

    def __init__(self, path: Path) -> None:
        """Open for appending and cut off what follows the last record that counts.

        Each record refers to those before it, so that none counts behind a damaged one: the file is then kept whole
        under another name. A last line that a kill has torn is no damage. Raises `OSError`.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records, num_good_bytes = read_journal(path)
        """What the file held when it was opened, oldest first."""
        self.damage = _set_aside(path, len(self.records), num_good_bytes)
        """What was wrong with the file, and where it is kept; "" when nothing was."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.num_dropped_bytes = os.fstat(self._descriptor).st_size - num_good_bytes
        """Bytes at the end of the file that are now cut off: damaged, or torn by a kill."""
        if self.num_dropped_bytes > 0:
            os.ftruncate(self._descriptor, num_good_bytes)

    def append(self, record: Any) -> None:
        """Add a JSON value. It outlives this process once the call returns (not a power cut: see `sync`)."""
        line = encode_line(record)
        if os.write(self._descriptor, line) != len(line):
            raise OSError(f"{self.path}: the disk took only part of a journal line; free some space")

    def sync(self) -> None:
        """Flush to the device."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _set_aside(path: Path, num_records: int, num_good_bytes: int) -> str:
    """Copy a journal that is damaged before its last line, and return a message; "" for an intact one."""
    rest = path.read_bytes()[num_good_bytes:] if path.exists() else b""
    if b"\n" not in rest:
        return ""
    aside = free_name(path, "damaged")
    shutil.copyfile(path, aside)
    lines = rest.split(b"\n")[1:]
    num_lost = sum(decode_line(line) is not None for line in lines)
    return (
        f"{path}:{num_records + 1} is damaged: the {num_records} records before it count, the {num_lost} whole ones "
        f"after it refer to it and do not; the file is kept as {aside.name}"
    )


def free_name(path: Path, why: str) -> Path:
    """Return a name beside `path`, `<name>.<why>-<number>`, that is not taken."""
    names = (path.with_name(f"{path.name}.{why}-{number}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def encode_line(record: Any) -> bytes:
    """Return `<bytes of the JSON> <crc32, 8 hex digits> <JSON>` and a newline."""
    body = json.dumps(record, separators=(",", ":")).encode()
    return b"%d %08x %s\n" % (len(body), zlib.crc32(body), body)


def read_journal(path: Path) -> tuple[list[Any], int]:
    """Return the records up to the first damaged line, and how many bytes they take. A missing file is empty."""
    records: list[Any] = []
    num_bytes = 0
    for line, body in intact_lines(path):
        try:
            records.append(json.loads(body))
        except (ValueError, RecursionError):
            break  # whole, but not what this program writes
        num_bytes += len(line)
    return records, num_bytes


def intact_lines(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield (line, its JSON) up to the first line that is damaged or still being written. A missing file is empty."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            body = body_of(line.removesuffix(b"\n"))
            if body is None or not line.endswith(b"\n"):
                return
            yield line, body


def body_of(line: bytes) -> bytes | None:
    """Return the JSON of a line without its newline, or None when the line is damaged."""
    parts = line.split(b" ", 2)
    if len(parts) != 3 or parts[0] != b"%d" % len(parts[2]) or parts[1] != b"%08x" % zlib.crc32(parts[2]):
        return None
    return parts[2]


def decode_line(line: bytes) -> tuple[Any] | None:
    """Return the record in a one-tuple (it may itself be null), or None when the line is damaged."""
    body = body_of(line)
    try:
        return None if body is None else (json.loads(body),)
    except (ValueError, RecursionError):
        return None  # whole, but not what this program writes
