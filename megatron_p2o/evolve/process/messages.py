"""Messages between rank 0 and the evolution service: one JSON object per line over an inherited socket pair."""

import json
from dataclasses import dataclass

from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.search.round import RoundSpec
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.records import from_tagged, to_tagged

MAX_LINE_BYTES = 1 << 30
"""A round with all its problems is one line; a stream without line ends is a bug."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRound:
    """Rank 0: run this round, or go on with it."""

    spec: RoundSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishRound:
    """Rank 0: time is up, publish what there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRequest:
    """Service: sample and grade one rollout."""

    request: int
    template_text: str
    problem_id: str
    temperature: float
    sample: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialReply:
    """Rank 0: the answer to a request; exactly one of the three is there."""

    request: int
    trial: Trial | None = None
    rejection: str | None = None
    """Why the template cannot be used."""
    failure: str | None = None
    """Why there is no score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundPublished:
    """Service: the library file of `stats.library_version` is there."""

    stats: RoundStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Notice:
    """Service: something a person should know."""

    text: str


Message = StartRound | FinishRound | TrialRequest | TrialReply | RoundPublished | Notice
MESSAGE_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (StartRound, FinishRound, TrialRequest, TrialReply, RoundPublished, Notice)
}


def encode(message: Message) -> bytes:
    """Return one line."""
    return json.dumps(to_tagged(message, "kind")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Return the message of one line. Raise `ValueError` when it is none."""
    return from_tagged(MESSAGE_KINDS, json.loads(line), "kind")
