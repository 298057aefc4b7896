"""Settings of the policy and how it is trained: model, layout of the ranks, LM head, optimizer."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from megatron_p2o.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    NumRanks,
    PositiveFloat,
    PositiveInt,
    Range,
    Seconds,
)

LENT = {"none": 0, "gradients": 1, "optimizer": 2, "all": 3}
"""Values of `optimizer.lend`: each lends all that those below it lend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The initial policy."""

    path: str
    """Hugging Face directory of the initial policy: config.json, safetensors, tokenizer with a chat template."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of trainer and engines. Gradients and optimizer state are float32."""
    layer_backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Library whose layers the trainer is built of: Transformer Engine, or megatron-core's own (`local`) with
    flash-attn or torch attention. `auto` takes the first on a GPU where it can be imported; `p2o doctor` and the run
    say which."""
    enable_thinking: bool = False
    """Value of Qwen3's `enable_thinking` switch in the chat template. Templates without this switch ignore it."""
    template_date: str | None = None
    """Date that a chat template writes as today's (Llama 3.1's does), as "2026-01-31": the same in every prompt of a
    run. None: the day the run was first started, which its config.yaml records and a resumed run keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the trainer's ranks divide the work; their product is the number of processes."""

    tensor: NumRanks = 1
    """Ranks that share every layer's matrices (tensor parallelism). More than 1 for a model whose layers do not fit one
    GPU."""
    pipeline: NumRanks = 1
    """Ranks that share the layers, one consecutive part each (pipeline parallelism)."""
    virtual_pipeline: PositiveInt = 1
    """Parts of the model on each pipeline stage (the interleaved schedule). More than 1 needs `parallel.pipeline` > 1
    and leaves the pipeline idle less."""
    context: NumRanks = 1
    """Ranks that share the tokens of every sequence (context parallelism), for sequences too long for one GPU."""
    data: NumRanks | None = None
    """Replicas of the model, each on its own samples (data parallelism). None: as many as fill the GPUs of all nodes of
    the launch, or without GPUs one rank on each node; the run's config.yaml holds the number."""
    sequence: bool | None = None
    """Whether tensor-parallel ranks also share the tokens of norms and dropout (sequence parallelism), which saves
    activation memory. Needs `parallel.tensor` > 1. None: true where `parallel.tensor` is more than 1."""
    distributed_optimizer: bool = False
    """Whether data-parallel ranks share the optimizer state instead of a copy on each. A run cannot change it on
    resume."""
    timeout_s: Seconds = 1800.0
    """Longest wait in a collective, in seconds, before the run ends with an error."""
    command_timeout_s: Seconds = 86400.0
    """Longest wait of the other ranks for rank 0's next command, in seconds. Rank 0 may sample, evaluate and evolve
    prompts for hours between two commands. If rank 0 dies, the other ranks notice at once, whatever this limit."""

    @property
    def num_model_ranks(self) -> int:
        """Ranks of one replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def num_replicas(self) -> int:
        """`data`; 1 where `for_processes` has not derived it."""
        return self.data or 1

    @property
    def is_sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def world_size(self) -> int:
        return self.num_model_ranks * self.num_replicas

    def for_processes(self, num_processes: int) -> "ParallelConfig":
        """Return the layout for a number of processes: `data` and `sequence` derived where they are None.

        Raises:
            ValueError: they are no whole number of replicas.
        """
        if self.data is None and num_processes % self.num_model_ranks:
            raise ValueError(
                f"parallel.tensor={self.tensor} x parallel.pipeline={self.pipeline} x parallel.context={self.context} "
                f"= {self.num_model_ranks} ranks of one replica must divide the {num_processes} processes of the "
                "launch: change one of them, or set parallel.data and leave GPUs idle"
            )
        data = num_processes // self.num_model_ranks if self.data is None else self.data
        return replace(self, data=data, sequence=self.is_sequence_parallel)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """How a GPU computes the LM head and the loss (`kernels/README.md`); a CPU has one way."""

    kernel: Literal["warp_specialized", "plain", "torch"] = "warp_specialized"
    """Implementation of the LM head and the loss. `warp_specialized`: the Triton kernel. `plain`: the same kernel
    without warp specialization, to be tried where the default fails, hangs or gives other log-probs than the engine.
    `torch`: no Triton; slower, and takes float32 models too."""
    weight_grad: Literal["fast", "precise"] = "fast"
    """Accuracy of the LM head's weight gradient. `precise` costs one more matrix product beside four and is within 1e-3
    for every policy. `fast` is as close where the sampled tokens have some probability, and within 1.3e-3 where another
    token has all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: NonNegativeFloat = 1e-6
    """Learning rate of AdamW (the paper's). 0 freezes the policy: templates evolve, and no weight ever moves."""
    beta1: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """Decay of AdamW's running mean of gradients."""
    beta2: Annotated[float, Range(at_least=0, below=1)] = 0.999
    """Decay of AdamW's running mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Constant that AdamW adds to the denominator of its step."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (the paper's); norms have none."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up. Step k of W, from 0, takes `lr` (k + 1) / (W + 1)."""
    warmup_share: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Warm-up as a share of the run's optimizer steps, rounded up; instead of `optimizer.warmup_steps`."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate from the end of warm-up to that of the run, where it is `optimizer.min_lr`: a
    straight line, or half a cosine (arXiv:1608.03983). The run's length follows from the problems and `schedule`; with
    dynamic sampling it may end before."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay."""
    clip_grad: PositiveFloat = 1.0
    """Largest global norm of the gradient (the paper's); a larger gradient is scaled down to it."""
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens of one forward pass on one rank. More need more activation memory."""
    lend: Literal["none", "gradients", "optimizer", "all"] = "gradients"
    """What the trainer's GPU memory lacks while engines sample, so that the KV cache can have it. `gradients`: the
    gradient buffers, which every update fills anew. `optimizer`: also the float32 parameters and Adam's moments, which
    lie in pinned host memory meanwhile. `all`: also the weights. Each step then copies that much to the host, while the
    weights are handed over, and back, while the next update computes. No result depends on it."""

    @property
    def lends_gradients(self) -> bool:
        return self._lends("gradients")

    @property
    def lends_state(self) -> bool:
        return self._lends("optimizer")

    @property
    def lends_parameters(self) -> bool:
        return self._lends("all")

    def _lends(self, part: str) -> bool:
        return LENT[self.lend] >= LENT[part]
