"""Conducts a round from its request to its library. The service uses it; rank 0 does if the service is lost."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar, get_args

from megatron_p2o.evolve.record.history import EndedBy, ForeignJournal, Published, RoundHistory
from megatron_p2o.evolve.record.journal import Journal, free_name, read_journal
from megatron_p2o.evolve.record.library import PublishedLibrary, library_path, load_library
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest, ReflectionUnavailable
from megatron_p2o.evolve.reflection.reflectors import Reflector
from megatron_p2o.evolve.search.budget import RolloutBudget, RoundSplit, automatic_budget, split_problems
from megatron_p2o.evolve.search.control import plain_coverage
from megatron_p2o.evolve.search.core_async import AsynchronousCore
from megatron_p2o.evolve.search.core_reference import ReferenceCore
from megatron_p2o.evolve.search.core_single import SingleTurnCore
from megatron_p2o.evolve.search.publish import RoundStats, build_library, round_stats
from megatron_p2o.evolve.search.round import Round, RoundSpec
from megatron_p2o.evolve.search.rules import RULES, own_search, rules_named
from megatron_p2o.evolve.search.score_book import ScoreBook
from megatron_p2o.evolve.trial import Rejection, Trial, TrialFailed, TrialRunner

Result = TypeVar("Result")


def journal_path(run_dir: Path, epoch: int, task: str = "") -> Path:
    """Return where the round after `epoch` is journalled; `task`: its task in a run with several."""
    return run_dir / "evolution" / f"journal-{epoch:04d}{f'-{task}' if task else ''}.jsonl"


def journal_paths(run_dir: Path, epoch: int) -> list[Path]:
    """Return the journals of the rounds after `epoch` that are there: one, or one of each task."""
    only = journal_path(run_dir, epoch)
    return [*([only] if only.exists() else []), *sorted(only.parent.glob(f"{only.stem}-*.jsonl"))]


def split_of(spec: RoundSpec) -> RoundSplit | None:
    """Return the round's split; None when there are too few hard problems for a round."""
    problem_ids = [problem.id for problem in spec.problems]
    if rules_named(spec.settings.evolution.rules).is_single_turn:
        has_enough = len(problem_ids) >= spec.settings.min_problems
        return RoundSplit(dev=(), feedback=tuple(problem_ids)) if has_enough else None
    return split_problems(problem_ids, spec.settings.evolution.dev_size, spec.settings.min_problems, spec.rng("split"))


async def conduct_round(
    spec: RoundSpec,
    split: RoundSplit,
    run_dir: Path,
    runner: TrialRunner,
    reflector: Reflector,
    finish: asyncio.Event,
    notify: Callable[[str], None],
) -> RoundStats:
    """Run the round or go on with it, write its library, and return its numbers.

    `finish` ends it early with what there is. `notify` gets messages for the user. Raises `OSError` when
    journal or library cannot be written.
    """
    with open_journal(journal_path(run_dir, spec.epoch, spec.task), spec.fingerprint(), notify) as journal:
        history = RoundHistory(journal.records, journal.append, spec.fingerprint(), planned_rollouts(spec))
        round_ = open_round(spec, split, history, runner, reflector, notify)
        library = published_library(history, run_dir, spec.task)
        if library is not None:
            round_.restore_candidates()
        else:
            ended_by = await run_until(search(round_), finish) or "deadline"
            round_.book.cancel()
            library = build_library(round_)
            library.save(run_dir, spec.task)
            history.add(Published(version=library.version, ended_by=ended_by, task=spec.task))
            journal.sync()
        control = None
        if spec.settings.evolution.plain_control and not finish.is_set():
            control = await run_until(plain_coverage(round_, runner), finish)
        assert history.published is not None, "set above or before"
        return round_stats(round_, library, history.published.ended_by, control)


async def search(round_: Round) -> EndedBy:
    """Search by the rules `evolution.rules` names, and return why that ended.

    Raises:
        ValueError: rules of the user's own end without one of the reasons.
    """
    name = round_.settings.rules
    if name not in RULES:
        ended_by = await own_search(name)(round_)
        reasons = get_args(EndedBy)
        if ended_by not in reasons:
            raise ValueError(f"evolution.rules={name} returned {ended_by!r}: must be one of {', '.join(reasons)}")
        return ended_by
    if round_.rules.is_single_turn:
        return await SingleTurnCore(round_).run()
    if round_.rules.is_lock_step:
        return await ReferenceCore(round_, rollout_budget(round_.spec, round_.split)).run()
    return await AsynchronousCore(round_).run()


