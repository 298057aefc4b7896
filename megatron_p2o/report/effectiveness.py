"""What templates achieve, and what the policy keeps of it, from the hard-sample ledger.

All success rates are estimates over the tries a problem really got, so that runs with different numbers of plain and
templated rollouts can be compared.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, mode

from megatron_p2o.evaluation.estimators import pass_at_k
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry

PASS_AT = 6
"""k of the paper's Figure 4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effectiveness:
    """Success with and without template on the same problems: those asked through templates in one epoch."""

    epoch: int
    num_problems: int
    k: int
    """Tries compared: 6, or the number that problems usually got on the side with fewer."""
    plain_at_1: float
    plain_at_k: float
    templated_at_1: float
    templated_at_k: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerSummary:
    """What became of the problems of one run."""

    num_problems: int
    num_hard_at_first: int
    """Problems without a plain success when they were first asked."""
    num_solved_by_template_first: int
    """Problems whose first success came through a template."""
    internalised: Sequence[str]
    """Ids of those that were solved plainly later."""
    num_never_solved: int


def effectiveness_by_epoch(entries: Iterable[LedgerEntry]) -> list[Effectiveness]:
    """Return one comparison per epoch in which problems were asked both ways; others have nothing to compare."""
    by_epoch: dict[int, list[LedgerEntry]] = {}
    for entry in entries:
        if entry.plain_tries and entry.templated_tries:
            by_epoch.setdefault(entry.epoch, []).append(entry)
    return [_effectiveness(epoch, by_epoch[epoch]) for epoch in sorted(by_epoch)]


def plain_success_of_hard(entries: Iterable[LedgerEntry]) -> list[tuple[float, float]]:
    """Return (epoch, mean plain success rate) over the problems that had no plain success when first asked.

    The first point is 0 by construction; how far the later ones rise is what the policy has learnt of them.
    """
    first: dict[str, LedgerEntry] = {}
    rates: dict[int, list[float]] = {}
    for entry in entries:
        if entry.plain_tries == 0:
            continue
        if first.setdefault(entry.problem_id, entry).plain_solved == 0:
            rates.setdefault(entry.epoch, []).append(entry.plain_solved / entry.plain_tries)
    return [(epoch, fmean(rates[epoch])) for epoch in sorted(rates)]


def summarize_ledger(entries: Sequence[LedgerEntry]) -> LedgerSummary:
    """Return what became of each problem."""
    histories: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        histories.setdefault(entry.problem_id, []).append(entry)
    first_solved = [
        next((entry for entry in history if entry.plain_solved or entry.templated_solved), None)
        for history in histories.values()
    ]
    return LedgerSummary(
        num_problems=len(histories),
        num_hard_at_first=sum(history[0].plain_solved == 0 for history in histories.values()),
        num_solved_by_template_first=sum(entry is not None and entry.plain_solved == 0 for entry in first_solved),
        internalised=HardSampleLedger(entries).internalised(),
        num_never_solved=sum(entry is None for entry in first_solved),
    )


def _effectiveness(epoch: int, entries: Sequence[LedgerEntry]) -> Effectiveness:
    # The usual number of tries, not the smallest: one rollout given up on must not change what is compared.
    k = min(PASS_AT, mode(min(entry.plain_tries, entry.templated_tries) for entry in entries))
    compared = [entry for entry in entries if min(entry.plain_tries, entry.templated_tries) >= k]
    return Effectiveness(
        epoch=epoch,
        num_problems=len(compared),
        k=k,
        plain_at_1=fmean(pass_at_k(entry.plain_tries, entry.plain_solved, 1) for entry in compared),
        plain_at_k=fmean(pass_at_k(entry.plain_tries, entry.plain_solved, k) for entry in compared),
        templated_at_1=fmean(pass_at_k(entry.templated_tries, entry.templated_solved, 1) for entry in compared),
        templated_at_k=fmean(pass_at_k(entry.templated_tries, entry.templated_solved, k) for entry in compared),
    )
