"""Plain rollouts in place of a search: what evolution's budget is worth when GRPO spends it on the hard problems."""

from collections.abc import Sequence

from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.types import PLAIN, Problem, RunningRound


class PlainRollouts:
    """A `PromptEvolution` (see `megatron_p2o.interfaces`) whose libraries hold no template: the groups of the hard
    problems are larger instead."""

    def __init__(self, num_rollouts: int, group_size: int) -> None:
        """Args:
        num_rollouts: beyond full groups, which an epoch's hard problems share evenly (`evolution.plain_rollouts`).
        group_size: rollouts of every other group.
        """
        self._num_rollouts, self._group_size = num_rollouts, group_size

    @property
    def running(self) -> RunningRound | None:
        return None

    def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> PublishedLibrary:
        """Return a library that asks each hard problem plainly, more often than a group has rollouts.

        Where the rollouts cannot be divided evenly, the problems that were asked first get one more.
        """
        ids = list(dict.fromkeys(problem.id for problem in hard))
        share, num_larger = divmod(self._num_rollouts, max(1, len(ids)))
        sizes = {key: self._group_size + share + (place < num_larger) for place, key in enumerate(ids)}
        assignments = {key: (PLAIN,) * size for key, size in sizes.items()}
        return PublishedLibrary(version=library.version + 1, assignments=assignments)

    def newest(self, library: TemplateLibrary) -> TemplateLibrary:
        """Return `library`: nothing runs beside training."""
        return library
