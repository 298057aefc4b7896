"""The whole policy in one process against transformers and torch's AdamW."""

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_p2o.config.tree import (
    HeadConfig,
    LoggingConfig,
    LogprobsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from megatron_p2o.policy.model.attention import pack_layout, sample_positions
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.model.head import HeadInput
from megatron_p2o.policy.training.forward import Denominator, MicroBatch
from megatron_p2o.policy.training.ranks import MegatronPolicy
from megatron_p2o.policy.training.settings import check_values
from megatron_p2o.policy.weights.hf_directory import WeightFiles, write_hf_directory
from megatron_p2o.policy.weights.hf_weights import load_hf_weights
from megatron_p2o.rl.objective import loss_rule, token_stats
from megatron_p2o.rl.packing import pack
from megatron_p2o.rl.update import update
from megatron_p2o.testing.fakes import fake_problem
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples, token_losses
from megatron_p2o.testing.tested_policy import LENGTHS, SAMPLES, VOCAB_SIZE, assert_same_weights, policy_of, weights_of
from megatron_p2o.testing.tiny_model import write_tiny_qwen3
from megatron_p2o.types import (
    CORRECT,
    PLAIN,
    Completion,
    Group,
    PackedBatch,
    Prompt,
    Rollout,
    Template,
    TokenStats,
    UpdateReport,
)
from p2o_kernels import HeadOptions, LossRule, PolicyLoss
from p2o_kernels.policy_loss import linear_policy_loss_reference
from p2o_kernels.policy_loss.token_loss import Context

HINT = Template(id=1, text="Think.", parent=0)
CONTEXTS: tuple[Context, ...] = ("sampling", "replace", "importance", "ratio_mask")


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
                outcome = PolicyLoss(
                    *model(*inputs, **layout, labels=HeadInput(batch=batch, rule=loss_rule(objective)))
                )
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
    "clone": ObjectiveConfig(surrogate="clone", context="replace"),
    "hard": ObjectiveConfig(ratio_form="hard", ratio_low=0.7, ratio_high=1.4),
    "one-sided": ObjectiveConfig(ratio_form="one_sided", ratio_low=0.7, ratio_high=1.4),
    "soft": ObjectiveConfig(ratio_form="soft", ratio_low=0.7, ratio_high=1.4),
    "fading": ObjectiveConfig(ratio_form="fading", ratio_low=0.7, ratio_high=1.4),
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


def test_an_annealed_mask_is_that_of_its_step_and_goes_on_with_it_from_a_checkpoint(model: Path, tmp_path: Path):
    """Each update equals the oracle's with the band of that step; the second half is trained by a resumed policy."""
    objective = ObjectiveConfig(ratio_low=0.9, ratio_high=1.1, ratio_widening=4.0, ratio_anneal_steps=3)
    config, kept = policy_config(model, objective=objective), list[float]()
    oracle = PolicyOracle(config)

    def train(policy: MegatronPolicy, steps: range) -> None:
        for step in steps:
            widening = 4.0 ** max(0.0, 1 - step / 3)
            band = replace(objective, ratio_low=0.9 / widening, ratio_high=1.1 * widening, ratio_anneal_steps=0)
            oracle.config = replace(config, objective=band)
            report = policy.update(NEAR, None, 120)
            loss, grad_norm = oracle.update(NEAR, None, 120)
            assert report.loss == pytest.approx(loss, abs=1e-6, rel=1e-6)
            assert report.grad_norm == pytest.approx(grad_norm, rel=1e-5)
            kept.append(report.tokens.templated_kept_tokens / report.tokens.templated_tokens)

    with policy_of(config) as policy:
        train(policy, range(2))
        policy.save(tmp_path / "saved").result(60)
    with policy_of(config) as policy:
        policy.load(tmp_path / "saved")
        train(policy, range(2, 5))
    assert kept[0] > kept[-1], "the band has closed"


def test_a_surrogate_of_the_users_own_moves_the_weights_as_ours_does(model: Path, tmp_path: Path):
    code = tmp_path / "own_ppo.py"
    code.write_text(
        "import torch\n"
        "def ppo(ratio, logprobs, advantages, rule):\n"
        "    band = ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high)\n"
        "    losses = torch.maximum(-advantages * ratio, -advantages * band)\n"
        "    return torch.where(advantages < 0, torch.minimum(losses, -rule.dual_clip * advantages), losses)\n"
    )
    moved: list[Any] = []
    for surrogate in ("ppo", f"{code}:ppo"):
        with policy_of(policy_config(model, objective=ObjectiveConfig(surrogate=surrogate))) as policy:
            old = policy.logprobs(NEAR)
            reports = [policy.update(NEAR, given, 120) for given in (None, old, old)]
            moved.append((weights_of(policy), [report.loss for report in reports]))
    (ours, our_losses), (own, own_losses) = moved
    assert own_losses == pytest.approx(our_losses, rel=1e-6)
    assert len(set(our_losses)) == 3, "the weights moved"
    assert_same_weights(own, ours, atol=1e-7)


@pytest.mark.parametrize("context", ["replace", "importance", "ratio_mask"])
def test_the_shift_of_each_templated_sample_is_its_template_s_log_probs_less_those_of_the_policy_before(
    model: Path, context: Context
):
    config = policy_config(model, objective=ObjectiveConfig(context=context))
    with policy_of(config) as policy:
        before = policy.logprobs(NEAR)
        reports = [policy.update(NEAR, old, 120) for old in (None, None if context == "importance" else before)]
    truth = {
        sample.key: float((sample.sampling_logprobs.astype(np.float64) - row).sum())
        for sample, row in zip(NEAR, before, strict=True)
        if sample.is_templated
    }
    # The importance context keeps no log-probs of before: its second update sees the moved policy's.
    for report in reports[:1] if context == "importance" else reports:
        assert {key: shift.head_sum for key, shift in report.shifts.items()} == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("context", ["replace", "ratio_mask"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_weights_of_a_first_step_with_templates_are_those_of_one_without(
    model: Path, context: Context, recompute: bool
):
    """The same noise between engine and trainer, once under templates and once without any: the same diagnostics."""
    objective = ObjectiveConfig(context=context, ratio_low=1e-9, ratio_high=1e9)
    config = policy_config(model, objective=objective)
    config = replace(config, logprobs=LogprobsConfig(recompute=recompute, importance_cap=1.1))
    generator = np.random.default_rng(0)
    noise = [generator.normal(0, 0.2, length).astype(np.float32) for length in LENGTHS]

    def groups_of(policy: MegatronPolicy, has_templates: bool) -> list[Group]:
        rollouts: list[Rollout] = []
        for index, (sample, noise_R) in enumerate(zip(SAMPLES, noise, strict=True)):
            template = HINT if has_templates and index % 2 else PLAIN
            prefix = np.arange(40, 52, dtype=np.int32) if template is HINT else np.empty(0, np.int32)
            sampling_ids = np.concatenate([prefix, sample.context_ids])
            (trainer_R,) = policy.logprobs([replace(sample, context_ids=sampling_ids)])
            problem = fake_problem(index)
            prompt = Prompt(
                problem=problem, template=template, sampling_ids=sampling_ids, training_ids=sample.context_ids
            )
            completion = Completion(
                prompt=prompt,
                token_ids=sample.response_ids,
                logprobs=trainer_R - noise_R,
                finish_reason="stop",
                weight_versions=(0,),
            )
            rollouts.append(Rollout(completion=completion, grade=CORRECT))
        return [Group(problem=each.completion.prompt.problem, rollouts=(each,), advantages=(1.0,)) for each in rollouts]

    found: list[TokenStats[float]] = []
    for has_templates in (False, True):
        with policy_of(config) as policy:
            groups = groups_of(policy, has_templates)
            schedule = replace(config.schedule, problems_per_step=len(groups), problems_per_update=len(groups))
            (report,) = update(groups, [0.0] * len(groups), policy, replace(config, schedule=schedule))
        found.append(report.tokens)
    whole = np.concatenate(noise).astype(np.float64)
    for tokens in found:
        assert tokens.weighted_tokens == tokens.mismatch_tokens == len(whole)
        assert tokens.capped_tokens == int((whole > np.log(1.1)).sum())
        # Sums of float32 log-probs of about -5 with an error of 1e-6 each.
        assert tokens.mismatch_abs_sum == pytest.approx(np.abs(whole).sum(), abs=1e-3)
        assert tokens.mismatch_ratio_sum == pytest.approx(np.exp(whole).sum(), abs=1e-3)
    assert found[1].templated_tokens > 0 and found[0].templated_tokens == 0
    assert found[1].templated_gain_sum > 0.1, "the contexts differ: weights on the bare prompt would hold that, too"


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
