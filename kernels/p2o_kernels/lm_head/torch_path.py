"""The LM head in torch: chunked, vocabulary-parallel on gloo, in float32 (float64 for float64 inputs).

Legend: T tokens, C tokens of a chunk, D hidden size, V vocabulary columns of this rank that count (Vp with padding),
R ranks that share the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather, get_rank, get_world_size

from p2o_kernels.lm_head.shard import HeadShard, SoftmaxChunk

_ROW_BLOCK_BYTES = 2**20
"""Part of a chunk that is exponentiated and summed while it lies in the processor's cache."""
_WEIGHT_TILE_ROWS = 8192
"""Vocabulary rows of a low-precision weight that are widened at a time."""


@dataclass(frozen=True, slots=True)
class TorchHead:
    """`LmHeadPath` in torch; production on CPU."""

    chunk_bytes: int = 32 * 2**20
    """Size of one chunk's [C, V] buffer: small against the full logits, large enough for an efficient product."""
    save_bytes: int = 64 * 2**20
    is_triton: bool = False
    compacts_rows: bool = True

    def num_chunk_rows(self, shard: HeadShard, num_tokens: int) -> int:
        rows = max(16, self.chunk_bytes // max(1, shard.num_rows * shard.compute_dtype.itemsize))
        return max(1, min(rows, num_tokens))

    def exponentials_buffer(self, shard: HeadShard, num_rows: int, *, for_gradient: bool) -> Tensor:
        """Return [num_rows, V]; log-probs alone need it too."""
        return shard.weight_VD.new_empty(num_rows, len(shard.weight_VD), dtype=shard.compute_dtype)

    def softmax_chunk(
        self, shard: HeadShard, hidden_CD: Tensor, targets_C: Tensor, buffer: Tensor | None, *, with_entropy: bool
    ) -> SoftmaxChunk:
        """One all-gather of [4, C] over the ranks."""
        assert buffer is not None
        num_rows = len(hidden_CD)
        logits_CV = buffer[:num_rows]
        scaled_CD = hidden_CD.to(shard.compute_dtype) * (1.0 / shard.temperature)
        for columns, weight in _weight_tiles(shard):
            torch.mm(scaled_CD, weight.T, out=logits_CV[:, columns])
        rows, columns_of_target = shard.local_targets(targets_C)
        target_C = scaled_CD.new_zeros(num_rows)
        target_C[rows] = logits_CV[rows, columns_of_target]
        sums_3C = _exponentiate_(logits_CV, rows, columns_of_target, with_entropy=with_entropy)
        return _combine(shard, logits_CV, target_C, sums_3C, with_entropy=with_entropy)

    def hidden_grad(self, shard: HeadShard, chunk: SoftmaxChunk, targets_C: Tensor, logprob_grad_C: Tensor) -> Tensor:
        assert chunk.exponentials_CV is not None
        grad_C = logprob_grad_C.to(shard.compute_dtype) / shard.temperature
        result_CD = grad_C.new_zeros(len(grad_C), shard.weight_VD.shape[1])
        for columns, weight in _weight_tiles(shard):
            result_CD.addmm_(chunk.exponentials_CV[:, columns], weight)
        result_CD.mul_(-(grad_C * chunk.probability_scale_C)[:, None])
        rows, columns_of_target = shard.local_targets(targets_C)
        target_weight = shard.weight_VD[columns_of_target].to(shard.compute_dtype)
        return result_CD.index_add_(0, rows, (grad_C * chunk.complement_C)[rows, None] * target_weight)

    def add_weight_grad_(
        self,
        weight_grad_VpD: Tensor,
        shard: HeadShard,
        chunk: SoftmaxChunk,
        hidden_CD: Tensor,
        targets_C: Tensor,
        logprob_grad_C: Tensor,
    ) -> None:
        assert chunk.exponentials_CV is not None
        grad_C = logprob_grad_C.to(shard.compute_dtype) / shard.temperature
        hidden = hidden_CD.to(shard.compute_dtype)
        valid_VD = weight_grad_VpD[: len(shard.weight_VD)]
        valid_VD.addmm_(chunk.exponentials_CV.T, (grad_C * chunk.probability_scale_C)[:, None] * hidden, alpha=-1.0)
        rows, columns_of_target = shard.local_targets(targets_C)
        valid_VD.index_add_(0, columns_of_target, ((grad_C * chunk.complement_C)[:, None] * hidden)[rows])


def _weight_tiles(shard: HeadShard) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, weight rows in the compute dtype): one tile when nothing has to be widened."""
    num_rows = len(shard.weight_VD)
    step = max(num_rows, 1) if shard.weight_VD.dtype == shard.compute_dtype else _WEIGHT_TILE_ROWS
    for start in range(0, num_rows, step):
        columns = slice(start, min(start + step, num_rows))
        yield columns, shard.weight_VD[columns].to(shard.compute_dtype)


def _exponentiate_(logits_CV: Tensor, rows: Tensor, columns: Tensor, *, with_entropy: bool) -> Tensor:
    """Replace logits by exp(logit - row maximum), targets by 0; return maxima, sums, and sums weighted by the logit."""
    num_rows, num_columns = logits_CV.shape
    sums_3C = logits_CV.new_zeros(3, num_rows)
    if num_columns == 0:
        sums_3C[0] = -torch.inf
        return sums_3C
    target_columns_C = torch.full((num_rows,), -1, device=logits_CV.device)
    target_columns_C[rows] = columns
    step = max(1, _ROW_BLOCK_BYTES // (num_columns * logits_CV.element_size()))
    for start in range(0, num_rows, step):
        block = logits_CV[start : start + step]
        maximum = block.amax(1)
        block.sub_(maximum[:, None])
        exponentials = block.exp() if with_entropy else block.exp_()
        own = target_columns_C[start : start + step]
        own_rows = (own >= 0).nonzero().squeeze(1)
        exponentials[own_rows, own[own_rows]] = 0.0
        sums = sums_3C[:, start : start + step]
        sums[0] = maximum
        sums[1] = exponentials.sum(1)
        if with_entropy:
            sums[2] = torch.einsum("cv,cv->c", exponentials, block)
            block.copy_(exponentials)
    return sums_3C


def _combine(
    shard: HeadShard, exponentials_CV: Tensor, target_C: Tensor, sums_3C: Tensor, *, with_entropy: bool
) -> SoftmaxChunk:
    """Merge the ranks' sums. The target is kept apart, so that nothing near probability 1 cancels."""
    gathered_R4C = _gather(torch.cat([sums_3C, target_C[None]]), shard.tp_group)
    maxima_RC, sums_RC, weighted_RC, targets_RC = gathered_R4C.unbind(1)
    maximum_C = maxima_RC.amax(0)
    shift_RC = maxima_RC - maximum_C
    factor_RC = shift_RC.exp()
    others_C = (factor_RC * sums_RC).sum(0)
    target_shift_C = targets_RC.sum(0) - maximum_C
    total_C = others_C + target_shift_C.exp()
    log_total_C = torch.log1p(others_C + torch.expm1(target_shift_C))
    entropy_C = None
    if with_entropy:
        # An empty shard has maximum -inf and no columns: its share is 0, not nan.
        moved_RC = torch.where(factor_RC > 0, weighted_RC + sums_RC * shift_RC, 0.0)
        weighted_C = (factor_RC * moved_RC).sum(0) + target_shift_C.exp() * target_shift_C
        entropy_C = log_total_C - weighted_C / total_C
    rank = 0 if shard.tp_group is None else get_rank(shard.tp_group)
    return SoftmaxChunk(
        logprobs_C=target_shift_C - log_total_C,
        entropy_C=entropy_C,
        exponentials_CV=exponentials_CV,
        probability_scale_C=factor_RC[rank] / total_C,
        complement_C=others_C / total_C,
    )


def _gather(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the ranks' `values` stacked along a new first dimension."""
    if group is None:
        return values[None]
    stacked = values.new_empty(get_world_size(group), *values.shape)
    all_gather(list(stacked.unbind()), values.contiguous(), group=group)
    return stacked
