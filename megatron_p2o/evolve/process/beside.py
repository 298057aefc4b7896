"""Evolution beside training: a round runs during the next epochs, and its result is published between two steps."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.types import Problem, RunningRound

logger = logging.getLogger(__name__)


class Rounds(Protocol):
    """What runs the rounds: `evolve.process.session.EvolutionSession`."""

    def start(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> "Future[PublishedLibrary]":
        """Begin a round; cancelling the future ends it. One round at a time."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _RoundBeside:
    running: RunningRound
    based_on: int
    """Version of the library that was in use when it began."""
    library: "Future[PublishedLibrary]"


class BesideTraining:
    """A `PromptEvolution` (see `megatron_p2o.interfaces`) that never makes training wait.

    While a round runs, the hard problems of an epoch that ends are left to the next round: they will still be hard.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self._round: _RoundBeside | None = None

    @property
    def running(self) -> RunningRound | None:
        return self._round.running if self._round else None

    def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> TemplateLibrary:
        """Begin a round unless one still runs, and return what that left to use."""
        library = self.newest(library)
        if self._round is None:
            problem_ids = tuple(dict.fromkeys(problem.id for problem in hard))
            self._round = _RoundBeside(
                running=RunningRound(epoch=epoch, problem_ids=problem_ids),
                based_on=library.version,
                library=self._rounds.start(hard, library, epoch),
            )
        return library

    def newest(self, library: TemplateLibrary) -> TemplateLibrary:
        current = self._round
        if current is None:
            return library
        if library.version != current.based_on:
            # The library was cleared while this round ran, because few hard problems were left: its result is dropped.
            current.library.cancel()
            self._round = None
            return library
        if not current.library.done():
            return library
        self._round = None
        error = current.library.exception()
        if error is not None:
            logger.warning(
                "evolution.lost: round %d: %s; continuing with the current library", current.running.epoch, error
            )
            return library
        return current.library.result()
