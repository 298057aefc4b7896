"""Frozen records as JSON and back: for the socket, the journal and the library file. Never pickle."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

Record = TypeVar("Record")


def to_json(value: object) -> Any:
    """Return `value` as JSON types; dataclasses become objects, sets become sorted lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (frozenset, set)):
        return sorted(to_json(item) for item in cast(frozenset[Any], value))
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in cast(tuple[Any, ...], value)]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{type(value).__name__} has no JSON form here: add it to json_records.to_json")


def from_json(kind: type[Record], value: Any) -> Record:
    """Return `value` as `kind`. Raise `ValueError` naming the field that does not fit."""
    return cast(Record, _read(kind, value, kind.__name__))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(cast(type, kind), value, where)
    if origin in (types.UnionType, typing.Union):
        return _read_union(arguments, value, where)
    if origin is typing.Literal:
        return _expect(value in arguments, value, where, f"one of {arguments}")
    if origin in (tuple, frozenset):
        items = _expect(isinstance(value, list), value, where, "a list")
        return cast(Any, origin)(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(items))
    if origin in (dict, Mapping):
        items = _expect(isinstance(value, dict), value, where, "an object")
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in items.items()}
    if kind is float:
        number = _expect(isinstance(value, (int, float)) and not isinstance(value, bool), value, where, "a number")
        return float(number)
    is_of_kind = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return _expect(is_of_kind, value, where, kind.__name__)


def _read_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None:
        return _expect(type(None) in arguments, value, where, "a value")
    kinds = [argument for argument in arguments if argument is not type(None)]
    assert len(kinds) == 1, f"{where}: only unions with None have one JSON form"
    return _read(kinds[0], value, where)


def _read_dataclass(kind: type, value: Any, where: str) -> Any:
    fields = _expect(isinstance(value, dict), value, where, "an object")
    hints = _hints(kind)
    unknown = sorted(set(fields) - set(hints))
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]}: it was written by another version of this program")
    try:
        return kind(**{name: _read(hints[name], item, f"{where}.{name}") for name, item in fields.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(holds: bool, value: Any, where: str, expected: str) -> Any:
    if not holds:
        raise ValueError(f"{where}={value!r:.80} must be {expected}")
    return value
