"""The order of an epoch."""

import random
import subprocess
import sys
from collections import Counter

import pytest

from megatron_p2o.config.tree import DataConfig, TaskConfig
from megatron_p2o.data.batches import asked_counts, epoch_batches
from megatron_p2o.data.tasks import num_asked
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


def test_one_task_is_one_shuffle_of_its_problems() -> None:
    order = list(range(50))
    random.Random("3/2").shuffle(order)
    whole = epoch_batches(PROBLEMS, 7, seed=3, epoch=2)
    assert [problem.id for batch in whole for problem in batch] == [str(index) for index in order[:49]]


def mixed(**sizes: int) -> list[Problem]:
    return [
        Problem(id=f"{task}-{number}", question="q", answer="a", task=task)
        for task, size in sizes.items()
        for number in range(size)
    ]


def test_an_epoch_asks_all_of_the_heaviest_task_and_the_share_of_the_others() -> None:
    problems, weights = mixed(math=40, code=30, puzzles=7), {"math": 3.0, "code": 1.0, "puzzles": 3.0}
    asked = [problem for batch in epoch_batches(problems, 1, seed=1, epoch=0, weights=weights) for problem in batch]
    assert Counter(problem.task for problem in asked) == {"math": 40, "code": 10, "puzzles": 7}
    assert len({problem.id for problem in asked}) == 57


@pytest.mark.parametrize("weights", [(0.7, 1.4), (0.1, 0.6), (1e-9, 1e9), (5e-324, 1e308)])
def test_as_many_problems_are_asked_as_settings_announce(weights: tuple[float, float]) -> None:
    tasks = {name: TaskConfig(file=name, weight=weight) for name, weight in zip("ab", weights, strict=True)}
    problems = mixed(a=3, b=40)
    asked = epoch_batches(problems, 1, seed=1, epoch=0, weights=dict(zip("ab", weights, strict=True)))
    assert Counter(problem.task for (problem,) in asked) == num_asked(DataConfig(train=tasks), problems)


def test_a_task_is_asked_through_before_a_problem_of_it_is_asked_again() -> None:
    problems, weights = mixed(math=40, code=30), {"math": 3.0, "code": 1.0}
    epochs = [epoch_batches(problems, 1, seed=1, epoch=epoch, weights=weights) for epoch in range(6)]
    asked = [{batch[0].id for batch in epoch if batch[0].task == "code"} for epoch in epochs]
    assert all(len(ids) == 10 for ids in asked)
    assert set.union(*asked[:3]) == set.union(*asked[3:]) == {problem.id for problem in problems[40:]}


def test_batches_mix_tasks_in_their_proportions() -> None:
    generator = random.Random(0)
    for trial in range(50):
        sizes = {f"task{index}": generator.randint(20, 200) for index in range(generator.randint(2, 6))}
        weights = {task: generator.choice([1.0, 0.5, 0.3, 2.0]) for task in sizes}
        problems = mixed(**sizes)
        counts = asked_counts([(sizes[task], weights[task]) for task in sizes])
        for batch in epoch_batches(problems, 8, seed=trial, epoch=trial, weights=weights):
            held = Counter(problem.task for problem in batch)
            for task, count in zip(sizes, counts, strict=True):
                assert abs(held[task] - 8 * count / sum(counts)) <= len(sizes) / 2 + 1


def test_a_mix_is_the_same_whenever_asked_and_goes_on_at_any_batch() -> None:
    problems, weights = mixed(math=40, code=30, puzzles=7), {"math": 2.0, "code": 1.0, "puzzles": 0.1}
    for epoch in (0, 1, 5):
        whole = epoch_batches(problems, 6, seed=3, epoch=epoch, weights=weights)
        assert epoch_batches(problems, 6, seed=3, epoch=epoch, weights=weights) == whole
        for start in range(len(whole) + 1):
            assert epoch_batches(problems, 6, seed=3, epoch=epoch, start=start, weights=weights) == whole[start:]
    names = {"a": 2.0, "b": 1.0, "c": 0.1}
    renamed = epoch_batches(mixed(a=40, b=30, c=7), 6, seed=3, epoch=5, weights=names)
    places = [[problem.id.partition("-")[2] for problem in batch] for batch in whole]
    assert places == [[problem.id.partition("-")[2] for problem in batch] for batch in renamed], "names decide nothing"


def test_too_few_problems_for_a_batch_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"schedule\.problems_per_step=51 exceeds the 50 problems .* at most 50"):
        epoch_batches(PROBLEMS, 51, seed=1, epoch=0)
