"""Append-only JSON lines: reading what a running or killed process wrote, and taking back what will be done again."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_p2o.files import write_whole

JsonObject = dict[str, Any]


def read_lines(path: Path) -> Iterator[JsonObject]:
    """Yield the objects of `path`; none when it does not exist.

    A last line without its newline is being written, or was torn by a kill: it is passed over.

    Raises:
        ValueError: any other line is not a JSON object.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            yield _parse(line, f"{path}:{number}")


def keep_lines(path: Path, is_kept: Callable[[JsonObject], bool]) -> int:
    """Take the lines out of `path` that `is_kept` refuses, and a torn last line; return how many were taken.

    They are appended to `<name>.discarded` beside it first, and `path` is then replaced in one rename, so that a kill
    in between loses nothing. Does nothing when there is nothing to take out or no file.
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    discarded: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            is_whole = line.endswith("\n")
            wanted = is_whole and is_kept(_parse(line, f"{path}:{number}"))
            (kept if wanted else discarded).append(line if is_whole else line + "\n")
    if not discarded:
        return 0
    with path.with_name(path.name + ".discarded").open("a", encoding="utf-8") as file:
        file.writelines(discarded)
    write_whole(path, "".join(kept))
    return len(discarded)


def _parse(line: str, place: str) -> JsonObject:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error.msg}): restore or remove the line") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be a JSON object, not {type(value).__name__}: restore or remove the line")
    return value
