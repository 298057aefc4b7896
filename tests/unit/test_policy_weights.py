"""Hugging Face directories and the Megatron layout of weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megatron_p2o.policy.hf_directory import WeightFiles, write_hf_directory
from megatron_p2o.policy.hf_weights import LAYER_ORIGINS, join_parts, origin_of, split_parts
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

QKV = LAYER_ORIGINS["self_attention.linear_qkv.weight"]


def test_each_key_value_group_holds_its_query_heads_then_key_then_value():
    head_dim, num_groups = 2, 2
    query = torch.arange(8.0)[:, None]  # four heads, two per group
    key, value = 100 + torch.arange(4.0)[:, None], 200 + torch.arange(4.0)[:, None]
    joined = join_parts([query, key, value], QKV, num_groups)
    assert joined.flatten().tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    parts = split_parts(joined, QKV, num_groups, head_dim)
    assert all(torch.equal(part, original) for part, original in zip(parts, (query, key, value), strict=True))


def test_layers_of_a_later_stage_have_global_numbers():
    origin = origin_of("decoder.layers.1.mlp.linear_fc1.weight", layer_offset=18, ties_embeddings=False)
    assert origin.names == ("model.layers.19.mlp.gate_proj.weight", "model.layers.19.mlp.up_proj.weight")
    assert origin_of("output_layer.weight", 0, True).names == ("model.embed_tokens.weight",)
    assert origin_of("output_layer.weight", 0, False).names == ("lm_head.weight",)


def test_a_written_directory_is_read_by_transformers_and_by_us(tmp_path: Path):
    source = write_tiny_qwen3(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    write_hf_directory(iter(state.items()), source, tmp_path / "written", max_file_bytes=20_000)

    index = json.loads((tmp_path / "written" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state)
    assert len(set(index["weight_map"].values())) > 2
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "written")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "written").encode("1+1") == AutoTokenizer.from_pretrained(
        source
    ).encode("1+1")
    with WeightFiles(tmp_path / "written") as files:
        assert all(torch.equal(files.read(name), tensor) for name, tensor in state.items())


def test_the_configuration_names_the_type_of_the_written_weights(tmp_path: Path):
    source = write_tiny_qwen3(tmp_path / "source")
    state = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    write_hf_directory(iter(state.items()), source, tmp_path / "written")
    assert json.loads((tmp_path / "written" / "config.json").read_text())["dtype"] == "bfloat16"
    assert Qwen3ForCausalLM.from_pretrained(tmp_path / "written", dtype="auto").dtype == torch.bfloat16


def test_cuts_are_parts_of_the_tensor(tmp_path: Path):
    source = write_tiny_qwen3(tmp_path)
    name = "model.layers.0.self_attn.o_proj.weight"
    whole = load_file(source / "model.safetensors")[name]
    with WeightFiles(source) as files:
        assert files.shape(name) == tuple(whole.shape)
        assert torch.equal(files.read(name, 0, 3, 9), whole[3:9])
        assert torch.equal(files.read(name, 1, 8, 16), whole[:, 8:16])
        assert files.read("model.embed_tokens.weight", 0, 256, 256).shape == (0, 32)


def test_missing_weights_are_named(tmp_path: Path):
    source = write_tiny_qwen3(tmp_path / "source")
    with WeightFiles(source) as files, pytest.raises(ValueError, match=r"has no tensor model\.layers\.9"):
        files.read("model.layers.9.mlp.up_proj.weight")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        WeightFiles(tmp_path / "empty")
