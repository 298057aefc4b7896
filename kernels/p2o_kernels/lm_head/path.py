"""The two ways to compute the LM head, and which one a device takes."""

from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from p2o_kernels.lm_head.shard import HeadShard, SoftmaxChunk
from p2o_kernels.lm_head.torch_path import TorchHead


class LmHeadPath(Protocol):
    """Computes chunks of the LM head and their gradients. Implementations: `TorchHead`, `TritonHead`."""

    @property
    def is_triton(self) -> bool: ...

    @property
    def save_bytes(self) -> int:
        """Exponentials `linear_logprob` keeps from forward to backward when all of them fit into this."""
        ...

    @property
    def compacts_rows(self) -> bool:
        """Whether dropping rows of a chunk after its softmax costs less than carrying them through the gradients."""
        ...

    def num_chunk_rows(self, shard: HeadShard, num_tokens: int) -> int:
        """Return the tokens of one chunk, the same on all ranks; at least 1."""
        ...

    def exponentials_buffer(self, shard: HeadShard, num_rows: int, *, for_gradient: bool) -> Tensor | None:
        """Return memory for the exponentials of `num_rows` rows; None when log-probs alone need none."""
        ...

    def softmax_chunk(
        self, shard: HeadShard, hidden_CD: Tensor, targets_C: Tensor, buffer: Tensor | None, *, with_entropy: bool
    ) -> SoftmaxChunk:
        """Compute a chunk's log-probs; its exponentials lie in `buffer`. Collective over `shard.tp_group`."""
        ...

    def hidden_grad(self, shard: HeadShard, chunk: SoftmaxChunk, targets_C: Tensor, logprob_grad_C: Tensor) -> Tensor:
        """Return this shard's part of dL/dhidden [C, D]; the sum over `tp_group` is the caller's."""
        ...

    def add_weight_grad_(
        self,
        weight_grad_VpD: Tensor,
        shard: HeadShard,
        chunk: SoftmaxChunk,
        hidden_CD: Tensor,
        targets_C: Tensor,
        logprob_grad_C: Tensor,
    ) -> None:
        """Add the chunk's dL/dweight to `weight_grad_VpD`, of the compute dtype; padded rows are not touched."""
        ...


def path_for(hidden: Tensor) -> LmHeadPath:
    """Return the path for a tensor's device and dtype: torch on CPU, Triton on CUDA. Never falls back silently.

    Raises:
        ValueError: there is no Triton path for this CUDA tensor.
    """
    if not hidden.is_cuda:
        return TorchHead()
    if find_spec("triton") is None:
        raise ValueError("path: triton is not installed; install it, or pass path=TorchHead() to run torch on CUDA")
    if hidden.dtype != torch.bfloat16:
        raise ValueError(f"hidden_TD is {hidden.dtype}: the Triton path takes bfloat16; cast, or pass path=TorchHead()")
    from p2o_kernels.lm_head.triton_path import TritonHead

    return TritonHead()
