"""The policy's layouts on several GPUs, over NCCL: orders and devices that gloo cannot show. Skipped with fewer GPUs.

The ranks are processes of their own, started on this file: a process that has used CUDA cannot be forked.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_p2o.config.tree import Config, OptimizerConfig, ParallelConfig
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_kernel_sized_qwen3

LAYOUTS = {
    2: {
        "tensor": ParallelConfig(tensor=2, sequence=True),
        "pipeline": ParallelConfig(pipeline=2),
        "context": ParallelConfig(context=2),
        "data, sharded": ParallelConfig(data=2, distributed_optimizer=True),
    },
    4: {
        "tensor, data": ParallelConfig(tensor=2, data=2, sequence=True, distributed_optimizer=True),
        "pipeline, context": ParallelConfig(pipeline=2, context=2),
    },
}
"""By number of GPUs."""

VOCAB_SIZE = 1000
SAMPLES = random_samples((30, 170, 1, 200, 90), vocab_size=VOCAB_SIZE)
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, micro_batch_tokens=256)
TIMEOUT_S = 900.0
"""Longest run of all layouts of a number of GPUs, compilation of the kernels included."""


@pytest.mark.gpu
@pytest.mark.parametrize("num_gpus", LAYOUTS)
def test_layouts_over_nccl_update_save_and_export_like_transformers(num_gpus: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"{torch.cuda.device_count()} of {num_gpus} CUDA devices: layouts over NCCL are not run")
    model = write_kernel_sized_qwen3(tmp_path / "model")
    results = run_layouts(num_gpus, model, tmp_path)
    oracle = PolicyOracle(policy_config(model, optimizer=OPTIMIZER))
    logprob_sums = [float(row.sum()) for row in oracle.logprobs(SAMPLES)]
    loss, grad_norm = oracle.update(SAMPLES, None, 600)
    assert results.keys() == LAYOUTS[num_gpus].keys()
    for name, result in results.items():
        # bfloat16 against float32: 0.03 nats a token.
        for ours, theirs, sample in zip(result["logprob_sums"], logprob_sums, SAMPLES, strict=True):
            assert ours == pytest.approx(theirs, abs=0.03 * len(sample.response_ids) + 0.05), name
        assert result["first"] == pytest.approx([loss, grad_norm], rel=0.05, abs=0.02), name
        assert result["from_checkpoint"] == pytest.approx(result["second"], rel=1e-3), name
        assert set(result["weights"]) == set(oracle.weights()), name


def run_layouts(num_ranks: int, model: Path, folder: Path) -> dict[str, Any]:
    """Return what each layout of as many ranks gives."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [sys.executable, *launcher, __file__, str(model), str(folder)]
    done = subprocess.run(command, timeout=TIMEOUT_S, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads((folder / "results.json").read_text())


def run_rank(model: Path, folder: Path) -> None:
    """Take this rank's part in every layout; rank 0 writes what came of them."""
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if has_cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_S / 4))
    results: dict[str, Any] = {}
    for name, parallel in LAYOUTS[dist.get_world_size()].items():
        config = policy_config(
            model,
            parallel=replace(parallel, timeout_s=TIMEOUT_S / 4),
            optimizer=OPTIMIZER,
            dtype="bfloat16" if has_cuda else "float32",
        )
        results[name] = trained(config, folder / name)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def trained(config: Config, directory: Path) -> dict[str, Any] | None:
    """Return log-probs, loss and gradient norm of updates around a checkpoint, and the names of the weights."""
    policy = build_policy(config)
    if not policy.is_conductor:
        return policy.serve()
    logprob_sums = [float(row.sum()) for row in policy.logprobs(SAMPLES)]
    reports = [policy.update(SAMPLES, None, 600)]
    policy.save(directory).result(timeout=TIMEOUT_S / 4)
    reports.append(policy.update(SAMPLES, None, 600))
    policy.load(directory)
    reports.append(policy.update(SAMPLES, None, 600))
    weights = [name for name, _ in policy.weights()]
    policy.close()
    first, second, from_checkpoint = ([report.loss, report.grad_norm] for report in reports)
    return {
        "logprob_sums": logprob_sums,
        "first": first,
        "second": second,
        "from_checkpoint": from_checkpoint,
        "weights": weights,
    }


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]))
