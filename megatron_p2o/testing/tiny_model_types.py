"""Write a tiny random model of each model type the policy computes, without a tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Llama 3.2's."""

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

TINY_MODEL_TYPES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "llama": {"model_type": "llama"},
    "llama-3.2": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    "qwen3-moe": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True, **EXPERTS},
    "qwen3-moe-raw-weights": {"model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": False, **EXPERTS},
}
"""Settings of config.json in which they differ from the common ones of `write_tiny_model`."""


def write_tiny_model(directory: Path, model_type: str, *, vocab_size: int = 131, seed: int = 0) -> Path:
    """Write config.json and float32 safetensors of `TINY_MODEL_TYPES[model_type]`; return `directory`.

    Norm weights and biases are random too, so that one which is left out or mixed up shows. Torch's global random
    state is untouched.
    """
    config = AutoConfig.for_model(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 1,
            **TINY_MODEL_TYPES[model_type],
        }
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                # Peaked distributions, in which errors show.
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


QWEN3_4B: dict[str, Any] = {
    **{"model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 40960},
    **{"num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "vocab_size": 151936},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
}
"""From the published config.json."""
