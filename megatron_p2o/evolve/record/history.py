"""The history of a round. Every event is written to the journal before it takes effect, and replayed after a kill."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_p2o.evolve.trial import Trial
from megatron_p2o.records import from_tagged, to_tagged

EndedBy = Literal[
    "budget", "no_progress", "all_reflected", "deadline", "reflection_unavailable", "too_few_hard", "service_lost"
]
"""Why a round stopped. `no_progress`: proposals led to no new score any more; `all_reflected`: every hard problem has
had its only reflection; `deadline`: `round_timeout_s`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """First event of a round."""

    fingerprint: str
    """Fingerprint of the problems and settings. Events of another fingerprint mean something else."""
    max_rollouts: int | None = None
    """Rollouts that the round may score candidates with. None: its rules count in another unit. A resume with another
    number opens the round again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A rollout was graded."""

    template: str
    """`template_digest` of the template's text."""
    problem_id: str
    occasion: str
    """Tells repeated measurements of a pair apart; "" is the one that is reused."""
    trial: Trial


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked:
    """A proposal began."""

    proposal: int
    parent: int
    """Candidate id."""
    minibatch: tuple[str, ...]
    """Feedback problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reflected:
    """Reflection wrote a template, or one that was refused."""

    proposal: int
    text: str
    refusal: str = ""
    """Why the text is not used; "" when it is."""
    prompt_tokens: int = 0
    """Tokens that reflection read, by its endpoint's count; 0 where no language model reflects."""
    completion_tokens: int = 0
    """Tokens that it wrote."""
    num_unknown: int = 0
    """Replies whose endpoint did not count."""
    prompt: str = ""
    """The message that was sent; "" where no language model was asked."""
    reply: str = ""
    """What came back, shortened where it was long; "" as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A proposal became a candidate."""

    proposal: int
    candidate: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Disqualified:
    """A candidate turned out to be unusable."""

    candidate: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A proposal is over."""

    proposal: int
    outcome: str
    """"accepted", or why not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The library was written; the round is over."""

    version: int
    ended_by: EndedBy
    task: str = ""
    """Task of the round; "" in a run with a single one."""


Event = Opened | Scored | Picked | Reflected | Accepted | Disqualified | Ended | Published
EVENT_KINDS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Opened, Scored, Picked, Reflected, Accepted, Disqualified, Ended, Published)
}

CONTROL_OCCASION = "control/"
"""Begins the occasion of the plain control's scores."""

ScoreKey = tuple[str, str, str]
"""(template digest, problem id, occasion)"""


class ForeignJournal(ValueError):
    """The journal belongs to another round or another version of this program."""


class RoundHistory:
    """Events of one round, on disk and folded into what the cores ask about."""

    def __init__(
        self,
        records: Iterable[Any],
        append: Callable[[Any], None],
        fingerprint: str,
        max_rollouts: int | None = None,
    ) -> None:
        """Replay `records`; `append` keeps new ones. Raise `ForeignJournal` when they are not of this round.

        `max_rollouts`: as `Opened` keeps it, for those who watch the round.
        """
        self._append = append
        self._fingerprint = fingerprint
        self._is_opened = False
        self.max_rollouts: int | None = None
        """The latest that the journal tells."""
        self.trials: dict[ScoreKey, Trial] = {}
        """Latest by key."""
        self.num_scored = 0
        """Rollouts through candidates; the plain control's are not counted."""
        self.num_tokens = 0
        self.picks: dict[int, Picked] = {}
        self.reflections: dict[int, Reflected] = {}
        self.candidate_of: dict[int, int] = {}
        """Proposal to candidate id."""
        self.disqualified: dict[int, str] = {}
        self.outcomes: dict[int, str] = {}
        """Outcomes of ended proposals."""
        self.published: Published | None = None
        for record in records:
            self._apply(event_from_json(record))
        if not self._is_opened or max_rollouts not in (None, self.max_rollouts):
            self.add(Opened(fingerprint=fingerprint, max_rollouts=max_rollouts))

    def add(self, event: Event) -> None:
        """Journal `event`, then count it."""
        self._append(event_to_json(event))
        self._apply(event)

    def open_proposals(self) -> list[int]:
        """Return proposals that began and did not end, oldest first."""
        return sorted(set(self.picks) - set(self.outcomes))

    def outcome_counts(self) -> dict[str, int]:
        return dict(sorted(Counter(self.outcomes.values()).items()))

    def _apply(self, event: Event) -> None:
        match event:
            case Opened():
                self._check(event.fingerprint)
                self.max_rollouts = event.max_rollouts
            case Scored():
                self.trials[event.template, event.problem_id, event.occasion] = event.trial
                if not event.occasion.startswith(CONTROL_OCCASION):
                    self.num_scored += 1
                    self.num_tokens += event.trial.num_tokens
            case Picked():
                self.picks[event.proposal] = event
            case Reflected():
                self.reflections[event.proposal] = event
            case Accepted():
                self.candidate_of[event.proposal] = event.candidate
            case Disqualified():
                self.disqualified[event.candidate] = event.reason
            case Ended():
                self.outcomes[event.proposal] = event.outcome
            case Published():
                self.published = event

    def _check(self, fingerprint: str) -> None:
        if fingerprint != self._fingerprint:
            raise ForeignJournal(
                f"the journal is of round {fingerprint}, not {self._fingerprint}: problems or settings changed"
            )
        self._is_opened = True


def template_digest(text: str) -> str:
    """Return a short name for a template's text: 64 bits of its sha256."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def event_to_json(event: Event) -> Any:
    return to_tagged(event, "event")


def event_from_json(record: Any) -> Event:
    """Raise `ForeignJournal` for a record that this version of the program does not write."""
    try:
        return from_tagged(EVENT_KINDS, record, "event")
    except ValueError as error:
        raise ForeignJournal(f"the journal was written by another version: {error}") from error
