"""The whole policy in one process against transformers and torch's AdamW."""

import gzip
import io
import itertools
import json
import pickle
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import Qwen3ForCausalLM

from megatron_p2o.config.tree import (
    Config,
    HeadConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_p2o.files import digest_of
from megatron_p2o.interfaces import PolicyDiverged
from megatron_p2o.policy.model.attention import pack_layout, sample_positions
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.model.head import HeadTask
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.policy.training.checkpoint import Staged
from megatron_p2o.policy.training.forward import Denominator, MicroBatch
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.policy.training.safe_pickle import RefusedPickle
from megatron_p2o.policy.training.settings import check_values
from megatron_p2o.policy.weights.hf_directory import WeightFiles, write_hf_directory
from megatron_p2o.policy.weights.hf_weights import load_hf_weights
from megatron_p2o.rl.objective import loss_rule, token_stats
from megatron_p2o.rl.packing import pack
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples, token_losses
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import PackedBatch, UpdateReport
from p2o_kernels import HeadOptions, LossRule, PolicyLoss
from p2o_kernels.policy_loss import linear_policy_loss_reference
from p2o_kernels.policy_loss.token_loss import Context

VOCAB_SIZE = 131
LENGTHS = (3, 17, 1, 20, 30, 9, 9)
SAMPLES = random_samples(LENGTHS, vocab_size=VOCAB_SIZE)
CONTEXTS: tuple[Context, ...] = ("sampling", "replace", "importance", "ratio_mask")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four query heads per key/value head, a head size that is not hidden size / heads, norms that are not 1."""
    directory = write_tiny_qwen3(
        tmp_path_factory.mktemp("tiny"),
        vocab_size=VOCAB_SIZE,
        num_heads=8,
        num_kv_heads=2,
        tie_embeddings=request.param,
    )
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)


@contextmanager
def policy_of(config: Config) -> Iterator[MegatronPolicy]:
    with closing(build_policy(config)) as policy:
        yield policy


def weights_of(policy: MegatronPolicy) -> dict[str, torch.Tensor]:
    return dict(policy.weights())


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_packed_logits_and_log_probs_equal_transformers_sample_by_sample(any_model: Path):
    config = policy_config(any_model)
    oracle = PolicyOracle(config)
    with policy_of(config) as policy:
        for ours, theirs in zip(policy.logprobs(SAMPLES), oracle.logprobs(SAMPLES), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        lengths = torch.tensor([7, 1, 12])
        ids = torch.randint(1, VOCAB_SIZE, (20,), generator=torch.Generator().manual_seed(0))
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        with torch.no_grad(), cuda_stand_ins():
            logits = policy._shard.models[0](
                ids[None], sample_positions(cu_seqlens)[None], None, packed_seq_params=pack_layout(cu_seqlens)
            )
            expected = torch.cat([oracle.model(part[None]).logits[0] for part in ids.split(lengths.tolist())])
        torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)


def readable_loss(logits_TV: torch.Tensor, batch: PackedBatch, objective: ObjectiveConfig) -> torch.Tensor:
    """Return the summed token loss of full logits by its specification, differentiable in the logits."""
    rule = LossRule(
        context=objective.context,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        dual_clip=objective.dual_clip,
        ratio_low=objective.ratio_low,
        ratio_high=objective.ratio_high,
        ratio_form=objective.ratio_form,
    )
    rows = batch.loss_mask_T.nonzero().squeeze(1)
    old_T = batch.old_logprobs_T
    loss, *_ = linear_policy_loss_reference(
        logits_TV[rows],
        torch.eye(logits_TV.shape[1], dtype=torch.float64),
        batch.target_ids_T[rows],
        advantages_T=batch.advantages_T[rows],
        weights_T=batch.loss_weights_T[rows],
        rule=rule,
        old_logprobs_T=None if old_T is None else old_T[rows],
        sampling_logprobs_T=batch.sampling_logprobs_T[rows],
        is_templated_T=batch.is_templated_T[rows],
        temperature=0.7,
    )
    return loss


def test_every_parameter_has_the_gradient_of_full_logits_and_the_readable_loss(any_model: Path):
    """In float64, so that only formulas can differ; both denominators, by the divisor that training takes."""
    config = replace(policy_config(any_model), rollout=RolloutConfig(temperature=0.7))
    with policy_of(config) as policy, cuda_stand_ins():
        near = [
            row + np.float32(0.2) * np.sin(np.arange(len(row)), dtype=np.float32) for row in policy.logprobs(SAMPLES)
        ]
        samples = [replace(sample, sampling_logprobs=row[::-1] - 1) for sample, row in zip(SAMPLES, near, strict=True)]
        model = policy._shard.models[0].double()
        parameters = dict(model.named_parameters())
        for old in (None, near):
            batch = pack(samples, old)
            whole = MicroBatch(
                whole=batch,
                part=batch,
                samples=tuple(range(len(samples))),
                token_ids_T=batch.token_ids_T,
                positions_T=sample_positions(batch.cu_seqlens),
                layout=pack_layout(batch.cu_seqlens),
            )
            layout = {"packed_seq_params": whole.layout}
            inputs = (whole.token_ids_T[None], whole.positions_T[None], None)
            logits = model(*inputs, **layout)[0]
            for context, normalization in itertools.product(CONTEXTS, ("token_mean", "kept_token_mean")):
                objective = ObjectiveConfig(
                    context=context, normalization=normalization, clip_high=0.28, ratio_high=3.0
                )
                outcome = PolicyLoss(*model(*inputs, **layout, labels=HeadTask(batch=batch, rule=loss_rule(objective))))
                divided = Denominator(objective=objective, num_loss_tokens=120, num_samples=7, counts_here=True)
                loss, divisor = divided.contribution(outcome.loss, token_stats(batch, outcome), whole, 0)
                expected = readable_loss(logits, batch, objective)
                num_kept = int((outcome.weights_T != 0).sum())
                assert divisor == (num_kept if normalization == "kept_token_mean" else 120)
                assert (num_kept < sum(LENGTHS)) == (context == "ratio_mask")
                torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
                ours = torch.autograd.grad(loss / divisor, list(parameters.values()))
                truth = torch.autograd.grad(expected / divisor, list(parameters.values()), retain_graph=True)
                for name, one, other in zip(parameters, ours, truth, strict=True):
                    assert (one - other).norm() <= 1e-6 * other.norm(), (context, name)
                    assert other.norm() > 0, name


def test_the_settings_of_the_head_reach_it(model: Path):
    config = replace(policy_config(model), head=HeadConfig(kernel="plain", weight_grad="precise"))
    with policy_of(config) as policy:
        assert policy._shard.models[0].head_options == HeadOptions(kernel="plain", weight_grad="precise")


OBJECTIVES = {
    "ppo": ObjectiveConfig(),
    "gspo": ObjectiveConfig(surrogate="gspo", clip_low=0.2, clip_high=0.3),
    "gspo, importance": ObjectiveConfig(surrogate="gspo", context="importance", clip_low=0.5, clip_high=2.0),
    "cispo": ObjectiveConfig(surrogate="cispo", context="importance", clip_low=1.0, clip_high=1.5),
    "entropy": ObjectiveConfig(entropy_coefficient=0.05, context="replace"),
    "k2": ObjectiveConfig(kl_coefficient=0.1, kl_estimator="k2"),
    "k3": ObjectiveConfig(kl_coefficient=0.1, kl_estimator="k3", surrogate="cispo"),
    "everything": ObjectiveConfig(surrogate="gspo", entropy_coefficient=0.02, kl_coefficient=0.1),
}
NEAR = [
    # Log-probs of sampling that the tiny policy's are near to, so that no ratio is astronomic.
    replace(sample, sampling_logprobs=(sample.sampling_logprobs * 0.1 - 4.3).astype(np.float32))
    for sample in SAMPLES
]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_three_updates_equal_transformers_with_torch_adamw(any_model: Path, objective: ObjectiveConfig):
    config = policy_config(any_model, objective=objective)
    oracle = PolicyOracle(config)
    samples = NEAR
    if objective.kl_coefficient:
        dead = [replace(sample, advantage=0.0) for sample in NEAR[:2]]  # their KL and entropy count
        samples = [
            replace(sample, reference_logprobs=row + np.float32(0.2) * np.sin(np.arange(len(row)), dtype=np.float32))
            for sample, row in zip([*NEAR, *dead], oracle.logprobs([*NEAR, *dead]), strict=True)
        ]
    with policy_of(config) as policy:
        old: Any = None
        for _ in range(3):
            report = policy.update(samples, old, 120)
            loss, grad_norm = oracle.update(samples, old, 120)
            assert report.loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
            assert report.grad_norm == pytest.approx(grad_norm, rel=1e-5)
            old = old or oracle.logprobs(samples)
        assert_same_weights(weights_of(policy), oracle.weights(), atol=1e-5)
    if objective == OBJECTIVES["gspo"]:
        assert 0 < report.tokens.clipped_tokens < report.tokens.kept_tokens, report.tokens


def test_the_export_equals_what_was_loaded_bit_for_bit(any_model: Path, tmp_path: Path):
    config = policy_config(any_model)
    with policy_of(config) as policy:
        assert_same_weights(weights_of(policy), PolicyOracle(config).weights(), atol=0)
        write_hf_directory(policy.weights(), any_model, tmp_path)
    again = PolicyOracle(policy_config(tmp_path)).weights()
    assert_same_weights(again, PolicyOracle(config).weights(), atol=0)
    assert (tmp_path / "tokenizer.json").read_bytes() == (any_model / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] in (True, False)


@pytest.mark.parametrize("normalization", ["token_mean", "kept_token_mean"])
def test_an_update_does_not_depend_on_micro_batches_or_order(model: Path, normalization: Any):
    results: list[tuple[float, float]] = []
    weights: list[dict[str, torch.Tensor]] = []
    for budget, samples in ((1, SAMPLES), (40, SAMPLES), (10_000, SAMPLES), (40, SAMPLES[::-1])):
        config = policy_config(
            model,
            objective=ObjectiveConfig(normalization=normalization, ratio_low=0.3, ratio_high=2.0),
            optimizer=OptimizerConfig(lr=1e-3, eps=1e-4, micro_batch_tokens=budget),
        )
        with policy_of(config) as policy:
            report = policy.update(samples, None, 120)
            results.append((report.loss, report.grad_norm))
            weights.append(weights_of(policy))
    assert 0 < report.tokens.kept_tokens < sum(LENGTHS)
    for result, weight in zip(results[1:], weights[1:], strict=True):
        assert result == pytest.approx(results[0], rel=1e-5)
        assert_same_weights(weight, weights[0], atol=1e-6)


def test_dropped_rollouts_count_in_the_denominator_all_and_need_no_forward_pass(model: Path):
    """Zero advantage has no gradient: leaving such rollouts out changes nothing as long as they are counted."""
    dead = [replace(sample, advantage=0.0) for sample in random_samples((11, 4), vocab_size=VOCAB_SIZE, seed=5)]
    for objective in (ObjectiveConfig(), ObjectiveConfig(context="replace")):
        with policy_of(policy_config(model, objective=objective)) as policy:
            with_dead = policy.update([*SAMPLES, *dead], None, sum(LENGTHS) + 15)
        with policy_of(policy_config(model, objective=objective)) as policy:
            without = policy.update(SAMPLES, None, sum(LENGTHS) + 15)
        assert (without.loss, without.grad_norm) == pytest.approx((with_dead.loss, with_dead.grad_norm), rel=1e-5)
        assert with_dead.tokens.loss_tokens == without.tokens.loss_tokens + 15


def test_only_response_tokens_that_carry_gradient_go_through_the_head(model: Path):
    dead = [replace(sample, advantage=0.0) for sample in random_samples((7, 8), vocab_size=VOCAB_SIZE, seed=3)]
    with policy_of(policy_config(model, objective=ObjectiveConfig(context="replace"))) as policy:
        report = policy.update([*SAMPLES, *dead], None, 120)
    assert report.tokens.live_tokens == sum(LENGTHS)
    assert report.tokens.loss_tokens == sum(LENGTHS) + 15


def test_micro_batch_normalization_is_the_row_weighted_mean_of_micro_batch_means(model: Path):
    objective = ObjectiveConfig(normalization="micro_batch_mean", context="replace")
    samples = random_samples((30, 2, 9), vocab_size=VOCAB_SIZE)  # with a budget of 40: [0], [1, 2]
    config = policy_config(model, objective=objective, optimizer=OptimizerConfig(lr=1e-3, micro_batch_tokens=40))
    oracle = PolicyOracle(config)
    means = []
    for rows in (samples[:1], samples[1:]):
        losses = [
            token_losses(oracle.logprobs_R(row), oracle.logprobs_R(row).detach(), row, objective)[0] for row in rows
        ]
        means.append(torch.cat(losses).mean())
    expected = means[0] * (1 / 3) + means[1] * (2 / 3)
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(oracle.model.parameters(), 1.0)
    with policy_of(config) as policy:
        report = policy.update(samples, None, 41)
    assert report.loss == pytest.approx(float(expected.detach()), abs=1e-6)
    assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_bfloat16_trains_with_float32_gradients_close_to_float32(model: Path):
    """bfloat16 keeps 8 bits: 1 % of the gradient's norm, and weights within two of their own roundings plus a step."""
    outcomes: list[tuple[Any, dict[str, torch.Tensor]]] = []
    for dtype in ("float32", "bfloat16"):
        objective = ObjectiveConfig(context="replace")
        with policy_of(policy_config(model, dtype=dtype, objective=objective)) as policy:
            report = policy.update(SAMPLES, None, 120)
            parameters = policy._shard.models[0].parameters()
            assert {parameter.main_grad.dtype for parameter in parameters} == {torch.float32}
            outcomes.append((report, {name: tensor.float() for name, tensor in weights_of(policy).items()}))
    (exact, exact_weights), (rounded, rounded_weights) = outcomes
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.01)
    assert rounded.loss == pytest.approx(exact.loss, abs=1e-4)
    for name, weight in exact_weights.items():
        torch.testing.assert_close(rounded_weights[name], weight, rtol=2**-7, atol=1e-3)


