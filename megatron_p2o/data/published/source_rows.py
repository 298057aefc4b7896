"""Reads the rows of a published data set as problems. A bad row is kept with the rule that it violates."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from megatron_p2o.data.published.sources import Source
from megatron_p2o.data.raw_rows import BadRowError, encodable, parsed, raw_rows

MAX_QUESTION_CHARACTERS = 20_000
"""Longer questions do not fit the 4,096 tokens of a prompt."""

MAX_ANSWER_CHARACTERS = 2_000
"""Longer answers are no final answers but solutions."""

NUM_SCHEMA_ROWS = 100
"""Number of first rows that are read for a problem. A file without one there has another schema."""

ROW_FILES = ("*.jsonl", "*.json", "*.parquet")

BoxedAnswer = Callable[[str], str | None]
"""Finds the answer in a solution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """A problem of a source."""

    number: int
    """Place among all rows of the source, from 0, bad rows counted."""
    question: str
    answer: str
    level: str
    subject: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    number: int
    """Number of the row, as in `SourceRow`."""
    place: str
    """file:line, or file:row in an array or parquet file."""
    rule: str
    """The rule it breaks, the same words for every such row."""
    detail: str
    """Field and what was found there."""


def row_files(path: Path, pattern: str = "") -> list[Path]:
    """Return the files of a download in order: `path` itself, or those in the folder that match.

    Raises:
        ValueError: there are none.
    """
    if path.is_file():
        return [path]
    for each in (pattern, f"**/{pattern}") if pattern else ROW_FILES:
        found = sorted(path.glob(each))
        if found:
            return found
    if pattern:
        return row_files(path)
    raise ValueError(f"{path} holds no {', '.join(ROW_FILES)}: name the file or folder that was downloaded")


def source_rows(files: Sequence[Path], source: Source, boxed_answer: BoxedAnswer) -> Iterator[SourceRow | BadRow]:
    """Yield the rows of `files` one by one, in order.

    Raises:
        ValueError: a file is damaged, or none of the first rows is a problem: the files are not of this source.
    """
    number, is_right_schema = 0, False
    last_bad: BadRow | None = None
    for path in files:
        for line, raw_row in raw_rows(path, columns=source.fields):
            row = _row_or_bad(raw_row, source, number, f"{path}:{line}", boxed_answer)
            number += 1
            if isinstance(row, BadRow):
                last_bad = row
                if number == NUM_SCHEMA_ROWS and not is_right_schema:
                    raise ValueError(_wrong_schema(files, source, last_bad))
            else:
                is_right_schema = True
            yield row
    if not is_right_schema:
        raise ValueError(_wrong_schema(files, source, last_bad))


def _wrong_schema(files: Sequence[Path], source: Source, last_bad: BadRow | None) -> str:
    if last_bad is None:
        return f"{', '.join(map(str, files))} hold no rows: download them again"
    return f"no row so far is a {source.name} problem; {last_bad.place}: {last_bad.detail}: give the published files"


def _row_or_bad(
    raw_row: object, source: Source, number: int, place: str, boxed_answer: BoxedAnswer
) -> SourceRow | BadRow:
    try:
        row = parsed(raw_row)
        return SourceRow(
            number=number,
            question=_question(row, source.question_fields),
            answer=_answer(row, source, boxed_answer),
            level=_level(row, source),
            subject=_label(row, source.subject_fields),
        )
    except BadRowError as error:
        return BadRow(number=number, place=place, rule=error.rule, detail=str(error))


def _question(row: Mapping[str, Any], fields: Collection[str]) -> str:
    field, value = _first(row, fields)
    if value is None:
        raise BadRowError(_missing(row, fields), rule="no question")
    if not isinstance(value, str):
        raise BadRowError(f"{field}={value!r:.80} is no text", rule="question is no text")
    if not value.strip():
        raise BadRowError(f"{field} is blank", rule="no question")
    if len(value) > MAX_QUESTION_CHARACTERS:
        found = f"{field} has {len(value)} characters, more than {MAX_QUESTION_CHARACTERS}"
        raise BadRowError(found, rule="question too long")
    return encodable(value, field)


def _answer(row: Mapping[str, Any], source: Source, boxed_answer: BoxedAnswer) -> str:
    field, value = _first(row, source.answer_fields)
    if value is None:
        field, solution = _first(row, source.solution_fields)
        value = boxed_answer(solution) if isinstance(solution, str) else None
    if isinstance(value, list):
        value = _one_of(value, field, source.takes_first_answer)
    if value is None:
        raise BadRowError(_missing(row, (*source.answer_fields, *source.solution_fields)), rule="no answer")
    text = _answer_text(value, field).strip()
    text = text[1:-1].strip() if _in_dollars(text) else text
    if not text:
        raise BadRowError(f"{field} is blank", rule="no answer")
    if len(text) > MAX_ANSWER_CHARACTERS:
        found = f"{field} has {len(text)} characters, more than {MAX_ANSWER_CHARACTERS}"
        raise BadRowError(found, rule="answer too long")
    return encodable(text, field)


def _one_of(answers: Sequence[Any], field: str, takes_first: bool) -> object:
    if len(answers) > 1 and not takes_first:
        raise BadRowError(f"{field} lists {len(answers)} answers: {answers!r:.80}", rule="several answers")
    return answers[0] if answers else None


def _answer_text(value: object, field: str) -> str:
    """Return text unchanged and numbers as people write them: 27.0 is 27."""
    if isinstance(value, str):
        return value
    if not _is_number(value):
        raise BadRowError(f"{field}={value!r:.80} is neither text nor a number", rule="answer is no text or number")
    return str(value).removesuffix(".0")


def _is_number(value: object) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and isfinite(value))


def _in_dollars(text: str) -> bool:
    return len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2


def _level(row: Mapping[str, Any], source: Source) -> str:
    field, value = _first(row, source.level_fields)
    if source.has_numeric_level and not _is_number(value):
        found = f"{field}={value!r:.80} is no number" if field else _missing(row, source.level_fields)
        raise BadRowError(found, rule="no level")
    return "" if value is None else str(value)


def _label(row: Mapping[str, Any], fields: Collection[str]) -> str:
    value = _first(row, fields)[1]
    return "" if value is None else str(value)


def _first(row: Mapping[str, Any], fields: Collection[str]) -> tuple[str, Any]:
    """Return name and value of the first field that the row has; ("", None) without any."""
    return next(((field, row[field]) for field in fields if row.get(field) is not None), ("", None))


def _missing(row: Mapping[str, Any], fields: Collection[str]) -> str:
    return f"has no {' or '.join(map(repr, fields))}; its fields are {', '.join(map(str, row)) or 'none'}"
