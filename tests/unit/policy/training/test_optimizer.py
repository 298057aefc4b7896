"""The optimizer's steps and learning rate in one process."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_p2o.config.tree import OptimizerConfig, ParallelConfig
from megatron_p2o.interfaces import PolicyDiverged
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config
from megatron_p2o.testing.tested_policy import SAMPLES, VOCAB_SIZE, assert_same_weights, policy_of, weights_of
from megatron_p2o.testing.tiny_model_types import write_tiny_model


def test_the_learning_rate_warms_up_over_applied_skipped_and_empty_updates(model: Path):
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=3, micro_batch_tokens=48)
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        reports = [
            policy.update(SAMPLES, None, 120),
            policy.update([], None, 0),
            policy.update([replace(SAMPLES[0], advantage=float("nan"))], None, 3),
            policy.update(SAMPLES, None, 120),
            policy.update(SAMPLES, None, 120),
        ]
    assert [report.learning_rate for report in reports] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert [report.outcome for report in reports] == ["applied", "empty", "non_finite", "applied", "applied"]


def rates_of(model: Path, optimizer: OptimizerConfig, num_updates: int, num_planned: int) -> list[float]:
    """Return the learning rates of updates without samples, of which the schedule counts each."""
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        policy.plan_updates(num_planned)
        return [policy.update([], None, 0).learning_rate for _ in range(num_updates)]


def test_the_learning_rate_decays_over_what_is_left_of_the_run_after_warm_up(model: Path):
    """By the formulas written out: steps 0 and 1 are warm-up, steps 2 to 9 decay, 10 and 11 were not planned."""
    linear = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, lr_decay="linear")
    done = [(step - 2) / 8 for step in range(2, 10)]
    warmup = [1e-3 / 3, 2e-3 / 3]
    expected = [*warmup, *(1e-4 + 9e-4 * (1 - share) for share in done), 1e-4, 1e-4]
    assert rates_of(model, linear, 12, num_planned=10) == pytest.approx(expected)
    cosine = replace(linear, lr_decay="cosine", warmup_steps=0, warmup_share=0.11)  # 1.1 of 10 steps: 2
    expected = [*warmup, *(1e-4 + 9e-4 * (1 + np.cos(np.pi * share)) / 2 for share in done), 1e-4, 1e-4]
    assert rates_of(model, cosine, 12, num_planned=10) == pytest.approx(expected)


def test_a_run_of_one_update_or_of_warm_up_alone_has_a_schedule_too(model: Path):
    optimizer = OptimizerConfig(lr=1e-3, lr_decay="cosine")
    assert rates_of(model, optimizer, 2, num_planned=1) == pytest.approx([1e-3, 0.0])
    optimizer = replace(optimizer, warmup_steps=5)
    assert rates_of(model, optimizer, 3, num_planned=3) == pytest.approx([1e-3 / 6, 2e-3 / 6, 3e-3 / 6])


def test_a_learning_rate_that_depends_on_the_runs_length_is_not_guessed(model: Path):
    for optimizer in (OptimizerConfig(lr_decay="linear"), OptimizerConfig(warmup_share=0.1)):
        with (
            policy_of(policy_config(model, optimizer=optimizer)) as policy,
            pytest.raises(PolicyError, match="call plan_updates first"),
        ):
            policy.update(SAMPLES, None, 120)


def test_a_resumed_run_decays_over_the_length_it_has_now(model: Path, tmp_path: Path):
    optimizer = OptimizerConfig(lr=1e-3, lr_decay="linear")
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        policy.plan_updates(4)
        rates = [policy.update(SAMPLES, None, 120).learning_rate for _ in range(2)]
        policy.save(tmp_path / "checkpoint").result(60)
    assert rates == pytest.approx([1e-3, 0.75e-3])
    for order in ("plan first", "load first"):
        with policy_of(policy_config(model, optimizer=optimizer)) as policy:
            calls = [lambda: policy.plan_updates(8), lambda: policy.load(tmp_path / "checkpoint")]
            for call in calls if order == "plan first" else reversed(calls):
                call()
            assert policy.update(SAMPLES, None, 120).learning_rate == pytest.approx(0.75e-3), order
            assert policy.update(SAMPLES, None, 120).learning_rate == pytest.approx(0.625e-3), order


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "distributed optimizer"])
@pytest.mark.parametrize("num_updates", [2, 5], ids=["during warm-up", "after it"])
def test_settings_of_the_optimizer_given_at_a_resume_replace_those_of_the_checkpoint(
    model: Path, tmp_path: Path, num_updates: int, is_sharded: bool
):
    """Against torch's AdamW that gets the new settings between two steps and keeps its moments."""
    parallel = ParallelConfig(timeout_s=30.0, distributed_optimizer=is_sharded)
    old = OptimizerConfig(lr=1e-3, warmup_steps=4, weight_decay=0.1, eps=1e-4, micro_batch_tokens=48)
    new = replace(old, lr=4e-4, warmup_steps=6, weight_decay=0.5, beta1=0.7, beta2=0.9, eps=1e-3, clip_grad=0.5)
    oracle = PolicyOracle(policy_config(model, optimizer=old))
    with policy_of(policy_config(model, optimizer=old, parallel=parallel)) as policy:
        for _ in range(num_updates):
            policy.update(SAMPLES, None, 120)
            oracle.update(SAMPLES, None, 120)
        policy.save(tmp_path / "checkpoint").result(60)
    oracle.change(new)
    with policy_of(policy_config(model, optimizer=new, parallel=parallel)) as policy:
        policy.update(SAMPLES, None, 120)  # a load does not count on top of what was trained before it
        policy.load(tmp_path / "checkpoint")
        rates = [policy.update(SAMPLES, None, 120).learning_rate for _ in range(3)]
        expected = [4e-4 * min(1, (num_updates + step + 1) / 7) for step in range(3)]
        assert rates == pytest.approx(expected)
        for _ in range(3):
            oracle.update(SAMPLES, None, 120)
        assert_same_weights(weights_of(policy), oracle.weights(), atol=2e-6)


