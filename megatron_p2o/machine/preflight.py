"""What a run will need of the machine after hours, found before it starts: disk, time in its job, a port."""

import errno
import math
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.nodes import Nodes
from megatron_p2o.policy.model.architecture import Architecture, element_bytes
from megatron_p2o.terminal import size_text

OPTIMIZER_BYTES = 8
"""Bytes of a parameter in AdamW's two means, which are float32."""

MAIN_BYTES = 4
"""Bytes of the float32 copy of a parameter in bfloat16."""

TOKEN_BYTES = 5
"""Bytes that a token of a response takes in a rollout file: text, with what JSON escapes."""

ROW_BYTES = 1500
"""Bytes of a line of a rollout file besides the response: question, numbers, names."""

END_TIME = "SLURM_JOB_END_TIME"
"""Environment variable in which Slurm names the second at which a job's time is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What the last steps of a run took."""

    num_steps: int
    """How many they are."""
    step_s: float
    """Their median."""
    save_s: float
    """The longest that training waited for a checkpoint among them; 0 where there was none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preflight:
    """What was found."""

    lines: list[str] = field(default_factory=list[str])
    """What the run needs and what there is."""
    problems: list[str] = field(default_factory=list[str])
    """What it lacks, with the remedy."""


def preflight(
    config: Config,
    architecture: Architecture | None,
    num_steps: int | None,
    nodes: Nodes | None,
    environment: Mapping[str, str],
    *,
    pace: Pace | None = None,
    now: float | None = None,
) -> Preflight:
    """Return what a run of `num_steps` needs of disk, ports and time.

    Args:
        architecture: None where it is not known, and nothing is said of the disk.
        num_steps: None where it is not known, and nothing is said of the rollouts.
        nodes: of the launch; None for one machine.
        environment: that of the job.
        pace: of the run so far; None before its first steps.
        now: seconds of the epoch; None: this moment.
    """
    found = Preflight()
    if architecture is not None:
        _look_at_disk(config, architecture, num_steps, found)
    _look_at_port(nodes, found)
    _look_at_time(config, environment, pace, time.time() if now is None else now, found)
    return found


def checkpoint_bytes(architecture: Architecture, dtype: str) -> int:
    """Return the size of a checkpoint: weights and the state of the optimizer."""
    num_parameters = sum(map(math.prod, architecture.weight_shapes().values()))
    main = 0 if dtype == "float32" else MAIN_BYTES
    return num_parameters * (element_bytes(dtype) + main + OPTIMIZER_BYTES)


def num_checkpoints(config: Config) -> int:
    """Return how many checkpoints lie on disk at once: those kept, the last healthy one, the best, the one written."""
    return config.schedule.keep_checkpoints + 2 + (config.evaluation.best_set is not None)


def rollout_bytes(config: Config, num_steps: int) -> int:
    """Return how large the rollout files become where every response is as long as it may be."""
    every = config.logging.rollouts_every_steps
    if every == 0:
        return 0
    num_rollouts = num_steps // every * config.schedule.problems_per_step * config.rollout.group_size
    if config.evolution.enabled and config.evolution.plain_rollouts is not None:
        num_rollouts += config.evolution.plain_rollouts * config.schedule.epochs // every
    longest = ROW_BYTES + TOKEN_BYTES * config.rollout.max_new_tokens
    if config.schedule.max_tokens is None:
        return num_rollouts * longest
    # At worst each response is a single token; the step that reaches the budget may be as long as it may be.
    last_step = config.schedule.problems_per_step * config.rollout.group_size * longest
    return min(num_rollouts * longest, config.schedule.max_tokens * (ROW_BYTES + TOKEN_BYTES) + last_step)


def _look_at_disk(config: Config, architecture: Architecture, num_steps: int | None, found: Preflight) -> None:
    """Compare the free space with checkpoints, which must fit, and rollouts, which seldom become so large."""
    folder = config.run.folder.absolute()
    place = next(each for each in (folder, *folder.parents) if each.is_dir())
    free = shutil.disk_usage(place).free
    count, one = num_checkpoints(config), checkpoint_bytes(architecture, config.model.dtype)
    rollouts = 0 if num_steps is None else rollout_bytes(config, num_steps)
    of_rollouts = "" if num_steps is None else f" and at most {size_text(rollouts)} of rollouts"
    found.lines.append(f"disk: {size_text(free)} free in {place}; {count} checkpoints of {size_text(one)}{of_rollouts}")
    if count * one > free:
        found.problems.append(
            f"disk: {place} has {size_text(free)} free, and {count} checkpoints take {size_text(count * one)}: free "
            "some space, name another run.directory, or lower schedule.keep_checkpoints"
        )
    elif count * one + rollouts > free:
        found.lines.append(
            f"disk may become short: {size_text(rollouts)} of rollouts beside the checkpoints, if every response is as "
            "long as it may be: raise logging.rollouts_every_steps"
        )


def _look_at_port(nodes: Nodes | None, found: Preflight) -> None:
    """See whether the port at which the nodes meet is free, on the head."""
    if nodes is None or nodes.count == 1 or not nodes.is_head:
        return
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", nodes.head_port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened at ({error.strerror})"
            found.problems.append(
                f"port {nodes.head_port}, at which the nodes meet, {reason}: --head names another one"
            )
        else:
            found.lines.append(f"port {nodes.head_port}, at which the nodes meet, is free")


def _look_at_time(
    config: Config, environment: Mapping[str, str], pace: Pace | None, now: float, found: Preflight
) -> None:
    """Compare what is left of a job's time with a step, and with a round that training waits for."""
    end = environment.get(END_TIME, "")
    if not end.isdigit():
        return
    left_s = int(end) - now
    left = f"{left_s / 60:.0f} minutes are left of the job"
    if pace is None:
        found.lines.append(f"time: {left}")
    else:
        num_fitting = max(0, int((left_s - pace.save_s) / pace.step_s))
        took = f"the last {pace.num_steps} took {pace.step_s:.1f} s (median), a checkpoint {pace.save_s:.1f} s"
        found.lines.append(f"time: {left}, enough for about {num_fitting} steps: {took}")
        if num_fitting == 0:
            found.problems.append(
                f"time: {left}, not enough for one step and a checkpoint: of the run's steps {took}. Give the job more "
                "time (sbatch --time)"
            )
    evolution = config.evolution
    if evolution.searches and not evolution.beside_training and evolution.round_timeout_s > left_s:
        found.lines.append(
            f"time may become short: training waits for rounds of up to evolution.round_timeout_s="
            f"{evolution.round_timeout_s:g} s; a round that the job's end cuts off goes on in the next job"
        )
