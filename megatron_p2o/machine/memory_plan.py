"""What trainer and engines need of a GPU that they share, computed from the settings before anything is started.

Exact for parameters, gradients, optimizer state and weights, a lower bound for activations: what is refused could not
have run. An estimate of the activations is only warned of. Of the rest a fixed part is kept free, and where no setting
says how large the KV cache is, it gets what is left. An engine sizes its cache before the trainer's first step has made
the optimizer's moments: left to itself it would take their place, and the run would end at its first refresh.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.layout import layout_line, with_layout
from megatron_p2o.machine.nodes import nodes_of_slurm
from megatron_p2o.policy.model.architecture import Architecture, element_bytes, read_architecture
from megatron_p2o.rollout.refresh.outlet import NUM_SPANS, bucket_capacity
from megatron_p2o.rollout.servers.server_arguments import does_release_memory, engine_places, longest_tokens
from megatron_p2o.terminal import say

logger = logging.getLogger(__name__)

GIB = 2**30
RESERVE_BYTES = 8 * GIB
"""Kept free for what neither process counts, an allowance: two CUDA contexts with their kernels (1.5 GiB), the
trainer's NCCL buffers and workspaces (2), an engine's CUDA graphs (1), its activations of 8,192 prompt tokens and
probabilities of 256 samples over the vocabulary (2), slack of the allocators."""

MOMENTS_BYTES = 8
"""Of a weight's two averages in AdamW, float32."""

ROOTS_BYTES = 4
"""Of a second moment's square root, float32. Transformer Engine's Adam keeps none, but what is planned serves both."""

OTHER_OPTIMIZERS = ("use_precision_aware_optimizer", "optimizer_cpu_offload")
"""Fields of `megatron` that change how large the optimizer's state is; with one of them none is counted."""

LAYER = "model.layers.0."


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """What a node of the run has."""

    count: int
    num_bytes: int
    """Of each."""
    num_nodes: int
    """Of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerMemory:
    """What the largest rank of the trainer holds, in bytes."""

    parameters: int
    gradients: int
    """In Megatron's buffers, which stay."""
    masters: int
    """Float32 copies of bfloat16 parameters."""
    moments: int
    """Of the optimizer; they come with the first step."""
    activations: int
    """The layers' inputs for one micro-batch: at least so much is added in a forward pass."""
    likely_activations: int
    """An estimate: what torch keeps of every layer where nothing is fused, and of one where they are recomputed; or, if
    it is more, what the optimizer's step takes for a time."""

    @property
    def at_start(self) -> int:
        return self.parameters + self.gradients + self.masters

    @property
    def resident(self) -> int:
        """After the first step, between steps."""
        return self.at_start + self.moments


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Who takes how much of the fullest GPU."""

    gpu_bytes: int
    trainer: TrainerMemory
    num_lending: int
    """Ranks of engines on this GPU whose memory is the trainer's while it trains."""
    num_staying: int
    """Ranks of servers that keep theirs."""
    weights: int
    """Of one engine rank."""
    cache: int
    """KV cache of one engine rank."""
    cache_tokens: int
    """That fit in it."""
    buckets: int
    """In which new weights lie for the engines on this GPU."""

    @property
    def phases(self) -> Mapping[str, Mapping[str, int]]:
        """What is held in each phase of a step, by name."""
        trainer = {
            "parameters": self.trainer.parameters,
            "gradients": self.trainer.gradients,
            "optimizer": self.trainer.masters + self.trainer.moments,
            "weight buckets": self.buckets,
        }

        def engines(count: int) -> dict[str, int]:
            return {"engine weights": count * self.weights, "KV cache": count * self.cache}

        return {
            "sampling": {**trainer, **engines(self.num_lending + self.num_staying)},
            "training": {
                **trainer,
                "activations at least": self.trainer.activations,
                **engines(self.num_staying),
            },
        }

    def describe(self) -> str:
        """Return the phases in GiB, one line each."""
        return "\n".join(f"memory of a GPU, {phase}: {self._sum(parts)}" for phase, parts in self.phases.items())

    def warning(self) -> str:
        """Return what may run out of memory by estimate; "" when nothing does."""
        parts = {
            **self.phases["training"],
            "activations at least": 0,
            "activations about": self.trainer.likely_activations,
        }
        if sum(parts.values()) <= self.gpu_bytes:
            return ""
        return (
            f"training may run out of memory: {self._sum(parts)}. Remedies: recompute activations "
            "(megatron.recompute_granularity, docs/parallel.md), lower optimizer.micro_batch_tokens, raise "
            "parallel.context or parallel.tensor"
        )

    def check(self, config: Config) -> None:
        """Raise `ValueError` with all numbers and the settings to change when a phase cannot fit."""
        for phase, parts in self.phases.items():
            if sum(parts.values()) > self.gpu_bytes:
                raise ValueError(f"{phase} does not fit a GPU: {self._sum(parts)}. {self._remedies(config, phase)}")
        needed = longest_tokens(config)
        if self.cache_tokens < needed:
            raise ValueError(
                f"the KV cache of an engine rank would hold {max(0, self.cache_tokens)} tokens, fewer than a prompt "
                f"and its response may have (data.max_prompt_tokens + rollout.max_new_tokens = {needed}): "
                f"{self._sum(self.phases['sampling'])}, {RESERVE_BYTES / GIB:.0f} of them kept free. "
                f"{self._remedies(config, 'sampling')}"
            )

    def _sum(self, parts: Mapping[str, int]) -> str:
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size > 0)
        return f"{listed}; together {sum(parts.values()) / GIB:.1f} of {self.gpu_bytes / GIB:.1f} GiB"

    def _remedies(self, config: Config, phase: str) -> str:
        parallel = config.parallel
        given = {
            "set parallel.distributed_optimizer": parallel.num_replicas * parallel.context > 1
            and not parallel.distributed_optimizer,
            "raise parallel.tensor or parallel.pipeline": True,
            "lower optimizer.micro_batch_tokens": phase == "training",
            "lower sglang.mem_fraction_static": engine_share(config) is not None,
            "raise rollout.tensor_parallel": self.num_lending > 0,
            "have the engines lend their memory (rollout.release_memory, torch_memory_saver)": phase == "training"
            and self.num_staying > 0,
        }
        return "Remedies: " + "; ".join(remedy for remedy, applies in given.items() if applies)


