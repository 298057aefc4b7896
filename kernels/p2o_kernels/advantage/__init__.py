"""Credit of rollouts against their siblings, for ragged groups and packed tokens."""

from p2o_kernels.advantage.op import GroupedAdvantages, active_token_index, grouped_advantage

__all__ = ["GroupedAdvantages", "active_token_index", "grouped_advantage"]
