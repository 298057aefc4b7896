"""One round of evolution: what it is given, and what both sets of rules (asynchronous, reference) work on."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_p2o.config.tree import AssignmentConfig, EvolutionConfig
from megatron_p2o.evolve.record.history import Accepted, Disqualified, Ended, Picked, Reflected, RoundHistory
from megatron_p2o.evolve.reflection.guards import refusal_of
from megatron_p2o.evolve.reflection.reflection import Example, ReflectionRefused, ReflectionRequest, shorten
from megatron_p2o.evolve.reflection.reflectors import Reflector
from megatron_p2o.evolve.search.budget import RoundSplit
from megatron_p2o.evolve.search.candidate_pool import Candidate, CandidatePool, Score
from megatron_p2o.evolve.search.rules import rules_named
from megatron_p2o.evolve.search.score_book import ScoreBook
from megatron_p2o.evolve.trial import FreeScore, Trial
from megatron_p2o.files import json_digest
from megatron_p2o.records import to_json
from megatron_p2o.types import Problem, Template

MAX_REFUSED_CHARS = 2_000
"""Longest kept text of a refused template."""

MAX_REPLY_CHARS = 16_000
"""Longest kept text of a reply. One with reasoning may have ten times as many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSettings:
    """The part of the configuration that evolution depends on."""

    evolution: EvolutionConfig
    assignment: AssignmentConfig
    group_size: int
    sampling_temperature: float
    """Temperature of training rollouts; the plain control uses it, too."""
    min_problems: int
    seed: int
    task_description: str | None = None
    """As `ReflectionRequest.task_description`."""
    control_tokens: tuple[str, ...] = ()
    """What the policy's tokenizer takes for control tokens, as text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSpec:
    """What rank 0 asks the service for."""

    epoch: int
    library_version: int
    """Version of the library to publish."""
    problems: tuple[Problem, ...]
    """Hard ones, each once; `question` is the user message as the policy sees it without a template."""
    warm_templates: tuple[Template, ...]
    """Templates to start with, besides the empty one."""
    settings: RoundSettings
    task: str = ""
    """Task that all problems are of; "" in a run with a single one."""
    free_scores: tuple[FreeScore, ...] = ()
    """Lost when the trainer restarts, so not part of the round's identity."""

    def fingerprint(self) -> str:
        """Return what a journal must agree on to be continued: everything that events refer to."""
        evolution = self.settings.evolution
        identity = [
            [self.epoch, self.library_version],
            to_json(self.problems),
            [template.text for template in self.warm_templates],
            [evolution.rules, evolution.dev_size, evolution.minibatch_size, evolution.num_lineages],
            [evolution.trial_temperature, evolution.guard_leaks, evolution.reflection.backend],
            [self.settings.min_problems, self.settings.seed],
            *([self.task] if self.task else []),
        ]
        return json_digest(identity)[:16]

    def rng(self, purpose: str) -> random.Random:
        """Return a generator that depends on the run's seed, the round with its task, and `purpose` only."""
        task = f"{self.task}/" if self.task else ""
        return random.Random(f"{self.settings.seed}/{self.epoch}/{task}{purpose}")


