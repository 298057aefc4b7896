"""Reads problems from JSONL, JSON, CSV, parquet or Arrow."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_p2o.config.tree import DataConfig
from megatron_p2o.data.columns import (
    TOOL_FIELD,
    Columns,
    asked_at,
    check_media,
    columns_of,
    field_at,
    text_at,
    texts_at,
)
from megatron_p2o.data.raw_rows import BadRowError, parsed, raw_rows
from megatron_p2o.records import to_json
from megatron_p2o.terminal import listed
from megatron_p2o.types import Problem

MAX_REPORTED_ROWS = 20
"""Rows a message lists one by one; the rest is a count."""

MARK = "####"
"""Mark before the final answer in GSM8K's solutions."""

MAX_LIKELY_CHARACTERS = 200
"""Longest usual final answer. Longer ones are solutions, or prose that cannot be compared."""

ANSWER_SETTING = "data.answer_field, null where there is none"

logger = logging.getLogger(__name__)


def load_problems(path: str | Path, data: DataConfig, task: str | None = None) -> list[Problem]:
    """Return the problems of a JSONL, JSON, CSV, parquet or Arrow file in file order.

    A problem's id is the row's `data.id_field`, or a hash of the question where the row has none. Columns `level` and
    `source` (verl's `data_source`) are used when present. Of a worked solution that ends in "#### 72" (GSM8K's) what
    follows the mark is the gold answer. With `data.skip_bad_rows` bad rows are counted in a warning, not an error.

    Args:
        task: name under `data.train` of what decides columns and system message; None: `data` alone.

    A row with pictures or sound is a bad one; functions to call (`tools`) are warned of.

    Raises:
        ValueError: the file has bad rows (named with their lines, duplicates included) or no usable one, or is parquet
            or Arrow without pyarrow installed.
    """
    path, data = Path(path), data.of_task(task)
    problems: list[Problem] = []
    bad_rows: list[str] = []
    first_lines: dict[str, int] = {}
    marked, unlikely = [], []
    columns = columns_of(path, data)
    for line, row in raw_rows(path):
        try:
            problem = _problem(row, columns, data, task or "")
            if problem.id in first_lines:
                raise BadRowError(_duplicate_text(problem, first_lines[problem.id], data))
        except BadRowError as error:
            bad_rows.append(f"{path}:{line}: {error}")
            continue
        first_lines[problem.id] = line
        if problem.answer is not None and (final := marked_answer(problem.answer)) is not None:
            marked.append(line)
            problem = replace(problem, answer=final)
        if problem.answer is not None and _is_unlikely(problem.answer):
            unlikely.append(line)
        problems.append(problem)
    if bad_rows and not data.skip_bad_rows:
        raise ValueError(f"{_listed(bad_rows)}\nCorrect the file, or set data.skip_bad_rows=true to use the other rows")
    if bad_rows:
        logger.warning("%s: %d bad rows skipped, %d used\n%s", path, len(bad_rows), len(problems), _listed(bad_rows))
    if not problems:
        raise ValueError(f"{path} holds no problem: give a file with one JSON object or parquet row per problem")
    _report_answers(path, marked, unlikely)
    _report_tools(path, problems)
    return problems


def marked_answer(answer: str) -> str | None:
    """Return what follows "####" at the end of a worked solution, None when `answer` is none."""
    solution, mark, final = answer.rpartition(MARK)
    final = final.strip()
    return final if mark and solution.strip() and final and not _is_unlikely(final) else None


def _is_unlikely(answer: str) -> bool:
    """Whether hardly any response's final answer looks like this."""
    return len(answer) > MAX_LIKELY_CHARACTERS or "\n" in answer.strip()


def _report_answers(path: Path, marked: Sequence[int], unlikely: Sequence[int]) -> None:
    if marked:
        logger.warning(
            '%s: %d answers are solutions that end in "%s": what follows it is the gold answer (%s)',
            *(path, len(marked), MARK, _rows(marked)),
        )
    if unlikely:
        logger.warning(
            "%s: %d gold answers have more than %d characters or several lines, which a response's final answer hardly "
            "ever equals: give the final answer alone (%s)",
            *(path, len(unlikely), MAX_LIKELY_CHARACTERS, _rows(unlikely)),
        )


def _report_tools(path: Path, problems: Sequence[Problem]) -> None:
    named = [problem.id for problem in problems if problem.columns.get(TOOL_FIELD)]
    if named:
        logger.warning(
            "%s: the column `%s` of %d problems is not shown to the policy, which can call nothing (%s)",
            *(path, TOOL_FIELD, len(named), listed(named, MAX_REPORTED_ROWS)),
        )


def _rows(numbers: Sequence[int]) -> str:
    return f"rows {listed([str(number) for number in numbers], MAX_REPORTED_ROWS)}"


def _problem(raw_row: object, columns: Columns, data: DataConfig, task: str) -> Problem:
    row = parsed(raw_row)
    check_media(row)
    system, question = asked_at(row, columns.question)
    answer = None if columns.answer is None else text_at(row, columns.answer, ANSWER_SETTING)
    has_id = field_at(row, columns.id) is not None
    return Problem(
        id=text_at(row, columns.id, "data.id_field") if has_id else question_id(question),
        question=question,
        answer=answer,
        hints=tuple(hint.strip() for hint in texts_at(row, columns.hints)),
        demonstrations=texts_at(row, columns.demonstrations),
        task=task,
        system_prompt=system or data.system_prompt,
        source=_label(row, "source") or _label(row, "data_source"),
        level=_label(row, "level"),
        columns=to_json(row),
    )


def question_id(question: str) -> str:
    """Return the id of a problem whose row has none: the first 16 hexadecimal digits of the question's SHA-256."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


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
