"""Hard samples: which problems fail, and the ledger of every problem's plain and templated tries."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

from megatron_p2o.config.tree import HardConfig
from megatron_p2o.records import from_json
from megatron_p2o.types import Group, Problem, Rollout

MASTERED_RATE = 0.5
"""Plain success rate from which a problem counts as mastered."""


def hard_problems(groups: Iterable[Group], hard: HardConfig, group_size: int) -> list[Problem]:
    """Return the problems that their groups solved at a rate of at most `hard.max_solved` in `group_size` rollouts.

    A group decides by its plain rollouts ("plain": arXiv:2603.21877, Eq. 3; a group without any decides by all) or by
    all of them ("all": Alg. 1 and the authors' code). Undecided rollouts count neither way.
    """
    return [group.problem for group in groups if is_hard(ledger_entry(group, epoch=0, step=0), hard, group_size)]


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """What one group showed about its problem: one line of hard_samples.jsonl."""

    epoch: int
    step: int
    problem_id: str
    plain_tries: int
    plain_solved: int
    templated_tries: int
    templated_solved: int
    plain_reward: float | None = None
    """Sum of the rewards of the plain tries. None: `plain_solved`, where rewards are 0 and 1."""

    @property
    def plain_reward_sum(self) -> float:
        return self.plain_solved if self.plain_reward is None else self.plain_reward


def is_hard(entry: LedgerEntry, hard: HardConfig, group_size: int) -> bool:
    """Return whether a group's counts make its problem hard; see `hard_problems`."""
    num_tried, num_solved = entry.plain_tries, entry.plain_solved
    match hard.counted:
        case "plain":
            counts_all = num_tried == 0
        case "all":
            counts_all = True
        case _:
            assert_never(hard.counted)
    if counts_all:
        num_tried, num_solved = num_tried + entry.templated_tries, num_solved + entry.templated_solved
    return num_tried > 0 and num_solved * group_size <= hard.max_solved * num_tried


def entry_from(line: Mapping[str, Any]) -> LedgerEntry:
    """Return the entry in a line of the ledger; further fields are passed over.

    Raises:
        ValueError: the line is damaged.
    """
    entry = from_json(LedgerEntry, line, skips_unknown=True)
    counts = (entry.plain_solved, entry.plain_tries, entry.templated_solved, entry.templated_tries)
    if min(entry.epoch, entry.step, *counts) < 0:
        raise ValueError("a count is negative")
    if entry.plain_solved > entry.plain_tries or entry.templated_solved > entry.templated_tries:
        raise ValueError("more solved than tried")
    if not 0 <= entry.plain_reward_sum <= entry.plain_tries:
        raise ValueError("the sum of rewards is not between 0 and the number of tries")
    return entry


def ledger_entry(group: Group, epoch: int, step: int) -> LedgerEntry:
    """Return the counts of `group`; undecided rollouts are left out."""
    tried = [rollout for rollout in group.rollouts if rollout.is_decided]
    templated = [rollout for rollout in tried if rollout.completion.prompt.is_templated]
    plain = [rollout for rollout in tried if not rollout.completion.prompt.is_templated]
    return LedgerEntry(
        epoch=epoch,
        step=step,
        problem_id=group.problem.id,
        plain_tries=len(plain),
        plain_solved=sum(rollout.is_solved for rollout in plain),
        templated_tries=len(templated),
        templated_solved=sum(rollout.is_solved for rollout in templated),
        plain_reward=_partial_sum(plain),
    )


def _partial_sum(rollouts: Sequence[Rollout]) -> float | None:
    """Return the sum of the rewards; None where it is the number of those that are solved."""
    total = sum(rollout.reward for rollout in rollouts)
    return None if total == sum(rollout.is_solved for rollout in rollouts) else total


class HardSampleLedger:
    """Every problem's history, in order of training. Owned by the conducting rank; rebuilt from its entries."""

    def __init__(self, entries: Sequence[LedgerEntry] = ()) -> None:
        self._history: dict[str, list[LedgerEntry]] = {}
        self.num_entries = 0
        for entry in entries:
            self.record(entry)

    def record(self, entry: LedgerEntry) -> None:
        """Append one group's counts."""
        self._history.setdefault(entry.problem_id, []).append(entry)
        self.num_entries += 1

    def history(self, problem_id: str) -> Sequence[LedgerEntry]:
        """Return the entries of a problem, oldest first."""
        return tuple(self._history.get(problem_id, ()))

    def plain_success_rate(self, problem_id: str) -> float:
        """Return the discounted share of plain tries that succeeded, in [0, 1]; 0 before the first plain try.

        Each newer entry halves the weight of the older ones: the policy that failed an epoch ago is not this one.
        """
        return self._discounted(problem_id, lambda entry: entry.plain_solved)

    def plain_reward(self, problem_id: str) -> float:
        """Return the discounted mean reward of plain tries: the `plain_success_rate` where rewards are 0 and 1."""
        return self._discounted(problem_id, lambda entry: entry.plain_reward_sum)

    def _discounted(self, problem_id: str, of: Callable[[LedgerEntry], float]) -> float:
        tries = total = 0.0
        for entry in self._history.get(problem_id, ()):
            tries = tries / 2 + entry.plain_tries
            total = total / 2 + of(entry)
        return total / tries if tries else 0.0

    def success_rate(self, problem_id: str, *, before_epoch: int, counted: Literal["plain", "all"]) -> float | None:
        """Return the discounted share, in [0, 1], of the tries before an epoch that succeeded; None before the first.

        It stays the same while the epoch goes on, so that what depends on it can be found again from its beginning.
        """
        tries = solved = 0.0
        for entry in self._history.get(problem_id, ()):
            if entry.epoch < before_epoch:
                templated = counted == "all"
                tries = tries / 2 + entry.plain_tries + templated * entry.templated_tries
                solved = solved / 2 + entry.plain_solved + templated * entry.templated_solved
        return solved / tries if tries else None

    def forgotten(self, entries: Iterable[LedgerEntry]) -> tuple[int, int]:
        """Return (number forgotten, number mastered) among the problems of `entries`. Call before recording them.

        Mastered is solved plainly at least half of the time so far; forgotten is mastered and failed by every plain
        try of the entry. Many at once say that the plain behaviour collapses while templates may still succeed.
        """
        mastered = [
            entry
            for entry in entries
            if entry.plain_tries and self.plain_success_rate(entry.problem_id) >= MASTERED_RATE
        ]
        return sum(entry.plain_solved == 0 for entry in mastered), len(mastered)

    @property
    def num_problems(self) -> int:
        """Problems that were tried at all."""
        return len(self._history)

    def first_solved_by_template(self) -> list[str]:
        """Return the problems whose first success came through a template alone, in order of id."""
        return sorted(
            problem_id for problem_id, entries in self._history.items() if _is_first_solved_by_template(entries)
        )

    def internalised(self) -> list[str]:
        """Return those of `first_solved_by_template` that were solved plainly later."""
        return [
            problem_id
            for problem_id in self.first_solved_by_template()
            if any(entry.plain_solved for entry in self._history[problem_id])
        ]


def _is_first_solved_by_template(entries: Sequence[LedgerEntry]) -> bool:
    first_solved = next((entry for entry in entries if entry.plain_solved or entry.templated_solved), None)
    return first_solved is not None and not first_solved.plain_solved


def helped_and_hurt(entries: Iterable[LedgerEntry]) -> tuple[float, float, int]:
    """Return (problems helped, problems hurt by their templates, problems compared) among those tried both ways.

    Helped is failed plainly and solved through a template, hurt the reverse. A problem counts by the estimated
    probability of each: tries are independent, so it is the product of the two rates.
    """
    both = [entry for entry in entries if entry.plain_tries and entry.templated_tries]
    rates = [(entry.plain_solved / entry.plain_tries, entry.templated_solved / entry.templated_tries) for entry in both]
    helped = sum((1 - plain) * templated for plain, templated in rates)
    hurt = sum(plain * (1 - templated) for plain, templated in rates)
    return helped, hurt, len(both)
