"""Writes files atomically, sets who may read them, and checks that they are unchanged."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UMASKS: Mapping[str, int] = {"owner": 0o077, "group": 0o027, "all": 0o022}
"""File mode masks, by the values of `run.readable_by`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDigest:
    """What a file must still be when it is read back."""

    size_bytes: int
    sha256: str
    """SHA-256 in hexadecimal."""


def digest_of(path: Path) -> FileDigest:
    """Return size and hash of a file; raises `OSError`."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(size_bytes=file.tell(), sha256=sha256)


def digests_of(paths: Iterable[Path]) -> dict[str, FileDigest]:
    """Return the digests of files by name, in order; raises `OSError`. Files are read side by side, one to a core."""
    ordered = list(paths)
    with ThreadPoolExecutor(os.cpu_count()) as readers:  # hashing leaves the interpreter to others
        return {path.name: digest for path, digest in zip(ordered, readers.map(digest_of, ordered), strict=True)}


def json_digest(value: object, *, is_compact: bool = False) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal; the order of an object's members does not matter.

    Args:
        is_compact: hash its text without spaces. The digests differ: files that hold one keep to theirs.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":") if is_compact else None)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: it holds none; the message names the file.
        OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: restore it") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply: restore it") from error
    except ValueError as error:  # also a number of too many digits
        raise ValueError(f"{path} is not JSON ({error}): restore it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object: restore it")
    return value


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an `OSError` raised inside name `path`: a write that fails does not say of which file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `content` under a temporary name, flush it to disk and rename it: readers see the old or the new file.

    Text is written as UTF-8. Makes the folders above `path`. Raises `OSError` when the disk is full; the old file is
    intact then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with naming(path), partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def limit_readers(folder: Path, readable_by: str) -> None:
    """Have all that this process and its later children make readable by no more than `readable_by` (`UMASKS`).

    Closes `folder` to others too if it is there from before and belongs to this user.
    """
    umask = UMASKS[readable_by]
    os.umask(umask)
    if folder.is_dir() and folder.stat().st_uid == os.geteuid():
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~umask)


@contextmanager
def of_usual_mode(path: Path) -> Iterator[None]:
    """Give the file that the block writes at `path` the mode of any other file here.

    safetensors 0.8 writes files for their owner alone, whatever the umask and `run.readable_by` say.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def limit_readers_as(folder: Path) -> None:
    """Have all that this process makes from now on readable by no more than `folder` is."""
    os.umask(~folder.stat().st_mode & 0o077)
