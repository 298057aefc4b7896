"""Rounds of prompt evolution as their journals grow: candidates with their parents, scores and fates."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_p2o.evolve.record.history import (
    CONTROL_OCCASION,
    Accepted,
    Disqualified,
    Ended,
    Event,
    ForeignJournal,
    Opened,
    Picked,
    Published,
    Reflected,
    Scored,
    event_from_json,
    template_digest,
)
from megatron_p2o.evolve.record.journal import body_of
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.report.lineage import ReflectedTemplate, RoundLineage
from megatron_p2o.types import PLAIN
from megatron_p2o.view.followed import FollowedFile


@dataclass(slots=True)
class ScoreSum:
    """Scores of a template on one problem."""

    total: float = 0.0
    num_trials: int = 0

    @property
    def mean(self) -> float:
        return self.total / self.num_trials


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewedCandidate:
    """A template of a round."""

    id: int
    proposal: int | None
    """None for the plain one, which the round starts with."""
    parent: int | None
    """None for the plain one."""
    text: str
    minibatch: tuple[str, ...]
    """Problems that its reflection was shown."""
    disqualified: str
    """Why it cannot be used; "" when it can."""
    scores: Mapping[str, ScoreSum]
    """By problem."""

    @property
    def mean_score(self) -> float | None:
        """Mean over its problems; None before the first score."""
        return sum(score.mean for score in self.scores.values()) / len(self.scores) if self.scores else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewedRefusal:
    """A proposal that did not become a candidate."""

    proposal: int
    parent: int
    text: str
    outcome: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewedReflection:
    """What reflection was shown for a proposal, and what it wrote."""

    parent: int
    parent_text: str
    examples: Mapping[str, Trial | None]
    """How the parent did on each problem that was shown; None where the journal does not tell."""
    text: str
    refusal: str
    """Why the text is not used; "" when it is."""
    prompt_tokens: int
    completion_tokens: int
    prompt: str
    """The message that was sent; "" where none was, or the journal does not keep it."""
    reply: str
    """What came back; "" as well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewedLineage:
    """A proposal that a lineage is working on."""

    proposal: int
    parent: int
    stage: str
    """What it waits for."""
    candidate: int | None
    """What it has become; None before it was better than its parent."""


@dataclass(slots=True)
class _Events:
    """What the events of a journal add up to."""

    max_rollouts: int | None = None
    picks: dict[int, Picked] = field(default_factory=dict[int, Picked])
    reflections: dict[int, Reflected] = field(default_factory=dict[int, Reflected])
    candidate_of: dict[int, int] = field(default_factory=dict[int, int])
    disqualified: dict[int, str] = field(default_factory=dict[int, str])
    outcomes: dict[int, str] = field(default_factory=dict[int, str])
    scores: dict[str, dict[str, ScoreSum]] = field(default_factory=dict[str, dict[str, ScoreSum]])
    num_rollouts: int = 0
    num_control_rollouts: int = 0
    num_tokens: int = 0
    published: Published | None = None
    shown: dict[tuple[str, str], Trial] = field(default_factory=dict[tuple[str, str], Trial])
    """Latest trial of a template, by its digest, on a problem."""
    examples: dict[int, Mapping[str, Trial | None]] = field(default_factory=dict[int, Mapping[str, Trial | None]])
    """By proposal."""


