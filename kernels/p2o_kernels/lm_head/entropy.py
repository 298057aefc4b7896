"""The gradient of an entropy term through the LM head, in the products that the log-prob's gradient takes anyway.

Legend: C tokens of a chunk, V vocabulary columns of this rank.
"""

from dataclasses import replace

import torch
from torch import Tensor

from p2o_kernels.lm_head.shard import SoftmaxChunk

_ROW_BLOCK_BYTES = 64 * 2**20
"""Part of a chunk that is widened at a time."""


def with_entropy_gradient(chunk: SoftmaxChunk, logprob_grad_C: Tensor, entropy_grad_C: Tensor) -> SoftmaxChunk:
    """Return a chunk whose gradients, for a log-prob gradient of 1, are those of g * log-prob + h * entropy.

    g is `logprob_grad_C`, h `entropy_grad_C`; the chunk's exponentials are overwritten. With p the probabilities and H
    the entropy, the derivative in the logits z is

        v is not the target   -p_v (g + h (log p_v + H))
        v is the target       g (1 - p_v) - h p_v (log p_v + H)

    and a chunk of exponentials e and complement c gives -p_v = -scale e_v and c: both are multiplied here, row by row
    and column by column, so that the same two matrix products follow.
    """
    assert chunk.exponentials_CV is not None and chunk.entropy_C is not None
    exponentials_CV, scale_C = chunk.exponentials_CV, chunk.probability_scale_C
    constant_C = logprob_grad_C + entropy_grad_C * chunk.entropy_C
    step = max(1, _ROW_BLOCK_BYTES // max(1, exponentials_CV.shape[1] * scale_C.element_size()))
    for start in range(0, len(exponentials_CV), step):
        rows = slice(start, start + step)
        block = exponentials_CV[rows].to(scale_C.dtype)
        # Like p log p, 0 where the exponential is: in the target's own column too.
        logs = torch.xlogy(block, block * scale_C[rows, None])
        exponentials_CV[rows] = (block * constant_C[rows, None] + logs * entropy_grad_C[rows, None]).to(
            exponentials_CV.dtype
        )
    probability_C = chunk.logprobs_C.exp()
    target_C = logprob_grad_C * chunk.complement_C
    target_C = target_C - entropy_grad_C * probability_C * (chunk.logprobs_C + chunk.entropy_C)
    return replace(chunk, complement_C=target_C)
