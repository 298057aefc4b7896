"""The authors' numbers and rules: budget, split, selection, cover, assignment."""

import random
from collections import Counter
from dataclasses import replace
from math import exp, sqrt
from typing import Literal

import pytest

from megatron_p2o.config.tree import GEPA_BUDGETS, AssignmentConfig
from megatron_p2o.evolve.search.budget import (
    RolloutBudget,
    automatic_budget,
    reference_cost,
    split_problems,
    split_sizes,
)
from megatron_p2o.evolve.search.candidate_pool import CandidatePool, Score
from megatron_p2o.evolve.search.publish import assign, greedy_cover
from megatron_p2o.evolve.search.selection import EXPLORATION_SHARE, front_credit, pick_parent, reference_selection
from megatron_p2o.types import PLAIN, Template

# Budget


@pytest.mark.parametrize(
    ("name", "dev_size", "expected"),
    [
        ("heavy_4", 300, 11_040),
        ("heavy_4", 250, 9_890),
        ("heavy_4", 225, 9_315),
        ("heavy_4", 150, 7_590),
        ("heavy_4", 50, 5_290),
        ("heavy", 300, 3_135),
        # light: K 6, N = int(4 log2 6) = 10, so 50 + 30 + 350 + (11 // 5 + 1) * 50
        ("light", 50, 580),
    ],
)
def test_automatic_budget_is_gepas(name: str, dev_size: int, expected: int) -> None:
    assert automatic_budget(dict(GEPA_BUDGETS)[name], dev_size) == expected


def test_reference_cost_frees_two_iterations_and_ignores_the_second_minibatch() -> None:
    assert reference_cost(1, 16, 16, 3, 300) == 0
    assert reference_cost(2, 16, 16, 3, 300) == 0
    assert reference_cost(3, 16, 2, 3, 300) == 3 * 16 + 300 * 2


def test_rollout_budget_refuses_what_would_exceed_it_and_then_still_takes_less() -> None:
    budget = RolloutBudget(10, spent=4)
    assert not budget.try_spend(7)
    assert budget.try_spend(6)
    assert budget.spent == 10
    assert budget.try_spend(0)
    assert not budget.try_spend(1)


# RoundSplit


@pytest.mark.parametrize(
    ("num_hard", "expected"),
    [
        (99, None),
        (100, (50, 50)),
        (449, (224, 225)),
        (450, (225, 225)),
        (599, (299, 300)),
        (600, (300, 300)),
        (5000, (300, 4700)),
    ],
)
def test_split_sizes_are_the_authors(num_hard: int, expected: tuple[int, int] | None) -> None:
    assert split_sizes(num_hard, dev_size=300, min_problems=100) == expected


def test_split_is_a_partition_that_depends_on_the_seed() -> None:
    problem_ids = [f"p{index}" for index in range(450)]
    splits = [split_problems(problem_ids, 300, 100, random.Random(seed)) for seed in (1, 1, 2)]
    assert splits[0] is not None and splits[0] == splits[1] and splits[0] != splits[2]
    assert sorted((*splits[0].dev, *splits[0].feedback)) == sorted(problem_ids)
    assert splits[0].dev != tuple(problem_ids[:225])


# Selection


def test_reference_selection_takes_all_on_any_front_ties_at_zero_included() -> None:
    pool = CandidatePool(["a", "b"])
    for rewards in ((0.0, 1.0), (0.0, 0.0), (0.0, 1.0)):
        candidate = pool.add(str(rewards), None)
        for problem_id, reward in zip("ab", rewards, strict=True):
            pool.record(candidate.id, problem_id, Score(reward=reward, weight_version=0))
    assert pool.fronts() == {"a": {0, 1, 2}, "b": {0, 2}}
    assert reference_selection(pool.fronts(), 16, random.Random(0)) == [0, 1, 2]


def test_reference_selection_draws_without_replacement_weighted_by_front_count() -> None:
    # Candidate 0 is on 8 fronts, 1 and 2 on one each.
    fronts = {f"p{index}": frozenset({0}) for index in range(8)} | {"x": frozenset({1}), "y": frozenset({2})}
    rng = random.Random(0)
    draws = [reference_selection(fronts, 2, rng) for _ in range(4000)]
    assert all(len(set(drawn)) == 2 for drawn in draws)
    # First draw 0 has weight 8 / 10; missed first (2 / 10) it has 8 / 9 left: in total 0.8 + 0.2 * 8 / 9.
    share = sum(0 in drawn for drawn in draws) / len(draws)
    expected = 0.8 + 0.2 * 8 / 9
    assert abs(share - expected) < 4 * sqrt(expected * (1 - expected) / len(draws))
    assert abs(sum(drawn[0] == 0 for drawn in draws) / len(draws) - 0.8) < 4 * sqrt(0.16 / len(draws))


