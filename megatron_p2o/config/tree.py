"""The settings of a run: one frozen tree. `config.read` reads it from YAML. A number's range stands in its type
(`config.ranges`); rules between settings live in `problems_of`.

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
    range_problems,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str
    """Folder under `directory`."""
    directory: str = "runs"
    seed: Annotated[int, Range(at_least=0, at_most=2**31 - 1)] = 1
    """Seeds problem order, template draws, engine sampling and evolution."""
    readable_by: Literal["owner", "group", "all"] = "owner"
    """Whom the run's files are readable by: they hold problems, completions and templates. Logs of engines, which start
    with secrets, are the owner's in any case."""

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
    """Hugging Face directory: config.json, safetensors, tokenizer with a chat template."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of trainer and engine. Gradients and optimizer state are float32."""
    layer_backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Whose layers the trainer is built of: Transformer Engine's, or megatron-core's own with flash-attn or torch
    attention. `auto` takes the first on a GPU where they can be imported; `p2o doctor` and the run say which."""
    enable_thinking: bool = False
    """Passed to the chat template (Qwen3's switch)."""
    template_date: str | None = None
    """Today's date to a chat template that writes it (Llama 3.1's), as "2026-01-31": the same in every prompt of a run.
    None: the day the run was first started, which its config.yaml records and a resumed run keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the trainer's ranks divide the work; their product is the number of processes."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Parts of the model on each pipeline stage (the interleaved schedule); more than 1 make the pipeline idle less and
    need `pipeline` > 1."""
    context: PositiveInt = 1
    """Ranks that share the tokens of every sequence, for sequences too long for one."""
    data: PositiveInt = 1
    sequence: bool = False
    """Sequence parallelism of norms and dropout; needs `tensor` > 1."""
    distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    timeout_s: Seconds = 1800.0
    """Longest wait in a collective before the run ends with an error."""
    command_timeout_s: Seconds = 86400.0
    """Longest wait of the other ranks for rank 0's next command. It samples, evaluates and evolves prompts meanwhile,
    which may take hours; that it has ended they notice at once."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Problems and how they are asked."""

    train: str
    """JSONL or parquet file of problems."""
    evaluation: Mapping[str, str] = field(default_factory=dict)
    """Name to file; evaluated plainly every `evaluation.every_steps` and at the end."""
    id_field: str = "id"
    """When the rows have none, a hash of the question serves."""
    question_field: str = "question"
    answer_field: str = "answer"
    skip_bad_rows: bool = False
    """Use the good rows and report the bad ones; otherwise a bad row ends the run."""
    question_format: str = (
        "Let's think step by step and output the final answer within \\boxed{{}}.\nQuestion: {question}"
    )
    """str.format of the user message; literal braces are doubled. The paper's wording."""
    max_prompt_tokens: PositiveInt = 4096
    """Longer plain prompts are bad rows; longer templated prompts disqualify the template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Sampling, and the SGLang servers that do it."""

    group_size: Annotated[int, Range(at_least=2, reason="a group of one has no baseline")] = 6
    """G, rollouts per problem."""
    temperature: Annotated[float, Range(at_least=1e-6, reason="greedy rollouts are all alike")] = 0.6
    top_p: Annotated[float, Range(at_least=1, at_most=1, reason="SGLang reports log-probs as before the cut")] = 1.0
    """Of training's rollouts and evolution's; must be 1. SGLang's log-probs are of the whole distribution, not of the
    part that top-p leaves, from which the tokens are drawn: training would go wrong by them."""
    max_new_tokens: PositiveInt = 12288
    num_engines: PositiveInt = 1
    """SGLang servers of the run, spread evenly over its nodes."""
    tensor_parallel: PositiveInt = 1
    """Ranks per server."""
    max_running_requests: PositiveInt = 256
    """Requests an engine decodes at once; the broker keeps no more in flight."""
    max_total_tokens: PositiveInt | None = None
    """Size of an engine's KV cache in tokens. None: on GPUs what trainer and weights leave, unless
    `sglang.mem_fraction_static` is set; without CUDA 65,536."""
    startup_timeout_s: Seconds = 1800.0
    """Longest start of an engine. The first one on a GPU compiles kernels and reads the model, for many minutes."""
    request_timeout_s: Seconds = 3600.0
    """Longest time an engine may work on one completion; then it counts as aborted. It stands still while engines do
    not sample: their weights are refreshed, or their memory is lent."""
    stall_timeout_s: Seconds = 300.0
    """An engine that has requests and samples no token for so long, or leaves a call of a refresh unanswered, is hung:
    it is killed and replaced. Waiting in an engine's queue does not count."""
    max_restarts: NonNegativeInt = 3
    """How often an engine that died or hung may be started again between two refreshes; beyond, it is given up."""
    refresh_bucket_mib: PositiveInt = 512
    """Weights are handed to the engines in buckets of this size; while one is loaded the next is filled."""
    weight_transfer: Literal["auto", "device", "host"] = "auto"
    """How they get there. "device": every trainer rank leaves them on its GPU, two buckets at a time, for the engine
    rank that shares it (CUDA IPC; without CUDA, in memory files). "host": rank 0 leaves them in host memory, one copy
    per node. "auto": "device" on GPUs if every engine rank has a trainer rank on its GPU and can open what that leaves,
    else "host"."""
    verify_every: NonNegativeInt = 1
    """Compare checksums of the engines' weights with the trainer's at the first and every so many refreshes; 0 never.
    An engine that is restarted is always compared, unless never."""
    release_memory: bool | None = None
    """Lend the memory of the engines' weights and KV cache to the trainer from the end of sampling to the refresh;
    evolution waits meanwhile. None: on GPUs, where torch_memory_saver is installed; without CUDA there is nothing to
    lend."""
    deterministic: bool | None = None
    """Sample each rollout from a seed of its own (run, step, problem, rollout), with arithmetic that does not depend on
    what else an engine is doing: the same run gives the same numbers. None: on without CUDA, where it costs little. On
    GPUs it is SGLang's deterministic inference, whose batch-invariant kernels are slower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GradingConfig:
    """Answer checking."""

    num_workers: PositiveInt = 2
    """Processes that compare answers by algebra."""
    deadline_s: Seconds = 1.0
    """Processor time, which a busy machine does not use up: a worker that takes more of it for one answer is killed,
    and the answer is undecided. Most take a thousandth of a second, those that need math-verify up to 0.3 s."""
    undecided_alarm: Annotated[float, Range(at_least=0, at_most=1)] = 0.01
    """Warn when the grader could not decide more than this share of the answers of a step or an evaluation. Undecided
    answers are not learnt from, and count in no rate."""
    memory_limit_mib: Annotated[int, Range(at_least=256, reason="math-verify alone takes about 70")] = 2048
    """Address-space limit of a worker."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardConfig:
    """Which problems count as hard."""

    max_solved: NonNegativeInt = 1
    """A problem with at most this many correct rollouts in its group is hard (the paper's tau = 2, as a count)."""
    counted: Literal["plain", "all"] = "plain"
    """Which rollouts of a templated group decide. `plain` asks whether the skill is in the weights yet (the paper's
    Eq. 3), at the rate `max_solved / rollout.group_size`; `all` counts templated successes too (the authors' code), so
    that a problem loses its templates as soon as they work."""
    min_problems: NonNegativeInt = 100
    """Fewer hard problems in an epoch: no evolution, the next epoch asks everything plainly."""
    forgotten_alarm: Annotated[float, Range(at_least=0, at_most=1)] = 0.25
    """Warn when more than this share of the mastered problems of a step, if they are at least ten, fails plainly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignmentConfig:
    """How templates are given to the rollouts of a hard problem."""

    num_plain: NonNegativeInt = 2
    """Rollouts of a templated group that ask plainly: they keep the plain behaviour on-policy and give the group
    baseline failures to compare with. The authors reserve none."""
    same_template_in_group: bool = False
    """One draw for the whole group (the paper's ablation)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageConfig:
    """Credit of a rollout against its siblings."""

    estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    baseline: Literal["group", "plain_anchored"] = "group"
    """`plain_anchored`: a templated group is joined by as many virtual rollouts as it has, at the ledger's running
    estimate of the problem's plain success rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The token loss."""

    context: Literal["sampling", "replace", "importance", "ratio_mask"] = "ratio_mask"
    """Which prompt the old and the current log-probs are taken on; see docs in `rl.objective`."""
    ratio_low: Annotated[float, Range(above=0, at_most=1)] = 0.01
    ratio_high: Annotated[float, Range(at_least=1)] = 10.0
    """Context ratio band, both ends inclusive, of `ratio_mask`."""
    ratio_form: Literal["hard", "soft"] = "hard"
    """Outside the band: weight 0, or clip(rho)/rho."""
    clip_low: Annotated[float, Range(at_least=0, below=1)] = 0.2
    clip_high: NonNegativeFloat = 0.2
    dual_clip: Annotated[float, Range(above=1)] = 3.0
    """Bound on the loss of tokens with negative advantage, in units of -advantage."""
    denominator: Literal["all", "kept"] = "all"
    """Tokens the loss is divided by: `all` response tokens of the mini-batch, or those `kept`, which have a non-zero
    weight and belong to a rollout with gradient."""
    normalization: Literal["global", "micro_batch"] = "global"
    """`micro_batch` is the authors' mean per micro-batch; its result depends on packing. For comparison only."""
    drop_zero_advantage: bool = True
    """Leave rollouts without gradient out of the forward pass."""
    drop_failed_templated: bool = False
    """Give failed templated rollouts no gradient (they still shape the baseline)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """How a GPU computes the LM head and the loss (`kernels/README.md`); a CPU has one way."""

    kernel: Literal["warp_specialized", "plain", "torch"] = "warp_specialized"
    """`plain`: the same Triton kernel without warp specialization, to be tried where the default fails, hangs or gives
    other log-probs than the engine. `torch`: no Triton; slower, takes float32 models too."""
    weight_grad: Literal["fast", "precise"] = "fast"
    """`precise` spends one more product of four so that the weight gradient is within 1e-3 at any state of the policy;
    `fast` is where the sampled tokens have some probability, and within 1.3e-3 where a rival has all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringConfig:
    """Where log-probs come from."""

    recompute: bool = False
    """Score the sampling context with the trainer instead of trusting the engine's log-probs."""
    importance_cap: Annotated[float, Range(at_least=1)] | None = None
    """Weigh each token by min(pi_trainer / pi_engine, cap) under the prompt it was sampled with; needs `recompute`."""
    mismatch_alarm: PositiveFloat = 0.1
    """Warn when engine and trainer differ by more than this many nats a token, mean over a step's compared tokens."""
    mismatch_rise_alarm: Annotated[float, Range(above=1)] = 2.0
    """Warn when that difference has risen to more than so many times what it was in the run's first steps: the median
    of the last 5 compared steps against that of the first 10, from 0.001 nats on."""
    mismatch_alarm_action: Literal["warn", "stop"] = "warn"
    """`stop` ends the run with `MismatchAlarm` after the step is on record and before its weights are saved, so that it
    can go on from the checkpoint before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    beta1: Annotated[float, Range(at_least=0, below=1)] = 0.9
    beta2: Annotated[float, Range(at_least=0, below=1)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    """Not applied to norms."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up, then constant."""
    clip_grad: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 16384
    """Packed tokens per forward pass and rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How many problems and how often."""

    problems_per_step: PositiveInt = 128
    problems_per_update: PositiveInt = 64
    """Mini-batch of one optimizer step; must divide `problems_per_step`."""
    max_batches_per_step: PositiveInt = 1
    """Dynamic sampling (DAPO): a step asks up to so many batches of `problems_per_step`, until that many groups carry a
    gradient, and trains on those. What all agree on costs rollouts then, and the epoch has fewer steps."""
    epochs: PositiveInt = 10
    max_steps: PositiveInt | None = None
    """Stop after this many rollout steps even inside an epoch."""
    save_every_steps: NonNegativeInt = 30
    """0 saves only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept on disk, the newest included. The newest that a later step has sampled and learnt from is kept
    besides: the last may be of a policy that has just diverged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionConfig:
    """Who writes new templates."""

    backend: Literal["openai", "self", "phrasebook"] = "self"
    """`openai`: any OpenAI-compatible endpoint (Teacher-Ref). `self`: the frozen initial policy on its own SGLang
    server (Self-Ref). `phrasebook`: recombines the phrases of a file; for machines without a language model."""
    base_url: str | None = None
    """Of the `openai` backend, e.g. https://host/v1."""
    model: str | None = None
    api_key_env: str = "P2O_REFLECTION_API_KEY"
    """Environment variable that holds the key; the key itself is never in a file."""
    phrases: str | None = None
    """File of the `phrasebook` backend, one phrase per line."""
    temperature: NonNegativeFloat | None = 0.6
    """None leaves it out of the request, for models that take no other than their own."""
    max_tokens: PositiveInt | None = 2048
    """Of a reply, reasoning included; one that is cut off gives no template. None leaves it out of the request."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, e.g. `{max_completion_tokens: 8192, reasoning_effort: low}`, with `max_tokens`
    and `temperature` null for models that refuse these."""
    timeout_s: Seconds = 120.0
    """Longest wait for a reply."""
    max_retries: NonNegativeInt = 4
    """Per call, with exponential back-off; then evolution pauses and says so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvolutionConfig:
    """GEPA beside training."""

    enabled: bool = True
    """False is plain GRPO."""
    beside_training: bool = True
    """A round runs in the slots that training leaves idle, and its library is used from the next step after it ended.
    False waits for each round, as the authors do: slower, but a run can be repeated exactly."""
    max_version_gap: NonNegativeInt = 2
    """Training steps that may lie between the rollouts by which a template is preferred to its parent; the older side
    is sampled again where more do. Matters beside training only: else the policy stands still during a round."""
    rules: Literal["asynchronous", "reference"] = "asynchronous"
    """`reference`: the authors' lock-step rules exactly. `asynchronous`: lineages advance on their own."""
    budget: Literal["light", "medium", "heavy", "heavy_2", "heavy_3", "heavy_4", "heavy_16"] = "heavy_4"
    """GEPA's automatic budget by number of candidates."""
    max_rollouts: PositiveInt | None = None
    """Explicit budget of evaluation rollouts per round instead of `budget`."""
    dev_size: PositiveInt = 300
    """Problems that score candidates; the rest of the hard set gives feedback. Split rules of the authors."""
    num_lineages: PositiveInt = 16
    minibatch_size: PositiveInt = 3
    evaluation_temperature: NonNegativeFloat = 0.0
    """Greedy, as the authors; training samples at `rollout.temperature`."""
    warm_start: bool = True
    """Begin a round with the last library's templates; the authors begin with the empty template alone."""
    guard_leaks: bool = True
    """Refuse templates that contain a gold answer of their feedback, and never pair a template with such a problem."""
    plain_control: bool = False
    """After a round, sample the development problems plainly as often as the round did: what luck alone solves."""
    max_template_tokens: PositiveInt = 1024
    """What a template may add to a prompt; a longer one is refused and counted. One of 16 times as many characters is
    not even counted in tokens."""
    round_timeout_s: Seconds = 43200.0
    """A backstop: the budget of rollouts ends a round. One that takes longer is cut off, what it has is used, and the
    log, the metrics and the report say so, because its result then depends on the speed of the machine."""
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Measuring the policy on plain prompts."""

    every_steps: NonNegativeInt = 30
    """0 evaluates only at the end."""
    num_samples: PositiveInt | None = None
    """Answers to each problem. None: 16 in sets of fewer than 100 problems, 1 in larger ones (the paper's protocol)."""
    num_samples_of: Mapping[str, PositiveInt] = field(default_factory=dict)
    """Set to answers per problem, before `num_samples`."""
    temperature: NonNegativeFloat | None = None
    """None: greedy where a problem is answered once, 0.6 where more often (the paper's protocol)."""
    temperature_of: Mapping[str, NonNegativeFloat] = field(default_factory=dict)
    """Set to temperature, before `temperature`."""
    at_start: bool = True
    with_best_template: bool = False
    """Also evaluate under the best template whenever a round has published one."""
    best_set: str | None = None
    """Keep the checkpoint that was best on this set as `checkpoints/best`; it is saved when the evaluation that shows
    it ends, and not pruned. None keeps none."""
    best_metric: Literal["avg", "pass_at_k"] = "avg"
    """What is compared; `k` is the answers to each problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """What is written beside metrics.jsonl."""

    console: bool = True
    wandb_project: str | None = None
    tensorboard: bool = False
    rollouts_every_steps: NonNegativeInt = 1
    """Write all rollouts of a step as JSONL; 0 writes none."""
    profile_update: PositiveInt | None = None
    """Write what this optimizer step of the process takes, counted from 1, as a Chrome trace of every rank:
    `profile/update-<n>-rank-<r>.json.gz` in the run's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Everything a run depends on."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    preset: Literal["p2o", "reference"] = "p2o"
    """`reference` changes the defaults to the authors' production settings (`REFERENCE_PRESET`)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    hard: HardConfig = field(default_factory=HardConfig)
    assignment: AssignmentConfig = field(default_factory=AssignmentConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sglang: Mapping[str, Any] = field(default_factory=dict)
    """Passed to the SGLang server as `--key value`, checked against the installed version."""
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


Rule = tuple[bool, str]
"""Whether a rule holds, and the sentence that says so when it does not."""


def problems_of(config: Config) -> list[str]:
    """Return every rule the settings break, one sentence each with the remedy; empty when the run can start."""
    rules = [
        *_run_rules(config),
        *_sampling_rules(config),
        *_objective_rules(config),
        *_process_rules(config),
        *_evaluation_rules(config),
    ]
    return range_problems(config) + [text for holds, text in rules if not holds]


def _sampling_rules(config: Config) -> list[Rule]:
    return [
        (
            config.schedule.problems_per_step % max(1, config.schedule.problems_per_update) == 0,
            f"schedule.problems_per_update={config.schedule.problems_per_update} must divide "
            f"schedule.problems_per_step={config.schedule.problems_per_step}",
        ),
        (
            config.assignment.num_plain <= config.rollout.group_size,
            f"assignment.num_plain={config.assignment.num_plain} must be at most rollout.group_size="
            f"{config.rollout.group_size}",
        ),
        (
            "{question}" in config.data.question_format,
            "data.question_format must contain {question}",
        ),
    ]


def _objective_rules(config: Config) -> list[Rule]:
    return [
        (
            config.objective.normalization == "global" or config.objective.denominator == "all",
            "objective.normalization=micro_batch is defined for objective.denominator=all only",
        ),
        (
            config.scoring.importance_cap is None or config.scoring.recompute,
            f"scoring.importance_cap={config.scoring.importance_cap} needs scoring.recompute=true: the trainer has no "
            "log-probs under templates otherwise",
        ),
    ]


def _evaluation_rules(config: Config) -> list[Rule]:
    evaluation, sets = config.evaluation, config.data.evaluation
    known = ", ".join(sets) or "none"
    named = [
        *((f"evaluation.num_samples_of.{name}", name) for name in evaluation.num_samples_of),
        *((f"evaluation.temperature_of.{name}", name) for name in evaluation.temperature_of),
    ]
    return [
        *(
            (
                not name.startswith("templated_"),
                f"data.evaluation.{name} must not begin with templated_: the metrics of a set asked through a template "
                "are called so, rename it",
            )
            for name in sets
        ),
        *((name in sets, f"{setting} must name a set of data.evaluation ({known})") for setting, name in named),
        (
            evaluation.best_set is None or evaluation.best_set in sets,
            f"evaluation.best_set={evaluation.best_set} must name a set of data.evaluation ({known})",
        ),
    ]


def _run_rules(config: Config) -> list[Rule]:
    name = Path(config.run.name)
    is_below = bool(name.parts) and not name.is_absolute() and ".." not in name.parts
    return [(is_below, f"run.name={config.run.name} must name a folder below run.directory: write it like first")]


def _process_rules(config: Config) -> list[Rule]:
    return [
        (
            not config.parallel.sequence or config.parallel.tensor > 1,
            "parallel.sequence needs parallel.tensor > 1: set parallel.sequence to false",
        ),
        (
            config.parallel.virtual_pipeline <= 1 or config.parallel.pipeline > 1,
            f"parallel.virtual_pipeline={config.parallel.virtual_pipeline} must be 1, or larger with "
            "parallel.pipeline > 1",
        ),
        (
            not config.evolution.enabled
            or config.evolution.beside_training
            or config.evolution.round_timeout_s < config.parallel.command_timeout_s,
            f"evolution.round_timeout_s={config.evolution.round_timeout_s:g} must be less than "
            f"parallel.command_timeout_s={config.parallel.command_timeout_s:g} with evolution.beside_training=false: "
            "the other ranks wait while a round runs",
        ),
        (
            not config.evolution.enabled
            or config.evolution.reflection.backend != "openai"
            or bool(config.evolution.reflection.base_url and config.evolution.reflection.model),
            "evolution.reflection.backend=openai needs evolution.reflection.base_url and .model",
        ),
        (
            not {"messages", "stream", "n"} & config.evolution.reflection.extra_body.keys(),
            "evolution.reflection.extra_body must hold none of messages, stream and n: one whole reply is read",
        ),
        (
            not config.evolution.enabled
            or config.evolution.reflection.backend != "phrasebook"
            or bool(config.evolution.reflection.phrases),
            "evolution.reflection.backend=phrasebook needs evolution.reflection.phrases: a file of phrases",
        ),
    ]
