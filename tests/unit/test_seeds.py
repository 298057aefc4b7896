"""Seeds depend on what they are for."""

from dataclasses import replace

import numpy as np

from megatron_p2o.rollout.engines import own_sampling
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import PLAIN, Problem, Prompt, SamplingParams


def prompt(problem_id: str) -> Prompt:
    ids = np.zeros(1, np.int32)
    return Prompt(
        problem=Problem(id=problem_id, question="", answer=""), template=PLAIN, sampling_ids=ids, training_ids=ids
    )


def test_a_seed_is_the_same_in_every_process_and_another_for_every_purpose() -> None:
    assert seed_of(1, "rollouts", 0) == 1051391235113406155
    purposes = [(), ("",), (0,), ("0",), ("a", 1), ("a1",), ("a", "1"), (1, "a")]
    seeds = {seed_of(*purpose) for purpose in purposes}
    assert len(seeds) == len(purposes)
    assert all(0 <= seed < 2**63 for seed in seeds), "engines take signed 64-bit integers"


def test_a_prompts_seed_depends_on_its_problem_and_its_place_in_the_group_only() -> None:
    sampling = SamplingParams(temperature=1.0, max_new_tokens=8, seed=5)

    def seeds(ids: str, seed: int | None = 5) -> list[int | None]:
        return [own.seed for own in own_sampling([prompt(each) for each in ids], replace(sampling, seed=seed))]

    first_a, second_a, b = seeds("aab")
    assert len({first_a, second_a, b}) == 3
    assert seeds("baca") == [b, first_a, seeds("c")[0], second_a]
    assert seeds("a", seed=6) != [first_a]
    assert seeds("aa", seed=None) == [None, None]