def test_a_bfloat16_gradient_buffer_gets_the_gradient_rounded(model: Path):
    config = policy_config(model, dtype="bfloat16")
    with policy_of(config) as policy:
        fine = policy.update(SAMPLES, None, 120)
    with policy_of(replace(config, megatron={"grad_reduce_in_fp32": False})) as policy:
        coarse = policy.update(SAMPLES, None, 120)
    assert coarse.loss == fine.loss and coarse.grad_norm != fine.grad_norm
    assert coarse.grad_norm == pytest.approx(fine.grad_norm, rel=4e-3)


def test_a_gradient_that_is_not_finite_changes_nothing_and_training_goes_on(model: Path):
    with policy_of(policy_config(model)) as policy:
        before = weights_of(policy)
        broken = policy.update([replace(SAMPLES[0], advantage=float("nan")), SAMPLES[1]], None, 20)
        assert broken.outcome == "non_finite" and not np.isfinite(broken.grad_norm)
        assert_same_weights(weights_of(policy), before, atol=0)
        healthy = policy.update(SAMPLES, None, 120)
    with policy_of(policy_config(model)) as policy:
        assert healthy.grad_norm == policy.update(SAMPLES, None, 120).grad_norm


def test_the_learning_rate_warms_up_over_applied_skipped_and_empty_updates(model: Path):
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=3, micro_batch_tokens=48)
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        reports = [
            policy.update(SAMPLES, None, 120),
            policy.update([], None, 0),
            policy.update([replace(SAMPLES[0], advantage=float("nan"))], None, 3),
            policy.update(SAMPLES, None, 120),
            policy.update(SAMPLES, None, 120),
        ]
    assert [report.learning_rate for report in reports] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert [report.outcome for report in reports] == ["applied", "empty", "non_finite", "applied", "applied"]


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "distributed optimizer"])
def test_the_initial_policy_answers_after_updates_and_a_load_and_the_policy_is_left_as_it_was(
    model: Path, tmp_path: Path, is_sharded: bool
):
    parallel = ParallelConfig(timeout_s=30.0, distributed_optimizer=is_sharded)
    config = policy_config(model, objective=ObjectiveConfig(kl_coefficient=0.1), parallel=parallel)
    with policy_of(config) as policy:
        initial = policy.logprobs(SAMPLES)
        samples = [replace(sample, reference_logprobs=row) for sample, row in zip(SAMPLES, initial, strict=True)]
        policy.update(samples, None, 120)
        policy.save(tmp_path / "checkpoint").result(60)
        weights, moved = weights_of(policy), policy.logprobs(SAMPLES)
        for asked, row, other in zip(policy.reference_logprobs(SAMPLES), initial, moved, strict=True):
            np.testing.assert_array_equal(asked, row)
            assert np.abs(other - row).max() > 1e-3
        assert_same_weights(weights_of(policy), weights, atol=0)
        after = policy.update(samples, None, 120)
    with policy_of(config) as policy:
        policy.load(tmp_path / "checkpoint")
        for asked, row in zip(policy.reference_logprobs(SAMPLES), initial, strict=True):
            np.testing.assert_array_equal(asked, row)
        assert policy.update(samples, None, 120) == after


