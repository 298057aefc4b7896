"""Attention over a pack against plain attention, sample by sample."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_p2o.policy.model.attention import _attend_on_cpu, _attend_on_cuda, pack_layout, sample_positions
from megatron_p2o.policy.model.layer_choice import Capabilities, choose_layers, import_problem
from megatron_p2o.policy.training.forward import _padded
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


@pytest.mark.parametrize("context_size", [1, 2])
def test_the_kernel_for_a_gpu_takes_fewer_key_heads_than_query_heads(context_size: int):
    """Whatever torch is installed checks the shapes itself: a call that it refuses shows without a GPU."""
    layout = pack_layout(boundaries((8, 4, 12)), 0, context_size)
    on_gpu = [getattr(layout, name) for name in ("cu_seqlens_q", "cu_seqlens_kv", "key_rows")]
    layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.key_rows = (
        None if tensor is None else tensor.to("meta") for tensor in on_gpu
    )
    sizes = ((24 // context_size, 4, 16), (24, 2, 16), (24, 2, 16))
    parts = [torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in sizes]
    output = _attend_on_cuda(*parts, layout, 0.25)
    assert (output.shape, output.dtype) == (sizes[0], torch.bfloat16)
    output.sum().backward()
    assert [part.grad.shape for part in parts if part.grad is not None] == list(sizes)


CPU = Capabilities(has_cuda=False, flash_attn_problem="is not installed", transformer_engine_problem="needs CUDA")
GPU = Capabilities(has_cuda=True, flash_attn_problem=None, transformer_engine_problem=None)


@pytest.mark.parametrize(
    ("setting", "capabilities", "layers", "attention"),
    [
        ("auto", CPU, "local", "sdpa"),
        ("auto", replace(CPU, flash_attn_problem=None), "local", "sdpa"),
        ("auto", GPU, "transformer_engine", "transformer_engine"),
        ("auto", replace(GPU, transformer_engine_problem="is not installed"), "local", "flash_attn"),
        ("transformer_engine", GPU, "transformer_engine", "transformer_engine"),
        ("local", GPU, "local", "flash_attn"),
        ("local", replace(GPU, flash_attn_problem="is not installed"), "local", "torch_varlen"),
    ],
)
def test_layers_and_attention_follow_what_is_there(
    setting: Any, capabilities: Capabilities, layers: str, attention: str
):
    choice = choose_layers(setting, capabilities)
    assert (choice.layers, choice.attention) == (layers, attention)


def test_the_choice_of_layers_says_why():
    broken = replace(
        GPU, transformer_engine_problem="cannot be imported: undefined symbol", flash_attn_problem="is not installed"
    )
    choice = choose_layers("auto", broken)
    assert choice.layers_reason == "megatron-core's own: Transformer Engine cannot be imported: undefined symbol"
    assert "flash-attn is not installed" in choice.attention_reason
    assert choose_layers("local", GPU).layers_reason == "megatron-core's own: model.layer_backend=local"
    assert "no CUDA" in choose_layers("auto", CPU).attention_reason
    with pytest.raises(ValueError, match=r"model\.layer_backend=transformer_engine cannot .* needs CUDA\. Set model\."):
        choose_layers("transformer_engine", CPU)


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        # What flash-attn-4 installs, which SGLang depends on.
        ("cute/__init__.py", "", "is not installed: p2o_flash is there without varlen"),
        ("__init__.py", "def varlen(): ...", None),
        (
            "__init__.py",
            "raise ImportError('undefined symbol: _ZN3c10')",
            "cannot be imported: undefined symbol: _ZN3c10",
        ),
        (None, "", "is not installed"),
    ],
)
def test_a_package_counts_only_when_what_is_needed_of_it_can_be_imported(
    path: str | None, text: str, problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if path is not None:
        file = tmp_path / "p2o_flash" / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "p2o_flash", raising=False)
    assert import_problem("p2o_flash", "varlen", has_cuda=True) == problem
    assert import_problem("p2o_flash", "varlen", has_cuda=False) == ("needs CUDA" if path else problem)
    sys.modules.pop("p2o_flash", None)


def test_transformer_engine_is_given_the_samples_and_under_context_parallelism_their_padded_boundaries():
    cu_seqlens = boundaries((8, 4, 12))
    alone, shared = pack_layout(cu_seqlens).whole, pack_layout(cu_seqlens, 1, 2).whole
    assert alone is not None and shared is not None
    assert alone.cu_seqlens_q_padded is None and alone.cu_seqlens_kv_padded is None
    for whole in (alone, shared):
        assert (whole.qkv_format, whole.max_seqlen_q, whole.max_seqlen_kv) == ("thd", 12, 12)
        assert whole.cu_seqlens_q.tolist() == whole.cu_seqlens_kv.tolist() == [0, 8, 12, 24]
    assert shared.cu_seqlens_q_padded.tolist() == shared.cu_seqlens_kv_padded.tolist() == [0, 8, 12, 24]


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
