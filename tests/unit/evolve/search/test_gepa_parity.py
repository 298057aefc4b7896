"""Where our rules and the gepa package mean the same, they decide the same (gepa is needed for this test only)."""

import random
from collections import Counter
from math import sqrt
from typing import Any

import pytest

from megatron_p2o.evolve.search.candidate_pool import CandidatePool, Score
from megatron_p2o.evolve.search.selection import EXPLORATION_SHARE, pick_parent
from megatron_p2o.evolve.trial import Trial, total_reward

gepa_state = pytest.importorskip("gepa.core.state", reason="gepa==0.1.4 is not installed: no oracle to compare with")
from gepa.gepa_utils import select_program_candidate_from_pareto_front  # noqa: E402
from gepa.proposer.base import CandidateProposal  # noqa: E402
from gepa.strategies.acceptance import StrictImprovementAcceptance  # noqa: E402

NUM_PROBLEMS = 12


def random_rewards(rng: random.Random, num_candidates: int) -> list[list[float]]:
    """Return binary rewards [candidate][problem], mostly 0 as on hard problems."""
    return [[float(rng.random() < 0.25) for _ in range(NUM_PROBLEMS)] for _ in range(num_candidates)]


def gepa_state_of(rewards: list[list[float]]) -> Any:
    evaluations = [
        gepa_state.ValsetEvaluation(
            outputs_by_val_id=dict.fromkeys(range(NUM_PROBLEMS)),
            scores_by_val_id=dict(enumerate(row)),
            objective_scores_by_val_id=None,
        )
        for row in rewards
    ]
    state = gepa_state.GEPAState({"template": "0"}, evaluations[0], track_best_outputs=False)
    for number, evaluation in enumerate(evaluations[1:], start=1):
        state.update_state_with_new_program([0], {"template": str(number)}, evaluation, None, number)
    return state


def pool_of(rewards: list[list[float]]) -> CandidatePool:
    pool = CandidatePool([str(problem) for problem in range(NUM_PROBLEMS)])
    for row in rewards:
        candidate = pool.add(str(len(pool)), None)
        for problem, reward in enumerate(row):
            pool.record(candidate.id, str(problem), Score(reward=reward, weight_version=0))
    return pool


def test_fronts_are_gepas_instance_fronts_ties_at_zero_included() -> None:
    rng = random.Random(0)
    for _ in range(100):
        rewards = random_rewards(rng, rng.randrange(1, 8))
        expected = gepa_state_of(rewards).program_at_pareto_front_valset
        ours = pool_of(rewards).fronts()
        assert {problem: set(ours[str(problem)]) for problem in range(NUM_PROBLEMS)} == expected


def test_mean_scores_are_gepas() -> None:
    rng = random.Random(1)
    rewards = random_rewards(rng, 7)
    pool = pool_of(rewards)
    assert [pool.mean_reward(index) for index in range(7)] == gepa_state_of(rewards).program_full_scores_val_set


def test_acceptance_is_gepas_strict_improvement() -> None:
    rng = random.Random(2)
    verdicts = Counter[bool]()
    for _ in range(300):
        before, after = ([rng.choice([0.0, 0.0, 1.0]) for _ in range(3)] for _ in range(2))
        proposal = CandidateProposal(
            candidate={"template": "z"},
            parent_program_ids=[0],
            subsample_scores_before=before,
            subsample_scores_after=after,
        )
        expected = StrictImprovementAcceptance().should_accept(proposal, gepa_state_of([[0.0] * NUM_PROBLEMS]))
        assert (total_reward(trials(after)) > total_reward(trials(before))) == expected
        verdicts[expected] += 1
    assert min(verdicts.values()) > 30


def trials(rewards: list[float]) -> list[Trial]:
    return [
        Trial(reward=reward, response_text="", finish_reason="stop", num_tokens=1, weight_version=0)
        for reward in rewards
    ]


def test_parents_are_drawn_as_gepa_draws_them_where_nothing_ties_or_stays_unsolved() -> None:
    # One solver per problem: no ties to share, no dominated candidate to remove, no problem at 0.
    rng = random.Random(3)
    solver = [rng.randrange(4) for _ in range(NUM_PROBLEMS)]
    rewards = [[float(solver[problem] == candidate) for problem in range(NUM_PROBLEMS)] for candidate in range(4)]
    state, pool = gepa_state_of(rewards), pool_of(rewards)
    solved = {candidate.id: pool.solved(candidate.id) for candidate in pool.qualified()}
    num_draws = 6000
    theirs = Counter(
        select_program_candidate_from_pareto_front(
            state.program_at_pareto_front_valset, state.program_full_scores_val_set, rng
        )
        for _ in range(num_draws)
    )
    ours = Counter(pick_parent(solved, rng) for _ in range(num_draws))
    for candidate in range(4):
        expected = EXPLORATION_SHARE / 4 + (1 - EXPLORATION_SHARE) * theirs[candidate] / num_draws
        assert abs(ours[candidate] / num_draws - expected) < 5 * sqrt(0.25 / num_draws)
