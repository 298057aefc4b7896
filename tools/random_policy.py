"""Policies of published shapes with random weights: what the benchmarks of this folder run on."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench.measure import environment  # noqa: E402

from megatron_p2o.config.tree import (  # noqa: E402
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    one_task,
)
from megatron_p2o.policy.model.architecture import read_architecture  # noqa: E402
from megatron_p2o.policy.weights.hf_directory import write_hf_directory  # noqa: E402

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 8192,
    },
    "107m": {
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32768,
    },
}
"""Settings of config.json beside those of `QWEN3`."""


def measured_on(device: torch.device) -> dict[str, str]:
    """Return device, versions and commit."""
    return environment(device) | {"megatron-core": version("megatron-core")}


def write_config(folder: Path, shape: str, num_layers: int | None = None) -> Path:
    """Write the config.json of a shape, with its own number of layers or `num_layers`; return the folder."""
    folder.mkdir(exist_ok=True)
    cut = {} if num_layers is None else {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(QWEN3 | SHAPES[shape] | cut))
    return folder


def write_random_model(folder: Path, shape: str, device: torch.device, num_layers: int | None = None) -> Path:
    """Write a Hugging Face directory with normal weights of deviation 0.02 and norms of 1; return it."""
    source = write_config(folder / "source", shape, num_layers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, size in read_architecture(source).weight_shapes().items():
            if len(size) == 1:
                yield name, torch.ones(size, dtype=dtype)
            else:
                yield name, (0.02 * torch.randn(size, generator=generator, device=device)).to(dtype).cpu()

    write_hf_directory(weights(), source, folder / "model")
    return folder / "model"


def bench_config(model_path: Path, num_tokens: int, device: torch.device, *, recompute: bool = False) -> Config:
    """Return the settings of a policy whose micro-batch has `num_tokens` and whose steps leave it where it is."""
    overrides = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return Config(
        run=RunConfig(name="bench"),
        model=ModelConfig(path=str(model_path), dtype="bfloat16" if device.type == "cuda" else "float32"),
        data=DataConfig(train=one_task("")),
        objective=ObjectiveConfig(context="replace"),
        # A step so small that arms which take turns stay at the same weights.
        optimizer=OptimizerConfig(lr=1e-12, weight_decay=0.0, micro_batch_tokens=num_tokens),
        megatron=overrides if recompute else {},
    )
