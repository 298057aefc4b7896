"""The same calls under every parallel layout give what one plain process gives."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_p2o.config.tree import ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_p2o.interfaces import PolicyDiverged
from megatron_p2o.machine.memory.trainer import trainer_memory
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples
from megatron_p2o.testing.tested_policy import held_bytes
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

VOCAB_SIZE = 131
"""Odd, so that tensor parallelism pads it."""

LENGTHS = (3, 17, 1, 20, 30, 9, 9)

LAYOUTS = [
    pytest.param(ParallelConfig(tensor=2, sequence=False), id="tensor-2"),
    pytest.param(ParallelConfig(tensor=2, sequence=True), id="tensor-2-sequence"),
    pytest.param(ParallelConfig(pipeline=2), id="pipeline-2"),
    pytest.param(ParallelConfig(data=2), id="data-2"),
    pytest.param(ParallelConfig(data=2, distributed_optimizer=True), id="data-2-sharded-optimizer"),
    pytest.param(ParallelConfig(context=2), id="context-2"),
    pytest.param(ParallelConfig(pipeline=2, virtual_pipeline=2), id="interleaved-2"),
    pytest.param(ParallelConfig(tensor=2, pipeline=2, sequence=True), id="tensor-2-pipeline-2-sequence"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return write_tiny_qwen3(directory, vocab_size=VOCAB_SIZE, num_layers=4, tie_embeddings=request.param)


def train(config: Any) -> dict[str, Any]:
    """Score, update twice (the second time against old log-probs), return everything observable."""
    policy = build_policy(config)
    delivered: dict[str, Any] = {}
    policy.deliver_to(lambda weights: delivered.update({name: tensor.numpy() for name, tensor in weights}))
    if not policy.is_conductor:
        policy.serve()
        return {"held": held_bytes(policy), "weights": delivered}
    samples = random_samples(LENGTHS, vocab_size=VOCAB_SIZE)
    before = policy.logprobs(samples)
    reports = [policy.update(samples, None, 100), policy.update(samples, before, 100)]
    result = {
        "before": before,
        "reports": reports,
        "weights": {name: tensor.numpy() for name, tensor in policy.weights()},
        "after": policy.logprobs(samples),
        "held": held_bytes(policy),
    }
    policy.close()
    return result


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_scores_losses_and_updated_weights_equal_transformers_under_every_layout(
    model_path: Path, parallel: ParallelConfig
):
    config = policy_config(model_path, parallel=parallel)
    oracle = PolicyOracle(config)
    samples = random_samples(LENGTHS, vocab_size=VOCAB_SIZE)
    before = oracle.logprobs(samples)
    expected = [oracle.update(samples, None, 100), oracle.update(samples, before, 100)]

    results = run_gloo_ranks(train, parallel.world_size, config)
    result = results[0]

    for ours, theirs in zip(result["before"], before, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for report, (loss, grad_norm) in zip(result["reports"], expected, strict=True):
        assert report.outcome == "applied"
        assert report.loss == pytest.approx(loss, abs=1e-6)
        assert report.grad_norm == pytest.approx(grad_norm, rel=1e-5)
        assert report.tokens.loss_tokens == sum(LENGTHS)
    weights = oracle.weights()
    assert set(result["weights"]) == set(weights)
    for name, tensor in weights.items():
        np.testing.assert_allclose(result["weights"][name], tensor.numpy(), atol=1e-5, err_msg=name)
        for rank, each in enumerate(results):
            np.testing.assert_array_equal(each["weights"][name], result["weights"][name], f"{name} of rank {rank}")
    for ours, theirs in zip(result["after"], oracle.logprobs(samples), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    planned = trainer_memory(config, read_architecture(model_path))
    # Megatron rounds what it shards up: so tiny a model grows by 1.5 %.
    padding = 0.02 if parallel.distributed_optimizer else 0.0
    for part in ("parameters", "gradients", "masters", "moments"):
        largest = max(each["held"][part] for each in results)
        assert getattr(planned, part) == pytest.approx(largest, rel=padding), part


@pytest.mark.parametrize("normalization", ["token_mean", "kept_token_mean"])
def test_the_denominator_counts_tokens_of_all_ranks(tmp_path: Path, normalization: Any):
    directory = write_tiny_qwen3(tmp_path, vocab_size=VOCAB_SIZE)
    objective = ObjectiveConfig(normalization=normalization, ratio_low=0.3, ratio_high=2.0)
    config = policy_config(directory, parallel=ParallelConfig(data=2), objective=objective)
    samples = random_samples(LENGTHS, vocab_size=VOCAB_SIZE)
    oracle = PolicyOracle(config)
    before = oracle.logprobs(samples)
    expected = [oracle.update(samples, None, 100), oracle.update(samples, before, 100)]
    reports = run_gloo_ranks(train, 2, config)[0]["reports"]
    assert 0 < reports[0].tokens.kept_tokens < sum(LENGTHS)
    for report, (loss, grad_norm) in zip(reports, expected, strict=True):
        assert report.loss == pytest.approx(loss, abs=1e-6)
        assert report.grad_norm == pytest.approx(grad_norm, rel=1e-5)


def test_a_data_rank_without_samples_takes_part_and_counts_for_nothing(tmp_path: Path):
    directory = write_tiny_qwen3(tmp_path, vocab_size=VOCAB_SIZE)
    samples = random_samples((6,), vocab_size=VOCAB_SIZE)

    def update_with_one_sample(config: Any) -> Any:
        policy = build_policy(config)
        if not policy.is_conductor:
            return policy.serve()
        outcome = policy.update(samples, None, 6), policy.logprobs(samples)
        policy.close()
        return outcome

    for normalization in ("token_mean", "kept_token_mean"):
        config = policy_config(
            directory,
            parallel=ParallelConfig(data=2),
            objective=ObjectiveConfig(normalization=normalization, context="replace"),
        )
        report, logprobs = run_gloo_ranks(update_with_one_sample, 2, config)[0]
        oracle = PolicyOracle(config)
        loss, grad_norm = oracle.update(samples, None, 6)
        assert report.loss == pytest.approx(loss, abs=1e-6)
        assert report.grad_norm == pytest.approx(grad_norm, rel=1e-5)
        assert report.tokens.loss_tokens == 6
        np.testing.assert_allclose(logprobs[0], oracle.logprobs(samples)[0], atol=1e-5)


SAVED = {
    "tensor": ParallelConfig(tensor=2, sequence=False),
    "interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "context": ParallelConfig(context=2),
    "data, sharded": ParallelConfig(data=2, distributed_optimizer=True),
    "context, sharded": ParallelConfig(context=2, distributed_optimizer=True),
}

LOADED = {
    "tensor": {"pipeline": ParallelConfig(pipeline=2)},
    "interleaved": {
        "interleaved": SAVED["interleaved"],
        "tensor": ParallelConfig(tensor=2, sequence=True),
        "single": ParallelConfig(),
    },
    "context": {"context": SAVED["context"], "interleaved": SAVED["interleaved"], "single": ParallelConfig()},
    "data, sharded": {"tensor, sharded": ParallelConfig(tensor=2, distributed_optimizer=True, sequence=False)},
    "context, sharded": {
        "context, sharded": SAVED["context, sharded"],
        "single, sharded": ParallelConfig(distributed_optimizer=True),
    },
}
"""Layouts that go on from a checkpoint of each of `SAVED`."""


def saved_and_continued(config: Any, directory: Path) -> dict[str, Any] | None:
    policy = build_policy(config)
    if not policy.is_conductor:
        return policy.serve()
    policy.plan_updates(10)
    samples = random_samples(LENGTHS, vocab_size=VOCAB_SIZE, seed=1)
    for _ in range(2):
        policy.update(samples, None, 100)
    policy.save(directory)
    return continued(policy)


def loaded_and_continued(config: Any, directory: Path) -> dict[str, Any] | None:
    policy = build_policy(config)
    if not policy.is_conductor:
        return policy.serve()
    policy.plan_updates(10)
    policy.load(directory)
    return continued(policy)


def continued(policy: MegatronPolicy) -> dict[str, Any]:
    """Return what two further updates give, and the weights after each."""
    samples = random_samples(LENGTHS, vocab_size=VOCAB_SIZE, seed=1)
    reports, weights = [], []
    for _ in range(2):
        reports.append(policy.update(samples, None, 100))
        weights.append({name: tensor.numpy() for name, tensor in policy.weights()})
    policy.close()
    numbers = [(report.grad_norm, report.learning_rate) for report in reports]
    return {"numbers": numbers, "weights": weights}


def save_and_load_each(config_of: Any, folder: Path) -> dict[str, Any]:
    """Return what each layout of two ranks gives, uninterrupted and from a checkpoint, and what was warned of."""
    results: dict[str, Any] = {"warnings": []}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: results["warnings"].append(record.getMessage())
    logging.getLogger("megatron.core.dist_checkpointing").addHandler(handler)
    for saved, parallel in SAVED.items():
        results[saved] = saved_and_continued(config_of(parallel=parallel), folder / saved)
        for loaded, other in LOADED[saved].items():
            if other.world_size == 2:
                results[f"{saved} -> {loaded}"] = loaded_and_continued(config_of(parallel=other), folder / saved)
    return results


def test_training_continues_from_a_checkpoint_of_another_layout(tmp_path: Path):
    """Weights to 1e-5 absolute after steps of 1e-3, exactly under the same layout: the optimizer's state is there."""
    directory = write_tiny_qwen3(tmp_path / "model", vocab_size=VOCAB_SIZE, num_layers=4)
    rates = {"lr": 1e-3, "min_lr": 3e-4, "warmup_steps": 2, "lr_decay": "linear"}
    optimizer = OptimizerConfig(**rates, eps=1e-4, micro_batch_tokens=48)
    config_of = partial(policy_config, directory, optimizer=optimizer)
    results, follower = run_gloo_ranks(save_and_load_each, 2, config_of, tmp_path)
    differs = [each for each in (*results["warnings"], *follower["warnings"]) if "common state dict differs" in each]
    assert not differs, "ranks hold the same beside their shards"
    for saved, layouts in LOADED.items():
        expected = results[saved]
        assert [rate for _, rate in expected["numbers"]] == pytest.approx([1e-3, 1e-3 - 7e-4 / 8])
        for loaded, parallel in layouts.items():
            case = f"{saved} -> {loaded}"
            result = results.get(case) or loaded_and_continued(config_of(parallel=parallel), tmp_path / saved)
            for ours, theirs in zip(result["numbers"], expected["numbers"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), case
            for ours, theirs in zip(result["weights"], expected["weights"], strict=True):
                assert ours.keys() == theirs.keys()
                for name, tensor in theirs.items():
                    tolerance = 0.0 if loaded == saved else 1e-5
                    np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=tolerance, err_msg=f"{case}: {name}")