async def run_until(work: Coroutine[Any, Any, Result], finish: asyncio.Event) -> Result | None:
    """Return the result of `work`, or None when `finish` was set before it was done."""
    working = asyncio.ensure_future(work)
    finishing = asyncio.ensure_future(finish.wait())
    await asyncio.wait([working, finishing], return_when=asyncio.FIRST_COMPLETED)
    finishing.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.wait([working])
    return None


def open_journal(path: Path, fingerprint: str, notify: Callable[[str], None]) -> Journal:
    """Return the round's journal; one of another round is set aside under another name."""
    records, _ = read_journal(path)
    try:
        RoundHistory(records, lambda _: None, fingerprint)
    except ForeignJournal as error:
        aside = free_name(path, "superseded")
        path.rename(aside)
        notify(f"{error}; it is kept as {aside.name} and the round starts again")
    journal = Journal(path)
    if journal.damage:
        notify(journal.damage)
    return journal


def rollout_budget(spec: RoundSpec, split: RoundSplit) -> int:
    """Return `evolution.max_rollouts`, or GEPA's automatic budget; one rollout a problem where nothing is searched."""
    settings = spec.settings.evolution
    if rules_named(settings.rules).is_single_turn:
        return len(split.feedback)
    return settings.max_rollouts or automatic_budget(settings.budget, len(split.dev))


def planned_rollouts(spec: RoundSpec) -> int | None:
    """Return how many rollouts score candidates in a round, at most; None where its rules count in another unit."""
    split = split_of(spec)
    if split is None or rules_named(spec.settings.evolution.rules).is_lock_step:
        return None
    return rollout_budget(spec, split)


def most_rollouts(spec: RoundSpec) -> int | None:
    """Return how many rollouts a round asks for, at most: plain control asks for as many again. None as above."""
    scoring = planned_rollouts(spec)
    return None if scoring is None else scoring * (1 + spec.settings.evolution.plain_control)


def open_round(
    spec: RoundSpec,
    split: RoundSplit,
    history: RoundHistory,
    runner: TrialRunner,
    reflector: Reflector,
    notify: Callable[[str], None],
) -> Round:
    """Return the round with the empty template and the warm ones in its pool.

    The lock-step rules count rollouts in a unit of their own.
    """
    rules = rules_named(spec.settings.evolution.rules)
    limit = sys.maxsize if rules.is_lock_step else rollout_budget(spec, split)
    book = ScoreBook(
        runner,
        history,
        RolloutBudget(limit, spent=history.num_scored),
        temperature=spec.settings.evolution.trial_temperature,
        feedback_ids=split.feedback,
        free_scores=spec.free_scores if rules.reuses_scores else (),
        is_loss_final=rules.is_lock_step,
    )
    return Round(spec, split, history, book, reflector, notify)


def published_library(history: RoundHistory, run_dir: Path, task: str) -> PublishedLibrary | None:
    """Return the library this round has already written, if it is there and whole."""
    if history.published is None:
        return None
    try:
        return load_library(library_path(run_dir, history.published.version, task))
    except (OSError, ValueError):
        return None


def salvage(spec: RoundSpec, split: RoundSplit, run_dir: Path) -> tuple[PublishedLibrary, RoundStats]:
    """Return what the journal of a lost round is good for, without writing to it.

    Raises `ForeignJournal` when it is not of this round, `OSError` when it cannot be read.
    """
    records, _ = read_journal(journal_path(run_dir, spec.epoch, spec.task))
    history = RoundHistory(records, lambda _: None, spec.fingerprint())
    round_ = open_round(spec, split, history, Nobody(), Nobody(), lambda _: None)
    round_.restore_candidates()
    library = build_library(round_)
    return library, round_stats(round_, library, "service_lost")


class Nobody:
    """TrialRunner and reflector of a round that is only read."""

    async def run_trial(
        self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
    ) -> Trial | Rejection:
        raise TrialFailed("this round is only read")

    async def propose(self, request: ReflectionRequest) -> str:
        raise ReflectionUnavailable("this round is only read")

    async def close(self) -> None: ...
