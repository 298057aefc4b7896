"""Append-only JSON lines: reads what a running or killed process wrote, and removes what will be done again.

A line that a disk has damaged is named, stays where it is and is passed over: the lines after it count, and nothing is
lost.
"""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megatron_p2o.files import write_whole

JsonObject = dict[str, Any]

Record = TypeVar("Record")

BEGINNING_BYTES = 8
"""Compared bytes at the start of a line: all lines of one file start alike."""

END = b"}\n"

logger = logging.getLogger(__name__)


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Yield the objects of `path`; none when it does not exist.

    A last line without its newline is being written, or was torn by a kill: it is passed over. So is any other line
    that is not a JSON object, with a warning that names it.
    """
    return read_records(path, lambda line: line)


def read_records(path: Path, decode: Callable[[JsonObject], Record]) -> Iterator[Record]:
    """Yield `decode` of each object of `path`, as `read_lines`. What it refuses is damaged, too.

    It refuses by `KeyError`, `TypeError` or `ValueError`.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = decode(_parse(line))
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("%s:%d is damaged and passed over (%s): %.120r", path, number, error, line)
                continue
            yield record


def keep_lines(path: Path, num_kept: int | None = None) -> int:
    """Remove all records after the first `num_kept` (None: keep all) from `path`, and an incomplete last line. They are
    first appended to `<name>.discarded`; then `path` is replaced in one rename, so that a kill in between loses
    nothing. Does nothing if there is nothing to remove or no file.

    Returns how many records stay. A damaged line that has lost its newline stands for two, the rest of one that a byte
    has cut in two for none.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        lines = list(file)
    num_lines = num_records = 0
    previous = END
    while num_lines < len(lines) and lines[num_lines].endswith(b"\n"):
        found = _num_records(lines[num_lines], previous, lines[0][:BEGINNING_BYTES])
        if num_kept is not None and found and num_records >= num_kept:
            break
        previous = lines[num_lines]
        num_records += found
        num_lines += 1
    if num_lines < len(lines):
        discarded = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines[num_lines:])
        with path.with_name(path.name + ".discarded").open("ab") as file:
            file.write(discarded)
        write_whole(path, b"".join(lines[:num_lines]))
    return num_records


def _num_records(line: bytes, previous: bytes, beginning: bytes) -> int:
    """Return how many records a line holds; `beginning` is what one begins with."""
    try:
        _parse(line)
    except ValueError:
        is_rest = not line.startswith(beginning[:1]) and not previous.endswith(END)
        return line.count(beginning, 1) + int(not is_rest)
    return 1


def _parse(line: bytes) -> JsonObject:
    try:
        value = json.loads(line.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object must stand here, not {type(value).__name__}")
    return value
