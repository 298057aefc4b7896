"""Which problems an epoch asks under a curriculum."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from megatron_p2o.config.rules import idle_settings
from megatron_p2o.config.tree import Config, TaskConfig
from megatron_p2o.data.batches import epoch_batches
from megatron_p2o.data.curriculum import asked_by_weight, weight_of
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry
from megatron_p2o.run.inputs import batches_of
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.types import Problem

PROBLEMS = [Problem(id=str(number), question="q", answer="a") for number in range(40)]


def entry(epoch: int, problem_id: str, plain: tuple[int, int], templated: tuple[int, int] = (0, 0)) -> LedgerEntry:
    """Return what a group showed; (tries, solved) of its plain and templated rollouts."""
    return LedgerEntry(
        epoch=epoch,
        step=epoch,
        problem_id=problem_id,
        plain_tries=plain[0],
        plain_solved=plain[1],
        templated_tries=templated[0],
        templated_solved=templated[1],
    )


def config_of(curriculum: str, **more: object) -> Config:
    return fake_config({"data.curriculum": curriculum, "schedule.problems_per_step": 4, **more})


@pytest.mark.parametrize(
    ("plain", "templated", "unsolved", "learnable"),
    [
        ((6, 0), (0, 0), 1.0, 0.1),
        ((6, 3), (0, 0), 0.5, 1.0),
        ((4, 1), (0, 0), 0.75, 0.75),
        ((6, 6), (0, 0), 0.1, 0.1),
        ((2, 0), (4, 3), 1.0, 1.0),  # hard, and templates solve it: half of six tries
        ((0, 0), (6, 6), 1.0, 0.1),  # never tried plainly
        ((0, 0), (0, 0), 1.0, 1.0),
    ],
)
def test_the_weight_is_the_formulas(
    plain: tuple[int, int], templated: tuple[int, int], unsolved: float, learnable: float
) -> None:
    ledger = HardSampleLedger([entry(0, "0", plain, templated)])
    for curriculum, expected in (("unsolved", unsolved), ("learnable", learnable), ("none", 1.0)):
        data = config_of(curriculum).data
        assert weight_of(PROBLEMS[0], data, ledger, epoch=1) == pytest.approx(expected, abs=1e-15)
        assert weight_of(PROBLEMS[0], data, ledger, epoch=0) == 1.0, "of the epochs before"
        assert weight_of(PROBLEMS[1], data, ledger, epoch=1) == 1.0, "never asked"


def test_the_least_weight_is_a_setting() -> None:
    ledger = HardSampleLedger([entry(0, "0", (6, 6))])
    data = config_of("unsolved", **{"data.curriculum_min_weight": 0.25}).data
    assert weight_of(PROBLEMS[0], data, ledger, epoch=1) == 0.25
    assert idle_settings(config_of("none", **{"data.curriculum_min_weight": 0.25})) == [
        "data.curriculum_min_weight=0.25 has no effect: it acts only with data.curriculum other than none"
    ]


def test_newer_groups_count_more() -> None:
    ledger = HardSampleLedger([entry(0, "0", (6, 6)), entry(1, "0", (6, 0))])
    assert ledger.success_rate("0", before_epoch=2, counted="plain") == 3 / 9 == ledger.plain_success_rate("0")
    assert ledger.success_rate("0", before_epoch=1, counted="plain") == 1.0
    assert ledger.success_rate("0", before_epoch=0, counted="plain") is None


class Fixed(random.Random):
    def __init__(self, number: float) -> None:
        super().__init__()
        self._number = number

    def random(self) -> float:
        return self._number


def test_each_is_asked_with_its_weight_and_their_number_is_the_sum_within_one() -> None:
    """Over all u: the weights are multiples of 1/64, so are the places where the outcome changes."""
    rng = random.Random(1)
    weights = [rng.randint(1, 64) / 64 for _ in range(30)] + [1.0]
    asked = [asked_by_weight(weights, Fixed(u / 64)) for u in range(64)]
    assert [sum(column) / 64 for column in zip(*asked, strict=True)] == weights
    assert {abs(sum(row) - sum(weights)) < 1 for row in asked} == {True}


def test_a_weight_of_one_is_always_asked_whatever_stands_before_it() -> None:
    for seed in range(2000):
        rng = random.Random(seed)
        weights = [rng.choice([1.0, 0.1, 1 / 3, 1 - 1e-16]) for _ in range(50)]
        for weight, is_asked in zip(weights, asked_by_weight(weights, rng), strict=True):
            assert is_asked or weight < 1


def test_without_weights_below_one_nothing_changes() -> None:
    for epoch in range(3):
        plain = epoch_batches(PROBLEMS, 7, seed=2, epoch=epoch)
        assert epoch_batches(PROBLEMS, 7, seed=2, epoch=epoch, weight_of=lambda problem: 1.0) == plain
        assert batches_of(config_of("none"), PROBLEMS, epoch, HardSampleLedger()) == epoch_batches(
            PROBLEMS, 4, config_of("none").run.seed, epoch
        )


def asked_over_epochs(config: Config, problems: list[Problem], num_epochs: int) -> tuple[Counter[str], list[int]]:
    """Return how often each problem was asked, and the size of each epoch; every third problem is hard."""
    ledger, times, sizes = HardSampleLedger(), Counter[str](), list[int]()
    for epoch in range(num_epochs):
        asked = [problem.id for batch in batches_of(config, problems, epoch, ledger) for problem in batch]
        assert len(asked) == len(set(asked)), "once in an epoch"
        times.update(asked)
        sizes.append(len(asked))
        for problem_id in asked:
            ledger.record(entry(epoch, problem_id, (6, 6 * (int(problem_id) % 3 > 0))))
    return times, sizes


def test_hard_problems_are_asked_in_every_epoch_and_mastered_ones_in_few() -> None:
    config = config_of("unsolved", **{"schedule.problems_per_step": 1})
    times, sizes = asked_over_epochs(config, PROBLEMS, num_epochs=201)
    hard = {problem.id for problem in PROBLEMS if int(problem.id) % 3 == 0}
    assert {times[each] for each in hard} == {201}
    mastered = [times[problem.id] - 1 for problem in PROBLEMS if problem.id not in hard]
    assert sum(mastered) / (200 * len(mastered)) == pytest.approx(0.1, abs=0.02), "26 * 0.1 = 2.6: two or three"
    assert sizes[0] == 40 and set(sizes[1:]) == {16, 17}


def test_an_epoch_asks_at_least_a_batch() -> None:
    config = config_of("unsolved", **{"schedule.problems_per_step": 40})
    _, sizes = asked_over_epochs(config, PROBLEMS, num_epochs=5)
    assert sizes == [40] * 5


def test_the_batches_of_an_epoch_are_found_again_in_its_middle() -> None:
    config, ledger = config_of("unsolved"), HardSampleLedger()
    for epoch in range(4):
        whole = batches_of(config, PROBLEMS, epoch, ledger)
        for batch in whole:
            for problem in batch:
                ledger.record(entry(epoch, problem.id, (6, int(problem.id) % 7)))
            entries = [each for problem in PROBLEMS for each in ledger.history(problem.id)]
            assert batches_of(config, PROBLEMS, epoch, HardSampleLedger(entries)) == whole


def test_each_task_is_thinned_by_itself() -> None:
    tasks = {"big": TaskConfig(file="big", weight=2.0), "small": TaskConfig(file="small", weight=1.0)}
    config = config_of("unsolved", **{"schedule.problems_per_step": 1})
    config = replace(config, data=replace(config.data, train=tasks))
    problems = [replace(problem, task="big" if int(problem.id) < 24 else "small") for problem in PROBLEMS]
    ledger = HardSampleLedger([entry(0, str(number), (6, 6)) for number in range(24)])  # `big` is mastered
    for epoch in range(1, 20):
        asked = [problem.task for batch in batches_of(config, problems, epoch, ledger) for problem in batch]
        counts = Counter(asked)
        assert counts["big"] in (2, 3) and counts["small"] == 8, "24 * 0.1, and half of 16"
