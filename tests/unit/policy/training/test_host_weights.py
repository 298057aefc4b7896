"""The log-probs of the initial policy, whose weights are kept on the host."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_p2o.config.tree import ObjectiveConfig, ParallelConfig
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tested_policy import SAMPLES, assert_same_weights, policy_of, weights_of


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "distributed optimizer"])
def test_the_initial_policy_answers_after_updates_and_a_load_and_the_policy_is_left_as_it_was(
    model: Path, tmp_path: Path, is_sharded: bool
):
    parallel = ParallelConfig(timeout_s=30.0, distributed_optimizer=is_sharded)
    config = policy_config(model, objective=ObjectiveConfig(kl_coefficient=0.1), parallel=parallel)
    with policy_of(config) as policy:
        initial = policy.logprobs(SAMPLES)
        samples = [replace(sample, reference_logprobs=row) for sample, row in zip(SAMPLES, initial, strict=True)]
        policy.update(samples, None, 120)
        policy.save(tmp_path / "checkpoint").result(60)
        weights, moved = weights_of(policy), policy.logprobs(SAMPLES)
        for asked, row, other in zip(policy.reference_logprobs(SAMPLES), initial, moved, strict=True):
            np.testing.assert_array_equal(asked, row)
            assert np.abs(other - row).max() > 1e-3
        assert_same_weights(weights_of(policy), weights, atol=0)
        after = policy.update(samples, None, 120)
    with policy_of(config) as policy:
        policy.load(tmp_path / "checkpoint")
        for asked, row in zip(policy.reference_logprobs(SAMPLES), initial, strict=True):
            np.testing.assert_array_equal(asked, row)
        assert policy.update(samples, None, 120) == after


def test_without_a_kl_term_no_weights_of_the_initial_policy_are_kept(model: Path):
    with (
        policy_of(policy_config(model)) as policy,
        pytest.raises(PolicyError, match=r"objective\.kl_coefficient=0 keeps"),
    ):
        policy.reference_logprobs(SAMPLES)


def test_samples_without_the_log_probs_that_a_kl_term_needs_are_refused(model: Path):
    with policy_of(policy_config(model, objective=ObjectiveConfig(kl_coefficient=0.1))) as policy:
        with pytest.raises(PolicyError, match="reference_logprobs_T is None"):
            policy.update(SAMPLES, None, 120)
        short = [replace(sample, reference_logprobs=np.zeros(2, np.float32)) for sample in SAMPLES]
        with pytest.raises(ValueError, match=r"samples\[0\] has 3 response tokens but \[3, 2\] log-probs"):
            policy.update(short, None, 120)
