"""The conversion command, as it is typed."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_p2o.config.read import dump_config
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.run_folder.checkpoints import write_manifest
from megatron_p2o.testing.policy_oracle import policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"


def convert(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_runs_checkpoint_is_converted_there_and_back(tmp_path: Path):
    config = policy_config(write_tiny_qwen3(tmp_path / "source"))
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    with closing(build_policy(config)) as policy:
        digests = policy.save(step / "policy").result(300)
    write_manifest(step, {f"policy/{name}": digest for name, digest in digests.items()})
    (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
    there = convert("to-hf", step, "--out", tmp_path / "there")
    assert there.returncode == 0, there.stderr
    original = load_file(tmp_path / "source" / "model.safetensors")
    written = load_file(tmp_path / "there" / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in original.items())

    settings = tmp_path / "run" / "config.yaml"
    back = convert("from-hf", tmp_path / "there", "--config", settings, "--out", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    with closing(build_policy(config)) as policy:
        policy.load(tmp_path / "back")
        assert all(torch.equal(original[name], tensor) for name, tensor in policy.weights())


def test_a_trained_checkpoint_and_its_directory_are_compared_both_ways(tmp_path: Path):
    config = policy_config(write_tiny_qwen3(tmp_path / "source"))
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    with closing(build_policy(config)) as policy:
        policy.update(random_samples([9, 3, 14], vocab_size=256), None, 26)
        digests = policy.save(step / "policy").result(300)
    write_manifest(step, {f"policy/{name}": digest for name, digest in digests.items()})
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(dump_config(config))
    there, back = tmp_path / "there", tmp_path / "back"
    for command in (("to-hf", step, "--out", there), ("from-hf", there, "--config", settings, "--out", back)):
        done = convert(*command)
        assert done.returncode == 0, done.stderr
    for source, more in ((step, ()), (back, ("--config", settings))):
        same = convert("compare", source, there, *more)
        assert same.returncode == 0, same.stderr
        num_weights = len(load_file(there / "model.safetensors"))
        assert same.stdout.startswith(f"{num_weights} weights are equal, bit for bit\n")
        # float32 on both sides, other reduction orders; the log-probs reach -30.
        assert float(same.stdout.rpartition(" ")[2]) < 1e-3

    differ = convert("compare", step, tmp_path / "source")
    assert differ.returncode == 1
    assert f"{num_weights} weights are not those of {tmp_path / 'source'}: " in differ.stderr
    weights = load_file(there / "model.safetensors")
    weights["model.norm.weight"].view(torch.int32)[5] += 1
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    differ = convert("compare", step, there)
    assert f"1 weights are not those of {there}: model.norm.weight" in differ.stderr
