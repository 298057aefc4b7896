"""Credit of rollouts against their siblings, and the tokens that it leaves in the loss."""

from p2o_kernels.advantage.op import active_token_index, grouped_advantage

__all__ = ["active_token_index", "grouped_advantage"]