def test_without_a_kl_term_no_weights_of_the_initial_policy_are_kept(model: Path):
    with (
        policy_of(policy_config(model)) as policy,
        pytest.raises(PolicyError, match=r"objective\.kl_coefficient=0 keeps"),
    ):
        policy.reference_logprobs(SAMPLES)


def test_samples_without_the_log_probs_that_a_kl_term_needs_are_refused(model: Path):
    with policy_of(policy_config(model, objective=ObjectiveConfig(kl_coefficient=0.1))) as policy:
        with pytest.raises(PolicyError, match="reference_logprobs_T is None"):
            policy.update(SAMPLES, None, 120)
        short = [replace(sample, reference_logprobs=np.zeros(2, np.float32)) for sample in SAMPLES]
        with pytest.raises(ValueError, match=r"samples\[0\] has 3 response tokens but \[3, 2\] log-probs"):
            policy.update(short, None, 120)


def rates_of(model: Path, optimizer: OptimizerConfig, num_updates: int, num_planned: int) -> list[float]:
    """Return the learning rates of updates without samples, of which the schedule counts each."""
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        policy.plan_updates(num_planned)
        return [policy.update([], None, 0).learning_rate for _ in range(num_updates)]


def test_the_learning_rate_decays_over_what_is_left_of_the_run_after_warm_up(model: Path):
    """By the formulas written out: steps 0 and 1 are warm-up, steps 2 to 9 decay, 10 and 11 were not planned."""
    linear = OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2, lr_decay="linear")
    done = [(step - 2) / 8 for step in range(2, 10)]
    warmup = [1e-3 / 3, 2e-3 / 3]
    expected = [*warmup, *(1e-4 + 9e-4 * (1 - share) for share in done), 1e-4, 1e-4]
    assert rates_of(model, linear, 12, num_planned=10) == pytest.approx(expected)
    cosine = replace(linear, lr_decay="cosine", warmup_steps=0, warmup_share=0.11)  # 1.1 of 10 steps: 2
    expected = [*warmup, *(1e-4 + 9e-4 * (1 + np.cos(np.pi * share)) / 2 for share in done), 1e-4, 1e-4]
    assert rates_of(model, cosine, 12, num_planned=10) == pytest.approx(expected)


