"""Hugging Face directories and the Megatron layout of weights."""

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM

from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.policy.weights.hf_directory import WeightFiles, write_hf_directory
from megatron_p2o.policy.weights.hf_weights import LAYER_MAPPINGS, join_parts, mapping_of, split_parts
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.testing.tiny_model_types import TINY_MODEL_TYPES, write_tiny_model

QKV = LAYER_MAPPINGS["self_attention.linear_qkv.weight"]


def test_each_key_value_group_holds_its_query_heads_then_key_then_value():
    head_dim, num_groups = 2, 2
    query = torch.arange(8.0)[:, None]  # four heads, two per group
    key, value = 100 + torch.arange(4.0)[:, None], 200 + torch.arange(4.0)[:, None]
    joined = join_parts([query, key, value], QKV, num_groups)
    assert joined.flatten().tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    parts = split_parts(joined, QKV, num_groups, head_dim)
    assert all(torch.equal(part, original) for part, original in zip(parts, (query, key, value), strict=True))


def test_layers_of_a_later_stage_have_global_numbers():
    mapping = mapping_of("decoder.layers.1.mlp.linear_fc1.weight", layer_offset=18, ties_embeddings=False)
    assert mapping.names == ("model.layers.19.mlp.gate_proj.weight", "model.layers.19.mlp.up_proj.weight")
    assert mapping_of("output_layer.weight", 0, True).names == ("model.embed_tokens.weight",)
    assert mapping_of("output_layer.weight", 0, False).names == ("lm_head.weight",)


@pytest.mark.parametrize("style", ["local_experts.37.linear_fc{}.weight", "linear_fc{}.weight37"])
def test_an_expert_has_its_number_in_either_form_of_megatrons_names(style: str):
    prefix, parts = "decoder.layers.2.mlp.experts.", "model.layers.3.mlp.experts.37."
    assert mapping_of(prefix + style.format(1), 1, False).names == (
        f"{parts}gate_proj.weight",
        f"{parts}up_proj.weight",
    )
    down = mapping_of(prefix + style.format(2), 1, False)
    assert (down.names, down.cut_dimension) == ((f"{parts}down_proj.weight",), 1)


@pytest.mark.parametrize("model_type", TINY_MODEL_TYPES)
def test_the_expected_tensors_are_those_transformers_writes(tmp_path: Path, model_type: str):
    directory = write_tiny_model(tmp_path, model_type)
    state = load_file(directory / "model.safetensors")
    assert read_architecture(directory).weight_shapes() == {name: tuple(value.shape) for name, value in state.items()}


def test_one_error_names_every_tensor_that_does_not_fit(tmp_path: Path):
    source = write_tiny_model(tmp_path, "qwen2-tied")
    state = load_file(source / "model.safetensors")
    shapes = read_architecture(source).weight_shapes()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors")
    with WeightFiles(source) as files:
        files.check(shapes)  # a tied head that is stored all the same does no harm
    del state["model.norm.weight"], state["model.layers.1.self_attn.q_proj.bias"]
    state["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(8)
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(63, 32)
    save_file(state, source / "model.safetensors")
    with WeightFiles(source) as files, pytest.raises(ValueError, match=r"not those of its config\.json") as caught:
        files.check(shapes)
    text = str(caught.value)
    assert "2 missing: model.layers.1.self_attn.q_proj.bias, model.norm.weight" in text
    assert "1 unknown: model.layers.0.self_attn.q_norm.weight" in text
    assert "1 of another shape: model.layers.0.mlp.up_proj.weight (63, 32) instead of (64, 32)" in text


def test_only_the_pages_of_a_cut_are_read(tmp_path: Path):
    """From a file of 4 GiB that is all hole but its end; pages read stay in memory while it is open."""
    rows, columns = 2**14, 2**16
    header = json.dumps({"big": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.seek((rows - 2) * columns * 4, os.SEEK_CUR)
        file.write(torch.arange(2.0 * columns).numpy().tobytes())
    with WeightFiles(tmp_path) as files:
        before = psutil.Process().memory_info().rss
        cut = files.read("big", 0, rows - 2, rows)
        assert torch.equal(cut.flatten(), torch.arange(2.0 * columns))
        assert psutil.Process().memory_info().rss - before < 2**26


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path):
    source = write_tiny_qwen3(tmp_path / "source")

    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.norm.weight", torch.zeros(32)
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError):
        write_hf_directory(failing(), source, tmp_path / "written", max_file_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(ValueError, match=r"source exists: name a directory that does not"):
        write_hf_directory(iter(()), source, source)


def test_the_writer_holds_no_more_than_one_file_of_tensors(tmp_path: Path):
    source = write_tiny_qwen3(tmp_path / "source")
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for number in range(40):
            tensor = torch.full((250,), float(number))  # 1,000 bytes
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"tensor-{number}", tensor
            del tensor

    write_hf_directory(weights(), source, tmp_path / "written", max_file_bytes=5_000)
    assert most <= 6
    assert len(list((tmp_path / "written").glob("model-*-of-00008.safetensors"))) == 8


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
    (tmp_path / "usual").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "written").iterdir()}
    assert modes == {(tmp_path / "usual").stat().st_mode}, "who may read the tokenizer may read the weights"


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
