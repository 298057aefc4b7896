"""The policy on Transformer Engine's layers, for which a stand-in in plain torch computes here.

Megatron's own layer specification, its wrappers and its checkpoints are the real ones; they look for Transformer Engine
when they are imported, so that a process of its own is started with the stand-in on its path.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import Config, OptimizerConfig, ParallelConfig
from megatron_p2o.policy.model.layer_choice import Capabilities
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.testing.tiny_model_types import write_tiny_model

VOCAB_SIZE = 131
SAMPLES = random_samples((3, 17, 1, 20, 30, 9, 9, 2), vocab_size=VOCAB_SIZE)
CAPABLE = Capabilities(has_cuda=False, flash_attn_problem="is not installed", transformer_engine_problem=None)
INCAPABLE = replace(CAPABLE, transformer_engine_problem="is not installed")
LAYOUTS = {
    "tensor": ParallelConfig(tensor=2, sequence=False),
    "sequence": ParallelConfig(tensor=2, sequence=True),
    "context": ParallelConfig(context=2),
    "pipeline": ParallelConfig(pipeline=2),
    "data": ParallelConfig(data=2, distributed_optimizer=True),
}
EXPERTS = "qwen3-moe"
CHECKPOINTS = {
    "before the first step": (False, 0, "float32"),
    "after it": (False, 1, "float32"),
    "in bfloat16": (False, 1, "bfloat16"),
    "sharded, before the first step": (True, 0, "float32"),
    "sharded, after it": (True, 1, "float32"),
}
"""Distributed optimizer or not, updates before the checkpoint, type."""


def config_of(model: Path, parallel: ParallelConfig | None = None, layers: Any = "auto") -> Config:
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, micro_batch_tokens=48)
    config = policy_config(model, parallel=parallel, optimizer=optimizer)
    return replace(config, model=replace(config.model, layer_backend=layers))


def updates(policy: MegatronPolicy) -> list[list[float]]:
    """Return [loss, gradient norm] of two updates; the second shows the weights of the first."""
    reports = [policy.update(SAMPLES, None, 120) for _ in range(2)]
    return [[report.loss, report.grad_norm] for report in reports]


def train_each(configs: Sequence[Config]) -> list[Any]:
    results: list[Any] = []
    for config in configs:
        policy = build_policy(config, capabilities=CAPABLE)
        if not policy.is_conductor:
            policy.serve()
            continue
        result = {"updates": updates(policy), "weights": {name: tensor.clone() for name, tensor in policy.weights()}}
        results.append(result)
        policy.close()
    return results


def against_transformers(config: Config, result: dict[str, Any]) -> dict[str, Any]:
    """Return what differs from two steps of transformers and torch's AdamW."""
    oracle = PolicyOracle(config)
    expected = [list(oracle.update(SAMPLES, None, 120)) for _ in range(2)]
    weights = oracle.weights()
    # transformers keeps all experts of a layer in one tensor.
    assert {name for name in result["weights"] if ".experts." not in name} <= weights.keys()
    common = result["weights"].keys() & weights.keys()
    largest = max(float((result["weights"][name] - weights[name]).abs().max()) for name in common)
    return {"updates": result["updates"], "expected": expected, "weights": largest}


def exchanged(model: Path, saving: Any, loading: Any, checkpoint: Path) -> list[Any]:
    """Return the updates after a checkpoint where it was saved, and where layers of the other kind loaded it."""
    with closing(build_policy(config_of(model, layers=saving), capabilities=CAPABLE)) as policy:
        updates(policy)
        policy.save(checkpoint).result(60)
        after = updates(policy)
    with closing(build_policy(config_of(model, layers=loading), capabilities=CAPABLE)) as policy:
        policy.load(checkpoint)
        return [after, updates(policy)]


