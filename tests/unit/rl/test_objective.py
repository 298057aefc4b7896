"""The token loss against a scalar reference in Python floats, its gradient against finite differences."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_p2o.config.tree import ObjectiveConfig
from megatron_p2o.rl.objective import (
    annealed,
    has_loss,
    loss_rule,
    merged_stats,
    stats_as_numbers,
    token_stats,
    total_stats,
    with_caps,
    with_length_weights,
    with_mismatch,
    with_reference_kl,
    with_trainer_logprobs,
    zero_stats,
)
from megatron_p2o.rl.packing import pack
from megatron_p2o.testing.fakes import fake_logprobs
from megatron_p2o.types import Logprobs, PackedBatch, TokenStats, TrainSample, no_tokens
from p2o_kernels import LossRule, PolicyLoss
from p2o_kernels.policy_loss.token_loss import LossTokens, RatioForm, token_inputs, token_losses_torch

Context = Literal["sampling", "replace", "importance", "ratio_mask"]
CONTEXTS: tuple[Context, ...] = ("sampling", "replace", "importance", "ratio_mask")

# Current minus old log-prob, and old minus sampling log-prob: inside and outside of every clip, band and clamp.
POLICY_DIFFERENCES = (-25.0, -3.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.05, 1.5, 3.0, 25.0)
CONTEXT_DIFFERENCES = (0.0, -6.0, -4.0, 1.0, 2.0, 2.5, 8.0)


@dataclass(frozen=True)
class Token:
    """One response token, as the scalar reference sees it."""

    current: float
    old: float
    sampling: float
    advantage: float
    is_templated: bool


def scalar_weight(token: Token, objective: ObjectiveConfig) -> float:
    """Return the context-ratio weight of one token."""
    if objective.context != "ratio_mask" or not token.is_templated:
        return 1.0
    ratio = math.exp(token.old - token.sampling)
    inside = objective.ratio_low <= ratio <= objective.ratio_high
    beyond = (objective.ratio_low if ratio < 1 else objective.ratio_high) / ratio
    outside = {
        "hard": 0.0,
        "one_sided": float(token.advantage > 0),
        "soft": beyond,
        "fading": min(beyond, 1 / beyond),
    }
    return 1.0 if inside else outside[objective.ratio_form]


def scalar_loss(token: Token, objective: ObjectiveConfig) -> float:
    """Return the weighted loss of one token by the paper's formulas."""
    old = token.sampling if objective.context == "importance" else token.old
    ratio = math.exp(min(max(token.current - old, -20.0), 20.0))
    clipped = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
    loss = max(-token.advantage * ratio, -token.advantage * clipped)
    if token.advantage < 0:
        loss = min(loss, -objective.dual_clip * token.advantage)
    return scalar_weight(token, objective) * loss


def policy_loss(
    logprobs_T: Tensor, batch: PackedBatch, objective: ObjectiveConfig, entropy_T: Tensor | None = None
) -> tuple[Tensor, TokenStats[float]]:
    """Return what training computes behind the LM head, of log-probs that no head has to be able to make.

    The gradient in the log-probs is the one that the head multiplies into its own.
    """
    is_live_T = batch.loss_mask_T & (batch.loss_weights_T != 0) & (batch.advantages_T != 0)
    rows = is_live_T.nonzero().squeeze(1)

    def picked(values_T: Tensor | None) -> Tensor | None:
        return None if values_T is None else values_T[rows]

    def spread(values_N: Tensor, outside: float = 0.0) -> Tensor:
        return torch.full(is_live_T.shape, outside, dtype=values_N.dtype).index_copy(0, rows, values_N.detach())

    rule = loss_rule(objective)
    tokens = token_inputs(
        rule,
        LossTokens(
            advantages_T=batch.advantages_T[rows],
            weights_T=batch.loss_weights_T[rows],
            old_logprobs_T=picked(batch.old_logprobs_T),
            sampling_logprobs_T=batch.sampling_logprobs_T[rows],
            is_templated_T=batch.is_templated_T[rows],
        ),
    )
    logprobs_N = logprobs_T[rows]
    losses = token_losses_torch(rule, logprobs_N.detach(), tokens)
    loss = losses.losses_N.sum() + ((logprobs_N - logprobs_N.detach()) * losses.logprob_grad_N.detach()).sum()
    outcome = PolicyLoss(
        loss=loss,
        logprobs_T=spread(logprobs_N),
        entropy_T=spread(logprobs_N * 0 if entropy_T is None else entropy_T[rows]),
        weights_T=spread(losses.weights_N),
        ratio_T=spread(losses.ratio_N, 1.0),
        is_clipped_T=spread(losses.is_clipped_N.double()).bool(),
        is_live_T=is_live_T,
    )
    return loss, stats_as_numbers(token_stats(batch, outcome))


