"""Makes the library of the next epoch from the pool of a round, and the numbers for a report."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from megatron_p2o.config.tree import AssignmentConfig
from megatron_p2o.evolve.record.history import EndedBy, template_digest
from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.evolve.search.round import Round
from megatron_p2o.files import write_whole
from megatron_p2o.records import from_text, to_json
from megatron_p2o.types import PLAIN, Template


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundStats:
    """What a round did."""

    epoch: int
    task: str = ""
    """Task that its problems are of; "" in a run with a single one, and of several together."""
    library_version: int
    ended_by: EndedBy
    num_hard: int
    """Hard problems of the round."""
    num_dev: int = 0
    """The part of them that candidates are scored on; 0 where no round took place."""
    num_feedback: int = 0
    """The part of them that reflection is shown."""
    num_candidates: int = 0
    """Number of candidates, including those the round started with."""
    num_templates: int = 0
    """Published."""
    num_rollouts: int = 0
    """Trials of templates in this round."""
    num_tokens: int = 0
    """Sampled by them."""
    best_score: float = 0.0
    """Highest mean development reward of a published template."""
    coverage: float = 0.0
    """Share of the development problems that some published template solved: what the round claims."""
    plain_coverage: float | None = None
    """Share that as many plain samples solve (`evolution.plain_control`): what luck alone would have claimed."""
    outcomes: Mapping[str, int]
    """Proposals by how they ended."""
    num_restarts: int = 0
    """Times the service was lost and resumed."""
    num_failed_trials: int = 0
    """Rollouts without a verdict, of templates and of the plain control: they are no scores."""
    num_unweighed: int = 0
    """Published templates without a `Template.reliance`, under `assignment.weight: transfer`: drawn by score alone."""
    duration_s: float = 0.0

    @property
    def is_success(self) -> bool:
        """Whether the round ran to its own end and published something."""
        return self.ended_by in ("budget", "no_progress", "all_reflected") and self.num_templates > 0

    @property
    def num_proposals(self) -> int:
        return sum(self.outcomes.values())

    @property
    def num_refused(self) -> int:
        """Proposals whose template was not tried: reflection gave none, or one that may not be used."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith(("refused", "rejected")))

    def summary(self) -> str:
        """Return one line for the log: why the round ended, what it found and how its proposals ended."""
        task = f" of {self.task}" if self.task else ""
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items()) or "none"
        return (
            f"round {self.epoch}{task} ended by {self.ended_by} after {self.num_rollouts} rollouts: "
            f"{self.num_templates} templates of {self.num_candidates} candidates, coverage {self.coverage:.2f}; "
            f"proposals: {outcomes}"
        )


def rounds_path(run_dir: Path) -> Path:
    """Return the file of a run's rounds: a `RoundStats` a line, the last one of each epoch and task."""
    return run_dir / "evolution" / "rounds.jsonl"


def keep_round(run_dir: Path, stats: RoundStats) -> None:
    """Write a round that is over to the run's file of rounds, in the place of one of the same epoch and task.

    Raises `OSError` when it cannot, `ValueError` when the file is damaged.
    """
    path = rounds_path(run_dir)
    written = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rounds = [(line, from_text(RoundStats, line)) for line in written]
    kept = [line for line, known in rounds if (known.epoch, known.task) != (stats.epoch, stats.task)]
    write_whole(path, "\n".join([*kept, json.dumps(to_json(stats))]) + "\n")


def build_library(round_: Round) -> PublishedLibrary:
    """Return the cover's templates, best first, and their assignment to all hard problems; of `single_turn` rules each
    problem's own."""
    if round_.rules.is_single_turn:
        return library_of_rewrites(round_)
    spec = round_.spec
    solved = {candidate.id: round_.pool.solved(candidate.id) for candidate in round_.pool.qualified()}
    if not round_.rules.publishes_empty:
        del solved[0]
    cover = [
        replace(round_.pool.template(candidate_id), task=spec.task, reliance=reliance_of(round_, candidate_id))
        for candidate_id in greedy_cover(solved)
    ]
    if round_.rules.reuses_scores:
        solved = {template.id: solved[template.id] | solved_feedback(round_, template) for template in cover}
    assignments = assign(
        [problem.id for problem in spec.problems],
        cover,
        solved,
        spec.settings.group_size,
        spec.settings.assignment,
        spec.rng("assignment"),
        guard_leaks=spec.settings.evolution.guard_leaks,
    )
    return PublishedLibrary(
        version=spec.library_version,
        templates=tuple(sorted(cover, key=lambda template: (-template.score, template.id))),
        assignments=assignments,
    )


def library_of_rewrites(round_: Round) -> PublishedLibrary:
    """Return the template that was written for each problem, in its own group alone; of equal texts the first.

    It has seen its problem's response and gold answer, which it must not tell (`guards`).
    """
    for proposal, reflected in sorted(round_.history.reflections.items()):
        if not reflected.refusal and proposal not in round_.history.candidate_of:
            round_.accept(round_.history.picks[proposal], reflected.text)
    spec, templates, assignments = round_.spec, dict[str, Template](), dict[str, tuple[Template, ...]]()
    for proposal, candidate_id in sorted(round_.history.candidate_of.items()):
        (problem_id,) = round_.history.picks[proposal].minibatch
        written = replace(round_.pool.template(candidate_id), task=spec.task)
        template = templates.setdefault(written.text, written)
        settings = spec.settings
        assignments[problem_id] = _draw([template], settings.group_size, settings.assignment, spec.rng("assignment"))
    return PublishedLibrary(version=spec.library_version, templates=tuple(templates.values()), assignments=assignments)