def with_planned_cache(config: Config) -> Config:
    """Return the settings with the size of the KV cache in them, for the engines of this machine, and print the plan.

    Without a GPU returns `config`.

    Raises:
        ValueError: trainer and engines do not fit this machine's GPUs.
    """
    if not torch.cuda.is_available():
        return config
    plan = checked_plan(config, gpus_here(int(os.environ.get("GROUP_WORLD_SIZE", "1"))))
    if os.environ.get("RANK", "0") == "0":
        say(plan.describe())
        if plan.warning():
            logger.warning(plan.warning())
    if engine_share(config) is not None:
        return config
    return replace(config, rollout=replace(config.rollout, max_total_tokens=plan.cache_tokens))


def planned_memory(config: Config, gpus: Gpus | None = None) -> list[str]:
    """Return who takes how much of a GPU, and what may go wrong, one line each.

    `gpus`: of machines that need not exist, with everything installed; None: of the node this is, no lines without any.

    Raises:
        ValueError: trainer and engines do not fit them; the message has the numbers and the settings to change.
    """
    given = config.parallel
    if gpus is not None:
        config = with_layout(config, gpus.num_nodes, gpus.count)
        plan = checked_plan(config, gpus, has_saver=True)
    elif torch.cuda.is_available():
        nodes = nodes_of_slurm(os.environ)
        gpus = gpus_here(nodes.count if nodes else num_nodes_for(config, torch.cuda.device_count()))
        config = with_layout(config, gpus.num_nodes, gpus.count)
        plan = checked_plan(config, gpus)
    else:
        return []
    lending = "engines lend theirs to the trainer" if plan.num_lending else "engines keep theirs"
    head = f"memory of {gpus.num_nodes} x {gpus.count} GPUs of {gpus.num_bytes / GIB:.1f} GiB, {lending}"
    layout = [layout_line(given, config.parallel, gpus.num_nodes, gpus.count)] if given != config.parallel else []
    return [*layout, head, *plan.describe().splitlines(), *filter(None, [plan.warning()])]


