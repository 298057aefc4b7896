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

MAX_FEW_TOKENS = 4
"""New tokens of a sequence, at most, that join a call with those of other sequences, for which keys are gathered one by
one. Rollouts of one problem find all but a few tokens of their prompt in the prefix cache."""


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
    """Yield the last token of every sequence."""
    yield from joint_blocks(req_to_token, requests_B, lengths_B, torch.arange(len(lengths_B)))


def joint_blocks(req_to_token: Tensor, requests_N: Tensor, num_keys_N: Tensor, rows_N: Tensor) -> Iterator[TokenBlock]:
    """Yield N tokens of any sequences, those with equally many padded keys together.

    `rows_N` are their rows in the batch.
    """
    padded_N = padded(num_keys_N)
    for width in padded_N.unique().tolist():
        of_width = (padded_N == width).nonzero().squeeze(1)
        for chosen in of_width.split(max(1, MAX_PADDED_TOKENS // width)):
            yield TokenBlock(
                rows_B=rows_N[chosen],
                slots_BL=key_slots(req_to_token, requests_N[chosen], width),
                mask_B11L=mask_of(num_keys_N[chosen], width),
            )


def extend_blocks(
    req_to_token: Tensor, requests_B: Tensor, lengths_B: Tensor, num_new_B: Tensor
) -> Iterator[TokenBlock]:
    """Yield the new tokens of every sequence.

    Those of a sequence with few join others. A sequence with many has blocks of its own, which gather its keys once.
    """
    num_new_B, lengths_B = num_new_B.long(), lengths_B.long()
    ends_B = num_new_B.cumsum(0)
    rows_T = torch.arange(int(ends_B[-1]))
    owner_T = torch.repeat_interleave(torch.arange(len(num_new_B)), num_new_B)
    # The last new token of a sequence sees all its keys, each before it one less.
    num_keys_T = lengths_B[owner_T] - (ends_B[owner_T] - 1 - rows_T)
    is_few_B = num_new_B <= MAX_FEW_TOKENS
    few = is_few_B[owner_T].nonzero().squeeze(1)
    yield from joint_blocks(req_to_token, requests_B[owner_T[few]], num_keys_T[few], few)
    for sequence in (~is_few_B).nonzero().squeeze(1).tolist():
        own = rows_T[ends_B[sequence] - num_new_B[sequence] : ends_B[sequence]]
        yield from blocks_of_one(req_to_token, requests_B[sequence], num_keys_T[own], own)


def blocks_of_one(req_to_token: Tensor, request: Tensor, num_keys_T: Tensor, rows_T: Tensor) -> Iterator[TokenBlock]:
    """Yield tokens of one sequence, those with equally many padded keys together."""
    padded_T = padded(num_keys_T)
    for width in padded_T.unique().tolist():
        chosen = (padded_T == width).nonzero().squeeze(1)
        yield TokenBlock(
            rows_B=rows_T[chosen],
            slots_BL=key_slots(req_to_token, request[None], width),
            mask_B11L=mask_of(num_keys_T[chosen], width),
        )


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
