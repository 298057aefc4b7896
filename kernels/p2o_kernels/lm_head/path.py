"""The two ways to compute the LM head, and which one a device takes."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from p2o_kernels.lm_head.shard import HeadShard, SoftmaxChunk, WeightGrad
from p2o_kernels.lm_head.torch_path import TorchHead

_TORCH_ON_CUDA = "run torch on CUDA by path=TorchHead() (setting head.kernel: torch)"

_CUDA_CHUNK_BYTES = 2**30
"""A chunk of the torch path on CUDA: each reads the whole weight, and small products leave the device idle."""

Kernel = Literal["warp_specialized", "plain", "torch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """How CUDA tensors are computed; a CPU has one way."""

    kernel: Kernel = "warp_specialized"
    """`plain` is the same Triton product without warp specialization; `torch` takes any dtype and needs no triton."""
    weight_grad: WeightGrad = "fast"

    def __post_init__(self) -> None:
        if self.kernel not in get_args(Kernel) or self.weight_grad not in get_args(WeightGrad):
            raise ValueError(
                f"kernel={self.kernel} must be one of {', '.join(get_args(Kernel))}, and "
                f"weight_grad={self.weight_grad} one of {', '.join(get_args(WeightGrad))}"
            )


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


def path_for(hidden: Tensor, options: HeadOptions | None = None) -> LmHeadPath:
    """Return the path for a tensor's device and dtype: torch on CPU, Triton on CUDA. Never falls back silently.

    Raises:
        ValueError: there is no Triton path for this CUDA tensor.
    """
    options = HeadOptions() if options is None else options
    if not hidden.is_cuda:
        return TorchHead()
    if options.kernel == "torch":
        return TorchHead(chunk_bytes=_CUDA_CHUNK_BYTES)
    if find_spec("triton") is None:
        raise ValueError(f"path: triton is not installed; install it, or {_TORCH_ON_CUDA}")
    if hidden.dtype != torch.bfloat16:
        raise ValueError(f"hidden_TD is {hidden.dtype}: the Triton path takes bfloat16; cast, or {_TORCH_ON_CUDA}")
    from p2o_kernels.lm_head.triton_path import PLAIN_TILE, Tile, TritonHead

    tile = {"warp_specialized": Tile(), "plain": PLAIN_TILE}[options.kernel]
    return TritonHead(tile=tile, weight_grad=options.weight_grad)
