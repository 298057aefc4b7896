"""Rank 0's commands reach every rank of a replica, and leave rank 0 once per replica."""

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.model.parallel import data_rank_of, end_parallel, initialize_parallel
from megatron_p2o.policy.rank_channel import Command, RankChannel
from megatron_p2o.testing.distributed import run_gloo_ranks


def commanded(parallel: ParallelConfig) -> tuple[list[Any], int]:
    """Return the arguments of the commands that this rank got, and how many commands it has pickled."""
    pickled: list[Command] = []
    to_tensor = distributed_c10d._object_to_tensor

    def counting(each: Any, *others: Any) -> Any:
        pickled.extend([each] if isinstance(each, Command) else [])
        return to_tensor(each, *others)

    distributed_c10d._object_to_tensor = counting
    ranks = initialize_parallel(parallel, seed=1)
    channel = RankChannel(ranks, command_timeout_s=60)
    got: list[Any] = []
    for number in range(3):  # of different sizes: replicas' samples are not alike
        commands = [
            Command(method="update", arguments=(number, replica, b"x" * (replica + number)))
            for replica in range(parallel.num_replicas)
        ]
        if ranks.is_conductor:
            channel.send(commands)
        got.append(commands[0].arguments if ranks.is_conductor else channel.receive().arguments)
    dist.barrier()
    end_parallel(ranks)
    return got, len(pickled)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2, pipeline=2, data=2),
        ParallelConfig(data=3),
        ParallelConfig(tensor=3, data=1),
        ParallelConfig(context=2, data=2),
    ],
    ids=["tensor and pipeline", "replicas of one rank", "one replica", "context"],
)
def test_every_rank_gets_its_replica_s_command_and_rank_0_pickles_one_per_replica(parallel: ParallelConfig) -> None:
    outcomes = run_gloo_ranks(commanded, parallel.world_size, parallel)
    for rank, (got, _) in enumerate(outcomes):
        replica = data_rank_of(rank, parallel)
        assert got == [(number, replica, b"x" * (replica + number)) for number in range(3)]
    num_replicas, num_passed_on = parallel.num_replicas, int(parallel.world_size > parallel.num_replicas)
    sent = num_replicas if num_replicas > 1 else 0
    assert outcomes[0][1] == 3 * (sent + num_passed_on), "not one per rank"
