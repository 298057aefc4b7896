"""Prints, checks and applies the memory plan, for the GPUs of this machine or of another one."""

import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from megatron_p2o.config.source import shown
from megatron_p2o.config.tree import Config
from megatron_p2o.machine.layout import layout_line, with_layout
from megatron_p2o.machine.memory.engine import Gpus, engine_share
from megatron_p2o.machine.memory.host import host_lines
from megatron_p2o.machine.memory.plan import GIB, MemoryPlan, memory_plan
from megatron_p2o.machine.memory.words import check_fits, described, warning_of
from megatron_p2o.machine.nodes import nodes_of_slurm
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.rollout.servers.server_arguments import does_release_memory
from megatron_p2o.terminal import say

logger = logging.getLogger(__name__)

MAX_GPU_GIB = 10_000
MAX_GPUS_OF_A_NODE = 1000
"""More than any machine has, of which a memory plan is asked for."""


def with_planned_cache(config: Config) -> Config:
    """Return the settings with the size of the KV cache in them, for the engines of this machine, and print the plan.

    Without a GPU returns `config`.

    Raises:
        ValueError: trainer and engines do not fit this machine's GPUs.
    """
    if not torch.cuda.is_available():
        return config
    plan = checked_plan(config, gpus_here(int(os.environ.get("GROUP_WORLD_SIZE", "1"))))
    if os.environ.get("RANK", "0") == "0":
        for line in described(plan):
            say(line)
        if warning_of(plan):
            logger.warning(warning_of(plan))
    if engine_share(config) is not None:
        return config
    return replace(config, rollout=replace(config.rollout, max_total_tokens=plan.cache_tokens))


def planned_memory(config: Config, gpus: Gpus | None = None) -> list[str]:
    """Return the parts of the memory plan for a GPU, and warnings, one line each. `gpus`: GPUs of other machines, with
    everything installed; None: those of this node. Without any: what the run takes at least of the machine's memory.

    Raises:
        ValueError: trainer and engines do not fit them; the message has the numbers and the settings to change.
    """
    given, has_saver = config.parallel, True if gpus is not None else None
    gpus = gpus or run_gpus(config)
    if gpus is None:
        nodes = nodes_of_slurm(os.environ)
        num_nodes = nodes.count if nodes else 1
        return host_lines(with_layout(config, num_nodes), read_architecture(Path(config.model.path)), num_nodes)
    config = with_layout(config, gpus.num_nodes, gpus.count)
    plan = checked_plan(config, gpus, has_saver=has_saver)
    lending = "engines lend theirs to the trainer" if plan.num_lending else "engines keep theirs"
    head = f"memory of {gpus.num_nodes} x {gpus.count} GPUs of {gpus.num_bytes / GIB:.1f} GiB, {lending}"
    layout = [layout_line(given, config.parallel, gpus.num_nodes, gpus.count)] if given != config.parallel else []
    return [*layout, head, *described(plan), *filter(None, [warning_of(plan)])]


def run_gpus(config: Config) -> Gpus | None:
    """Return the GPUs of a run that starts here: on the nodes of the `srun` step, else on as many as it takes. None
    where this machine has none."""
    if not torch.cuda.is_available():
        return None
    nodes = nodes_of_slurm(os.environ)
    return gpus_here(nodes.count if nodes else num_nodes_for(config, torch.cuda.device_count()))


def num_nodes_for(config: Config, num_gpus: int) -> int:
    """Return how many nodes of `num_gpus` a run takes with a trainer's rank on each GPU.

    Where the number of replicas is derived, the engines say how many GPUs there are to be.
    """
    engine_ranks = config.rollout.num_engines * config.rollout.tensor_parallel if config.parallel.data is None else 0
    return math.ceil(max(config.parallel.world_size, engine_ranks) / num_gpus)


def gpus_of(config: Config, machine: str, option: str) -> Gpus:
    """Return the GPUs that `machine` describes, "8x80" for nodes of 8 GPUs of 80 GiB: as many nodes as the run takes.

    Raises:
        ValueError: it describes none; the message names the `option` it was given by.
    """
    found = re.fullmatch(r"([1-9]\d*)x(\d+(?:\.\d+)?)", machine)
    if found is None:
        raise ValueError(f"{option}={shown(machine)} must be GPUS-OF-A-NODExGIB-OF-EACH, such as 8x80")
    count, gib = int(found[1]), float(found[2])
    if not 0 < gib <= MAX_GPU_GIB or count > MAX_GPUS_OF_A_NODE:
        raise ValueError(f"{option}={shown(machine)} must be at most {MAX_GPUS_OF_A_NODE}x{MAX_GPU_GIB}")
    return Gpus(count=count, num_bytes=int(gib * GIB), num_nodes=num_nodes_for(config, count))


def gpus_here(num_nodes: int) -> Gpus:
    """Return the GPUs of this node of a run of `num_nodes`."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_bytes = torch.cuda.get_device_properties(local_rank).total_memory
    return Gpus(count=torch.cuda.device_count(), num_bytes=num_bytes, num_nodes=num_nodes)


def checked_plan(config: Config, gpus: Gpus, *, has_saver: bool | None = None) -> MemoryPlan:
    """Return the plan, or raise `ValueError` when it does not fit; `has_saver`: see `does_release_memory`."""
    releases = does_release_memory(config, gpus.count, has_saver=has_saver)
    plan = memory_plan(config, read_architecture(Path(config.model.path)), gpus, releases_memory=releases)
    check_fits(plan, config)
    return plan