def grid_of_tokens(advantage: float, is_templated: bool) -> list[Token]:
    return [
        Token(old + move, old, old - shift, advantage, is_templated)
        for move in POLICY_DIFFERENCES
        for shift in CONTEXT_DIFFERENCES
        for old in (-2.0,)
    ]


def sample_of(tokens: Sequence[Token], prompt_length: int = 3) -> TrainSample:
    return TrainSample(
        context_ids=np.arange(prompt_length, dtype=np.int32),
        response_ids=np.arange(len(tokens), dtype=np.int32),
        advantage=tokens[0].advantage,
        sampling_logprobs=np.array([token.sampling for token in tokens], dtype=np.float32),
        is_templated=tokens[0].is_templated,
    )


def float64(batch: PackedBatch) -> PackedBatch:
    """Return `batch` with its floating-point tensors in float64, so that only formulas can differ."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch, **{name: t.double() for name, t in tensors.items() if t is not None and t.is_floating_point()}
    )


def batch_of(samples_of_tokens: Sequence[Sequence[Token]], *, with_old: bool = True) -> tuple[Tensor, PackedBatch]:
    """Return current log-probs (float64, garbage outside the mask) and the packed batch of the tokens."""
    samples = [sample_of(tokens, 2 + number) for number, tokens in enumerate(samples_of_tokens)]
    old = [np.array([token.old for token in tokens], dtype=np.float32) for tokens in samples_of_tokens]
    batch = float64(pack(samples, old if with_old else None))
    logprobs_T = torch.full(batch.loss_mask_T.shape, -7.0, dtype=torch.float64)
    logprobs_T[batch.loss_mask_T] = torch.tensor([t.current for ts in samples_of_tokens for t in ts]).double()
    return logprobs_T, batch


def random_token(random: np.random.Generator, advantage: float, is_templated: bool) -> Token:
    current, old, sampling = -random.uniform(0.1, 6.0, size=3)
    return Token(current, old, sampling, advantage, is_templated)


def mixed_batch(seed: int = 0, *, with_old: bool = True) -> tuple[Tensor, PackedBatch]:
    """Return four random samples: plain and templated, both signs of the advantage, far from every kink."""
    random = np.random.default_rng(seed)
    groups = [
        [random_token(random, advantage, is_templated) for _ in range(length)]
        for length, advantage, is_templated in ((5, 1.3, True), (1, -0.7, True), (8, -1.1, False), (3, 0.4, False))
    ]
    return batch_of(groups, with_old=with_old)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("surrogate", "form"), [("gspo", "hard"), ("cispo", "soft")])
def test_the_rule_of_the_kernels_has_every_setting_of_the_objective(
    context: Context, surrogate: Literal["gspo", "cispo"], form: Literal["hard", "soft"]
) -> None:
    settings = {"context": context, "ratio_form": form, "ratio_low": 0.02, "ratio_high": 7.0}
    settings |= {"clip_low": 0.15, "clip_high": 0.28, "dual_clip": 4.0, "surrogate": surrogate}
    settings |= {"entropy_coefficient": 0.01, "kl_coefficient": 0.02, "kl_estimator": "k2"}
    assert asdict(loss_rule(ObjectiveConfig(**settings))) == asdict(LossRule(**settings))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("advantage", [2.0412, 0.4082, -0.4082, -2.0412, 0.0])
@pytest.mark.parametrize("is_templated", [True, False])
@pytest.mark.parametrize("form", get_args(RatioForm))
def test_each_token_has_the_loss_of_the_scalar_reference(
    context: Context, advantage: float, is_templated: bool, form: RatioForm
) -> None:
    objective = ObjectiveConfig(context=context, ratio_form=form)
    tokens = grid_of_tokens(advantage, is_templated)
    logprobs_T, batch = batch_of([tokens])
    # The loss is linear in the token weights, so its gradient in them is the loss of each token.
    weights_T = batch.loss_weights_T.clone().requires_grad_()
    loss, _ = policy_loss(logprobs_T, replace(batch, loss_weights_T=weights_T), objective)
    (losses_T,) = torch.autograd.grad(loss, weights_T)
    losses = losses_T[batch.loss_mask_T].tolist()
    for token, token_loss in zip(tokens, losses, strict=True):
        # The batch was packed in float32: 1e-6 of a log-prob of 30 is 3e-6 of a ratio.
        assert token_loss == pytest.approx(scalar_loss(token, objective), rel=2e-5, abs=1e-12), token


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_batch_sums_the_losses_of_its_tokens(context: Context) -> None:
    objective = ObjectiveConfig(context=context, clip_low=0.1, clip_high=0.3, dual_clip=2.0)
    groups = [grid_of_tokens(advantage, flag) for advantage in (1.5, -0.5) for flag in (True, False)]
    logprobs_T, batch = batch_of(groups)
    loss, _ = policy_loss(logprobs_T, batch, objective)
    expected = math.fsum(scalar_loss(token, objective) for tokens in groups for token in tokens)
    assert loss.item() == pytest.approx(expected, rel=2e-5)


def test_float32_is_as_good_as_its_precision() -> None:
    objective = ObjectiveConfig()
    logprobs_T, batch = mixed_batch()
    narrow = replace(
        batch,
        advantages_T=batch.advantages_T.float(),
        loss_weights_T=batch.loss_weights_T.float(),
        sampling_logprobs_T=batch.sampling_logprobs_T.float(),
        old_logprobs_T=None if batch.old_logprobs_T is None else batch.old_logprobs_T.float(),
    )
    loss, _ = policy_loss(logprobs_T.float(), narrow, objective)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(policy_loss(logprobs_T, batch, objective)[0].item(), rel=1e-5)


def test_the_loss_of_a_failed_token_stops_at_three_times_its_advantage() -> None:
    for move in (1.2, 5.0, 25.0):
        logprobs_T, batch = batch_of([[Token(-30.0 + move, -30.0, -30.0, -0.5, False)]])
        logprobs_T.requires_grad_()
        loss, stats = policy_loss(logprobs_T, batch, ObjectiveConfig())
        loss.backward()
        assert loss.item() == pytest.approx(1.5)
        assert logprobs_T.grad is not None and not logprobs_T.grad.any()
        assert stats.clipped_tokens == 1


def test_a_solved_token_stops_pulling_above_the_clip_but_not_below_it() -> None:
    gradients = []
    for move in (-1.0, 0.1, 0.3):
        logprobs_T, batch = batch_of([[Token(-3.0 + move, -3.0, -3.0, 2.0, False)]])
        policy_loss(logprobs_T.requires_grad_(), batch, ObjectiveConfig())[0].backward()
        assert logprobs_T.grad is not None
        gradients.append(logprobs_T.grad.sum().item())
    assert gradients == pytest.approx([-2 * math.exp(-1.0), -2 * math.exp(0.1), 0.0], rel=1e-5)


def test_the_policy_ratio_is_clamped_at_twenty_nats() -> None:
    objective = ObjectiveConfig(clip_high=1e12)
    losses = []
    for move in (19.0, 20.0, 40.0):
        logprobs_T, batch = batch_of([[Token(move - 50.0, -50.0, -50.0, 1.0, False)]])
        losses.append(-policy_loss(logprobs_T, batch, objective)[0].item())
    assert losses == pytest.approx([math.exp(19), math.exp(20), math.exp(20)], rel=1e-5)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_agree_with_finite_differences(context: Context, seed: int) -> None:
    logprobs_T, batch = mixed_batch(seed)
    objective = ObjectiveConfig(context=context, ratio_low=0.2, ratio_high=4.0, clip_low=0.6, clip_high=2.0)

    def loss_of(logprobs: Tensor) -> Tensor:
        return policy_loss(logprobs, batch, objective)[0]

    assert torch.autograd.gradcheck(loss_of, (logprobs_T.requires_grad_(),))


@pytest.mark.parametrize("context", ["sampling", "replace", "ratio_mask"])
@pytest.mark.parametrize("form", get_args(RatioForm))
def test_the_first_update_takes_its_own_forward_pass_as_old(context: Context, form: RatioForm) -> None:
    objective = ObjectiveConfig(context=context, ratio_form=form, ratio_low=0.2, ratio_high=4.0)
    logprobs_T, batch = mixed_batch(with_old=False)
    loss, stats = policy_loss(logprobs_T.requires_grad_(), batch, objective)
    loss.backward()
    mask, sampling = batch.loss_mask_T.tolist(), batch.sampling_logprobs_T.tolist()
    weights = [
        scalar_weight(Token(current, current, old, advantage, templated), objective) if is_response else 0.0
        for current, old, advantage, templated, is_response in zip(
            logprobs_T.tolist(), sampling, batch.advantages_T.tolist(), batch.is_templated_T.tolist(), mask, strict=True
        )
    ]
    expected_T = -batch.advantages_T * torch.tensor(weights, dtype=torch.float64)
    assert logprobs_T.grad is not None
    torch.testing.assert_close(logprobs_T.grad, expected_T, rtol=1e-9, atol=0)
    assert loss.item() == pytest.approx(expected_T.sum().item())
    assert stats.ratio_sum == stats.loss_tokens == sum(mask)


def test_importance_needs_no_old_log_probs() -> None:
    logprobs_T, batch = mixed_batch()
    objective = ObjectiveConfig(context="importance")
    with_old, _ = policy_loss(logprobs_T, batch, objective)
    without, _ = policy_loss(logprobs_T, replace(batch, old_logprobs_T=None), objective)
    assert torch.equal(with_old, without)


def test_with_nothing_templated_the_ratio_mask_is_plain_grpo_bit_for_bit() -> None:
    tokens = grid_of_tokens(1.0, False) + grid_of_tokens(1.0, False)
    logprobs_T, batch = batch_of([tokens, grid_of_tokens(-0.5, False)])
    losses = [policy_loss(logprobs_T, batch, ObjectiveConfig(context=context))[0] for context in CONTEXTS]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[3])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_stands_outside_the_mask_does_not_count(context: Context, with_old: bool, garbage: float) -> None:
    clean_T, batch = mixed_batch(with_old=with_old)
    entropy_T = torch.linspace(0.1, 2.0, len(clean_T)).double()
    dirty_T = torch.where(batch.loss_mask_T, clean_T, garbage)
    dirty_entropy_T = torch.where(batch.loss_mask_T, entropy_T, garbage)
    objective = ObjectiveConfig(context=context)
    expected, expected_stats = policy_loss(clean_T, batch, objective, entropy_T)
    loss, stats = policy_loss(dirty_T.requires_grad_(), batch, objective, dirty_entropy_T)
    loss.backward()
    assert torch.equal(loss, expected)
    assert stats == expected_stats
    assert dirty_T.grad is not None and torch.isfinite(dirty_T.grad).all()
    assert not dirty_T.grad[~batch.loss_mask_T].any()


def test_a_zero_loss_weight_drops_the_token_from_the_loss_and_not_from_the_denominator() -> None:
    logprobs_T, batch = mixed_batch()
    dropped = int(batch.loss_mask_T.nonzero()[0])
    weights_T = batch.loss_weights_T.clone()
    weights_T[dropped] = 0.0
    objective = ObjectiveConfig(context="replace")
    whole, whole_stats = policy_loss(logprobs_T.requires_grad_(), batch, objective)
    loss, stats = policy_loss(logprobs_T, replace(batch, loss_weights_T=weights_T), objective)
    (gradient,) = torch.autograd.grad(loss, logprobs_T)
    assert gradient[dropped] == 0
    assert loss.item() != whole.item()
    assert stats.loss_tokens == whole_stats.loss_tokens
    assert stats.kept_tokens == whole_stats.kept_tokens - 1


@pytest.mark.parametrize(
    ("form", "dropped", "dropped_gain"),
    [
        ("hard", 2 + 1 + 0.5, 2 * 18 + 1 * 6),
        ("one_sided", 0.5, 0),
        # Below the band its weights are above 1: nothing is taken.
        ("soft", 0, 0),
        ("fading", 2 * (1 - 100 * math.exp(-18)) + (1 - 100 * math.exp(-6)) + 0.5 * (1 - 100 * math.exp(-9)), None),
    ],
)
def test_what_the_mask_takes_is_counted_in_advantage_and_in_what_templates_add(
    form: RatioForm, dropped: float, dropped_gain: float | None
) -> None:
    """Shifts of 18, 6, 1 and -1 nats in successes, of 9 in a failure; a plain rollout counts nowhere."""
    groups = [
        [Token(-20.0, -20.0, -2.0, 2.0, True), Token(-2.0, -2.0, -1.0, 2.0, True), Token(-2.0, -2.0, -3.0, 2.0, True)],
        [Token(-7.0, -7.0, -1.0, 1.0, True)],
        [Token(-10.0, -10.0, -1.0, -0.5, True)],
        [Token(-10.0, -10.0, -1.0, 1.0, False)],
    ]
    logprobs_T, batch = batch_of(groups)
    for given in (batch, replace(batch, old_logprobs_T=None)):
        _, stats = policy_loss(logprobs_T, given, ObjectiveConfig(ratio_form=form))
        assert stats.templated_advantage_sum == pytest.approx(3 * 2 + 1 + 0.5)
        assert stats.templated_gain_sum == pytest.approx(2 * (18 + 1) + 1 * 6)
        assert stats.dropped_advantage_sum == pytest.approx(dropped)
        if dropped_gain is not None:
            assert stats.dropped_gain_sum == pytest.approx(dropped_gain)


def test_token_sums_are_those_counted_by_hand() -> None:
    groups = [
        [Token(-1.0, -1.0, -1.0, 1.0, True), Token(-0.5, -1.0, -9.0, 1.0, True), Token(-1.0, -2.0, -2.0, 1.0, True)],
        [Token(-2.0, -2.0, -2.5, -1.0, False), Token(-1.0, -3.0, -2.0, -1.0, False)],
    ]
    logprobs_T, batch = batch_of(groups)
    entropy_T = torch.where(batch.loss_mask_T, 0.5, 99.0).double()
    _, stats = policy_loss(logprobs_T, batch, ObjectiveConfig(ratio_form="hard"), entropy_T)
    assert asdict(stats) == pytest.approx(
        {
            "loss_tokens": 5,
            "carrying_tokens": 5,
            "live_tokens": 5,
            "kept_tokens": 4,
            "templated_tokens": 3,
            "templated_kept_tokens": 2,
            # The second token's ratio is e^8: dropped. No shift is positive.
            "templated_advantage_sum": 3,
            "dropped_advantage_sum": 1,
            "templated_gain_sum": 0,
            "dropped_gain_sum": 0,
            "clipped_tokens": 2,
            "ratio_sum": 1 + math.exp(0.5) + math.exp(1.0) + 1 + math.exp(2.0),
            "entropy_sum": 2.5,
            "mismatch_tokens": 2,
            "mismatch_abs_sum": 1.5,
            "mismatch_ratio_sum": math.exp(0.5) + math.exp(-1.0),
            "mismatch_kl_sum": (math.exp(0.5) - 1 - 0.5) + (math.exp(-1.0) - 1 + 1.0),
            "mismatch_abs_max": 1.0,
            "reference_tokens": 0,
            "reference_kl_sum": 0,
            "weighted_tokens": 0,
            "capped_tokens": 0,
        }
    )


def test_an_engine_that_serves_other_weights_shows_as_a_finite_mismatch() -> None:
    batch = pack([sample_of([Token(-1.0, -1.0, -200.0, 1.0, False)])], None)
    _, stats = policy_loss(torch.full(batch.loss_mask_T.shape, -1.0), batch, ObjectiveConfig())
    assert stats.mismatch_abs_max == 199.0
    assert math.isfinite(stats.mismatch_ratio_sum)


def test_the_mean_of_the_kl_estimate_over_the_engines_tokens_is_the_divergence_of_engine_and_trainer() -> None:
    engine, trainer = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.4, 0.2, 0.25, 0.15])
    # The engine samples each of four tokens as often as it is likely: 20 tokens in all.
    tokens = np.repeat(np.arange(4), [10, 6, 3, 1])
    rows = [np.log(policy[tokens]).astype(np.float32) for policy in (trainer, engine)]
    divergence = float((engine * np.log(engine / trainer)).sum())
    sums = with_mismatch(no_tokens(), rows[:1], rows[1:])
    assert sums.mismatch_kl_sum / sums.mismatch_tokens == pytest.approx(divergence, rel=1e-6)
    sampled = [Token(float(ours), -1.0, float(theirs), 1.0, False) for ours, theirs in zip(*rows, strict=True)]
    logprobs_T, batch = batch_of([sampled], with_old=False)
    _, stats = policy_loss(logprobs_T, batch, ObjectiveConfig(context="replace"))
    assert stats.mismatch_kl_sum == pytest.approx(20 * divergence, rel=1e-6)


def test_only_weights_beyond_the_cap_of_tokens_with_an_advantage_count_as_truncated() -> None:
    tokens = [Token(-1.0, -1.0, engine, 1.0, False) for engine in (-1.0, -1.5, -3.0)]
    trainer_R = np.array([-0.2, -1.0, -1.0], np.float32)  # ratios 2.2, 1.6, 7.4
    samples = [with_trainer_logprobs(sample_of(tokens), trainer_R, importance_cap=2.0)]
    samples.append(replace(samples[0], advantage=0.0))
    assert with_caps(no_tokens(), samples, 2.0) == replace(no_tokens(), weighted_tokens=3, capped_tokens=2)
    assert with_caps(no_tokens(), samples, None) == no_tokens()


def test_recomputed_log_probs_are_compared_with_the_engines_on_every_token() -> None:
    tokens = [Token(-1.0, -1.0, -2.0, 1.0, True), Token(-1.0, -1.0, -2.5, 1.0, True)]
    trainer_R = np.array([-1.9, -2.9], np.float32)
    sample = with_trainer_logprobs(sample_of(tokens), trainer_R, importance_cap=None)
    batch = pack([sample], None)
    _, stats = policy_loss(torch.full(batch.loss_mask_T.shape, -1.0), batch, ObjectiveConfig())
    assert stats.mismatch_tokens == 2
    assert stats.mismatch_abs_sum == pytest.approx(0.5)
    # The context ratio is the trainer's on both sides: exp(-1 + 1.9) = 2.5 and exp(-1 + 2.9) = 6.7, both in the band.
    assert stats.templated_kept_tokens == 2


def test_truncated_importance_weights_multiply_the_loss() -> None:
    tokens = [Token(-1.0, -1.0, engine, 1.0, False) for engine in (-1.0, -1.5, -3.0)]
    trainer_R = np.array([-1.5, -1.0, -1.0], np.float32)
    batch = pack([with_trainer_logprobs(sample_of(tokens), trainer_R, importance_cap=2.0)], None)
    loss, _ = policy_loss(torch.full(batch.loss_mask_T.shape, -1.0), batch, ObjectiveConfig(context="replace"))
    assert loss.item() == pytest.approx(-(math.exp(-0.5) + math.exp(0.5) + 2.0), rel=1e-6)


@pytest.mark.parametrize("context", CONTEXTS)
def test_losses_and_stats_of_the_parts_add_up_to_the_whole(context: Context) -> None:
    objective = ObjectiveConfig(context=context)
    samples, old = random_samples()
    whole_loss, whole_stats = loss_of_samples(samples, old, objective)
    for order in ([[3, 0], [2], [1, 4]], [[4], [3], [2], [1], [0]], [[1, 3, 0, 4, 2]]):
        parts = [loss_of_samples([samples[i] for i in part], [old[i] for i in part], objective) for part in order]
        # The same terms in another order: float64 sums of float32 values.
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole_loss, rtol=1e-5, atol=1e-5)
        merged = total_stats([stats for _, stats in parts])
        assert asdict(merged) == pytest.approx(asdict(whole_stats), rel=1e-6, abs=1e-6)
        assert merged.mismatch_abs_max == whole_stats.mismatch_abs_max


def test_statistics_of_a_pass_merge_as_those_of_the_updates_do() -> None:
    def on_device(values: TokenStats[float]) -> TokenStats[Tensor]:
        return TokenStats(**{name: torch.tensor(value).double() for name, value in asdict(values).items()})

    one = replace(no_tokens(), kept_tokens=3.0, entropy_sum=0.5, mismatch_abs_max=2.0)
    other = replace(no_tokens(), kept_tokens=4.0, entropy_sum=0.25, mismatch_abs_max=1.0)
    merged = stats_as_numbers(merged_stats(on_device(one), on_device(other)))
    assert merged == total_stats([one, other])
    assert merged == replace(no_tokens(), kept_tokens=7.0, entropy_sum=0.75, mismatch_abs_max=2.0)
    assert merged_stats(zero_stats(), on_device(one)) == on_device(one)
    assert total_stats([]) == no_tokens()


@pytest.mark.parametrize("has_weights", [True, False])
def test_length_weights_make_the_token_mean_the_mean_that_was_asked_for(has_weights: bool) -> None:
    samples, _ = random_samples()
    if has_weights:
        samples = [replace(each, loss_weights=np.full(len(each.response_ids), 0.5, np.float32)) for each in samples]
    live = samples[:3]  # the others have no loss, but count
    losses = [np.linspace(0.1, 1.0, len(sample.response_ids)) for sample in live]
    num_tokens = sum(len(sample.response_ids) for sample in samples)

    def mean(normalization: Any) -> float:
        weighted = with_length_weights(live, samples, ObjectiveConfig(normalization=normalization), 50)
        rows = [sample.loss_weights for sample in weighted]
        sums = [(row * (1 if weights is None else weights)).sum() for row, weights in zip(losses, rows, strict=True)]
        return sum(sums) / num_tokens * (2 if has_weights else 1)

    assert mean("token_mean") == pytest.approx(sum(row.sum() for row in losses) / num_tokens, rel=1e-6)
    assert mean("sequence_mean") == pytest.approx(sum(row.mean() for row in losses) / 5, rel=1e-6)
    assert mean("sequence_sum") == pytest.approx(sum(row.sum() / 50 for row in losses) / 5, rel=1e-6)


def test_for_responses_of_one_length_all_means_over_tokens_and_rollouts_are_one() -> None:
    samples = [replace(sample_of([Token(-1.0, -1.0, -1.0, 1.0, False)] * 4), advantage=a) for a in (1.0, -1.0)]
    for normalization in ("sequence_mean", "sequence_sum"):
        weighted = with_length_weights(samples, samples, ObjectiveConfig(normalization=normalization), 4)
        assert all((sample.loss_weights == 1).all() for sample in weighted)


def test_rollouts_without_an_advantage_have_a_loss_where_a_term_acts_on_them() -> None:
    sample = replace(sample_of([Token(-1.0, -1.0, -1.0, 1.0, False)]), advantage=0.0)
    assert not has_loss(sample, ObjectiveConfig())
    assert has_loss(replace(sample, advantage=1e-6), ObjectiveConfig())
    assert has_loss(sample, ObjectiveConfig(entropy_coefficient=0.01))
    assert has_loss(sample, ObjectiveConfig(kl_coefficient=0.01))
    assert not has_loss(sample, ObjectiveConfig(kl_coefficient=0.01, kl_as="reward"))


def test_the_divergence_from_the_initial_policy_is_summed_over_the_tokens_with_a_term() -> None:
    rows = [np.array([-1.0, -2.0, -3.0], np.float32), np.array([-1.5, -2.0, -0.5], np.float32)]
    tokens = [Token(float(value), float(value), -1.0, 1.0, False) for value in rows[0]]
    batch = pack([replace(sample_of(tokens), reference_logprobs=rows[1])], None)
    logprobs_T = torch.zeros(len(batch.loss_mask_T)).masked_scatter(batch.loss_mask_T, torch.as_tensor(rows[0]))
    _, stats = policy_loss(logprobs_T.double(), batch, ObjectiveConfig(context="replace"))
    expected = sum(math.exp(d) - 1 - d for d in (-0.5, 0.0, 2.5))
    assert (stats.reference_tokens, stats.reference_kl_sum) == (3, pytest.approx(expected))
    alone = with_reference_kl(no_tokens(), rows[:1], rows[1:])
    assert (alone.reference_tokens, alone.reference_kl_sum) == (3, pytest.approx(expected))


def random_samples() -> tuple[list[TrainSample], list[Logprobs]]:
    """Return five samples of unequal lengths and their old log-probs."""
    random = np.random.default_rng(7)
    shapes = [(4, 9, 1.2, True), (1, 1, -0.4, True), (6, 3, -1.3, False), (2, 7, 0.8, False), (3, 2, 0.0, True)]
    samples = [
        TrainSample(
            context_ids=random.integers(0, 50, prompt, dtype=np.int32),
            response_ids=random.integers(0, 50, response, dtype=np.int32),
            advantage=advantage,
            sampling_logprobs=-random.uniform(0.1, 5.0, response).astype(np.float32),
            is_templated=is_templated,
        )
        for prompt, response, advantage, is_templated in shapes
    ]
    return samples, [-random.uniform(0.1, 5.0, len(sample.response_ids)).astype(np.float32) for sample in samples]


def loss_of_samples(
    samples: Sequence[TrainSample], old: Sequence[Logprobs], objective: ObjectiveConfig
) -> tuple[Tensor, TokenStats[float]]:
    """Return loss and stats where the model's log-probs depend on the sample alone, not on its place."""
    batch = pack(samples, old)
    logprobs_T = torch.zeros(len(batch.token_ids_T))
    current = [fake_logprobs(sample.context_ids, sample.response_ids) for sample in samples]
    logprobs_T[batch.loss_mask_T] = torch.from_numpy(np.concatenate(current))
    return policy_loss(logprobs_T, batch, objective, entropy_T=-logprobs_T)


@pytest.mark.parametrize("widening", [1e6, 0.2])
def test_an_annealed_band_goes_by_equal_factors_to_the_one_that_is_set(widening: float) -> None:
    objective = ObjectiveConfig(ratio_low=0.01, ratio_high=10.0, ratio_widening=widening, ratio_anneal_steps=4)
    bands = [annealed(objective, step) for step in range(7)]
    assert [band.ratio_high / 10 for band in bands] == pytest.approx(
        [widening, widening**0.75, widening**0.5, widening**0.25, 1, 1, 1]
    )
    assert [band.ratio_low * band.ratio_high for band in bands] == pytest.approx([0.1] * 7)
    assert replace(bands[0], ratio_low=0.01, ratio_high=10.0) == objective, "nothing else changes"
    assert bands[4] == objective
    still = replace(objective, ratio_anneal_steps=0)
    assert annealed(still, 0) == still
