"""A rank that fails ends the run with one error that names it; nothing hangs."""

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.run.ranks.rank_errors import error_file, failure_message, host_name, report_error
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"), vocab_size=128)


def test_every_rank_and_the_last_message_name_the_rank_that_failed_first(model_path: Path, tmp_path: Path):
    def fail_with_message(config: Any) -> str:
        policy = build_policy(config)
        if not policy.is_conductor:
            del policy._shard.optimization
        with pytest.raises(PolicyError) as caught:
            if policy.is_conductor:
                policy.update(random_samples((4, 5), vocab_size=128), None, 9)
            else:
                policy.serve()
        os.environ["RANK"] = str(dist.get_rank())
        report_error(tmp_path, caught.type, caught.value, caught.tb)
        # What a process that ends does: its peers see the connection close.
        dist.destroy_process_group()
        return str(caught.value)

    config = policy_config(model_path, parallel=ParallelConfig(tensor=2, timeout_s=20, sequence=False))
    conductor, follower = run_gloo_ranks(fail_with_message, 2, config)
    assert follower.startswith("policy.update failed on rank 1: AttributeError")
    assert conductor.startswith(follower) and conductor.endswith("(seen on rank 0 as RuntimeError)")

    ends = {rank: ProcessFailure(local_rank=rank, pid=1, exitcode=1, error_file=os.devnull) for rank in range(2)}
    told = failure_message(ends, tmp_path, "node1")
    assert told.startswith(f"p2o: PolicyError: {follower}\n")
    assert told.endswith(f"p2o: rank 1 on {host_name()} failed first; the run is in {tmp_path}")
    where = error_file(tmp_path, 1).read_text()
    assert "AttributeError" in where and "in update" in where


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
        run_gloo_ranks(die_after_building, 2, config)


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
    assert run_gloo_ranks(conductor_leaves, 2, config) == [None, "ended"]


def test_followers_outwait_a_collective_but_not_the_time_limit_for_commands(model_path: Path):
    def conductor_is_silent(config: Any) -> str | None:
        policy, store = build_policy(config), _get_default_store()
        if not policy.is_conductor:
            time.sleep(0.3)
            store.set("is_ready", "")
        policy.wait_for_ranks()
        assert store.check(["is_ready"])
        if policy.is_conductor:
            time.sleep(config.parallel.timeout_s + 1)  # longer than a collective may take, as sampling does
            assert policy.update([], None, 0).learning_rate > 0
            store.wait(["has_ended"], timedelta(seconds=600))
            return None
        limit = f"parallel.command_timeout_s={config.parallel.command_timeout_s:g} s"
        with pytest.raises(PolicyError, match=f"was silent for {re.escape(limit)}$"):
            policy.serve()
        store.set("has_ended", "")
        return "ended"

    def ends(timeout_s: float, command_timeout_s: float) -> list[Any]:
        parallel = ParallelConfig(data=2, timeout_s=timeout_s, command_timeout_s=command_timeout_s)
        return run_gloo_ranks(conductor_is_silent, 2, policy_config(model_path, parallel=parallel))

    try:
        ended = ends(2, 6)
    except RuntimeError:  # a busy machine may hold a rank up for longer
        ended = ends(20, 60)
    assert ended == [None, "ended"]


def test_bad_samples_are_refused_before_any_rank_begins(model_path: Path):
    def refuse_then_train(config: Any) -> str | None:
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
        return report.outcome

    config = policy_config(model_path, parallel=ParallelConfig(data=2))
    assert run_gloo_ranks(refuse_then_train, 2, config)[0] == "applied"


def test_the_number_of_processes_must_be_the_product_of_the_parallel_sizes(model_path: Path):
    def build_with_wrong_sizes(config: Any) -> str:
        with pytest.raises(ValueError) as caught:
            build_policy(config)
        return str(caught.value)

    config = policy_config(model_path, parallel=ParallelConfig(tensor=2, data=2, sequence=False))
    messages = run_gloo_ranks(build_with_wrong_sizes, 2, config)
    assert messages[0] == messages[1]
    assert "= 4 must equal the number of trainer processes, 2: set parallel.data to 1" in messages[0]
