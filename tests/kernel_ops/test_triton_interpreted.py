"""The Triton path in the interpreter: same operations, bfloat16, against float64 autograd.

What the interpreter cannot show (races, tensor-core rounding, warp specialization) is left to the `gpu` tests.
"""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from megatron_p2o.testing.distributed import run_gloo_ranks
from p2o_kernels import LossRule, linear_logprob, linear_policy_loss
from p2o_kernels.lm_head.shard import HeadShard
from p2o_kernels.logprob import linear_logprob_reference
from p2o_kernels.policy_loss import linear_policy_loss_reference
from p2o_kernels.policy_loss.token_loss import LossTokens, RatioForm, token_inputs, token_losses_torch

pytestmark = pytest.mark.usefixtures("interpreted_triton")


def small_path(**options):
    """Return a path of small tiles, several row blocks and several splits of the vocabulary."""
    from p2o_kernels.lm_head.triton_path import Tile, TritonHead

    tile = Tile(rows=32, columns=64, depth=32, warp_specialize=False)
    return TritonHead(**{"tile": tile, "num_multiprocessors": 6, "save_bytes": 0} | options)


def make_case(head_case, **changes):
    shape = {"num_tokens": 45, "vocab_size": 300, "num_padding": 20, "hidden_size": 96, "dtype": torch.bfloat16}
    return head_case(**shape | changes)


def policy_arguments(case):
    generator = torch.Generator().manual_seed(2)
    num_tokens = len(case.targets_T)
    old = case.logprobs_T.float() + 0.3 * torch.randn(num_tokens, generator=generator)
    advantages = torch.randn(num_tokens, generator=generator)
    advantages[::5] = 0
    return {
        "advantages_T": advantages,
        "weights_T": (torch.rand(num_tokens, generator=generator) < 0.9).float(),
        "old_logprobs_T": old,
        "sampling_logprobs_T": old + 2 * torch.randn(num_tokens, generator=generator),
        "is_templated_T": torch.rand(num_tokens, generator=generator) < 0.7,
        "loss_scale": 1 / 45,
        "temperature": case.temperature,
        "vocab_size": case.vocab_size,
    }


def smooth(ratio, logprobs, advantages, rule):
    """A surrogate of a user's own."""
    return -advantages * torch.sigmoid(3 * (ratio - 1))


def run_policy(case, rule, arguments, path):
    hidden, weight = case.leaves()
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    output = linear_policy_loss(
        hidden, weight, case.targets_T, rule=rule, **arguments, weight_main_grad_VpD=main_grad, path=path
    )
    output.loss.backward()
    return output, hidden.grad, main_grad


@pytest.mark.parametrize(
    "shape",
    [{}, {"temperature": 1.0, "vocab_size": 299, "num_padding": 0}, {"num_tokens": 1}, {"sharpness": 20.0}],
    ids=["padded", "odd vocabulary", "one row", "sharp"],
)
def test_policy_loss_and_gradients_equal_float64_autograd(shape, head_case, relative_error, nan_empty):
    case = make_case(head_case, **shape)
    arguments = policy_arguments(case) | ({"advantages_T": torch.ones(1)} if shape == {"num_tokens": 1} else {})
    output, hidden_grad, main_grad = run_policy(case, LossRule(), arguments, small_path())
    hidden, weight = case.leaves(torch.float64)
    loss, *_ = linear_policy_loss_reference(hidden, weight, case.targets_T, rule=LossRule(), **arguments)
    loss.backward()
    live = output.is_live_T
    # Logits of size 10 (sharp: 70) in float32; the stored exponentials are bfloat16, the gradients' sums float32.
    scale = shape.get("sharpness", 3.0) / 3.0
    assert (output.logprobs_T[live] - case.logprobs_T[live]).abs().max() < 5e-6 * scale
    assert (output.entropy_T[live] - case.entropy_T[live]).abs().max() < 2e-5 * scale
    assert output.loss.double().item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-8)
    assert relative_error(hidden_grad, hidden.grad) < 2.5e-3
    assert relative_error(main_grad, weight.grad) < 1.3e-3
    assert (main_grad[case.vocab_size :] == 0).all()


