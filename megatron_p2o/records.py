"""Frozen records as JSON and back: for sockets, journals and every other file of a run. Never pickle."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import msgspec

Record = TypeVar("Record")


def to_json(value: object, *, is_sorted: bool = False) -> Any:
    """Return `value` as JSON types; dataclasses become objects, sets become lists.

    Args:
        is_sorted: order sets and the keys of mappings, for a file that is compared.
    """
    return msgspec.to_builtins(value, str_keys=True, order="deterministic" if is_sorted else None)


def to_tagged(record: object, tag: str) -> dict[str, Any]:
    """Return `record` as a JSON object that names its class under `tag`."""
    return {tag: type(record).__name__, **to_json(record)}


def from_json(kind: type[Record], value: Any, *, skips_unknown: bool = False) -> Record:
    """Return the JSON value `value` as `kind`.

    Args:
        skips_unknown: pass over fields that `kind` does not have.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message names it.
    """
    try:
        record = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        raise ValueError(f"{kind.__name__}{path.removesuffix('`')}: {what}") from error
    if not skips_unknown:
        _refuse_unknown(value, to_json(record), kind.__name__)
    return record


def from_text(kind: type[Record], text: str | bytes, *, skips_unknown: bool = False) -> Record:
    """Return the JSON text `text` as `kind`, as `from_json`. Raise `ValueError` also for text that is not JSON.

    The standard library reads it: unlike msgspec's parser it takes NaN and lone surrogates, which it also writes.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return from_json(kind, value, skips_unknown=skips_unknown)


def from_tagged(kinds: Mapping[str, type[Record]], value: Any, tag: str) -> Record:
    """Return what `to_tagged` gave, as the one of `kinds` that it names. Raise `ValueError` as `from_json`."""
    fields: dict[str, Any] = dict(cast(dict[str, Any], value)) if isinstance(value, dict) else {}
    kind = kinds.get(str(fields.pop(tag, None)))
    if kind is None:
        raise ValueError(f"unknown {tag}: {value!r:.80}")
    return from_json(kind, fields)


def _refuse_unknown(value: Any, known: Any, where: str) -> None:
    """Raise `ValueError` for a field of `value` that the record read from it, `known`, does not have."""
    if isinstance(value, dict):
        for name, item in cast(dict[str, Any], value).items():
            if name not in known:
                raise ValueError(f"{where} has no field {name}: it was written by another version of this program")
            if isinstance(item, (dict, list)):
                _refuse_unknown(item, known[name], f"{where}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(cast(list[Any], value)):
            if isinstance(item, (dict, list)):
                _refuse_unknown(item, known[index], f"{where}[{index}]")