def num_nodes_for(config: Config, num_gpus: int) -> int:
    """Return how many nodes of `num_gpus` a run takes with a trainer's rank on each GPU.

    Where the number of replicas is derived, the engines say how many GPUs there are to be.
    """
    engine_ranks = config.rollout.num_engines * config.rollout.tensor_parallel if config.parallel.data is None else 0
    return -(-max(config.parallel.world_size, engine_ranks) // num_gpus)


def gpus_here(num_nodes: int) -> Gpus:
    """Return the GPUs of this node of a run of `num_nodes`."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_bytes = torch.cuda.get_device_properties(local_rank).total_memory
    return Gpus(count=torch.cuda.device_count(), num_bytes=num_bytes, num_nodes=num_nodes)


def checked_plan(config: Config, gpus: Gpus, *, has_saver: bool | None = None) -> MemoryPlan:
    """Return the plan, or raise `ValueError` when it does not fit; `has_saver`: see `does_release_memory`."""
    releases = does_release_memory(config, gpus.count, has_saver=has_saver)
    plan = memory_plan(config, read_architecture(Path(config.model.path)), gpus, releases_memory=releases)
    plan.check(config)
    return plan


def memory_plan(config: Config, architecture: Architecture, gpus: Gpus, *, releases_memory: bool) -> MemoryPlan:
    """Return who takes how much of the GPU that has the most to hold."""
    trainer = trainer_memory(config, architecture)
    tensor = config.rollout.tensor_parallel
    element = element_bytes(config.model.dtype)
    weights = element * num_engine_parameters(architecture, tensor)
    token = cache_bytes_of_token(architecture, tensor, element)
    num_engine_ranks, num_reflection_ranks = ranks_on_fullest(config, gpus)
    num_ranks = num_engine_ranks + num_reflection_ranks
    num_staying = num_reflection_ranks if releases_memory else num_ranks
    buckets = bucket_bytes(config, architecture)
    available = gpus.num_bytes - RESERVE_BYTES - buckets
    share = engine_share(config)
    if share is not None:
        free = available - trainer.at_start
        # Each rank takes its share, weights included, of what those before it have left.
        cache = int(free * (1 - (1 - share) ** num_ranks) / num_ranks) - weights
    else:
        sampling = trainer.resident + num_ranks * weights
        training = trainer.resident + trainer.likely_activations + num_staying * weights
        cache = (available - sampling) // num_ranks
        if num_staying:
            # An estimate may leave too little, but never less than a run needs.
            cache = min(cache, max((available - training) // num_staying, longest_tokens(config) * token))
        cache = max(0, cache // token * token)
    if config.rollout.max_total_tokens is not None:
        cache = min(cache, config.rollout.max_total_tokens * token)
    return MemoryPlan(
        gpu_bytes=gpus.num_bytes,
        trainer=trainer,
        num_lending=num_ranks - num_staying,
        num_staying=num_staying,
        weights=weights,
        cache=cache,
        cache_tokens=cache // token,
        buckets=buckets,
    )


def trainer_memory(config: Config, architecture: Architecture) -> TrainerMemory:
    """Return what the trainer's largest rank holds."""
    parallel, element = config.parallel, element_bytes(config.model.dtype)
    parameters = num_trainer_parameters(config, architecture)
    num_shares = parallel.num_replicas * parallel.context if parallel.distributed_optimizer else 1
    owned = 0 if any(config.megatron.get(name) for name in OTHER_OPTIMIZERS) else -(-parameters // num_shares)
    reduces_in_float32 = config.megatron.get("grad_reduce_in_fp32", True)
    return TrainerMemory(
        parameters=element * parameters,
        gradients=(4 if reduces_in_float32 else element) * parameters,
        masters=4 * owned if element < 4 else 0,
        moments=MOMENTS_BYTES * owned,
        activations=element * stored_inputs(config, architecture),
        # torch's AdamW takes the square roots of all second moments at a time, when the activations are gone.
        likely_activations=max(element * likely_activations(config, architecture), ROOTS_BYTES * owned),
    )


def bucket_bytes(config: Config, architecture: Architecture) -> int:
    """Return what a trainer rank keeps on its GPU for handing weights over; see `rollout.weight_transfer`."""
    if config.rollout.weight_transfer == "host":
        return 0
    largest = architecture.largest_weight_bytes(config.model.dtype)
    return NUM_SPANS * bucket_capacity(config, largest)


def stored_inputs(config: Config, architecture: Architecture) -> int:
    """Return the elements of the layers' inputs that one micro-batch leaves on a rank, recomputed layers or not."""
    parallel = config.parallel
    num_stored = -(-architecture.num_layers // parallel.pipeline // config.megatron.get("recompute_num_layers", 1))
    tokens = (
        config.optimizer.micro_batch_tokens
        // parallel.context
        // (parallel.tensor if parallel.is_sequence_parallel else 1)
    )
    return tokens * architecture.hidden_size * num_stored


def likely_activations(config: Config, architecture: Architecture) -> int:
    """Return the elements kept for the backward pass where nothing is fused, as counted on the CPU in float32.

    The first pipeline stage holds as many micro-batches as there are stages.
    """
    parallel, tokens = config.parallel, config.optimizer.micro_batch_tokens // config.parallel.context
    query, key = architecture.num_heads * architecture.head_dim, architecture.num_kv_heads * architecture.head_dim
    inner = architecture.intermediate_size
    if architecture.experts is not None:
        inner = architecture.experts.num_experts_per_token * architecture.experts.intermediate_size
    whole = 6 * architecture.hidden_size // (parallel.tensor if parallel.is_sequence_parallel else 1)
    layer = tokens * (whole + (6 * query + 5 * key + 5 * inner) // parallel.tensor)
    if config.megatron.get("recompute_granularity") == "full":
        num_at_once = config.megatron.get("recompute_num_layers", 1)
        return parallel.pipeline * stored_inputs(config, architecture) + num_at_once * layer
    return architecture.num_layers * layer


def engine_share(config: Config) -> float | None:
    """Return `sglang.mem_fraction_static`: what an engine takes of the memory it finds; None when it is not set."""
    return {name.replace("-", "_"): value for name, value in config.sglang.items()}.get("mem_fraction_static")


def num_trainer_parameters(config: Config, architecture: Architecture) -> int:
    """Return the parameters of the rank that has the most: on the first or the last pipeline stage."""
    parallel, shapes = config.parallel, architecture.weight_shapes()
    layer = sum(cut_size(name, shape, parallel.tensor) for name, shape in shapes.items() if name.startswith(LAYER))
    layers = architecture.num_layers // parallel.pipeline * layer
    rows = -(-architecture.vocab_size // parallel.tensor)
    embedding, norm = rows * architecture.hidden_size, architecture.hidden_size
    if parallel.pipeline > 1:
        return layers + embedding + norm  # the last stage: a head, or its copy of the embedding
    return layers + embedding * (1 if architecture.ties_embeddings else 2) + norm


def num_engine_parameters(architecture: Architecture, tensor: int) -> int:
    """Return the parameters of one engine rank."""
    return sum(cut_size(name, shape, tensor) for name, shape in architecture.weight_shapes().items())


def cut_size(name: str, shape: tuple[int, ...], tensor: int) -> int:
    """Return a tensor-parallel rank's number of elements: norms and routers are whole on every rank."""
    is_whole = name.endswith(("norm.weight", "mlp.gate.weight"))
    size = 1
    for length in shape:
        size *= length
    return size if is_whole else -(-size // tensor)


def cache_bytes_of_token(architecture: Architecture, tensor: int, element: int) -> int:
    """Return what one token takes of an engine rank's KV cache; ranks beyond the key heads hold copies."""
    heads = max(1, architecture.num_kv_heads // tensor)
    return 2 * architecture.num_layers * heads * architecture.head_dim * element


def ranks_on_fullest(config: Config, gpus: Gpus) -> tuple[int, int]:
    """Return how many ranks of engines, and of the reflection server, the fullest GPU of rank 0's node has."""
    tensor = config.rollout.tensor_parallel
    places = [place for place in engine_places(config.rollout.num_engines, gpus.num_nodes) if place.node == 0]
    engines = Counter(rank % gpus.count for rank in range(len(places) * tensor))
    evolution = config.evolution
    reflects_here = evolution.enabled and evolution.reflection.backend == "self"
    first = len(places) * tensor
    reflection = Counter(rank % gpus.count for rank in range(first, first + tensor * reflects_here))
    # Of two with equally many, the one whose server keeps its memory while the trainer trains.
    fullest = max(range(gpus.count), key=lambda gpu: (engines[gpu] + reflection[gpu], reflection[gpu]))
    return engines[fullest], reflection[fullest]