def test_front_credit_is_shared_by_ties_and_unsolved_problems_give_none() -> None:
    solved = {0: frozenset[str](), 1: frozenset("ab"), 2: frozenset("bc"), 3: frozenset("b")}
    assert front_credit(solved) == pytest.approx({0: 0.0, 1: 1 + 1 / 3, 2: 1 + 1 / 3, 3: 1 / 3})


def test_parent_is_drawn_by_credit_with_some_exploration() -> None:
    solved = {0: frozenset[str](), 1: frozenset("abc"), 2: frozenset("d")}
    rng = random.Random(0)
    counts = Counter(pick_parent(solved, rng) for _ in range(8000))
    explored = EXPLORATION_SHARE / 3
    for candidate, credit in ((0, 0.0), (1, 0.75), (2, 0.25)):
        expected = explored + (1 - EXPLORATION_SHARE) * credit
        assert abs(counts[candidate] / 8000 - expected) < 4 * sqrt(expected * (1 - expected) / 8000)


def test_parent_is_any_candidate_while_nothing_is_solved() -> None:
    solved = {0: frozenset[str](), 1: frozenset[str]()}
    rng = random.Random(0)
    assert {pick_parent(solved, rng) for _ in range(100)} == {0, 1}


# Cover


def test_cover_takes_the_largest_gain_first_and_ties_go_to_the_lowest_id() -> None:
    solved = {0: frozenset("a"), 1: frozenset("abc"), 2: frozenset("cde"), 3: frozenset("de"), 4: frozenset("abc")}
    assert greedy_cover(solved) == [1, 2]


def test_cover_leaves_out_who_adds_nothing() -> None:
    assert greedy_cover({0: frozenset("ab"), 1: frozenset("b"), 2: frozenset("c")}) == [0, 2]


def test_cover_of_nothing_solved_is_empty() -> None:
    assert greedy_cover({0: frozenset[str](), 1: frozenset[str]()}) == []
    assert greedy_cover({}) == []


def test_cover_reaches_what_all_candidates_reach_together() -> None:
    rng = random.Random(3)
    for _ in range(50):
        solved = {index: frozenset(rng.sample("abcdefghijkl", rng.randrange(6))) for index in range(8)}
        cover = greedy_cover(solved)
        assert len(set(cover)) == len(cover)
        assert frozenset[str]().union(*(solved[c] for c in cover)) == frozenset[str]().union(*solved.values())


# Assignment


def template(template_id: int, score: float, *seen: str) -> Template:
    return Template(id=template_id, text=f"z{template_id}", parent=0, score=score, lineage_problem_ids=frozenset(seen))


def assigned(
    problem_ids: list[str],
    cover: list[Template],
    solved: dict[int, frozenset[str]],
    *,
    num_plain: int = 0,
    same: bool = False,
    guard: bool = True,
    seed: int = 0,
    weight: Literal["score", "transfer"] = "score",
) -> dict[str, tuple[Template, ...]]:
    config = AssignmentConfig(num_plain=num_plain, same_template_in_group=same, weight=weight)
    return assign(problem_ids, cover, solved, 6, config, random.Random(seed), guard_leaks=guard)


def test_solved_problem_gets_only_the_templates_that_solved_it() -> None:
    cover = [template(1, 0.5), template(2, 0.5), template(3, 0.5)]
    solved = {1: frozenset({"dev"}), 2: frozenset[str](), 3: frozenset({"dev"})}
    for seed in range(20):
        table = assigned(["dev", "feedback"], cover, solved, seed=seed)
        assert {z.id for z in table["dev"]} <= {1, 3}
        assert len(table["dev"]) == len(table["feedback"]) == 6
    everything = {z.id for seed in range(20) for z in assigned(["feedback"], cover, solved, seed=seed)["feedback"]}
    assert everything == {1, 2, 3}


def test_templates_are_drawn_in_proportion_to_their_score() -> None:
    cover = [template(1, 0.6), template(2, 0.2)]
    problem_ids = [f"p{index}" for index in range(1000)]
    table = assigned(problem_ids, cover, {1: frozenset(), 2: frozenset()})
    share = sum(z.id == 1 for drawn in table.values() for z in drawn) / 6000
    assert abs(share - 0.75) < 4 * sqrt(0.75 * 0.25 / 6000)