def test_a_run_of_one_update_or_of_warm_up_alone_has_a_schedule_too(model: Path):
    optimizer = OptimizerConfig(lr=1e-3, lr_decay="cosine")
    assert rates_of(model, optimizer, 2, num_planned=1) == pytest.approx([1e-3, 0.0])
    optimizer = replace(optimizer, warmup_steps=5)
    assert rates_of(model, optimizer, 3, num_planned=3) == pytest.approx([1e-3 / 6, 2e-3 / 6, 3e-3 / 6])


def test_a_learning_rate_that_depends_on_the_runs_length_is_not_guessed(model: Path):
    for optimizer in (OptimizerConfig(lr_decay="linear"), OptimizerConfig(warmup_share=0.1)):
        with (
            policy_of(policy_config(model, optimizer=optimizer)) as policy,
            pytest.raises(PolicyError, match="call plan_updates first"),
        ):
            policy.update(SAMPLES, None, 120)


def test_a_resumed_run_decays_over_the_length_it_has_now(model: Path, tmp_path: Path):
    optimizer = OptimizerConfig(lr=1e-3, lr_decay="linear")
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        policy.plan_updates(4)
        rates = [policy.update(SAMPLES, None, 120).learning_rate for _ in range(2)]
        policy.save(tmp_path / "checkpoint").result(60)
    assert rates == pytest.approx([1e-3, 0.75e-3])
    for order in ("plan first", "load first"):
        with policy_of(policy_config(model, optimizer=optimizer)) as policy:
            calls = [lambda: policy.plan_updates(8), lambda: policy.load(tmp_path / "checkpoint")]
            for call in calls if order == "plan first" else reversed(calls):
                call()
            assert policy.update(SAMPLES, None, 120).learning_rate == pytest.approx(0.75e-3), order
            assert policy.update(SAMPLES, None, 120).learning_rate == pytest.approx(0.625e-3), order


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_policy_that_is_not_finite_is_neither_served_nor_saved_until_a_good_one_is_loaded(
    model: Path, tmp_path: Path, value: float
):
    with policy_of(policy_config(model)) as policy:
        policy.save(tmp_path / "good").result(60)
        expected = weights_of(policy)
        policy.update(SAMPLES, None, 120)
        with torch.no_grad():
            policy._shard.models[0].decoder.layers[1].mlp.linear_fc1.weight[3, 2] = value
        policy.update([], None, 0)
        named = r"diverged: 2 of .* model\.layers\.1\.mlp\.gate_proj\.weight, model\.layers\.1\.mlp\.up_proj\.weight"
        for hand_over in (policy.weights, partial(policy.save, tmp_path / "bad")):
            with pytest.raises(PolicyDiverged, match=named):
                hand_over()
        assert not (tmp_path / "bad").exists()
        policy.load(tmp_path / "good")
        assert_same_weights(weights_of(policy), expected, atol=0)


