"""The reference of all settings, made from the tree: `python -m megatron_p2o.config.reference > docs/settings.md`."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_p2o.config.ranges import Range, range_of
from megatron_p2o.config.shape import is_optional, is_section, record_of, section_of
from megatron_p2o.config.tree import REFERENCE_PRESET, Config
from megatron_p2o.terminal import say

HEAD = """# Settings

Every setting of a run. This page is generated from `megatron_p2o/config/sections`; to renew it:

    python -m megatron_p2o.config.reference > docs/settings.md

A file writes None as `null`. A setting whose default is "none" must be set. `preset: reference` changes some defaults
to the authors' production settings; they stand beside the default. "The paper" is arXiv:2603.21877 (Qwen3-4B). Settings
win in this order: `--set`, the file, its `base`, the preset, the defaults.
"""

UNITS: Mapping[str, str] = {
    "_s": "seconds",
    "_mib": "MiB",
    "_tokens": "tokens",
    "_steps": "steps",
    "_epochs": "epochs",
}
"""End of a name to its unit. Other numbers are counts or have none; their meaning says of what."""


def settings_page() -> str:
    """Return `docs/settings.md`: a table for every section, in the order of the tree."""
    return "\n".join([HEAD, *_section("", Config)]).rstrip() + "\n"


def docstrings_of(section: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, on one line, by the field's name; "" for none."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = inspect.cleandoc(str(following.value.value))
            found[node.target.id] = " ".join(text.split())
    return found


def _section(prefix: str, section: type) -> Iterator[str]:
    """Yield the lines of a section and of those below it."""
    hints = get_type_hints(section, include_extras=True)
    sections = {name for name, kind in hints.items() if is_section(kind) and not is_optional(kind)}
    leaves = [field for field in dataclasses.fields(section) if field.name not in sections]
    meanings = docstrings_of(section)
    yield f"## `{prefix.removesuffix('.')}`" if prefix else "## Top level"
    yield from ["", inspect.cleandoc(section.__doc__ or ""), ""]
    yield from ["| Setting | Type | Default | Range | Unit | Meaning |", "|---|---|---|---|---|---|"]
    for field in leaves:
        name, bounds = prefix + field.name, range_of(hints[field.name])
        cells = [
            f"`{name}`",
            _type(hints[field.name]),
            _default(name, field),
            _range(bounds),
            _unit(field.name, bounds),
        ]
        yield f"| {' | '.join(_escaped(cell) for cell in [*cells, meanings[field.name]])} |"
    yield ""
    for field in dataclasses.fields(section):
        record = record_of(hints[field.name])
        if field.name in sections:
            yield from _section(f"{prefix}{field.name}.", hints[field.name])
        elif record is not None:
            yield from _section(f"{prefix}{field.name}.NAME.", record)


def _type(annotation: Any) -> str:
    """Return a type in words: "integer or null", "one of `a`, `b`"."""
    if hasattr(annotation, "__metadata__"):
        return _type(get_args(annotation)[0])
    origin, options = get_origin(annotation), get_args(annotation)
    if is_optional(annotation) and (section := section_of(annotation)) is not None:
        return f"null, or a section like `{section.__name__.removesuffix('Config').lower()}`"
    if origin in (Union, UnionType):
        return " or ".join(_type(option) for option in options)
    if origin is Literal:
        return "one of " + ", ".join(f"`{option}`" for option in options)
    if record_of(annotation) is not None:
        return "records by name"
    if origin is Mapping:
        return f"mapping of names to {_type(options[1])}"
    return {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}.get(
        annotation, "anything"
    )


def _default(name: str, field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    shown = "none" if value is dataclasses.MISSING else f"`{_yaml(value)}`"
    authors = REFERENCE_PRESET.get(name, value)
    return shown if authors == value else f"{shown}; reference: `{_yaml(authors)}`"


def _yaml(value: object) -> str:
    """Return a value as a settings file has it, on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return value.replace("\n", "\\n")
        case float():
            return f"{value:.12g}"
        case _:
            return str(value)


def _range(bounds: Range | None) -> str:
    if bounds is None:
        return ""
    if bounds.at_least is not None and bounds.at_least == bounds.at_most:
        return f"{bounds.at_least:.12g}"
    ends = ((">", bounds.above), ("≥", bounds.at_least), ("<", bounds.below), ("≤", bounds.at_most))
    limits = [f"{sign} {end:.12g}" for sign, end in ends if end is not None]
    return ", ".join([*limits, *(f"`{name}` = {number:.12g}" for name, number in bounds.names)])


def _unit(name: str, bounds: Range | None) -> str:
    if bounds is None:
        return ""
    return next((unit for ending, unit in UNITS.items() if name.endswith(ending) or name == ending[1:]), "")


def _escaped(cell: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", cell)


if __name__ == "__main__":
    say(settings_page().rstrip("\n"))