def continued(model: Path, folder: Path, capabilities: Capabilities, *, is_saving: bool) -> dict[str, Any]:
    """Return the updates after each of `CHECKPOINTS`, saved here or loaded."""
    after: dict[str, Any] = {}
    for name, (is_sharded, num_updates, dtype) in CHECKPOINTS.items():
        config = config_of(model, ParallelConfig(distributed_optimizer=is_sharded))
        config = replace(config, model=replace(config.model, dtype=dtype))
        with closing(build_policy(config, capabilities=capabilities)) as policy:
            if is_saving:
                for _ in range(num_updates):
                    policy.update(SAMPLES, None, 120)
                policy.save(folder / name).result(60)
            else:
                policy.load(folder / name)
            after[name] = updates(policy)
    return after


def report(folder: Path) -> dict[str, Any]:
    """Return everything the test looks at; runs where the stand-in is on the path."""
    model = write_tiny_qwen3(folder / "model", vocab_size=VOCAB_SIZE, num_kv_heads=4, tie_embeddings=True)
    experts = write_tiny_model(folder / "experts", EXPERTS, vocab_size=VOCAB_SIZE)
    with closing(build_policy(config_of(model), capabilities=CAPABLE)) as policy:
        names = [name for name, _ in policy._shard.models[0].named_parameters()]
        reason = policy.layers.layers_reason
    configs = [config_of(model, parallel) for parallel in LAYOUTS.values()]
    results = dict(zip(LAYOUTS, run_gloo_ranks(train_each, 2, configs)[0], strict=True))
    compared = {name: against_transformers(config_of(model), result) for name, result in results.items()}
    compared["experts"] = against_transformers(config_of(experts), train_each([config_of(experts)])[0])
    pairs = {"to ours": ("auto", "local"), "from ours": ("local", "auto"), "to the same": ("auto", "auto")}
    return {
        "names": names,
        "reason": reason,
        "compared": compared,
        "loaded": continued(folder / "other", folder / "torch", CAPABLE, is_saving=False),
        "saved": continued(folder / "other", folder / "fused", CAPABLE, is_saving=True),
        "exchanged": {name: exchanged(experts, *pair, folder / name) for name, pair in pairs.items()},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformer-engine")
    write_tiny_qwen3(folder / "other", vocab_size=VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    """What this process computes after it saved checkpoints: our layers, torch's Adam."""
    return continued(folder / "other", folder / "torch", INCAPABLE, is_saving=True)


@pytest.fixture(scope="module")
def found(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """The report of a process with the stand-in: Transformer Engine's layers and Adam."""
    stand_ins = Path(__file__).parents[1] / "stand_ins"
    path = os.pathsep.join([str(stand_ins), *(entry for entry in sys.path if entry)])
    outcome = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        timeout=240,
        check=True,
    )
    return json.loads(outcome.stdout.splitlines()[-1])


def assert_same_updates(ours: list[list[float]], theirs: list[list[float]], name: str, rel: float = 1e-5) -> None:
    """The norm is computed before or within the linear layer, Adam by other formulas: the same but for rounding."""
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-6), name


def test_layers_and_adam_of_transformer_engine_compute_what_transformers_and_torch_do(found: dict[str, Any]):
    assert found["reason"].startswith("Transformer Engine's")
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in found["names"]
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in found["names"]
    assert not any("input_layernorm" in name for name in found["names"])
    for name, compared in found["compared"].items():
        assert_same_updates(compared["updates"], compared["expected"], name)
        assert compared["weights"] < 1e-5, name


def test_either_kind_of_layers_with_experts_continues_from_the_others_checkpoint(found: dict[str, Any]):
    for name, (there, here) in found["exchanged"].items():
        assert_same_updates(here, there, name)


def test_checkpoints_go_between_a_machine_with_transformer_engine_and_one_without(
    folder: Path, saved: dict[str, Any], found: dict[str, Any]
):
    loaded = continued(folder / "other", folder / "fused", INCAPABLE, is_saving=False)
    for name, (_, _, dtype) in CHECKPOINTS.items():
        rel = 1e-5 if dtype == "float32" else 1e-2
        assert_same_updates(found["loaded"][name], saved[name], f"to Transformer Engine, {name}", rel)
        assert_same_updates(loaded[name], found["saved"][name], f"from Transformer Engine, {name}", rel)


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]))))
