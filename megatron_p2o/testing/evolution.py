"""A task for evolution without a model: each family of problems needs its own two key phrases; whole rounds on it."""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron_p2o.config.tree import AssignmentConfig, EvolutionConfig
from megatron_p2o.evolve.process.conduct import conduct_round, journal_path, split_of
from megatron_p2o.evolve.process.session import EvolutionSession
from megatron_p2o.evolve.record.history import RoundHistory
from megatron_p2o.evolve.record.journal import read_journal
from megatron_p2o.evolve.record.library import PublishedLibrary, library_path, load_library
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflectors import Reflector
from megatron_p2o.evolve.search.budget import RoundSplit
from megatron_p2o.evolve.search.publish import RoundStats
from megatron_p2o.evolve.search.round import RoundSettings, RoundSpec
from megatron_p2o.evolve.trial import Rejection, Trial, TrialRunner
from megatron_p2o.tiny.problems import FAMILIES, PHRASES
from megatron_p2o.types import Problem, SamplingParams, Template

KEY_PHRASES: Mapping[str, tuple[str, str]] = {name: family.key_phrases for name, family in FAMILIES.items()}
"""The tiny problems' key phrases by family, which is the problem's `source`."""

SUCCESS_RATES = (0.0, 0.15, 0.97)
"""Probability of success with none, one and both key phrases of the problem's family."""

SOON_S = 120.0
"""For anything that must happen soon."""


def make_problems(num_problems: int) -> list[Problem]:
    """Return problems of all families in turn, with answers no instruction contains."""
    families = list(KEY_PHRASES)
    return [
        Problem(
            id=f"problem-{index}",
            question=f"{families[index % len(families)]} question {index}",
            answer=f"{1000 + index}, {2000 + index}",
            source=families[index % len(families)],
        )
        for index in range(num_problems)
    ]


def draw(*key: object) -> float:
    """Return a number in [0, 1) that depends on `key` only: greedy decoding gives the same answer when asked again."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") / 2**64


class KeyPhraseTask:
    """A `TrialRunner`, and through `submit` a `SubmitTrial` of a session. Counts what it was asked."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        seed: int = 0,
        success_rates: tuple[float, float, float] = SUCCESS_RATES,
        max_template_chars: int = 10_000,
        weight_version: int = 3,
        reliances: Mapping[str, float] | None = None,
    ) -> None:
        """`reliances`: what solutions of each family measure, give or take 0.1; None: it is not measured."""
        self._reliances = reliances or {}
        self.problems = {problem.id: problem for problem in problems}
        self.requests: Counter[tuple[str, str, float, int]] = Counter()
        """(template text, problem id, temperature, sample)"""
        self.weight_version = weight_version
        self._seed = seed
        self._success_rates = success_rates
        self._max_template_chars = max_template_chars

    async def run_trial(
        self, template_text: str, problem_id: str, *, temperature: float, sample: int = 0
    ) -> Trial | Rejection:
        self.requests[template_text, problem_id, temperature, sample] += 1
        await asyncio.sleep(0)
        return self.answer(template_text, problem_id, temperature, sample)

    def submit(self, template_text: str, problem: Problem, sampling: SamplingParams) -> "Future[Trial | Rejection]":
        self.requests[template_text, problem.id, sampling.temperature, 0] += 1
        future: Future[Trial | Rejection] = Future()
        future.set_result(self.answer(template_text, problem.id, sampling.temperature, 0))
        return future

    def answer(self, template_text: str, problem_id: str, temperature: float, sample: int) -> Trial | Rejection:
        if len(template_text) > self._max_template_chars:
            return Rejection(reason="too many characters")
        keys = KEY_PHRASES[self.problems[problem_id].source]
        rate = self._success_rates[sum(key in template_text for key in keys)]
        is_solved = draw(self._seed, template_text, problem_id, temperature, sample) < rate
        return Trial(
            reward=float(is_solved),
            response_text="\\boxed{1}",
            finish_reason="stop",
            num_tokens=10,
            weight_version=self.weight_version,
            reliance=self._reliance(template_text, problem_id) if is_solved and template_text else None,
        )

    def _reliance(self, template_text: str, problem_id: str) -> float | None:
        mean = self._reliances.get(self.problems[problem_id].source)
        return None if mean is None else mean + 0.2 * draw("reliance", template_text, problem_id) - 0.1