PADDED = {
    # The embedding that both stages hold has a bucket of its own, behind a padded one.
    "tied, pipeline": ({"pipeline": 2}, {}),
    "small buckets": ({"data": 2}, {"overlap_grad_reduce": True, "bucket_size": 3000}),
}


def test_state_behind_a_padded_bucket_of_gradients_is_saved_where_it_belongs(tmp_path: Path):
    directory = write_tiny_qwen3(tmp_path / "model", vocab_size=VOCAB_SIZE, num_layers=2, tie_embeddings=True)
    configs = [
        replace(policy_config(directory, parallel=ParallelConfig(**layout, distributed_optimizer=True)), megatron=more)
        for layout, more in PADDED.values()
    ]

    def save_and_load() -> list[Any]:
        folders = [tmp_path / str(number) for number in range(len(configs))]
        return [
            (saved_and_continued(*each), loaded_and_continued(*each)) for each in zip(configs, folders, strict=True)
        ]

    results = run_gloo_ranks(save_and_load, 2)[0]
    for name, (expected, resumed) in zip(PADDED, results, strict=True):
        assert resumed["numbers"] == expected["numbers"], name
        for ours, theirs in zip(resumed["weights"], expected["weights"], strict=True):
            for weight, tensor in theirs.items():
                np.testing.assert_array_equal(ours[weight], tensor, f"{name}: {weight}")


