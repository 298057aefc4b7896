"""The settings of a run: one frozen tree. `config.read` reads it from YAML. A number's range stands in its type
(`config.ranges`); rules between settings are in `config.rules`. `docs/settings.md` is generated from this file.

Defaults are the paper's (arXiv:2603.21877, Qwen3-4B) except where `preset: reference` differs: those are ours, and
`REFERENCE_PRESET` lists the authors' value for each.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_p2o.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seconds,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str
    """Folder of the run below `run.directory`; reports and experiment trackers show it. A `-seed2` at its end marks one
    seed of an arm."""
    directory: str = "runs"
    """Folder that holds all runs, relative to the current directory. Every node must see it."""
    seed: Annotated[int, Range(at_least=0, at_most=2**31 - 1)] = 1
    """Seed of the problem order, the template draws, the engines' sampling and evolution."""
    readable_by: Literal["owner", "group", "all"] = "owner"
    """Who may read the run's files, which hold problems, completions and templates. The engines' logs begin with
    secrets and are the owner's in any case."""

    @property
    def folder(self) -> Path:
        """Of the run's files; it need not exist yet."""
        return Path(self.directory) / self.name

    @property
    def arm(self) -> str:
        """What reports compare, its runs differing by seed: the name, without `-seed2` at its end if that is `seed`."""
        marked = re.fullmatch(r"(.+?)[-_]seed[-_]?0*(\d+)", self.name)
        return marked[1] if marked and int(marked[2]) == self.seed else self.name


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

    tensor: PositiveInt = 1
    """Ranks that share every layer's matrices (tensor parallelism). More than 1 for a model whose layers do not fit one
    GPU."""
    pipeline: PositiveInt = 1
    """Ranks that share the layers, one consecutive part each (pipeline parallelism)."""
    virtual_pipeline: PositiveInt = 1
    """Parts of the model on each pipeline stage (the interleaved schedule). More than 1 needs `parallel.pipeline` > 1
    and leaves the pipeline idle less."""
    context: PositiveInt = 1
    """Ranks that share the tokens of every sequence (context parallelism), for sequences too long for one GPU."""
    data: PositiveInt = 1
    """Replicas of the model, each on its own samples (data parallelism)."""
    sequence: bool = False
    """Whether tensor-parallel ranks also share the tokens of norms and dropout (sequence parallelism), which saves
    activation memory. Needs `parallel.tensor` > 1."""
    distributed_optimizer: bool = False
    """Whether data-parallel ranks share the optimizer state instead of a copy on each. A run cannot change it on
    resume."""
    timeout_s: Seconds = 1800.0
    """Longest wait in a collective, in seconds, before the run ends with an error."""
    command_timeout_s: Seconds = 86400.0
    """Longest wait of the other ranks for rank 0's next command, in seconds. Rank 0 may sample, evaluate and evolve
    prompts for hours between two commands. If rank 0 dies, the other ranks notice at once, whatever this limit."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Problems and how they are asked."""

    train: str
    """JSONL or parquet file of the problems to train on."""
    evaluation: Mapping[str, str] = field(default_factory=dict)
    """File of problems of each evaluation set, by the set's name. All sets are evaluated plainly every
    `evaluation.every_steps` steps and at the end."""
    id_field: str = "id"
    """Column of a problem's identifier. A hash of the question serves where the rows have no such column."""
    question_field: str = "question"
    """Column of a problem's question."""
    answer_field: str = "answer"
    """Column of a problem's gold answer."""
    skip_bad_rows: bool = False
    """Whether to use the good rows and report the bad ones. False: a bad row ends the run."""
    question_format: str = (
        "Let's think step by step and output the final answer within \\boxed{{}}.\nQuestion: {question}"
    )
    """Text of the user message, in the syntax of `str.format`: `{question}` is the question, literal braces are
    doubled. The default is the paper's wording."""
    max_prompt_tokens: PositiveInt = 4096
    """Longest prompt in tokens (the paper's). A plain prompt that is longer is a bad row; a template that makes one
    longer is disqualified."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Sampling, and the SGLang servers that do it."""

    group_size: Annotated[int, Range(at_least=2, reason="a group of one has no baseline")] = 6
    """Rollouts per problem and step: G, the paper's 6."""
    temperature: Annotated[float, Range(at_least=1e-6, reason="greedy rollouts are all alike")] = 0.6
    """Sampling temperature of the training rollouts (the paper's)."""
    top_p: Annotated[float, Range(at_least=1, at_most=1, reason="SGLang reports log-probs as before the cut")] = 1.0
    """Nucleus sampling of training and evolution rollouts; must be 1. SGLang reports log-probs of the whole
    distribution, not of the part that top-p keeps and the tokens are drawn from: training would use wrong ratios."""
    max_new_tokens: PositiveInt = 12288
    """Longest completion in tokens (the paper's). A longer one is cut off and counts as truncated."""
    num_engines: PositiveInt = 1
    """SGLang servers of the run, spread evenly over its nodes."""
    tensor_parallel: PositiveInt = 1
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
class GradingConfig:
    """Answer checking."""

    num_workers: PositiveInt = 2
    """Processes that compare answers by algebra."""
    deadline_s: Seconds = 1.0
    """Processor time for one answer in seconds; a busy machine does not use it up. A worker that takes more is killed
    and the answer is undecided. Most answers take a thousandth of a second, those that need math-verify up to 0.3 s."""
    memory_limit_mib: Annotated[int, Range(at_least=256, reason="math-verify alone takes about 70")] = 2048
    """Address space of one worker, at most, in MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardConfig:
    """Which problems count as hard."""

    max_solved: NonNegativeInt = 1
    """Largest number of correct rollouts in the group of a hard problem (the paper's tau = 2, as a count)."""
    counted: Literal["plain", "all"] = "plain"
    """Rollouts of a templated group that decide whether its problem is hard. `plain`: the plain ones, at the rate
    `hard.max_solved / rollout.group_size`, which asks whether the skill is in the weights yet (the paper's Eq. 3).
    `all`: templated successes count too (the authors' code), so that a problem loses its templates as soon as they
    work."""
    min_problems: NonNegativeInt = 100
    """Fewest hard problems of an epoch for which prompts are evolved (the paper's). With fewer there is no round, and
    the next epoch asks every problem plainly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignmentConfig:
    """How templates are given to the rollouts of a hard problem."""

    num_plain: NonNegativeInt = 2
    """Rollouts of a templated group that ask plainly. They keep the plain behaviour on-policy and give the group
    baseline failures to compare with. The authors reserve none."""
    same_template_in_group: bool = False
    """Whether all templated rollouts of a group share one drawn template (the paper's ablation). False: each draws its
    own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageConfig:
    """Credit of a rollout against its siblings."""

    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Formula of a rollout's advantage from the rewards of its group. `grpo` divides the difference from the mean by
    the standard deviation, `dr_grpo` does not divide, `rloo` takes the mean of the other rollouts."""
    baseline: Literal["group", "plain_anchored"] = "group"
    """Rewards that a templated group is compared with. `group`: its own. `plain_anchored`: it is joined by as many
    virtual rollouts as it has, at the ledger's running estimate of the problem's plain success rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The token loss."""

    context: Literal["sampling", "replace", "importance", "ratio_mask"] = "ratio_mask"
    """Prompts of the loss: x is the plain prompt, c the prompt that was sampled with. `sampling`: old and current
    log-probs on c. `replace`: both on x, without correction. `importance`: old on c, current on x, so that the clip
    holds the true ratio. `ratio_mask`: both on x, weighted by the context ratio (the paper's production setting)."""
    ratio_low: Annotated[float, Range(above=0, at_most=1)] = 0.01
    """Smallest context ratio that `ratio_mask` keeps, inclusive (the paper's)."""
    ratio_high: Annotated[float, Range(at_least=1)] = 10.0
    """Largest context ratio that `ratio_mask` keeps, inclusive (the paper's)."""
    ratio_form: Literal["hard", "soft"] = "hard"
    """Weight of a token whose context ratio rho lies outside the band. `hard`: 0. `soft`: clip(rho) / rho."""
    clip_low: Annotated[float, Range(at_least=0, below=1)] = 0.2
    """PPO's lower clip: policy ratios below 1 minus this bound the loss (the paper's)."""
    clip_high: NonNegativeFloat = 0.2
    """PPO's upper clip: policy ratios above 1 plus this bound the loss (the paper's)."""
    dual_clip: Annotated[float, Range(above=1)] = 3.0
    """Bound on the loss of tokens with negative advantage, in units of -advantage (the paper's)."""
    denominator: Literal["all", "kept"] = "all"
    """Tokens that the loss is divided by. `all`: the response tokens of the mini-batch. `kept`: those of them with a
    non-zero weight and in a rollout with gradient."""
    normalization: Literal["global", "micro_batch"] = "global"
    """Batch over which the loss is a mean. `global`: the mini-batch. `micro_batch`: each micro-batch, as the authors;
    the result then depends on packing. For comparison only."""
    drop_zero_advantage: bool = True
    """Whether rollouts without gradient stay out of the forward pass, which saves time."""
    drop_failed_templated: bool = False
    """Whether failed templated rollouts get no gradient. They shape the baseline either way."""


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
class ScoringConfig:
    """Where log-probs come from."""

    recompute: bool = False
    """Whether the trainer computes the log-probs of the sampling context itself. False trusts the engine's and saves a
    forward pass."""
    importance_cap: Annotated[float, Range(at_least=1)] | None = None
    """Cap of the truncated importance weight min(pi_trainer / pi_engine, cap) of each token, under the prompt it was
    sampled with. Needs `scoring.recompute`. None: no weight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    """Learning rate of AdamW (the paper's)."""
    beta1: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """Decay of AdamW's running mean of gradients."""
    beta2: Annotated[float, Range(at_least=0, below=1)] = 0.999
    """Decay of AdamW's running mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Constant that AdamW adds to the denominator of its step."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay (the paper's); norms have none."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up; the learning rate is constant afterwards."""
    clip_grad: PositiveFloat = 1.0
    """Largest global norm of the gradient (the paper's); a larger gradient is scaled down to it."""
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens of one forward pass on one rank. More need more activation memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How many problems and how often."""

    problems_per_step: PositiveInt = 128
    """Problems that one rollout step asks (the paper's)."""
    problems_per_update: PositiveInt = 64
    """Problems in the mini-batch of one optimizer step (the paper's); must divide `schedule.problems_per_step`."""
    max_batches_per_step: PositiveInt = 1
    """Dynamic sampling (DAPO): a step samples up to this many batches until `schedule.problems_per_step` groups have a
    gradient. Groups without one cost rollouts but no training, so an epoch has fewer steps."""
    epochs: PositiveInt = 10
    """Passes over the training problems (the paper's)."""
    max_steps: PositiveInt | None = None
    """Rollout steps after which the run ends, even inside an epoch. None: all epochs."""
    save_every_steps: NonNegativeInt = 30
    """Rollout steps between two checkpoints. 0 saves at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept on disk, the newest included. One more is kept: the newest whose policy a later step has sampled
    and learnt from, because the last may have just diverged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionConfig:
    """Who writes new templates."""

    backend: Literal["openai", "self", "phrasebook"] = "self"
    """Writer of new templates. `openai`: any OpenAI-compatible endpoint (the paper's Teacher-Ref). `self`: the frozen
    initial policy on an SGLang server of its own (Self-Ref). `phrasebook`: recombines the phrases of a file, for
    machines without a language model."""
    base_url: str | None = None
    """Address of the `openai` backend, e.g. https://host/v1."""
    model: str | None = None
    """Model name that the `openai` backend is asked for."""
    api_key_env: str = "P2O_REFLECTION_API_KEY"
    """Environment variable that holds the key of the `openai` backend. The key itself is never in a file."""
    phrases: str | None = None
    """File of the `phrasebook` backend, one phrase per line."""
    temperature: NonNegativeFloat | None = 0.6
    """Sampling temperature of replies. None leaves it out of the request, for models that accept only their own."""
    max_tokens: PositiveInt | None = 2048
    """Longest reply in tokens, reasoning included; a reply that is cut off gives no template. None leaves it out of the
    request."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, e.g. `{max_completion_tokens: 8192, reasoning_effort: low}`, with `max_tokens`
    and `temperature` null for models that refuse these."""
    timeout_s: Seconds = 120.0
    """Longest wait for a reply in seconds."""
    max_retries: NonNegativeInt = 4
    """Retries of one call, with exponential back-off. If all fail, evolution pauses and says so."""


GEPA_BUDGETS = (
    *(("light", 6), ("medium", 12), ("heavy", 18)),
    *(("heavy_2", 36), ("heavy_3", 54), ("heavy_4", 72), ("heavy_16", 288)),
)
"""Names of budgets, and the candidates that each is meant to try. The last four are the authors'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvolutionConfig:
    """GEPA beside training."""

    enabled: bool = True
    """Whether templates are evolved and used. False is plain GRPO."""
    beside_training: bool = True
    """Whether a round runs in the slots that training leaves idle; its library is used from the next step after it
    ended. False waits for each round, as the authors do: slower, but a run can be repeated exactly."""
    max_version_gap: NonNegativeInt = 2
    """Largest number of training steps between the rollouts by which a template is preferred to its parent. Where it is
    larger, the older side is sampled again. It matters beside training only; otherwise the policy does not change
    during a round."""
    rules: Literal["asynchronous", "reference"] = "asynchronous"
    """Search rules of a round. `reference`: the authors' lock-step rules exactly. `asynchronous`: lineages advance on
    their own."""
    budget: Annotated[int, Range(at_least=1, names=GEPA_BUDGETS)] = 72
    """Candidates that a round is meant to try; GEPA's automatic budget makes a number of rollouts of it. A file may
    write the names of GEPA and of the authors. 72 (`heavy_4`) is the paper's: 11,040 rollouts at `dev_size` 300."""
    max_rollouts: PositiveInt | None = None
    """Evaluation rollouts of a round, instead of the number that `evolution.budget` gives. None: that number."""
    dev_size: PositiveInt = 300
    """Problems that score candidates (the paper's 300); the rest of the hard set gives feedback. Small hard sets are
    split by the authors' rules."""
    num_lineages: PositiveInt = 16
    """Lines of templates that evolve side by side (the paper's)."""
    minibatch_size: PositiveInt = 3
    """Feedback problems by which a new template is compared with its parent (the paper's)."""
    evaluation_temperature: NonNegativeFloat = 0.0
    """Sampling temperature at which a round scores templates. 0 is greedy, as the authors; training samples at
    `rollout.temperature`."""
    warm_start: bool = True
    """Whether a round begins with the last library's templates. The authors begin with the empty template alone."""
    guard_leaks: bool = True
    """Whether to refuse templates that contain a gold answer of their feedback, and never to pair a template with such
    a problem."""
    plain_control: bool = False
    """Whether to sample the development problems plainly after a round, as often as the round did: this measures what
    luck alone solves."""
    max_template_tokens: PositiveInt = 1024
    """Longest addition of a template to a prompt, in tokens; a longer template is refused and counted. One of 16 times
    as many characters is refused before it is tokenized."""
    round_timeout_s: Seconds = 43200.0
    """Longest round in seconds: a backstop, because the budget of rollouts ends a round. A round that takes longer is
    cut off and what it has is used. The log, the metrics and the report say so, because its result then depends on the
    speed of the machine."""
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    """Settings of the writer of new templates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Measuring the policy on plain prompts."""

    every_steps: NonNegativeInt = 30
    """Rollout steps between two evaluations. 0 evaluates at the end, and at the start if `evaluation.at_start`."""
    num_samples: PositiveInt | None = None
    """Answers to each problem. None: 16 in sets of fewer than 100 problems, 1 in larger ones (the paper's protocol)."""
    num_samples_of: Mapping[str, PositiveInt] = field(default_factory=dict)
    """Answers to each problem in one set, by the set's name; `evaluation.num_samples` holds for the others."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature of answers. None: greedy where a problem is answered once, 0.6 where more often (the paper's
    protocol)."""
    temperature_of: Mapping[str, NonNegativeFloat] = field(default_factory=dict)
    """Sampling temperature in one set, by the set's name; `evaluation.temperature` holds for the others."""
    at_start: bool = True
    """Whether the initial policy is evaluated before the first step."""
    with_best_template: bool = False
    """Whether every set is also evaluated under the best template whenever a round has published one."""
    best_set: str | None = None
    """Evaluation set by which the best checkpoint is kept as `checkpoints/best`. The best checkpoint is saved right
    after the evaluation that found it and is never pruned. None: no best checkpoint."""
    best_metric: Literal["avg", "pass_at_k"] = "avg"
    """Measure by which the best checkpoint is chosen. `avg`: mean share of correct answers. `pass_at_k`: share of
    problems with a correct answer, k being the number of answers to each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmsConfig:
    """Numbers of a step or an evaluation at which the run warns, or ends."""

    mismatch: PositiveFloat = 0.1
    """Difference between the log-probs of engine and trainer, in nats per token (mean over a step's compared tokens),
    above which the alarm rings."""
    mismatch_rise: Annotated[float, Range(above=1)] = 2.0
    """Rise of that difference above which the alarm rings: the median of the last 5 compared steps divided by that of
    the run's first 10. Values below 0.001 nats count as rounding."""
    mismatch_action: Literal["warn", "stop"] = "warn"
    """Effect of the two alarms on the mismatch. `warn` logs it. `stop` ends the run with `MismatchAlarm` after the step
    is on record and before its weights are saved, so that the run can go on from the checkpoint before."""
    forgotten: Annotated[float, Range(at_least=0, at_most=1)] = 0.25
    """Share of a step's mastered problems (if they are at least ten) above which plain failures cause a warning."""
    undecided: Annotated[float, Range(at_least=0, at_most=1)] = 0.01
    """Share of the answers of a step or an evaluation above which undecided ones cause a warning. Undecided answers are
    not learnt from and count in no rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What is written beside metrics.jsonl."""

    console: bool = True
    """Whether a line per step is printed on the console."""
    wandb_project: str | None = None
    """Project of Weights & Biases that receives the metrics. None: no Weights & Biases."""
    tensorboard: bool = False
    """Whether the metrics are also written for TensorBoard, in the run's folder."""
    rollouts_every_steps: NonNegativeInt = 1
    """Rollout steps between two that are written whole as JSONL. 0 writes none."""
    profile_update: PositiveInt | None = None
    """Optimizer step of the process, counted from 1, that is profiled: a Chrome trace of every rank is written to
    `profile/update-<n>-rank-<r>.json.gz` in the run's folder. None: no profile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run depends on."""

    run: RunConfig
    """Place and start of the run."""
    model: ModelConfig
    """The initial policy."""
    data: DataConfig
    """The problems."""
    preset: Literal["p2o", "reference"] = "p2o"
    """Set of defaults. `p2o`: this project's. `reference`: the authors' production settings where they differ
    (`REFERENCE_PRESET`)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the trainer's ranks."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling and its engines."""
    grading: GradingConfig = field(default_factory=GradingConfig)
    """Checking of answers."""
    hard: HardConfig = field(default_factory=HardConfig)
    """Choice of the hard problems."""
    assignment: AssignmentConfig = field(default_factory=AssignmentConfig)
    """Templates of the rollouts."""
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """Credit of the rollouts."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The token loss."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Computation of the LM head."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """Origin of the log-probs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Size and number of steps."""
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    """Evolution of prompts."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measurement of the policy."""
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    """Limits of warnings."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Outputs beside metrics.jsonl."""
    sglang: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the SGLang server, passed as `--key value` and checked against the installed version."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Fields of megatron-core's TransformerConfig, OptimizerConfig and DistributedDataParallelConfig, checked against
    the installed version."""


REFERENCE_PRESET: Mapping[str, Any] = {
    "hard.counted": "all",
    "assignment.num_plain": 0,
    "advantage.baseline": "group",
    "advantage.estimator": "grpo",
    "objective.context": "ratio_mask",
    "objective.denominator": "all",
    "objective.normalization": "micro_batch",
    "objective.drop_zero_advantage": False,
    "scoring.recompute": True,
    "evolution.rules": "reference",
    "evolution.beside_training": False,
    "evolution.warm_start": False,
    "evolution.guard_leaks": False,
}
"""Dotted field to the authors' value, applied as a default: what a file or `--set` names wins."""
