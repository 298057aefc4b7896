"""Specification of `linear_logprob`: the whole vocabulary on one rank, logits in memory, ordinary autograd."""

import torch
from torch import Tensor


def linear_logprob_reference(
    hidden_TD: Tensor,
    weight_VpD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden @ weight.T / temperature) at the targets, and the entropy in nats, in `dtype`."""
    logits_TV = hidden_TD.to(dtype) @ weight_VpD[:vocab_size].to(dtype).T / temperature
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(1, targets_T.long()[:, None]).squeeze(1), entropy_T