def test_weights_of_later_stages_reach_rank_0_even_when_the_first_iteration_is_cut_short(tmp_path: Path):
    directory = write_tiny_qwen3(tmp_path, vocab_size=VOCAB_SIZE)

    def peek_then_export(config: Any) -> Any:
        policy = build_policy(config)
        if not policy.is_conductor:
            return policy.serve()
        first_look = policy.weights()
        name, _ = next(first_look)
        with pytest.raises(RuntimeError, match=r"must be consumed to the end before policy\.logprobs"):
            policy.logprobs(random_samples((2,), vocab_size=VOCAB_SIZE))
        first_look.close()
        exported = {name: tensor.numpy() for name, tensor in policy.weights()}
        policy.close()
        return name, exported

    config = policy_config(directory, parallel=ParallelConfig(pipeline=2))
    name, exported = run_gloo_ranks(peek_then_export, 2, config)[0]
    weights = PolicyOracle(config).weights()
    assert name == "model.embed_tokens.weight"
    assert set(exported) == set(weights)
    assert all(torch.equal(torch.from_numpy(exported[name]), tensor) for name, tensor in weights.items())


@pytest.mark.parametrize(
    "layout", [{"tensor": 2, "pipeline": 1}, {"tensor": 1, "pipeline": 2}], ids=["tensor", "pipeline"]
)
def test_a_weight_that_is_not_finite_on_another_rank_is_found_and_the_ranks_stay_in_step(
    tmp_path: Path, layout: dict[str, int]
):
    directory = write_tiny_qwen3(tmp_path / "model", vocab_size=VOCAB_SIZE)

    def diverge(config: Any) -> Any:
        policy = build_policy(config)
        if not policy.is_conductor:
            with torch.no_grad():
                policy._shard.models[0].decoder.layers[-1].mlp.linear_fc2.weight[0, 0] = float("nan")
            return policy.serve()
        with pytest.raises(PolicyDiverged, match=r"1 of its weight tensors .* model\.layers\.1\.mlp\.down_proj"):
            policy.weights()
        with pytest.raises(PolicyDiverged):
            policy.save(tmp_path / "checkpoint")
        policy.close()

    run_gloo_ranks(diverge, 2, policy_config(directory, parallel=ParallelConfig(**layout)))
    assert not (tmp_path / "checkpoint").exists()
