"""What a GPU takes for the work of a run, from one file with its sources, and what a workload is taken to be."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.memory.engine import cache_bytes_of_token, num_engine_parameters
from megatron_p2o.machine.memory.trainer import recomputed_share
from megatron_p2o.policy.model.architecture import Architecture, element_bytes
from megatron_p2o.records import from_json, from_text
from megatron_p2o.simulation.batch import EngineCoefficients

HARDWARE_FILE = Path(__file__).with_name("hardware.json")

MEMORY_TOLERANCE = 0.05
"""Share by which a GPU's memory may differ from what its data sheet says."""

PREFILL_STEP_S = 0.01
"""A prefill step of nothing: an allowance for its launches without CUDA graphs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSpeed:
    """What a GPU does in a second, where it is busy with this program."""

    name: str
    memory_gib: float
    read_bytes_per_s: float
    """Weights and KV cache that a decode step reads."""
    step_overhead_s: float
    """A decode step without what it reads."""
    sequence_s: float
    """For each sequence of a decode step."""
    layer_of_parallel_rank_s: float
    """What a layer of a tensor-parallel engine waits for the other ranks."""
    prefill_flops: float
    training_flops: float
    refresh_bytes_per_s: float
    """Weights that an engine takes over."""
    refresh_s: float
    """A refresh of nothing, with the memory that changes hands."""
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What no setting says about a run."""

    prompt_tokens: int
    response_tokens: float
    """Median."""
    response_log_std: float
    """Standard deviation of the logarithm of the lengths."""
    hard_share: float
    """Share of an epoch's problems that are hard."""
    reflection_s: float
    """What a reply of reflection takes."""
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """The file."""

    gpus: tuple[GpuSpeed, ...]
    workload: Workload


def read_hardware(path: Path = HARDWARE_FILE, changes: Mapping[str, Any] | None = None) -> Hardware:
    """Return what the file says, with `changes` to its workload.

    Raises:
        OSError, ValueError: it cannot be read; the message names file and field.
    """
    try:
        hardware = from_text(Hardware, path.read_text(encoding="utf-8"))
        workload = from_json(Workload, json.loads(json.dumps(_fields(hardware.workload) | dict(changes or {}))))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for name in ("prompt_tokens", "response_tokens"):
        if getattr(workload, name) < 1:
            raise ValueError(f"{name}={getattr(workload, name)} must be at least 1")
    if not 0 <= workload.hard_share <= 1:
        raise ValueError(f"hard_share={workload.hard_share} must be in [0, 1]")
    return Hardware(gpus=hardware.gpus, workload=workload)


def gpu_speed(hardware: Hardware, memory_gib: float) -> GpuSpeed:
    """Return the GPU of that memory. Raise `ValueError` when the file has none."""
    for gpu in hardware.gpus:
        if abs(gpu.memory_gib - memory_gib) <= MEMORY_TOLERANCE * gpu.memory_gib:
            return gpu
    known = ", ".join(f"{gpu.memory_gib:g} ({gpu.name})" for gpu in hardware.gpus)
    raise ValueError(f"no speed is known of a GPU of {memory_gib:g} GiB, only of {known}: add it to --hardware FILE")


def engine_coefficients(gpu: GpuSpeed, architecture: Architecture, config: Config) -> EngineCoefficients:
    """Return what the steps of an engine of `rollout.tensor_parallel` such GPUs take."""
    tensor, element = config.rollout.tensor_parallel, element_bytes(config.model.dtype)
    weights = element * num_engine_parameters(architecture, tensor)
    waiting = architecture.num_layers * gpu.layer_of_parallel_rank_s if tensor > 1 else 0.0
    return EngineCoefficients(
        step_s=gpu.step_overhead_s + waiting + weights / gpu.read_bytes_per_s,
        sequence_s=gpu.sequence_s,
        cached_token_s=cache_bytes_of_token(architecture, tensor, element) / gpu.read_bytes_per_s,
        prefill_step_s=PREFILL_STEP_S + waiting,
        prefill_token_s=architecture.forward_flops(1, 0) / (tensor * gpu.prefill_flops),
    )


def update_token_s(gpu: GpuSpeed, architecture: Architecture, config: Config, workload: Workload) -> float:
    """Return what the updates of a step take for each sampled token, if every rollout carries gradient: at most."""
    updates = config.schedule.updates_per_step
    passes = 3.0 + recomputed_share(config, architecture)
    passes += (updates - 1) / updates  # what later updates train on is scored before the first one moves the policy
    passes += (config.objective.kl_coefficient > 0) + 2 * config.logprobs.recompute
    length = min(config.rollout.max_new_tokens, round(workload.response_tokens))
    flops = architecture.forward_flops(workload.prompt_tokens + length, length) / length
    return passes * flops / (gpu.training_flops * config.parallel.world_size)


def refresh_s(gpu: GpuSpeed, architecture: Architecture, config: Config) -> float:
    """Return what new weights take to the engines."""
    weights = element_bytes(config.model.dtype) * num_engine_parameters(architecture, config.rollout.tensor_parallel)
    return gpu.refresh_s + weights / gpu.refresh_bytes_per_s


def _fields(workload: Workload) -> dict[str, Any]:
    return {name: getattr(workload, name) for name in Workload.__slots__}
