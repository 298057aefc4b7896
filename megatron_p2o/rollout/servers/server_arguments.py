"""The place of an engine and SGLang's arguments for it."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_p2o.config.tree import Config
from megatron_p2o.rollout.buckets.weight_message import LOAD_FORMAT
from megatron_p2o.rollout.servers.environment import engine_environment
from megatron_p2o.rollout.servers.server import LAUNCHER, OWN_ARGUMENTS, EngineStartFailed

CPU_ARGUMENTS: Mapping[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "mem_fraction_static": 0.3,
    "disable_overlap_schedule": True,  # there is no device whose work could hide the scheduler's
    "sleep_on_idle": True,  # an idle scheduler would otherwise spin on a core that the trainer needs
}
"""Arguments of a server on a machine without CUDA. The settings of `sglang` override them."""

GPU_ARGUMENTS: Mapping[str, Any] = {
    # By default SGLang 0.5.21 captures prefill piece by piece and keeps the pieces' inputs by address only: graphs
    # captured later overwrite them, and prompts are computed wrongly without a word. Decoding keeps its graphs.
    "cuda_graph_backend_prefill": "disabled",
}
"""Arguments of a server on a GPU. The settings of `sglang` override them."""

MEMORY_SAVER = "torch_memory_saver"
"""Package by which an SGLang server gives memory away and gets it back under the same addresses."""

CPU_KV_TOKENS = 65536
"""KV cache on a machine without CUDA when `rollout.max_total_tokens` is not set: SGLang would take 30 % of memory."""

PRIORITY_ARGUMENTS: Mapping[str, Any] = {
    "enable_priority_scheduling": True,
    "priority_scheduling_preemption_threshold": 0,  # one level above is enough
    "default_priority_value": 0,
}
"""Arguments of an engine that samples for training and for evolution; the priorities come with the requests."""

POLICIES_WITH_PRIORITIES = ("fcfs", "lof")
"""Values of `schedule_policy` with which SGLang honours priorities."""

DECIDED_BY: Mapping[str, str] = {
    "model_path": "model.path",
    "dtype": "model.dtype",
    "tp_size": "rollout.tensor_parallel",
    "max_running_requests": "rollout.max_running_requests",
    "max_total_tokens": "rollout.max_total_tokens",
    "random_seed": "run.seed",
    "enable_deterministic_inference": "rollout.deterministic",
    "enable_memory_saver": "rollout.release_memory",
    **dict.fromkeys((*PRIORITY_ARGUMENTS, "schedule_low_priority_values_first"), "evolution.enabled"),
}
"""Server arguments that other settings decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnginePlace:
    """Place of an engine in the run."""

    index: int
    """Index of the engine in the run."""
    node: int
    """0 is rank 0's own."""
    slot: int
    """Index of the engine on its node."""

    @property
    def name(self) -> str:
        """What the engine is called in messages, and by rank 0 and its outlet alike."""
        return f"engine {self.index}"


