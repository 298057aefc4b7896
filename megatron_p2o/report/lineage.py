"""The ancestry of templates. A library has only the templates that won; the round that published it has the others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_p2o.types import PLAIN


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectedTemplate:
    """A candidate that reflection wrote."""

    id: int
    text: str
    parent: int
    num_problems: int
    """Problems of its reflection, those of its ancestors not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundLineage:
    """The candidates of one round."""

    version: int
    """Version of the library that the round published."""
    task: str
    """Task of the round; "" in a run with a single one."""
    candidates: Mapping[int, ReflectedTemplate]
    """Candidates by id, without those the round started with."""


def ancestors(round_: RoundLineage, template_id: int) -> Iterator[ReflectedTemplate]:
    """Yield the template's ancestors that the round wrote, nearest first."""
    known = round_.candidates.get(template_id)
    while known is not None and known.parent != PLAIN.id:
        known = round_.candidates.get(known.parent)
        if known is not None:
            yield known