@pytest.mark.parametrize("has_old", [True, False], ids=["old given", "old is current"])
@pytest.mark.parametrize(
    "rule",
    [
        LossRule(entropy_coefficient=0.3),
        LossRule(entropy_coefficient=3.0, kl_coefficient=0.5, surrogate="gspo", clip_low=0.1),
        LossRule(surrogate="gspo", context="importance", clip_low=0.1),
        LossRule(kl_coefficient=0.5, kl_estimator="k2", surrogate="cispo"),
        LossRule(ratio_form="one_sided"),
        LossRule(ratio_form="fading"),
        LossRule(surrogate=smooth),
    ],
    ids=["entropy", "gspo with both terms", "gspo over two prompts", "cispo with k2", "one-sided", "fading", "own"],
)
def test_terms_and_surrogates_equal_float64_autograd(rule, has_old, head_case, relative_error, nan_empty):
    case = make_case(head_case)
    arguments = policy_arguments(case) | ({} if has_old else {"old_logprobs_T": None})
    sequence_T = torch.arange(5).repeat_interleave(torch.tensor([11, 1, 20, 0, 13]))
    arguments |= {"sequence_T": sequence_T, "reference_logprobs_T": case.logprobs_T.float() - 0.4}
    output, hidden_grad, main_grad = run_policy(case, rule, arguments | {"num_sequences": 5}, small_path())
    hidden, weight = case.leaves(torch.float64)
    loss, *_ = linear_policy_loss_reference(hidden, weight, case.targets_T, rule=rule, **arguments)
    loss.backward()
    assert output.loss.double().item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    # The entropy's part is rounded to bfloat16 once more than the log-prob's.
    factor = 2 if rule.entropy_coefficient else 1
    assert relative_error(hidden_grad, hidden.grad) < 2.5e-3 * factor
    assert relative_error(main_grad, weight.grad) < 1.5e-3 * factor
    assert (main_grad[case.vocab_size :] == 0).all()


STATES = ("trained", "flat", "spread", "one rival", "two rivals")


def states(kind, generator):
    """Return hidden [64, 64], weight [500, 64] and targets [64] of an LM head in some state, bfloat16.

    Confident of the target; almost uniform; many share the mass; the target has none and one other token, or two, all.
    """
    weight = (torch.randn(500, 64, generator=generator) / 64**0.5).bfloat16()
    targets = torch.randint(0, 500, (64,), generator=generator)
    first, second = (weight[torch.randint(0, 500, (64,), generator=generator)].float() for _ in range(2))
    noise = torch.randn(64, 64, generator=generator)
    if kind == "trained":
        confidence = 4 + 14 * torch.rand(64, 1, generator=generator)
        return (weight[targets].float() * confidence + 1.5 * noise).bfloat16(), weight, targets
    hidden = {"flat": 0.3 * noise, "spread": 3 * noise, "one rival": 14 * first + noise}
    return hidden.get(kind, 16 * (first + second) + 0.3 * noise).bfloat16(), weight, targets


@pytest.mark.parametrize("weight_grad", ["fast", "precise"])
@pytest.mark.parametrize("kind", STATES)
def test_the_weight_gradient_meets_its_accuracy(kind, weight_grad, relative_error):
    generator = torch.Generator().manual_seed(8)
    hidden, weight, targets = states(kind, generator)
    advantages = torch.randn(64, generator=generator)
    rule, tokens = LossRule(context="replace"), {"advantages_T": advantages, "weights_T": torch.ones(64)}
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss, logprobs, _ = linear_policy_loss_reference(*leaves, targets, rule=rule, **tokens)
    loss.backward()
    main_grad = torch.zeros(500, 64)
    output = linear_policy_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        targets,
        rule=rule,
        **tokens,
        weight_main_grad_VpD=main_grad,
        path=small_path(weight_grad=weight_grad),
    )
    output.loss.backward()
    assert (output.logprobs_T - logprobs).abs().max() < 1e-5
    assert relative_error(hidden.grad, leaves[0].grad) < 2e-3  # one rounding to bfloat16, 1.7e-3, and little else
    # One product rounds scale * hidden: 1.7e-3 of its part, over sqrt(2) where a rival has what the target lacks.
    bound = 1.3e-3 if weight_grad == "fast" and "rival" in kind else 1e-3
    error = relative_error(main_grad, leaves[1].grad)
    assert error < bound
    # What rounding the logits' gradient to bfloat16 costs, as other fused heads do: 1.5e-3 and more.
    probabilities = torch.softmax(hidden.detach().double() @ weight.detach().double().T, -1)
    logit_grad = advantages.double()[:, None] * (probabilities - torch.nn.functional.one_hot(targets, 500))
    assert relative_error(logit_grad.bfloat16().double().T @ hidden.detach().double(), leaves[1].grad) > 1.3 * error


