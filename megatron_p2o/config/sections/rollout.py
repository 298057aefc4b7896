"""Settings of the rollouts: how they are sampled, and how their answers are checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_p2o.config.ranges import NonNegativeInt, NumRanks, PositiveFloat, PositiveInt, Range, Seconds
from megatron_p2o.config.shape import IS_SHORTHAND


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Sampling, and the SGLang servers that do it."""

    group_size: Annotated[int, Range(at_least=2, at_most=4096, reason="one rollout has no baseline")] = 6
    """Rollouts per problem and step: G, the paper's 6."""
    temperature: Annotated[float, Range(at_least=1e-6, reason="greedy rollouts are all alike")] = 0.6
    """Sampling temperature of the training rollouts (the paper's)."""
    top_p: Annotated[float, Range(at_least=1, at_most=1, reason="SGLang reports log-probs as before the cut")] = 1.0
    """Nucleus sampling of training and evolution rollouts; must be 1. SGLang reports log-probs of the whole
    distribution, not of the part that top-p keeps and the tokens are drawn from: training would use wrong ratios."""
    max_new_tokens: PositiveInt = 12288
    """Longest completion in tokens (the paper's). A longer one is cut off and counts as truncated."""
    num_engines: NumRanks = 1
    """SGLang servers of the run, spread evenly over its nodes."""
    tensor_parallel: NumRanks = 1
    """GPUs of one SGLang server (its tensor parallelism)."""
    max_running_requests: PositiveInt = 256
    """Requests that an engine decodes at once; the broker keeps no more in flight."""
    max_total_tokens: PositiveInt | None = None
    """Size of an engine's KV cache in tokens. None: on GPUs what trainer and weights leave, unless
    `sglang.mem_fraction_static` is set; 65,536 without CUDA."""
    startup_timeout_s: Seconds = 1800.0
    """Longest start of an engine in seconds. The first start on a GPU compiles kernels and reads the model, which takes
    many minutes."""
    request_timeout_s: Seconds = 3600.0
    """Longest time in seconds that an engine may work on one completion, which then counts as aborted. The clock stands
    still while the engines do not sample: while their weights are refreshed or their memory is lent."""
    stall_timeout_s: Seconds = 300.0
    """Seconds after which an engine counts as hung: it has requests and samples no token, or it does not answer a call
    of a refresh. It is killed and replaced. Waiting in an engine's queue does not count."""
    max_restarts: NonNegativeInt = 3
    """Number of times that an engine which died or hung is started again between two refreshes. After that it is given
    up."""
    refresh_bucket_mib: PositiveInt = 512
    """Size in MiB of the buckets in which the engines receive new weights. One bucket is loaded while the next is
    filled."""
    weight_transfer: Literal["auto", "device", "host"] = "auto"
    """Path of new weights to the engines. `device`: every trainer rank leaves them on its GPU, two buckets at a time,
    for the engine rank on the same GPU (CUDA IPC; memory files without CUDA). `host`: rank 0 leaves them in host
    memory, one copy per node. `auto`: `device` on GPUs if every engine rank has a trainer rank on its GPU and can open
    its memory, else `host`."""
    verify_every: NonNegativeInt = 1
    """Compare the engines' weights with the trainer's (by checksum) at the first refresh and at every N-th after it. 0
    turns this off. A restarted engine is always compared, unless this is 0."""
    release_memory: bool | None = None
    """Whether the engines lend the memory of their weights and KV cache to the trainer from the end of sampling to the
    refresh; evolution waits meanwhile. None: true on GPUs where torch_memory_saver is installed. Without CUDA there is
    nothing to lend."""
    deterministic: bool | None = None
    """Whether each rollout is sampled from a seed of its own (run, step, problem, rollout), with arithmetic that
    does not depend on an engine's other requests: the same run gives the same numbers. None: true without CUDA,
    where it costs little, and false on GPUs, where it is SGLang's deterministic inference with slower
    batch-invariant kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedFunctionConfig:
    """One of several reward functions. A file may write the weight alone, `math: 0.8`, for `math: {weight: ...}`."""

    weight: PositiveFloat = field(metadata=IS_SHORTHAND)
    """Weight of its reward, over the sum of all weights."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of this function, as `grading.arguments`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradingConfig:
    """Rewards of the answers."""

    function: str = "math"
    """Reward function: the short name of a built-in or of an installed package, `package.module:callable`, or
    `path/to/file.py:callable`. `math` compares the last boxed answer with the gold one; docs/extending.md shows how to
    write another."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the reward function. One whose name ends in `_env` names an environment variable, which then
    reaches the function even if it holds a secret."""
    functions: Mapping[str, WeightedFunctionConfig] = field(default_factory=dict)
    """Several reward functions instead of `grading.function`, by name. The reward is their weighted mean, and undecided
    where one of them is."""
    num_workers: Annotated[int, Range(at_least=1, at_most=1024, reason="each is a process of one machine")] | None = (
        None
    )
    """Processes that compare answers by algebra, or call the reward functions. None: half of the cores that rank 0 may
    use, from 2 to 64; the others are for the ranks and engines of its node."""
    deadline_s: Seconds = 1.0
    """Processor time for one answer in seconds; a busy machine does not use it up. A worker that takes more is killed
    and the answer is undecided. Most answers take a thousandth of a second, those that need math-verify up to 0.3 s."""
    timeout_s: Seconds = 600.0
    """Longest wall-clock time for one answer in seconds, for reward functions that wait for something; then the answer
    is undecided."""
    memory_limit_mib: Annotated[int, Range(at_least=256, at_most=2**24, reason="math-verify alone takes about 70")] = (
        2048
    )
    """Address space of one worker, at most, in MiB."""

    @property
    def function_names(self) -> tuple[str, ...]:
        """The reward functions, as settings name them."""
        return tuple(self.functions) or (self.function,)
