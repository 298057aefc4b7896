"""The benchmark of a training step runs where there is no GPU, and counts what it says."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[3] / "tools" / "bench_train_step.py"


def test_both_heads_agree_and_one_forward_pass_serves_an_update(tmp_path: Path):
    command = [sys.executable, str(TOOL), "--shape", "tiny", "--tokens", "256", "--repeats", "1"]
    command += ["--json", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["layers"], result["attention"]) == ("local", "sdpa")
    assert (result["num_layers"], result["num_layers_of_shape"]) == (4, 4)
    for ours, theirs in result["agreement_fused_plain"].values():
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert result["agreement_fused_plain"]["grad_norm"][0] > 0.1
    assert result["forward_passes_per_rollout_token"] == {"fused": 1.0, "logprobs": 1.0}
    assert result["peak_bytes_beyond_state"]["fused"] < result["peak_bytes_beyond_state"]["plain"]
    # By hand: two samples of 128 positions, 97 of which predict; 4 layers, hidden 128, heads of 16: 8 query, 2 key.
    attention_weights = 128 * 128 + 2 * 128 * 32 + 128 * 128
    per_layer = 2 * 256 * (attention_weights + 3 * 128 * 384) + 2 * 4 * (128 * 129 // 2) * 128
    assert result["model_flops_per_step"] == 3 * (4 * per_layer + 2 * 194 * 8192 * 128)


@pytest.mark.parametrize(
    ("shape", "gpu_gib", "expected"),
    # By hand: 22 bytes a parameter at the optimizer's step (weight 2, gradient 4, master 4, moments 8, roots 4), a
    # layer of 100.9e6, an embedding of 389e6: (74 GiB / 22 - 389e6) / 100.9e6 = 31.9.
    [("qwen3-0.6b", 80, 28), ("qwen3-4b", 141, 36), ("qwen3-4b", 80, 31)],
)
def test_a_shape_is_cut_to_the_layers_that_fit(
    shape: str, gpu_gib: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import bench_train_step

    properties = SimpleNamespace(total_memory=gpu_gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    command = ["bench_train_step.py", "--shape", shape, "--tokens", "16384"]
    monkeypatch.setattr(sys, "argv", [*command, "--recompute"])
    layers = bench_train_step.fitting_layers(bench_train_step.parse_arguments(), tmp_path, torch.device("cuda"))
    assert layers == expected
    # With nothing computed again fewer layers of the larger model fit, and no fewer where some are.
    monkeypatch.setattr(sys, "argv", command)
    kept = bench_train_step.fitting_layers(bench_train_step.parse_arguments(), tmp_path, torch.device("cuda"))
    assert (kept < layers) == (shape == "qwen3-4b")
    block = ["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=20"]
    monkeypatch.setattr(sys, "argv", [*command, "--megatron", *block])
    some = bench_train_step.fitting_layers(bench_train_step.parse_arguments(), tmp_path, torch.device("cuda"))
    assert kept <= some <= layers
