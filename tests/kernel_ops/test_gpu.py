"""The compiled Triton path on a GPU, at a real hidden size: what the interpreter cannot show."""

from dataclasses import replace

import pytest
import torch

from p2o_kernels import HeadOptions, LossRule, active_token_index, grouped_advantage, linear_logprob, linear_policy_loss
from p2o_kernels.lm_head import path_for
from p2o_kernels.policy_loss import linear_policy_loss_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the compiled Triton path is not run"),
]


def head_path(hidden, kernel, weight_grad="fast"):
    return path_for(hidden, HeadOptions(kernel=kernel, weight_grad=weight_grad))


def cuda_case(vocab_size, num_padding, num_tokens=384):
    """Return hidden, weight, targets and loss arguments like a trained policy's, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, device="cuda")

    weight = (normal(vocab_size + num_padding, 2560) / 2560**0.5).bfloat16()
    weight[vocab_size:] = 1000.0
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator, device="cuda")
    confidence = 10 + 14 * torch.rand(num_tokens, 1, generator=generator, device="cuda")
    hidden = (weight[targets].float() * confidence + 2.5 * normal(num_tokens, 2560)).bfloat16()
    arguments = {
        "advantages_T": normal(num_tokens),
        "weights_T": (torch.rand(num_tokens, generator=generator, device="cuda") < 0.9).float(),
        "sampling_logprobs_T": -3 * torch.rand(num_tokens, generator=generator, device="cuda"),
        "is_templated_T": torch.rand(num_tokens, generator=generator, device="cuda") < 0.7,
        "loss_scale": 1 / num_tokens,
        "vocab_size": vocab_size,
    }
    return hidden, weight, targets, arguments


@pytest.fixture
def logprob_error_limit(bench):
    """The log-prob error allowed on given inputs: the device's own float32 product has about as much."""

    def limit(hidden, weight, targets, truth, vocab_size, temperature=1.0):
        product = bench.measure.product_logprobs(hidden.detach(), weight.detach(), targets, temperature, vocab_size)
        return bench.measure.logprob_error_limit(float((product - truth).abs().max()))

    return limit


KERNELS = ("warp_specialized", "plain")
"""Kernels of the LM head; `run_gpu.sh` runs the tests of each, by name, in a process of its own."""


