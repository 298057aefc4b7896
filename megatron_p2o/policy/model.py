"""The policy as a Megatron GPT model: built from a Hugging Face config.json, log-probs instead of logits.

T packed tokens, N response tokens among them, D hidden size.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_p2o.config import ParallelConfig
from megatron_p2o.policy.attention import PackedCoreAttention, PackLayout
from megatron_p2o.policy.head import LogprobHead


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a Hugging Face config.json of a dense Qwen3 says."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    max_positions: int
    ties_embeddings: bool
    """The LM head is the embedding."""


def read_architecture(directory: Path) -> Architecture:
    """Return the architecture of a Hugging Face model directory.

    Raises:
        ValueError: not a dense Qwen3, or it uses a feature the trainer does not compute.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path={directory} has no config.json: name a Hugging Face model directory")
    settings = json.loads(path.read_text())
    _check_supported(settings, path)
    return Architecture(
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        num_heads=settings["num_attention_heads"],
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"],
        intermediate_size=settings["intermediate_size"],
        vocab_size=settings["vocab_size"],
        norm_epsilon=settings["rms_norm_eps"],
        rope_theta=float(_rope(settings)["rope_theta"]),
        max_positions=settings["max_position_embeddings"],
        ties_embeddings=bool(settings.get("tie_word_embeddings", False)),
    )


def transformer_config(
    architecture: Architecture,
    parallel: ParallelConfig,
    dtype: Literal["float32", "bfloat16"],
    overrides: Mapping[str, Any],
) -> TransformerConfig:
    """Return Megatron's configuration of the model.

    Args:
        overrides: `megatron:` of the run's configuration; fields of TransformerConfig that nothing else decides.

    Raises:
        ValueError: a size does not divide, or an override is unknown or already decided elsewhere.
    """
    _check_divides(architecture, parallel)
    settings = _decided_settings(architecture, parallel, dtype)
    _check_overrides(overrides, settings)
    return TransformerConfig(**{**settings, **overrides})


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Return the rows of the embedding: `vocab_size` rounded up to a multiple of the tensor-parallel size."""
    return -(-vocab_size // tensor) * tensor


def build_model(architecture: Architecture, config: TransformerConfig, temperature: float) -> "PolicyModel":
    """Return this rank's pipeline stage, weights uninitialised. Megatron's groups must exist."""
    return PolicyModel(
        config,
        _block_spec(config),
        vocab_size=padded_vocab_size(architecture.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=architecture.ties_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,  # pyright: ignore[reportArgumentType]
        parallel_output=True,
        real_vocab_size=architecture.vocab_size,
        temperature=temperature,
    )


class PolicyModel(GPTModel):
    """GPT whose last stage returns (logprobs_N, entropy_N) of the labels where `loss_mask` is set.

    Call: `model(input_ids, position_ids, None, packed_seq_params=PackLayout, labels=..., loss_mask=...)`, all [1, T];
    positions restart at each sample. Other stages return hidden states. Without labels the logits are returned.
    """

    def __init__(self, *args: Any, real_vocab_size: int, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.temperature = temperature
        if self.post_process:
            self.output_layer.__class__ = LogprobHead

    def _preprocess(self, *, position_ids: Tensor, packed_seq_params: PackLayout, **kwargs: Any) -> tuple[Any, ...]:
        """Return Megatron's inputs of the decoder with the rotary embedding taken at each token's own position."""
        decoder_input, rotary_L, *rest = super()._preprocess(
            position_ids=position_ids, packed_seq_params=packed_seq_params, **kwargs
        )
        assert isinstance(rotary_L, Tensor)
        return (decoder_input, rotary_L.index_select(0, position_ids.flatten()), *rest)

    def _postprocess(
        self, hidden_states: Tensor, *, labels: Tensor | None, loss_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, labels=None, loss_mask=loss_mask, **kwargs)
        assert loss_mask is not None
        # The only place that decides which positions reach the head.
        rows_N = loss_mask.flatten().nonzero().squeeze(1)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(
            hidden_states,
            weight=weight,
            targets_N=labels.flatten().index_select(0, rows_N),
            rows_N=rows_N,
            temperature=self.temperature,
            vocab_size=self.real_vocab_size,
        )


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


def _block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    submodules: Any = layer.submodules
    norm: Any = RMSNorm
    submodules.input_layernorm = submodules.pre_mlp_layernorm = norm
    attention = submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = norm
    attention.core_attention = PackedCoreAttention
    # An explicit block spec, so that the final norm is ours too.
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)


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
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "sequence_parallel": parallel.sequence,
        "params_dtype": torch_dtype,
        "pipeline_dtype": torch_dtype,
        "bf16": dtype == "bfloat16",
        # The loss is a sum over tokens, divided once by the global count.
        "calculate_per_token_loss": True,
        # Packs differ in length; Megatron asks for this dispatcher with it, even without experts.
        "variable_seq_lengths": parallel.pipeline > 1,
        "moe_token_dispatcher_type": "alltoall",
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Although every weight is read from model.path: initialisation is also what marks the cut parameters, and
        # without the marks the gradient norm counts them on one tensor rank only.
        "perform_initialization": True,
    }


def _check_overrides(overrides: Mapping[str, Any], decided: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for key in overrides:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean megatron.{nearest[0]}?" if nearest else ""
            raise ValueError(f"megatron.{key} is not a field of the installed megatron-core's TransformerConfig{hint}")
        if key in decided:
            raise ValueError(
                f"megatron.{key} is decided by model.path, model.dtype or parallel: remove it from megatron"
            )


def _check_divides(architecture: Architecture, parallel: ParallelConfig) -> None:
    for name, size in (
        ("num_key_value_heads", architecture.num_kv_heads),
        ("num_attention_heads", architecture.num_heads),
        ("intermediate_size", architecture.intermediate_size),
    ):
        if size % parallel.tensor:
            raise ValueError(f"parallel.tensor={parallel.tensor} must divide the model's {name}={size}")
    if architecture.num_layers % parallel.pipeline:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} must divide the model's num_hidden_layers={architecture.num_layers}"
        )


def _check_supported(settings: Mapping[str, Any], path: Path) -> None:
    rope_type = _rope(settings).get("rope_type", "default")
    rules = [
        (settings.get("model_type") == "qwen3", f"model_type is {settings.get('model_type')!r}, must be 'qwen3'"),
        (settings.get("hidden_act") == "silu", f"hidden_act is {settings.get('hidden_act')!r}, must be 'silu'"),
        (not settings.get("attention_bias"), "attention_bias is set"),
        (not settings.get("use_sliding_window"), "use_sliding_window is set"),
        (rope_type == "default", f"the rotary embedding is scaled ({rope_type!r})"),
    ]
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ValueError(f"{path}: {'; '.join(broken)}. The trainer supports dense Qwen3 models without these")


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rotary settings of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    if settings.get("rope_parameters"):
        return settings["rope_parameters"]
    scaling = settings.get("rope_scaling") or {}
    return {
        "rope_theta": settings.get("rope_theta", 10000.0),
        "rope_type": scaling.get("rope_type", scaling.get("type", "default")),
    }
