"""The same mini-batch gives the same loss, gradient norm and weights, however it is divided, packed and ordered.

Against the policy on one process, which other tests compare with transformers. Each number of processes starts once.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_p2o.config.tree import Config, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.rl.objective import with_length_weights
from megatron_p2o.testing.distributed import run_gloo_ranks
from megatron_p2o.testing.policy_oracle import policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import ContextShift, TrainSample

VOCAB_SIZE = 131
SAMPLES = random_samples((3, 17, 1, 20, 30, 9, 9, 2), vocab_size=VOCAB_SIZE)
OVERLAP = {"overlap_grad_reduce": True}
OVERLAP_ALL = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

Case = tuple[ParallelConfig, int, dict[str, Any]]
"""Layout, tokens of a micro-batch, `megatron`."""

CASES: dict[int, dict[str, Case]] = {
    1: {
        "one micro-batch": (ParallelConfig(), 10_000, {}),
        "a micro-batch per sample": (ParallelConfig(), 1, {}),
        "recomputed": (ParallelConfig(), 48, RECOMPUTE),
    },
    2: {
        "tensor": (ParallelConfig(tensor=2, sequence=False), 48, {}),
        "sequence": (ParallelConfig(tensor=2, sequence=True), 40, RECOMPUTE),
        "pipeline": (ParallelConfig(pipeline=2), 48, {}),
        "interleaved": (ParallelConfig(pipeline=2, virtual_pipeline=2), 48, {}),
        "interleaved, overlapped": (ParallelConfig(pipeline=2, virtual_pipeline=2), 10_000, OVERLAP),
        "context": (ParallelConfig(context=2), 30, {}),
        "context, sharded": (ParallelConfig(context=2, distributed_optimizer=True), 48, RECOMPUTE),
        "data": (ParallelConfig(data=2), 35, OVERLAP),
        "data, sharded": (ParallelConfig(data=2, distributed_optimizer=True), 48, {}),
        "data, sharded, overlapped": (ParallelConfig(data=2, distributed_optimizer=True), 1, OVERLAP_ALL),
    },
    4: {
        "tensor": (ParallelConfig(tensor=4, sequence=True), 48, {}),
        "data": (ParallelConfig(data=4, distributed_optimizer=True), 48, {}),
        "tensor, context": (ParallelConfig(tensor=2, context=2, sequence=True), 48, {}),
        "pipeline, context": (ParallelConfig(pipeline=2, virtual_pipeline=2, context=2), 48, {}),
        "context, data": (ParallelConfig(context=2, data=2, distributed_optimizer=True), 48, {}),
    },
    8: {
        "tensor, pipeline, data": (
            ParallelConfig(tensor=2, pipeline=2, data=2, sequence=True, distributed_optimizer=True),
            48,
            {},
        ),
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return write_tiny_qwen3(directory, vocab_size=VOCAB_SIZE, num_layers=4, num_kv_heads=4, tie_embeddings=True)


def config_of(model: Path, case: Case) -> Config:
    parallel, micro_batch_tokens, megatron = case
    optimizer = OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, micro_batch_tokens=micro_batch_tokens)
    return replace(policy_config(model, parallel=parallel, optimizer=optimizer), megatron=megatron)


def samples_of(config: Config) -> list[TrainSample]:
    """Return the samples weighted as `objective.normalization` asks for."""
    return with_length_weights(SAMPLES, SAMPLES, config.objective, max_new_tokens=40)


def with_references(policy: MegatronPolicy, samples: list[TrainSample], config: Config) -> list[TrainSample]:
    """Return the samples with the initial policy's log-probs where there is a KL term, whatever has moved since."""
    if config.objective.kl_coefficient == 0:
        return samples
    rows = policy.reference_logprobs(samples)
    return [replace(sample, reference_logprobs=row) for sample, row in zip(samples, rows, strict=True)]


