"""Attention over a pack against plain attention, sample by sample."""

import pytest
import torch
import torch.nn.functional as F

from megatron_p2o.policy.attention import _attend_on_cpu, pack_layout, sample_positions
from megatron_p2o.policy.attention_choice import choose_attention
from megatron_p2o.policy.forward import _padded
from megatron_p2o.rl.packing import context_positions

LENGTHS = (5, 1, 7, 5, 2, 7, 5)


def boundaries(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def attention_by_definition(query_THK: torch.Tensor, key_TGK: torch.Tensor, value_TGK: torch.Tensor, scale: float):
    """Softmax over the earlier tokens of the same sample, written out in float64."""
    sample_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    is_visible_TT = (sample_T[:, None] == sample_T) & torch.ones(len(sample_T), len(sample_T)).tril().bool()
    repeats = query_THK.shape[1] // key_TGK.shape[1]
    key_THK, value_THK = (part.repeat_interleave(repeats, 1) for part in (key_TGK, value_TGK))
    scores_HTT = torch.einsum("thk,shk->hts", query_THK, key_THK) * scale
    return torch.einsum("hts,shk->thk", scores_HTT.masked_fill(~is_visible_TT, -torch.inf).softmax(-1), value_THK)


@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 4), (4, 2), (6, 1)])
def test_samples_attend_to_themselves_alone_and_gradients_agree(num_heads: int, num_groups: int):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 8) for heads in (num_heads, num_groups, num_groups)]
    packed = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    plain = [tensor.detach().clone().requires_grad_() for tensor in packed]
    direction = torch.randn(shapes[0], generator=generator, dtype=torch.float64)

    output = _attend_on_cpu(*packed, pack_layout(boundaries(LENGTHS)), 0.3)
    expected = attention_by_definition(*plain, 0.3)

    torch.testing.assert_close(output, expected)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    for ours, theirs in zip(packed, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_every_context_rank_computes_its_queries_against_the_gathered_keys():
    lengths, size = (12, 6, 24, 6), 3
    cu_seqlens = boundaries(lengths)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(48, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = _attend_on_cpu(query, key, value, pack_layout(cu_seqlens), 0.3)
    positions = [context_positions(cu_seqlens, rank, size) for rank in range(size)]
    assert torch.cat(positions).sort().values.tolist() == list(range(48))
    gathered = torch.cat(positions)
    for rank, own in enumerate(positions):
        layout = pack_layout(cu_seqlens, rank, size)
        assert layout.cu_seqlens_kv[-1] == sum(length * (2 * size + 1) for length in lengths) / (2 * size)
        output = _attend_on_cpu(query[own], key[gathered], value[gathered], layout, 0.3)
        torch.testing.assert_close(output, expected[own])


@pytest.mark.parametrize("has_transformer_engine", [False, True])
@pytest.mark.parametrize(
    ("has_cuda", "has_flash_attn", "kernel"),
    [
        (False, False, "sdpa"),
        (False, True, "sdpa"),
        (True, False, "torch_varlen"),
        (True, True, "flash_attn"),
    ],
)
def test_the_attention_kernel_follows_what_is_there_and_says_what_is_not_used(
    has_cuda: bool, has_flash_attn: bool, has_transformer_engine: bool, kernel: str
):
    choice = choose_attention(
        has_cuda=has_cuda, has_flash_attn=has_flash_attn, has_transformer_engine=has_transformer_engine
    )
    assert choice.kernel == kernel
    assert ("its layers are not used" in choice.reason) == has_transformer_engine
    assert ("flash-attn is not installed" in choice.reason) == (kernel == "torch_varlen")


def test_positions_restart_at_each_sample():
    assert sample_positions(boundaries((3, 1, 4))).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_equal_lengths_are_computed_together():
    assert pack_layout(boundaries(LENGTHS)).blocks == ((1, 1, 1), (1, 2, 2), (3, 5, 5), (2, 7, 7))


def test_padding_is_a_sample_of_its_own():
    cu_seqlens, padding = _padded(boundaries((3, 2)), 4)
    assert (cu_seqlens.tolist(), padding) == ([0, 3, 5, 8], 3)
    assert cu_seqlens.dtype == torch.int32
    assert _padded(boundaries((3, 5)), 4)[1] == 0
    assert F.pad(torch.ones(5), (0, padding)).tolist() == [1.0] * 5 + [0.0] * 3
