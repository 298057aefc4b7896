"""The policy as a Megatron GPT model: built from a Hugging Face config.json, log-probs instead of logits.

T packed tokens, N response tokens among them, D hidden size.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.model.architecture import Architecture, Experts
from megatron_p2o.policy.model.attention import PackLayout
from megatron_p2o.policy.model.head import HeadInput, PolicyHead
from megatron_p2o.policy.model.layer_choice import LayerBackend
from megatron_p2o.policy.model.layer_specs import block_spec
from megatron_p2o.rl.packing import rounded_up
from p2o_kernels import HeadOptions


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: Literal["float32", "bfloat16"],
    overrides: Mapping[str, Any],
) -> TransformerConfig:
    """Return Megatron's configuration of the model.

    Args:
        overrides: fields of TransformerConfig that nothing else decides; see `MegatronOverrides`.

    Raises:
        ValueError: a size does not divide.
    """
    _check_divides(architecture, parallel)
    settings = _decided_settings(architecture, parallel, dtype)
    return TransformerConfig(**{**settings, **overrides})


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Return the rows of the embedding: `vocab_size` rounded up to a multiple of the tensor-parallel size."""
    return rounded_up(vocab_size, tensor)


def build_models(
    architecture: Architecture,
    config: TransformerConfig,
    temperature: float,
    layers: LayerBackend,
    head: HeadOptions | None = None,
) -> "list[PolicyModel]":
    """Return this rank's pipeline stages, weights uninitialised. Megatron's groups must exist.

    One, or `parallel.virtual_pipeline` of the interleaved schedule: chunk c of stage s comes after chunk c of stage
    s - 1 and before all chunks c + 1.
    """
    num_chunks = config.virtual_pipeline_model_parallel_size
    if num_chunks is None:
        return [_build_stage(architecture, config, temperature, layers, head, None)]
    return [_build_stage(architecture, config, temperature, layers, head, chunk) for chunk in range(num_chunks)]


def _build_stage(
    architecture: Architecture,
    config: TransformerConfig,
    temperature: float,
    layers: LayerBackend,
    head: HeadOptions | None,
    chunk: int | None,
) -> "PolicyModel":
    return PolicyModel(
        config,
        block_spec(config, chunk, layers),
        vocab_size=padded_vocab_size(architecture.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        share_embeddings_and_output_weights=architecture.ties_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,  # pyright: ignore[reportArgumentType]
        rope_scaling=architecture.rope_scaling_factor is not None,
        rope_scaling_factor=architecture.rope_scaling_factor or 1.0,
        parallel_output=True,
        real_vocab_size=architecture.vocab_size,
        temperature=temperature,
        head_options=head,
    )


class PolicyModel(GPTModel):
    """GPT whose last stage returns its head's result for a `HeadInput`: log-probs or the loss.

    Call: `model(input_ids, position_ids, None, packed_seq_params=PackLayout, labels=HeadInput)`, ids [1, T];
    positions restart at each sample. Other stages return hidden states. Without
    labels the logits are returned.
    """

    def __init__(
        self,
        *args: Any,
        real_vocab_size: int,
        temperature: float,
        head_options: HeadOptions | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.temperature = temperature
        self.head_options = head_options
        # Each token's position is looked up below; Megatron would take a context rank's part of the table.
        self.rotary_pos_emb.cp_group = None
        if self.post_process:
            self.output_layer.__class__ = PolicyHead

    def _preprocess(self, *, position_ids: Tensor, packed_seq_params: PackLayout, **kwargs: Any) -> tuple[Any, ...]:
        """Return Megatron's inputs of the decoder with the rotary embedding taken at each token's own position."""
        decoder_input, rotary_L, *rest = super()._preprocess(
            position_ids=position_ids, packed_seq_params=packed_seq_params, **kwargs
        )
        assert isinstance(rotary_L, Tensor)
        return (decoder_input, rotary_L.index_select(0, position_ids.flatten()), *rest)

    def _postprocess(self, hidden_states: Tensor, *, labels: HeadInput | None, **kwargs: Any) -> Any:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, labels=None, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(
            hidden_states,
            weight=weight,
            head_input=labels,
            temperature=self.temperature,
            vocab_size=self.real_vocab_size,
            options=self.head_options,
        )


def _decided_settings(
    architecture: Architecture, parallel: ParallelConfig, dtype: Literal["float32", "bfloat16"]
) -> dict[str, Any]:
    """Return the fields of TransformerConfig that the model, the layout or the algorithm decide."""
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    return {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "ffn_hidden_size": architecture.intermediate_size,
        "layernorm_epsilon": architecture.norm_epsilon,
        "normalization": "RMSNorm",
        "qk_layernorm": architecture.model_type.has_qk_norm,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.model_type.has_qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        # Two stages that exchange activations in both directions in one batch swap them: silently wrong results.
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.is_sequence_parallel,
        "params_dtype": torch_dtype,
        "pipeline_dtype": torch_dtype,
        "bf16": dtype == "bfloat16",
        # The loss is a sum over tokens, divided once by the global count.
        "calculate_per_token_loss": True,
        # Packs differ in length; Megatron asks for the dispatcher below with it, even without experts.
        "variable_seq_lengths": parallel.pipeline > 1,
        **_expert_settings(architecture.experts),
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Although every weight is read from model.path: initialisation is also what marks the cut parameters, and
        # without the marks the gradient norm counts them on one tensor rank only.
        "perform_initialization": True,
    }


def _expert_settings(experts: Experts | None) -> dict[str, Any]:
    """Return the fields about experts; every rank holds its cut of all of them."""
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if experts is None:
        return settings
    return settings | {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.num_experts_per_token,
        "moe_ffn_hidden_size": experts.intermediate_size,
        # Softmax over the chosen experts only is the same as dividing their weights by the sum.
        "moe_router_pre_softmax": not experts.normalizes_weights,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": False,
    }


def _check_divides(architecture: Architecture, parallel: ParallelConfig) -> None:
    experts = architecture.experts
    inner = ("intermediate_size", architecture.intermediate_size)
    if experts is not None:
        inner = ("moe_intermediate_size", experts.intermediate_size)
        if parallel.tensor > 1 and not parallel.is_sequence_parallel:
            raise ValueError("parallel.tensor > 1 with experts needs sequence parallelism: leave parallel.sequence out")
    for name, size in (
        ("num_key_value_heads", architecture.num_kv_heads),
        ("num_attention_heads", architecture.num_heads),
        inner,
    ):
        if size % parallel.tensor:
            raise ValueError(f"parallel.tensor={parallel.tensor} must divide the model's {name}={size}")
    if architecture.num_layers % (parallel.pipeline * parallel.virtual_pipeline):
        virtual = f" x parallel.virtual_pipeline={parallel.virtual_pipeline}" if parallel.virtual_pipeline > 1 else ""
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline}{virtual} must divide the model's num_hidden_layers="
            f"{architecture.num_layers}"
        )
