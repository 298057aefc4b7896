"""The settings of `megatron:`: fields of megatron-core's own configurations, passed through.

Whatever the installed version has a field for can be set, except what another setting of ours decides.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from megatron_p2o.config.suggestions import did_you_mean
from megatron_p2o.config.tree import OptimizerConfig as OptimizerSettings
from megatron_p2o.policy.model.layer_choice import Capabilities

TARGETS = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)

_OWNERS = {
    "model.path": (
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size"),
        *("layernorm_epsilon", "normalization", "qk_layernorm", "gated_linear_unit", "activation_func"),
        *("add_bias_linear", "add_qkv_bias", "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
        "moe_router_pre_softmax",
    ),
    "model.dtype": ("params_dtype", "pipeline_dtype", "bf16", "fp16"),
    "parallel.tensor": ("tensor_model_parallel_size",),
    "parallel.pipeline": ("pipeline_model_parallel_size",),
    "parallel.virtual_pipeline": ("virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "batch_p2p_comm"),
    "parallel.context": ("context_parallel_size",),
    "parallel.sequence": ("sequence_parallel",),
    "parallel.distributed_optimizer": ("use_distributed_optimizer",),
    "optimizer.lr": ("lr", "min_lr"),
    "optimizer.weight_decay": ("weight_decay",),
    "optimizer.beta1": ("adam_beta1",),
    "optimizer.beta2": ("adam_beta2",),
    "optimizer.eps": ("adam_eps",),
    "optimizer.clip_grad": ("clip_grad",),
    "the trainer": (
        *("optimizer", "hidden_dropout", "attention_dropout", "calculate_per_token_loss", "variable_seq_lengths"),
        *("use_cpu_initialization", "perform_initialization", "moe_token_dispatcher_type", "moe_grouped_gemm"),
        *("moe_router_load_balancing_type", "use_custom_fsdp", "use_megatron_fsdp"),
        *("finalize_model_grads_func", "grad_scale_func", "no_sync_func"),
        *("grad_sync_func", "param_sync_func", "timers"),
    ),
}
OWNERS: Mapping[str, str] = {name: owner for owner, names in _OWNERS.items() for name in names}
"""Field of megatron-core to the setting of ours that decides it."""

EXPERT_SIZES = ("expert_model_parallel_size", "expert_tensor_parallel_size")
"""Fields that share out experts in a way the trainer does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronOverrides:
    """The fields of `megatron:` by the configuration of megatron-core they belong to; some belong to several."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    data_parallel: Mapping[str, Any] = field(default_factory=dict)


NO_OVERRIDES = MegatronOverrides()


def megatron_overrides(settings: Mapping[str, Any]) -> MegatronOverrides:
    """Return `megatron:` divided over megatron-core's configurations.

    Raises:
        ValueError: the installed version has no such field, another setting decides it, or a dtype is unknown.
    """
    known = {name for target in TARGETS for name in _fields(target)}
    for name in settings:
        _check_name(name, known)
    transformer, optimizer, data_parallel = (
        {
            name: _converted(name, value, _fields(target)[name])
            for name, value in settings.items()
            if name in _fields(target)
        }
        for target in TARGETS
    )
    return MegatronOverrides(transformer=transformer, optimizer=optimizer, data_parallel=data_parallel)


def check_offload(settings: Mapping[str, Any], *, is_sharded: bool) -> None:
    """Raise `ValueError` unless what `megatron.optimizer_cpu_offload` depends on is set, `parallel` included.

    megatron-core would offload nothing, or fail in the first step.
    """
    if not settings.get("optimizer_cpu_offload"):
        return
    fraction = settings.get("optimizer_offload_fraction", 0.0)
    rules = [
        (is_sharded, "parallel.distributed_optimizer=true"),
        (bool(settings.get("use_precision_aware_optimizer")), "megatron.use_precision_aware_optimizer=true"),
        (0 < fraction <= 1, f"megatron.optimizer_offload_fraction greater than 0 and at most 1 (it is {fraction:g})"),
    ]
    missing = [remedy for holds, remedy in rules if not holds]
    if missing:
        raise ValueError(f"megatron.optimizer_cpu_offload needs {', '.join(missing)}: set that, or remove it")


def check_lending(settings: Mapping[str, Any], lending: OptimizerSettings) -> None:
    """Raise `ValueError` where `optimizer.lend` would move what `megatron` has placed."""
    rules = [
        ("nccl_ub", lending.lends_gradients, "none", "registers the gradient buffers with NCCL where they lie"),
        ("optimizer_cpu_offload", lending.lends_state, "gradients", "keeps optimizer state in host memory"),
    ]
    for name, is_lent, remedy, reason in rules:
        if settings.get(name) and is_lent:
            raise ValueError(
                f"optimizer.lend={lending.lend} is impossible: megatron.{name} {reason}; set it to {remedy}"
            )


def offload_problem(settings: Mapping[str, Any], capabilities: Capabilities) -> str | None:
    """Return why this machine cannot do what `megatron.optimizer_cpu_offload` says; None when it can, or need not."""
    if not settings.get("optimizer_cpu_offload"):
        return None
    if not capabilities.has_cuda:
        return "megatron.optimizer_cpu_offload moves state from a GPU to the host: without CUDA remove it"
    if capabilities.transformer_engine_problem is not None:
        return (
            "megatron.optimizer_cpu_offload needs Transformer Engine's Adam, because megatron-core does not restore "
            f"the offloaded state of torch's: Transformer Engine {capabilities.transformer_engine_problem}"
        )
    return None


def _fields(target: type) -> dict[str, Any]:
    """Return the default of each field."""
    return {item.name: item.default for item in dataclasses.fields(target)}


def _check_name(name: str, known: set[str]) -> None:
    if name in EXPERT_SIZES:
        raise ValueError(
            f"megatron.{name} is not supported: every rank computes its cut of all experts. Remove it; "
            "parallel.tensor cuts them smaller"
        )
    if name in OWNERS:
        owner = OWNERS[name]
        remedy = "remove it from megatron" if owner == "the trainer" else "set that instead"
        raise ValueError(f"megatron.{name} is decided by {owner}: {remedy}")
    if name not in known:
        hint = did_you_mean(name, known, "megatron.")
        raise ValueError(
            f"megatron.{name} is not a field of the installed megatron-core's TransformerConfig, OptimizerConfig or "
            f"DistributedDataParallelConfig{hint}"
        )


def _converted(name: str, value: Any, default: Any) -> Any:
    """Return the value as megatron-core takes it: YAML has no dtypes."""
    if not isinstance(default, torch.dtype):
        return value
    dtype = getattr(torch, str(value), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"megatron.{name}={value!r} must be the name of a torch dtype, such as float32 or bfloat16")
    return dtype
