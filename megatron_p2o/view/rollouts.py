"""Finds the rollouts of a problem among those of all steps without reading them all again."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.metrics.rollouts import step_files


class _Named(msgspec.Struct):
    """The part of a rollout's line by which it is found."""

    problem_id: str
    question: str = ""
    level: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class _LineSpan:
    """Lines of one problem in the file of a step; they stand together."""

    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _StepFile:
    path: Path
    identity: tuple[int, int]
    """Inode and size: a step that is done again writes another file."""
    places: dict[str, list[_LineSpan]] = field(default_factory=dict[str, list[_LineSpan]])


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemFacts:
    """What the rollouts of a problem say about it."""

    question: str
    level: str
    source: str


class RolloutIndex:
    """Problems to the places of their rollouts in `rollouts/step-*.jsonl`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._steps: dict[int, _StepFile] = {}
        self.facts: dict[str, ProblemFacts] = {}

    def catch_up(self) -> None:
        """Read the files of steps that are new. A step's file is written whole."""
        files = dict(step_files(self._directory))
        for step in self._steps.keys() - files.keys():
            del self._steps[step]
        for step, path in files.items():
            try:
                status = path.stat()
                identity = (status.st_ino, status.st_size)
                if step not in self._steps or self._steps[step].identity != identity:
                    self._steps[step] = self._indexed(path, identity)
            except OSError:  # it was moved away after it was listed
                self._steps.pop(step, None)

    def steps_of(self, problem_id: str) -> list[int]:
        """Return the steps with rollouts of the problem, oldest first."""
        return [step for step in sorted(self._steps) if problem_id in self._steps[step].places]

    def find(self, problem_id: str, steps: Sequence[int]) -> list[JsonObject]:
        """Return the rollouts of the problem in these steps, each with its `step`."""
        return [line for step in steps for line in self.of_step(step, problem_id)]

    def most_steps(self) -> int:
        """Return how many steps the problem has that was asked most often."""
        return max(Counter(id_ for step in self._steps.values() for id_ in step.places).values(), default=0)

    def of_step(self, step: int, problem_id: str) -> list[JsonObject]:
        """Return the problem's rollouts of a step, each with its `step`; none where they were not written."""
        known = self._steps.get(step)
        if known is None or problem_id not in known.places:
            return []
        found: list[JsonObject] = []
        try:
            with known.path.open("rb") as file:
                for place in known.places[problem_id]:
                    file.seek(place.start)
                    found += [_line(line) for line in file.read(place.num_bytes).splitlines()]
        except OSError:  # gone since it was indexed
            return []
        # A file that was replaced since it was indexed has other lines there: the next look finds its own.
        return [{"step": step, **line} for line in found if line.get("problem_id") == problem_id]

    def _note(self, named: _Named) -> None:
        self.facts[named.problem_id] = ProblemFacts(question=named.question, level=named.level, source=named.source)

    def _indexed(self, path: Path, identity: tuple[int, int]) -> _StepFile:
        indexed = _StepFile(path, identity)
        start, beginning = 0, b""
        named: _Named | None = None
        for line in path.read_bytes().splitlines(keepends=True):
            # Most lines are of the problem of the line before them, and reading them is most of the work.
            if not beginning or not line.startswith(beginning):
                named = _named(line)
                beginning = _beginning(line, named)
                if named is not None:
                    self._note(named)
            if named is not None:
                places = indexed.places.setdefault(named.problem_id, [])
                if places and places[-1].start + places[-1].num_bytes == start:
                    places[-1] = _LineSpan(places[-1].start, places[-1].num_bytes + len(line))
                else:
                    places.append(_LineSpan(start, len(line)))
            start += len(line)
        return indexed


def _beginning(line: bytes, named: _Named | None) -> bytes:
    """Return how the line of a problem begins; nothing when that does not tell the problem."""
    if named is None:
        return b""
    beginning = b'{"problem_id": %s, ' % json.dumps(named.problem_id, ensure_ascii=False).encode(errors="replace")
    return beginning if line.startswith(beginning) else b""


def _line(line: bytes) -> JsonObject:
    """Return a rollout; nothing for a damaged one."""
    try:
        read = json.loads(line, parse_constant=_none)
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


_DECODER = msgspec.json.Decoder(_Named)


def _named(line: bytes) -> _Named | None:
    """Return what a line is found by; None for a damaged one."""
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError:
        pass
    try:  # ten times slower, but takes NaN and half surrogates, which a run writes, too
        return msgspec.convert(json.loads(line), _Named)
    except (ValueError, RecursionError):
        return None


def _none(_constant: str) -> None:
    """Take NaN and infinity for no number: a page cannot be sent them."""
