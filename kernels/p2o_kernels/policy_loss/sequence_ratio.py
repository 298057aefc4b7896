"""The policy ratio of whole sequences (GSPO, arXiv:2507.18071, eq. 7), whose tokens may lie on several ranks."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce


def sequence_log_ratios(
    rows: Tensor,
    log_ratios_N: Tensor,
    sequence_T: Tensor | None,
    num_sequences: int,
    group: ProcessGroup | None,
) -> Tensor:
    """Return [T]: for each token the mean log ratio over its sequence's tokens that have one, on all ranks of `group`.

    Summed in float64, so that how a sequence is divided does not show. A sequence without such tokens has 0.

    Args:
        rows: int64, ascending: the N tokens that have a log ratio.
        log_ratios_N: current log-prob minus old.
        sequence_T: int64, ascending: the sequence of every token.

    Raises:
        ValueError: `sequence_T` is None.
    """
    if sequence_T is None:
        raise ValueError("sequence_T is None: surrogate='gspo' needs it")
    counts_S = torch.zeros(num_sequences, dtype=torch.float64, device=rows.device)
    counts_S.index_add_(0, sequence_T[rows], torch.ones_like(log_ratios_N, dtype=torch.float64))
    sums_S = torch.segment_reduce(log_ratios_N.double(), "sum", lengths=counts_S.long(), unsafe=True, initial=0.0)
    if group is not None:
        both_2S = torch.stack([sums_S, counts_S])
        all_reduce(both_2S, group=group)
        sums_S, counts_S = both_2S.unbind()
    return (sums_S / counts_S.clamp(min=1)).to(log_ratios_N.dtype)[sequence_T]
