"""Plans the GPU memory that trainer and engines share, from the settings, before anything is started.

A plan that is refused could not have run. An estimate of the activations only causes a warning. A fixed reserve stays
free. Unless a setting gives its size, the KV cache gets the rest. An engine that chose its own size would do so before
the trainer's first step has allocated the optimizer's moments. It would take their place, and the run would end at its
first refresh.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.memory.engine import EngineMemory, Gpus, engine_memory, engine_share, ranks_on_fullest
from megatron_p2o.machine.memory.trainer import TrainerMemory, bucket_bytes, trainer_memory
from megatron_p2o.policy.model.architecture import Architecture
from megatron_p2o.rollout.servers.server_arguments import longest_tokens

GIB = 2**30

RESERVE_BYTES = 8 * GIB
"""Kept free for what neither process counts, an allowance: two CUDA contexts with their kernels (1.5 GiB), the
trainer's NCCL buffers and workspaces (2), an engine's CUDA graphs (1), its activations of 8,192 prompt tokens and
probabilities of 256 samples over the vocabulary (2), slack of the allocators."""


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
    """Weights of one engine rank."""
    cache: int
    """KV cache of one engine rank."""
    cache_tokens: int
    """That fit in it."""
    buckets: int
    """Buckets with new weights for the engines on this GPU."""

    @property
    def phases(self) -> Mapping[str, Mapping[str, int]]:
        """What is held in each phase of a step, by name."""
        trainer, num_ranks = self.trainer, self.num_lending + self.num_staying
        sampling = {
            "parameters": trainer.kept("parameters"),
            "gradients": trainer.kept("gradients"),
            "optimizer": trainer.kept("masters") + trainer.kept("moments"),
            "weight buckets": self.buckets,
        }
        training = {
            "parameters": trainer.parameters,
            "gradients": trainer.gradients,
            "optimizer": trainer.masters + trainer.moments,
            "weight buckets": self.buckets,
        }

        def engines(num_weights: int, num_caches: int) -> dict[str, int]:
            return {"engine weights": num_weights * self.weights, "KV cache": num_caches * self.cache}

        phases = {
            "sampling": {**sampling, **engines(num_ranks, num_ranks)},
            "training": {
                **training,
                "activations at least": trainer.activations,
                **engines(self.num_staying, self.num_staying),
            },
        }
        if self.buckets and trainer.lent - {"gradients"}:
            # Engines load over the devices from the first bucket on; what is copied to the host goes after the last.
            gradients = trainer.kept("gradients")
            phases["refresh"] = {**training, "gradients": gradients, **engines(num_ranks, self.num_staying)}
        return phases


def memory_plan(config: Config, architecture: Architecture, gpus: Gpus, *, releases_memory: bool) -> MemoryPlan:
    """Return the memory plan of the fullest GPU."""
    trainer, engine = trainer_memory(config, architecture), engine_memory(config, architecture)
    num_engine_ranks, num_reflection_ranks = ranks_on_fullest(config, gpus)
    num_ranks = num_engine_ranks + num_reflection_ranks
    num_staying = num_reflection_ranks if releases_memory else num_ranks
    buckets = bucket_bytes(config, architecture)
    available = gpus.num_bytes - RESERVE_BYTES - buckets
    share = engine_share(config)
    if share is None:
        cache = planned_cache(config, trainer, engine, available, num_ranks, num_staying)
    else:
        # Each rank takes its share, weights included, of what those before it have left.
        taken = (available - trainer.at_start) * (1 - (1 - share) ** num_ranks)
        cache = int(taken / num_ranks) - engine.weights
    if config.rollout.max_total_tokens is not None:
        cache = min(cache, config.rollout.max_total_tokens * engine.cache_of_token)
    return MemoryPlan(
        gpu_bytes=gpus.num_bytes,
        trainer=trainer,
        num_lending=num_ranks - num_staying,
        num_staying=num_staying,
        weights=engine.weights,
        cache=cache,
        cache_tokens=cache // engine.cache_of_token,
        buckets=buckets,
    )


def planned_cache(
    config: Config, trainer: TrainerMemory, engine: EngineMemory, available: int, num_ranks: int, num_staying: int
) -> int:
    """Return the bytes of one engine rank's KV cache, a whole number of tokens: the rest, unless a setting gives its
    share.

    `available`: bytes for trainer and engines. `num_staying`: of the `num_ranks` on the GPU, those that keep their
    memory while the trainer trains.
    """
    token = engine.cache_of_token
    cache = (available - trainer.while_sampling - num_ranks * engine.weights) // num_ranks
    if num_staying:
        training = trainer.resident + trainer.likely_activations + num_staying * engine.weights
        # An estimate may leave too little, but never less than a run needs.
        cache = min(cache, max((available - training) // num_staying, longest_tokens(config) * token))
    return max(0, cache // token * token)
