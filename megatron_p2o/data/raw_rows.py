"""Reads the rows of JSONL, JSON, CSV, parquet and Arrow files, or of code, as they are, one at a time."""

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from megatron_p2o.config.callables import names_code, rows_of
from megatron_p2o.data.tables import DELIMITERS, BadCells, arrow_rows, is_arrow, text_rows

MAX_ROW_BYTES = 16 << 20
"""A longer row is bad: no more of a file than this is in memory at once."""

OTHER_FORMATS = {
    b"\x1f\x8b": "compressed with gzip: gunzip it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard: decompress it",
    b"\xfd7zXZ": "compressed with xz: decompress it",
    b"BZh": "compressed with bzip2: decompress it",
    b"\xff\xfe": "in UTF-16: convert it to UTF-8",
    b"\xfe\xff": "in UTF-16: convert it to UTF-8",
}
"""First bytes of files that are none of ours, and what to do with them."""

CHUNK_CHARACTERS = 1 << 20
"""Characters of a JSON array that are read at a time."""

_SEPARATORS = re.compile(r"[\s,]*")
_AFTER_ELEMENT = (",", "]", " ", "\t", "\n", "\r")
"""A number that ends otherwise may go on in the next chunk."""


class BadRowError(Exception):
    """A row that is no problem; the message is the rule it breaks and the remedy."""

    def __init__(self, message: str, rule: str = "") -> None:
        """Args:
        rule: short name of the broken rule, the same for every row that breaks it.
        """
        super().__init__(message)
        self.rule = rule


def raw_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[tuple[int, object]]:
    """Yield (line of a JSONL or CSV file, else row number, from 1; the row). Rows of JSON are bytes: see `parsed`.

    Args:
        path: a file, or the name of a callable that yields the rows (`config.callables.rows_of`).
        columns: all that is needed of a parquet file; None is everything.

    Raises:
        ValueError: the file cannot be read, is damaged as a whole, or is parquet or Arrow
            without pyarrow installed; the callable is not there or raises.
    """
    if names_code(str(path)):
        yield from enumerate(rows_of(str(path)), start=1)
        return
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path") from error
    for magic, remedy in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {remedy}")
    if is_arrow(head):
        yield from arrow_rows(path, columns)
    elif path.suffix.lower() in DELIMITERS:
        yield from text_rows(path, DELIMITERS[path.suffix.lower()], MAX_ROW_BYTES)
    elif head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _array_rows(path)
    else:
        yield from _json_lines(path)


def parsed(row: object) -> dict[str, Any]:
    """Return a row of `raw_rows` as an object.

    Raises:
        BadRowError: it is too long, not UTF-8, not JSON, or no object.
    """
    if isinstance(row, bytes):
        row = _parsed_json(row)
    if isinstance(row, BadCells):
        raise BadRowError(row, rule="other cells")
    if not isinstance(row, dict):
        raise BadRowError('must be a JSON object such as {"question": ..., "answer": ...}', rule="no object")
    return row


def encodable(text: str, field: str) -> str:
    """Return `text`.

    Raises:
        BadRowError: it holds half a surrogate pair, which JSON can escape but which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"{field} holds half a surrogate pair, which is no character", rule="not UTF-8") from error
    return text


def _parsed_json(text: bytes) -> object:
    if len(text) > MAX_ROW_BYTES:
        raise BadRowError(f"is longer than {MAX_ROW_BYTES >> 20} MiB", rule="too long")
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRowError(
            f"is not UTF-8 (byte {error.start + 1} of the line): convert the file", "not UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise BadRowError(f"is not JSON ({error.msg} at column {error.colno})", "not JSON") from error
    except RecursionError as error:
        raise BadRowError("is nested too deeply", "not JSON") from error
    except ValueError as error:
        raise BadRowError(f"holds a number that is too long ({error})", "not JSON") from error


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the bytes of every line that is not blank; of a line that is too long, the first bytes that are."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_ROW_BYTES + 1)
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _array_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the bytes of a JSON array's elements, holding a chunk and one element at a time."""
    number = 0
    # Bytes that are not UTF-8 are carried along, so that only the row that holds them is bad.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text, position = file.read(CHUNK_CHARACTERS).lstrip().removeprefix("["), 0
        while True:
            position = _SEPARATORS.match(text, position).end()  # pyright: ignore[reportOptionalMemberAccess]
            if text.startswith("]", position):
                return _check_end(path, text[position + 1 :] + file.read(CHUNK_CHARACTERS))
            end = _element_end(text, position)
            if end is None:
                text, position = _with_more(file, text[position:], f"{path} after row {number}"), 0
                continue
            number += 1
            yield number, text[position:end].encode("utf-8", "surrogateescape")
            position = end


def _check_end(path: Path, text: str) -> None:
    if text.strip():
        raise ValueError(f"{path} goes on after its JSON array: write one array, or one object per line")


def _element_end(text: str, start: int) -> int | None:
    """Return where the element ends, None when `text` does: more of it decides whether the element is damaged."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return end if text[end : end + 1] in _AFTER_ELEMENT else None


def _with_more(file: TextIO, text: str, place: str) -> str:
    # Twice as much each time: the element is scanned anew from its start.
    chunk = file.read(max(CHUNK_CHARACTERS, len(text)))
    if not chunk or len(text) > MAX_ROW_BYTES:
        raise ValueError(
            f"{place}: the JSON array is damaged, or its next row is longer than 16 MiB: download it again"
        )
    return text + chunk
