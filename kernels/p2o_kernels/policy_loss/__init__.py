"""The P2O policy loss from hidden states and a (vocabulary-parallel) LM head, with both gradients."""

from p2o_kernels.policy_loss.op import PolicyLoss, linear_policy_loss
from p2o_kernels.policy_loss.reference import linear_policy_loss_reference
from p2o_kernels.policy_loss.token_loss import Context, LossRule, OwnSurrogate, Surrogate

__all__ = [
    "Context",
    "LossRule",
    "OwnSurrogate",
    "PolicyLoss",
    "Surrogate",
    "linear_policy_loss",
    "linear_policy_loss_reference",
]
