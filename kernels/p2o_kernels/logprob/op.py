"""`linear_logprob`: log-probs of given tokens from hidden states, without ever holding the logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from p2o_kernels.lm_head import HeadShard, LmHeadPath, SoftmaxChunk, make_shard, path_for


def linear_logprob(
    hidden_TD: Tensor,
    weight_VpD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    path: LmHeadPath | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (logprobs_T, entropy_T): log softmax(hidden @ weight.T / temperature) at the targets, and the entropy.

    Both are float32 (float64 for float64 inputs), in nats, the same on all ranks. `logprobs_T` is differentiable in
    hidden and weight, `entropy_T` is a metric without gradient. Products accumulate in float32; the weight gradient is
    accumulated in float32 and cast once. No more than one chunk of logits exists at a time, and under `torch.no_grad`
    nothing is kept; else backward computes each chunk again, for the rows whose gradient is not zero, unless all of the
    exponentials fit into `path.save_bytes`.

    Args:
        hidden_TD: float32, bfloat16 or float64, the same on all ranks of `tp_group`.
        weight_VpD: this rank's rows of the LM head; as many on every rank of `tp_group`.
        targets_T: global token ids in [0, vocab_size); int64 or int32.
        temperature: the logits are divided by it.
        tp_group: the ranks that share the vocabulary. All must call, and all run backward with the same gradient of
            `logprobs_T` (backward communicates when chunks are computed again). **The hidden gradient is then this
            shard's partial sum**: the caller's mapping (Megatron's `copy_to_tensor_model_parallel_region` or its
            sequence-parallel gather) adds it over the group.
        vocab_start: global id of this rank's first row.
        vocab_size: real columns over all ranks; rows of the weight at or beyond it are padding, never counted, and get
            a zero gradient. Default: every row is real.
        path: how to compute; default by device, see `path_for`.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit.
    """
    path = path_for(hidden_TD) if path is None else path
    shard = make_shard(hidden_TD, weight_VpD, targets_T, temperature, tp_group, vocab_start, vocab_size)
    return linear_logprob_of_shard(hidden_TD, weight_VpD, targets_T, shard, path)


def linear_logprob_of_shard(
    hidden_TD: Tensor, weight_VpD: Tensor, targets_T: Tensor, shard: HeadShard, path: LmHeadPath
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` of inputs that have been checked; `shard` was made of `weight_VpD`."""
    # Inside an autograd function this can no longer be told.
    needs_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VpD.requires_grad)
    logprobs_T, entropy_T = _LinearLogprob.apply(hidden_TD, weight_VpD, targets_T, shard, path, needs_grad)  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs_T, entropy_T


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VpD: Tensor,
        targets_T: Tensor,
        shard: HeadShard,
        path: LmHeadPath,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = len(hidden_TD)
        keep = needs_grad and num_tokens * shard.num_rows * shard.compute_dtype.itemsize <= path.save_bytes
        chunk_rows = max(num_tokens, 1) if keep else path.num_chunk_rows(shard, num_tokens)
        buffer = path.exponentials_buffer(shard, chunk_rows, for_gradient=keep)
        logprobs_T = hidden_TD.new_empty(num_tokens, dtype=shard.compute_dtype)
        entropy_T = torch.empty_like(logprobs_T)
        chunk: SoftmaxChunk | None = None
        for start in range(0, num_tokens, chunk_rows):
            tokens = slice(start, start + chunk_rows)
            chunk = path.softmax_chunk(shard, hidden_TD[tokens], targets_T[tokens], buffer, with_entropy=True)
            assert chunk.entropy_C is not None
            logprobs_T[tokens], entropy_T[tokens] = chunk.logprobs_C, chunk.entropy_C
        ctx.shard, ctx.path = shard, path
        ctx.kept_chunk = chunk if keep else None
        ctx.save_for_backward(hidden_TD, weight_VpD, targets_T)
        ctx.mark_non_differentiable(entropy_T)
        return logprobs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_grad_T: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, weight_VpD, targets_T = ctx.saved_tensors
        shard, path = ctx.shard, ctx.path
        logprob_grad_T = logprob_grad_T.contiguous()  # that of a sum is one number, expanded
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad_TD = torch.zeros_like(hidden_TD) if wants_hidden else None
        weight_grad_VpD = torch.zeros_like(weight_VpD, dtype=shard.compute_dtype) if wants_weight else None
        for tokens, chunk in _chunks_with_gradient(ctx, hidden_TD, targets_T, logprob_grad_T):
            hidden_CD, targets_C, grad_C = hidden_TD[tokens], targets_T[tokens], logprob_grad_T[tokens]
            if hidden_grad_TD is not None:
                hidden_grad_TD[tokens] = path.hidden_grad(shard, chunk, targets_C, grad_C).to(hidden_TD.dtype)
            if weight_grad_VpD is not None:
                path.add_weight_grad_(weight_grad_VpD, shard, chunk, hidden_CD, targets_C, grad_C)
        if weight_grad_VpD is not None:
            weight_grad_VpD = weight_grad_VpD.to(weight_VpD.dtype)
        return hidden_grad_TD, weight_grad_VpD, None, None, None, None


def _chunks_with_gradient(
    ctx: Any, hidden_TD: Tensor, targets_T: Tensor, logprob_grad_T: Tensor
) -> Iterator[tuple[slice | Tensor, SoftmaxChunk]]:
    """Yield (token rows, chunk): the kept one, or each computed again for the rows whose gradient is not zero."""
    shard, path = ctx.shard, ctx.path
    if ctx.kept_chunk is not None:
        yield slice(None), ctx.kept_chunk
        return
    live = logprob_grad_T.nonzero().squeeze(1)
    chunk_rows = path.num_chunk_rows(shard, len(live))
    buffer = path.exponentials_buffer(shard, chunk_rows, for_gradient=True)
    for tokens in live.split(chunk_rows):
        if len(tokens):
            yield tokens, path.softmax_chunk(shard, hidden_TD[tokens], targets_T[tokens], buffer, with_entropy=False)
