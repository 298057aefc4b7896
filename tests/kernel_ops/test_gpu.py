"""The compiled Triton path on a GPU, at a real hidden size: what the interpreter cannot show."""

import pytest
import torch

from p2o_kernels import LossRule, active_token_index, grouped_advantage, linear_logprob, linear_policy_loss
from p2o_kernels.policy_loss import linear_policy_loss_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the compiled Triton path is not run"),
]


def tiles():
    from p2o_kernels.lm_head.triton_path import PLAIN_TILE, Tile

    return {"warp specialized": Tile(), "plain": PLAIN_TILE}


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


@pytest.mark.parametrize("tile", ["warp specialized", "plain"])
@pytest.mark.parametrize(("vocab_size", "num_padding"), [(4099, 61), (18992, 0)])
def test_policy_loss_and_gradients_equal_float64_autograd(vocab_size, num_padding, tile, relative_error, nan_empty):
    from p2o_kernels.lm_head.triton_path import TritonHead

    hidden, weight, targets, arguments = cuda_case(vocab_size, num_padding)
    hidden_64, weight_64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, logprobs, entropy = linear_policy_loss_reference(hidden_64, weight_64, targets, rule=LossRule(), **arguments)
    loss.backward()
    hidden.requires_grad_()
    weight.requires_grad_()
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    path = TritonHead(tile=tiles()[tile], chunk_bytes=256 * 2 * len(weight))
    output = linear_policy_loss(
        hidden, weight, targets, rule=LossRule(), **arguments, weight_main_grad_VpD=main_grad, path=path
    )
    output.loss.backward()
    live = output.is_live_T
    assert (output.logprobs_T[live] - logprobs[live]).abs().max() < 1e-5
    assert (output.entropy_T[live] - entropy[live]).abs().max() < 1e-4
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert relative_error(hidden.grad, hidden_64.grad) < 2.5e-3
    assert relative_error(main_grad, weight_64.grad) < 1e-3
    assert (main_grad[vocab_size:] == 0).all()


def test_the_same_call_gives_the_same_bits():
    hidden, weight, targets, arguments = cuda_case(18992, 0)
    results = []
    for _ in range(2):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        output = linear_policy_loss(*leaves, targets, rule=LossRule(), **arguments)
        output.loss.backward()
        results.append((output.loss.detach(), leaves[0].grad.clone(), leaves[1].grad.clone()))
        leaves[0].grad = leaves[1].grad = None
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_scoring_equals_float64():
    hidden, weight, targets, _ = cuda_case(4099, 61)
    with torch.no_grad():
        logprobs, _ = linear_logprob(hidden, weight, targets, vocab_size=4099, temperature=0.6)
    truth = torch.log_softmax(hidden.double() @ weight[:4099].double().T / 0.6, -1)
    assert (logprobs - truth.gather(1, targets[:, None]).squeeze(1)).abs().max() < 2e-5


def test_grouped_advantage_equals_the_cpu():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3000, (512,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    batch = {
        "rewards_R": (torch.rand(512, generator=generator) < 0.3).float(),
        "group_ids_R": torch.randint(0, 60, (512,), generator=generator),
        "is_valid_R": torch.rand(512, generator=generator) < 0.9,
        "cu_seqlens": cu_seqlens,
        "loss_mask_T": torch.rand(int(cu_seqlens[-1]), generator=generator) < 0.8,
    }
    expected = grouped_advantage(**batch, estimator="grpo")
    result = grouped_advantage(**{name: value.cuda() for name, value in batch.items()}, estimator="grpo")
    torch.testing.assert_close(result.advantages_T.cpu(), expected.advantages_T, rtol=1e-5, atol=1e-7)
    assert torch.equal(result.is_flat_R.cpu(), expected.is_flat_R)
    index = active_token_index(result, cu_seqlens.cuda()).cpu()
    assert torch.equal(index, active_token_index(expected, cu_seqlens))
