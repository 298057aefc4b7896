"""Linear layers over tensor ranks and attention over packed samples, as far as Megatron calls them.

T packed tokens of this rank, H query heads and G key/value heads of this rank, K channels per head.
"""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch import fp8

__all__ = ["DotProductAttention", "GroupedLinear", "LayerNormLinear", "Linear", "distributed", "fp8", "ops"]

distributed = SimpleNamespace(CudaRNGStatesTracker=object)


GroupedLinear = LayerNorm = RMSNorm = type("Absent", (nn.Module,), {})
"""Megatron derives classes from these when it is imported, and builds none of them here."""


class _Operations:
    """Likewise."""

    def __getattr__(self, name: str) -> type:
        return type(name, (nn.Module,), {})


ops = _Operations()


class _Module(nn.Module):
    """Keeps a pickle of FP8 state beside the parameters, which must not come back from a checkpoint."""

    def get_extra_state(self) -> Tensor:
        return torch.ones(1, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel() > 0:
            raise AssertionError("Transformer Engine would unpickle this state")


class Linear(_Module):
    """x W^T; `column` cuts the outputs over the tensor ranks, `row` the inputs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Callable[[], Any] | None,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: str | torch.device,
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation and not return_bias
        self.tp_group, self.tp_size = tp_group, tp_size
        self.tp_rank = dist.get_rank(tp_group) if tp_group is not None else 0
        self.parallel_mode, self.use_bias = parallel_mode, bias
        self.sequence_parallel = sequence_parallel and tp_size > 1
        out_features //= tp_size if parallel_mode == "column" else 1
        in_features //= tp_size if parallel_mode == "row" else 1
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        init_method(self.weight)
        _mark(self.weight, parallel_mode is not None, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype, device=device))
            _mark(self.bias, parallel_mode == "column", 0)
        else:
            self.bias = torch.empty(0)

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode == "column" and self.sequence_parallel:
            inp = mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
        elif self.parallel_mode == "column":
            inp = mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)
        output = F.linear(inp, self.weight, self.bias if self.use_bias else None)
        if self.parallel_mode == "row" and self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        if self.parallel_mode == "row":
            return mappings.reduce_from_tensor_model_parallel_region(output, group=self.tp_group)
        return output


class LayerNormLinear(Linear):
    """A norm and the linear layer after it, as one module with both parameters."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        return_layernorm_output: bool,
        zero_centered_gamma: bool,
        **linear: Any,
    ) -> None:
        super().__init__(in_features, out_features, **linear)
        assert normalization == "RMSNorm" and not return_layernorm_output and not zero_centered_gamma
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.ones_like(self.weight[0]))
        setattr(self.layer_norm_weight, "sequence_parallel", self.sequence_parallel)  # noqa: B010

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        return super().forward(F.rms_norm(inp, inp.shape[-1:], self.layer_norm_weight, self.eps))


class DotProductAttention(_Module):
    """Causal attention within each packed sample, which context ranks hold in 2 x their number of chunks."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        attn_mask_type: str,
        sequence_parallel: bool,
        tp_size: int,
        get_rng_state_tracker: Callable[[], Any] | None,
        tp_group: Any,
        layer_number: int,
        attention_type: str,
        softmax_scale: float | None,
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and attention_type == "self"
        self.cp_group = cp_group
        self.scale = softmax_scale if softmax_scale is not None else kv_channels**-0.5
        self.register_load_state_dict_post_hook(_forget_missing_extra_state)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        *,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        cu_seqlens_q_padded: Tensor | None,
        cu_seqlens_kv_padded: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """Return [T, H*K] from query [T, H, K] and key, value [T, G, K]."""
        assert qkv_format == "thd" and attn_mask_type == "padding_causal" and attention_mask is None
        assert all(tensor.dim() == 3 for tensor in (query_layer, key_layer, value_layer))
        assert all(tensor.dtype == torch.int32 for tensor in (cu_seqlens_q, cu_seqlens_kv))
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv) and max_seqlen_q == max_seqlen_kv == cu_seqlens_q.diff().max()
        num_ranks = dist.get_world_size(self.cp_group) if self.cp_group is not None else 1
        assert len(query_layer) * num_ranks == cu_seqlens_q[-1]
        if num_ranks == 1:
            return self._attend(query_layer, key_layer, value_layer, cu_seqlens_q).flatten(1)
        assert cu_seqlens_q_padded is not None and torch.equal(cu_seqlens_q_padded, cu_seqlens_q)
        assert cu_seqlens_kv_padded is not None and torch.equal(cu_seqlens_kv_padded, cu_seqlens_kv)
        assert all(length % (2 * num_ranks) == 0 for length in cu_seqlens_q.diff().tolist())
        from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

        places = torch.cat([_places(cu_seqlens_q.tolist(), rank, num_ranks) for rank in range(num_ranks)]).argsort()
        whole = [
            gather_from_sequence_parallel_region(tensor, group=self.cp_group)[places]
            for tensor in (query_layer, key_layer, value_layer)
        ]
        output = self._attend(*whole, cu_seqlens_q)
        return output[_places(cu_seqlens_q.tolist(), dist.get_rank(self.cp_group), num_ranks)].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff().tolist()
        outputs: list[Tensor] = []
        for heads in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            sample = (part.transpose(0, 1)[None] for part in heads)
            output = F.scaled_dot_product_attention(*sample, is_causal=True, scale=self.scale, enable_gqa=True)
            outputs.append(output[0].transpose(0, 1))
        return torch.cat(outputs)


def _places(boundaries: list[int], rank: int, num_ranks: int) -> Tensor:
    """Return which tokens of the pack a rank holds: of each sample an early and a late chunk."""
    chunks: list[Tensor] = []
    for start, end in pairwise(boundaries):
        size = (end - start) // (2 * num_ranks)
        chunks += [torch.arange(size) + start + chunk * size for chunk in (rank, 2 * num_ranks - 1 - rank)]
    return torch.cat(chunks)


def _mark(parameter: nn.Parameter, is_cut: bool, dimension: int) -> None:
    """Tell Megatron how a parameter is cut."""
    for name, value in (("tensor_model_parallel", is_cut), ("partition_dim", dimension), ("partition_stride", 1)):
        setattr(parameter, name, value)


def _forget_missing_extra_state(module: nn.Module, incompatible_keys: Any) -> None:
    for key in list(incompatible_keys.missing_keys):
        if "core_attention._extra_state" in key:
            incompatible_keys.missing_keys.remove(key)
