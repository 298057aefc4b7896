# pyright: reportArgumentType=false, reportCallIssue=false
"""The LM head on Hopper: Triton for the first product and the row passes, cuBLAS for the two gradient products.

Legend: T tokens, C tokens of a chunk, D hidden size, V vocabulary columns of this rank that count (Vp with padding).
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from p2o_kernels.lm_head import triton_kernels as kernels
from p2o_kernels.lm_head.shard import HeadShard, SoftmaxChunk, WeightGrad

_DESCRIPTOR_ALIGNMENT = 8
"""bfloat16 elements in the 16 bytes that a tensor descriptor's row stride must be a multiple of."""
TARGET_ROWS = 64
"""Rows of a block whose targets' logits are one product's diagonal."""
_ROW_BLOCK = 1024
"""Elements of a row that the passes around the products take at a time."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How the first product is cut."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    warp_specialize: bool = True
    """One warpgroup loads, two multiply. `num_warps` then counts the warps of one of them."""
    num_warps: int = 4
    num_stages: int = 3


PLAIN_TILE = Tile(warp_specialize=False, num_warps=8)
"""The same product without warp specialization."""


@dataclass(frozen=True, slots=True)
class TritonHead:
    """`LmHeadPath` in Triton and cuBLAS; bfloat16 inputs, hidden size a multiple of 8."""

    chunk_bytes: int = 2**30
    """Limit of the [C, V] bfloat16 exponentials of one chunk."""
    tile: Tile = Tile()
    num_multiprocessors: int = 132
    """For an H100 SXM or H200: decides the chunk size and the splits, never the result."""
    weight_grad: WeightGrad = "fast"
    save_bytes: int = 64 * 2**20
    is_triton: bool = True
    compacts_rows: bool = False

    def num_chunk_rows(self, shard: HeadShard, num_tokens: int) -> int:
        """Return the chunk size with the fewest waves of 128 x 256 tiles in the hidden-gradient product: README.md."""
        limit = max(1, self.chunk_bytes // (2 * max(1, shard.num_rows)) // 128)
        row_blocks, depth_tiles = math.ceil(num_tokens / 128), math.ceil(shard.weight_VD.shape[1] / 256)

        def waves(blocks: int) -> int:
            return math.ceil(blocks * depth_tiles / self.num_multiprocessors)

        def total_waves(blocks: int) -> int:
            return row_blocks // blocks * waves(blocks) + waves(row_blocks % blocks)

        # The largest of the best: fewer launches, fewer passes over the weight gradient.
        return 128 * min(range(min(limit, max(row_blocks, 1)), 0, -1), key=total_waves)

    def exponentials_buffer(self, shard: HeadShard, num_rows: int, *, for_gradient: bool) -> Tensor | None:
        """Return [num_rows, V] bfloat16 whose rows are padded to a tensor descriptor's stride."""
        if not for_gradient:
            return None
        stride = triton.cdiv(len(shard.weight_VD), _DESCRIPTOR_ALIGNMENT) * _DESCRIPTOR_ALIGNMENT
        buffer = shard.weight_VD.new_empty(num_rows, stride, dtype=torch.bfloat16)
        return buffer[:, : len(shard.weight_VD)]

    def softmax_chunk(
        self, shard: HeadShard, hidden_CD: Tensor, targets_C: Tensor, buffer: Tensor | None, *, with_entropy: bool
    ) -> SoftmaxChunk:
        """Two sum all-reduces, [C] and [3, splits, C], over the ranks."""
        _check_supported(hidden_CD, shard.weight_VD)
        targets_C = targets_C.contiguous()
        target_logits_C = self._target_logits(shard, hidden_CD, targets_C)
        exponentials_CV = None if buffer is None else buffer[: len(hidden_CD)]
        sums_3SC = self._exponentials(
            shard, hidden_CD, targets_C, target_logits_C, exponentials_CV, with_entropy=with_entropy
        )
        logprobs, entropy, scale, complement = torch.empty_like(target_logits_C).new_empty(4, len(hidden_CD)).unbind()
        kernels.softmax_rows_kernel[(triton.cdiv(len(hidden_CD), 256),)](
            *sums_3SC, logprobs, entropy, scale, complement, len(hidden_CD), sums_3SC.shape[1],
            1.0 / shard.temperature, STORED=exponentials_CV is not None, ENTROPY=with_entropy, BLOCK=256,
        )  # fmt: skip
        return SoftmaxChunk(logprobs, entropy if with_entropy else None, exponentials_CV, scale, complement)

    def _target_logits(self, shard: HeadShard, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        """Return the targets' logits before the temperature."""
        logits_C = torch.empty(len(hidden_CD), dtype=torch.float32, device=hidden_CD.device)
        kernels.target_logits_kernel[(triton.cdiv(len(hidden_CD), TARGET_ROWS),)](
            hidden_CD, shard.weight_VD, targets_C, logits_C, len(hidden_CD), len(shard.weight_VD), hidden_CD.shape[1],
            shard.vocab_start, hidden_CD.stride(0), shard.weight_VD.stride(0),
            BLOCK_ROWS=TARGET_ROWS, BLOCK_DEPTH=self.tile.depth,
        )  # fmt: skip
        return _sum_over_ranks(logits_C, shard.tp_group)

    def _exponentials(
        self,
        shard: HeadShard,
        hidden_CD: Tensor,
        targets_C: Tensor,
        target_logits_C: Tensor,
        exponentials_CV: Tensor | None,
        *,
        with_entropy: bool,
    ) -> Tensor:
        """Return the row sums [3, splits, C] over all ranks: of the exponentials, weighted by their logits, rounded."""
        num_rows, num_columns = len(hidden_CD), len(shard.weight_VD)
        row_blocks, column_tiles = triton.cdiv(num_rows, self.tile.rows), triton.cdiv(shard.num_rows, self.tile.columns)
        num_splits = self.num_splits(row_blocks, column_tiles)
        sums_3SC = torch.zeros(3, num_splits, num_rows, dtype=torch.float32, device=hidden_CD.device)
        if num_columns > 0:
            # Without a buffer nothing is stored: any valid pointer will do.
            stored = hidden_CD if exponentials_CV is None else exponentials_CV
            _provide_descriptor_memory(hidden_CD.device)
            kernels.exponentials_kernel[(row_blocks * num_splits,)](
                hidden_CD, shard.weight_VD, stored, targets_C, target_logits_C, *sums_3SC,
                num_rows, num_columns, hidden_CD.shape[1], shard.vocab_start, math.log2(math.e) / shard.temperature,
                triton.cdiv(column_tiles, num_splits), hidden_CD.stride(0), shard.weight_VD.stride(0), stored.stride(0),
                STORE=exponentials_CV is not None, ENTROPY=with_entropy, WARP_SPECIALIZE=self.tile.warp_specialize,
                BLOCK_ROWS=self.tile.rows, BLOCK_COLUMNS=self.tile.columns, BLOCK_DEPTH=self.tile.depth,
                num_warps=self.tile.num_warps, num_stages=self.tile.num_stages,
            )  # fmt: skip
        return _sum_over_ranks(sums_3SC, shard.tp_group)

    def num_splits(self, row_blocks: int, column_tiles: int) -> int:
        """Return into how many ranges the vocabulary is cut: for the least time of waves of programs, then the fewest.

        A program takes its range's tiles one after the other, and about one tile's time to start and to write its sums.
        """

        def total_time(splits: int) -> int:
            waves = math.ceil(row_blocks * splits / self.num_multiprocessors)
            return waves * (math.ceil(column_tiles / splits) + 1)

        return min(range(1, max(1, min(self.num_multiprocessors, column_tiles)) + 1), key=total_time)

    def hidden_grad(self, shard: HeadShard, chunk: SoftmaxChunk, targets_C: Tensor, logprob_grad_C: Tensor) -> Tensor:
        """Return bfloat16 [C, D], rounded once."""
        assert chunk.exponentials_CV is not None
        product_CD = _product(chunk.exponentials_CV, shard.weight_VD)
        result_CD = torch.empty_like(product_CD, dtype=shard.weight_VD.dtype)
        kernels.hidden_grad_kernel[(len(result_CD),)](
            product_CD, shard.weight_VD, targets_C.contiguous(), logprob_grad_C, chunk.probability_scale_C,
            chunk.complement_C, result_CD, len(shard.weight_VD), result_CD.shape[1], shard.vocab_start,
            1.0 / shard.temperature, shard.weight_VD.stride(0), BLOCK=_ROW_BLOCK,
        )  # fmt: skip
        return result_CD

    def add_weight_grad_(
        self,
        weight_grad_VpD: Tensor,
        shard: HeadShard,
        chunk: SoftmaxChunk,
        hidden_CD: Tensor,
        targets_C: Tensor,
        logprob_grad_C: Tensor,
    ) -> None:
        """Deterministic: one product that accumulates in float32, and the targets' rows in sorted order."""
        assert chunk.exponentials_CV is not None
        targets_C = targets_C.contiguous()
        num_rows, hidden_size = hidden_CD.shape
        inverse_temperature = 1.0 / shard.temperature
        num_parts = {"fast": 1, "precise": 2}[self.weight_grad]
        parts = torch.empty(num_parts, num_rows, hidden_size, dtype=hidden_CD.dtype, device=hidden_CD.device)
        kernels.scale_rows_kernel[(num_rows,)](
            hidden_CD, logprob_grad_C, chunk.probability_scale_C, parts[0], parts[-1], hidden_size,
            inverse_temperature, hidden_CD.stride(0), REST=num_parts == 2, BLOCK=_ROW_BLOCK,
        )  # fmt: skip
        for scaled_CD in parts:
            _subtract_product_(weight_grad_VpD[: len(shard.weight_VD)], chunk.exponentials_CV.T, scaled_CD)
        order_C = torch.argsort(targets_C, stable=True)
        kernels.add_target_rows_kernel[(num_rows, triton.cdiv(hidden_size, _ROW_BLOCK))](
            weight_grad_VpD, hidden_CD, targets_C, order_C, logprob_grad_C, chunk.complement_C, num_rows,
            len(shard.weight_VD), hidden_size, shard.vocab_start, inverse_temperature, hidden_CD.stride(0),
            weight_grad_VpD.stride(0), BLOCK=_ROW_BLOCK,
        )  # fmt: skip


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right of bfloat16 matrices in float32 (on CPU, under the interpreter, by widening them)."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _subtract_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total -= left @ right, accumulated in float32."""
    if left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=-1, out=total)
    else:
        total.addmm_(left.float(), right.float(), alpha=-1.0)


