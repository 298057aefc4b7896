"""Derives the number of ranks, and the parts of the trainer's layout that the settings leave open."""

import math
from dataclasses import replace

import torch

from megatron_p2o.config.tree import Config, ParallelConfig


def with_layout(config: Config, num_nodes: int, gpus_per_node: int | None = None) -> Config:
    """Return the settings with `parallel.data` and `parallel.sequence` derived where they are not given.

    Args:
        gpus_per_node: 0 for none; None: those of this machine.

    Raises:
        ValueError: the ranks that the nodes start are no whole number of replicas.
    """
    parallel = config.parallel
    # Without GPUs: no more ranks on a node than one replica needs.
    num_gpus = num_gpus_here() if gpus_per_node is None else gpus_per_node
    on_node = num_gpus or math.ceil(parallel.num_model_ranks / num_nodes)
    return replace(config, parallel=parallel.for_processes(num_nodes * on_node))


def layout_line(given: ParallelConfig, laid_out: ParallelConfig, num_nodes: int, gpus_per_node: int) -> str:
    """Return what the ranks share, and what of it was derived for which nodes; `given`: as the settings have it."""
    sizes = [f"{name} {getattr(laid_out, name)}" for name in ("tensor", "pipeline", "context", "data")]
    derived = [name for name in ("data", "sequence") if getattr(given, name) is None]
    gpus = f"{gpus_per_node} GPUs" if gpus_per_node else "no GPU"
    place = f"{num_nodes} {'node' if num_nodes == 1 else 'nodes'} with {gpus}"
    return (
        f"layout: {' x '.join(sizes)} = {laid_out.world_size} ranks, sequence parallelism "
        f"{'on' if laid_out.is_sequence_parallel else 'off'}"
        + (f"; derived for {place}: {' and '.join(derived)}" if derived else "")
    )


def num_gpus_of(config: Config) -> int:
    """Return how many GPUs a run holds: those of its ranks or of its engines, whichever are more; 0 without any."""
    if not num_gpus_here():
        return 0
    return max(config.parallel.world_size, config.rollout.num_engines * config.rollout.tensor_parallel)


def num_gpus_here() -> int:
    """Return how many GPUs this machine shows."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