class Round:
    """A round in progress, rebuilt from its history when it is resumed."""

    def __init__(
        self,
        spec: RoundSpec,
        split: RoundSplit,
        history: RoundHistory,
        book: ScoreBook,
        reflector: Reflector,
        notify: Callable[[str], None],
    ) -> None:
        """`notify` gets messages for the user."""
        self.spec = spec
        self.settings = spec.settings.evolution
        self.rules = rules_named(self.settings.rules)
        self.split = split
        self.history = history
        self.book = book
        self.pool = CandidatePool(split.dev)
        self._problems = {problem.id: problem for problem in spec.problems}
        self._reflector = reflector
        self.notify = notify
        self._add_seeds()

    def begin(self, picked: Picked) -> None:
        """Journal a proposal, unless it was before a kill."""
        if picked.proposal not in self.history.picks:
            self.history.add(picked)

    async def reflect(self, proposal: int, parent: Candidate, examples: Mapping[str, Trial]) -> str:
        """Return the template reflection wrote for a proposal; asked once, journalled.

        `examples` maps the minibatch's problem ids to how the parent did. Raises `ReflectionRefused` when the answer
        is useless or unsafe, `ReflectionUnavailable` when there is none.
        """
        reflected = self.history.reflections.get(proposal)
        if reflected is None:
            reflected = await self._ask(proposal, parent, examples)
            self.history.add(reflected)
        if reflected.refusal:
            raise ReflectionRefused(reflected.refusal)
        return reflected.text

    def accept(self, picked: Picked, text: str) -> Candidate:
        """Add the proposal's candidate to the pool and return it."""
        candidate = self._add(picked, text)
        if picked.proposal not in self.history.candidate_of:
            self.history.add(Accepted(proposal=picked.proposal, candidate=candidate.id))
        return candidate

    def end(self, proposal: int, outcome: str) -> None:
        if proposal not in self.history.outcomes:
            self.history.add(Ended(proposal=proposal, outcome=outcome))

    async def score(self, candidate: Candidate, problem_ids: Sequence[str]) -> None:
        """Try a candidate on development problems and set the scores there are. Raises as `ScoreBook.measure`."""
        try:
            await self.book.measure(candidate.text, problem_ids)
        finally:
            self._record_known(candidate, problem_ids)

    def disqualify(self, candidate: Candidate, reason: str) -> None:
        """Take a candidate out of the running: its template cannot be used."""
        if candidate.id not in self.history.disqualified:
            self.history.add(Disqualified(candidate=candidate.id, reason=reason))
        self.pool.disqualify(candidate.id)

    def restore_candidates(self) -> None:
        """Bring the pool to where the history ends: candidates, scores, disqualifications."""
        for proposal, candidate_id in sorted(self.history.candidate_of.items(), key=lambda item: item[1]):
            added = self._add(self.history.picks[proposal], self.history.reflections[proposal].text)
            assert added.id == candidate_id, f"the journal says candidate {candidate_id}, replay gives {added.id}"
        for candidate in self.pool.qualified():
            self._record_known(candidate, self.dev_ids(candidate))
        for candidate_id in self.history.disqualified:
            self.pool.disqualify(candidate_id)

    def dev_ids(self, candidate: Candidate) -> list[str]:
        """Return the development problems it may be scored on: none whose answer its lineage has seen."""
        if not self.settings.guard_leaks:
            return list(self.split.dev)
        return [problem_id for problem_id in self.split.dev if problem_id not in candidate.lineage_problem_ids]

    async def _ask(self, proposal: int, parent: Candidate, examples: Mapping[str, Trial]) -> Reflected:
        request = ReflectionRequest(
            proposal=proposal,
            parent_text=parent.text,
            task_description=self.spec.settings.task_description,
            examples=tuple(
                Example(problem=self._problems[problem_id], trial=trial) for problem_id, trial in examples.items()
            ),
        )
        try:
            text = (await self._reflector.propose(request)).strip()
        except ReflectionRefused as refused:
            return _reflected(request, "", str(refused))
        refusal = self._refusal(text, parent, examples)
        return _reflected(request, _kept(text) if refusal else text, refusal)

    def _refusal(self, text: str, parent: Candidate, examples: Mapping[str, Trial]) -> str:
        """Return why `text` may not become a candidate; "" when it may."""
        lineage = parent.lineage_problem_ids | examples.keys() if self.settings.guard_leaks else ()
        return refusal_of(
            text,
            parent_text=parent.text,
            max_template_tokens=self.settings.max_template_tokens,
            is_duplicate=self.rules.refuses_duplicates and self.pool.is_known(text),
            answers=[gold for key in sorted(lineage) if (gold := self._gold_answer(key)) is not None],
        )

    def _gold_answer(self, problem_id: str) -> str | None:
        """Return the gold answer of a problem of the round; None where it has none, or belongs to an earlier round."""
        problem = self._problems.get(problem_id)
        return None if problem is None else problem.answer

    def _add(self, picked: Picked, text: str) -> Candidate:
        parent = self.pool[picked.parent]
        is_blind = self.settings.reflection.backend == "phrasebook"  # it is shown feedback but does not look at it
        seen = frozenset[str]() if is_blind else frozenset(picked.minibatch)
        return self.pool.add(text, parent.id, parent.lineage_problem_ids | seen)

    def _record_known(self, candidate: Candidate, problem_ids: Sequence[str]) -> None:
        for problem_id in problem_ids:
            trial = self.book.known(candidate.text, problem_id)
            if trial is not None and trial.finish_reason != "abort":
                score = Score(reward=trial.reward, weight_version=trial.weight_version, solved_share=trial.solved_share)
                self.pool.record(candidate.id, problem_id, score)

    def _add_seeds(self) -> None:
        self.pool.add("", None)
        for template in () if self.rules.is_single_turn else self.spec.warm_templates:
            if not self.pool.is_known(template.text):
                self.pool.add(template.text, None, template.lineage_problem_ids)


def _kept(text: str) -> str:
    """Return the part of a refused template that goes to the journal."""
    return _valid(shorten(text, MAX_REFUSED_CHARS))


def _valid(text: str) -> str:
    """Return `text` with a question mark for each half surrogate, which no file can hold."""
    return text.encode(errors="replace").decode()


def _reflected(request: ReflectionRequest, text: str, refusal: str) -> Reflected:
    return Reflected(
        proposal=request.proposal,
        text=text,
        refusal=refusal,
        prompt_tokens=request.usage.prompt_tokens,
        completion_tokens=request.usage.completion_tokens,
        num_unknown=request.usage.num_unknown,
        prompt=_valid(request.usage.prompt),
        reply=_valid(shorten(request.usage.reply, MAX_REPLY_CHARS)),
    )