class ViewedRound:
    """One journal."""

    def __init__(self, path: Path) -> None:
        number, _, self.task = path.stem.removeprefix("journal-").partition("-")
        self.number = int(number)
        self.damage = ""
        """What is wrong with the journal; nothing after that place is shown."""
        self._events = _Events()
        self._num_lines = 0
        self._file = FollowedFile(path, self._restart, self._take)

    def catch_up(self) -> None:
        self._file.catch_up()

    @property
    def published(self) -> Published | None:
        """None while the round runs, or when it was ended without a library."""
        return self._events.published

    @property
    def num_rollouts(self) -> int:
        """Rollouts through candidates."""
        return self._events.num_rollouts

    @property
    def max_rollouts(self) -> int | None:
        """Rollouts that it may score candidates with; None where its journal does not tell."""
        return self._events.max_rollouts

    @property
    def num_control_rollouts(self) -> int:
        """Plain rollouts for comparison (`evolution.plain_control`)."""
        return self._events.num_control_rollouts

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all those."""
        return self._events.num_tokens

    def lineages(self) -> list[ViewedLineage]:
        """Return the proposals under way, oldest first; each is the work of one lineage."""
        events = self._events
        return [
            ViewedLineage(
                proposal=proposal,
                parent=events.picks[proposal].parent,
                stage=self._stage(proposal),
                candidate=events.candidate_of.get(proposal),
            )
            for proposal in sorted(events.picks.keys() - events.outcomes.keys())
        ]

    def _stage(self, proposal: int) -> str:
        events = self._events
        pick, reflected = events.picks[proposal], events.reflections.get(proposal)
        if proposal in events.candidate_of:
            return "its candidate is tried on development problems"
        if reflected is not None:
            return "its text is compared with the parent" if not reflected.refusal else "its text was refused"
        tried = events.scores.get(template_digest(self._text_of(pick.parent)), {})
        return "reflection writes" if all(id_ in tried for id_ in pick.minibatch) else "the parent is tried"

    def outcome_counts(self) -> Mapping[str, int]:
        """Return proposals that are over, by outcome, the most frequent first."""
        return dict(Counter(self._events.outcomes.values()).most_common())

    def candidates(self) -> list[ViewedCandidate]:
        """Return the candidates in order of id; the first asks plainly."""
        found = [self._candidate(PLAIN.id, None, None, PLAIN.text, ())]
        for proposal, candidate in self._events.candidate_of.items():
            pick = self._events.picks[proposal]
            text = self._events.reflections[proposal].text
            found.append(self._candidate(candidate, proposal, pick.parent, text, pick.minibatch))
        return sorted(found, key=lambda candidate: candidate.id)

    @property
    def lineage(self) -> RoundLineage | None:
        """Who was reflected from whom; None before the round published a library."""
        published, events = self.published, self._events
        if published is None:
            return None
        candidates = {
            candidate: ReflectedTemplate(
                id=candidate,
                text=events.reflections[proposal].text,
                parent=events.picks[proposal].parent,
                num_problems=len(events.picks[proposal].minibatch),
            )
            for proposal, candidate in events.candidate_of.items()
        }
        return RoundLineage(version=published.version, task=published.task, candidates=candidates)

    def refusals(self) -> list[ViewedRefusal]:
        """Return the proposals that are over and did not become candidates, newest first."""
        events = self._events
        return [
            ViewedRefusal(
                proposal=proposal,
                parent=events.picks[proposal].parent,
                text=events.reflections[proposal].text if proposal in events.reflections else "",
                outcome=outcome,
            )
            for proposal, outcome in sorted(events.outcomes.items(), reverse=True)
            if proposal not in events.candidate_of and proposal in events.picks
        ]

    def reflection(self, proposal: int) -> ViewedReflection | None:
        """Return what passed between the round and its reflection for a proposal; None before it answered."""
        events = self._events
        pick, reflected = events.picks.get(proposal), events.reflections.get(proposal)
        if pick is None or reflected is None:
            return None
        return ViewedReflection(
            parent=pick.parent,
            parent_text=self._text_of(pick.parent),
            examples=events.examples[proposal],
            text=reflected.text,
            refusal=reflected.refusal,
            prompt_tokens=reflected.prompt_tokens,
            completion_tokens=reflected.completion_tokens,
            prompt=reflected.prompt,
            reply=reflected.reply,
        )

    def _text_of(self, candidate: int) -> str:
        proposals = {id_: proposal for proposal, id_ in self._events.candidate_of.items()}
        return self._events.reflections[proposals[candidate]].text if candidate in proposals else PLAIN.text

    def _candidate(
        self, id_: int, proposal: int | None, parent: int | None, text: str, minibatch: tuple[str, ...]
    ) -> ViewedCandidate:
        return ViewedCandidate(
            id=id_,
            proposal=proposal,
            parent=parent,
            text=text,
            minibatch=minibatch,
            disqualified=self._events.disqualified.get(id_, ""),
            scores=self._events.scores.get(template_digest(text), {}),
        )

    def _restart(self) -> None:
        self._events, self._num_lines, self.damage = _Events(), 0, ""

    def _take(self, line: bytes) -> None:
        self._num_lines += 1
        if self.damage:
            return
        body = body_of(line)
        try:
            if body is None:
                raise ValueError("its length or checksum is wrong")
            self._apply(event_from_json(json.loads(body)))
        except (ValueError, KeyError, ForeignJournal) as error:
            self.damage = f"{self._file.path}:{self._num_lines} cannot be read ({error}): what follows is not shown"

    def _apply(self, event: Event) -> None:
        events = self._events
        match event:
            case Opened():
                events.max_rollouts = event.max_rollouts
            case Scored():
                self._score(event)
            case Picked():
                events.picks[event.proposal] = event
            case Reflected():
                events.reflections[event.proposal] = event
                pick = events.picks[event.proposal]
                digest = template_digest(self._text_of(pick.parent))
                events.examples[event.proposal] = {
                    problem_id: events.shown.get((digest, problem_id)) for problem_id in pick.minibatch
                }
            case Accepted():
                events.candidate_of[event.proposal] = event.candidate
            case Disqualified():
                events.disqualified[event.candidate] = event.reason
            case Ended():
                events.outcomes[event.proposal] = event.outcome
            case Published():
                events.published = event

    def _score(self, event: Scored) -> None:
        events = self._events
        events.num_tokens += event.trial.num_tokens
        if event.occasion.startswith(CONTROL_OCCASION):
            events.num_control_rollouts += 1
            return
        events.num_rollouts += 1
        events.shown[event.template, event.problem_id] = event.trial
        score = events.scores.setdefault(event.template, {}).setdefault(event.problem_id, ScoreSum())
        score.total += event.trial.reward
        score.num_trials += 1
