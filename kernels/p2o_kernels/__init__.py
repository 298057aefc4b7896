"""Fused operations of P2O training. Imports torch and triton only, nothing of `megatron_p2o`."""

from p2o_kernels.logprob import linear_logprob

__all__ = ["linear_logprob"]
