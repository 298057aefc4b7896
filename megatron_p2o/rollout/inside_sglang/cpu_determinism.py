"""SGLang's deterministic inference on a machine without CUDA: a plugin of the engine process on the CPU.

SGLang 0.5.21 samples from each request's own seed under `enable_deterministic_inference`, which it offers on GPUs.
Four things are missing on the CPU:

    the hash that turns (seed, position, token) into noise: an operation of sgl_kernel's CPU build, given here in torch
    matrix products whose rows do not depend on how many there are: its "batch-invariant mode" is made of Triton kernels
    attention of the same kind: `cpu_attention`, which SGLang does not know to be exact
    draws that do not depend on who else is in the batch: one greedy request has SGLang draw the tokens of all others in
        the order of their probabilities, and thus other ones

SGLang finds the plugin by the entry point in `cpu_site`, which is on the path of CPU engines only.
"""

from typing import Any

import sglang.srt.batch_invariant_ops as batch_invariant_ops
import sglang.srt.layers.sampler as sampler
import torch
from sglang.srt.arg_groups.choices import (
    add_deterministic_attention_backend_choices,
    add_radix_supported_deterministic_attention_backend_choices,
)
from torch import Tensor

MIN_ROWS = 16
"""Matrix products of fewer rows are padded. Measured with MKL 2024.2 (torch 2.13) on AVX-512: one row, two and three
rows have kernels of their own that add up in another order; from four rows on all agree to the last bit."""

MASK_32 = 0xFFFFFFFF

_libraries: list[torch.library.Library] = []
"""Operations live as long as the library they were registered through."""


def register() -> None:
    """Complete SGLang; it calls this in each of its processes. Nothing changes without deterministic inference."""
    add_deterministic_attention_backend_choices(["torch_native"])
    add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = use_invariant_products
    sampler.top_k_top_p_min_p_sampling_from_probs_torch = drawn_row_by_row
    sampler.Sampler.forward = without_a_way_of_its_own_for_greedy_batches  # pyright: ignore[reportAttributeAccessIssue]
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    _libraries.append(library)


_draw_in_order = sampler.top_k_top_p_min_p_sampling_from_probs_torch
_forward = sampler.Sampler.forward


def drawn_row_by_row(
    probs_NV: Tensor,
    top_ks_N: Tensor,
    top_ps_N: Tensor,
    min_ps_N: Tensor,
    need_min_p_sampling: bool,
    sampling_seed: Tensor | None,
    positions: Tensor,
    *,
    return_filtered_probs: bool = False,
) -> Any:
    """Return the next token of each row: the likeliest of a greedy one; of one without limits what it gets alone."""
    limits = (top_ks_N, top_ps_N, min_ps_N, need_min_p_sampling)
    in_order: Any = _draw_in_order(
        probs_NV, *limits, sampling_seed, positions, return_filtered_probs=return_filtered_probs
    )
    if sampling_seed is None or return_filtered_probs:
        return in_order
    alone_N = sampler.sampling_from_probs_torch(probs_NV, sampling_seed, positions)
    is_free_N = (top_ks_N >= probs_NV.shape[-1]) & (top_ps_N >= 1)
    tokens_N = torch.where(is_free_N, alone_N, in_order)
    return torch.where(top_ks_N == 1, probs_NV.argmax(-1).to(tokens_N.dtype), tokens_N)


def without_a_way_of_its_own_for_greedy_batches(own: Any, logits: Any, sampling_info: Any, *args: Any) -> Any:
    """Run SGLang's sampler. A batch of greedy requests alone takes the way of mixed batches: both round alike."""
    if sampling_info.sampling_seed is not None:
        sampling_info.is_all_greedy = False
    return _forward(own, logits, sampling_info, *args)


def use_invariant_products(*args: object, **kwargs: object) -> None:
    """Compute matrix products of this process with `invariant_mm` and `invariant_addmm` from now on."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", invariant_mm, "CPU")
    library.impl("addmm", invariant_addmm, "CPU")
    _libraries.append(library)


def invariant_mm(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return `rows @ matrix`; each row of the result depends on its own row of `rows` only, to the last bit."""
    # The variant with `out` is another operation of torch, which is not replaced.
    padded = at_least_min_rows(rows)
    return torch.mm(padded, matrix, out=rows.new_empty(len(padded), matrix.shape[1]))[: len(rows)]


def invariant_addmm(bias: Tensor, rows: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return `beta * bias + alpha * rows @ matrix`, row by row like `invariant_mm`."""
    return invariant_mm(rows, matrix).mul_(alpha).add_(bias, alpha=beta)


def at_least_min_rows(rows: Tensor) -> Tensor:
    """Return `rows` with rows of zeros added when they are too few."""
    missing = MIN_ROWS - len(rows)
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing > 0 else rows


def murmur_hash32(seeds_N: Tensor, positions_N: Tensor, columns_M: Tensor) -> Tensor:
    """Return [N, M] uint32 MurmurHash3 of (seed, position, column): the hash of SGLang's Triton kernel.

    The four blocks are the low and high halves of the 64-bit seed, the position and the column.
    """
    seeds_N1 = seeds_N.to(torch.int64)[:, None]
    hashed = torch.zeros_like(seeds_N1)
    for block in (seeds_N1, seeds_N1 >> 32, positions_N.to(torch.int64)[:, None], columns_M.to(torch.int64)[None]):
        hashed = _mixed(hashed, block & MASK_32)
    hashed = hashed ^ 16  # bytes hashed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed = ((hashed ^ (hashed >> shift)) * factor) & MASK_32
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def _mixed(hashed: Tensor, block: Tensor) -> Tensor:
    """Return the hash with one 32-bit block mixed in; int64 tensors that hold unsigned 32-bit values."""
    block = _rotated((block * 0xCC9E2D51) & MASK_32, 15)
    mixed = _rotated(hashed ^ ((block * 0x1B873593) & MASK_32), 13)
    return (mixed * 5 + 0xE6546B64) & MASK_32


def _rotated(values: Tensor, bits: int) -> Tensor:
    return ((values << bits) | (values >> (32 - bits))) & MASK_32
