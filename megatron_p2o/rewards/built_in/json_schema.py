"""`json_schema`: the answer is a JSON document that a schema accepts."""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from megatron_p2o.rewards.built_in.columns import column
from megatron_p2o.rewards.built_in.final_answer import fenced_blocks, without_thinking
from megatron_p2o.rewards.built_in.schema_keywords import check_keywords
from megatron_p2o.types import CORRECT, FinishReason, Grade, Problem

MAX_DEPTH = 64
"""Deepest nesting of a document."""

MAX_DIGITS = 308
"""Longest whole number: beyond that it has no floating-point value, and comparisons fail."""

MAX_MESSAGE_CHARACTERS = 300

MAX_KEPT_SCHEMAS = 4096
"""Problems whose own schema stays ready: each is asked several times in a row."""


class NotJson(Exception):
    """A text is no JSON document; the message says why."""


class JsonSchemaReward:
    """1 where the last fenced block of the response, or all of it without one, is JSON that the schema accepts."""

    def __init__(
        self,
        *,
        schema: Mapping[str, Any] | str | None = None,
        schema_column: str | None = None,
        equal_to_column: str | None = None,
    ) -> None:
        """Prepare.

        Args:
            schema: the schema, or the path of a JSON file that holds it, for all problems.
            schema_column: column with each problem's own, instead.
            equal_to_column: column with the document that is expected, as well; members of an object have no order.

        Raises:
            ValueError: not exactly one schema is given, or it is none, or jsonschema is not installed.
        """
        if (schema is None) == (schema_column is None):
            raise ValueError("json_schema needs either schema, for all problems, or schema_column, each problem's own")
        self._schema_column, self._equal_to_column = schema_column, equal_to_column
        self._validator = None if schema is None else validator_of(_read(schema), "json_schema schema")
        if schema is None:
            validator_of({}, "")

    def __call__(self, problem: Problem, response: str, finish_reason: FinishReason) -> Grade:
        try:
            document = parsed_json(document_in(response))
        except NotJson as error:
            return Grade(reward=0.0, reason="no JSON", feedback=f"The answer is not a JSON document: {error}.")
        fault = self._fault(document, problem)
        if fault:
            return Grade(reward=0.0, reason="schema", feedback=f"The JSON document breaks its schema {fault}.")
        if self._equal_to_column is not None:
            expected = column(problem, self._equal_to_column, "equal_to_column")
            if not is_same(document, json.loads(expected) if isinstance(expected, str) else expected):
                return Grade(reward=0.0, reason="another document", feedback="The JSON document has other values.")
        return CORRECT

    def _fault(self, document: Any, problem: Problem) -> str:
        """Return where and how the schema is broken, "" where it is not."""
        from jsonschema.exceptions import best_match

        validator = self._validator
        if validator is None:
            name = self._schema_column or ""
            schema = column(problem, name, "schema_column")
            text = schema if isinstance(schema, str) else json.dumps(schema)
            validator = _validator_of_text(text, f"column {name!r} of problem {problem.id}")
        error = best_match(validator.iter_errors(document))
        if error is None:
            return ""
        if self._validator is None:  # a problem's own schema may hold its answer
            return f"at {error.json_path} ({error.validator})"
        return f"at {error.json_path}: {error.message[:MAX_MESSAGE_CHARACTERS]}"


def document_in(response: str) -> str:
    """Return the text that should be JSON. Raises `NotJson` for a response that is still thinking."""
    said = without_thinking(response)
    if said is None:
        raise NotJson("the thinking is not closed")
    blocks = fenced_blocks(said)
    return blocks[-1][1] if blocks else said.strip()


def parsed_json(text: str) -> Any:
    """Return a JSON document, read as strictly as RFC 8259 allows. Raises `NotJson`.

    Two members of one name, NaN and infinities, numbers out of the range of floating point and nesting beyond
    `MAX_DEPTH` are refused: readers differ about them.
    """
    try:
        document = json.loads(
            text,
            object_pairs_hook=_members,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise NotJson(f"it is nested more than {MAX_DEPTH} deep") from error
    check_depth(document)
    return document


def check_depth(document: Any) -> None:
    """Raise `NotJson` for a document nested more than `MAX_DEPTH` deep."""
    level = [document]
    for _ in range(MAX_DEPTH + 1):
        level = [
            entry
            for value in level
            if isinstance(value, list | dict)
            for entry in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise NotJson(f"it is nested more than {MAX_DEPTH} deep")


def is_same(document: Any, expected: Any) -> bool:
    """Return whether two JSON values are the same: true is not 1, 1.0 is 1, members have no order."""
    if isinstance(document, dict) and isinstance(expected, dict):
        return document.keys() == expected.keys() and all(is_same(document[name], expected[name]) for name in document)
    if isinstance(document, list) and isinstance(expected, list):
        return len(document) == len(expected) and all(map(is_same, document, expected))
    return isinstance(document, bool) == isinstance(expected, bool) and bool(document == expected)


def validator_of(schema: Any, what: str) -> Any:
    """Return the validator of a schema, which opens no address.

    Raises:
        ValueError: it is none, or says something that would be passed over; `what` names it in the message.
    """
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from jsonschema_specifications import REGISTRY
    except ImportError as error:
        raise ValueError("json_schema needs jsonschema: pip install jsonschema") from error
    if not isinstance(schema, dict | bool):
        raise ValueError(f"{what} must be a JSON schema, an object; it is {type(schema).__name__}")
    draft = schema.get("$schema") if isinstance(schema, dict) else None
    if draft is not None and not isinstance(draft, str):
        raise ValueError(f"{what} has a $schema that is no text: {draft!r:.100}")
    unknown: Any = None
    kind: Any = validator_for(schema, default=Draft202012Validator if draft is None else unknown)
    if kind is unknown:
        raise ValueError(f"{what} has a $schema that is not known: {draft}")
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"{what} is no JSON schema: at {error.json_path}: {error.message[:200]}") from error
    check_keywords(schema, kind, what)
    # Without a registry of its own it would fetch the addresses that a schema names.
    return kind(schema, registry=REGISTRY, format_checker=kind.FORMAT_CHECKER)


@lru_cache(MAX_KEPT_SCHEMAS)
def _validator_of_text(schema: str, what: str) -> Any:
    return validator_of(json.loads(schema), what)


def _read(schema: Mapping[str, Any] | str) -> Any:
    if not isinstance(schema, str):
        return dict(schema)
    try:
        return json.loads(Path(schema).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"json_schema schema={schema!r} must be a schema or a JSON file with one: {error}") from error


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise NotJson(f"an object has two members {name!r:.80}")
        members[name] = value
    return members


def _no_constant(name: str) -> NoReturn:
    raise NotJson(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise NotJson(f"the number {text:.20} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise NotJson(f"the number {text:.20}… is too long")
    return int(text)
