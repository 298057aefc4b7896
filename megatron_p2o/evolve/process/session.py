"""Rank 0's side of evolution: starts the service, answers its trial requests, and returns the library it wrote.

If evolution is lost, late or stuck, training continues with the best library it has, or without templates.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

from megatron_p2o.config.tree import Config
from megatron_p2o.evolve.process.by_task import descriptions_of, problems_by_task, settings_by_task
from megatron_p2o.evolve.process.conduct import most_rollouts, salvage, split_of
from megatron_p2o.evolve.process.messages import FinishRound, Notice, RoundPublished, StartRound, TrialRequest
from megatron_p2o.evolve.process.service_process import STOP_GRACE_S, LoopThread, ServiceLost, ServiceProcess
from megatron_p2o.evolve.process.trial_replies import SubmitTrial, TrialReplies
from megatron_p2o.evolve.record.history import EndedBy, ForeignJournal
from megatron_p2o.evolve.record.library import PublishedLibrary, library_path, load_library, merged
from megatron_p2o.evolve.reflection.reflection import shorten
from megatron_p2o.evolve.reflection.reflectors import check_settings, secrets_of
from megatron_p2o.evolve.search.budget import RoundSplit
from megatron_p2o.evolve.search.publish import RoundStats, keep_round, rounds_path
from megatron_p2o.evolve.search.round import RoundSettings, RoundSpec
from megatron_p2o.evolve.trial import FreeScore
from megatron_p2o.interfaces import RoundInterrupted, TemplateLibrary
from megatron_p2o.processes import child_environment
from megatron_p2o.seeds import seed_of
from megatron_p2o.terminal import Countdown
from megatron_p2o.types import Problem, RunningRound

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 2
"""Starts of the service per round: one, and one that resumes from the journal."""

MAX_OBSERVED_CHARS = 4_000
"""Longest kept text of a training rollout's response. An epoch has tens of thousands of them."""

STOP_POLL_S = 0.5
"""Interval at which a waiting `evolve` checks whether the run is to stop."""

FINISH_GRACE_S = 60.0
"""Time to publish after `evolution.round_timeout_s`."""

LATE = (
    "evolution.deadline: round %d is cut off by evolution.round_timeout_s=%g before its budget of rollouts is spent; "
    "what it has is used. Its result depends on how fast this machine is: raise evolution.round_timeout_s, or lower "
    "evolution.max_rollouts"
)

UNWEIGHED = (
    "evolution.unweighed: %d of %d templates of round %d are drawn by their score alone, although assignment.weight is "
    "transfer: the engines gave no log-probs of a solution through them"
)


