"""How the samples of an update are divided over the data-parallel ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_p2o.types import Logprobs, TrainSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The samples of one data-parallel rank."""

    samples: tuple[TrainSample, ...]
    indices: tuple[int, ...]
    """Place of each sample in the list the policy was called with."""
    old_logprobs: tuple[Logprobs, ...] | None
    """As in `Policy.update`."""


def balanced(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return indices into `lengths` per rank with nearly equal token sums: longest first, to the lightest rank.

    Deterministic; ties go to the lower index and the lower rank. A rank may get nothing.
    """
    members: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = loads.index(min(loads))
        members[rank].append(index)
        loads[rank] += lengths[index]
    return [sorted(indices) for indices in members]


def shares_of(samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, num_ranks: int) -> list[Share]:
    """Return one share per data-parallel rank."""
    return [
        Share(
            samples=tuple(samples[index] for index in indices),
            indices=tuple(indices),
            old_logprobs=None if old_logprobs is None else tuple(old_logprobs[index] for index in indices),
        )
        for indices in balanced([sample.num_tokens for sample in samples], num_ranks)
    ]


def check_samples(samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, vocab_size: int) -> None:
    """Raise `ValueError` for samples that cannot be packed, before any rank has begun."""
    if old_logprobs is not None and len(old_logprobs) != len(samples):
        raise ValueError(
            f"old_logprobs has {len(old_logprobs)} rows for {len(samples)} samples: must be one per sample"
        )
    for index, sample in enumerate(samples):
        if len(sample.context_ids) < 1 or len(sample.response_ids) < 1:
            raise ValueError(f"samples[{index}] has an empty context or response: both need at least one token")
        rows = [sample.sampling_logprobs, *([] if old_logprobs is None else [old_logprobs[index]])]
        if any(len(row) != len(sample.response_ids) for row in rows):
            raise ValueError(
                f"samples[{index}] has {len(sample.response_ids)} response tokens but "
                f"{[len(row) for row in rows]} log-probs (sampling, old): must be one per token"
            )
        for ids in (sample.context_ids, sample.response_ids):
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(
                    f"samples[{index}] has token ids in [{ids.min()}, {ids.max()}], but the model's vocabulary is "
                    f"[0, {vocab_size}): check that model.path's tokenizer and weights belong together"
                )