def test_logprobs_and_their_gradients_equal_float64_autograd(head_case, relative_error):
    case = make_case(head_case)
    gradient = torch.randn(45, generator=torch.Generator().manual_seed(4))
    gradient[::3] = 0
    grads = []
    for path, dtype in ((small_path(), torch.bfloat16), (small_path(save_bytes=2**20), torch.bfloat16), (None, None)):
        hidden, weight = case.leaves(dtype or torch.float64)
        logprobs, entropy = linear_logprob(
            hidden, weight, case.targets_T, temperature=case.temperature, vocab_size=case.vocab_size, path=path
        )
        logprobs.backward(gradient.to(logprobs.dtype))
        assert (logprobs - case.logprobs_T).abs().max() < 5e-6
        assert (entropy - case.entropy_T).abs().max() < 2e-5
        grads.append((hidden.grad, weight.grad))
    for hidden_grad, weight_grad in grads[:2]:
        assert relative_error(hidden_grad, grads[2][0]) < 2.5e-3
        assert relative_error(weight_grad, grads[2][1]) < 3.5e-3  # rounded to bfloat16 at the end


def test_a_prime_vocabulary_is_cut_right(head_case):
    case = make_case(head_case, num_tokens=3, vocab_size=4099, num_padding=1, hidden_size=32)
    with torch.no_grad():
        logprobs, _ = linear_logprob(
            *case.leaves(), case.targets_T, temperature=0.6, vocab_size=4099, path=small_path(num_multiprocessors=5)
        )
    assert (logprobs - case.logprobs_T).abs().max() < 5e-6


def test_targets_down_to_minus_100_nats_and_up_to_certainty_keep_their_digits():
    gaps = torch.tensor([0.0, 1.0, 10.0, 50.0, 100.0, -5.0, -20.0, -40.0])
    hidden = torch.zeros(8, 32)
    hidden[:, 0], hidden[:, 1] = 64.0, 64.0 - gaps
    weight = torch.zeros(300, 32)
    weight[0, 0] = weight[7, 1] = 1.0
    truth = -torch.log1p(torch.exp(gaps.double()) + 298 * torch.exp(gaps.double() - 64.0))
    targets = torch.full((8,), 7)
    with torch.no_grad():
        logprobs, _ = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets, path=small_path())
    torch.testing.assert_close(logprobs.double(), truth, rtol=3e-6, atol=1e-24)


TOKEN_RULES = (
    LossRule(),
    LossRule(ratio_form="soft"),
    LossRule(ratio_form="one_sided"),
    LossRule(ratio_form="fading"),
    LossRule(importance_cap=1.5),
    LossRule(context="replace", importance_cap=1.5),
    LossRule(context="importance"),
    LossRule(context="replace"),
    LossRule(surrogate="gspo", clip_low=0.1, clip_high=0.15),
    LossRule(surrogate="cispo", clip_low=1.0),
    LossRule(kl_coefficient=0.3, kl_estimator="k2"),
    LossRule(kl_coefficient=0.3, kl_estimator="k3", surrogate="cispo"),
)