class EvolutionSession:
    """A `PromptEvolution` (see `megatron_p2o.interfaces`) that runs in a process of its own."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        submit_trial: SubmitTrial,
        *,
        reflection_url: str | None = None,
        reflection_model: str | None = None,
        reflection_api_key: str | None = None,
        control_tokens: Sequence[str] = (),
        is_stopping: Callable[[], bool] = lambda: False,
        finish_grace_s: float = FINISH_GRACE_S,
    ) -> None:
        """Check the settings; the process starts with the first round.

        `is_stopping` tells whether the run is to stop: `evolve` then leaves its round to the next start.

        `reflection_url`, `reflection_model` and `reflection_api_key` are of the server that serves the initial policy
        under `evolution.reflection.backend: self`;
        `control_tokens` is what its tokenizer takes for control tokens. Raises `ValueError` or `OSError` for unusable
        reflection settings.
        """
        self._config = config
        settings = _round_settings(config, reflection_url, reflection_model)
        self._settings = replace(settings, control_tokens=tuple(control_tokens))
        self._run_dir = run_dir
        self._submit_trial = submit_trial
        self._is_stopping = is_stopping
        self._finish_grace_s = finish_grace_s
        self._environment = child_environment(secrets_of(config.evolution.reflection))
        if reflection_api_key is not None:
            self._environment[config.evolution.reflection.api_key_env] = reflection_api_key
        check_settings(self._settings.evolution.reflection)
        self._thread = LoopThread("evolution-session")
        self._service: ServiceProcess | None = None
        self._stopping = asyncio.Lock()
        self._round: Future[PublishedLibrary] | None = None
        self._replies: list[TrialReplies] = []
        self._budget: int | None = None
        self.announce: Callable[[str], None] = lambda line: None
        """Takes lines on a round that `evolve` waits for."""
        self._free_scores: dict[tuple[str, str], FreeScore] = {}
        self._descriptions = descriptions_of(config)
        self.last_rounds: Sequence[RoundStats] = ()
        """Statistics of what the last call of `start` led to: a round for each task with hard problems."""
        self.num_service_losses = 0
        """Number of times the service died, over the session's life."""
        self.num_failed_trials = 0
        """Number of requests without a verdict, over the session's life."""

    @property
    def service_process_id(self) -> int | None:
        """Process id of the service; None while none runs."""
        return None if self._service is None else self._service.process_id

    def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> PublishedLibrary:
        """Run the round after `epoch` and return its library (see `PromptEvolution.evolve`); then see `last_rounds`."""
        margin_s = self._finish_grace_s + 3 * NUM_ATTEMPTS * STOP_GRACE_S
        limit_s = self._settings.evolution.round_timeout_s + len(self._descriptions) * margin_s
        deadline = time.monotonic() + limit_s
        running = self.start(hard, library, epoch)
        self.announce(f"prompt evolution: round {epoch}")
        countdown = Countdown(f"prompt evolution: round {epoch}, rollouts", self._budget, self.announce)
        while not wait([running], STOP_POLL_S).done:
            countdown.note(sum(replies.num_answered for replies in self._replies))
            if self._is_stopping():
                running.cancel()
                raise RoundInterrupted(f"round {epoch} goes on when the run is resumed")
            if time.monotonic() > deadline:
                logger.warning(
                    "evolution.stuck: the session's thread is blocked, perhaps in `submit_trial`; problems are asked "
                    "without templates"
                )
                return PublishedLibrary(version=library.version + 1)
        return running.result()

    def newest(self, library: TemplateLibrary) -> TemplateLibrary:
        """Return `library`: `evolve` has waited for every round."""
        return library

    @property
    def running(self) -> RunningRound | None:
        return None

    def start(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> "Future[PublishedLibrary]":
        """Begin a round without waiting for it; one at a time. Cancelling the future ends the round.

        With several tasks it is one round after another, on the hard problems of each (see `by_task`).
        """
        problems = {problem.id: problem for problem in hard}
        specs = self._specs(list(problems.values()), library, epoch)
        self._free_scores.clear()
        budgets = [most_rollouts(spec) or 0 for spec in specs]
        self._replies, self._budget = [], sum(budgets) if all(budgets) else None
        if self._settings.evolution.guard_leaks and all(problem.answer is None for problem in hard):
            logger.warning("evolution: the problems have no gold answers: no template is refused for telling one")
        self._round = self._thread.submit(self._run_rounds(specs, problems, library.version + 1))
        return self._round

    def _specs(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> list[RoundSpec]:
        by_task = problems_by_task(hard, list(self._config.data.train))
        ids = {task: {problem.id for problem in problems} for task, problems in by_task.items()}
        num_hard = {task: len(problems) for task, problems in by_task.items()}
        settings = settings_by_task(self._settings, num_hard, self._descriptions)
        warm = library.templates if self._settings.evolution.warm_start else ()
        return [
            RoundSpec(
                epoch=epoch,
                task=task,
                library_version=library.version + 1,
                problems=tuple(self._as_asked(problem) for problem in problems),
                warm_templates=tuple(template for template in warm if template.task == task),
                settings=settings[task],
                free_scores=tuple(free for free in self._free_scores.values() if free.problem_id in ids[task]),
            )
            for task, problems in by_task.items()
        ]

    def observe(self, free: FreeScore) -> None:
        """Remember, for the next round, what training rollouts showed; of several for one pair the last counts."""
        text = shorten(free.trial.response_text, MAX_OBSERVED_CHARS)
        kept = replace(free, trial=replace(free.trial, response_text=text))
        self._free_scores[free.template_text, free.problem_id] = kept

    def close(self) -> None:
        """End the round that runs, the service and the thread. The session cannot be used afterwards."""
        if self._round is not None:
            self._round.cancel()
        self._thread.submit(self._stop_service()).result(3 * STOP_GRACE_S)
        self._thread.close(STOP_GRACE_S)

    def _as_asked(self, problem: Problem) -> Problem:
        """Return the problem with its question as the user message the policy sees: reflection is shown that.

        The other columns stay here, where answers are graded.
        """
        asked = self._config.data.of_task(problem.task or None)
        question = asked.question_format.format(question=problem.question)
        return replace(problem, question=question, columns={})

    async def _run_rounds(
        self, specs: Sequence[RoundSpec], problems: Mapping[str, Problem], version: int
    ) -> PublishedLibrary:
        parts: dict[str, PublishedLibrary] = {}
        rounds: list[RoundStats] = []
        for spec in specs:
            parts[spec.task], stats = await self._run_round(spec, problems)
            rounds.append(stats)
        self.last_rounds = rounds
        if list(parts) == [""]:
            return parts[""]
        library = merged(parts, {stats.task: stats.num_candidates for stats in rounds}, version)
        try:
            library.save(self._run_dir)
        except OSError as error:  # the next checkpoint writes it, or says why it cannot
            logger.warning("evolution: the library of all tasks is not written: %s", error)
        return library

    async def _run_round(self, spec: RoundSpec, problems: Mapping[str, Problem]) -> tuple[PublishedLibrary, RoundStats]:
        started = time.monotonic()
        num_losses, num_failed = self.num_service_losses, self.num_failed_trials
        split = split_of(spec)
        if split is None:
            library, stats = self._nothing(spec, "too_few_hard")
        else:
            published = await self._published(spec, problems)
            library, stats = self._collected(spec, split, published)
        stats = replace(
            stats,
            num_restarts=self.num_service_losses - num_losses,
            num_failed_trials=self.num_failed_trials - num_failed,
            duration_s=time.monotonic() - started,
        )
        self._tell(stats)
        return library, stats

    def _tell(self, stats: RoundStats) -> None:
        logger.log(logging.INFO if stats.is_success else logging.WARNING, "evolution: %s", stats.summary())
        if stats.num_unweighed:
            logger.warning(UNWEIGHED, stats.num_unweighed, stats.num_templates, stats.epoch)
        try:
            keep_round(self._run_dir, stats)
        except (OSError, ValueError) as error:
            logger.warning("evolution: round %d is not in %s: %s", stats.epoch, rounds_path(self._run_dir), error)

    async def _published(self, spec: RoundSpec, problems: Mapping[str, Problem]) -> RoundStats | None:
        """Return what the service says of the round it published; None when it was lost for good."""
        answers = TrialReplies(
            self._submit_trial, problems, self._config.rollout, seed_of(self._config.run.seed, "round", spec.epoch)
        )
        self._replies.append(answers)
        clock = asyncio.get_running_loop().time
        deadline = clock() + spec.settings.evolution.round_timeout_s
        try:
            for _ in range(NUM_ATTEMPTS):
                try:
                    return await self._attempt(spec, answers, deadline)
                except (ServiceLost, OSError, ValueError) as lost:
                    self.num_service_losses += 1
                    logger.warning("evolution.service_lost: round %d: %s", spec.epoch, lost)
                    answers.forget_service()
                    await self._stop_service()
                if clock() >= deadline:
                    break
            return None
        except asyncio.CancelledError:
            await self._stop_service()
            raise
        finally:
            answers.cancel()
            self.num_failed_trials += answers.num_failed

    async def _attempt(self, spec: RoundSpec, answers: TrialReplies, deadline: float) -> RoundStats:
        """Serve the round until it is published. Raise `ServiceLost` when the service ends or stays late."""
        if self._service is None:
            self._service = await ServiceProcess.start(self._run_dir, self._environment)
        service = self._service
        service.send(StartRound(spec=spec))
        limit, is_late = deadline, False
        while True:
            try:
                async with asyncio.timeout_at(limit):
                    message = await service.receive()
            except TimeoutError:
                if is_late:
                    raise ServiceLost(
                        f"no library {self._finish_grace_s:g} s after evolution.round_timeout_s"
                    ) from None
                logger.warning(LATE, spec.epoch, self._settings.evolution.round_timeout_s)
                service.send(FinishRound())
                answers.cancel()  # the engines are not to go on with what nobody will read
                limit, is_late = deadline + self._finish_grace_s, True
                continue
            match message:
                case TrialRequest():
                    if not is_late:
                        answers.answer(service, message)
                case Notice():
                    logger.warning("evolution: %s", message.text)
                case RoundPublished():
                    return message.stats
                case _:
                    raise ServiceLost(f"the service sent {type(message).__name__}, which only rank 0 sends")

    def _collected(
        self, spec: RoundSpec, split: RoundSplit, published: RoundStats | None
    ) -> tuple[PublishedLibrary, RoundStats]:
        """Return the round's library from its file, or what its journal is good for."""
        try:
            if published is not None:
                return load_library(library_path(self._run_dir, spec.library_version, spec.task)), published
            library, stats = salvage(spec, split, self._run_dir)
            library.save(self._run_dir, spec.task)
            logger.warning("evolution.salvaged: %d templates from the journal", len(library.templates))
        except (ForeignJournal, ValueError, OSError) as error:
            logger.warning(
                "evolution.nothing_left: round %d: %s; problems are asked without templates", spec.epoch, error
            )
            return self._nothing(spec, "service_lost")
        return library, stats

    def _nothing(self, spec: RoundSpec, reason: EndedBy) -> tuple[PublishedLibrary, RoundStats]:
        stats = RoundStats(
            epoch=spec.epoch,
            task=spec.task,
            library_version=spec.library_version,
            ended_by=reason,
            num_hard=len(spec.problems),
            outcomes={},
        )
        return PublishedLibrary(version=spec.library_version), stats

    async def _stop_service(self) -> None:
        async with self._stopping:  # a second caller also returns only after it has ended
            service, self._service = self._service, None
            if service is not None:
                await service.stop()


def _round_settings(config: Config, reflection_url: str | None, reflection_model: str | None) -> RoundSettings:
    reflection = replace(
        config.evolution.reflection,
        base_url=reflection_url or config.evolution.reflection.base_url,
        model=reflection_model or config.evolution.reflection.model,
    )
    return RoundSettings(
        evolution=replace(config.evolution, reflection=reflection),
        assignment=config.assignment,
        group_size=config.rollout.group_size,
        sampling_temperature=config.rollout.temperature,
        min_problems=config.hard.min_problems,
        seed=config.run.seed,
    )