def test_a_learning_rate_that_blows_the_weights_up_is_noticed_after_the_update(model: Path):
    optimizer = OptimizerConfig(lr=float("inf"), micro_batch_tokens=48)
    with policy_of(policy_config(model, optimizer=optimizer)) as policy:
        assert policy.update(SAMPLES, None, 120).outcome == "applied", "the gradient itself is finite"
        with pytest.raises(PolicyDiverged, match="NaN or infinite"):
            policy.weights()


def test_a_model_with_a_weight_that_is_not_a_number_is_refused_by_name(model: Path, tmp_path: Path):
    directory = write_tiny_qwen3(tmp_path, vocab_size=VOCAB_SIZE)
    check_values(policy_config(directory))
    spoil(directory, "model.layers.0.mlp.down_proj.weight")
    named = r"model\.layers\.0\.mlp\.down_proj\.weight must be finite"
    with pytest.raises(ValueError, match=named):
        check_values(policy_config(directory))
    with policy_of(policy_config(model)) as policy:
        shard = policy._shard
        with WeightFiles(directory) as files, pytest.raises(ValueError, match=named):
            load_hf_weights(shard.models, files, shard.architecture)


def spoil(directory: Path, name: str) -> None:
    """Make one value of a tensor NaN."""
    tensors = load_file(directory / "model.safetensors")
    tensors[name].flatten()[5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_an_empty_update_moves_no_weight(model: Path):
    with policy_of(policy_config(model)) as policy:
        policy.update(SAMPLES, None, 120)
        before = weights_of(policy)
        report = policy.update([], None, 7)
        assert (report.loss, report.grad_norm, report.outcome) == (0.0, 0.0, "empty")
        assert_same_weights(weights_of(policy), before, atol=0)
        assert policy.logprobs([]) == []


@pytest.mark.parametrize("num_updates", [0, 1], ids=["before the first step", "after it"])
def test_training_continues_identically_after_save_and_load(model: Path, tmp_path: Path, num_updates: int):
    with policy_of(policy_config(model)) as policy:
        for _ in range(num_updates):
            policy.update(SAMPLES, None, 120)
        seed_every_generator(7)
        saving = policy.save(tmp_path / "checkpoint")
        # Training goes on while the files are written; what they hold is the state of now.
        expected = [policy.update(SAMPLES, None, 120) for _ in range(2)]
        weights = weights_of(policy)
        drawn = draw_from_every_generator()
    with policy_of(policy_config(model)) as policy:
        policy.load(tmp_path / "checkpoint")
        assert [policy.update(SAMPLES, None, 120) for _ in range(2)] == expected
        assert_same_weights(weights_of(policy), weights, atol=0)
        assert draw_from_every_generator() == drawn
    digests = saving.result(0)
    assert set(digests) == {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert all(digest_of(tmp_path / "checkpoint" / name) == digest for name, digest in digests.items())


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole", "distributed optimizer"])
@pytest.mark.parametrize("num_updates", [2, 5], ids=["during warm-up", "after it"])
def test_settings_of_the_optimizer_given_at_a_resume_replace_those_of_the_checkpoint(
    model: Path, tmp_path: Path, num_updates: int, is_sharded: bool
):
    """Against torch's AdamW that gets the new settings between two steps and keeps its moments."""
    parallel = ParallelConfig(timeout_s=30.0, distributed_optimizer=is_sharded)
    old = OptimizerConfig(lr=1e-3, warmup_steps=4, weight_decay=0.1, eps=1e-4, micro_batch_tokens=48)
    new = replace(old, lr=4e-4, warmup_steps=6, weight_decay=0.5, beta1=0.7, beta2=0.9, eps=1e-3, clip_grad=0.5)
    oracle = PolicyOracle(policy_config(model, optimizer=old))
    with policy_of(policy_config(model, optimizer=old, parallel=parallel)) as policy:
        for _ in range(num_updates):
            policy.update(SAMPLES, None, 120)
            oracle.update(SAMPLES, None, 120)
        policy.save(tmp_path / "checkpoint").result(60)
    oracle.change(new)
    with policy_of(policy_config(model, optimizer=new, parallel=parallel)) as policy:
        policy.update(SAMPLES, None, 120)  # a load does not count on top of what was trained before it
        policy.load(tmp_path / "checkpoint")
        rates = [policy.update(SAMPLES, None, 120).learning_rate for _ in range(3)]
        expected = [4e-4 * min(1, (num_updates + step + 1) / 7) for step in range(3)]
        assert rates == pytest.approx(expected)
        for _ in range(3):
            oracle.update(SAMPLES, None, 120)
        assert_same_weights(weights_of(policy), oracle.weights(), atol=2e-6)


def seed_every_generator(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def draw_from_every_generator() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.standard_normal(), torch.rand(()).item()]


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "sharded object"])
def test_a_checkpoint_that_would_run_code_is_refused(model: Path, tmp_path: Path, file: str):
    directory, trace = tmp_path / "checkpoint", tmp_path / "code was run"
    with policy_of(policy_config(model)) as policy:
        policy.save(directory).result(60)
        if file == ".metadata":
            (directory / file).write_bytes(pickle.dumps(Malicious(trace)))
        elif file == "common.pt":
            torch.save({"optimizer": Malicious(trace)}, directory / file)
        else:
            replace_first_object(directory, Malicious(trace))
        with pytest.raises((RefusedPickle, PolicyError), match=r"touch|eights.only"):
            policy.load(directory)
    assert not trace.exists()


