"""The head operations with the vocabulary split over gloo ranks: results and gradients of the whole head."""

import pytest
import torch
import torch.distributed as dist

from megatron_p2o.testing.distributed import run_gloo_ranks
from p2o_kernels import LossRule, linear_logprob, linear_policy_loss
from p2o_kernels.lm_head.torch_path import TorchHead
from p2o_kernels.logprob import linear_logprob_reference
from p2o_kernels.policy_loss import linear_policy_loss_reference

PATHS = {"keeping": TorchHead(), "small chunks": TorchHead(chunk_bytes=32 * 4 * 60, save_bytes=0)}
VOCAB_SIZES = (240, 181, 113)
"""Shards of 240 rows: no padding, a last shard of which one row counts (4 ranks), and last shards of padding alone."""


def make_inputs(vocab_size, loudness=60.0):
    """With the default loudness one rank's logits are far above the others': targets down to -200 nats."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(61, 16, generator=generator)
    weight = 0.4 * torch.randn(240, 16, generator=generator)
    weight[3] *= loudness
    weight[vocab_size:] = 1000.0
    targets = torch.randint(0, vocab_size, (61,), generator=generator)
    gradient = torch.randn(61, generator=generator)
    gradient[::4] = 0
    return hidden, weight, targets, gradient


def shard(weight):
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = len(weight) // size
    return weight[rank * rows : (rank + 1) * rows].clone().requires_grad_(), rank * rows


def logprob_of_shards(path):
    """Return, per vocabulary size, (logprobs, entropy, summed dH, this rank's dW)."""
    results = []
    for vocab_size in VOCAB_SIZES:
        hidden, weight, targets, gradient = make_inputs(vocab_size)
        part, start = shard(weight)
        hidden.requires_grad_()
        logprobs, entropy = linear_logprob(
            hidden,
            part,
            targets,
            temperature=0.6,
            tp_group=dist.group.WORLD,
            vocab_start=start,
            vocab_size=vocab_size,
            path=path,
        )
        logprobs.backward(gradient)
        dist.all_reduce(hidden.grad)
        results.append(tuple(value.numpy() for value in (logprobs.detach(), entropy, hidden.grad, part.grad)))
    return results


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_sharded_logprobs_and_gradients_are_those_of_the_whole_head(path, num_ranks, relative_error):
    by_rank = run_gloo_ranks(logprob_of_shards, num_ranks, path)
    for index, vocab_size in enumerate(VOCAB_SIZES):
        hidden, weight, targets, gradient = make_inputs(vocab_size)
        hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
        truth, entropy_truth = linear_logprob_reference(hidden, weight, targets, temperature=0.6, vocab_size=vocab_size)
        truth.backward(gradient.double())
        results = [tuple(map(torch.from_numpy, results[index])) for results in by_rank]
        for logprobs, entropy, hidden_grad, _ in results:
            torch.testing.assert_close(logprobs.double(), truth.detach(), rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(entropy.double(), entropy_truth, rtol=1e-5, atol=1e-5)
            assert relative_error(hidden_grad, hidden.grad) < 3e-6
            assert torch.equal(logprobs, results[0][0])
        assert truth.min() < -100
        assert relative_error(torch.cat([result[3] for result in results]), weight.grad) < 3e-6


def loss_arguments(vocab_size):
    hidden, weight, targets, _ = make_inputs(vocab_size, loudness=1.0)
    generator = torch.Generator().manual_seed(5)
    logprobs, _ = linear_logprob_reference(hidden, weight, targets, temperature=0.6, vocab_size=vocab_size)
    old = logprobs.float() + 0.3 * torch.randn(61, generator=generator)
    return (
        hidden,
        weight,
        targets,
        {
            "advantages_T": torch.randn(61, generator=generator),
            "weights_T": (torch.rand(61, generator=generator) < 0.7).float(),
            "old_logprobs_T": old,
            "sampling_logprobs_T": old + 2 * torch.randn(61, generator=generator),
            "is_templated_T": torch.rand(61, generator=generator) < 0.7,
            "reference_logprobs_T": old + torch.randn(61, generator=generator),
            "sequence_T": torch.arange(3).repeat_interleave(torch.tensor([30, 1, 30])),
            "loss_scale": 1 / 61,
            "temperature": 0.6,
            "vocab_size": vocab_size,
        },
    )


def loss_of_shards(rules, has_old, path):
    """Return, per rule, (loss, summed dH, this rank's dW)."""
    results = []
    for rule in rules:
        hidden, weight, targets, arguments = loss_arguments(181)
        part, start = shard(weight)
        hidden.requires_grad_()
        output = linear_policy_loss(
            hidden,
            part,
            targets,
            rule=rule,
            **arguments | ({} if has_old else {"old_logprobs_T": None}),
            num_sequences=3,
            tp_group=dist.group.WORLD,
            vocab_start=start,
            path=path,
        )
        output.loss.backward()
        dist.all_reduce(hidden.grad)
        results.append((output.loss.item(), hidden.grad.numpy(), part.grad.numpy()))
    return results


@pytest.mark.parametrize("has_old", [True, False], ids=["old given", "old is current"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_policy_loss_and_gradients_are_those_of_the_whole_head(num_ranks, has_old, relative_error):
    rules = [LossRule(context=context) for context in ("sampling", "replace", "importance", "ratio_mask")]
    rules += [LossRule(surrogate="gspo", clip_low=0.05), LossRule(kl_coefficient=0.2, entropy_coefficient=0.3)]
    by_rank = run_gloo_ranks(loss_of_shards, num_ranks, rules, has_old, PATHS["small chunks"])
    for index, rule in enumerate(rules):
        hidden, weight, targets, arguments = loss_arguments(181)
        hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
        arguments = arguments | ({} if has_old else {"old_logprobs_T": None})
        loss, *_ = linear_policy_loss_reference(hidden, weight, targets, rule=rule, **arguments)
        loss.backward()
        for results in by_rank:
            assert results[index][0] == pytest.approx(loss.item(), rel=1e-5)
            assert relative_error(torch.from_numpy(results[index][1]), hidden.grad) < 1e-5
        weight_grad = torch.cat([torch.from_numpy(results[index][2]) for results in by_rank])
        assert relative_error(weight_grad, weight.grad) < 1e-5
