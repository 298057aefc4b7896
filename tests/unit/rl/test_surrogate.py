"""A surrogate of the user's own: what it may be, what is refused, and that it takes the place of ours exactly."""

from pathlib import Path

import pytest
import torch

from megatron_p2o.config.tree import ObjectiveConfig
from megatron_p2o.rl.objective import loss_rule
from megatron_p2o.rl.surrogate import check_surrogate
from p2o_kernels import linear_policy_loss
from p2o_kernels.policy_loss.token_loss import LossRule, TokenInputs, token_losses_torch

CODE = """
import torch

def ppo(ratio, logprobs, advantages, rule):
    band = ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high)
    losses = torch.maximum(-advantages * ratio, -advantages * band)
    return torch.where(advantages < 0, torch.minimum(losses, -rule.dual_clip * advantages), losses)

def cispo(ratio, logprobs, advantages, rule):
    return -ratio.clamp(1 - rule.clip_low, 1 + rule.clip_high).detach() * advantages * logprobs

def two(ratio, logprobs):
    return ratio

def mean(ratio, logprobs, advantages, rule):
    return -(advantages * ratio).mean()

def centred(ratio, logprobs, advantages, rule):
    return -advantages * (ratio - ratio.mean())

def blind(ratio, logprobs, advantages, rule):
    return -advantages

def root(ratio, logprobs, advantages, rule):
    return -advantages * (ratio - 1).sqrt()

def raises(ratio, logprobs, advantages, rule):
    return rule.clip_middle

number = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "losses.py"
    path.write_text(CODE)
    return path


@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("name", ["ppo", "cispo"])
def test_ours_written_as_ones_own_has_the_same_losses_and_gradients(code: Path, name: str, has_old: bool) -> None:
    own = loss_rule(ObjectiveConfig(surrogate=f"{code}:{name}", context="replace"))
    ours = loss_rule(ObjectiveConfig(surrogate=name, context="replace"))
    generator = torch.Generator().manual_seed(1)
    logprobs = -3 * torch.rand(500, generator=generator, dtype=torch.float64)
    tokens = TokenInputs(
        advantages_N=torch.randn(500, generator=generator),
        weights_N=torch.rand(500, generator=generator),
        old_logprobs_N=logprobs + torch.randn(500, generator=generator) if has_old else None,
    )
    computed, expected = token_losses_torch(own, logprobs, tokens), token_losses_torch(ours, logprobs, tokens)
    for field in ("losses_N", "logprob_grad_N", "ratio_N", "weights_N"):
        torch.testing.assert_close(getattr(computed, field), getattr(expected, field), rtol=1e-12, atol=1e-12)
    if name == "ppo":  # of `cispo` the clip takes no gradient away
        assert torch.equal(computed.is_clipped_N, expected.is_clipped_N)
        assert computed.is_clipped_N.any() == has_old
    assert not computed.losses_N.requires_grad


@pytest.mark.parametrize("has_old", [True, False])
def test_cloning_has_the_loss_and_the_gradients_of_the_negative_log_likelihood_in_float64(has_old: bool) -> None:
    """`nll_loss` of full logits, whatever the policy was before and however likely the template made a token."""
    generator = torch.Generator().manual_seed(3)
    num_tokens, hidden_size, vocab_size = 40, 16, 50
    hidden = torch.randn(num_tokens, hidden_size, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    is_trained = torch.rand(num_tokens, generator=generator) < 0.7
    expected = torch.nn.functional.nll_loss(
        (hidden @ weight.T / 0.7).log_softmax(-1)[is_trained], targets[is_trained], reduction="sum"
    )
    expected_grads = torch.autograd.grad(expected / 11, (hidden, weight))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):  # float32: rounding of 50 exponentials
        inputs = [each.detach().to(dtype).requires_grad_() for each in (hidden, weight)]
        outcome = linear_policy_loss(
            *inputs,
            targets,
            rule=loss_rule(ObjectiveConfig(surrogate="clone", context="replace")),
            loss_scale=1 / 11,
            temperature=0.7,
            advantages_T=is_trained.float(),
            weights_T=is_trained.float(),
            old_logprobs_T=torch.rand(num_tokens, generator=generator) - 9 if has_old else None,
            sampling_logprobs_T=torch.rand(num_tokens, generator=generator) - 3,
            is_templated_T=torch.ones(num_tokens, dtype=torch.bool),
        )
        torch.testing.assert_close(outcome.loss.detach().double(), expected.detach() / 11, rtol=tolerance, atol=0)
        for ours, theirs in zip(torch.autograd.grad(outcome.loss, inputs), expected_grads, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("two", "has the signature (ratio, logprobs) and must be callable as (ratio, logprobs, advantages, rule)"),
        ("number", "is int, and must be callable as (ratio, logprobs, advantages, rule)"),
        ("missing", "cannot be imported (AttributeError"),
        ("mean", "returned a shape of () for two tokens: return a loss for each"),
        ("centred", "returned the loss of a token that depends on another"),
        ("blind", "cannot be used (RuntimeError: "),
        ("root", "returned losses or gradients that are not finite"),
        ("raises", "cannot be used (AttributeError: "),
    ],
)
def test_what_is_no_loss_by_token_is_refused_before_the_run(code: Path, name: str, told: str) -> None:
    with pytest.raises(ValueError) as refused:
        check_surrogate(ObjectiveConfig(surrogate=f"{code}:{name}"), LossRule())
    assert str(refused.value).startswith(f"objective.surrogate={code}:{name} {told}")


def test_a_name_that_is_none_of_ours_is_refused_with_ours() -> None:
    with pytest.raises(ValueError, match=r"objective\.surrogate=pppo is none of ppo, gspo, cispo, clone, nor package"):
        loss_rule(ObjectiveConfig(surrogate="pppo"))


def test_a_loss_that_fails_later_names_what_it_returned() -> None:
    tokens = TokenInputs(advantages_N=torch.ones(3), weights_N=torch.ones(3))
    for surrogate, told in (
        (lambda ratio, logprobs, advantages, rule: ratio.mean(), r"returned \(\): must be a tensor of \(3,\) losses"),
        (lambda ratio, logprobs, advantages, rule: ratio.detach(), "losses without a gradient"),
        (lambda ratio, logprobs, advantages, rule: 1.0, "returned float"),
    ):
        with pytest.raises(ValueError, match=told):
            token_losses_torch(LossRule(context="replace", surrogate=surrogate), -torch.ones(3), tokens)
