"""Packs samples end to end, and splits them into micro-batches."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch.from_numpy is untyped in torch's own stubs.

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_p2o.types import Logprobs, PackedBatch, TrainSample


def pack(
    samples: Sequence[TrainSample],
    old_logprobs: Sequence[Logprobs] | None,
    device: torch.device | str = "cpu",
    multiple: int = 1,
) -> PackedBatch:
    """Return `samples` as one batch; [T] is the sum of their `num_tokens`, each rounded up to `multiple`.

    Args:
        samples: at least one.
        old_logprobs: [R] each under `context_ids`, or None when the coming forward pass provides them.
        device: where the tensors are made.
        multiple: a sample that falls short is followed by positions that count for nothing (`loss_mask_T` is False).
    """
    paddings = [-sample.num_tokens % multiple for sample in samples]
    lengths = [sample.num_tokens + padding for sample, padding in zip(samples, paddings, strict=True)]
    sequences = [np.concatenate([sample.context_ids, sample.response_ids]) for sample in samples]
    starts = [len(sample.context_ids) - 1 for sample in samples]

    def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.pad(row, (0, padding)) for row, padding in zip(rows, paddings, strict=True)])

    def on_responses(values: Sequence[Logprobs]) -> torch.Tensor:
        rows = [np.pad(row, (start, 0)) for start, row in zip(starts, values, strict=True)]
        return torch.from_numpy(padded(rows).astype(np.float32)).to(device)

    def on_all_responses(values: Sequence[Logprobs | None]) -> torch.Tensor | None:
        given = [row for row in values if row is not None]
        return on_responses(given) if len(given) == len(samples) else None

    ones = [np.ones(len(sample.response_ids), np.float32) for sample in samples]
    mask_T = on_responses(ones)
    sample_index_T = np.repeat(np.arange(len(samples)), lengths)
    return PackedBatch(
        token_ids_T=_int64(padded([sequence[:-1] for sequence in sequences]), device),
        target_ids_T=_int64(padded([sequence[1:] for sequence in sequences]), device),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
        loss_mask_T=mask_T.bool(),
        loss_weights_T=on_responses(
            [
                row if sample.loss_weights is None else sample.loss_weights
                for row, sample in zip(ones, samples, strict=True)
            ]
        ),
        advantages_T=on_responses([token_advantages(sample) for sample in samples]),
        sampling_logprobs_T=on_responses([sample.sampling_logprobs for sample in samples]),
        is_templated_T=torch.from_numpy(np.array([s.is_templated for s in samples])[sample_index_T]).to(device),
        old_logprobs_T=None if old_logprobs is None else on_responses(old_logprobs),
        sample_index_T=_int64(sample_index_T, device),
        response_index_T=_int64(
            np.concatenate([np.arange(length) - start for length, start in zip(lengths, starts, strict=True)]), device
        ),
        engine_logprobs_T=on_all_responses([sample.engine_logprobs for sample in samples]),
        reference_logprobs_T=on_all_responses([sample.reference_logprobs for sample in samples]),
    )


def token_advantages(sample: TrainSample) -> Logprobs:
    """Return [R] the advantage of each token."""
    advantages = np.full(len(sample.response_ids), sample.advantage, np.float32)
    return advantages if sample.advantage_offsets is None else advantages + sample.advantage_offsets


def context_positions(cu_seqlens: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return [T / size] int64: the positions of a pack that one of `size` context-parallel ranks computes, in order.

    Each sample is cut into 2 * size chunks; rank r has chunk r and chunk 2 * size - 1 - r, so that under causal
    attention every rank has the same work for every sample. `cu_seqlens` must be multiples of 2 * size.
    """
    chunks = cu_seqlens.diff().long() // (2 * size)
    starts = cu_seqlens[:-1].long()
    chunk_starts = torch.stack([starts + rank * chunks, starts + (2 * size - 1 - rank) * chunks], dim=1).flatten()
    return ranges(chunk_starts, chunks.repeat_interleave(2))