@pytest.mark.parametrize("weight_grad", ["fast", "precise"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("vocab_size", "num_padding"), [(4099, 61), (18992, 0)])
def test_policy_loss_and_gradients_equal_float64_autograd(
    vocab_size, num_padding, kernel, weight_grad, relative_error, nan_empty, logprob_error_limit
):
    hidden, weight, targets, arguments = cuda_case(vocab_size, num_padding)
    hidden_64, weight_64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, logprobs, entropy = linear_policy_loss_reference(hidden_64, weight_64, targets, rule=LossRule(), **arguments)
    loss.backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    path = replace(head_path(hidden, kernel, weight_grad), chunk_bytes=256 * 2 * len(weight))
    output = linear_policy_loss(
        hidden, weight, targets, rule=LossRule(), **arguments, weight_main_grad_VpD=main_grad, path=path
    )
    output.loss.backward()
    live = output.is_live_T
    limit = logprob_error_limit(hidden, weight, targets, logprobs.detach(), vocab_size)
    assert (output.logprobs_T[live] - logprobs[live]).abs().max() <= limit
    assert (output.entropy_T[live] - entropy[live]).abs().max() < 1e-4
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert relative_error(hidden.grad, hidden_64.grad) < 2.5e-3
    assert relative_error(main_grad, weight_64.grad) < 1e-3
    assert (main_grad[vocab_size:] == 0).all()


RULES = {
    "gspo": LossRule(surrogate="gspo", clip_low=0.05, clip_high=0.05),
    "cispo, KL": LossRule(surrogate="cispo", kl_coefficient=0.3),
    "entropy": LossRule(entropy_coefficient=0.3),
}


def old_policy(targets, logprobs, device="cuda"):
    """Return what an update against given old log-probs takes more: three sequences, and a reference policy."""
    noise = 0.1 * torch.randn(len(targets), generator=torch.Generator(device).manual_seed(3), device=device)
    lengths = torch.tensor([200, 1, len(targets) - 201], device=device)
    return {
        "old_logprobs_T": logprobs.float() + noise,
        "reference_logprobs_T": logprobs.float() - 3 * noise,
        "sequence_T": torch.arange(3, device=device).repeat_interleave(lengths),
    }


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_surrogates_and_terms_equal_float64_autograd(rule, relative_error, nan_empty):
    hidden, weight, targets, arguments = cuda_case(4099, 61)
    hidden_64, weight_64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    truth = torch.log_softmax(hidden.double() @ weight[:4099].double().T, -1).gather(1, targets[:, None]).squeeze(1)
    arguments |= old_policy(targets, truth)
    loss, *_ = linear_policy_loss_reference(hidden_64, weight_64, targets, rule=rule, **arguments)
    loss.backward()
    output = linear_policy_loss(
        hidden.requires_grad_(), weight.requires_grad_(), targets, rule=rule, num_sequences=3, **arguments
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    # The entropy's part is rounded to bfloat16 once more than the log-prob's.
    factor = 2 if rule.entropy_coefficient else 1
    assert relative_error(hidden.grad, hidden_64.grad) < 2.5e-3 * factor
    assert relative_error(weight.grad, weight_64.grad) < 3.5e-3 * factor  # rounded to bfloat16 at the end


@pytest.mark.parametrize("rule", [LossRule(), *RULES.values()], ids=["ppo", *RULES])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_call_gives_the_same_bits(kernel, rule):
    hidden, weight, targets, arguments = cuda_case(18992, 0)
    arguments |= old_policy(targets, arguments["sampling_logprobs_T"]) | {"num_sequences": 3}
    results = []
    for _ in range(2):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        path = head_path(hidden, kernel)
        output = linear_policy_loss(*leaves, targets, rule=rule, **arguments, path=path)
        output.loss.backward()
        results.append((output.loss.detach(), leaves[0].grad.clone(), leaves[1].grad.clone()))
        leaves[0].grad = leaves[1].grad = None
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_scoring_equals_float64(kernel, logprob_error_limit):
    hidden, weight, targets, _ = cuda_case(4099, 61)
    with torch.no_grad():
        path = head_path(hidden, kernel)
        logprobs, _ = linear_logprob(hidden, weight, targets, vocab_size=4099, temperature=0.6, path=path)
    truth = torch.log_softmax(hidden.double() @ weight[:4099].double().T / 0.6, -1)
    truth = truth.gather(1, targets[:, None]).squeeze(1)
    assert (logprobs - truth).abs().max() <= logprob_error_limit(hidden, weight, targets, truth, 4099, 0.6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_hidden_states_show_in_their_log_probs_alone(kernel):
    hidden, weight, targets, _ = cuda_case(4099, 61)
    hidden[200, 7] = torch.nan
    with torch.no_grad():
        logprobs, _ = linear_logprob(hidden, weight, targets, vocab_size=4099, path=head_path(hidden, kernel))
    assert logprobs.isnan().nonzero().tolist() == [[200]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_shard_of_padding_alone_adds_nothing(kernel):
    hidden, weight, targets, _ = cuda_case(4099, 61)
    hidden.requires_grad_()
    weight.requires_grad_()
    # The second of two shards, seen alone: no column counts and no target is here, so every log-prob is 0.
    path = replace(head_path(hidden, kernel), save_bytes=2**30)
    logprobs, _ = linear_logprob(hidden, weight, targets, vocab_start=4160, vocab_size=4160, path=path)
    logprobs.sum().backward()
    assert (logprobs == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_grouped_advantage_equals_the_cpu():
    generator = torch.Generator().manual_seed(0)
    batch = {
        "rewards_R": (torch.rand(512, generator=generator) < 0.3).float(),
        "group_ids_R": torch.randint(0, 60, (512,), generator=generator),
        "is_valid_R": torch.rand(512, generator=generator) < 0.9,
    }
    expected = grouped_advantage(**batch, estimator="grpo")
    result = grouped_advantage(**{name: value.cuda() for name, value in batch.items()}, estimator="grpo").cpu()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(result == 0, expected == 0)


def test_the_active_tokens_equal_the_cpus():
    generator = torch.Generator().manual_seed(0)
    advantages, weights = torch.randn(2, 700_001, generator=generator).relu()  # half of them zero
    index = active_token_index(advantages.cuda(), weights.cuda()).cpu()
    assert torch.equal(index, active_token_index(advantages, weights))
