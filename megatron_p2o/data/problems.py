"""Reads problems from JSONL or parquet."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from megatron_p2o.config import DataConfig
from megatron_p2o.types import Problem

PARQUET_MAGIC = b"PAR1"
"""First bytes of a parquet file."""

MAX_REPORTED_ROWS = 20
"""Bad rows an error lists one by one; the rest is a count."""

logger = logging.getLogger(__name__)


class _BadRowError(Exception):
    """A row that is no problem; the message is the rule it breaks and the remedy."""


def load_problems(path: str | Path, data: DataConfig) -> list[Problem]:
    """Return the problems of a JSONL or parquet file in file order.

    A problem's id is the row's `data.id_field`, or a hash of the question where the row has none. Columns `level` and
    `source` are used when present. With `data.skip_bad_rows` bad rows are counted in a warning instead of an error.

    Raises:
        ValueError: the file has bad rows (named with their lines, duplicates included) or no usable one.
        RuntimeError: a parquet file without pyarrow installed.
    """
    path = Path(path)
    problems: list[Problem] = []
    bad_rows: list[str] = []
    first_lines: dict[str, int] = {}
    for line, row in _rows(path):
        try:
            problem = _problem(row, data)
            if problem.id in first_lines:
                raise _BadRowError(_duplicate_text(problem, first_lines[problem.id], data))
        except _BadRowError as error:
            bad_rows.append(f"{path}:{line}: {error}")
            continue
        first_lines[problem.id] = line
        problems.append(problem)
    if bad_rows and not data.skip_bad_rows:
        raise ValueError(f"{_listed(bad_rows)}\nCorrect the file, or set data.skip_bad_rows=true to use the other rows")
    if bad_rows:
        logger.warning("%s: %d bad rows skipped, %d used\n%s", path, len(bad_rows), len(problems), _listed(bad_rows))
    if not problems:
        raise ValueError(f"{path} holds no problem: give a file with one JSON object or parquet row per problem")
    return problems


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield (line or row number from 1, the row as read)."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(PARQUET_MAGIC))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check the path") from error
    yield from _parquet_rows(path) if magic == PARQUET_MAGIC else _json_lines(path)


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the bytes of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    try:
        from pyarrow import ArrowInvalid  # optional dependency
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise RuntimeError(f"{path} is a parquet file and needs pyarrow: pip install pyarrow") from error
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, start=1)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is a damaged parquet file ({error}): write it again") from error


def _problem(row: object, data: DataConfig) -> Problem:
    if isinstance(row, bytes):
        row = _parsed(row)
    if not isinstance(row, dict):
        raise _BadRowError(
            f'must be a JSON object such as {{"{data.question_field}": ..., "{data.answer_field}": ...}}'
        )
    question = _text(row, data.question_field, "data.question_field")
    answer = _text(row, data.answer_field, "data.answer_field")
    has_id = row.get(data.id_field) is not None
    return Problem(
        id=_text(row, data.id_field, "data.id_field") if has_id else question_id(question),
        question=question,
        answer=answer,
        source=_label(row, "source"),
        level=_label(row, "level"),
    )


def question_id(question: str) -> str:
    """Return the id of a problem whose row has none: the first 16 hexadecimal digits of the question's SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadRowError(f"is not UTF-8 (byte {error.start + 1} of the line): convert the file") from error
    except json.JSONDecodeError as error:
        raise _BadRowError(f"is not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise _BadRowError("is nested too deeply") from error


def _text(row: dict[str, object], field: str, setting: str) -> str:
    """Return a required field as text; whole numbers count as text."""
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise _BadRowError(f"has no {field!r} ({setting}); its fields are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(value, str):
        raise _BadRowError(f"{field}={value!r:.80} must be text or a whole number: put it in quotes")
    if not value.strip():
        raise _BadRowError(f"{field} is blank")
    return value


def _label(row: dict[str, object], field: str) -> str:
    value = row.get(field)
    return "" if value is None else str(value)


def _duplicate_text(problem: Problem, first_line: int, data: DataConfig) -> str:
    if problem.id == question_id(problem.question):
        return f"asks the same question as line {first_line}: remove one, or give both a {data.id_field!r}"
    return f"{data.id_field}={problem.id} is already the id of line {first_line}: make ids unique"


def _listed(bad_rows: list[str]) -> str:
    shown = bad_rows[:MAX_REPORTED_ROWS]
    if len(bad_rows) > len(shown):
        shown.append(f"... and {len(bad_rows) - len(shown)} more bad rows")
    return "\n".join(shown)