def ranges(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return start, start + 1, ... of each range, one range after the other, int64."""
    offsets = torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))[:-1]
    return (starts - offsets).repeat_interleave(lengths) + torch.arange(int(lengths.sum()), device=starts.device)


def context_part(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """Return the part of a batch, packed in multiples of 2 * `size`, that a context-parallel rank computes."""
    positions = context_positions(batch.cu_seqlens, rank, size)

    def of_part(values_T: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_T is None else values_T[positions]

    return replace(
        batch,
        token_ids_T=batch.token_ids_T[positions],
        target_ids_T=batch.target_ids_T[positions],
        cu_seqlens=batch.cu_seqlens // size,
        loss_mask_T=batch.loss_mask_T[positions],
        loss_weights_T=batch.loss_weights_T[positions],
        advantages_T=batch.advantages_T[positions],
        sampling_logprobs_T=batch.sampling_logprobs_T[positions],
        is_templated_T=batch.is_templated_T[positions],
        old_logprobs_T=of_part(batch.old_logprobs_T),
        sample_index_T=batch.sample_index_T[positions],
        response_index_T=batch.response_index_T[positions],
        engine_logprobs_T=of_part(batch.engine_logprobs_T),
        reference_logprobs_T=of_part(batch.reference_logprobs_T),
    )


def rounded_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `number`."""
    return math.ceil(number / multiple) * multiple


def plan_micro_batches(
    lengths: Sequence[int], costs: Sequence[float], num_ranks: int, budget_tokens: int, multiple: int = 1
) -> list[list[list[int]]]:
    """Return for each rank its micro-batches, in order, as indices into `lengths`.

    Costliest first, each sample goes to the micro-batch with the least cost of those that have room for its tokens;
    costliest first again, the k-th micro-batches of all ranks are `num_ranks` neighbours in cost, the costliest to the
    rank with the least. Hence

    - every rank has the same number of micro-batches, a multiple of `multiple`; with few samples some are empty;
    - a micro-batch exceeds the budget only when it is a single sample that does;
    - a micro-batch costs more than another, by more than its cheapest sample, only where that one had no room for it;
    - two ranks differ in cost by no more than two micro-batches do.

    Deterministic: ties go to the lower index.

    Args:
        lengths: tokens of each sample.
        costs: of each sample, in any unit: what is balanced.
    """
    step = num_ranks * multiple
    at_least = math.ceil(sum(min(length, budget_tokens) for length in lengths) / budget_tokens)
    num_batches = rounded_up(max(1, at_least), step)
    while (batches := _costliest_first(lengths, costs, num_batches, budget_tokens)) is None:
        num_batches += step
    batches.sort(key=lambda members: -_total(costs, members))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for first in range(0, num_batches, num_ranks):
        lightest_first = sorted(range(num_ranks), key=lambda rank: loads[rank])
        for rank, members in zip(lightest_first, batches[first : first + num_ranks], strict=True):
            ranks[rank].append(sorted(members))
            loads[rank] += _total(costs, members)
    return ranks


def _costliest_first(
    lengths: Sequence[int], costs: Sequence[float], num_batches: int, budget_tokens: int
) -> list[list[int]] | None:
    """Return indices in `num_batches` parts of nearly equal cost (Graham's LPT rule), or None if they do not fit."""
    batches: list[list[int]] = [[] for _ in range(num_batches)]
    tokens, loads = np.zeros(num_batches, np.int64), np.zeros(num_batches)
    for index in sorted(range(len(lengths)), key=lambda i: -costs[i]):
        has_room = (tokens == 0) | (tokens + lengths[index] <= budget_tokens)
        if not has_room.any():
            return None
        number = int(np.where(has_room, loads, np.inf).argmin())
        batches[number].append(index)
        tokens[number] += lengths[index]
        loads[number] += costs[index]
    return batches


def _total(costs: Sequence[float], members: Sequence[int]) -> float:
    return sum(costs[index] for index in members)


def _int64(values: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)
