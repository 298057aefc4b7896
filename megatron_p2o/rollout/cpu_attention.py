"""Batched decoding attention for SGLang's `torch_native` backend: a plugin of the engine process on the CPU.

SGLang's own backend loops over the sequences of a batch in Python, layer by layer, which is two thirds of the time of a
small model. Here one attention call serves many sequences, padded to the longest of them. Prefill, sliding windows and
encoders are left to SGLang's code.

SGLang finds the plugin by the entry point in `cpu_site`, which is on the path of CPU engines only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

MAX_PADDED_TOKENS = 1 << 16
"""Keys gathered at once, padding included: bounds temporary memory when lengths differ much."""


def register() -> None:
    """Put the batched backend in the place of `torch_native`; SGLang calls this in each of its processes."""
    register_attention_backend("torch_native")(BatchedDecodeBackend)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceBlock:
    """Sequences of similar length that share one attention call. B sequences, L keys of the longest."""

    rows_B: Tensor
    """Of the batch."""
    slots_BL: Tensor
    """Where the keys lie in the KV cache; arbitrary beyond a sequence's end."""
    mask_B11L: Tensor
    """bool, True for the keys of the sequence."""


class BatchedDecodeBackend(TorchNativeAttnBackend):
    """`torch_native` with decoding in blocks of sequences instead of one by one."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._blocks: list[SequenceBlock] = []
        if forward_batch.forward_mode.is_decode() and forward_batch.encoder_lens is None:
            req_to_token: Tensor = self.req_to_token_pool.req_to_token  # type: ignore[union-attr]
            self._blocks = list(blocks_of(req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens))

    def _run_sdpa_forward_decode(
        self, query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Fill `output` [B, query heads, head size]; `query` alike, caches [slots, key heads, head size]."""
        if not self._blocks or kwargs["sliding_window_size"] is not None or kwargs["is_cross_attn"]:
            return super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *args, **kwargs)
        num_kv_heads = k_cache.shape[1]
        for block in self._blocks:
            # The query heads that share a key head stand in the place of query positions: no key is repeated.
            grouped = query[block.rows_B].unflatten(1, (num_kv_heads, -1))
            attended = scaled_dot_product_attention(
                grouped,
                k_cache[block.slots_BL].transpose(1, 2).to(query.dtype),
                v_cache[block.slots_BL].transpose(1, 2).to(query.dtype),
                attn_mask=block.mask_B11L,
                scale=kwargs["scaling"],
            )
            output[block.rows_B] = attended.flatten(1, 2)
        return output


def blocks_of(req_to_token: Tensor, requests_B: Tensor, lengths_B: Tensor) -> Iterator[SequenceBlock]:
    """Split a batch, shortest sequences first, so that no block holds more than `MAX_PADDED_TOKENS` keys."""
    order = torch.argsort(lengths_B)
    lengths = lengths_B[order].tolist()
    start = 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths) and (end + 1 - start) * lengths[end] <= MAX_PADDED_TOKENS:
            continue
        rows = order[start:end]
        longest = lengths[end - 1]
        positions = torch.arange(longest, device=lengths_B.device)
        yield SequenceBlock(
            rows_B=rows,
            slots_BL=req_to_token[requests_B[rows], :longest].long(),
            mask_B11L=(positions < lengths_B[rows, None])[:, None, None],
        )
        start = end
