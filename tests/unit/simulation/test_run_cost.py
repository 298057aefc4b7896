"""Steps of a simulated run: the real broker and search, against what can be counted, and the same each time."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.simulation.batch import EngineCoefficients
from megatron_p2o.simulation.cluster import SimulatedCluster, StepCost, TrainerCost, lognormal_lengths
from megatron_p2o.simulation.hardware import read_hardware
from megatron_p2o.simulation.plan import run_lines
from megatron_p2o.simulation.run_cost import RoundAlone, RunCost, SimulatedRun, StepsBeside, run_cost
from megatron_p2o.simulation.virtual_time import simulate
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.types import SamplingParams

COEFFICIENTS = EngineCoefficients(
    step_s=0.006, sequence_s=20e-6, cached_token_s=0.06e-6, prefill_step_s=0.01, prefill_token_s=20e-6
)
SMALL: dict[str, Any] = {
    **{"rollout.num_engines": 2, "rollout.group_size": 4, "rollout.max_new_tokens": 400},
    **{"schedule.problems_per_step": 8, "schedule.problems_per_update": 8},
    "evolution.max_slowdown": math.inf,
    **{"evolution.max_rollouts": 200, "evolution.dev_size": 20, "evolution.num_lineages": 4},
}


def run_of(settings: dict[str, Any] | None = None, cache_tokens: int = 10_000, **trainer: Any) -> SimulatedRun:
    workload = replace(read_hardware().workload, response_tokens=200.0, reflection_s=1.0)
    defaults: dict[str, Any] = {"update_token_s": 1e-3, "refresh_s": 2.0, "lends": True}
    return SimulatedRun(
        config=fake_config(SMALL | (settings or {})),
        coefficients=COEFFICIENTS,
        cache_tokens=cache_tokens,
        trainer=TrainerCost(**defaults | trainer),
        workload=workload,
        num_problems=80,
    )


def one_step(run: SimulatedRun) -> StepCost:
    def main(loop):
        cluster = SimulatedCluster(
            loop, run.config, COEFFICIENTS, run.cache_tokens, lambda ids, sampling: 100, run.trainer
        )
        return cluster.step(0, 50)

    return simulate(main)


def test_a_step_is_its_generation_its_update_and_its_refresh() -> None:
    step = one_step(run_of())
    # Each engine prefills 4 prompts of 50 and one token for each of the 12 that share them, and decodes 16 to the end.
    prefill = 0.01 + 20e-6 * (4 * 50 + 12)
    decode = sum(0.006 + 16 * 20e-6 + 0.06e-6 * 16 * (50 + done) for done in range(1, 100))
    assert step.generation_s == pytest.approx(prefill + decode, rel=1e-6)
    assert step.num_tokens == 8 * 4 * 100
    assert step.update_s == pytest.approx(3.2)
    assert step.step_s == pytest.approx(step.generation_s + 3.2 + 2.0)
    assert step.busy_share == pytest.approx(1.0)
    assert step.num_evolution_tokens == 0


def test_engines_that_do_not_lend_their_memory_sample_for_evolution_during_the_update() -> None:
    lending, keeping = run_cost(run_of(), 3), run_cost(run_of(lends=False), 3)
    assert lending.beside is not None and keeping.beside is not None
    assert keeping.beside.num_trials > lending.beside.num_trials


def test_the_same_simulation_gives_the_same_numbers_and_training_the_same_tokens_beside_evolution() -> None:
    first, second = run_cost(run_of(), 3), run_cost(run_of(), 3)
    assert first == second
    assert first.beside is not None
    assert [step.num_tokens for step in first.beside.steps] == [step.num_tokens for step in first.off]
    assert first.extra_s > 0
    assert first.beside.num_tokens > 0


def test_a_round_alone_spends_its_budget_and_one_beside_many_steps_is_over() -> None:
    cost = run_cost(run_of(), 60)
    assert cost.alone is not None and cost.beside is not None
    assert 0.9 * 200 <= cost.alone.num_trials <= 200
    assert cost.beside.is_round_over
    assert len(cost.beside.steps) < 60
    assert cost.round_steps == len(cost.beside.steps)


@pytest.mark.parametrize(
    "settings",
    [{"evolution.enabled": False}, {"evolution.templates_file": "t.txt"}, {"evolution.plain_rollouts": 9}],
)
def test_without_a_search_only_its_own_steps_are_simulated(settings: dict[str, Any]) -> None:
    cost = run_cost(run_of(settings), 2)
    assert (len(cost.off), cost.alone, cost.beside) == (2, None, None)


def test_training_pays_more_where_its_requests_do_not_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(cache_tokens=4_000)
    with_priorities = run_cost(run, 4)
    monkeypatch.setattr("megatron_p2o.rollout.generation.PRIORITY_IN_ENGINE", {"training": 0, "evolution": 0})
    without = run_cost(run, 4)
    assert with_priorities.extra_s < 0.7 * without.extra_s


def test_evolution_within_its_slowdown_costs_less_and_gets_less() -> None:
    free, bounded = run_cost(run_of(), 4), run_cost(run_of({"evolution.max_slowdown": 0.02}), 4)
    assert free.beside is not None and bounded.beside is not None
    assert bounded.extra_s < 0.5 * free.extra_s
    assert 0 < bounded.beside.num_tokens < free.beside.num_tokens


def step(seconds: float, num_evolution_tokens: int = 0) -> StepCost:
    return StepCost(
        generation_s=seconds,
        update_s=0.0,
        refresh_s=0.0,
        num_tokens=0,
        num_evolution_tokens=num_evolution_tokens,
        busy_share=1.0,
    )


def test_price_and_length_of_a_round_are_what_their_names_say() -> None:
    cost = RunCost(
        off=(step(100.0), step(100.0)),
        alone=RoundAlone(round_s=3600.0, num_tokens=7_200_000, num_trials=1000),
        beside=StepsBeside(steps=(step(110.0, 40_000), step(130.0, 40_000)), num_trials=100, is_round_over=False),
    )
    assert cost.extra_s == pytest.approx(40.0)
    assert cost.price == pytest.approx(40.0 * 2000 / 80_000)
    assert cost.round_steps == pytest.approx(20.0)


def test_the_hours_of_a_run_are_those_of_its_steps_and_its_rounds() -> None:
    cost = RunCost(
        off=(step(360.0),),
        alone=RoundAlone(round_s=3600.0, num_tokens=1, num_trials=1),
        beside=StepsBeside(steps=(step(396.0, 1),), num_trials=1, is_round_over=True),
    )
    # 10 steps an epoch, 2 epochs: one round, which lasts one step beside training.
    beside, waiting, without = run_lines(run_of({"evolution.beside_training": True}), cost, num_gpus=8)
    assert beside.startswith("run, rounds beside training (evolution.beside_training): 20 steps, 2.0 h, 16 GPU-hours")
    assert waiting == "run that waits for its rounds: 20 steps, 3.0 h, 24 GPU-hours"
    assert without == "run without evolution: 20 steps, 2.0 h, 16 GPU-hours"


def test_a_length_depends_on_its_seed_alone_and_ends_at_the_limit() -> None:
    lengths = lognormal_lengths(read_hardware().workload)
    drawn = [
        lengths(None, SamplingParams(temperature=1.0, max_new_tokens=12288, seed=seed))  # type: ignore[arg-type]
        for seed in range(4000)
    ]
    middle = sorted(drawn)[2000]
    assert 2800 < middle < 3200, "median 3,000: five standard deviations of the median of 4,000 draws are 6 %"
    assert max(drawn) == 12288


def test_a_journal_is_left_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_cost(run_of(), 1)
    assert list(tmp_path.iterdir()) == []
