"""The GPU memory of one engine rank, and the number of engine ranks on the fullest GPU."""

from collections import Counter
from dataclasses import dataclass

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.memory.trainer import cut_size
from megatron_p2o.policy.model.architecture import Architecture, element_bytes
from megatron_p2o.rollout.servers.server_arguments import engine_places


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """What a node of the run has."""

    count: int
    num_bytes: int
    """Memory of each GPU."""
    num_nodes: int
    """Number of nodes of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMemory:
    """What one rank of an engine holds, in bytes."""

    weights: int
    cache_of_token: int
    """What one token takes of its KV cache."""


def engine_memory(config: Config, architecture: Architecture) -> EngineMemory:
    """Return what a rank of an engine of `rollout.tensor_parallel` holds."""
    tensor, element = config.rollout.tensor_parallel, element_bytes(config.model.dtype)
    return EngineMemory(
        weights=element * num_engine_parameters(architecture, tensor),
        cache_of_token=cache_bytes_of_token(architecture, tensor, element),
    )


def num_engine_parameters(architecture: Architecture, tensor: int) -> int:
    """Return the parameters of one engine rank."""
    return sum(cut_size(name, shape, tensor) for name, shape in architecture.weight_shapes().items())


def cache_bytes_of_token(architecture: Architecture, tensor: int, element: int) -> int:
    """Return what one token takes of an engine rank's KV cache; ranks beyond the key heads hold copies."""
    heads = max(1, architecture.num_kv_heads // tensor)
    return 2 * architecture.num_layers * heads * architecture.head_dim * element


def engine_share(config: Config) -> float | None:
    """Return `sglang.mem_fraction_static`: what an engine takes of the memory it finds; None when it is not set."""
    return {name.replace("-", "_"): value for name, value in config.sglang.items()}.get("mem_fraction_static")


def ranks_on_fullest(config: Config, gpus: Gpus) -> tuple[int, int]:
    """Return how many ranks of engines, and of the reflection server, the fullest GPU of rank 0's node has."""
    tensor = config.rollout.tensor_parallel
    places = [place for place in engine_places(config.rollout.num_engines, gpus.num_nodes) if place.node == 0]
    engines = Counter(rank % gpus.count for rank in range(len(places) * tensor))
    evolution = config.evolution
    reflects_here = evolution.searches and evolution.reflection.backend == "self"
    first = len(places) * tensor
    reflection = Counter(rank % gpus.count for rank in range(first, first + tensor * reflects_here))
    # Of two with equally many, the one whose server keeps its memory while the trainer trains.
    fullest = max(range(gpus.count), key=lambda gpu: (engines[gpu] + reflection[gpu], reflection[gpu]))
    return engines[fullest], reflection[fullest]
