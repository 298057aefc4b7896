"""Fused operations of P2O training: torch on CPU, Triton on CUDA. Imports no `megatron_p2o` and, on CPU, no triton."""

from p2o_kernels.advantage import active_token_index, grouped_advantage
from p2o_kernels.lm_head import HeadOptions
from p2o_kernels.logprob import linear_logprob
from p2o_kernels.policy_loss import Context, LossRule, OwnSurrogate, PolicyLoss, Surrogate, linear_policy_loss

__all__ = [
    "Context",
    "HeadOptions",
    "LossRule",
    "OwnSurrogate",
    "PolicyLoss",
    "Surrogate",
    "active_token_index",
    "grouped_advantage",
    "linear_logprob",
    "linear_policy_loss",
]
