"""The trainer's ranks: torch.distributed, Megatron's groups, and the channel for rank 0's commands."""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.training.safe_pickle import refuse_code_of_peers
from megatron_p2o.processes import STORE_FILE_VARIABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Where this process stands. World order is Megatron's "tp-cp-ep-dp-pp": tensor fastest, pipeline slowest."""

    rank: int
    world_size: int
    tensor_rank: int
    context_rank: int
    pipeline_rank: int
    data_rank: int
    device: torch.device
    heads: ProcessGroup | None
    """Gloo group of the first rank of each data-parallel replica, to which rank 0 sends commands; the others wait for
    them while it samples. None on other ranks, and where there is one replica."""
    replica: ProcessGroup | None
    """Gloo group of this rank's replica, whose first rank passes its commands on. None for a replica of one rank."""
    control: ProcessGroup
    """Gloo group of all ranks for small replies and names, whatever the backend of the model."""
    owns_distributed: bool
    """Whether `initialize_parallel` started torch.distributed, and `end_parallel` ends it."""

    @property
    def is_conductor(self) -> bool:
        return self.rank == 0


def initialize_parallel(parallel: ParallelConfig, seed: int) -> Ranks:
    """Start torch.distributed (unless it is) and Megatron's groups. All ranks must call.

    Under torchrun the environment gives rank and world size; otherwise the process is a world of one.

    Raises:
        ValueError: the number of processes is not the product of the parallel sizes.
    """
    refuse_code_of_peers()
    timeout = timedelta(seconds=parallel.timeout_s)
    owns_distributed = not dist.is_initialized()
    if owns_distributed:
        _initialize_torch_distributed(parallel, timeout)
    check_world_size(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=parallel.timeout_s / 60,  # pyright: ignore[reportArgumentType]
    )
    with cuda_stand_ins():
        model_parallel_cuda_manual_seed(seed)
    heads, replica = command_groups(parallel)
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, ProcessGroup)
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        device=_device(),
        heads=heads,
        replica=replica,
        control=control,
        owns_distributed=owns_distributed,
    )


def check_world_size(parallel: ParallelConfig, num_processes: int) -> None:
    """Raise `ValueError` unless `num_processes` is the product of the parallel sizes."""
    if num_processes != parallel.world_size:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} x parallel.context="
            f"{parallel.context} x parallel.data={parallel.num_replicas} = {parallel.world_size} must equal the number "
            f"of trainer processes, {num_processes}: "
            f"set parallel.data to {_fitting_data(parallel, num_processes)} or start {parallel.world_size} processes"
        )


def command_groups(parallel: ParallelConfig) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """Make and return `Ranks.heads` and `Ranks.replica`. All ranks must call."""
    members: list[list[int]] = [[] for _ in range(parallel.num_replicas)]
    for rank in range(parallel.world_size):
        members[data_rank_of(rank, parallel)].append(rank)
    heads = [ranks[0] for ranks in members]
    limit = timedelta(seconds=parallel.command_timeout_s)
    groups = [dist.new_group(ranks, limit, "gloo") if len(ranks) > 1 else None for ranks in (heads, *members)]
    own = dist.get_rank()
    replica = groups[1 + data_rank_of(own, parallel)]
    group_of_heads = groups[0] if own in heads else None
    assert isinstance(replica, ProcessGroup | None) and isinstance(group_of_heads, ProcessGroup | None)
    return group_of_heads, replica


def data_rank_of(rank: int, parallel: ParallelConfig) -> int:
    """Return the data-parallel rank of a world rank."""
    return rank // (parallel.tensor * parallel.context) % parallel.num_replicas


def tensor_group() -> ProcessGroup:
    """Return the ranks that share this rank's layers and samples."""
    group = parallel_state.get_tensor_model_parallel_group()
    assert isinstance(group, ProcessGroup)
    return group


def pipeline_group() -> ProcessGroup:
    """Return the stages that share this rank's samples, first stage first."""
    group = parallel_state.get_pipeline_model_parallel_group()
    assert isinstance(group, ProcessGroup)
    return group


def context_group() -> ProcessGroup:
    """Return the ranks that share the tokens of this rank's samples."""
    group = parallel_state.get_context_parallel_group()
    assert isinstance(group, ProcessGroup)
    return group


def end_parallel(ranks: Ranks) -> None:
    """Destroy what `initialize_parallel` made. Peers that still wait for this rank get an error."""
    if not ranks.owns_distributed:
        groups = {ranks.heads, ranks.replica, ranks.control, *(parallel_state._global_process_group_list or ())}
        # In one order on all ranks: where it communicates, the end of a group is collective.
        for group in sorted(groups - {None}, key=lambda group: group.group_name, reverse=True):
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    # What Megatron forgets, and what the cache of rotary embeddings keeps alive: freed in a process that is forked
    # later, a group would take that process down.
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, ProcessGroup):
            setattr(parallel_state, name, None)
    RotaryEmbedding.forward.cache_clear()  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]
    if ranks.owns_distributed:
        dist.destroy_process_group()
    # The layers are cycles. Until they are collected each group of gloo keeps a thread, which polls, and open files.
    gc.collect()


def _fitting_data(parallel: ParallelConfig, num_processes: int) -> str:
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    return str(num_processes // model_ranks) if num_processes % model_ranks == 0 else "a fitting value"


def _initialize_torch_distributed(parallel: ParallelConfig, timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    is_alone = "RANK" not in os.environ
    world_size = 1 if is_alone else int(os.environ["WORLD_SIZE"])
    check_world_size(parallel, world_size)
    store = dist.HashStore() if is_alone else _meeting_file(world_size)  # pyright: ignore[reportPrivateImportUsage]
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    store.set_timeout(timeout)
    rank = int(os.environ.get("RANK", "0"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _meeting_file(world_size: int) -> dist.FileStore | None:  # pyright: ignore[reportPrivateImportUsage]
    """Return the store in which the ranks of a single machine meet; None where they meet over the network."""
    path = os.environ.get(STORE_FILE_VARIABLE)
    return dist.FileStore(path, world_size) if path else None  # pyright: ignore[reportPrivateImportUsage]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
