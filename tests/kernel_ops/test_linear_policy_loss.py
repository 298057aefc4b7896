"""`linear_policy_loss` in torch: against float64 autograd on full logits, and against the loss over log-probs."""

import itertools

import pytest
import torch

from p2o_kernels import LossRule, linear_logprob, linear_policy_loss
from p2o_kernels.lm_head.torch_path import TorchHead
from p2o_kernels.policy_loss import linear_policy_loss_reference

SMALL_CHUNKS = TorchHead(chunk_bytes=16 * 4 * 224)
CONTEXTS = ("sampling", "replace", "importance", "ratio_mask")
RULES = [LossRule(context=context, clip_high=0.28) for context in CONTEXTS] + [LossRule(ratio_form="soft")]


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
        "loss_scale": 1 / 321,
        "temperature": case.temperature,
        "vocab_size": case.vocab_size,
    }


def run(case, rule, arguments, **options):
    """Return (output, dH, dW)."""
    hidden, weight = case.leaves()
    output = linear_policy_loss(hidden, weight, case.targets_T, rule=rule, **arguments, **options)
    output.loss.backward()
    return output, hidden.grad, weight.grad


def run_reference(case, rule, arguments):
    hidden, weight = case.leaves(torch.float64)
    loss, *_ = linear_policy_loss_reference(hidden, weight, case.targets_T, rule=rule, **arguments)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("has_old", [True, False], ids=["old given", "old is current"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.context}-{rule.ratio_form}")
def test_loss_and_gradients_equal_float64_autograd(rule, has_old, head_case, relative_error, nan_empty):
    case = head_case(num_tokens=131)
    arguments = token_arguments(case, has_old=has_old)
    output, hidden_grad, weight_grad = run(case, rule, arguments, path=SMALL_CHUNKS)
    loss, hidden_truth, weight_truth = run_reference(case, rule, arguments)
    torch.testing.assert_close(output.loss.double(), loss, rtol=2e-6, atol=1e-8)
    assert relative_error(hidden_grad, hidden_truth) < 3e-6
    assert relative_error(weight_grad, weight_truth) < 3e-6
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
    is_read |= rule.context == "ratio_mask"
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
