"""Reads the rows of tables: CSV, parquet and Arrow files, one at a time."""

import csv
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PARQUET_MAGIC = b"PAR1"
"""First bytes of a parquet file."""

ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC = b"ARROW1", b"\xff\xff\xff\xff"
"""First bytes of an Arrow file (feather too), and of an Arrow stream, as `datasets` keeps them."""

MAGICS = (PARQUET_MAGIC, ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC)

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""By the end of a file's name: nothing in a table of text says that it is one."""

NEEDS_PYARROW = "is a parquet or Arrow file and needs the package pyarrow: pip install pyarrow, or write it as JSONL"


class BadCells(str):
    """A line of a table that has other cells than its head; the text says which."""


def is_arrow(head: bytes) -> bool:
    """Return whether a file that begins so is parquet or Arrow."""
    return head.startswith(MAGICS)


def missing_package(path: Path) -> str | None:
    """Return what is to be installed before a file can be read; None when nothing is, or it cannot be opened."""
    try:
        with path.open("rb") as file:
            needs_it = is_arrow(file.read(8))
    except OSError:
        return None
    return f"{path} {NEEDS_PYARROW}" if needs_it and find_spec("pyarrow") is None else None


def text_rows(path: Path, delimiter: str, max_bytes: int) -> Iterator[tuple[int, object]]:
    """Yield (line on which the row ends, cells by the names in the first line) of a table of text.

    An empty cell is None.

    Raises:
        ValueError: the file is not UTF-8, a cell is longer than `max_bytes`, or two columns have one name.
    """
    csv.field_size_limit(max_bytes)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            if len(set(names)) != len(names):
                raise ValueError(f"{path}:1: two columns have the same name: rename one")
            for cells in filter(None, reader):
                yield reader.line_num, _row_of(names, cells)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1} of a part): convert the file") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no table of text ({error}): write it again") from error


def _row_of(names: list[str], cells: list[str]) -> object:
    if len(cells) != len(names):
        return BadCells(f"has {len(cells)} cells under {len(names)} column names: quote cells that hold the delimiter")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def arrow_rows(path: Path, columns: Collection[str] | None) -> Iterator[tuple[int, object]]:
    """Yield (row number from 1, row) of a parquet or Arrow file; `columns`: all that is needed, None is everything.

    Raises:
        ValueError: it is damaged, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException  # optional dependency
    except ImportError as error:
        raise ValueError(f"{path} {NEEDS_PYARROW}") from error
    try:
        yield from enumerate((row for batch in _batches(path, columns) for row in batch.to_pylist()), start=1)
    except (ArrowException, OSError) as error:
        kind = "parquet" if path.open("rb").read(4) == PARQUET_MAGIC else "Arrow"
        raise ValueError(f"{path} is a damaged {kind} file ({error}): write it again") from error


def _batches(path: Path, columns: Collection[str] | None) -> Iterator[Any]:
    """Yield the record batches of a file."""
    from pyarrow import ipc, memory_map
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(PARQUET_MAGIC):
        with ParquetFile(path) as table:
            wanted = None if columns is None else [name for name in table.schema_arrow.names if name in columns]
            # Solutions of a few hundred kilobytes a row: small batches bound the memory.
            yield from table.iter_batches(batch_size=1024, columns=wanted)
        return
    with memory_map(str(path)) as source:
        if head.startswith(ARROW_FILE_MAGIC):
            reader = ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from ipc.open_stream(source)
