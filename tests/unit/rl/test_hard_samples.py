"""Hard problems and the ledger against counts made by hand."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from megatron_p2o.config.tree import HardConfig
from megatron_p2o.metrics.step import ledger_metrics
from megatron_p2o.metrics.values import numbers_of
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry, hard_problems, helped_and_hurt, ledger_entry
from megatron_p2o.testing.fakes import UNDECIDED, fake_problem, fake_rollout
from megatron_p2o.types import PLAIN, Group, Template

Counted = Literal["plain", "all"]
HINT = Template(id=1, text="Go on.", parent=0)


def group(number: int = 0, *, plain: str = "", templated: str = "") -> Group:
    """Return a group from one letter per rollout: s solved, f failed, a given up on, u undecided by the grader."""
    problem = fake_problem(number)
    rollouts = [
        fake_rollout(
            problem,
            reward=float(letter == "s"),
            template=template,
            finish_reason="abort" if letter == "a" else "stop",
        )
        for template, letters in ((HINT, templated), (PLAIN, plain))
        for letter in letters
    ]
    graded = [
        replace(rollout, grade=UNDECIDED) if letter == "u" else rollout
        for rollout, letter in zip(rollouts, templated + plain, strict=True)
    ]
    return Group(problem=problem, rollouts=tuple(graded), advantages=(0.0,) * len(graded))


def is_hard(group: Group, counted: Counted, max_solved: int = 1) -> bool:
    hard = HardConfig(max_solved=max_solved, counted=counted)
    return hard_problems([group], hard, len(group.rollouts)) == [group.problem]


def entry(step: int, *, plain: tuple[int, int] = (0, 0), templated: tuple[int, int] = (0, 0)) -> LedgerEntry:
    """Return an entry of problem "p" from (tries, solved) counts."""
    return LedgerEntry(
        epoch=0,
        step=step,
        problem_id="p",
        plain_tries=plain[0],
        plain_solved=plain[1],
        templated_tries=templated[0],
        templated_solved=templated[1],
    )


@pytest.mark.parametrize("counted", ["plain", "all"])
def test_at_most_one_success_of_six_is_hard(counted: Counted) -> None:
    hard = [is_hard(group(plain="s" * solved + "f" * (6 - solved)), counted) for solved in range(7)]
    assert hard == [True, True, False, False, False, False, False]


@pytest.mark.parametrize(("max_solved", "expected"), [(0, [True] + [False] * 4), (3, [True] * 4 + [False])])
def test_the_number_of_allowed_successes_is_a_setting(max_solved: int, expected: list[bool]) -> None:
    hard = [is_hard(group(plain="s" * solved + "f" * (4 - solved)), "plain", max_solved) for solved in range(5)]
    assert hard == expected


@pytest.mark.parametrize("counted", ["plain", "all"])
def test_a_larger_group_is_held_to_the_rate_of_a_full_one(counted: Counted) -> None:
    """One of six is the limit, so that two of twelve and no more of eleven than one are hard."""

    def hard(num_solved: int, size: int) -> bool:
        rollouts = group(plain="s" * num_solved + "f" * (size - num_solved))
        return bool(hard_problems([rollouts], HardConfig(counted=counted), group_size=6))

    assert [hard(solved, 12) for solved in range(5)] == [True, True, True, False, False]
    assert [hard(solved, 11) for solved in range(4)] == [True, True, False, False]


def test_templated_successes_keep_a_problem_hard_only_when_plain_rollouts_decide() -> None:
    crutch = group(templated="ssss", plain="ff")
    assert is_hard(crutch, "plain")
    assert not is_hard(crutch, "all")


def test_plain_rollouts_decide_at_the_rate_of_a_full_group() -> None:
    # One success of six is hard; one of two is a rate of a half, and is not.
    assert not is_hard(group(templated="ffff", plain="sf"), "plain")
    assert is_hard(group(templated="ffff", plain="sf"), "all")


def test_a_group_without_plain_rollouts_is_decided_by_all() -> None:
    assert is_hard(group(templated="sfffff"), "plain")
    assert not is_hard(group(templated="ssffff"), "plain")


@pytest.mark.parametrize("counted", ["plain", "all"])
@pytest.mark.parametrize("lost", "au")
def test_rollouts_without_a_verdict_are_not_failures(counted: Counted, lost: str) -> None:
    assert not is_hard(group(plain=6 * lost), counted)
    assert not is_hard(group(plain="s" + 5 * lost), counted)
    assert is_hard(group(plain="f" + 5 * lost), counted)
    assert not is_hard(group(plain="ss" + 2 * lost + "ff"), counted)


@pytest.mark.parametrize("lost", "au")
def test_a_group_whose_plain_rollouts_have_no_verdict_is_decided_by_the_others(lost: str) -> None:
    assert is_hard(group(templated="ffff", plain=2 * lost), "plain")
    assert not is_hard(group(templated="ssss", plain=2 * lost), "plain")


def test_hard_problems_keep_the_order_of_training() -> None:
    groups = [group(3, plain="ffff"), group(1, plain="ssss"), group(2, plain="ffff")]
    assert [problem.id for problem in hard_problems(groups, HardConfig(), 2)] == ["problem-003", "problem-002"]


def test_an_entry_counts_plain_and_templated_tries_apart() -> None:
    assert ledger_entry(group(5, templated="ssufa", plain="sufa"), epoch=2, step=9) == LedgerEntry(
        epoch=2,
        step=9,
        problem_id="problem-005",
        plain_tries=2,
        plain_solved=1,
        templated_tries=3,
        templated_solved=2,
    )


def test_the_plain_rate_halves_the_weight_of_older_entries() -> None:
    ledger = HardSampleLedger()
    assert ledger.plain_success_rate("p") == 0.0
    ledger.record(entry(1, plain=(6, 0)))
    assert ledger.plain_success_rate("p") == 0.0
    ledger.record(entry(2, plain=(2, 1), templated=(4, 4)))
    assert ledger.plain_success_rate("p") == pytest.approx(1 / (6 / 2 + 2))
    ledger.record(entry(3, plain=(2, 2)))
    assert ledger.plain_success_rate("p") == pytest.approx((1 / 2 + 2) / (6 / 4 + 2 / 2 + 2))


def test_templated_tries_say_nothing_about_the_plain_rate() -> None:
    assert HardSampleLedger([entry(1, templated=(6, 6))]).plain_success_rate("p") == 0.0
    ledger = HardSampleLedger([entry(1, plain=(4, 1)), entry(2, templated=(6, 6)), entry(3, templated=(6, 0))])
    assert ledger.plain_success_rate("p") == 0.25


def test_constant_plain_success_is_exactly_one() -> None:
    ledger = HardSampleLedger([entry(step, plain=(6, 6)) for step in range(30)])
    assert ledger.plain_success_rate("p") == 1.0


def test_internalised_is_solved_by_a_template_first_and_plainly_later() -> None:
    def is_internalised(*entries: LedgerEntry) -> bool:
        return HardSampleLedger(entries).internalised() == ["p"]

    failed, crutch = entry(1, plain=(6, 0)), entry(2, plain=(2, 0), templated=(4, 3))
    assert is_internalised(failed, crutch, entry(3, plain=(6, 1)))
    assert is_internalised(crutch, crutch, failed, entry(9, plain=(2, 2), templated=(4, 4)))
    assert not is_internalised()
    assert not is_internalised(failed, crutch)
    assert not is_internalised(failed, entry(2, plain=(6, 1)), crutch)
    assert not is_internalised(entry(1, plain=(2, 1), templated=(4, 4)), entry(2, plain=(6, 6)))


def test_forgotten_is_mastered_before_and_failed_by_every_plain_try_now() -> None:
    def one(problem_id: str, plain: tuple[int, int], templated: tuple[int, int] = (0, 0)) -> LedgerEntry:
        return replace(entry(2, plain=plain, templated=templated), problem_id=problem_id)

    before = [one("mastered", (4, 4)), one("half", (4, 2)), one("poor", (4, 1)), one("templated", (0, 0), (4, 4))]
    ledger = HardSampleLedger(before)
    assert ledger.forgotten([one("mastered", (4, 0)), one("half", (4, 0))]) == (2, 2)
    assert ledger.forgotten([one("mastered", (4, 1)), one("half", (4, 0))]) == (1, 2)
    assert ledger.forgotten([one("poor", (4, 0)), one("templated", (4, 0)), one("new", (4, 0))]) == (0, 0)
    assert ledger.forgotten([one("mastered", (0, 0), (4, 0))]) == (0, 0), "not asked plainly this time"


def test_what_templates_help_and_hurt_is_the_probability_of_each_outcome_of_two_tries() -> None:
    """Against the enumeration of every pair of a plain and a templated try."""
    random = np.random.default_rng(0)
    entries = []
    helped = hurt = 0.0
    for number in range(20):
        plain, templated = (random.random(size) < 0.5 for size in random.integers(1, 5, 2))
        entries.append(
            replace(
                entry(1, plain=(len(plain), int(plain.sum())), templated=(len(templated), int(templated.sum()))),
                problem_id=str(number),
            )
        )
        pairs = [(bool(one), bool(other)) for one in plain for other in templated]
        helped += sum(not one and other for one, other in pairs) / len(pairs)
        hurt += sum(one and not other for one, other in pairs) / len(pairs)
    one_way = [entry(1, plain=(4, 4)), entry(1, templated=(4, 0))]
    assert helped_and_hurt([*entries, *one_way]) == (pytest.approx(helped), pytest.approx(hurt), 20)
    assert helped_and_hurt(one_way) == (0, 0, 0)


def test_first_solved_by_a_template_is_counted_whether_it_was_internalised_or_not() -> None:
    def one(problem_id: str, plain: tuple[int, int], templated: tuple[int, int] = (0, 0)) -> LedgerEntry:
        return replace(entry(1, plain=plain, templated=templated), problem_id=problem_id)

    ledger = HardSampleLedger(
        [
            *(one("kept", (4, 0), (2, 1)), one("kept", (4, 1))),
            *(one("crutch", (4, 0)), one("crutch", (2, 0), (4, 4)), one("crutch", (4, 0))),
            one("easy", (4, 4)),
            one("never", (4, 0), (2, 0)),
        ]
    )
    assert ledger.first_solved_by_template() == ["crutch", "kept"]
    assert ledger.internalised() == ["kept"]
    assert numbers_of(ledger_metrics(ledger)) == {
        "hard/first_solved_by_template_share": 2 / 4,
        "hard/internalised_share": 1 / 2,
    }
    assert numbers_of(ledger_metrics(HardSampleLedger())) == {}


def test_a_ledger_rebuilt_from_its_entries_is_the_same() -> None:
    entries = [ledger_entry(group(number % 3, plain="sf", templated="sff"), 0, number) for number in range(7)]
    grown = HardSampleLedger()
    for item in entries:
        grown.record(item)
    rebuilt = HardSampleLedger(entries)
    assert rebuilt.num_entries == grown.num_entries == 7
    assert [item.step for item in rebuilt.history("problem-001")] == [1, 4]
    assert rebuilt.history("problem-002") == grown.history("problem-002") == (entries[2], entries[5])
    assert rebuilt.history("unknown") == ()


def test_partial_rewards_count_as_solved_from_the_threshold_and_anchor_by_their_mean() -> None:
    rollouts = tuple(
        replace(fake_rollout(fake_problem(1), reward=reward), solved_at=0.5) for reward in (0.0, 0.4, 0.5, 0.8)
    )
    partial = Group(problem=fake_problem(1), rollouts=rollouts, advantages=(0.0,) * 4)
    entry = ledger_entry(partial, epoch=0, step=1)
    assert (entry.plain_tries, entry.plain_solved) == (4, 2)
    assert entry.plain_reward == pytest.approx(1.7)
    assert hard_problems([partial], HardConfig(max_solved=2), 4) and not hard_problems([partial], HardConfig(), 4)
    ledger = HardSampleLedger([entry])
    assert ledger.plain_success_rate(entry.problem_id) == 0.5
    assert ledger.plain_reward(entry.problem_id) == pytest.approx(1.7 / 4)
    whole = HardSampleLedger([ledger_entry(group(5, plain="sffs"), epoch=0, step=1)])
    assert whole.plain_reward("problem-005") == whole.plain_success_rate("problem-005") == 0.5
