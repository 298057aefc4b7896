"""Reading a Hugging Face configuration, and what Megatron is told."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.policy.model.layer_choice import Capabilities
from megatron_p2o.policy.model.model import padded_vocab_size, transformer_config
from megatron_p2o.policy.model.parallel import check_world_size, data_rank_of
from megatron_p2o.policy.training.megatron_settings import check_offload, megatron_overrides, offload_problem
from megatron_p2o.testing.tiny_model_types import LLAMA3_ROPE

QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
"""As published, in the form of transformers 4."""

QWEN3_30B_EXPERTS = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


def architecture_of(settings: dict[str, Any], directory: Path) -> Architecture:
    (directory / "config.json").write_text(json.dumps(settings))
    return read_architecture(directory)


def test_a_published_configuration_gives_megatrons_sizes(tmp_path: Path):
    architecture = architecture_of(QWEN3_4B, tmp_path)
    assert architecture.rope_theta == 1e6
    assert architecture.ties_embeddings
    config = transformer_config(architecture, ParallelConfig(tensor=8, pipeline=2, sequence=False), "bfloat16", {})
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (36, 2560, 9728)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (32, 8, 128)
    assert config.params_dtype == torch.bfloat16 and config.bf16
    assert config.variable_seq_lengths and config.qk_layernorm and config.normalization == "RMSNorm"


def test_each_family_gets_its_biases_norms_and_experts(tmp_path: Path):
    def config_of(**change: Any) -> TransformerConfig:
        architecture = architecture_of({**QWEN3_4B, **change}, tmp_path)
        return transformer_config(architecture, ParallelConfig(tensor=2, sequence=True), "bfloat16", {})

    qwen2, llama = config_of(model_type="qwen2"), config_of(model_type="llama")
    assert (qwen2.add_qkv_bias, qwen2.qk_layernorm, qwen2.add_bias_linear) == (True, False, False)
    assert (llama.add_qkv_bias, llama.qk_layernorm, llama.num_moe_experts) == (False, False, None)
    moe = config_of(**QWEN3_30B_EXPERTS)
    assert (moe.num_moe_experts, moe.moe_router_topk, moe.moe_ffn_hidden_size) == (128, 8, 768)
    assert moe.qk_layernorm and not moe.moe_router_pre_softmax
    assert config_of(**QWEN3_30B_EXPERTS | {"norm_topk_prob": False}).moe_router_pre_softmax


def test_experts_are_cut_over_the_tensor_ranks_only(tmp_path: Path):
    architecture = architecture_of({**QWEN3_4B, **QWEN3_30B_EXPERTS}, tmp_path)
    with pytest.raises(ValueError, match=r"needs sequence parallelism: leave parallel\.sequence out"):
        transformer_config(architecture, ParallelConfig(tensor=2, sequence=False), "float32", {})
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        with pytest.raises(ValueError, match=rf"megatron\.{name} is not supported: .* Remove it; parallel\.tensor"):
            megatron_overrides({name: 2})


def test_rope_theta_is_found_in_the_form_of_transformers_5(tmp_path: Path):
    settings = {**QWEN3_4B, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    del settings["rope_theta"]
    assert architecture_of(settings, tmp_path).rope_theta == 5e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3', must be one of llama, qwen2, qwen3, qwen3_moe"),
        ({"attention_bias": True}, "attention_bias is set"),
        ({"use_sliding_window": True}, "use_sliding_window is set"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rotary embedding is scaled \('yarn'\)"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, r"low_freq_factor is 2\.0, must be 1"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is set"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers is set"),
    ],
)
def test_what_the_trainer_does_not_compute_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        architecture_of({**QWEN3_4B, **change}, tmp_path)


def test_a_directory_without_configuration_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.path=.* has no config\.json"):
        read_architecture(tmp_path)


def test_megatron_overrides_reach_the_configuration(tmp_path: Path):
    architecture = architecture_of(QWEN3_4B, tmp_path)
    overrides = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    divided = megatron_overrides(overrides | {"overlap_param_gather": True, "main_grads_dtype": "bfloat16"})
    assert divided.data_parallel == {"overlap_param_gather": True}
    assert divided.optimizer == {"overlap_param_gather": True, "main_grads_dtype": torch.bfloat16}
    config = transformer_config(architecture, ParallelConfig(), "float32", divided.transformer)
    assert config.recompute_granularity == "full"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"overlap_grad_reduc": True}, r"did you mean megatron\.overlap_grad_reduce\?"),
        ({"lr": 1e-3}, r"megatron\.lr is decided by optimizer\.lr: set that instead"),
        ({"hidden_dropout": 0.1}, r"megatron\.hidden_dropout is decided by the trainer: remove it"),
        ({"main_grads_dtype": "bf16"}, r"megatron\.main_grads_dtype='bf16' must be the name of a torch dtype"),
        ({"recompute_granularty": "full"}, r"did you mean megatron\.recompute_granularity\?"),
        ({"hidden_size": 128}, r"megatron\.hidden_size is decided by model\.path"),
        ({"sequence_parallel": True}, r"megatron\.sequence_parallel is decided by parallel\.sequence"),
    ],
)
def test_unknown_and_decided_overrides_are_refused(overrides: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        megatron_overrides(overrides)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            ParallelConfig(tensor=16, sequence=False),
            r"parallel\.tensor=16 must divide the model's num_key_value_heads=8",
        ),
        (ParallelConfig(pipeline=5), r"parallel\.pipeline=5 must divide the model's num_hidden_layers=36"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path: Path, parallel: ParallelConfig, message: str):
    with pytest.raises(ValueError, match=message):
        transformer_config(architecture_of(QWEN3_4B, tmp_path), parallel, "float32", {})


def test_the_vocabulary_is_padded_to_a_multiple_of_the_tensor_ranks():
    assert [padded_vocab_size(131, tensor) for tensor in (1, 2, 4, 8)] == [131, 132, 132, 136]
    assert padded_vocab_size(151936, 8) == 151936


def test_a_wrong_number_of_processes_is_explained():
    parallel = ParallelConfig(tensor=2, pipeline=2, data=1, sequence=False)
    check_world_size(parallel, 4)
    with pytest.raises(ValueError, match=r"= 4 must equal .* 8: set parallel\.data to 2 or start 4 processes"):
        check_world_size(parallel, 8)
    with pytest.raises(ValueError, match=r"set parallel\.data to a fitting value"):
        check_world_size(parallel, 6)


def test_tensor_ranks_are_neighbours_and_stages_are_farthest_apart():
    parallel = ParallelConfig(tensor=2, data=3, pipeline=2, sequence=False)
    assert [data_rank_of(rank, parallel) for rank in range(12)] == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    parallel = ParallelConfig(tensor=1, context=2, data=2, pipeline=2)
    assert [data_rank_of(rank, parallel) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


OFFLOAD = {
    "optimizer_cpu_offload": True,
    "use_precision_aware_optimizer": True,
    "optimizer_offload_fraction": 0.5,
}
MACHINE = Capabilities(has_cuda=True, flash_attn_problem=None, transformer_engine_problem=None)


@pytest.mark.parametrize(
    ("change", "is_sharded", "message"),
    [
        ({}, False, r"offload needs parallel\.distributed_optimizer=true: set that"),
        ({"use_precision_aware_optimizer": False}, True, r"needs megatron\.use_precision_aware_optimizer=true: set"),
        ({"optimizer_offload_fraction": 0.0}, True, r"optimizer_offload_fraction greater than 0 .* \(it is 0\)"),
        ({"optimizer_offload_fraction": 2}, True, r"at most 1 \(it is 2\)"),
    ],
)
def test_offloading_that_cannot_work_anywhere_is_refused(change: dict[str, Any], is_sharded: bool, message: str):
    check_offload(OFFLOAD, is_sharded=True)
    check_offload({}, is_sharded=False)
    with pytest.raises(ValueError, match=message):
        check_offload({**OFFLOAD, **change}, is_sharded=is_sharded)


def test_offloading_says_what_a_machine_lacks():
    assert offload_problem(OFFLOAD, MACHINE) is None
    assert offload_problem({}, replace(MACHINE, has_cuda=False)) is None
    without_cuda = offload_problem(OFFLOAD, replace(MACHINE, has_cuda=False))
    assert without_cuda is not None and "without CUDA remove it" in without_cuda
    without_engine = offload_problem(OFFLOAD, replace(MACHINE, transformer_engine_problem="is not installed"))
    assert without_engine is not None and without_engine.endswith("Transformer Engine is not installed")
