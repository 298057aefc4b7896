"""Samples laid end to end: how they are packed, and how they are split into micro-batches."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch.from_numpy is untyped in torch's own stubs.

from collections.abc import Sequence

import numpy as np
import torch

from megatron_p2o.types import Logprobs, PackedBatch, TrainSample


def pack(
    samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Return `samples` as one batch; [T] is the sum of their `num_tokens`.

    Args:
        samples: at least one.
        old_logprobs: [R] each under `context_ids`, or None when the coming forward pass provides them.
        device: where the tensors are made.
    """
    lengths = [sample.num_tokens for sample in samples]
    sequences = [np.concatenate([sample.context_ids, sample.response_ids]) for sample in samples]
    starts = [len(sample.context_ids) - 1 for sample in samples]

    def on_responses(values: Sequence[Logprobs]) -> torch.Tensor:
        rows = [np.concatenate([np.zeros(start, np.float32), row]) for start, row in zip(starts, values, strict=True)]
        return torch.from_numpy(np.concatenate(rows).astype(np.float32)).to(device)

    ones = [np.ones(len(sample.response_ids), np.float32) for sample in samples]
    mask_T = on_responses(ones)
    sample_index_T = np.repeat(np.arange(len(samples)), lengths)
    return PackedBatch(
        token_ids_T=_int64(np.concatenate([sequence[:-1] for sequence in sequences]), device),
        target_ids_T=_int64(np.concatenate([sequence[1:] for sequence in sequences]), device),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        loss_mask_T=mask_T.bool(),
        loss_weights_T=mask_T.clone(),
        advantages_T=on_responses([row * sample.advantage for row, sample in zip(ones, samples, strict=True)]),
        sampling_logprobs_T=on_responses([sample.sampling_logprobs for sample in samples]),
        is_templated_T=torch.from_numpy(np.array([s.is_templated for s in samples])[sample_index_T]).to(device),
        old_logprobs_T=None if old_logprobs is None else on_responses(old_logprobs),
        sample_index_T=_int64(sample_index_T, device),
    )


def micro_batches(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Return indices into `lengths` in as few micro-batches as first-fit decreasing finds, each within the budget.

    A sample longer than the budget gets a micro-batch of its own. Deterministic: ties keep their order.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((number for number, left in enumerate(room) if lengths[index] <= left), None)
        if place is None:
            bins.append([index])
            room.append(budget_tokens - lengths[index])
        else:
            bins[place].append(index)
            room[place] -= lengths[index]
    return [sorted(members) for members in bins]


def _int64(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)
