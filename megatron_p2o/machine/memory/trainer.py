"""The GPU memory of the trainer's largest rank, from the settings and the architecture.

Exact for parameters, gradients and optimizer state, a lower bound and an estimate for activations.
"""

import math
from dataclasses import dataclass
from typing import assert_never

from megatron_p2o.config.tree import Config, OptimizerConfig
from megatron_p2o.policy.model.architecture import Architecture, element_bytes
from megatron_p2o.rollout.refresh.outlet import NUM_SPANS, bucket_capacity

MOMENTS_BYTES = 8
"""Bytes of a weight's two moments in AdamW, float32."""

ROOTS_BYTES = 4
"""Bytes of a second moment's square root, float32. Transformer Engine's Adam
keeps none, but the plan covers both."""

OTHER_OPTIMIZERS = ("use_precision_aware_optimizer", "optimizer_cpu_offload")
"""Fields of `megatron` that change how large the optimizer's state is; with one of them none is counted."""

LAYER = "model.layers.0."

PARTS = ("parameters", "gradients", "masters", "moments")
"""What the trainer holds between two passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerMemory:
    """What the largest rank of the trainer holds, in bytes."""

    parameters: int
    gradients: int
    """Gradients, in Megatron's buffers."""
    masters: int
    """Float32 copies of bfloat16 parameters."""
    moments: int
    """Moments of the optimizer, allocated in the first step."""
    activations: int
    """The layers' inputs for one micro-batch: at least so much is added in a forward pass."""
    likely_activations: int
    """An estimate: what torch keeps of every layer where nothing is fused, and of one where they are recomputed; or, if
    it is more, what the optimizer's step takes for a time."""
    lent: frozenset[str]
    """Names of the parts that are not there while engines sample, by `optimizer.lend`."""

    @property
    def resident(self) -> int:
        """Memory in an update, without activations."""
        return self.parameters + self.gradients + self.masters + self.moments

    @property
    def at_start(self) -> int:
        """Memory when the engines start, where Adam has made no moments yet."""
        return self.while_sampling - self.kept("moments")

    @property
    def while_sampling(self) -> int:
        """Memory while engines sample, after the first step."""
        return sum(self.kept(name) for name in PARTS)

    def kept(self, name: str) -> int:
        """Return what of a part stays while engines sample."""
        return 0 if name in self.lent else int(getattr(self, name))


def trainer_memory(config: Config, architecture: Architecture) -> TrainerMemory:
    """Return what the trainer's largest rank holds."""
    parallel, element = config.parallel, element_bytes(config.model.dtype)
    parameters = num_trainer_parameters(config, architecture)
    num_shares = parallel.num_replicas * parallel.context if parallel.distributed_optimizer else 1
    owned = 0 if any(config.megatron.get(name) for name in OTHER_OPTIMIZERS) else math.ceil(parameters / num_shares)
    reduces_in_float32 = config.megatron.get("grad_reduce_in_fp32", True)
    return TrainerMemory(
        parameters=element * parameters,
        gradients=(4 if reduces_in_float32 else element) * parameters,
        masters=4 * owned if element < 4 else 0,
        moments=MOMENTS_BYTES * owned,
        activations=element * stored_inputs(config, architecture),
        # torch's AdamW takes the square roots of all second moments at a time, when the activations are gone.
        likely_activations=max(element * likely_activations(config, architecture), ROOTS_BYTES * owned),
        lent=lent_parts(config.optimizer),
    )


def lent_parts(optimizer: OptimizerConfig) -> frozenset[str]:
    """Return the names of `PARTS` that `optimizer.lend` names."""
    lends = {
        "gradients": optimizer.lends_gradients,
        "masters": optimizer.lends_state,
        "moments": optimizer.lends_state,
        "parameters": optimizer.lends_parameters,
    }
    return frozenset(name for name, is_lent in lends.items() if is_lent)


def num_trainer_parameters(config: Config, architecture: Architecture) -> int:
    """Return the parameters of the rank that has the most: on the first or the last pipeline stage."""
    parallel, shapes = config.parallel, architecture.weight_shapes()
    layer = sum(cut_size(name, shape, parallel.tensor) for name, shape in shapes.items() if name.startswith(LAYER))
    layers = architecture.num_layers // parallel.pipeline * layer
    rows = math.ceil(architecture.vocab_size / parallel.tensor)
    embedding, norm = rows * architecture.hidden_size, architecture.hidden_size
    if parallel.pipeline > 1:
        return layers + embedding + norm  # the last stage: a head, or its copy of the embedding
    return layers + embedding * (1 if architecture.ties_embeddings else 2) + norm


def stored_inputs(config: Config, architecture: Architecture) -> int:
    """Return the elements of the layers' inputs that one micro-batch leaves on a rank, recomputed layers or not."""
    parallel = config.parallel
    # "uniform" stores one input of so many layers; "block" recomputes so many layers of a stage, each by itself.
    num_together = 1 if keeps_a_block(config) else config.megatron.get("recompute_num_layers", 1)
    num_stored = math.ceil(architecture.num_layers / (parallel.pipeline * num_together))
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
        num_recomputed = config.megatron.get("recompute_num_layers", 1)
        inputs = parallel.pipeline * stored_inputs(config, architecture)
        if keeps_a_block(config):
            num_kept = max(0, math.ceil(architecture.num_layers / parallel.pipeline) - num_recomputed)
            return inputs + (parallel.pipeline * num_kept + 1) * layer
        return inputs + num_recomputed * layer
    return architecture.num_layers * layer


def recomputed_share(config: Config, architecture: Architecture) -> float:
    """Return the share of the layers that the backward pass computes again."""
    if config.megatron.get("recompute_granularity") != "full":
        return 0.0
    if not keeps_a_block(config):
        return 1.0
    of_stage = math.ceil(architecture.num_layers / config.parallel.pipeline)
    return min(1.0, config.megatron.get("recompute_num_layers", 1) / of_stage)


def keeps_a_block(config: Config) -> bool:
    """Whether a stage recomputes its first layers only and keeps what the others need."""
    return config.megatron.get("recompute_method") == "block"


def bucket_bytes(config: Config, architecture: Architecture) -> int:
    """Return what a trainer rank keeps on its GPU for handing weights over; see `rollout.weight_transfer`."""
    match config.rollout.weight_transfer:
        case "host":
            return 0
        case "auto" | "device":
            largest = architecture.largest_weight_bytes(config.model.dtype)
            return NUM_SPANS * bucket_capacity(config, largest)
        case _:
            assert_never(config.rollout.weight_transfer)


def cut_size(name: str, shape: tuple[int, ...], tensor: int) -> int:
    """Return a tensor-parallel rank's number of elements: norms and routers are whole on every rank."""
    is_whole = name.endswith(("norm.weight", "mlp.gate.weight"))
    size = 1
    for length in shape:
        size *= length
    return size if is_whole else math.ceil(size / tensor)
