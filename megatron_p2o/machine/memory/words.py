"""Messages about a memory plan: its parts, whether it fits, and the settings that would make it fit."""

from collections.abc import Mapping

from megatron_p2o.config.tree import Config
from megatron_p2o.machine.memory.engine import engine_share
from megatron_p2o.machine.memory.plan import GIB, RESERVE_BYTES, MemoryPlan
from megatron_p2o.rollout.servers.server_arguments import longest_tokens


def described(plan: MemoryPlan) -> list[str]:
    """Return the phases of a plan in GiB, one line each."""
    return [f"memory of a GPU, {phase}: {_sum(parts, plan)}" for phase, parts in plan.phases.items()]


def warning_of(plan: MemoryPlan) -> str:
    """Return what may run out of memory by estimate; "" when nothing does."""
    parts = {
        **plan.phases["training"],
        "activations at least": 0,
        "activations about": plan.trainer.likely_activations,
    }
    if sum(parts.values()) <= plan.gpu_bytes:
        return ""
    return (
        f"training may run out of memory: {_sum(parts, plan)}. Remedies: recompute activations "
        "(megatron.recompute_granularity, docs/parallel.md), lower optimizer.micro_batch_tokens, raise "
        "parallel.context or parallel.tensor"
    )


def check_fits(plan: MemoryPlan, config: Config) -> None:
    """Raise `ValueError` with all numbers and the settings to change when a phase cannot fit."""
    for phase, parts in plan.phases.items():
        if sum(parts.values()) > plan.gpu_bytes:
            raise ValueError(f"{phase} does not fit a GPU: {_sum(parts, plan)}. {_remedies(plan, config, phase)}")
    needed = longest_tokens(config)
    if plan.cache_tokens < needed:
        raise ValueError(
            f"the KV cache of an engine rank would hold {max(0, plan.cache_tokens)} tokens, fewer than a prompt "
            f"and its response may have (data.max_prompt_tokens + rollout.max_new_tokens = {needed}): "
            f"{_sum(plan.phases['sampling'], plan)}, {RESERVE_BYTES / GIB:.0f} of them kept free. "
            f"{_remedies(plan, config, 'sampling')}"
        )


def _sum(parts: Mapping[str, int], plan: MemoryPlan) -> str:
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size > 0)
    return f"{listed}; together {sum(parts.values()) / GIB:.1f} of {plan.gpu_bytes / GIB:.1f} GiB"


def _remedies(plan: MemoryPlan, config: Config, phase: str) -> str:
    parallel = config.parallel
    given = {
        "set parallel.distributed_optimizer": parallel.num_replicas * parallel.context > 1
        and not parallel.distributed_optimizer,
        "raise parallel.tensor or parallel.pipeline": True,
        "raise optimizer.lend": phase == "sampling" and config.optimizer.lend != "all",
        "lower optimizer.lend": phase == "refresh",
        "lower optimizer.micro_batch_tokens": phase == "training",
        "lower sglang.mem_fraction_static": engine_share(config) is not None,
        "raise rollout.tensor_parallel": plan.num_lending > 0,
        "have the engines lend their memory (rollout.release_memory, torch_memory_saver)": phase == "training"
        and plan.num_staying > 0,
    }
    return "Remedies: " + "; ".join(remedy for remedy, applies in given.items() if applies)
