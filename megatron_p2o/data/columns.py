"""Which columns of a row hold question, gold answer and identifier, in the schemas that data sets are published in.

{"question": ..., "answer": ...}                                       the plain one
{"question": ..., "answer": "... #### 72"}                             GSM8K
{"messages": [{"role": "user", "content": ...}, ...], "answer": ...}   a conversation
{"prompt": [{"role": "user", ...}], "reward_model": {"ground_truth": ...}, "extra_info": {...}}   verl, DAPO
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_p2o.config.tree import DataConfig
from megatron_p2o.data.raw_rows import BadRowError, encodable, parsed, raw_rows

AUTO = "auto"
"""Value of `data.question_field` and `data.answer_field`: the first of these that the first row has."""

QUESTION_FIELDS = ("question", "problem", "prompt", "messages")

ANSWER_FIELDS = ("answer", "final_answer", "reward_model.ground_truth")

SYSTEM_ROLES = ("system", "developer")

MEDIA_FIELDS = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of what is part of a question and cannot be shown to a language model."""

TOOL_FIELD = "tools"
"""Column with the functions that a policy may call, which it is not told of."""

CONVERSATION = re.compile(r"""\s*\[\s*\{\s*["'](?:role|content)["']\s*:""")
"""How the text of a conversation begins, in JSON or as Python writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns of one file, by name; a dot leads into a nested one."""

    id: str
    question: str
    answer: str | None
    """None: the problems have no gold answer."""
    hints: str | None = None
    """None: no hints are used."""
    demonstrations: str | None = None
    """None: no demonstrations are used."""

    def __str__(self) -> str:
        answer = "none" if self.answer is None else f"`{self.answer}`"
        used = {"hints": self.hints, "demonstrations": self.demonstrations}
        others = "".join(f", {what} `{name}`" for what, name in used.items() if name is not None)
        return f"question `{self.question}`, gold answer {answer}, id `{self.id}` or a hash of the question{others}"


def columns_of(path: Path, data: DataConfig) -> Columns:
    """Return the columns that are taken of a file: those that are set, and by its first good row where it says `auto`.

    Raises:
        ValueError: the file cannot be read.
    """
    first: Mapping[str, object] = {}
    if AUTO in (data.question_field, data.answer_field):
        for _, raw_row in raw_rows(path):
            try:
                first = parsed(raw_row)
                break
            except BadRowError:
                continue
    return Columns(
        id=data.id_field,
        question=_found(first, QUESTION_FIELDS) if data.question_field == AUTO else data.question_field,
        answer=_found(first, ANSWER_FIELDS) if data.answer_field == AUTO else data.answer_field or None,
        hints=data.hints_field,
        demonstrations=data.demonstrations_field,
    )


def _found(row: Mapping[str, object], names: Sequence[str]) -> str:
    return next((name for name in names if field_at(row, name) is not None), names[0])


def field_at(row: Mapping[str, object], name: str) -> object:
    """Return the value of a column: of that very name, or with dots that lead into mappings; None without one.

    A cell that holds JSON text, as in CSV, is read where a dot leads into it.
    """
    if name in row:
        return row[name]
    value: object = row
    for part in name.split("."):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if not isinstance(value, Mapping):
            return None
        value = cast(Mapping[str, object], value).get(part)
    return value


def text_at(row: Mapping[str, object], name: str, setting: str) -> str:
    """Return a required column as text; whole numbers count as text.

    Raises:
        BadRowError: there is none.
    """
    value = field_at(row, name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise BadRowError(f"has no {name!r} ({setting}); its fields are {', '.join(map(str, row)) or 'none'}")
    if not isinstance(value, str):
        raise BadRowError(f"{name}={value!r:.80} must be text or a whole number: put it in quotes")
    if not value.strip():
        raise BadRowError(f"{name} is blank")
    return encodable(value, name)


def texts_at(row: Mapping[str, object], name: str | None) -> tuple[str, ...]:
    """Return the texts in a column, one or a list, also as JSON; none where it is missing, empty or not used (None).

    Raises:
        BadRowError: it holds something else, or a blank text among others.
    """
    value = None if name is None else field_at(row, name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _list_in(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    texts = cast(list[object], value) if isinstance(value, list) else [value]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise BadRowError(f"{name}={value!r:.80} must be a text, or a list of texts that are not blank")
    return tuple(encodable(cast(str, text), str(name)) for text in texts)


def _list_in(text: str) -> object:
    """Return the list that a text is as JSON; the text where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def asked_at(row: Mapping[str, object], name: str) -> tuple[str, str]:
    """Return system message ("" for none) and question of a row: a text, or a conversation.

    Raises:
        BadRowError: there is no question, or more than one.
    """
    value = field_at(row, name)
    if isinstance(value, str) and CONVERSATION.match(value):
        value = _conversation_in(value, name)
    if not isinstance(value, list):
        return "", text_at(row, name, "data.question_field")
    messages = [_message(item, name) for item in cast(list[object], value)]
    systems = [content for role, content in messages if role in SYSTEM_ROLES]
    questions = [content for role, content in messages if role == "user"]
    if len(questions) != 1 or len(systems) > 1:
        raise BadRowError(
            f"{name} holds {len(questions)} user and {len(systems)} system messages, must hold one question and at "
            "most one system message: cut the conversation"
        )
    before = [role for role, _ in messages[: [role for role, _ in messages].index("user")] if role not in SYSTEM_ROLES]
    if before:
        raise BadRowError(f"{name} holds a message of the {before[0]} before the question, which is not asked: cut it")
    if not questions[0].strip():
        raise BadRowError(f"{name} asks nothing: its user message is blank")
    return encodable(systems[0], name) if systems else "", encodable(questions[0], name)


def check_media(row: Mapping[str, object]) -> None:
    """Raise `BadRowError` for a question with pictures or sound: without them it would be another one."""
    for name in MEDIA_FIELDS:
        if row.get(name):
            raise BadRowError(
                f"has {name}, which the policy is not shown: use rows of text alone, or rename the column where the "
                "question can be answered without it"
            )


def _conversation_in(text: str, name: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRowError(
            f"{name} holds the text of a conversation which is not JSON ({error}): write it as JSON, or as a list; "
            "str() and pandas write Python instead"
        ) from error


def _message(item: object, name: str) -> tuple[str, str]:
    """Return role and text of a message; its content is text, or a list of parts that are text."""
    message = cast(Mapping[str, Any], item) if isinstance(item, Mapping) else {}
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list):
        content = _text_of(cast(list[Any], content))
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRowError(f"{name} holds {item!r:.80}, must hold messages like {{'role': 'user', 'content': 'text'}}")
    return role, content


def _text_of(parts: list[Any]) -> str | None:
    """Return the text of a message's parts; None where one is no text."""
    texts: list[Any] = [cast(Any, part).get("text") if isinstance(part, Mapping) else part for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None
