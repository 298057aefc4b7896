"""What the tree of settings is made of: sections (dataclasses), mappings with free keys, and mappings of records.

A record is a section that a mapping holds under a name of the user's: `data.evaluation.NAME`. A file may write the
value of its shorthand field alone for the whole record.
"""

import dataclasses
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

IS_LISTED = {"is_listed": True}
"""Metadata of the shorthand field of records that a file may list, and of which it may write one alone."""

ONLY_TASK = "train"
"""Name of a record that is written alone."""

IS_SHORTHAND = {"is_shorthand": True}
"""Metadata of the field for which a record may be written: `file: str = field(metadata=IS_SHORTHAND)`."""


def is_section(annotation: object) -> bool:
    """Whether the type is a dataclass of the tree, or `X | None` of one."""
    return section_of(annotation) is not None


def is_mapping(annotation: object) -> bool:
    """Whether the type is a Mapping with free keys."""
    return get_origin(annotation) is Mapping


def section_of(annotation: object) -> type | None:
    """Return the dataclass of a section's type, which may be `X | None`; None for other types."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in options if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)


def is_optional(annotation: object) -> bool:
    """Whether None is a value of the type."""
    return type(None) in get_args(annotation)


def record_of(annotation: object) -> type | None:
    """Return the section that a mapping holds under each key; None for other types and other mappings."""
    return section_of(get_args(annotation)[1]) if is_mapping(annotation) else None


def shorthand_of(annotation: object) -> str | None:
    """Return the field for which a record may be written; None where there is none."""
    return _field_with("is_shorthand", section_of(annotation))


def is_listed(annotation: object) -> bool:
    """Whether a file may list the records of a mapping, or write one alone."""
    return _field_with("is_listed", record_of(annotation)) is not None


def _field_with(mark: str, section: type | None) -> str | None:
    fields = () if section is None else dataclasses.fields(cast(Any, section))
    return next((field.name for field in fields if field.metadata.get(mark)), None)


def child_annotation(annotation: object, key: str) -> object:
    """Return the type of `key` in a section or mapping, None when it has no such key."""
    if is_mapping(annotation):
        return get_args(annotation)[1]
    section = section_of(annotation)
    return None if section is None else get_type_hints(section).get(key)
