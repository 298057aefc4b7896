"""Families of models and what each rank reads of them, under tensor and pipeline parallelism."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.policy.weights.hf_directory import WeightFiles
from megatron_p2o.policy.weights.hf_weights import load_hf_weights
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples
from megatron_p2o.testing.tiny_model_types import write_tiny_model

VOCAB_SIZE = 131
"""Odd, so that tensor parallelism pads it."""

SAMPLES = random_samples((9, 3, 14), vocab_size=VOCAB_SIZE)


class RecordingFiles(WeightFiles):
    """Keeps what is asked of the files."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: list[tuple[str, tuple[int, ...]]] = []
        self.num_bytes_read = 0

    def read(self, name: str, dimension: int | None = None, start: int = 0, end: int | None = None) -> torch.Tensor:
        tensor = super().read(name, dimension, start, end)
        self.reads.append((name, tuple(tensor.shape)))
        self.num_bytes_read += tensor.nbytes
        return tensor


def load_train_export(config: Any) -> dict[str, Any]:
    """Return what this rank reads, and on rank 0 also what the model computes."""
    policy = build_policy(config)
    shard = policy._shard
    with RecordingFiles(Path(config.model.path)) as files:
        load_hf_weights(shard.models, files, shard.architecture)
    result: dict[str, Any] = {
        "reads": files.reads,
        "num_bytes_read": files.num_bytes_read,
        "num_bytes_held": sum(parameter.nbytes for parameter in shard.models[0].parameters()),
    }
    if not policy.is_conductor:
        policy.serve()
        return result
    result["exported"] = {name: tensor.numpy() for name, tensor in policy.weights()}
    result["before"] = policy.logprobs(SAMPLES)
    result["report"] = policy.update(SAMPLES, None, 30)
    policy.close()
    return result


@pytest.mark.parametrize(
    ("model_type", "parallel"),
    [
        ("qwen2", ParallelConfig(tensor=2, sequence=False)),
        ("qwen2-tied", ParallelConfig(pipeline=2)),
        ("llama-3.2", ParallelConfig(tensor=2, sequence=True)),
        ("llama", ParallelConfig(tensor=2, pipeline=2, sequence=False)),
        ("qwen3-moe", ParallelConfig(tensor=2, sequence=True)),
        ("qwen3-moe", ParallelConfig(pipeline=2)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"tensor-{value.tensor}-pipeline-{value.pipeline}",
)
def test_families_under_layouts_equal_transformers_and_ranks_read_only_their_part(
    tmp_path: Path, model_type: str, parallel: ParallelConfig
):
    directory = write_tiny_model(tmp_path, model_type, vocab_size=VOCAB_SIZE)
    config = policy_config(directory, parallel=parallel)
    results = run_gloo_ranks(load_train_export, parallel.world_size, config)

    oracle, first = PolicyOracle(config), results[0]
    for ours, theirs in zip(first["before"], oracle.logprobs(SAMPLES), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    loss, grad_norm = oracle.update(SAMPLES, None, 30)
    assert first["report"].loss == pytest.approx(loss, abs=1e-6)
    assert first["report"].grad_norm == pytest.approx(grad_norm, rel=1e-4)
    original = load_file(directory / "model.safetensors")
    assert first["exported"].keys() == original.keys()
    assert all(np.array_equal(first["exported"][name], tensor.numpy()) for name, tensor in original.items())

    check_reads(results, original, parallel)


def check_reads(results: list[dict[str, Any]], original: dict[str, torch.Tensor], parallel: ParallelConfig) -> None:
    """Each rank reads the bytes it holds, once, and no more of a tensor than its share; together they read all."""
    padding_bytes = 4 * 32 * 2  # the vocabulary's last row, in embedding and head
    for result in results:
        assert result["num_bytes_held"] - padding_bytes <= result["num_bytes_read"] <= result["num_bytes_held"]
        names = [name for name, _ in result["reads"]]
        assert len(names) == len(set(names))
        for name, shape in result["reads"]:
            is_whole = "norm" in name or name.endswith("mlp.gate.weight")
            share = original[name].numel() / (1 if is_whole else parallel.tensor)
            assert abs(np.prod(shape) - share) <= 16, name  # half of the padded row of the vocabulary
    assert {name for result in results for name, _ in result["reads"]} == original.keys()
    if parallel.pipeline > 1:
        stages = {rank // parallel.tensor for rank in range(len(results))}
        layers = [
            {name.split(".")[2] for name, _ in results[stage * parallel.tensor]["reads"] if ".layers." in name}
            for stage in stages
        ]
        assert layers == [{"0"}, {"1"}]
