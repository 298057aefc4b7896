"""The settings of a run: one frozen tree. `config.read` reads it from YAML. The sections are in `config.sections`; a
number's range stands in its type (`config.ranges`); rules between settings are in `config.rules`. `docs/settings.md`
is generated from the tree.

Defaults are the paper's (arXiv:2603.21877, Qwen3-4B) except where `preset: reference` differs: those are ours, and
`REFERENCE_PRESET` lists the authors' value for each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_p2o.config.sections.data import DataConfig, EvaluationConfig, EvaluationSetConfig, TaskConfig, one_task
from megatron_p2o.config.sections.evolution import (
    GEPA_BUDGETS,
    AssignmentConfig,
    EvolutionConfig,
    HardConfig,
    ReflectionConfig,
)
from megatron_p2o.config.sections.objective import AdvantageConfig, LogprobsConfig, ObjectiveConfig
from megatron_p2o.config.sections.rollout import GradingConfig, RolloutConfig
from megatron_p2o.config.sections.run import AlarmsConfig, LoggingConfig, RunConfig, ScheduleConfig
from megatron_p2o.config.sections.trainer import HeadConfig, ModelConfig, OptimizerConfig, ParallelConfig

__all__ = [
    "GEPA_BUDGETS",
    "PRESETS",
    "REFERENCE_PRESET",
    "AdvantageConfig",
    "AlarmsConfig",
    "AssignmentConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "EvaluationSetConfig",
    "EvolutionConfig",
    "GradingConfig",
    "HardConfig",
    "HeadConfig",
    "LoggingConfig",
    "LogprobsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReflectionConfig",
    "RolloutConfig",
    "RunConfig",
    "ScheduleConfig",
    "TaskConfig",
    "one_task",
]


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
    logprobs: LogprobsConfig = field(default_factory=LogprobsConfig)
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

    def grading_of(self, task: str | None) -> GradingConfig:
        """Return how the answers to a task's problems are graded; "" or None for problems of no task."""
        own = self.data.train[task].grading if task else None
        return own or self.grading


REFERENCE_PRESET: Mapping[str, Any] = {
    "hard.counted": "all",
    "assignment.num_plain": 0,
    "advantage.baseline": "group",
    "advantage.estimator": "grpo",
    "objective.context": "ratio_mask",
    "objective.ratio_form": "hard",
    "objective.normalization": "micro_batch_mean",
    "objective.drop_zero_advantage": False,
    "logprobs.recompute": True,
    "evolution.rules": "reference",
    "evolution.beside_training": False,
    "evolution.warm_start": False,
    "evolution.guard_leaks": False,
}
"""Dotted field to the authors' value, applied as a default: what a file or `--set` names wins."""

PRESETS: Mapping[str, Mapping[str, Any]] = {"p2o": {}, "reference": REFERENCE_PRESET}
"""Settings of each preset, by the value of `preset`."""