@pytest.mark.parametrize("has_old", [True, False], ids=["old given", "old is current"])
def test_the_token_loss_kernel_equals_the_torch_form(has_old, nan_empty):
    from p2o_kernels.policy_loss.triton_path import token_losses_triton

    generator = torch.Generator().manual_seed(6)
    logprobs = -5 * torch.rand(700, generator=generator)
    old = logprobs + 25 * torch.randn(700, generator=generator) * (torch.rand(700, generator=generator) < 0.1)
    old = old + 0.3 * torch.randn(700, generator=generator)
    for rule in TOKEN_RULES:
        tokens = token_inputs(
            rule,
            LossTokens(
                advantages_T=torch.randn(700, generator=generator),
                weights_T=torch.rand(700, generator=generator),
                old_logprobs_T=old if has_old else None,
                sampling_logprobs_T=old + 3 * torch.randn(700, generator=generator),
                is_templated_T=torch.rand(700, generator=generator) < 0.5,
                # From nothing over the series of the kernel's expm1 to beyond the bound of the ratio.
                reference_logprobs_T=logprobs + torch.logspace(-4, 1.5, 700) * (-1) ** torch.arange(700),
            ),
        )
        if rule.surrogate == "gspo" and has_old:
            tokens = replace(tokens, log_ratio_N=0.2 * torch.randn(700, generator=generator))
        computed, expected = token_losses_triton(rule, logprobs, tokens), token_losses_torch(rule, logprobs, tokens)
        for name in expected.__slots__:
            torch.testing.assert_close(getattr(computed, name), getattr(expected, name), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("form", get_args(RatioForm))
@pytest.mark.parametrize("has_old", [True, False], ids=["old given", "old is current"])
def test_the_token_loss_kernel_treats_nan_like_the_torch_form(has_old, form):
    from p2o_kernels.policy_loss.triton_path import token_losses_triton

    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0])
    logprobs, old, sampling = (rows.flatten() for rows in torch.meshgrid(garbage, garbage, garbage, indexing="ij"))
    logprobs, old, sampling = (rows.repeat(4) for rows in (logprobs, old, sampling))
    weights = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat_interleave(64)
    rule = LossRule(ratio_form=form)
    tokens = token_inputs(
        rule,
        LossTokens(
            advantages_T=advantages,
            weights_T=weights,
            old_logprobs_T=old if has_old else None,
            sampling_logprobs_T=sampling,
            is_templated_T=torch.ones_like(old) > 0,
        ),
    )
    computed, expected = token_losses_triton(rule, logprobs, tokens), token_losses_torch(rule, logprobs, tokens)
    for name in expected.__slots__:
        torch.testing.assert_close(getattr(computed, name), getattr(expected, name), equal_nan=True)
    is_idle = weights == 0
    assert not expected.losses_N[is_idle].any() and not expected.logprob_grad_N[is_idle].any()


def test_nan_hidden_states_show_in_the_log_probs_and_the_loss(head_case):
    case = make_case(head_case)
    arguments = policy_arguments(case)
    row = int((arguments["advantages_T"] * arguments["weights_T"]).nonzero()[3])
    with torch.no_grad():
        case.hidden_TD[row, 5] = torch.nan
    output, _, main_grad = run_policy(case, LossRule(context="replace"), arguments, small_path())
    assert output.logprobs_T.isnan().nonzero().tolist() == [[row]]
    assert output.loss.isnan() and main_grad.isnan().any()


def test_rows_whose_target_is_beyond_the_range_stay_finite_and_have_an_entropy(head_case):
    # Two equal rivals 150 nats above the target: saturated, yet log 2 nats of entropy as in truth.
    hidden = torch.zeros(2, 32)
    hidden[:, 0] = 150.0
    weight = torch.zeros(70, 32)
    weight[3, 0] = weight[66, 0] = 1.0
    targets = torch.tensor([0, 3])
    with torch.no_grad():
        logprobs, entropy = linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets, path=small_path())
    assert -112 < logprobs[0] < -110 and logprobs[1] == pytest.approx(-math.log(2), rel=1e-5)
    torch.testing.assert_close(entropy, torch.full((2,), math.log(2)), rtol=1e-4, atol=0)