def solved_feedback(round_: Round, template: Template) -> frozenset[str]:
    """Return the feedback problems `template` is known to solve: from minibatches of its children, and from training.

    Those its own lineage was reflected on prove nothing. The authors score templates on development problems only.
    """
    trials = {
        problem_id: round_.book.known(template.text, problem_id)
        for problem_id in round_.split.feedback
        if problem_id not in template.lineage_problem_ids
    }
    return frozenset(key for key, trial in trials.items() if trial is not None and trial.is_solved)


def reliance_of(round_: Round, candidate_id: int) -> float | None:
    """Return the mean reliance of the round's solutions through a candidate; that of the last library's template of the
    same text where there are none, None where there is neither."""
    text = round_.pool[candidate_id].text
    measured = [
        trial.reliance
        for (digest, *_), trial in round_.history.trials.items()
        if digest == template_digest(text) and trial.reliance is not None
    ]
    if measured:
        return math.fsum(measured) / len(measured)  # exact, so that the order in which trials ended does not matter
    return next((warm.reliance for warm in round_.spec.warm_templates if warm.text == text), None)


def round_stats(round_: Round, library: PublishedLibrary, ended_by: EndedBy, plain: float | None = None) -> RoundStats:
    """Return the numbers of a round that published `library`; `plain` is the control's coverage."""
    covered = frozenset[str]().union(*(round_.pool.solved(template.id) for template in library.templates))
    return RoundStats(
        epoch=round_.spec.epoch,
        task=round_.spec.task,
        library_version=library.version,
        ended_by=ended_by,
        num_hard=len(round_.spec.problems),
        num_dev=len(round_.split.dev),
        num_feedback=len(round_.split.feedback),
        num_candidates=len(round_.pool),
        num_templates=len(library.templates),
        num_rollouts=round_.history.num_scored,
        num_tokens=round_.history.num_tokens,
        best_score=max((template.score for template in library.templates), default=0.0),
        coverage=len(covered) / len(round_.split.dev) if round_.split.dev else 0.0,
        plain_coverage=plain,
        num_unweighed=sum(
            template.id != PLAIN.id and template.reliance is None
            for template in library.templates
            if round_.spec.settings.assignment.weight == "transfer"
        ),
        outcomes=round_.history.outcome_counts(),
    )


def greedy_cover(solved: Mapping[int, frozenset[str]]) -> list[int]:
    """Return candidates in the order chosen: each adds most newly solved problems, ties to the lowest id.

    Empty if no candidate solves anything; the next epoch then has no templates.
    """
    cover: list[int] = []
    covered: frozenset[str] = frozenset()
    while True:
        gains = {candidate: len(solved[candidate] - covered) for candidate in sorted(solved)}
        best = max(gains, key=lambda candidate: (gains[candidate], -candidate), default=None)
        if best is None or gains[best] == 0:
            return cover
        cover.append(best)
        covered |= solved[best]


SMALLEST_WEIGHT = 1e-6
"""Weight of a template with mean reward 0: still possible when it is alone."""


def assign(
    problem_ids: Sequence[str],
    cover: Sequence[Template],
    solved: Mapping[int, frozenset[str]],
    group_size: int,
    config: AssignmentConfig,
    rng: random.Random,
    *,
    guard_leaks: bool,
) -> dict[str, tuple[Template, ...]]:
    """Return one template per rollout for every problem that has any; a problem left out is asked plainly.

    Templates of `cover` that solve the problem come into question, else all of `cover`; under `guard_leaks` never one
    whose lineage saw the problem's answer. Drawn with replacement, weighted by mean development reward, and by reliance
    where `assignment.weight` says so. `solved` maps template ids to the problems they are known to solve: the authors
    know of development problems only.
    """
    assignments: dict[str, tuple[Template, ...]] = {}
    for problem_id in problem_ids:
        allowed = [z for z in cover if not (guard_leaks and problem_id in z.lineage_problem_ids)]
        solvers = [z for z in allowed if problem_id in solved[z.id]]
        if allowed:
            assignments[problem_id] = _draw(solvers or allowed, group_size, config, rng)
    return assignments


RELIANCE_SCALE = 0.3
"""Nats per token of reliance by which a template's weight falls to 1/e under `assignment.weight: transfer`: that of the
code of HiLL (arXiv:2604.00698)."""


def drawing_weight(template: Template, config: AssignmentConfig) -> float:
    """Return what the probability that a problem gets `template` is in proportion to."""
    score = template.score if template.score > 0 else SMALLEST_WEIGHT
    match config.weight:
        case "score":
            return score
        case "transfer":
            return score * math.exp(min(template.reliance or 0.0, 0.0) / RELIANCE_SCALE)
        case _:
            assert_never(config.weight)


def _draw(
    templates: Sequence[Template], group_size: int, config: AssignmentConfig, rng: random.Random
) -> tuple[Template, ...]:
    weights = [drawing_weight(template, config) for template in templates]
    num_templated = group_size - config.num_plain
    if config.same_template_in_group:
        drawn = rng.choices(templates, weights) * num_templated
    else:
        drawn = rng.choices(templates, weights, k=num_templated)
    asked = [PLAIN if template.id == PLAIN.id else template for template in drawn]
    return (*asked, *(PLAIN,) * config.num_plain)
