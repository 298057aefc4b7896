"""What the tree of settings is made of: sections (dataclasses), mappings with free keys, and mappings of records.

A record is a section that a mapping holds under a name of the user's: `data.evaluation.NAME`. A file may write the
value of its shorthand field alone for the whole record.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_args, get_origin, get_type_hints

IS_SHORTHAND: Mapping[str, bool] = {"is_shorthand": True}
"""Metadata of the field for which a record may be written: `file: str = field(metadata=IS_SHORTHAND)`."""


def is_section(annotation: object) -> bool:
    """Whether the type is a dataclass of the tree."""
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def is_mapping(annotation: object) -> bool:
    """Whether the type is a Mapping with free keys."""
    return get_origin(annotation) is Mapping


def record_of(annotation: object) -> type | None:
    """Return the section that a mapping holds under each key; None for other types and other mappings."""
    value = get_args(annotation)[1] if is_mapping(annotation) else None
    return cast(type, value) if is_section(value) else None


def shorthand_of(section: object) -> str | None:
    """Return the field for which a record may be written; None where there is none."""
    fields = dataclasses.fields(cast(Any, section)) if is_section(section) else ()
    return next((field.name for field in fields if field.metadata.get("is_shorthand")), None)


def child_annotation(annotation: object, key: str) -> object:
    """Return the type of `key` in a section or mapping, None when it has no such key."""
    if is_mapping(annotation):
        return get_args(annotation)[1]
    return get_type_hints(annotation).get(key) if is_section(annotation) else None
