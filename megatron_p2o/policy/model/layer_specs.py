"""Specifications of Megatron's transformer layers: its modules or Transformer Engine's, with our attention and norms.

Both have the same parameters, by different names (`hf_weights.LAYER_MAPPINGS`), and the same names in a checkpoint.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_p2o.policy.model.attention import PackedCoreAttention
from megatron_p2o.policy.model.layer_choice import LayerBackend


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm that, unlike Megatron's torch wrapper, may be used under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Tells Megatron to add this gradient over the tensor ranks, each of which sees its own positions.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def block_spec(config: TransformerConfig, chunk: int | None, layers: LayerBackend) -> TransformerBlockSubmodules:
    """Return the layers of this rank's pipeline stage and its final norm; `chunk` of an interleaved pipeline."""
    layer = _transformer_engine_layer(config) if layers == "transformer_engine" else _local_layer(config)
    if config.qk_layernorm:
        submodules: Any = layer.submodules
        attention = submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # An explicit block spec, so that the final norm is ours too.
    num_layers = get_num_layers_to_build(config, vp_stage=chunk)
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    # Without Transformer Engine the router of megatron-core 0.16.1 tests this name, which it never defined.
    if not hasattr(moe_utils, "te_general_gemm"):
        setattr(moe_utils, "te_general_gemm", None)  # noqa: B010
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    submodules: Any = layer.submodules
    submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
    submodules.self_attention.submodules.core_attention = PackedCoreAttention
    return layer


def _transformer_engine_layer(config: TransformerConfig) -> ModuleSpec:
    """Return a layer whose norms are part of the linear layers that follow, except the one before experts."""
    # Imported here: without Transformer Engine there is no class to derive from.
    from megatron_p2o.policy.model.transformer_engine_attention import PackedTransformerEngineAttention

    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
    )
    submodules: Any = layer.submodules
    submodules.self_attention.submodules.core_attention = PackedTransformerEngineAttention
    if config.num_moe_experts is not None:
        submodules.pre_mlp_layernorm = RMSNorm
        # As Megatron names it in a checkpoint of local layers.
        names = {**submodules.sharded_state_dict_keys_map, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        submodules.sharded_state_dict_keys_map = names
    return layer
