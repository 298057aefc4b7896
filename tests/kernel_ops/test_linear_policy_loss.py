"""`linear_policy_loss` in torch: against float64 autograd on full logits, and against the loss over log-probs."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist

from megatron_p2o.testing.distributed import run_gloo_ranks
from p2o_kernels import LossRule, linear_logprob, linear_policy_loss
from p2o_kernels.lm_head.torch_path import TorchHead
from p2o_kernels.policy_loss import linear_policy_loss_reference

SMALL_CHUNKS = TorchHead(chunk_bytes=16 * 4 * 224)
CONTEXTS = ("sampling", "replace", "importance", "ratio_mask")
RULES = [LossRule(context=context, clip_high=0.28) for context in CONTEXTS] + [
    LossRule(ratio_form=form) for form in ("one_sided", "soft", "fading")
]
RULES += [LossRule(context=context, importance_cap=1.5) for context in ("sampling", "replace", "ratio_mask")]
SURROGATES = [
    LossRule(context=context, surrogate=surrogate, clip_low=0.1, clip_high=0.15)
    for context in CONTEXTS
    for surrogate in ("gspo", "cispo")
]


def smooth_gate(ratio, logprobs, advantages, rule):
    """Fade the gradient out on both sides of ratio 1, where a clip would cut it off."""
    return -advantages * 4 / 3 * torch.sigmoid(3 * (ratio - 1))


def clipped_and_weighted(ratio, logprobs, advantages, rule):
    """PPO's clip for gains and CISPO's weight for losses: by ratio, log-prob and the rule's settings."""
    band = ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    ppo = torch.maximum(-advantages * ratio, -advantages * band)
    return torch.where(advantages > 0, ppo, -advantages * band.detach() * logprobs)


OWN = [LossRule(surrogate=smooth_gate, context=context) for context in CONTEXTS] + [
    LossRule(surrogate=clipped_and_weighted, kl_coefficient=0.3, entropy_coefficient=0.2, clip_low=0.1)
]
TERMS = [
    LossRule(kl_coefficient=0.3, kl_estimator="k2"),
    LossRule(kl_coefficient=0.3, kl_estimator="k3", context="importance"),
    LossRule(entropy_coefficient=0.2),
    LossRule(entropy_coefficient=0.2, kl_coefficient=0.3, surrogate="gspo", clip_low=0.1),
    LossRule(entropy_coefficient=0.2, kl_coefficient=0.3, surrogate="cispo", context="sampling"),
]


NUM_SEQUENCES = 6


def sequences_of(num_tokens, num_sequences):
    """Return the sequence of each token: of unequal lengths, one of a single token and, for few tokens, empty ones."""
    shares = torch.tensor([0.3, 0.05, 0.2, 0.15, 0.2, 0.1])[:num_sequences]
    lengths = (shares * num_tokens).long()
    lengths[0] += num_tokens - lengths.sum()
    return torch.arange(num_sequences).repeat_interleave(lengths)