def engine_places(num_engines: int, num_nodes: int) -> list[EnginePlace]:
    """Spread engines over nodes as evenly as possible, neighbours together; the last nodes may get none."""
    num_nodes = min(num_nodes, num_engines)
    nodes = [index * num_nodes // num_engines for index in range(num_engines)]
    return [EnginePlace(index=index, node=node, slot=index - nodes.index(node)) for index, node in enumerate(nodes)]


def longest_tokens(config: Config) -> int:
    """Return how long a prompt and its response may be."""
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def server_arguments(config: Config, place: EnginePlace, num_gpus: int) -> dict[str, Any]:
    """Return the ServerArgs of an engine on a machine with `num_gpus`; 0 means that it serves on the CPU.

    The engines of a node take its GPUs in turn, and share them when there are more ranks than GPUs.

    Raises:
        ValueError: `sglang` holds an argument that another setting decides.
    """
    given = _given_arguments(config)
    rollout = config.rollout
    has_priorities = config.evolution.enabled
    first_gpu = {"base_gpu_id": place.slot * rollout.tensor_parallel % num_gpus} if num_gpus else {}
    return {
        **first_gpu,
        **(GPU_ARGUMENTS if num_gpus else CPU_ARGUMENTS),
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "log_level_http": "warning",
        **({"retraction_policy": "priority"} if has_priorities else {}),
        **given,
        **(PRIORITY_ARGUMENTS if has_priorities else {}),
        "model_path": config.model.path,
        "dtype": config.model.dtype,
        "tp_size": rollout.tensor_parallel,
        "max_running_requests": rollout.max_running_requests,
        "max_total_tokens": rollout.max_total_tokens or (None if num_gpus else CPU_KV_TOKENS),
        "random_seed": config.run.seed + place.index,
        "custom_weight_loader": [LOAD_FORMAT],
        "weight_version": "0",
        "enable_deterministic_inference": is_deterministic(config, num_gpus),
        "enable_memory_saver": does_release_memory(config, num_gpus),
    }


def check_arguments(config: Config) -> None:
    """Ask the installed SGLang whether it takes the settings of `sglang`; starts no server.

    Imports SGLang in a process of its own, for some seconds; only when there are such settings.

    Raises:
        ValueError: it does not; the message names each.
        EngineStartFailed: SGLang cannot be asked on this machine.
    """
    given = _given_arguments(config)
    for name in OWN_ARGUMENTS:
        if name in given:
            raise ValueError(f"sglang.{name} is decided by the program: remove it")
    problems = ask_server(given, config.rollout.startup_timeout_s) if given else []
    if problems:
        raise ValueError("; ".join(problems))


def ask_server(arguments: Mapping[str, Any], timeout_s: float) -> list[str]:
    """Return a sentence for each field of ServerArgs that the installed SGLang would refuse.

    Raises:
        EngineStartFailed: it cannot be imported on this machine, or not within `timeout_s`.
    """
    device = {} if torch.cuda.is_available() else {"device": "cpu"}
    with tempfile.TemporaryDirectory(prefix="p2o-check-") as scratch:
        try:
            asked = subprocess.run(
                [sys.executable, "-m", LAUNCHER, "--check"],
                input=json.dumps({"arguments": arguments}),
                capture_output=True,
                text=True,
                env=engine_environment(device, Path(scratch)),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            limit = f"rollout.startup_timeout_s={timeout_s:g} s"
            raise EngineStartFailed(f"sglang: its settings cannot be checked, no import within {limit}") from error
    if asked.returncode != 0:
        last_line = (asked.stderr.strip().splitlines() or [f"status {asked.returncode}"])[-1]
        raise EngineStartFailed(f"sglang: its settings cannot be checked, SGLang cannot be imported: {last_line}")
    # What it imports may print lines of its own.
    return json.loads(asked.stdout.strip().splitlines()[-1])


def _given_arguments(config: Config) -> dict[str, Any]:
    """Return the settings of `sglang` by SGLang's names. Raises `ValueError` for one that another setting decides."""
    given = {name.replace("-", "_"): value for name, value in config.sglang.items()}
    for name, setting in DECIDED_BY.items():
        if name in given:
            raise ValueError(f"sglang.{name} is decided by {setting}: set that instead")
    policy = given.get("schedule_policy", POLICIES_WITH_PRIORITIES[0])
    if config.evolution.enabled and policy not in POLICIES_WITH_PRIORITIES:
        raise ValueError(
            f"sglang.schedule_policy={policy} must be {' or '.join(POLICIES_WITH_PRIORITIES)} with "
            "evolution.enabled=true, because SGLang puts training before evolution under these alone: leave it out"
        )
    return given


def does_release_memory(config: Config, num_gpus: int, *, has_saver: bool | None = None) -> bool:
    """Return `rollout.release_memory`; unless it says so, engines lend their memory where they can.

    `has_saver`: whether torch_memory_saver is installed; None looks here.

    Raises:
        ValueError: it is set to true, and SGLang cannot do that here.
    """
    setting = config.rollout.release_memory
    is_installed = importlib.util.find_spec(MEMORY_SAVER) is not None if has_saver is None else has_saver
    if setting and not num_gpus:
        raise ValueError("rollout.release_memory=true needs a GPU, and none is visible: leave it out")
    if setting and not is_installed:
        raise ValueError(
            f"rollout.release_memory=true needs the package {MEMORY_SAVER}, which is not installed: "
            "pip install torch-memory-saver, or leave the setting out and give the engines less memory"
        )
    if setting and "quantization" in config.sglang:
        raise ValueError(
            "rollout.release_memory=true cannot be combined with sglang.quantization, because SGLang repacks quantized "
            "weights while their memory is still lent: set rollout.release_memory to false"
        )
    can = num_gpus > 0 and is_installed and "quantization" not in config.sglang
    return can if setting is None else setting


def is_deterministic(config: Config, num_gpus: int) -> bool:
    """Return `rollout.deterministic`; unless it says so, engines are deterministic where they serve on the CPU."""
    setting = config.rollout.deterministic
    return num_gpus == 0 if setting is None else setting
