"""`p2o plan`: what a run of some settings on some GPUs will take, before it is queued."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.layout import with_layout
from megatron_p2o.machine.memory.engine import Gpus
from megatron_p2o.machine.memory.here import checked_plan, planned_memory
from megatron_p2o.machine.memory.plan import GIB
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.rollout.servers.server_arguments import does_release_memory
from megatron_p2o.simulation.cluster import StepCost, TrainerCost
from megatron_p2o.simulation.hardware import (
    HARDWARE_FILE,
    engine_coefficients,
    gpu_speed,
    read_hardware,
    refresh_s,
    update_token_s,
)
from megatron_p2o.simulation.run_cost import RunCost, SimulatedRun, mean_step_s, run_cost, steps_without

HOUR_S = 3600.0

NUM_STEPS = 2
"""Steps that are simulated where the hours alone are asked for."""


def planned_run(
    config: Config,
    gpus: Gpus,
    num_problems: int,
    *,
    hardware_file: Path = HARDWARE_FILE,
    changes: Mapping[str, Any] | None = None,
) -> SimulatedRun:
    """Return what to simulate for the settings on these GPUs.

    Args:
        num_problems: of an epoch.
        hardware_file: see `hardware.json`.
        changes: to the workload it describes.

    Raises:
        ValueError: trainer and engines do not fit the GPUs, the file does not know them, or an epoch has no step.
    """
    config = with_layout(config, gpus.num_nodes, gpus.count)
    if num_problems < config.schedule.problems_per_step:
        raise ValueError(
            f"schedule.problems_per_step={config.schedule.problems_per_step} exceeds the {num_problems} problems of an "
            "epoch: lower it"
        )
    hardware = read_hardware(hardware_file, changes)
    cache_tokens = checked_plan(config, gpus, has_saver=True).cache_tokens
    gpu, architecture = gpu_speed(hardware, gpus.num_bytes / GIB), read_architecture(Path(config.model.path))
    return SimulatedRun(
        config=config,
        coefficients=engine_coefficients(gpu, architecture, config),
        cache_tokens=cache_tokens,
        trainer=TrainerCost(
            update_token_s=update_token_s(gpu, architecture, config, hardware.workload),
            refresh_s=refresh_s(gpu, architecture, config),
            lends=does_release_memory(config, gpus.count, has_saver=True),
        ),
        workload=hardware.workload,
        num_problems=num_problems,
    )


def plan_lines(config: Config, gpus: Gpus, run: SimulatedRun, num_steps: int) -> list[str]:
    """Simulate, and return the plan of memory and time, one line each."""
    cost = run_cost(run, num_steps)
    num_gpus = gpus.count * gpus.num_nodes
    lines = [
        *planned_memory(config, gpus),
        f"engines: {run.config.rollout.num_engines}, KV cache of {run.cache_tokens} tokens each",
        _step_line("step without evolution", cost.off, num_gpus),
    ]
    if cost.beside is not None and cost.alone is not None:
        lines += [
            _step_line("step beside a round", cost.beside.steps, num_gpus),
            f"evolution beside training: {cost.extra_s / len(cost.beside.steps):+.0f} s a step "
            f"({cost.slowdown:+.1%}), "
            f"{cost.beside.num_tokens / len(cost.beside.steps) / 1e6:.2f} M tokens a step, price {cost.price:.2f} "
            "(1: training waits for it)",
            f"a round: {cost.alone.num_trials} trials, {cost.alone.num_tokens / 1e6:.1f} M tokens; "
            f"beside training {cost.round_steps:.0f} of the {run.steps_per_epoch} steps of an epoch"
            + ("" if cost.beside.is_round_over else ", by its trials so far")
            + f"; alone {cost.alone.round_s / HOUR_S:.2f} h",
        ]
    return [*lines, *run_lines(run, cost, num_gpus), "not in it: start, evaluations, checkpoints, grading that lags"]


def _step_line(name: str, steps: tuple[StepCost, ...], num_gpus: int) -> str:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return (
        f"{name}: {mean_step_s(steps):.0f} s = generation {mean([step.generation_s for step in steps]):.0f} + update "
        f"{mean([step.update_s for step in steps]):.0f} + refresh {mean([step.refresh_s for step in steps]):.0f}; "
        f"{mean([step.num_tokens / step.step_s / num_gpus for step in steps]):.0f} training tokens/s a GPU; engines "
        f"idle {1 - mean([step.busy_share for step in steps]):.0%} of the generation"
    )


def run_lines(run: SimulatedRun, cost: RunCost, num_gpus: int) -> list[str]:
    """Return the hours of all steps. There is a round beside each epoch but the first."""
    epochs, steps = run.config.schedule.epochs, run.steps_per_epoch
    num_steps = min(epochs * steps, run.config.schedule.max_steps or epochs * steps)
    without_s = num_steps * mean_step_s(cost.off)

    def line(name: str, seconds: float) -> str:
        return f"{name}: {num_steps} steps, {seconds / HOUR_S:.1f} h, {seconds / HOUR_S * num_gpus:.0f} GPU-hours"

    if cost.beside is None or cost.alone is None:
        return [line("run", without_s)]
    num_rounds = max(0, -(-num_steps // steps) - 1)
    slowed = min(num_steps - steps, num_rounds * min(cost.round_steps, steps)) if num_rounds else 0.0
    beside_s = without_s + slowed * cost.extra_s / len(cost.beside.steps)
    waiting_s = without_s + num_rounds * cost.alone.round_s
    return [
        line("run, rounds beside training" + _used(run, True), beside_s),
        line("run that waits for its rounds" + _used(run, False), waiting_s),
        line("run without evolution", without_s),
    ]


def simulated_hours(config: Config, gpus: Gpus, num_problems: int) -> list[str]:
    """Return the hours of a run on these GPUs by a few of its steps, and what they were simulated with, one line each.

    Rounds of evolution take much longer to simulate and are left to `p2o plan`. Raises as `planned_run`.
    """
    run = planned_run(config, gpus, num_problems)
    cost = RunCost(off=steps_without(run, NUM_STEPS), alone=None, beside=None)
    rounds = "; rounds of evolution come on top, which p2o plan simulates" if config.evolution.searches else ""
    workload = run.workload
    return [
        *(f"hours, simulated: {line}{rounds}" for line in run_lines(run, cost, gpus.count * gpus.num_nodes)),
        f"hours, simulated: for prompts of {workload.prompt_tokens} tokens and responses of "
        f"{workload.response_tokens:g} (median), and speeds that no GPU has measured; without start, evaluations and "
        "checkpoints. p2o plan takes other lengths",
    ]


def _used(run: SimulatedRun, beside: bool) -> str:
    return " (evolution.beside_training)" if run.config.evolution.beside_training == beside else ""
