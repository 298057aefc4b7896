"""The ancestry of templates, from the journals of evolution rounds. A library has only the templates that won."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_p2o.evolve.record.history import Accepted, Picked, Published, Reflected
from megatron_p2o.evolve.record.journal import intact_lines
from megatron_p2o.records import from_json
from megatron_p2o.types import PLAIN

LineageEvent = Picked | Reflected | Accepted | Published
LINEAGE_EVENTS: Mapping[str, type[LineageEvent]] = {
    kind.__name__: kind for kind in (Picked, Reflected, Accepted, Published)
}
"""Events that a lineage is read from, by name. A journal of another version may hold others."""


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


def read_rounds(directory: Path) -> list[RoundLineage]:
    """Return the rounds that have published a library, from `journal-*.jsonl` files; none when there is no folder."""
    rounds = [_round(path) for path in sorted(directory.glob("journal-*.jsonl"))]
    return [found for found in rounds if found is not None]


def ancestors(round_: RoundLineage, template_id: int) -> Iterator[ReflectedTemplate]:
    """Yield the template's ancestors that the round wrote, nearest first."""
    known = round_.candidates.get(template_id)
    while known is not None and known.parent != PLAIN.id:
        known = round_.candidates.get(known.parent)
        if known is not None:
            yield known


def _round(path: Path) -> RoundLineage | None:
    picks: dict[int, Picked] = {}
    texts: dict[int, str] = {}
    candidates: dict[int, ReflectedTemplate] = {}
    published: Published | None = None
    for event in _events(path):
        match event:
            case Picked():
                picks[event.proposal] = event
            case Reflected():
                texts[event.proposal] = event.text
            case Accepted():
                pick = picks[event.proposal]
                candidates[event.candidate] = ReflectedTemplate(
                    id=event.candidate,
                    text=texts[event.proposal],
                    parent=pick.parent,
                    num_problems=len(pick.minibatch),
                )
            case Published():
                published = event
    if published is None:
        return None
    return RoundLineage(version=published.version, task=published.task, candidates=candidates)


def _events(path: Path) -> Iterator[LineageEvent]:
    """Yield the events that make a lineage, up to the first line that is damaged or still being written."""
    for number, (_, body) in enumerate(intact_lines(path), start=1):
        # Scores are most of a journal and hold whole responses; a lineage needs none of them.
        if body.startswith(b'{"event":"Scored"'):
            continue
        try:
            fields = json.loads(body)
            kind = LINEAGE_EVENTS.get(fields.pop("event"))
            if kind is not None:
                yield from_json(kind, fields, skips_unknown=True)
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is no event of a round ({error}): restore the file") from error
