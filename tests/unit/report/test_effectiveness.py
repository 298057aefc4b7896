"""What the report reads off the ledger, against enumeration and hand-made histories."""

import pytest

from megatron_p2o.report.effectiveness import (
    effectiveness_by_epoch,
    plain_success_of_hard,
    summarize_ledger,
)
from megatron_p2o.rl.hard_samples import LedgerEntry


def entry(
    epoch: int, problem_id: str, *, plain: tuple[int, int] = (0, 0), templated: tuple[int, int] = (0, 0)
) -> LedgerEntry:
    """An entry from (solved, tries) pairs."""
    return LedgerEntry(
        epoch=epoch,
        step=epoch + 1,
        problem_id=problem_id,
        plain_solved=plain[0],
        plain_tries=plain[1],
        templated_solved=templated[0],
        templated_tries=templated[1],
    )


def test_both_sides_are_compared_at_the_same_number_of_tries() -> None:
    entries = [
        entry(0, "a", plain=(0, 6)),
        entry(1, "a", plain=(0, 2), templated=(2, 4)),
        entry(1, "b", plain=(1, 2), templated=(4, 4)),
        entry(1, "easy", plain=(6, 6)),
    ]
    (compared,) = effectiveness_by_epoch(entries)
    assert (compared.epoch, compared.num_problems, compared.k) == (1, 2, 2)
    assert compared.plain_at_1 == (0 + 1 / 2) / 2
    assert compared.templated_at_1 == (1 / 2 + 1) / 2
    assert compared.plain_at_k == (0 + 1) / 2
    assert compared.templated_at_k == pytest.approx(((1 - 1 / 6) + 1) / 2)  # of 6 pairs of 4 tries 1 holds no success


def test_one_aborted_rollout_does_not_change_what_is_compared() -> None:
    entries = [entry(1, str(index), plain=(0, 2), templated=(1, 4)) for index in range(5)]
    (compared,) = effectiveness_by_epoch([*entries, entry(1, "aborted", plain=(1, 1), templated=(4, 4))])
    assert (compared.k, compared.num_problems, compared.plain_at_1) == (2, 5, 0)


def test_no_comparison_without_templates() -> None:
    assert effectiveness_by_epoch([entry(0, "a", plain=(1, 6)), entry(1, "b", templated=(1, 6))]) == []


def test_plain_success_is_followed_on_the_problems_that_failed_when_first_asked() -> None:
    entries = [
        entry(0, "hard", plain=(0, 6)),
        entry(0, "easy", plain=(5, 6)),
        entry(1, "hard", plain=(1, 2), templated=(4, 4)),
        entry(1, "easy", plain=(6, 6)),
        entry(2, "hard", plain=(3, 6)),
        entry(1, "new", plain=(0, 6)),
    ]
    assert plain_success_of_hard(entries) == [(0, 0.0), (1, (1 / 2 + 0) / 2), (2, 1 / 2)]


def test_the_summary_follows_each_problem_to_its_end() -> None:
    entries = [
        entry(0, "internalised", plain=(0, 6)),
        entry(0, "template_only", plain=(0, 6)),
        entry(0, "never", plain=(0, 6)),
        entry(0, "easy", plain=(6, 6)),
        entry(1, "internalised", plain=(0, 2), templated=(1, 4)),
        entry(1, "template_only", plain=(0, 2), templated=(1, 4)),
        entry(1, "never", plain=(0, 2), templated=(0, 4)),
        entry(2, "internalised", plain=(2, 2), templated=(4, 4)),
    ]
    summary = summarize_ledger(entries)
    assert summary.num_problems == 4
    assert summary.num_hard_at_first == 3
    assert summary.num_solved_by_template_first == 2
    assert list(summary.internalised) == ["internalised"]
    assert summary.num_never_solved == 1
