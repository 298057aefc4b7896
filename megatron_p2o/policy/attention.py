"""Attention over a pack: samples laid end to end, each attending to itself alone.

T packed tokens, H query heads and G key/value heads of this rank, K channels per head.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor


@dataclass
class PackLayout(PackedSeqParams):
    """Where the samples of a pack lie.

    `qkv_format` says "sbhd": Megatron then treats the pack as one sequence and applies the rotary embedding once to
    all of it (with positions that restart at each sample, see `PolicyModel`) instead of sample by sample; only the core
    attention below looks at the boundaries.
    """

    order_T: Tensor | None = None
    """int64 permutation that brings samples of equal length together; None on CUDA, where no one needs it."""
    rank_T: Tensor | None = None
    """Its inverse."""
    blocks: tuple[tuple[int, int], ...] = ()
    """(number of samples, their length) in the permuted order."""


def pack_layout(cu_seqlens: Tensor) -> PackLayout:
    """Return the layout of a pack with these boundaries ([num_samples + 1] int32, on the model's device)."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    layout = PackLayout(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if not cu_seqlens.is_cuda:
        length_of_T = lengths.repeat_interleave(lengths)
        layout.order_T = length_of_T.argsort(stable=True)
        layout.rank_T = layout.order_T.argsort()
        layout.blocks = tuple((count, length) for length, count in sorted(Counter(lengths.tolist()).items()))
    return layout


def sample_positions(cu_seqlens: Tensor) -> Tensor:
    """Return [T] int64: each token's position in its own sample."""
    lengths = cu_seqlens.diff().long()
    starts_T = cu_seqlens[:-1].long().repeat_interleave(lengths)
    return torch.arange(len(starts_T), device=cu_seqlens.device) - starts_T


class PackedCoreAttention(MegatronModule):
    """Causal attention within each sample of a `PackLayout`; Megatron's `core_attention` for the local layer spec.

    CPU: one scaled-dot-product call per distinct sample length, exact and without padding. CUDA: torch's
    variable-length flash attention, which needs bfloat16 or float16.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1 and not config.attention_dropout
        assert config.kv_channels is not None
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        self.hidden_size_per_partition = divide(config.kv_channels * config.num_attention_heads, groups.tp.size())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackLayout | None = None,
    ) -> Tensor:
        """Return [T, 1, H*K] from query [T, 1, H, K] and key, value [T, 1, G, K]."""
        assert isinstance(packed_seq_params, PackLayout)
        query_THK, key_TGK, value_TGK = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        attend = _attend_on_cuda if query.is_cuda else _attend_on_cpu
        output_THK = attend(query_THK, key_TGK, value_TGK, packed_seq_params, self.scale)
        return output_THK.reshape(len(query), 1, self.hidden_size_per_partition)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def _attend_on_cpu(query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, layout: PackLayout, scale: float) -> Tensor:
    assert layout.order_T is not None and layout.rank_T is not None
    sizes = [count * length for count, length in layout.blocks]
    parts = [tensor.index_select(0, layout.order_T).split(sizes) for tensor in (query_THK, key_TGK, value_TGK)]
    outputs: list[Tensor] = []
    for (count, length), *heads in zip(layout.blocks, *parts, strict=True):
        # [count * length, heads, K] -> [count, heads, length, K]
        query, key, value = (part.unflatten(0, (count, length)).transpose(1, 2) for part in heads)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.rank_T)


def _attend_on_cuda(query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, layout: PackLayout, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query_THK,
        key_TGK,
        value_TGK,
        layout.cu_seqlens_q,
        layout.cu_seqlens_kv,
        layout.max_seqlen_q,
        layout.max_seqlen_kv,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query_THK.shape[1] != key_TGK.shape[1],
    )
    assert isinstance(output, Tensor)
    return output