def token_arguments(case, *, has_old, seed=1):
    """Return inputs that reach every branch: clips both ways, dual clip, dropped context ratios, dead tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = len(case.targets_T)

    def normal(scale):
        return scale * torch.randn(num_tokens, generator=generator)

    old = case.logprobs_T.float() + normal(0.6)
    advantages = normal(1.0)
    advantages[torch.rand(num_tokens, generator=generator) < 0.2] = 0
    return {
        "advantages_T": advantages,
        "weights_T": (torch.rand(num_tokens, generator=generator) < 0.8).float(),
        "old_logprobs_T": old if has_old else None,
        "sampling_logprobs_T": old + normal(3.0),
        "is_templated_T": torch.rand(num_tokens, generator=generator) < 0.7,
        "reference_logprobs_T": old + normal(1.0),
        "sequence_T": sequences_of(num_tokens, NUM_SEQUENCES),
        "num_sequences": NUM_SEQUENCES,
        "loss_scale": 1 / 321,
        "temperature": case.temperature,
        "vocab_size": case.vocab_size,
    }


def name_of(rule):
    terms = f"-{rule.kl_estimator}" * (rule.kl_coefficient > 0) + "-entropy" * (rule.entropy_coefficient > 0)
    cap = "-capped" * (rule.importance_cap is not None)
    surrogate = rule.surrogate if isinstance(rule.surrogate, str) else rule.surrogate.__name__
    return f"{surrogate}-{rule.context}-{rule.ratio_form}{cap}{terms}"


def run(case, rule, arguments, **options):
    """Return (output, dH, dW)."""
    hidden, weight = case.leaves()
    output = linear_policy_loss(hidden, weight, case.targets_T, rule=rule, **arguments, **options)
    output.loss.backward()
    return output, hidden.grad, weight.grad


def run_reference(case, rule, arguments):
    hidden, weight = case.leaves(torch.float64)
    known = {name: value for name, value in arguments.items() if name != "num_sequences"}
    loss, *_ = linear_policy_loss_reference(hidden, weight, case.targets_T, rule=rule, **known)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("has_old", [True, False], ids=["old given", "old is current"])
@pytest.mark.parametrize("rule", [*RULES, *SURROGATES, *TERMS, *OWN], ids=name_of)
def test_loss_and_gradients_equal_float64_autograd(rule, has_old, head_case, relative_error, nan_empty):
    case = head_case(num_tokens=131)
    arguments = token_arguments(case, has_old=has_old)
    output, hidden_grad, weight_grad = run(case, rule, arguments, path=SMALL_CHUNKS)
    loss, hidden_truth, weight_truth = run_reference(case, rule, arguments)
    # Terms of both signs cancel in the loss of `cispo` and of the entropy.
    torch.testing.assert_close(output.loss.double(), loss, rtol=2e-6, atol=1e-8 if rule in RULES else 1e-6)
    assert relative_error(hidden_grad, hidden_truth) < 3e-6
    assert relative_error(weight_grad, weight_truth) < 3e-6
    if rule in SURROGATES and has_old:
        assert output.is_clipped_T[output.is_live_T].any() and not output.is_clipped_T[output.is_live_T].all()
    live = output.is_live_T
    torch.testing.assert_close(output.logprobs_T[live].double(), case.logprobs_T[live], atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(output.entropy_T[live].double(), case.entropy_T[live], atol=5e-6, rtol=1e-6)


def loss_over_logprobs(rule, logprobs, arguments):
    """Return (loss, clipped, weights) in float32 by ordinary autograd over log-probs, hard context mask."""
    advantages, weights, sampling = (arguments[f"{name}_T"] for name in ("advantages", "weights", "sampling_logprobs"))
    first_pass = logprobs.detach() if arguments["old_logprobs_T"] is None else arguments["old_logprobs_T"]
    old = sampling if rule.context == "importance" else first_pass
    if rule.context == "ratio_mask":
        rho = torch.where(arguments["is_templated_T"], (old - sampling).clamp(-60, 60).exp(), 1.0)
        weights = weights * ((rho >= rule.ratio_low) & (rho <= rule.ratio_high))
    ratio = (logprobs - old).clamp(-20, 20).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    losses = torch.maximum(plain, clipped)
    ceiling = -rule.dual_clip * advantages
    is_capped = (advantages < 0) & (losses > ceiling)
    losses = torch.where(is_capped, ceiling, losses)
    return (weights * losses).sum() * arguments["loss_scale"], (clipped > plain) | is_capped, weights


@pytest.mark.parametrize(("context", "has_old"), list(itertools.product(CONTEXTS, [True, False])))
def test_numbers_are_those_of_the_loss_over_log_probs(context, has_old, head_case, relative_error):
    case, rule = head_case(num_tokens=131), LossRule(context=context)
    arguments = token_arguments(case, has_old=has_old)
    output, hidden_grad, weight_grad = run(case, rule, arguments)
    hidden, weight = case.leaves()
    logprobs, _ = linear_logprob(
        hidden, weight, case.targets_T, temperature=case.temperature, vocab_size=case.vocab_size
    )
    loss, is_clipped, weights = loss_over_logprobs(rule, logprobs, arguments)
    loss.backward()
    torch.testing.assert_close(output.loss, loss, rtol=1e-6, atol=1e-8)
    assert relative_error(hidden_grad, hidden.grad) < 1e-6
    assert relative_error(weight_grad, weight.grad) < 1e-6
    is_kept = (weights != 0) & (arguments["advantages_T"] != 0)
    assert torch.equal(output.weights_T != 0, is_kept)
    clipped = output.is_clipped_T & is_kept
    assert torch.equal(clipped, is_clipped & is_kept)
    assert clipped.any() or not has_old


def test_dead_rows_never_reach_the_head(head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True)
    is_dead = (arguments["weights_T"] == 0) | (arguments["advantages_T"] == 0)
    assert 0 < is_dead.sum() < len(is_dead)
    hidden, weight = case.leaves()
    with torch.no_grad():
        hidden[is_dead] = torch.nan
    output = linear_policy_loss(hidden, weight, case.targets_T, rule=LossRule(), **arguments)
    output.loss.backward()
    assert (hidden.grad[is_dead] == 0).all()
    for values in (output.loss, hidden.grad, weight.grad, output.logprobs_T, output.ratio_T, output.entropy_T):
        assert values.isfinite().all()


def test_a_known_context_mask_keeps_its_rows_out_of_the_head(head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True) | {"is_templated_T": torch.ones(37, dtype=torch.bool)}
    output, *_ = run(case, LossRule(), arguments)
    rho = (arguments["old_logprobs_T"] - arguments["sampling_logprobs_T"]).exp()
    is_kept = (rho >= 0.01) & (rho <= 10) & (arguments["weights_T"] != 0) & (arguments["advantages_T"] != 0)
    assert is_kept.any() and torch.equal(output.is_live_T, is_kept)


@pytest.mark.parametrize("has_old", [True, False], ids=["old given", "old is current"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.context}-{rule.ratio_form}")
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_log_probs_of_tokens_without_weight_change_nothing(rule, has_old, garbage, head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=has_old)
    is_outside = arguments["weights_T"] == 0
    dirty = {
        name: torch.where(is_outside, garbage, arguments[name])
        for name in ("old_logprobs_T", "sampling_logprobs_T")
        if arguments[name] is not None
    }
    output, hidden_grad, weight_grad = run(case, rule, arguments)
    same, same_hidden_grad, same_weight_grad = run(case, rule, arguments | dirty)
    for expected, computed in zip(output, same, strict=True):
        assert torch.equal(expected, computed)
    assert torch.equal(hidden_grad, same_hidden_grad) and torch.equal(weight_grad, same_weight_grad)
    expected, *expected_grads = run_reference(case, rule, arguments)
    computed, *computed_grads = run_reference(case, rule, arguments | dirty)
    assert computed == expected and computed.isfinite()
    for one, other in zip(expected_grads, computed_grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["old_logprobs_T", "sampling_logprobs_T"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.context}-{rule.ratio_form}")
def test_a_nan_log_prob_of_a_token_that_counts_makes_loss_and_gradient_nan(rule, name, head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True)
    arguments["is_templated_T"][:] = True
    counts = (arguments["weights_T"] != 0) & (arguments["advantages_T"] != 0)
    poisoned = arguments[name].clone()
    poisoned[counts.nonzero()[0]] = torch.nan
    is_read = name == {"importance": "sampling_logprobs_T"}.get(rule.context, "old_logprobs_T")
    is_read |= rule.context == "ratio_mask"  # with every token templated a cap reads nothing
    output, hidden_grad, _ = run(case, rule, arguments | {name: poisoned})
    assert output.loss.isnan() == is_read and hidden_grad.isnan().any() == is_read
    assert run_reference(case, rule, arguments | {name: poisoned})[0].isnan() == is_read


@pytest.mark.parametrize("rule", [{"context": "truncated"}, {"ratio_form": "firm"}], ids=str)
def test_a_rule_without_a_formula_is_an_error(rule, head_case):
    case = head_case()
    with pytest.raises((AssertionError, KeyError), match=next(iter(rule.values()))):
        run(case, LossRule(**rule), token_arguments(case, has_old=True))


def test_an_all_masked_batch_has_no_loss_and_no_gradient(head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=False) | {"weights_T": torch.zeros(37)}
    output, hidden_grad, weight_grad = run(case, LossRule(), arguments)
    assert output.loss == 0 and not output.is_live_T.any()
    assert (hidden_grad == 0).all() and (weight_grad == 0).all()


def test_the_gradient_of_the_loss_scales_both_gradients(head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True)
    _, hidden_grad, weight_grad = run(case, LossRule(), arguments)
    hidden, weight = case.leaves()
    (-2.5 * linear_policy_loss(hidden, weight, case.targets_T, rule=LossRule(), **arguments).loss).backward()
    torch.testing.assert_close(hidden.grad, -2.5 * hidden_grad)
    torch.testing.assert_close(weight.grad, -2.5 * weight_grad)


def test_a_main_gradient_is_added_to_in_float32(head_case, relative_error):
    case = head_case(dtype=torch.bfloat16, num_tokens=64, vocab_size=1000, hidden_size=64)
    arguments = token_arguments(case, has_old=True)
    _, hidden_truth, weight_truth = run_reference(case, LossRule(), arguments)
    before = torch.randn(case.weight_VpD.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    main_grad = before.clone()
    output, hidden_grad, weight_grad = run(case, LossRule(), arguments, weight_main_grad_VpD=main_grad)
    assert weight_grad is None
    assert relative_error(main_grad - before, weight_truth) < 1e-5
    assert relative_error(hidden_grad, hidden_truth) < 2.0e-3  # one rounding to bfloat16
    live = output.is_live_T
    assert (output.logprobs_T[live] - case.logprobs_T[live]).abs().max() < 1e-5


def test_a_main_gradient_refuses_a_factor_that_comes_too_late(head_case):
    case = head_case()
    hidden, weight = case.leaves()
    arguments = token_arguments(case, has_old=True) | {"weight_main_grad_VpD": torch.zeros_like(weight)}
    output = linear_policy_loss(hidden, weight, case.targets_T, rule=LossRule(), **arguments)
    with pytest.raises(ValueError, match="must be 1, not 2"):
        (2 * output.loss).backward()


def test_without_gradients_nothing_is_accumulated(head_case):
    case = head_case()
    main_grad = torch.zeros_like(case.weight_VpD)
    arguments = token_arguments(case, has_old=True) | {"weight_main_grad_VpD": main_grad}
    with torch.no_grad():
        hidden, weight = case.leaves()
        output = linear_policy_loss(hidden, weight, case.targets_T, rule=LossRule(), **arguments)
    assert output.loss != 0 and not output.loss.requires_grad and (main_grad == 0).all()


def test_backward_runs_once(head_case):
    case = head_case()
    hidden, weight = case.leaves()
    arguments = token_arguments(case, has_old=True)
    loss = linear_policy_loss(hidden, weight, case.targets_T, rule=LossRule(), **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        loss.backward()


def test_the_chunk_size_changes_only_the_rounding(head_case, relative_error):
    case = head_case(num_tokens=203)
    arguments = token_arguments(case, has_old=False)
    whole = run(case, LossRule(), arguments)
    for chunk_rows in (16, 50, 202):
        path = TorchHead(chunk_bytes=chunk_rows * 4 * len(case.weight_VpD))
        parts = run(case, LossRule(), arguments, path=path)
        torch.testing.assert_close(parts[0].loss, whole[0].loss, rtol=1e-6, atol=1e-8)
        assert relative_error(parts[1], whole[1]) < 1e-6
        assert relative_error(parts[2], whole[2]) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_logprobs_T": None}, "sampling_logprobs_T is None: context='ratio_mask' needs it"),
        ({"is_templated_T": None}, "is_templated_T is None"),
        ({"advantages_T": torch.zeros(3)}, r"advantages_T \(3,\) on cpu: must be \(37,\)"),
        ({"weights_T": torch.ones(37, dtype=torch.bool)}, "weights_T is torch.bool"),
        ({"weight_main_grad_VpD": torch.zeros(2, 2)}, r"weight_main_grad_VpD \(2, 2\)"),
        ({"weight_main_grad_VpD": torch.zeros(24, 224).T}, r"weight_main_grad_VpD has strides \(1, 224\)"),
    ],
)
def test_misfits_are_named(change, message, head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True) | change
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(*case.leaves(), case.targets_T, rule=LossRule(), **arguments)


@pytest.mark.parametrize("change", [{"advantage_T": torch.ones(37)}, {"weights_T": ...}], ids=["unknown", "missing"])
def test_names_of_the_tokens_values_are_checked(change, head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True) | change
    given = {name: value for name, value in arguments.items() if value is not ...}
    with pytest.raises(TypeError, match=next(iter(change))):
        linear_policy_loss(*case.leaves(), case.targets_T, rule=LossRule(), **given)


def sequence_arguments(case, *, has_old=True):
    """Return tokens of which every sequence has one advantage, as in training, and small steps of the policy."""
    generator = torch.Generator().manual_seed(8)
    arguments = token_arguments(case, has_old=has_old)
    advantages = torch.randn(NUM_SEQUENCES, generator=generator)[arguments["sequence_T"]]
    old = case.logprobs_T.float() + 0.05 * torch.randn(len(advantages), generator=generator)
    return arguments | {"advantages_T": advantages, "old_logprobs_T": old if has_old else None}


GSPO = LossRule(surrogate="gspo", context="sampling", clip_low=3e-3, clip_high=4e-3)


def test_every_token_of_a_sequence_has_its_geometric_mean_ratio_and_is_clipped_with_it(head_case):
    case = head_case(num_tokens=131)
    arguments = sequence_arguments(case)
    output, *_ = run(case, GSPO, arguments)
    live, sequence = output.is_live_T, arguments["sequence_T"]
    clipped = []
    for number in range(NUM_SEQUENCES):
        members = live & (sequence == number)
        ratio = (case.logprobs_T - arguments["old_logprobs_T"].double())[members].mean().exp()
        torch.testing.assert_close(
            output.ratio_T[members].double(), ratio.expand(int(members.sum())), rtol=1e-5, atol=0
        )
        advantage = arguments["advantages_T"][members][0]
        is_clipped = bool(ratio > 1.004 if advantage > 0 else ratio < 0.997)
        assert (output.is_clipped_T[members] == is_clipped).all()
        clipped.append(is_clipped)
    assert any(clipped) and not all(clipped)


def test_the_ratio_of_a_sequence_without_a_step_of_the_policy_is_one_and_gspo_is_then_ppo(head_case):
    case = head_case(num_tokens=131)
    arguments = sequence_arguments(case, has_old=False)
    gspo, hidden_grad, weight_grad = run(case, GSPO, arguments)
    ppo, *ppo_grads = run(case, LossRule(context="sampling"), arguments)
    assert (gspo.ratio_T == 1).all()
    assert torch.equal(gspo.loss, ppo.loss)
    assert torch.equal(hidden_grad, ppo_grads[0]) and torch.equal(weight_grad, ppo_grads[1])


def test_gspo_of_sequences_of_one_token_is_ppo_without_its_dual_clip(head_case):
    case = head_case(num_tokens=37)
    arguments = token_arguments(case, has_old=True) | {"sequence_T": torch.arange(37), "num_sequences": 37}
    gspo, *grads = run(case, LossRule(surrogate="gspo"), arguments)
    ppo, *ppo_grads = run(case, LossRule(dual_clip=1e9), arguments)
    # The log-probs of the first phase are those of the second, bit for bit, on this path: one chunk each.
    assert torch.equal(gspo.loss, ppo.loss)
    assert all(torch.equal(mine, other) for mine, other in zip(grads, ppo_grads, strict=True))


def test_cispo_inside_its_band_has_the_gradient_of_ppo_and_outside_a_bounded_one(head_case, relative_error):
    case = head_case(num_tokens=131)
    arguments = token_arguments(case, has_old=True)
    wide = {"clip_low": 1.0, "clip_high": 1e9, "dual_clip": 1e9}
    _, *grads = run(case, LossRule(surrogate="cispo", **wide), arguments)
    _, *ppo_grads = run(case, LossRule(**wide), arguments)
    for mine, other in zip(grads, ppo_grads, strict=True):
        assert relative_error(mine, other) < 1e-6
    # Clipped to a point, every ratio is 1: the gradient of the log-probs times the advantages.
    point, *grads = run(case, LossRule(surrogate="cispo", clip_low=0.0, clip_high=0.0), arguments)
    _, *first_grads = run(
        case, LossRule(context="sampling"), arguments | {"old_logprobs_T": None, "weights_T": point.weights_T}
    )
    for mine, other in zip(grads, first_grads, strict=True):
        assert relative_error(mine, other) < 1e-6
    assert point.is_clipped_T[point.is_live_T].any()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_term_is_nothing_at_the_reference_and_pulls_towards_it_elsewhere(estimator):
    from p2o_kernels.policy_loss.token_loss import kl_penalties

    difference = torch.tensor([-300.0, -30.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 30.0, 300.0], dtype=torch.float64)
    penalties, gradient = kl_penalties(estimator, difference)
    assert penalties[4] == 0 and gradient[4] == 0
    assert (penalties >= 0).all() and penalties.isfinite().all() and gradient.isfinite().all()
    assert torch.equal(gradient.sign(), -difference.sign())
    small = difference[[3, 5]]
    torch.testing.assert_close(penalties[[3, 5]], small.square() / 2, rtol=1e-4, atol=0)
    inside = difference[2:7].clone().requires_grad_()
    (slope,) = torch.autograd.grad(kl_penalties(estimator, inside)[0].sum(), inside)
    torch.testing.assert_close(slope, -kl_penalties(estimator, difference[2:7])[1], rtol=1e-12, atol=1e-12)


def test_terms_act_on_tokens_without_an_advantage_and_not_on_tokens_without_a_weight(head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True) | {"advantages_T": torch.zeros(37)}
    for rule in (LossRule(kl_coefficient=0.1), LossRule(entropy_coefficient=0.1)):
        output, hidden_grad, _ = run(case, rule, arguments)
        weights = output.weights_T
        assert torch.equal(hidden_grad.abs().sum(1) > 0, weights != 0) and (weights != 0).any()
        assert not output.is_live_T[arguments["weights_T"] == 0].any()
    output, hidden_grad, _ = run(case, LossRule(), arguments)
    assert output.loss == 0 and not output.is_live_T.any() and not hidden_grad.any()


def test_an_even_distribution_has_no_entropy_gradient_and_the_bonus_is_its_entropy(head_case):
    case = head_case()
    arguments = token_arguments(case, has_old=True) | {"advantages_T": torch.zeros(37)}
    hidden, weight = torch.zeros_like(case.hidden_TD).requires_grad_(), case.weight_VpD.clone().requires_grad_()
    output = linear_policy_loss(hidden, weight, case.targets_T, rule=LossRule(entropy_coefficient=0.1), **arguments)
    output.loss.backward()
    expected = -0.1 * math.log(case.vocab_size) * output.weights_T.sum() / 321
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    assert hidden.grad.abs().max() < 1e-7 and weight.grad.abs().max() < 1e-7


@pytest.mark.parametrize(
    ("rule", "name"),
    [(LossRule(surrogate="gspo"), "sequence_T"), (LossRule(kl_coefficient=0.1), "reference_logprobs_T")],
)
def test_what_a_rule_needs_is_named(rule, name, head_case):
    case = head_case()
    with pytest.raises(ValueError, match=name):
        run(case, rule, token_arguments(case, has_old=True) | {name: None})


def halves_of_sequences(case, arguments, rule):
    """Return (loss, dH of this rank's tokens, dW) where two ranks hold a part of every sequence each."""
    mine = torch.arange(131) % 2 == dist.get_rank()
    part = {name: value[mine] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    hidden, weight = case.leaves()
    hidden = hidden.detach()[mine].requires_grad_()
    output = linear_policy_loss(
        hidden, weight, case.targets_T[mine], rule=rule, **part, sequence_group=dist.group.WORLD
    )
    output.loss.backward()
    return output.loss.item(), hidden.grad.numpy(), weight.grad.numpy()


def test_sequences_that_lie_on_two_ranks_have_the_ratio_of_the_whole(head_case, relative_error):
    case = head_case(num_tokens=131)
    whole, hidden_grad, weight_grad = run(case, GSPO, sequence_arguments(case))
    by_rank = run_gloo_ranks(halves_of_sequences, 2, case, sequence_arguments(case), GSPO)
    assert sum(loss for loss, *_ in by_rank) == pytest.approx(whole.loss.item(), rel=1e-5)
    joined = torch.empty_like(hidden_grad)
    for rank, (_, part, _) in enumerate(by_rank):
        joined[rank::2] = torch.from_numpy(part)
    assert relative_error(joined, hidden_grad) < 1e-6
    assert relative_error(sum(torch.from_numpy(grad) for *_, grad in by_rank), weight_grad) < 1e-6
