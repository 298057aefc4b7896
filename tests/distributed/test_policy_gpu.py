"""The policy on one GPU: what the CPU cannot show. Without a GPU these are skipped and counted."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_p2o.config.tree import Config, ObjectiveConfig, OptimizerConfig
from megatron_p2o.policy.model.attention import _attend_on_cpu, _attend_on_cuda, pack_layout
from megatron_p2o.policy.model.layer_choice import machine_capabilities
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.rl.packing import context_positions
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_kernel_sized_qwen3
from megatron_p2o.types import UpdateReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the policy's GPU path is not run"),
]

VOCAB_SIZE = 1000
SAMPLES = random_samples((30, 170, 1, 200, 90), vocab_size=VOCAB_SIZE)
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, micro_batch_tokens=256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernel_sized_qwen3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["local", "transformer_engine"])
def config(model: Path, request: pytest.FixtureRequest) -> Config:
    problem = machine_capabilities().transformer_engine_problem
    if request.param == "transformer_engine" and problem is not None:
        pytest.skip(f"Transformer Engine {problem}")
    config = policy_config(model, dtype="bfloat16", optimizer=OPTIMIZER)
    return replace(config, model=replace(config.model, layer_backend=request.param))


@pytest.fixture
def policy(config: Config) -> Iterator[MegatronPolicy]:
    with closing(build_policy(config)) as policy:
        yield policy


@pytest.mark.parametrize("context_size", [1, 2])
def test_attention_and_its_gradients_equal_those_of_the_cpu(context_size: int):
    cu_seqlens = torch.tensor([0, 64, 68, 328, 512], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    shapes = [(512, heads, 64) for heads in (4, 2, 2)]
    query, key, value = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    direction = torch.randn(shapes[0], generator=generator)
    gathered = torch.cat([context_positions(cu_seqlens, rank, context_size) for rank in range(context_size)])
    for rank in range(context_size):
        own = context_positions(cu_seqlens, rank, context_size)
        here = [part.float().requires_grad_() for part in (query[own], key[gathered], value[gathered])]
        there = [part.detach().bfloat16().cuda().requires_grad_() for part in here]
        expected = _attend_on_cpu(*here, pack_layout(cu_seqlens, rank, context_size), 0.125)
        output = _attend_on_cuda(*there, pack_layout(cu_seqlens.cuda(), rank, context_size), 0.125)
        (expected * direction[own]).sum().backward()
        (output.float() * direction[own].cuda()).sum().backward()
        torch.testing.assert_close(output.float().cpu(), expected, rtol=0.02, atol=0.02)
        for ours, theirs in zip(there, here, strict=True):
            torch.testing.assert_close(ours.grad.float().cpu(), theirs.grad, rtol=0.05, atol=0.05)


def test_an_update_in_bfloat16_is_close_to_transformers_in_float32(policy: MegatronPolicy, model: Path):
    oracle = PolicyOracle(policy_config(model, optimizer=OPTIMIZER))
    for ours, theirs in zip(policy.logprobs(SAMPLES), oracle.logprobs(SAMPLES), strict=True):
        difference = torch.from_numpy(ours) - torch.from_numpy(theirs)
        assert difference.abs().mean() < 0.03
    report = policy.update(SAMPLES, None, 600)
    loss, grad_norm = oracle.update(SAMPLES, None, 600)
    assert report.outcome == "applied"
    assert report.loss == pytest.approx(loss, abs=0.02)
    assert report.grad_norm == pytest.approx(grad_norm, rel=0.05)
    expected = oracle.weights()
    for name, weight in policy.weights():
        # Adam's first step is at most lr for every weight; bfloat16 rounds what is handed out.
        allowed = 2.5e-3 + 2**-8 * expected[name].abs()
        assert ((weight.float().cpu() - expected[name]).abs() <= allowed).all(), name


def test_recomputed_activations_give_the_same_update(config: Config):
    settings = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    reports: list[UpdateReport] = []
    for each in (config, replace(config, megatron=settings)):
        with closing(build_policy(each)) as policy:
            reports.append(policy.update(SAMPLES, None, 600))
    assert reports[1].loss == pytest.approx(reports[0].loss, rel=1e-3)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-2)


def test_the_initial_policy_answers_after_an_update_and_the_policy_is_left_as_it_was(config: Config):
    with closing(build_policy(replace(config, objective=ObjectiveConfig(kl_coefficient=0.1)))) as policy:
        initial = policy.logprobs(SAMPLES)
        samples = [replace(sample, reference_logprobs=row) for sample, row in zip(SAMPLES, initial, strict=True)]
        policy.update(samples, None, 600)
        weights = {name: weight.cpu() for name, weight in policy.weights()}
        moved = np.concatenate(policy.logprobs(SAMPLES))
        for _ in range(2):
            asked = np.concatenate(policy.reference_logprobs(SAMPLES))
            assert np.abs(asked - np.concatenate(initial)).max() < np.abs(asked - moved).max() / 10
        for name, weight in policy.weights():
            assert torch.equal(weight.cpu(), weights[name]), name


def test_a_checkpoint_restores_weights_and_optimizer(policy: MegatronPolicy, tmp_path: Path):
    policy.update(SAMPLES, None, 600)
    policy.save(tmp_path / "policy").result(timeout=60)
    first = policy.update(SAMPLES[::-1], None, 600)
    after_first = dict(policy.weights())
    policy.load(tmp_path / "policy")
    again = policy.update(SAMPLES[::-1], None, 600)
    assert again.loss == pytest.approx(first.loss, rel=1e-3)
    for name, weight in policy.weights():
        torch.testing.assert_close(weight.float(), after_first[name].float(), rtol=2**-7, atol=1e-4)


def test_a_checkpoint_is_written_without_waiting_for_the_gpu(policy: MegatronPolicy, tmp_path: Path):
    policy.update(SAMPLES, None, 600)
    written = policy.save(tmp_path / "policy")
    torch.cuda._sleep(30 * 10**9)  # some 15 s of the stream that training computes on
    behind = torch.cuda.Event()
    behind.record()
    written.result(timeout=60)
    assert not behind.query()


def test_a_checkpoint_goes_from_either_kind_of_layers_to_the_other(config: Config, tmp_path: Path):
    problem = machine_capabilities().transformer_engine_problem
    if problem is not None:
        pytest.skip(f"Transformer Engine {problem}")
    other = "local" if config.model.layer_backend == "transformer_engine" else "transformer_engine"
    with closing(build_policy(config)) as policy:
        policy.update(SAMPLES, None, 600)
        policy.save(tmp_path / "policy").result(timeout=60)
        weights, expected = dict(policy.weights()), policy.update(SAMPLES[::-1], None, 600)
    with closing(build_policy(replace(config, model=replace(config.model, layer_backend=other)))) as policy:
        policy.load(tmp_path / "policy")
        assert all(torch.equal(tensor, weights[name]) for name, tensor in policy.weights())
        report = policy.update(SAMPLES[::-1], None, 600)
    # The norm rounds to bfloat16 before or within the linear layer.
    assert report.loss == pytest.approx(expected.loss, abs=0.02)
    assert report.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)
