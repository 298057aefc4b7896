"""The context ratio: how much likelier the old policy finds a token under the bare prompt than under the template."""

from typing import Literal

import torch
from torch import Tensor


def context_ratio_weights(
    old_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    is_templated_T: Tensor,
    *,
    low: float,
    high: float,
    form: Literal["hard", "soft"],
) -> Tensor:
    """Return the token weights M of context-ratio masking (arXiv:2603.21877, "CRM").

    With rho = exp(old log-prob under x - log-prob under x with z): "hard" keeps tokens with low <= rho <= high, "soft"
    weighs them by clip(rho, low, high) / rho. Tokens of plain rollouts have rho = 1 by definition, whatever the
    numerical difference between engine and trainer.

    Returns:
        [T] in the dtype of `old_logprobs_T`, no gradient.
    """
    log_ratio_T = (old_logprobs_T - sampling_logprobs_T).detach()
    log_ratio_T = torch.where(is_templated_T, log_ratio_T, torch.zeros_like(log_ratio_T)).clamp(-60.0, 60.0)
    ratio_T = log_ratio_T.exp()
    if form == "soft":
        return ratio_T.clamp(low, high) / ratio_T
    return ((ratio_T >= low) & (ratio_T <= high)).to(old_logprobs_T.dtype)
