"""`linear_logprob` in torch: chunked over tokens, differentiable, with bounded memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from p2o_kernels.chunked_softmax import (
    HeadShard,
    SoftmaxChunk,
    add_weight_grad_,
    chunk_rows,
    hidden_grad,
    softmax_chunk,
)

SAVE_BYTES = 64 * 2**20
"""Exponentials kept from forward to backward when all of them fit; beyond, backward computes each chunk again."""


def linear_logprob_torch(
    hidden_TD: Tensor, shard: HeadShard, weight_VpD: Tensor, targets_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (logprobs_T, entropy_T); see `linear_logprob`."""
    return _LinearLogprob.apply(hidden_TD, weight_VpD, targets_T, shard)  # pyright: ignore[reportReturnType]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VpD: Tensor, targets_T: Tensor, shard: HeadShard
    ) -> tuple[Tensor, Tensor]:
        num_tokens = len(hidden_TD)
        row_bytes = shard.num_rows * shard.compute_dtype.itemsize
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = needs_grad and num_tokens * row_bytes <= SAVE_BYTES
        rows = num_tokens if keep else min(chunk_rows(row_bytes), num_tokens)
        buffer = hidden_TD.new_empty(rows * len(shard.weight_VD), dtype=shard.compute_dtype)
        logprobs_T = hidden_TD.new_empty(num_tokens, dtype=shard.compute_dtype)
        entropy_T = torch.empty_like(logprobs_T)
        chunk: SoftmaxChunk | None = None
        for start in range(0, num_tokens, max(rows, 1)):
            tokens = slice(start, start + rows)
            chunk = softmax_chunk(shard, hidden_TD[tokens], targets_T[tokens], buffer, with_entropy=True)
            assert chunk.entropy_C is not None
            logprobs_T[tokens], entropy_T[tokens] = chunk.logprobs_C, chunk.entropy_C
        ctx.shard, ctx.rows, ctx.weight_dtype = shard, rows, weight_VpD.dtype
        ctx.kept_chunk = chunk if keep else None
        ctx.save_for_backward(hidden_TD, weight_VpD, targets_T)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TD, weight_VpD, targets_T = ctx.saved_tensors
        shard: HeadShard = ctx.shard
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad_TD = torch.zeros_like(hidden_TD) if wants_hidden else None
        weight_grad_VpD = torch.zeros_like(weight_VpD, dtype=shard.compute_dtype) if wants_weight else None
        for tokens, chunk in _chunks_with_gradient(ctx, hidden_TD, targets_T, logprob_grad_T):
            hidden_CD, targets_C, grad_C = hidden_TD[tokens], targets_T[tokens], logprob_grad_T[tokens]
            if hidden_grad_TD is not None:
                hidden_grad_TD[tokens] = hidden_grad(shard, chunk, targets_C, grad_C).to(hidden_TD.dtype)
            if weight_grad_VpD is not None:
                add_weight_grad_(weight_grad_VpD, shard, chunk, hidden_CD, targets_C, grad_C)
        if weight_grad_VpD is not None:
            weight_grad_VpD = weight_grad_VpD.to(ctx.weight_dtype)
        return hidden_grad_TD, weight_grad_VpD, None, None


def _chunks_with_gradient(ctx: Any, hidden_TD: Tensor, targets_T: Tensor, logprob_grad_T: Tensor):
    """Yield (token rows, chunk): the kept one, or each computed again for the rows whose gradient is not zero."""
    if ctx.kept_chunk is not None:
        yield slice(None), ctx.kept_chunk
        return
    live = logprob_grad_T.nonzero().squeeze(1)
    num_columns = len(ctx.shard.weight_VD)
    buffer = hidden_TD.new_empty(min(ctx.rows, len(live)) * num_columns, dtype=ctx.shard.compute_dtype)
    for tokens in live.split(max(ctx.rows, 1)):
        yield tokens, softmax_chunk(ctx.shard, hidden_TD[tokens], targets_T[tokens], buffer, with_entropy=False)
