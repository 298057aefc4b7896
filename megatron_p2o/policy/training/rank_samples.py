"""Divides the samples of an update over the data-parallel ranks."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.model.architecture import Architecture
from megatron_p2o.rl.packing import plan_micro_batches, rounded_up
from megatron_p2o.types import Logprobs, TrainSample


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSamples:
    """The samples of one data-parallel rank."""

    samples: tuple[TrainSample, ...]
    indices: tuple[int, ...]
    """Place of each sample in the list the policy was called with."""
    old_logprobs: tuple[Logprobs, ...] | None
    """Old log-probs, as in `Policy.update`."""
    micro_batches: tuple[tuple[int, ...], ...]
    """Places in `samples` of each forward pass, the same number on every rank; empty where there are too few."""


def split_over_ranks(
    samples: Sequence[TrainSample],
    old_logprobs: Sequence[Logprobs] | None,
    parallel: ParallelConfig,
    micro_batch_tokens: int,
    architecture: Architecture,
) -> list[RankSamples]:
    """Return the samples of each data-parallel rank, balanced by arithmetic within the budget of tokens.

    A long sample costs more per token, for its attention; see `plan_micro_batches`.
    """
    # Context parallelism rounds every sample up, and gives each of its ranks an equal part of the pack.
    rounded_to = 2 * parallel.context if parallel.context > 1 else 1
    plan = plan_micro_batches(
        [rounded_up(sample.num_tokens, rounded_to) for sample in samples],
        [architecture.forward_flops(sample.num_tokens, len(sample.response_ids)) for sample in samples],
        parallel.num_replicas,
        micro_batch_tokens * parallel.context,
        # The interleaved schedule passes micro-batches on in groups of as many as there are stages.
        multiple=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
    )
    return [_rank_samples(samples, old_logprobs, batches) for batches in plan]


def _rank_samples(
    samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, batches: Sequence[Sequence[int]]
) -> RankSamples:
    indices = [index for members in batches for index in members]
    places = iter(range(len(indices)))
    return RankSamples(
        samples=tuple(samples[index] for index in indices),
        indices=tuple(indices),
        old_logprobs=None if old_logprobs is None else tuple(old_logprobs[index] for index in indices),
        micro_batches=tuple(tuple(itertools.islice(places, len(members))) for members in batches),
    )


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
        rows += [] if sample.reference_logprobs is None else [sample.reference_logprobs]
        if any(len(row) != len(sample.response_ids) for row in rows):
            raise ValueError(
                f"samples[{index}] has {len(sample.response_ids)} response tokens but "
                f"{[len(row) for row in rows]} log-probs (sampling, old, reference): must be one per token"
            )
        for ids in (sample.context_ids, sample.response_ids):
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(
                    f"samples[{index}] has token ids in [{ids.min()}, {ids.max()}], but the model's vocabulary is "
                    f"[0, {vocab_size}): check that model.path's tokenizer and weights belong together"
                )