def test_templates_whose_solutions_lean_on_them_are_drawn_less_often_where_transfer_weighs() -> None:
    """HiLL's weight, exp(min(D, 0) / 0.3): a template that the plain policy does not need counts as much as one it can
    do without, and one without a measurement as its score says."""
    reliances = {1: -0.6, 2: -0.3, 3: 0.0, 4: 0.7, 5: None}
    cover = [replace(template(number, 0.5), reliance=reliance) for number, reliance in reliances.items()]
    solved = {number: frozenset[str]() for number in reliances}
    problem_ids = [f"p{index}" for index in range(2000)]
    weights = [exp(-2), exp(-1), 1, 1, 1]
    table = assigned(problem_ids, cover, solved, weight="transfer")
    drawn = Counter(each.id for given in table.values() for each in given)
    for number, weight in zip(reliances, weights, strict=True):
        share = weight / sum(weights)
        assert abs(drawn[number] / 12000 - share) < 4 * sqrt(share * (1 - share) / 12000)
    bare = [replace(each, reliance=None) for each in cover]
    by_score = [[each.id for each in given] for given in assigned(problem_ids, cover, solved).values()]
    assert by_score == [[each.id for each in given] for given in assigned(problem_ids, bare, solved).values()]
    assert by_score == [
        [each.id for each in given] for given in assigned(problem_ids, bare, solved, weight="transfer").values()
    ], "nothing measured: the paper's draw"


def test_score_of_zero_still_allows_a_template_that_is_alone() -> None:
    table = assigned(["p"], [template(1, 0.0)], {1: frozenset()})
    assert [z.id for z in table["p"]] == [1] * 6


def test_plain_rollouts_are_reserved_at_the_end() -> None:
    table = assigned(["p"], [template(1, 0.5)], {1: frozenset()}, num_plain=2)
    assert [z.id for z in table["p"]] == [1, 1, 1, 1, 0, 0]
    assert table["p"][4:] == (PLAIN, PLAIN)


def test_same_template_in_group_draws_once() -> None:
    cover = [template(1, 0.5), template(2, 0.5)]
    tables = [
        assigned(["p"], cover, {1: frozenset(), 2: frozenset()}, same=True, num_plain=1, seed=s) for s in range(20)
    ]
    assert all(len({z.id for z in table["p"][:5]}) == 1 and table["p"][5] is PLAIN for table in tables)
    assert {table["p"][0].id for table in tables} == {1, 2}


def test_template_is_never_paired_with_a_problem_of_its_lineage() -> None:
    cover = [template(1, 0.9, "p"), template(2, 0.1)]
    solved = {1: frozenset({"p"}), 2: frozenset[str]()}
    assert {z.id for z in assigned(["p"], cover, solved)["p"]} == {2}
    assert "p" not in assigned(["p"], cover[:1], solved), "plain when no template is left"
    assert {z.id for z in assigned(["p"], cover, solved, guard=False)["p"]} == {1}


def test_empty_template_of_the_cover_is_drawn_as_the_plain_template() -> None:
    empty = Template(id=0, text="", parent=None, score=0.4)
    assert assigned(["p"], [empty], {0: frozenset()})["p"] == (PLAIN,) * 6


def test_empty_cover_assigns_nothing() -> None:
    assert assigned(["p"], [], {}) == {}


# Pool


def test_rescored_candidate_leaves_the_front_it_no_longer_holds() -> None:
    pool = CandidatePool(["a"])
    first, second = pool.add("x", None), pool.add("y", None)
    pool.record(first.id, "a", Score(reward=1.0, weight_version=1))
    pool.record(second.id, "a", Score(reward=1.0, weight_version=1))
    pool.record(first.id, "a", Score(reward=0.0, weight_version=2))
    assert pool.fronts()["a"] == {1}
    assert (pool.mean_reward(0), pool.template(0).weight_version) == (0.0, 2)


def test_disqualified_candidate_is_on_no_front_and_solves_nothing() -> None:
    pool = CandidatePool(["a", "b"])
    for text in "xy":
        candidate = pool.add(text, None)
        pool.record(candidate.id, "a", Score(reward=float(text == "x"), weight_version=1))
    pool.disqualify(0)
    assert pool.fronts() == {"a": {1}, "b": set()}
    assert pool.solved(0) == set()
    assert [candidate.id for candidate in pool.qualified()] == [1]
    pool.record(0, "b", Score(reward=1.0, weight_version=1))
    assert pool.fronts()["b"] == set()


def test_mean_reward_is_over_the_measured_problems_only() -> None:
    pool = CandidatePool(["a", "b", "c"])
    pool.add("x", None)
    pool.record(0, "a", Score(reward=1.0, weight_version=1))
    pool.record(0, "b", Score(reward=0.0, weight_version=4))
    assert pool.template(0) == Template(id=0, text="x", parent=None, score=0.5, weight_version=4)
