"""Under every layout an update is the same to the last bit, whatever the trainer lends between two of them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch

from megatron_p2o.config.tree import Config, OptimizerConfig, ParallelConfig
from megatron_p2o.files import FileDigest
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import policy_config, random_samples
from megatron_p2o.testing.tested_policy import allocated_bytes, held_bytes
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.testing.tiny_model_types import write_tiny_model

Lend = Literal["none", "gradients", "optimizer", "all"]
LENDS: tuple[Lend, ...] = get_args(Lend)
LENT = {
    "none": set[str](),
    "gradients": {"gradients"},
    "optimizer": {"gradients", "masters", "moments"},
    "all": {"gradients", "masters", "moments", "parameters"},
}

VOCAB_SIZE = 131
SAMPLES = random_samples((3, 17, 1, 20, 30, 9, 9, 2), vocab_size=VOCAB_SIZE)
OVERLAP = {"overlap_grad_reduce": True}
OVERLAP_ALL = {"overlap_grad_reduce": True, "overlap_param_gather": True}

Case = tuple[ParallelConfig, dict[str, Any]]
"""Layout, `megatron`."""

CASES: dict[int, dict[str, Case]] = {
    2: {
        "tensor": (ParallelConfig(tensor=2, sequence=False), {}),
        "sequence, sharded": (ParallelConfig(tensor=2, sequence=True, distributed_optimizer=True), {}),
        "pipeline": (ParallelConfig(pipeline=2), {}),
        "interleaved, overlapped": (ParallelConfig(pipeline=2, virtual_pipeline=2), OVERLAP),
        "context": (ParallelConfig(context=2), {}),
        "context, sharded": (ParallelConfig(context=2, distributed_optimizer=True), {}),
        "data": (ParallelConfig(data=2), OVERLAP),
        "data, sharded": (ParallelConfig(data=2, distributed_optimizer=True), {}),
        "data, sharded, overlapped": (ParallelConfig(data=2, distributed_optimizer=True), OVERLAP_ALL),
    },
    4: {
        "tensor, context": (ParallelConfig(tensor=2, context=2, sequence=True), {}),
        "pipeline, context": (ParallelConfig(pipeline=2, virtual_pipeline=2, context=2), {}),
        "context, data": (ParallelConfig(context=2, data=2, distributed_optimizer=True), {}),
    },
    8: {
        "tensor, pipeline, data": (
            ParallelConfig(tensor=2, pipeline=2, data=2, sequence=True, distributed_optimizer=True),
            {},
        ),
    },
}
WITH_EVERY_VALUE = ("pipeline", "data, sharded, overlapped", "tensor, pipeline, data")
"""Cases in which each value of `optimizer.lend` is tried. Elsewhere the two that differ most are; all other tests of
layouts run with the default, `gradients`."""
EXPERTS: dict[str, Case] = {
    "tensor": (ParallelConfig(tensor=2, sequence=True), {}),
    "pipeline, sharded": (ParallelConfig(pipeline=2, distributed_optimizer=True), {}),
}


def config_of(model: Path, case: Case, dtype: str, lend: Lend) -> Config:
    parallel, megatron = case
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, micro_batch_tokens=48, lend=lend)
    return replace(policy_config(model, parallel=parallel, optimizer=optimizer, dtype=dtype), megatron=megatron)


def train(config: Config, folder: Path) -> dict[str, Any] | None:
    """Return what two steps give; between them a checkpoint is written, while memory is lent."""
    policy = build_policy(config)
    policy.wait_for_ranks()
    if not policy.is_conductor:
        return policy.serve()
    steps = [step(policy)]
    held, allocated = held_bytes(policy), allocated_bytes(policy)
    digests = policy.save(folder / config.optimizer.lend).result(60)
    steps.append(step(policy))
    policy.close()
    return {"steps": steps, "held": held, "allocated": allocated, "digests": written(digests)}


def written(digests: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
    """Return those of the files that hold tensors."""
    return {name: digest for name, digest in digests.items() if name.endswith(".distcp")}


def go_on(config: Config, folder: Path) -> dict[str, np.ndarray] | None:
    """Return what a step gives from the checkpoint."""
    policy = build_policy(config)
    policy.wait_for_ranks()
    if not policy.is_conductor:
        return policy.serve()
    policy.load(folder / config.optimizer.lend)
    result = step(policy)
    policy.close()
    return result


def step(policy: MegatronPolicy) -> dict[str, np.ndarray]:
    """Return gradient norms, the weights handed over and what they say, to the last bit."""
    before = policy.logprobs(SAMPLES)
    norms = [policy.update(SAMPLES, None, 120).grad_norm, policy.update(SAMPLES, before, 120).grad_norm]
    weights = {name: tensor.view(torch.uint8).numpy() for name, tensor in policy.weights()}
    return {"norms": np.array(norms), "log-probs": np.concatenate(before), **weights}


def assert_equal_steps(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], case: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected, f"{case}: {name}")


def lends_of(name: str) -> tuple[Lend, ...]:
    return LENDS if name in WITH_EVERY_VALUE else ("none", "all")


def compare(model: Path, cases: dict[str, Case], num_processes: int, dtype: str, folder: Path) -> None:
    tried = [(name, lend) for name in cases for lend in lends_of(name)]
    configs = [config_of(model, cases[name], dtype, lend) for name, lend in tried]
    lending_all = [number for number, (_, lend) in enumerate(tried) if lend == "all"]

    def train_each() -> list[Any]:
        folders = [folder / str(list(cases).index(name)) for name, _ in tried]
        trained = [train(*each) for each in zip(configs, folders, strict=True)]
        again = [go_on(configs[number], folders[number]) for number in lending_all]
        return [trained, again]

    trained, again = run_gloo_ranks(train_each, num_processes)[0]
    results = dict(zip(tried, trained, strict=True))
    resumed = dict(zip(cases, again, strict=True))
    for (name, lend), result in results.items():
        expected = results[name, "none"]
        if lend == "all":
            assert_equal_steps(resumed[name], expected["steps"][-1], f"{name}, all, from a checkpoint")
        for ours, theirs in zip(result["steps"], expected["steps"], strict=True):
            assert_equal_steps(ours, theirs, f"{name}, {lend}")
        assert result["digests"] == expected["digests"], f"{name}, {lend}: the checkpoint"
        for part, num_bytes in result["held"].items():
            allocated = result["allocated"][part]
            # Megatron rounds what it shards up.
            kept = 0 if part in LENT[lend] else num_bytes
            assert kept <= allocated <= 1.05 * kept, f"{name}, {lend}: {part}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return write_tiny_qwen3(directory, vocab_size=VOCAB_SIZE, num_layers=4, num_kv_heads=4, tie_embeddings=True)


@pytest.mark.parametrize("num_processes", list(CASES))
def test_no_layout_computes_otherwise_for_what_it_lends(model: Path, tmp_path: Path, num_processes: int) -> None:
    compare(model, CASES[num_processes], num_processes, "bfloat16", tmp_path)


def test_nor_does_a_model_in_float32_whose_weights_the_optimizer_updates_in_place(model: Path, tmp_path: Path) -> None:
    cases = {name: CASES[2][name] for name in ("pipeline", "data, sharded, overlapped")}
    compare(model, cases, 2, "float32", tmp_path)


def test_nor_do_experts(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "qwen3-moe", vocab_size=VOCAB_SIZE)
    compare(model, EXPERTS, 2, "bfloat16", tmp_path)
