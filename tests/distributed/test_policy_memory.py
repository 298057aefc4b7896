"""What every rank holds reaches the conductor."""

from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.processes import HostMemory, RankMemory, own_host_memory
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

MIB = 2**20


def test_the_conductor_knows_the_host_memory_of_every_rank(tmp_path: Path):
    def hold(config: Any) -> list[RankMemory] | None:
        policy = build_policy(config)
        if not policy.is_conductor:
            held = bytearray(b"\1") * (1024 * MIB)
            policy.serve()
            del held
            return None
        memory = policy.memory()
        policy.close()
        return memory

    config = policy_config(write_tiny_qwen3(tmp_path, vocab_size=128), parallel=ParallelConfig(data=2))
    conductor, follower = run_gloo_ranks(hold, 2, config)[0]
    assert conductor.host.resident_bytes > 50 * MIB
    # Both are the same program but for what one of them holds.
    difference = follower.host.resident_bytes - conductor.host.resident_bytes
    assert 768 * MIB < difference < 1280 * MIB
    assert follower.host.peak_bytes >= follower.host.resident_bytes
    # The process that started both, and that is of the first alone.
    starter = own_host_memory().resident_bytes
    assert conductor.agent.resident_bytes == pytest.approx(starter, rel=0.2) and follower.agent == HostMemory()
    assert conductor.gpu_peak_bytes == follower.gpu_peak_bytes == 0