def _sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        all_reduce(values, group=group)
    return values


def _provide_descriptor_memory(device: torch.device) -> None:
    """Give Triton the memory in which kernels build their tensor descriptors."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)


def _check_supported(hidden_CD: Tensor, weight_VD: Tensor) -> None:
    if hidden_CD.dtype != torch.bfloat16 or hidden_CD.shape[1] % _DESCRIPTOR_ALIGNMENT:
        raise ValueError(
            f"hidden_TD is {hidden_CD.dtype} with D={hidden_CD.shape[1]}: the Triton path takes bfloat16 and D a "
            f"multiple of {_DESCRIPTOR_ALIGNMENT}; cast or pad, or pass path=TorchHead()"
        )
    if hidden_CD.is_cuda and hidden_CD.device.index != torch.cuda.current_device():
        raise ValueError(
            f"hidden_TD is on {hidden_CD.device}: Triton launches on the current device, "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device first"
        )
    for name, tensor in (("hidden_TD", hidden_CD), ("weight_VpD", weight_VD)):
        if tensor.stride(1) != 1 or tensor.stride(0) % _DESCRIPTOR_ALIGNMENT or tensor.data_ptr() % 16:
            raise ValueError(f"{name}: rows must be contiguous and aligned to 16 bytes; call .contiguous()")