def test_a_gradient_that_is_not_finite_changes_nothing_and_training_goes_on(model: Path):
    with policy_of(policy_config(model)) as policy:
        before = weights_of(policy)
        broken = policy.update([replace(SAMPLES[0], advantage=float("nan")), SAMPLES[1]], None, 20)
        assert broken.outcome == "non_finite" and not np.isfinite(broken.grad_norm)
        assert_same_weights(weights_of(policy), before, atol=0)
        healthy = policy.update(SAMPLES, None, 120)
    with policy_of(policy_config(model)) as policy:
        assert healthy.grad_norm == policy.update(SAMPLES, None, 120).grad_norm


def test_a_learning_rate_that_blows_the_weights_up_is_noticed_after_the_update(model: Path):
    optimizer = OptimizerConfig(lr=float("inf"), micro_batch_tokens=48)
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        assert policy.update(SAMPLES, None, 120).outcome == "applied", "the gradient itself is finite"
        with pytest.raises(PolicyDiverged, match="NaN or infinite"):
            policy.weights()


def test_an_empty_update_moves_no_weight(model: Path):
    with policy_of(policy_config(model)) as policy:
        policy.update(SAMPLES, None, 120)
        before = weights_of(policy)
        report = policy.update([], None, 7)
        assert (report.loss, report.grad_norm, report.outcome) == (0.0, 0.0, "empty")
        assert_same_weights(weights_of(policy), before, atol=0)
        assert policy.logprobs([]) == []


def test_a_learning_rate_of_0_freezes_the_policy_whatever_else_is_set(model: Path) -> None:
    optimizer = OptimizerConfig(lr=0.0, weight_decay=0.1, warmup_steps=1, micro_batch_tokens=48)
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        before = {name: tensor.clone() for name, tensor in weights_of(policy).items()}
        for _ in range(3):
            report = policy.update(SAMPLES, None, 120)
            assert report.outcome == "applied" and report.learning_rate == 0 and report.grad_norm > 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(policy).items())


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3-moe"])
@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "distributed optimizer"])
def test_a_closed_policy_leaves_no_thread_and_no_model(tmp_path: Path, model_type: str, is_sharded: bool):
    """A group of gloo polls in threads of its own until the last layer that knows it is gone."""
    gc.collect()  # what an earlier test has left
    before = num_gloo_threads()
    parallel = ParallelConfig(timeout_s=30.0, distributed_optimizer=is_sharded)
    model = write_tiny_model(tmp_path, model_type, vocab_size=VOCAB_SIZE)
    with policy_of(policy_config(model, parallel=parallel)) as policy:
        weights = [weakref.ref(weight) for weight in policy._shard.models[0].parameters()]
        assert num_gloo_threads() > before
        policy.update(SAMPLES, None, 120)
    del policy  # knows the model and the group of its commands
    gc.collect()
    assert num_gloo_threads() == before
    assert all(weight() is None for weight in weights)


def num_gloo_threads() -> int:
    """Return how many threads of this process belong to a group of gloo."""
    return sum("gloo" in name.read_text() for name in Path("/proc/self/task").glob("*/comm"))
