"""Finds what a JSON schema says in vain: validators pass over words that they do not know, and then accept anything."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

EXTENSION = "x-"
"""Begins a keyword of one's own, as OpenAPI and the drafts to come have it."""

OLD_PLACES = ("definitions",)
"""Keywords of earlier drafts that later ones still know as a place for schemas, and only as that."""


def check_keywords(schema: Any, kind: Any, what: str) -> None:
    """Raise `ValueError` for a keyword that `kind`, a validator's class, does not know, or a format it does not check.

    Args:
        schema: passes the metaschema of `kind`.
        what: names it in the message.
    """
    formats = kind.FORMAT_CHECKER.checkers
    for path, part in _parts(schema, kind, "$"):
        for keyword in part:
            if keyword not in known_keywords(kind) and not keyword.startswith(EXTENSION):
                meant = get_close_matches(keyword, known_keywords(kind), n=1)
                hint = f" (did you mean {meant[0]!r}?)" if meant else ""
                raise ValueError(
                    f"{what} has the unknown keyword {keyword!r} at {path}{hint}, which would be passed over: correct "
                    f"it, or begin its name with {EXTENSION}"
                )
        name = part.get("format")
        if isinstance(name, str) and name not in formats:
            raise ValueError(
                f"{what} has a format at {path} that is not checked here: {name!r}, only {', '.join(sorted(formats))} "
                "are: pip install 'jsonschema[format-nongpl]' for others, or write a pattern"
            )


@cache
def known_keywords(kind: Any) -> frozenset[str]:
    """Return the keywords of a validator's draft: those that it checks, and those that only describe."""
    from jsonschema_specifications import REGISTRY

    metaschema: Mapping[str, Any] = kind.META_SCHEMA
    resolver = REGISTRY.resolver(kind.ID_OF(metaschema))
    found: list[Any] = [resolver.lookup(each["$ref"]).contents for each in metaschema.get("allOf", ())]
    vocabularies = found or [metaschema]
    return frozenset(kind.VALIDATORS).union(OLD_PLACES, *(each["properties"] for each in vocabularies))


def _parts(schema: Any, kind: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each schema in a schema that is an object, and where it is."""
    from referencing.jsonschema import specification_with

    if not isinstance(schema, dict):
        return
    yield path, schema
    inner = list(specification_with(kind.META_SCHEMA["$schema"]).subresources_of(schema))
    inner += [each for place in OLD_PLACES for each in dict(schema.get(place) or {}).values() if each not in inner]
    for part in inner:
        yield from _parts(part, kind, f"{path}.{_place_of(part, schema)}")


def _place_of(part: Any, schema: Mapping[str, Any]) -> str:
    """Return the keys that lead from a schema to a schema in it."""
    for keyword, value in schema.items():
        if value is part:
            return keyword
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, entry in entries:
            if entry is part:
                return f"{keyword}.{key}"
    return "..."
