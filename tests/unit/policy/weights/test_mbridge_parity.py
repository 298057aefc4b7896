"""Our table of weights against mbridge's, which others convert with: names, order inside a parameter, tensor cuts.

Only its conversion of tensors is called: building its models needs Transformer Engine.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.policy.weights.hf_weights import LAYER_MAPPINGS, MODEL_MAPPINGS, join_parts, mapping_of, split_parts
from megatron_p2o.testing.tiny_model_types import write_tiny_model

mbridge = pytest.importorskip(
    "mbridge", reason="mbridge is not installed (pip install --no-deps mbridge einops, to compare the tables)"
)

NUM_RANKS = 2


def bridge_of(directory: Path) -> Any:
    """Return mbridge's converter of a model without building Megatron's configuration."""
    config = AutoConfig.from_pretrained(directory)
    bridge = object.__new__(mbridge.core.bridge._MODEL_REGISTRY[config.model_type])
    bridge.hf_config, bridge.dtype, bridge.make_vocab_size_divisible_by = config, torch.float32, None
    bridge.config = SimpleNamespace(gated_linear_unit=True)
    bridge._adjust_mapping_for_shared_weights()
    return bridge


def parameter_names(hf_names: set[str]) -> list[str]:
    """Return the parameters of a model in Transformer Engine's form, of the layers those of layer 1 and expert 3."""
    has_experts = any(".experts." in name for name in hf_names)
    other_form = {
        "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight" if has_experts else "pre_mlp_layernorm.weight",
    }
    inside = [name.replace("{expert}", "3") for name in LAYER_MAPPINGS if name not in other_form]
    names = [*MODEL_MAPPINGS, *(f"decoder.layers.1.{name}" for name in inside if "local_experts" not in name)]
    return [name for name in names if set(mapping_of(name, 0, ties_embeddings=False).names) <= hf_names]


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama", "qwen3-moe"])
def test_parameters_and_their_tensor_cuts_equal_mbridges(tmp_path: Path, model_type: str):
    directory = write_tiny_model(tmp_path, model_type, vocab_size=132)
    bridge, architecture = bridge_of(directory), read_architecture(directory)
    state = load_file(directory / "model.safetensors")
    names = parameter_names(set(state))
    assert len(names) >= {"qwen3": 11, "qwen2": 10, "llama": 9, "qwen3-moe": 12}[model_type]
    for name in names:
        mapping = mapping_of(name, 0, ties_embeddings=False)
        assert list(mapping.names) == bridge._weight_name_mapping_mcore_to_hf(name), name
        whole = [state[part] for part in mapping.names]
        merged = bridge._weight_to_mcore_format(name, whole)
        ours = [_cut(whole, mapping, rank, architecture.num_kv_heads) for rank in range(NUM_RANKS)]
        theirs = bridge._weight_split_across_tp(name, merged, ours[0], NUM_RANKS)
        assert all(torch.equal(cut, other) for cut, other in zip(ours, theirs, strict=True)), name
        back_names, back = bridge._weight_to_hf_format(name, merged)
        split = split_parts(merged, mapping, architecture.num_kv_heads, architecture.head_dim)
        assert back_names == list(mapping.names)
        assert all(torch.equal(part, other) for part, other in zip(split, back, strict=True)), name


def _cut(whole: list[torch.Tensor], mapping: Any, rank: int, num_groups: int) -> torch.Tensor:
    if mapping.cut_dimension is None:
        return join_parts(whole, mapping, num_groups)
    parts = [tensor.chunk(NUM_RANKS, dim=mapping.cut_dimension)[rank] for tensor in whole]
    return join_parts(parts, mapping, num_groups // NUM_RANKS)