def test_gradients_keep_their_digits_from_minus_100_nats_to_certainty():
    # The rival is at 100, the target from 0 to 140: its probability from e^-100 to 1 - e^-40, beside 68 zeros.
    gaps = torch.tensor([100.0, 50.0, 10.0, 1.0, 0.0, -5.0, -20.0, -40.0])
    hidden = torch.zeros(8, 32)
    hidden[:, 0], hidden[:, 1] = 100.0, 100.0 - gaps
    hidden, weight = hidden.bfloat16().requires_grad_(), torch.zeros(70, 32).bfloat16()
    weight[0, 0] = weight[7, 1] = 1.0
    targets = torch.full((8,), 7)
    logprobs, _ = linear_logprob(hidden, weight, targets, path=small_path())
    logprobs.sum().backward()
    gaps = 100.0 - hidden.detach()[:, 1].double()
    lost = 1 / (1 + torch.exp(-gaps))  # 1 - probability of the target, all of it the rival's
    expected = torch.zeros(8, 32, dtype=torch.float64)
    expected[:, 0], expected[:, 1] = -lost, lost
    torch.testing.assert_close(hidden.grad.double(), expected, rtol=5e-3, atol=1e-30)


def test_the_chunk_size_changes_only_the_rounding(head_case, relative_error, nan_empty):
    case = make_case(head_case, num_tokens=220, vocab_size=120, hidden_size=32)
    arguments = policy_arguments(case)
    whole, hidden_grad, main_grad = run_policy(case, LossRule(), arguments, small_path())
    small = small_path(chunk_bytes=128 * 2 * len(case.weight_VpD))
    parts, other_hidden_grad, other_main_grad = run_policy(case, LossRule(), arguments, small)
    assert 128 < parts.is_live_T.sum() < 192  # two chunks, the last one not full
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.logprobs_T, whole.logprobs_T, rtol=1e-6, atol=1e-6)
    assert relative_error(other_hidden_grad, hidden_grad) < 1e-3  # a rounding to bfloat16 may fall to the other side
    assert relative_error(other_main_grad, main_grad) < 1e-4


def test_an_all_masked_batch_has_no_loss_and_no_gradient(head_case, nan_empty):
    case = make_case(head_case)
    arguments = policy_arguments(case) | {"weights_T": torch.zeros(45)}
    output, hidden_grad, main_grad = run_policy(case, LossRule(), arguments, small_path())
    assert output.loss == 0 and not output.is_live_T.any()
    assert (hidden_grad == 0).all() and (main_grad == 0).all()


def test_the_gradient_of_a_sum_is_read_as_one_number_per_token(head_case, relative_error):
    case = make_case(head_case)
    hidden, weight = case.leaves()
    whole = {"temperature": case.temperature, "vocab_size": case.vocab_size}
    linear_logprob(hidden, weight, case.targets_T, **whole, path=small_path(save_bytes=2**20))[0].sum().backward()
    true_hidden, true_weight = case.leaves(torch.float64)
    linear_logprob_reference(true_hidden, true_weight, case.targets_T, **whole)[0].sum().backward()
    assert relative_error(hidden.grad, true_hidden.grad) < 2.5e-3
    assert relative_error(weight.grad, true_weight.grad) < 3.5e-3  # rounded to bfloat16 at the end


def test_strided_rows_int32_targets_and_odd_depths_are_read_right(head_case):
    # 40 = 32 + 8: the last step of the product reaches beyond the row, where the next row's numbers lie.
    case = make_case(head_case, hidden_size=40, num_tokens=33)
    wide = torch.full((33, 80), 1000.0, dtype=torch.bfloat16)
    wide[:, :40] = case.hidden_TD
    with torch.no_grad():
        logprobs, _ = linear_logprob(
            wide[:, :40],
            case.weight_VpD,
            case.targets_T.int(),
            temperature=case.temperature,
            vocab_size=case.vocab_size,
            path=small_path(),
        )
    assert (logprobs - case.logprobs_T).abs().max() < 5e-6


