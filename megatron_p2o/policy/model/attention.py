"""Attention over a pack: samples laid end to end, each of which attends only to itself.

T packed tokens, H query heads and G key/value heads of this rank, K channels per head.
"""

import functools
import inspect
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch import Tensor

from megatron_p2o.policy.model.layer_choice import choose_layers, machine_capabilities
from megatron_p2o.rl.packing import context_positions, ranges


@dataclass
class PackLayout(PackedSeqParams):
    """Which queries of this rank attend to which keys of the pack.

    A segment is a run of consecutive tokens of one sample whose queries are on this rank; its keys are the sample from
    its start to the segment's end. Without context parallelism each sample is one segment.

    `qkv_format` says "sbhd": Megatron then treats the pack as one sequence and applies the rotary embedding once to
    all of it (with positions that restart at each sample, see `PolicyModel`) instead of sample by sample; only the core
    attention below looks at the boundaries. The fields of the base are those of the variable-length kernels.
    """

    key_rows: Tensor | None = None
    """int64 rows of the gathered keys in the order of the segments; None when the keys are in that order."""
    order_T: Tensor | None = None
    """int64 permutation that brings segments of equal shape together; None on CUDA, where no one needs it."""
    rank_T: Tensor | None = None
    """Its inverse."""
    blocks: tuple[tuple[int, int, int], ...] = ()
    """(number of segments, their queries, their keys) in the permuted order."""
    whole: PackedSeqParams | None = None
    """The samples of the whole pack in Transformer Engine's terms, which cuts them over the context ranks itself."""


def pack_layout(cu_seqlens: Tensor, context_rank: int = 0, context_size: int = 1) -> PackLayout:
    """Return the layout of a pack for one context-parallel rank.

    Args:
        cu_seqlens: [num_samples + 1] int32 boundaries of the whole pack, on the model's device; multiples of
            2 * `context_size` when that is not 1.
        context_rank: this rank among those that share the pack.
        context_size: their number.
    """
    num_queries, num_keys, key_starts = _segments(cu_seqlens, context_rank, context_size)
    layout = PackLayout(
        qkv_format="sbhd",
        cu_seqlens_q=F.pad(num_queries.cumsum(0), (1, 0)).int(),
        cu_seqlens_kv=F.pad(num_keys.cumsum(0), (1, 0)).int(),
        max_seqlen_q=int(num_queries.max()),
        max_seqlen_kv=int(num_keys.max()),
        whole=_whole_pack(cu_seqlens, context_size),
    )
    if context_size > 1:
        gathered = torch.cat([context_positions(cu_seqlens, rank, context_size) for rank in range(context_size)])
        layout.key_rows = gathered.argsort()[ranges(key_starts, num_keys)]
    return layout if cu_seqlens.is_cuda else _grouped_by_shape(layout, num_queries, num_keys)


def _whole_pack(cu_seqlens: Tensor, context_size: int) -> PackedSeqParams:
    """Return the boundaries for Transformer Engine; under context parallelism it asks for the padded ones as well."""
    boundaries = cu_seqlens.int()
    longest = int(boundaries.diff().max())
    whole = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if context_size > 1:
        # A sample's padding follows its tokens and is attended to by itself alone: to the kernel it is like any token.
        whole.cu_seqlens_q_padded = whole.cu_seqlens_kv_padded = boundaries
    return whole


