"""The level of a hint, from what a problem's groups have shown."""

from dataclasses import replace

import pytest

from megatron_p2o.config.tree import Config, TaskConfig
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry
from megatron_p2o.rl.sampling import given_templates, hint_level, uses_hints
from megatron_p2o.testing.fakes import FakeLibrary, fake_config, fake_problem
from megatron_p2o.types import Problem

HINTED = replace(fake_problem(1), hints=("weak", "strong"), task="train")
WITHOUT = replace(fake_problem(2), task="train")
LEVELS = {"": 0, "weak": 1, "strong": 2}


def config_of(column: str | None = "hints", **settings: object) -> Config:
    """Groups of six, of which two ask plainly: up to one of six solved is hard."""
    data = {"train": TaskConfig(file="train.jsonl", hints_field=column)}
    own = {name.replace("__", "."): value for name, value in settings.items()}
    return fake_config({"data.train": data, "evolution.enabled": False, "rollout.group_size": 6, **own})


def ledger_of(problem: Problem, *groups: tuple[int, int, int, int]) -> HardSampleLedger:
    """Return the ledger of groups given as (plain tries, solved, templated tries, solved)."""
    return HardSampleLedger(
        [
            LedgerEntry(
                epoch=number,
                step=number,
                problem_id=problem.id,
                plain_tries=plain,
                plain_solved=plain_solved,
                templated_tries=templated,
                templated_solved=templated_solved,
            )
            for number, (plain, plain_solved, templated, templated_solved) in enumerate(groups)
        ]
    )


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([], ""),
        ([(6, 2, 0, 0)], ""),
        ([(6, 1, 0, 0)], "weak"),
        ([(6, 0, 0, 0), (2, 0, 4, 0)], "strong"),
        ([(6, 0, 0, 0), (2, 0, 4, 1)], "weak"),  # one of four is more than one of six
        ([(6, 0, 0, 0), (2, 0, 4, 0), (2, 0, 4, 0), (2, 0, 4, 0)], "strong"),  # there is no stronger one
        ([(6, 0, 0, 0), (2, 0, 4, 0), (2, 0, 4, 4)], "strong"),
        ([(6, 0, 0, 0), (2, 0, 4, 0), (2, 1, 4, 0)], ""),  # solved plainly: the hint has done its work
        ([(6, 0, 0, 0), (2, 0, 4, 0), (2, 1, 4, 0), (6, 0, 0, 0)], "weak"),
        ([(6, 0, 0, 0), (0, 0, 0, 0)], "weak"),  # nothing was decided
    ],
)
def test_a_failing_hint_is_followed_by_the_next_and_a_plain_success_ends_hints(
    groups: list[tuple[int, int, int, int]], text: str
) -> None:
    config, ledger = config_of(), ledger_of(HINTED, *groups)
    templates = given_templates(HINTED, FakeLibrary(), ledger, config)
    assert [template.text for template in templates] == ([text] * 4 + [""] * 2 if text else [""] * 6)
    assert {template.id for template in templates} == ({LEVELS[text], 0} if text else {0})


def test_without_plain_rollouts_in_its_group_a_problem_is_asked_plainly_once_its_hint_works() -> None:
    config = config_of(assignment__num_plain=0)
    for groups, level in (
        ([(6, 0, 0, 0), (0, 0, 6, 0)], 2),
        ([(6, 0, 0, 0), (0, 0, 6, 3)], 0),
        ([(6, 0, 0, 0), (0, 0, 6, 3), (6, 0, 0, 0)], 1),
    ):
        assert hint_level(HINTED, ledger_of(HINTED, *groups), config) == level


def test_a_problem_without_hints_is_asked_plainly_and_known_to_need_one() -> None:
    config, ledger = config_of(), ledger_of(WITHOUT, (6, 0, 0, 0))
    assert [template.text for template in given_templates(WITHOUT, FakeLibrary(), ledger, config)] == [""] * 6
    assert hint_level(WITHOUT, ledger, config) == 1


def test_hints_that_no_setting_names_are_not_used() -> None:
    config, ledger = config_of(None), ledger_of(HINTED, (6, 0, 0, 0))
    assert not uses_hints(config.data) and uses_hints(config_of().data)
    assert hint_level(HINTED, ledger, config) == 0
    assert not any(template.text for template in given_templates(HINTED, FakeLibrary(), ledger, config))