def test_two_phases_give_what_one_pass_gives_from_fewer_rows(head_case, relative_error):
    case = make_case(head_case)
    arguments = policy_arguments(case) | {"old_logprobs_T": None}
    arguments["sampling_logprobs_T"] = arguments["sampling_logprobs_T"] - 3.0
    one, one_hidden, one_weight = run_policy(case, LossRule(), arguments | {"expected_dead_share": 0.3}, small_path())
    two, two_hidden, two_weight = run_policy(case, LossRule(), arguments | {"expected_dead_share": 0.4}, small_path())
    assert two.is_live_T.sum() < 0.9 * one.is_live_T.sum()
    torch.testing.assert_close(two.loss, one.loss)
    # Also of the rows that the mask drops: metrics compare them with the template's log-probs.
    torch.testing.assert_close(two.logprobs_T, one.logprobs_T)
    assert relative_error(two_hidden, one_hidden) < 1e-6
    assert relative_error(two_weight, one_weight) < 1e-5


def shards_of_policy_loss(case, arguments):
    rank = dist.get_rank()
    hidden, weight = case.leaves()
    rows = len(weight) // dist.get_world_size()
    part = weight.detach()[rank * rows : (rank + 1) * rows].requires_grad_()
    main_grad = torch.zeros_like(part, dtype=torch.float32)
    output = linear_policy_loss(
        hidden,
        part,
        case.targets_T,
        rule=LossRule(),
        **arguments,
        weight_main_grad_VpD=main_grad,
        tp_group=dist.group.WORLD,
        vocab_start=rank * rows,
        path=small_path(),
    )
    output.loss.backward()
    hidden_grad = hidden.grad.float()
    dist.all_reduce(hidden_grad)
    return output.loss.item(), hidden_grad.numpy(), main_grad.numpy()


@pytest.mark.parametrize(
    ("num_ranks", "num_padding"), [(2, 20), (4, 140)], ids=["partly padded shard", "and one of padding alone"]
)
def test_ranks_give_the_unsharded_result(num_ranks, num_padding, head_case, relative_error):
    case = make_case(head_case, num_padding=num_padding)
    arguments = policy_arguments(case)
    output, hidden_grad, main_grad = run_policy(case, LossRule(), arguments, small_path())
    by_rank = run_gloo_ranks(shards_of_policy_loss, num_ranks, case, arguments)
    for loss, sharded_hidden, _ in by_rank:
        assert loss == pytest.approx(output.loss.item(), rel=1e-5)
        assert relative_error(torch.from_numpy(sharded_hidden), hidden_grad) < 3e-3  # each part is rounded to bfloat16
    weight_grad = torch.cat([torch.from_numpy(result[2]) for result in by_rank])
    assert relative_error(weight_grad, main_grad) < 1e-5


@pytest.mark.parametrize(("num_tokens", "vocab_rows", "rows"), [(32768, 151936, 3328), (100, 151936, 128)])
def test_the_chunk_size_fills_the_device(num_tokens, vocab_rows, rows):
    from p2o_kernels.lm_head.triton_path import TritonHead

    weight = torch.empty(vocab_rows, 2560, dtype=torch.bfloat16, device="meta")
    assert TritonHead().num_chunk_rows(HeadShard(weight, vocab_rows, 0, 1.0, None), num_tokens) == rows


@pytest.mark.parametrize(
    ("row_blocks", "column_tiles", "splits"),
    [(26, 594, 5), (1, 594, 119), (256, 75, 1), (133, 75, 5), (1, 1, 1), (3, 2, 2)],
    ids=["one chunk of Qwen3", "128 rows", "a TP=8 shard at 32k", "a row block too many", "one tile", "two tiles"],
)
def test_the_vocabulary_is_cut_for_the_fewest_waves(row_blocks, column_tiles, splits):
    from p2o_kernels.lm_head.triton_path import TritonHead

    assert TritonHead().num_splits(row_blocks, column_tiles) == splits


def test_unsupported_inputs_are_named(head_case):
    case = make_case(head_case, hidden_size=12)
    for leaves, message in ((case.leaves(), "D=12"), (case.leaves(torch.float32), "torch.float32")):
        with pytest.raises(ValueError, match=message):
            linear_logprob(*leaves, case.targets_T, path=small_path())
