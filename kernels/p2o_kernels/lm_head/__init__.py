"""The (vocabulary-parallel) LM head a chunk of tokens at a time: what the fused operations have in common."""

from p2o_kernels.lm_head.entropy import with_entropy_gradient
from p2o_kernels.lm_head.path import HeadOptions, LmHeadPath, path_for
from p2o_kernels.lm_head.shard import HeadShard, SoftmaxChunk, make_shard

__all__ = ["HeadOptions", "HeadShard", "LmHeadPath", "SoftmaxChunk", "make_shard", "path_for", "with_entropy_gradient"]