def replace_first_object(directory: Path, value: Any) -> None:
    """Put `value` in the place of an object that lies among the tensors."""
    index = pickle.loads((directory / ".metadata").read_bytes())
    name = next(key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata))
    stored = next(info for key, info in index.storage_data.items() if key.fqn == name)
    content = io.BytesIO()
    torch.save([value], content)
    path = directory / stored.relative_path
    stored.offset, stored.length = path.stat().st_size, len(content.getvalue())
    path.write_bytes(path.read_bytes() + content.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def test_the_state_common_to_all_ranks_is_one_file_also_where_megatron_passes_it_with_the_shards(
    model: Path, tmp_path: Path
):
    common = {"scheduler": {"num_steps": 3}}
    with policy_of(policy_config(model)):
        staged = Staged()
        staged.save({"common_state": ShardedObject("common_state", common, (1,), (0,))}, tmp_path)
    assert torch.load(tmp_path / "common.pt", weights_only=True) == common
    assert staged.state == {}


def test_a_missing_checkpoint_is_named(model: Path, tmp_path: Path):
    with policy_of(policy_config(model)) as policy, pytest.raises(ValueError, match="holds no checkpoint"):
        policy.load(tmp_path)


def test_recomputing_activations_changes_nothing(model: Path):
    plain = policy_config(model)
    recomputing = replace(
        plain, megatron={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    )
    with policy_of(plain) as policy:
        expected = policy.update(SAMPLES, None, 120)
    with policy_of(recomputing) as policy:
        report = policy.update(SAMPLES, None, 120)
    assert (report.loss, report.grad_norm) == (expected.loss, expected.grad_norm)


def test_bfloat16_accumulates_updates_that_are_too_small_for_it(model: Path):
    """A step of 2e-4 is lost on a bfloat16 weight of 0.25 or more (spacing 2e-3); the float32 copy keeps it."""
    optimizer = OptimizerConfig(lr=2e-4, weight_decay=0.0, micro_batch_tokens=10_000)
    with policy_of(policy_config(model, dtype="bfloat16", optimizer=optimizer)) as policy:
        before = weights_of(policy)
        reports = [policy.update(SAMPLES, None, 120)]
        after_one = weights_of(policy)
        reports += [policy.update(SAMPLES, None, 120) for _ in range(11)]
        after_all = weights_of(policy)
    name = "lm_head.weight"
    is_large = before[name].abs() >= 0.25
    assert before[name].dtype == torch.bfloat16
    assert torch.equal(after_one[name][is_large], before[name][is_large])
    assert (after_all[name] != before[name])[is_large].float().mean() > 0.3
    _, grad_norm = PolicyOracle(policy_config(model)).update(SAMPLES, None, 120)
    # Eight bits of mantissa in activations and log-probs.
    assert reports[0].grad_norm == pytest.approx(grad_norm, rel=0.05)


def test_one_update_is_traced_and_gives_the_same_numbers(model: Path, tmp_path: Path):
    plain = policy_config(model)
    run = RunConfig(name="traced", directory=str(tmp_path))
    reports: list[list[UpdateReport]] = []
    for config in (plain, replace(plain, run=run, logging=LoggingConfig(profile_update=2))):
        with policy_of(config) as policy:
            reports.append([policy.update(SAMPLES, None, 120) for _ in range(3)])
    assert reports[0] == reports[1]
    (path,) = (tmp_path / "traced" / "profile").iterdir()
    assert path.name == "update-2-rank-0.json.gz"
    names = {event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= names
