"""Speeds of GPUs become coefficients of engines; what the file does not hold is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.policy.model.architecture import Architecture, read_architecture
from megatron_p2o.simulation.hardware import (
    HARDWARE_FILE,
    engine_coefficients,
    gpu_speed,
    read_hardware,
    refresh_s,
    update_token_s,
)
from megatron_p2o.testing.fakes import fake_config
from megatron_p2o.testing.tiny_model_types import QWEN3_4B


def qwen3_4b(folder: Path) -> Architecture:
    (folder / "config.json").write_text(json.dumps(QWEN3_4B))
    return read_architecture(folder)


def test_a_4b_policy_on_80_gb_has_the_figures_that_the_file_names(tmp_path: Path) -> None:
    config = fake_config({"model.dtype": "bfloat16"})
    found = engine_coefficients(gpu_speed(read_hardware(), 80), qwen3_4b(tmp_path), config)
    assert found.step_s == pytest.approx(0.006, rel=0.01)
    assert found.sequence_s == 20e-6
    assert found.cached_token_s == pytest.approx(0.06e-6, rel=0.01)
    # 2 x 3.6 billion weights of the layers, at 400 TFLOP/s.
    assert found.prefill_token_s == pytest.approx(18e-6, rel=0.02)


def test_two_gpus_read_an_engine_twice_as_fast_and_wait_for_each_other(tmp_path: Path) -> None:
    gpu, architecture = gpu_speed(read_hardware(), 80), qwen3_4b(tmp_path)
    one = engine_coefficients(gpu, architecture, fake_config({"model.dtype": "bfloat16"}))
    two = engine_coefficients(gpu, architecture, fake_config({"model.dtype": "bfloat16", "rollout.tensor_parallel": 2}))
    assert two.cached_token_s == pytest.approx(one.cached_token_s / 2)
    waiting = 36 * gpu.layer_of_parallel_rank_s
    halved = (one.step_s - gpu.step_overhead_s) / 2
    assert two.step_s == pytest.approx(gpu.step_overhead_s + waiting + halved, rel=0.001)


def test_an_update_counts_its_passes_over_a_rollout(tmp_path: Path) -> None:
    hardware, architecture = read_hardware(), qwen3_4b(tmp_path)
    gpu, length = gpu_speed(hardware, 80), 3000

    def passes(settings: dict[str, Any]) -> float:
        config = fake_config({"rollout.max_new_tokens": 12288, "schedule.problems_per_update": 4, **settings})
        flops = architecture.forward_flops(hardware.workload.prompt_tokens + length, length) / length
        return update_token_s(gpu, architecture, config, hardware.workload) * gpu.training_flops / flops

    assert passes({}) == pytest.approx(3)  # forward, and twice that backward
    assert passes({"megatron": {"recompute_granularity": "full"}}) == pytest.approx(4)
    half = {"recompute_granularity": "full", "recompute_method": "block"}
    half["recompute_num_layers"] = architecture.num_layers // 2
    assert passes({"megatron": half}) == pytest.approx(3.5)
    assert passes({"schedule.problems_per_update": 2}) == pytest.approx(3.5)  # half is scored beforehand
    assert passes({"objective.kl_coefficient": 0.1, "logprobs.recompute": True}) == pytest.approx(6)
    assert passes({"parallel.data": 2}) == pytest.approx(3 / 2)  # two GPUs


def test_a_refresh_takes_as_long_as_reading_the_weights(tmp_path: Path) -> None:
    gpu, architecture = gpu_speed(read_hardware(), 80), qwen3_4b(tmp_path)
    took = refresh_s(gpu, architecture, fake_config({"model.dtype": "bfloat16"}))
    assert took == pytest.approx(gpu.refresh_s + 2 * 4_022_468_096 / gpu.refresh_bytes_per_s)


def test_gpus_that_the_file_does_not_hold_are_refused_with_those_it_does() -> None:
    assert gpu_speed(read_hardware(), 79.6).name == gpu_speed(read_hardware(), 80).name
    with pytest.raises(ValueError, match=r"no speed is known of a GPU of 24 GiB, only of 80 \(H100.*add it to"):
        gpu_speed(read_hardware(), 24)


def test_a_file_with_a_wrong_field_is_named(tmp_path: Path) -> None:
    content = json.loads(HARDWARE_FILE.read_text())
    assert read_hardware(changes={"response_tokens": 500.0}).workload.response_tokens == 500
    path = tmp_path / "mine.json"
    content["gpus"][0]["speed"] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"mine\.json: .* has no field speed"):
        read_hardware(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"mine\.json: "):
        read_hardware(path)


@pytest.mark.parametrize(
    "changes", [{"response_tokens": 0.0}, {"prompt_tokens": 0}, {"hard_share": 1.5}, {"hard_share": -0.1}]
)
def test_a_workload_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* must be"):
        read_hardware(changes=changes)