def train_each(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Return, for each configuration in turn, what two updates give; the second against old log-probs."""
    results: list[dict[str, Any]] = []
    for number, config in enumerate(configs):
        policy = build_policy(config)
        if not policy.is_conductor:
            policy.serve()
            continue
        order = np.random.default_rng(number).permutation(len(SAMPLES))
        samples = [samples_of(config)[index] for index in order]
        before = policy.logprobs(samples)
        reports = [policy.update(with_references(policy, samples, config), None, 120)]
        reports.append(policy.update(with_references(policy, samples, config), before, 120))
        results.append(
            {
                "losses": [report.loss for report in reports],
                "grad_norms": [report.grad_norm for report in reports],
                "tokens": asdict(reports[1].tokens),
                "shifts": [
                    {key: numbers_of(report.shifts[key]) for key in sorted(report.shifts)} for report in reports
                ],
                "weights": {name: tensor.numpy() for name, tensor in policy.weights()},
            }
        )
        policy.close()
    return results


def numbers_of(shift: ContextShift) -> dict[str, Any]:
    assert shift.tokens is not None
    sums = asdict(replace(shift, tokens=None))
    del sums["tokens"]
    return {**sums, "each": shift.tokens.shifts, "kept": shift.tokens.kept}


def assert_same_shifts(result: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    templated = [sample.key for sample in SAMPLES if sample.is_templated]
    for ours, theirs in zip(result["shifts"], expected["shifts"], strict=True):
        assert list(ours) == list(theirs) == templated, name
        for key in templated:
            for what, number in theirs[key].items():
                assert ours[key][what] == pytest.approx(number, rel=1e-5, abs=1e-4), (name, key, what)


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, Any]:
    return train_each([config_of(model, (ParallelConfig(), 48, {}))])[0]


@pytest.mark.parametrize("num_processes", list(CASES))
def test_loss_gradient_and_weights_do_not_depend_on_the_layout(
    model: Path, expected: dict[str, Any], num_processes: int
):
    """float32: relative 1e-5 in loss and gradient norm, absolute 1e-5 in weights after two steps of 1e-3."""
    cases = CASES[num_processes]
    configs = [config_of(model, case) for case in cases.values()]
    results = run_gloo_ranks(train_each, num_processes, configs)[0]
    for name, result in zip(cases, results, strict=True):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6), name
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5), name
        assert result["tokens"] == pytest.approx(expected["tokens"], rel=1e-5, abs=1e-5), name
        assert_same_shifts(result, expected, name)
        for weight, tensor in expected["weights"].items():
            np.testing.assert_allclose(result["weights"][weight], tensor, atol=1e-5, err_msg=f"{name}: {weight}")


OBJECTIVES = {
    "gspo": ObjectiveConfig(surrogate="gspo", normalization="sequence_mean", clip_low=0.01, clip_high=0.01),
    "gspo, importance": ObjectiveConfig(surrogate="gspo", context="importance", clip_low=0.9, clip_high=9.0),
    "cispo": ObjectiveConfig(surrogate="cispo", normalization="sequence_sum", clip_low=1.0, clip_high=0.1),
    "clone": ObjectiveConfig(surrogate="clone", context="replace", normalization="sequence_mean"),
    "hard": ObjectiveConfig(ratio_form="hard", ratio_low=0.3, ratio_high=3.0),
    "one-sided": ObjectiveConfig(ratio_form="one_sided", ratio_low=0.3, ratio_high=3.0),
    "fading": ObjectiveConfig(ratio_form="fading", ratio_low=0.3, ratio_high=3.0, normalization="kept_token_mean"),
    "entropy and KL": ObjectiveConfig(entropy_coefficient=0.05, kl_coefficient=0.5, context="replace"),
}
LAYOUTS: dict[int, dict[str, Case]] = {
    1: {"a micro-batch per sample": CASES[1]["a micro-batch per sample"]},
    2: {name: CASES[2][name] for name in ("sequence", "interleaved", "context", "data, sharded, overlapped")},
    4: {name: CASES[4][name] for name in ("tensor, context", "pipeline, context", "context, data")},
}


def with_objective(config: Config, objective: ObjectiveConfig) -> Config:
    return replace(config, objective=objective)


@pytest.fixture(scope="module")
def expected_of(model: Path) -> dict[str, dict[str, Any]]:
    config = config_of(model, (ParallelConfig(), 10_000, {}))
    results = train_each([with_objective(config, objective) for objective in OBJECTIVES.values()])
    # The order in which samples are packed follows the number of the configuration.
    return dict(zip(OBJECTIVES, results, strict=True))


@pytest.mark.parametrize("num_processes", list(LAYOUTS))
def test_no_objective_depends_on_the_layout(
    model: Path, expected_of: dict[str, dict[str, Any]], num_processes: int
) -> None:
    """Ratios of whole sequences above all, whose tokens lie on several ranks and in several packs."""
    cases = [
        (f"{layout}: {name}", name, with_objective(config_of(model, case), objective))
        for layout, case in LAYOUTS[num_processes].items()
        for name, objective in OBJECTIVES.items()
    ]
    results = run_gloo_ranks(train_each, num_processes, [config for *_, config in cases])[0]
    for (label, name, _), result in zip(cases, results, strict=True):
        expected = expected_of[name]
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=2e-6), label
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5), label
        assert result["tokens"] == pytest.approx(expected["tokens"], rel=1e-5, abs=1e-5), label
        assert_same_shifts(result, expected, label)
        for weight, tensor in expected["weights"].items():
            np.testing.assert_allclose(result["weights"][weight], tensor, atol=1e-5, err_msg=f"{label}: {weight}")
    assert expected_of["entropy and KL"]["tokens"]["reference_kl_sum"] > 0.01
    assert 0 < expected_of["gspo"]["tokens"]["clipped_tokens"] < sum(len(each.response_ids) for each in SAMPLES)