def families_served(template_text: str) -> set[str]:
    """Return the families both of whose key phrases are in the template."""
    return {family for family, keys in KEY_PHRASES.items() if all(key in template_text for key in keys)}


def round_spec(
    problems: Sequence[Problem],
    *,
    epoch: int = 0,
    seed: int = 1,
    library_version: int = 1,
    warm_templates: Sequence[Template] = (),
    assignment: AssignmentConfig | None = None,
    **evolution: Any,
) -> RoundSpec:
    """Return a round over `problems`; `evolution` are fields of `EvolutionConfig`."""
    return RoundSpec(
        epoch=epoch,
        library_version=library_version,
        problems=tuple(problems),
        warm_templates=tuple(warm_templates),
        settings=RoundSettings(
            evolution=EvolutionConfig(**evolution),
            assignment=assignment or AssignmentConfig(),
            group_size=6,
            sampling_temperature=0.6,
            min_problems=10,
            seed=seed,
        ),
    )


def split_for(spec: RoundSpec) -> RoundSplit:
    """Return how the hard problems of a round are split; the round must have enough of them."""
    split = split_of(spec)
    assert split is not None
    return split


def whole_round(
    spec: RoundSpec,
    run_dir: Path,
    runner: TrialRunner,
    reflector: Reflector | None = None,
    notices: list[str] | None = None,
    finish: asyncio.Event | None = None,
) -> tuple[PublishedLibrary, RoundStats, RoundHistory]:
    """Run a whole round in this process; return its library, its numbers and its history."""
    stats = asyncio.run(
        conduct_round(
            spec,
            split_for(spec),
            run_dir,
            runner,
            reflector or Phrasebook(PHRASES, spec.settings.seed),
            finish or asyncio.Event(),
            (notices if notices is not None else []).append,
        )
    )
    return load_library(library_path(run_dir, stats.library_version)), stats, history_of(spec, run_dir)


def history_of(spec: RoundSpec, run_dir: Path) -> RoundHistory:
    """Return what the journal of a round says."""
    records, _ = read_journal(journal_path(run_dir, spec.epoch))
    return RoundHistory(records, lambda _: None, spec.fingerprint())


def is_running(process_id: int) -> bool:
    """Return whether the process lives; a zombie does not."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Return once it is so; fail the test with `what` after `SOON_S`."""
    deadline = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < deadline, f"not within {SOON_S:g} s: {what}"
        time.sleep(0.01)


def wait_until_gone(process_id: int) -> None:
    """Return once a process has ended; see `wait_until`."""
    wait_until(lambda: not is_running(process_id), f"the end of process {process_id}")


def time_machine(session: EvolutionSession, round_timeout_s: float) -> Callable[[], None]:
    """Return what puts the clock of a session past the end of the round that runs. Call this before it begins."""
    loop, ahead_s = session._thread._loop, 0.0
    time_s = loop.time

    def put_forward() -> None:
        nonlocal ahead_s
        ahead_s = round_timeout_s
        loop.call_soon_threadsafe(lambda: None)  # wakes it where it sleeps until the time is over

    loop.time = lambda: time_s() + ahead_s
    return put_forward


def scores_in(path: Path) -> set[tuple[str, str]]:
    """Return (template digest, problem id) of the scores in a journal."""
    records, _ = read_journal(path)
    return {(record["template"], record["problem_id"]) for record in records if record["event"] == "Scored"}
