"""Settings of a run as a whole: its place, its length, its alarms and what it writes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_p2o.config.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Range


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
        """Folder of the run's files. It need not exist yet."""
        return Path(self.directory) / self.name

    @property
    def arm(self) -> str:
        """What reports compare, its runs differing by seed: the name, without `-seed2` at its end if that is `seed`."""
        marked = re.fullmatch(r"(.+?)[-_]seed[-_]?0*(\d+)", self.name)
        return marked[1] if marked and int(marked[2]) == self.seed else self.name


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
    max_tokens: PositiveInt | None = None
    """Budget in sampled tokens: the run ends after the step in which training, trials of templates and reflection have
    sampled so many (`compute/learning_tokens`). Evaluations and the plain control do not count. None: no such end."""
    max_hours: PositiveFloat | None = None
    """Budget in hours, evaluations included (`compute/wall_s`): the run ends after the step that reaches it, so its
    result depends on the machine. None: no such end."""
    save_every_steps: NonNegativeInt = 30
    """Rollout steps between two checkpoints. 0 saves at the end only."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept on disk, the newest included. One more is kept: the newest whose policy a later step has sampled
    and learnt from, because the last may have just diverged."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a rollout step."""
        return self.problems_per_step // self.problems_per_update


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
    ratio_mask_dropped: Annotated[float, Range(at_least=0, at_most=1)] = 0.5
    """Share of what templated rollouts teach that the context ratio may take away, above which a warning says that
    training cannot internalise it: of their |advantage|, or of what the template adds to the log-probs of successes. 1
    turns it off."""
    undecided: Annotated[float, Range(at_least=0, at_most=1)] = 0.01
    """Share of the responses of a step or an evaluation above which undecided ones cause a warning. Undecided ones are
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
    mlflow_experiment: str | None = None
    """Experiment of MLflow that receives the metrics; the environment variable MLFLOW_TRACKING_URI says where. None: no
    MLflow."""
    trackio_project: str | None = None
    """Project of Trackio that receives the metrics. None: no Trackio."""
    sinks: Mapping[str, Any] = field(default_factory=dict)
    """Sinks of one's own and their arguments; `{}` for a sink without any. A sink's name is that of an entry point of
    `megatron_p2o.sinks`, `package.module:callable` or `path/to/file.py:callable`. An argument whose name ends in `_env`
    names an environment variable, which then reaches the sink even if it holds a secret."""
    rollouts_every_steps: NonNegativeInt = 1
    """Rollout steps between two that are written whole as JSONL. 0 writes none."""
    profile_update: PositiveInt | None = None
    """Optimizer step of the process, counted from 1, that is profiled: a Chrome trace of every rank is written to
    `profile/update-<n>-rank-<r>.json.gz` in the run's folder. None: no profile."""