def _segments(cu_seqlens: Tensor, context_rank: int, context_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each segment's number of queries, number of keys and first key in the pack, int64."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if context_size == 1:
        return lengths, lengths, starts
    chunks = lengths // (2 * context_size)
    num_keys = torch.stack([chunks * (context_rank + 1), chunks * (2 * context_size - context_rank)], dim=1)
    return chunks.repeat_interleave(2), num_keys.flatten(), starts.repeat_interleave(2)


def _grouped_by_shape(layout: PackLayout, num_queries: Tensor, num_keys: Tensor) -> PackLayout:
    """Fill in how segments of equal shape are computed together."""
    shapes = list(zip(num_queries.tolist(), num_keys.tolist(), strict=True))
    segments = torch.tensor(sorted(range(len(shapes)), key=lambda segment: shapes[segment]))
    layout.order_T = ranges(layout.cu_seqlens_q[segments], num_queries[segments])
    layout.rank_T = layout.order_T.argsort()
    key_order = ranges(layout.cu_seqlens_kv[segments], num_keys[segments])
    layout.key_rows = key_order if layout.key_rows is None else layout.key_rows[key_order]
    layout.blocks = tuple((count, *shape) for shape, count in sorted(Counter(shapes).items()))
    return layout


def sample_positions(cu_seqlens: Tensor) -> Tensor:
    """Return [T] int64: each token's position in its own sample."""
    lengths = cu_seqlens.diff().long()
    starts_T = cu_seqlens[:-1].long().repeat_interleave(lengths)
    return torch.arange(len(starts_T), device=cu_seqlens.device) - starts_T


class PackedCoreAttention(MegatronModule):
    """Causal attention within each sample of a `PackLayout`; Megatron's `core_attention` for the local layer spec.

    CPU: one scaled-dot-product call per distinct segment shape, exact and without padding. CUDA: the variable-length
    kernel of `layer_choice`, which needs bfloat16 or float16. Under context parallelism the keys and values of all
    ranks are gathered first; the queries stay where they are.
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
        assert not config.attention_dropout
        assert config.kv_channels is not None
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp
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
        """Return [T, 1, H*K] from query [T, 1, H, K] and key, value [T, 1, G, K]; T are this rank's tokens."""
        assert isinstance(packed_seq_params, PackLayout)
        query_THK, key_TGK, value_TGK = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context_group.size() > 1:
            # Its backward adds what all ranks' queries say about a key and gives it to the key's rank.
            key_value = gather_from_sequence_parallel_region(
                torch.stack([key_TGK, value_TGK], dim=1), tensor_parallel_output_grad=True, group=self.context_group
            )
            key_TGK, value_TGK = key_value.unbind(1)
        attend = _attend_on_cuda if query.is_cuda else _attend_on_cpu
        output_THK = attend(query_THK, key_TGK, value_TGK, packed_seq_params, self.scale)
        return output_THK.reshape(len(query), 1, self.hidden_size_per_partition)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def _attend_on_cpu(query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, layout: PackLayout, scale: float) -> Tensor:
    assert layout.order_T is not None and layout.rank_T is not None and layout.key_rows is not None
    query_sizes = [count * num_queries for count, num_queries, _ in layout.blocks]
    key_sizes = [count * num_keys for count, _, num_keys in layout.blocks]
    queries = query_THK.index_select(0, layout.order_T).split(query_sizes)
    keys, values = (part.index_select(0, layout.key_rows).split(key_sizes) for part in (key_TGK, value_TGK))
    outputs: list[Tensor] = []
    for (count, num_queries, num_keys), *heads in zip(layout.blocks, queries, keys, values, strict=True):
        # [count * length, heads, K] -> [count, heads, length, K]
        query, key, value = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in heads)
        is_whole = num_queries == num_keys
        # The last query sees the last key.
        mask = None if is_whole else torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_whole, scale=scale, enable_gqa=True
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.rank_T)


def _attend_on_cuda(query_THK: Tensor, key_TGK: Tensor, value_TGK: Tensor, layout: PackLayout, scale: float) -> Tensor:
    if layout.key_rows is not None:
        key_TGK, value_TGK = key_TGK.index_select(0, layout.key_rows), value_TGK.index_select(0, layout.key_rows)
    lengths = (layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q, layout.max_seqlen_kv)
    if choose_layers("local", machine_capabilities()).attention == "flash_attn":
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        output = flash_attn_varlen_func(query_THK, key_TGK, value_TGK, *lengths, softmax_scale=scale, causal=True)
    else:
        from torch.nn.attention.varlen import varlen_attn

        # A window without end to the left and none to the right: causal, the last query sees the last key.
        output = varlen_attn(query_THK, key_TGK, value_TGK, *lengths, scale=scale, window_size=(-1, 0), **_allow_gqa())
    assert isinstance(output, Tensor)
    return output


@functools.cache
def _allow_gqa() -> dict[str, Any]:
    """Return the arguments by which `varlen_attn` accepts fewer key heads. torch 2.11 needs none."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
