"""A rank that fails ends the run with one error that names it; nothing hangs."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_p2o.config import ParallelConfig
from megatron_p2o.policy.ranks import PolicyError, build_policy
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"), vocab_size=128)


def test_the_conductor_names_the_follower_that_failed(model_path: Path, tmp_path: Path):
    def break_rank_1(config: Any) -> str | None:
        policy = build_policy(config, output_dir=tmp_path)
        if policy.is_conductor:
            with pytest.raises(PolicyError) as caught:
                policy.update(random_samples((4, 5), vocab_size=128), None, 9)
            return str(caught.value)
        del policy._shard.optimization
        policy.serve()
        return None

    config = policy_config(model_path, parallel=ParallelConfig(tensor=2, timeout_s=20))
    with pytest.raises(RuntimeError, match=r"failed on 1 of 2 ranks\nrank 1:(.|\n)*PolicyError"):
        run_gloo_ranks(break_rank_1, 2, config, timeout_s=15)
    assert "AttributeError" in (tmp_path / "rank_1_error.txt").read_text()
    seen_by_rank_0 = (tmp_path / "rank_0_error.txt").read_text()
    assert "Traceback" in seen_by_rank_0


def test_every_rank_reports_the_first_error(model_path: Path):
    def fail_with_message(config: Any) -> str:
        policy = build_policy(config)
        if not policy.is_conductor:
            del policy._shard.optimization
        with pytest.raises(PolicyError) as caught:
            if policy.is_conductor:
                policy.update(random_samples((4, 5), vocab_size=128), None, 9)
            else:
                policy.serve()
        # What a process that ends does: its peers see the connection close.
        dist.destroy_process_group()
        return str(caught.value)

    config = policy_config(model_path, parallel=ParallelConfig(tensor=2, timeout_s=20))
    conductor, follower = run_gloo_ranks(fail_with_message, 2, config, timeout_s=15)
    assert follower.startswith("policy.update failed on rank 1: AttributeError")
    assert conductor.startswith(follower) and conductor.endswith("(seen on rank 0 as RuntimeError)")


def test_a_follower_that_dies_ends_the_conductors_call(model_path: Path):
    def die_after_building(config: Any) -> str | None:
        policy = build_policy(config)
        if not policy.is_conductor:
            os._exit(3)
        with pytest.raises(PolicyError) as caught:
            policy.update(random_samples((4, 5), vocab_size=128), None, 9)
        return str(caught.value)

    config = policy_config(model_path, parallel=ParallelConfig(data=2, timeout_s=20))
    with pytest.raises(RuntimeError, match=r"failed on 1 of 2 ranks\nrank 1:\nthe process died .*exit code 3"):
        run_gloo_ranks(die_after_building, 2, config, timeout_s=15)


def test_followers_end_with_an_error_when_the_conductor_is_gone(model_path: Path):
    def conductor_leaves(config: Any) -> str | None:
        policy = build_policy(config)
        if policy.is_conductor:
            return None
        with pytest.raises(
            PolicyError, match=r"policy\.serve failed on rank 1: ConnectionError: no command from rank 0"
        ):
            policy.serve()
        return "ended"

    config = policy_config(model_path, parallel=ParallelConfig(data=2, timeout_s=20))
    assert run_gloo_ranks(conductor_leaves, 2, config, timeout_s=15) == [None, "ended"]


def test_followers_do_not_wait_longer_than_the_time_limit(model_path: Path):
    def conductor_is_silent(config: Any) -> str | None:
        policy = build_policy(config)
        if policy.is_conductor:
            time.sleep(3)
            return None
        with pytest.raises(PolicyError, match=r"was silent for parallel\.timeout_s=1 s"):
            policy.serve()
        return "ended"

    config = policy_config(model_path, parallel=ParallelConfig(data=2, timeout_s=1.0))
    assert run_gloo_ranks(conductor_is_silent, 2, config, timeout_s=15) == [None, "ended"]


def test_bad_samples_are_refused_before_any_rank_begins(model_path: Path):
    def refuse_then_train(config: Any) -> bool | None:
        policy = build_policy(config)
        if not policy.is_conductor:
            return policy.serve()
        samples = random_samples((4, 5), vocab_size=128)
        with pytest.raises(ValueError, match="old_logprobs has 1 rows for 2 samples"):
            policy.update(samples, [np.zeros(4, np.float32)], 9)
        with pytest.raises(ValueError, match="num_loss_tokens=8 must count the 9 response tokens"):
            policy.update(samples, None, 8)
        report = policy.update(samples, None, 9)
        policy.close()
        return report.is_applied

    config = policy_config(model_path, parallel=ParallelConfig(data=2))
    assert run_gloo_ranks(refuse_then_train, 2, config)[0] is True


def test_the_number_of_processes_must_be_the_product_of_the_parallel_sizes(model_path: Path):
    def build_with_wrong_sizes(config: Any) -> str:
        with pytest.raises(ValueError) as caught:
            build_policy(config)
        return str(caught.value)

    config = policy_config(model_path, parallel=ParallelConfig(tensor=2, data=2))
    messages = run_gloo_ranks(build_with_wrong_sizes, 2, config)
    assert messages[0] == messages[1]
    assert "= 4 must equal the number of trainer processes, 2: set parallel.data to 1" in messages[0]
