"""The policy's settings are checked before ranks start: by the dry run and by `p2o doctor CONFIG`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_p2o.cli import main
from megatron_p2o.policy.model.layer_choice import Capabilities, fused_operations
from megatron_p2o.policy.training.settings import policy_settings
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"))


def settings_file(folder: Path, path: Path, **sections: Any) -> Path:
    """Write a configuration with one problem."""
    (folder / "problems.jsonl").write_text(json.dumps({"id": "one", "question": "1+1", "answer": "2"}) + "\n")
    sections = {
        "run": {"name": "test", "directory": str(folder)},
        "data": {"train": str(folder / "problems.jsonl")},
        "schedule": {"problems_per_step": 1, "problems_per_update": 1},
        "evolution": {"enabled": False},
        **sections,
        "model": {"path": str(path), "dtype": "float32", **sections.get("model", {})},
        "rollout": {"max_new_tokens": 64},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


WRONG = [
    ({"megatron": {"recompute_granularty": "full"}}, "did you mean megatron.recompute_granularity?"),
    ({"megatron": {"lr": 0.1}}, "megatron.lr is decided by optimizer.lr: set that instead"),
    ({"megatron": {"recompute_granularity": "most"}}, "refuses megatron.recompute_granularity=most: "),
    ({"megatron": {"exp_avg_dtype": "bfloat16"}}, "refuses megatron.exp_avg_dtype=bfloat16: "),
    ({"megatron": {"optimizer_cpu_offload": True}}, "offload needs parallel.distributed_optimizer=true"),
    ({"parallel": {"pipeline": 3}}, "parallel.pipeline=3 must divide the model's num_hidden_layers=2"),
]
"""Wrong on every machine, and what is said."""


@pytest.mark.parametrize(("sections", "message"), WRONG)
def test_the_dry_run_and_the_doctor_refuse_what_megatron_would(
    tmp_path: Path, model: Path, sections: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
):
    path = str(settings_file(tmp_path, model, **sections))
    assert main(["train", path, "--dry-run"]) != 0
    assert message in capsys.readouterr().err
    assert main(["doctor", path, "--strict"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("settings"))
    assert "MISSING" in line and message in line


def test_a_gpu_fuses_what_a_setting_does_not_turn_off(model: Path):
    gpu = Capabilities(has_cuda=True, flash_attn_problem=None, transformer_engine_problem=None)
    cpu = Capabilities(has_cuda=False, flash_attn_problem="needs CUDA", transformer_engine_problem="needs CUDA")
    fused = fused_operations("transformer_engine", gpu, is_dense=True)
    assert fused == {"bias_activation_fusion": True, "apply_rope_fusion": True}
    assert fused_operations("local", gpu, is_dense=True) == {"bias_activation_fusion": True, "apply_rope_fusion": False}
    assert not fused_operations("transformer_engine", gpu, is_dense=False)["bias_activation_fusion"]
    assert fused_operations("local", cpu, is_dense=True) == {}
    local = fused_operations("local", gpu, is_dense=True)
    assert policy_settings(policy_config(model), local).transformer.bias_activation_fusion
    off = replace(policy_config(model), megatron={"bias_activation_fusion": False})
    assert not policy_settings(off, local).transformer.bias_activation_fusion
    other = replace(policy_config(model), megatron={"use_te_activation_func": True})
    assert not policy_settings(other, local).transformer.bias_activation_fusion
    assert not policy_settings(policy_config(model)).transformer.bias_activation_fusion


def test_what_only_this_machine_lacks_is_named_by_the_dry_run_and_missing_for_the_doctor(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    path = str(settings_file(tmp_path, model, model={"layer_backend": "transformer_engine"}))
    assert main(["train", path, "--dry-run"]) == 0
    assert "not on this machine: model.layer_backend=transformer_engine cannot" in capsys.readouterr().out
    assert main(["doctor", path, "--strict"]) == 1
    assert main(["doctor", path, "--strict", "--set", "model.layer_backend=local"]) == 0
    assert "megatron-core's own: model.layer_backend=local" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no memory of this machine to plan")
def test_the_dry_run_and_the_doctor_plan_the_memory_of_this_machine(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    path = str(settings_file(tmp_path, model, model={"dtype": "bfloat16"}))
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    head = f"memory of 1 x {torch.cuda.device_count()} GPUs of {gib:.1f} GiB, engines "
    too_long = ["--set", "rollout.max_new_tokens=100000000000", "--set", "sglang.context_length=200000000000"]
    assert main(["doctor", path]) == main(["train", path, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(head) == 2
    assert main(["doctor", path, "--strict", *too_long]) == 1
    assert main(["train", path, "--dry-run", *too_long]) == 0
    printed = capsys.readouterr().out
    assert "MISSING the KV cache of an engine rank would hold" in printed
    assert "not on this machine: the KV cache of an engine rank would hold" in printed


def test_the_dry_run_reads_the_names_of_the_weights(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    path = str(settings_file(tmp_path, model, megatron={"overlap_grad_reduce": True}))
    assert main(["train", path, "--dry-run", "--set", "schedule.max_batches_per_step=2"]) == 0
    printed = capsys.readouterr().out
    assert " takes overlap_grad_reduce\n" in printed and "problems, at most 1 steps in each of" in printed
    broken = write_tiny_qwen3(tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, broken / "model.safetensors")
    assert main(["train", path, "--dry-run", "--set", f"model.path={broken}"]) != 0
    assert "1 missing: model.norm.weight" in capsys.readouterr().err
