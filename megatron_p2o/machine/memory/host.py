"""The memory that a run without GPUs holds at least, from the settings and the architecture."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.memory.engine import engine_memory, num_engine_parameters
from megatron_p2o.machine.memory.trainer import trainer_memory
from megatron_p2o.policy.model.architecture import Architecture, element_bytes
from megatron_p2o.rollout.servers.server_arguments import CPU_KV_TOKENS
from megatron_p2o.terminal import size_text


def host_parts(config: Config, architecture: Architecture) -> dict[str, int]:
    """Return the bytes of each part that trainer and engines hold during an update, on all nodes together.

    Ranks of one replica share its parts. Their copies of norms and routers are not counted.

    Args:
        config: with a layout (`with_layout`).
    """
    parallel = config.parallel
    num_copies = parallel.num_replicas * parallel.context
    num_shared = 1 if parallel.distributed_optimizer else num_copies
    whole = replace(parallel, tensor=1, pipeline=1, context=1, data=1, sequence=False)
    replica = trainer_memory(replace(config, parallel=whole), architecture)
    evolution = config.evolution
    num_servers = config.rollout.num_engines + (evolution.searches and evolution.reflection.backend == "self")
    served = element_bytes(config.model.dtype) * num_engine_parameters(architecture, tensor=1)
    servers = "the engine" if num_servers == 1 else f"{num_servers} servers"
    return {
        "weights": num_copies * replica.parameters,
        "gradients": num_copies * replica.gradients,
        "optimizer": num_shared * (replica.masters + replica.moments),
        f"weights of {servers}": num_servers * served,
    }


def host_lines(config: Config, architecture: Architecture, num_nodes: int, num_bytes: int | None = None) -> list[str]:
    """Return the memory of a run without GPUs, one line each. `num_bytes`: what this machine has; None looks.

    Raises:
        ValueError: it is more than the only machine of the run has.
    """
    have = machine_bytes() if num_bytes is None else num_bytes
    parts = host_parts(config, architecture)
    need = sum(parts.values())
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    if num_nodes == 1 and need > have:
        raise ValueError(
            f"the run takes at least {size_text(need)}, and this machine has {size_text(have)}: {listed}. Train a "
            "smaller model or lower rollout.num_engines; for GPUs elsewhere: p2o doctor CONFIG --plan 8x80"
        )
    place = f"this machine has {size_text(have)}" if num_nodes == 1 else f"on {num_nodes} nodes"
    return [
        f"memory without a GPU: at least {size_text(need)} ({place}): {listed}",
        f"memory not counted: activations, the KV cache of an engine ({_cache(config, architecture)} when full), "
        "Python and its libraries in every process",
    ]


CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""What a container may take, by version 2 and 1 of control groups."""


def machine_bytes(limits: Sequence[Path] = CGROUP_LIMITS) -> int:
    """Return the memory of this machine, or what the container of this process may take of it."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    written = [limit.read_text(encoding="ascii").strip() for limit in limits if limit.is_file()]
    return min([whole, *(int(each) for each in written if each.isdecimal())])


def _cache(config: Config, architecture: Architecture) -> str:
    tokens = config.rollout.max_total_tokens or CPU_KV_TOKENS
    whole = replace(config, rollout=replace(config.rollout, tensor_parallel=1))
    return size_text(tokens * engine_memory(whole, architecture).cache_of_token)
