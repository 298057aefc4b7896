"""The order of an epoch."""

import subprocess
import sys
from collections import Counter

import pytest

from megatron_p2o.data.batches import epoch_batches
from megatron_p2o.types import Problem

PROBLEMS = [Problem(id=str(number), question="q", answer="a") for number in range(50)]


def ids(batches: list[list[Problem]]) -> list[list[str]]:
    return [[problem.id for problem in batch] for batch in batches]


def test_epoch_visits_each_problem_at_most_once_and_drops_the_incomplete_batch() -> None:
    batches = ids(epoch_batches(PROBLEMS, 8, seed=1, epoch=0))
    assert [len(batch) for batch in batches] == [8] * 6
    assert max(Counter(name for batch in batches for name in batch).values()) == 1


def test_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    first = ids(epoch_batches(PROBLEMS, 10, seed=1, epoch=0))
    assert ids(epoch_batches(PROBLEMS, 10, seed=1, epoch=0)) == first
    others = [ids(epoch_batches(PROBLEMS, 10, seed, epoch)) for seed, epoch in ((1, 1), (2, 0), (0, 1), (11, 0))]
    assert all(other != first for other in others)
    assert len({str(other) for other in others}) == 4
    assert epoch_batches(PROBLEMS, 10, seed=1, epoch=10) != epoch_batches(PROBLEMS, 10, seed=11, epoch=0)


def test_order_is_the_same_in_another_process() -> None:
    script = (
        "from megatron_p2o.data.batches import epoch_batches\n"
        "from megatron_p2o.types import Problem\n"
        "problems = [Problem(id=str(number), question='q', answer='a') for number in range(50)]\n"
        "print([[problem.id for problem in batch] for batch in epoch_batches(problems, 10, seed=1, epoch=3)])\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.strip() == str(ids(epoch_batches(PROBLEMS, 10, seed=1, epoch=3)))


def test_epoch_resumed_at_a_batch_is_the_rest_of_the_epoch() -> None:
    whole = epoch_batches(PROBLEMS, 7, seed=3, epoch=2)
    for start in range(len(whole) + 1):
        assert epoch_batches(PROBLEMS, 7, seed=3, epoch=2, start=start) == whole[start:]


def test_first_places_are_spread_over_all_problems() -> None:
    firsts = Counter(epoch_batches(PROBLEMS, 50, seed=5, epoch=epoch)[0][0].id for epoch in range(500))
    # 500 draws of 50: each is expected 10 times; 30 is 6 standard deviations off.
    assert len(firsts) == 50
    assert max(firsts.values()) < 30


def test_too_few_problems_for_a_batch_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"schedule\.problems_per_step=51 exceeds the 50 problems .* at most 50"):
        epoch_batches(PROBLEMS, 51, seed=1, epoch=0)
