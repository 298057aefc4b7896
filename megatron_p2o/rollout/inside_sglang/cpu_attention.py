"""Attention for SGLang's `torch_native` backend that is batched and exact: a plugin of the engine process on the CPU.

SGLang's own backend loops over the sequences of a batch in Python, layer by layer, which is two thirds of the time of a
small model. Here one attention call serves the tokens of many sequences.

Each token attends in a call of its own shape: its keys, padded to a multiple of `KEY_STEP`. What is computed for it
then depends on its sequence and place alone, to the last bit: not on its neighbours in the batch, nor on whether its
keys came from the prefix cache, an earlier chunk, or a sequence that was computed anew after a pause. Sliding windows,
encoders and cross-attention are left to SGLang's code.

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

KEY_STEP = 64
"""Keys of a token are padded to a multiple of this."""

MAX_PADDED_TOKENS = 1 << 16
"""Keys gathered at once, padding included: bounds temporary memory."""


def register() -> None:
    """Put the batched backend in the place of `torch_native`; SGLang calls this in each of its processes."""
    register_attention_backend("torch_native")(BatchedAttentionBackend)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBlock:
    """Tokens that share one attention call. B tokens, L keys of the longest rounded up."""

    rows_B: Tensor
    """Rows of the batch."""
    slots_BL: Tensor
    """Positions of the keys in the KV cache, arbitrary beyond a token's own; [1, L] where all are of one sequence."""
    mask_B11L: Tensor
    """bool, True for the keys a token sees."""


class BatchedAttentionBackend(TorchNativeAttnBackend):
    """`torch_native` with blocks of tokens in place of sequences one by one."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._blocks: list[TokenBlock] = []
        if forward_batch.encoder_lens is not None:
            return
        req_to_token: Tensor = self.req_to_token_pool.req_to_token  # type: ignore[union-attr]
        requests, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        if forward_batch.forward_mode.is_decode():
            self._blocks = list(decode_blocks(req_to_token, requests, lengths))
        elif forward_batch.forward_mode.is_extend():
            self._blocks = list(extend_blocks(req_to_token, requests, lengths, forward_batch.extend_seq_lens))

    def _run_sdpa_forward_extend(
        self, query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Fill `output` [T, query heads, head size]; `query` alike, caches [slots, key heads, head size]."""
        if not self._blocks or _is_left_to_sglang(kwargs) or not kwargs["causal"]:
            return super()._run_sdpa_forward_extend(query, output, k_cache, v_cache, *args, **kwargs)
        return attend(self._blocks, query, output, k_cache, v_cache, kwargs["scaling"])

    def _run_sdpa_forward_decode(
        self, query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Fill `output` [B, query heads, head size]; `query` alike, caches [slots, key heads, head size]."""
        if not self._blocks or _is_left_to_sglang(kwargs):
            return super()._run_sdpa_forward_decode(query, output, k_cache, v_cache, *args, **kwargs)
        return attend(self._blocks, query, output, k_cache, v_cache, kwargs["scaling"])


def attend(
    blocks: list[TokenBlock], query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float | None
) -> Tensor:
    """Fill `output` block by block."""
    num_kv_heads = k_cache.shape[1]
    for block in blocks:
        # The query heads that share a key head stand in the place of query positions: no key is repeated.
        grouped = query[block.rows_B].unflatten(1, (num_kv_heads, -1))
        shape = (len(grouped), -1, -1, -1)
        attended = scaled_dot_product_attention(
            grouped,
            k_cache[block.slots_BL].transpose(1, 2).to(query.dtype).expand(shape),
            v_cache[block.slots_BL].transpose(1, 2).to(query.dtype).expand(shape),
            attn_mask=block.mask_B11L,
            scale=scale,
        )
        output[block.rows_B] = attended.flatten(1, 2)
    return output


def decode_blocks(req_to_token: Tensor, requests_B: Tensor, lengths_B: Tensor) -> Iterator[TokenBlock]:
    """Yield the last token of every sequence, those with equally many padded keys together."""
    padded_B = padded(lengths_B)
    for width in padded_B.unique().tolist():
        all_rows = (padded_B == width).nonzero().squeeze(1)
        for rows in all_rows.split(max(1, MAX_PADDED_TOKENS // width)):
            yield TokenBlock(
                rows_B=rows,
                slots_BL=key_slots(req_to_token, requests_B[rows], width),
                mask_B11L=mask_of(lengths_B[rows], width),
            )


def extend_blocks(
    req_to_token: Tensor, requests_B: Tensor, lengths_B: Tensor, num_new_B: Tensor
) -> Iterator[TokenBlock]:
    """Yield the new tokens of every sequence; the keys, which they share, are gathered once a block."""
    start = 0
    for request, length, num_new in zip(requests_B, lengths_B.tolist(), num_new_B.tolist(), strict=True):
        first = length - num_new
        num_keys_T = torch.arange(first + 1, length + 1)
        padded_T = padded(num_keys_T)
        for width in padded_T.unique().tolist():
            rows = (padded_T == width).nonzero().squeeze(1)
            yield TokenBlock(
                rows_B=rows + start,
                slots_BL=key_slots(req_to_token, request[None], width),
                mask_B11L=mask_of(num_keys_T[rows], width),
            )
        start += num_new


def padded(num_keys: Tensor) -> Tensor:
    """Return the numbers of keys rounded up to multiples of `KEY_STEP`."""
    return (num_keys + KEY_STEP - 1) // KEY_STEP * KEY_STEP


def key_slots(req_to_token: Tensor, requests_B: Tensor, width: int) -> Tensor:
    """Return [B, width] cache slots; a narrower table is padded with the unused slot 0."""
    slots = req_to_token[requests_B, :width].long()
    return torch.nn.functional.pad(slots, (0, width - slots.shape[1]))


def mask_of(num_keys_B: Tensor, width: int) -> Tensor:
    """Return [B, 1, 1, width], True for each token's own keys."""
    return (torch.arange(width, device=num_keys_B.device) < num_keys_B[:, None])[:, None, None]


def _is_left_to_sglang(kwargs: dict[str, Any]) -> bool:
    return kwargs["sliding_window_size"] is not None or kwargs["is_cross_attn"]
