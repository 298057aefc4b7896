"""How many grading workers a machine gets."""

import os

import pytest

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.workers.grading_workers import num_workers_here


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 2), (2, 2), (5, 2), (16, 8), (96, 48), (256, 64)])
def test_workers_follow_the_cores_of_rank_0_unless_they_are_set(
    num_cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(num_cores)))
    assert num_workers_here(GradingConfig()) == expected
    assert num_workers_here(GradingConfig(num_workers=3)) == 3
