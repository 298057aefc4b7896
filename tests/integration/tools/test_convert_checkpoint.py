"""The conversion command, as it is typed."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_p2o.config.read import dump_config
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.run_folder.checkpoints import write_manifest
from megatron_p2o.testing.policy_oracle import policy_config
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"


def convert(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_runs_checkpoint_is_converted_there_and_back(tmp_path: Path):
    config = policy_config(write_tiny_qwen3(tmp_path / "source"))
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    with closing(build_policy(config)) as policy:
        digests = policy.save(step / "policy").result(30)
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
