"""Forward and backward passes over packed samples, through Megatron's schedule.

T packed tokens of one micro-batch, N response tokens among them.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_p2o.config.tree import ObjectiveConfig
from megatron_p2o.policy.model.attention import PackLayout, pack_layout, sample_positions
from megatron_p2o.policy.model.head import HeadInput
from megatron_p2o.policy.model.parallel import context_group
from megatron_p2o.policy.training.rank_samples import RankSamples
from megatron_p2o.rl.context_shift import PackShifts, SampleShift, pack_shifts
from megatron_p2o.rl.objective import (
    carrying_tokens,
    loss_rule,
    merged_stats,
    stats_on_cpu,
    token_stats,
    zero_stats,
)
from megatron_p2o.rl.packing import context_part, context_positions, pack
from megatron_p2o.types import Logprobs, PackedBatch, TokenStats, TrainSample
from p2o_kernels import LossRule, PolicyLoss

FILLER = TrainSample(
    context_ids=np.zeros(1, np.int32),
    response_ids=np.zeros(1, np.int32),
    advantage=0.0,
    sampling_logprobs=np.zeros(1, np.float32),
    is_templated=False,
    loss_weights=np.zeros(1, np.float32),
    reference_logprobs=np.zeros(1, np.float32),
)
"""Stands in where a data-parallel rank has too few samples but takes part in the collectives; counts for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One forward pass of one data-parallel rank."""

    whole: PackedBatch
    """What the context-parallel ranks compute together."""
    part: PackedBatch
    """What this rank computes of it: all, without context parallelism."""
    samples: tuple[int, ...]
    """Index of each packed sample in the rank's samples; empty for a filler."""
    token_ids_T: Tensor
    """Tokens of `part`, padded to a length that the model accepts."""
    positions_T: Tensor
    """int64: of those tokens in their own samples."""
    layout: PackLayout
    places_T: Tensor | None = None
    """int64: where the tokens of `part` are in `whole`; None without context parallelism."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Denominator:
    """What the summed token loss of an optimizer step is divided by."""

    objective: ObjectiveConfig
    num_loss_tokens: int
    """Response tokens of the whole mini-batch, dropped rollouts included."""
    num_samples: int
    """Samples of the whole update, over all ranks."""
    counts_here: bool
    """Whether a fixed denominator is contributed by this rank: Megatron adds the contributions of all."""

    def contribution(
        self, loss: Tensor, stats: TokenStats[Tensor], micro_batch: MicroBatch, number: int
    ) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's loss and its part of the divisor (int32). `number` is its index on this rank.

        The quotient of the sums over all micro-batches and ranks is the loss of the step.
        """
        match self.objective.normalization:
            case "micro_batch_mean":
                # The authors': token mean of the micro-batch, weighted by its share of the rows.
                share = len(micro_batch.samples) / self.num_samples
                num_tokens = micro_batch.whole.loss_mask_T.sum().clamp(min=1)
                return loss * (share / num_tokens), self._once(1, number, loss)
            case "kept_token_mean":
                return loss, stats.kept_tokens.int()
            case "token_mean" | "sequence_mean" | "sequence_sum":
                # The means over sequences are in the tokens' weights: `rl.objective.with_length_weights`.
                return loss, self._once(self.num_loss_tokens, number, loss)
            case _:
                assert_never(self.objective.normalization)

    def _once(self, value: int, number: int, like: Tensor) -> Tensor:
        value = value if self.counts_here and number == 0 else 0
        return torch.full((), value, dtype=torch.int32, device=like.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResult:
    """What forward and backward passes add up to; zero on all but the last pipeline stage."""

    loss: Tensor
    """[] float32 numerator of the step's loss."""
    divisor: Tensor
    """[] int32."""
    stats: TokenStats[Tensor]
    shifts: tuple[PackShifts, ...] = ()
    """The shifts of each pack."""

    def merge(self, other: "PassResult") -> "PassResult":
        return PassResult(
            loss=self.loss + other.loss,
            divisor=self.divisor + other.divisor,
            stats=merged_stats(self.stats, other.stats),
            shifts=self.shifts + other.shifts,
        )

    @staticmethod
    def zero(device: torch.device | str = "cpu") -> "PassResult":
        """Return the neutral element of `merge`."""
        return PassResult(
            loss=torch.zeros((), device=device),
            divisor=torch.zeros((), dtype=torch.int32, device=device),
            stats=zero_stats(device),
        )

    def on_cpu(self) -> "PassResult":
        return PassResult(
            loss=self.loss.cpu(),
            divisor=self.divisor.cpu(),
            stats=stats_on_cpu(self.stats),
            shifts=tuple(of_pack.on_cpu() for of_pack in self.shifts),
        )

    def shifts_by_sample(self) -> dict[int, SampleShift]:
        """Return the shifts of the rank's samples by index; of a result that is in host memory."""
        return {sample: shift for of_pack in self.shifts for sample, shift in of_pack.by_sample().items()}


def make_micro_batches(rank_samples: RankSamples, device: torch.device, length_multiple: int) -> list[MicroBatch]:
    """Return the samples packed into its micro-batches, a filler for each that is empty.

    All that the host has to know of them is asked of the GPU here, before it has work to be waited for.

    Args:
        length_multiple: of a pack's tokens; see `length_multiple`.
    """
    samples, old_logprobs = rank_samples.samples, rank_samples.old_logprobs
    filler_old = None if old_logprobs is None else [FILLER.sampling_logprobs]
    return [
        _micro_batch(
            [samples[index] for index in members],
            None if old_logprobs is None else [old_logprobs[index] for index in members],
            device,
            members,
            length_multiple,
        )
        if members
        else _micro_batch([FILLER], filler_old, device, (), length_multiple)
        for members in rank_samples.micro_batches
    ]


def _micro_batch(
    samples: Sequence[TrainSample],
    old_logprobs: Sequence[Logprobs] | None,
    device: torch.device,
    places: tuple[int, ...],
    multiple: int,
) -> MicroBatch:
    context = context_group()
    if context.size() == 1:
        whole = part = pack(samples, old_logprobs, device)
    else:
        whole = pack(samples, old_logprobs, device, multiple=2 * context.size())
        part = context_part(whole, context.rank(), context.size())
    cu_seqlens, num_padding = _padded(whole.cu_seqlens, multiple)
    positions_T, places_T = sample_positions(cu_seqlens), None
    if context.size() > 1:
        positions_T = positions_T[context_positions(cu_seqlens, context.rank(), context.size())]
        places_T = context_positions(whole.cu_seqlens, context.rank(), context.size())
    return MicroBatch(
        whole=whole,
        part=part,
        samples=places,
        token_ids_T=F.pad(part.token_ids_T, (0, num_padding // context.size())),
        positions_T=positions_T,
        layout=pack_layout(cu_seqlens, context.rank(), context.size()),
        places_T=places_T,
    )


def forward_backward(
    modules: Sequence[DistributedDataParallel],
    batches: Sequence[MicroBatch],
    denominator: Denominator,
    expected_dead_share: float = 0.0,
    importance_cap: float | None = None,
) -> PassResult:
    """Accumulate the gradient of the step's loss over `batches`, reduced over the data-parallel ranks. Collective.

    `expected_dead_share`: see `HeadInput`. `importance_cap`: see `cap_in_the_loss`.
    """
    objective = denominator.objective
    rule = loss_rule(objective, importance_cap)
    # With a divisor per micro-batch the gradient that reaches the head's loss is not 1.
    adds_to_main_grad = objective.normalization != "micro_batch_mean" and not modules[0].ddp_config.overlap_grad_reduce

    def forward_step(micro_batches_left: Iterator[tuple[int, MicroBatch]], model: Any) -> tuple[Any, Any]:
        number, micro_batch = next(micro_batches_left)

        head_input = HeadInput(
            batch=micro_batch.part,
            rule=rule,
            adds_to_main_grad=adds_to_main_grad,
            expected_dead_share=expected_dead_share,
        )
        output = _run_model(model, micro_batch, head_input)
        if isinstance(output, Tensor):
            return output, None  # hidden states of an inner stage
        outcome = PolicyLoss(*output)

        def loss_of(loss: Tensor) -> tuple[Tensor, Tensor, PassResult]:
            stats, shifts = _measured(micro_batch, outcome, rule)
            loss, divisor = denominator.contribution(loss, stats, micro_batch, number)
            # Megatron adds the divisors into a tensor of its own and scales the gradient by their sum.
            return loss, divisor, PassResult(loss=loss.detach(), divisor=divisor.clone(), stats=stats, shifts=shifts)

        return outcome.loss, loss_of

    results = _schedule(forward_step, list(enumerate(batches)), modules)
    return functools.reduce(PassResult.merge, results, PassResult.zero(batches[0].whole.token_ids_T.device))


def _measured(
    micro_batch: MicroBatch, outcome: PolicyLoss, rule: LossRule
) -> tuple[TokenStats[Tensor], tuple[PackShifts, ...]]:
    """Return the statistics of a pack and its part of `PassResult.shifts`; nothing of a filler."""
    if not micro_batch.samples:
        return zero_stats(outcome.loss.device), ()
    part = micro_batch.part
    acts = rule.acts_without_advantage
    stats = token_stats(part, outcome, acts_without_advantage=acts, importance_cap=rule.importance_cap)
    is_counted_T = part.is_templated_T & carrying_tokens(part, acts_without_advantage=acts)
    return stats, (pack_shifts(micro_batch.samples, part, outcome, is_counted_T),)


@torch.no_grad()
def response_logprobs(modules: Sequence[DistributedDataParallel], batches: Sequence[MicroBatch]) -> dict[int, Logprobs]:
    """Return the log-probs [R] of each sample's response by index; empty but on the last pipeline stage. Collective."""

    def forward_step(micro_batches_left: Iterator[MicroBatch], model: Any) -> tuple[Any, Any]:
        micro_batch = next(micro_batches_left)

        def collect(output: Tensor, non_loss_data: bool = True) -> tuple[MicroBatch, Tensor]:
            logprobs_T = _on_positions(output[0].float(), micro_batch.part)
            return micro_batch, _joined_over_context(logprobs_T, micro_batch)

        output = _run_model(model, micro_batch, HeadInput(batch=micro_batch.part))
        # One tensor: with experts the schedule asks the output for its device.
        return torch.stack(output) if isinstance(output, tuple) else output, collect

    results = _schedule(forward_step, batches, modules, forward_only=True)
    # Copied to the host at the end alone: there the GPU has nothing left to do.
    return {sample: row for result in results for sample, row in _by_sample(*result)}


def _by_sample(micro_batch: MicroBatch, logprobs_T: Tensor) -> Iterator[tuple[int, Logprobs]]:
    """Yield (index in the rank's samples, log-probs of the response) of the samples of a pack."""
    whole = micro_batch.whole
    logprobs_N = logprobs_T[whole.loss_mask_T].cpu().numpy()
    index_N = whole.sample_index_T[whole.loss_mask_T].cpu().numpy()
    for place, sample in enumerate(micro_batch.samples):
        yield sample, logprobs_N[index_N == place]


def _schedule(
    forward_step: Any,
    micro_batches: Sequence[Any],
    modules: Sequence[DistributedDataParallel],
    *,
    forward_only: bool = False,
) -> list[Any]:
    """Run Megatron's pipeline schedule; returns what the last stage's loss function reported, else nothing."""
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in modules],  # each chunk of the model passes over all of them
        model=list(modules),
        num_microbatches=len(micro_batches),
        seq_length=1,  # with variable_seq_lengths the stages tell each other the true length
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _run_model(model: Any, micro_batch: MicroBatch, head_input: HeadInput) -> Any:
    """Return the result of the head on the last stage, hidden states on the others."""
    return model(
        micro_batch.token_ids_T[None],
        micro_batch.positions_T[None],
        None,
        packed_seq_params=micro_batch.layout,
        labels=head_input,
    )


def _padded(cu_seqlens: Tensor, multiple: int) -> tuple[Tensor, int]:
    """Return the boundaries with a last sample of padding, so that the pack's length is a multiple; and its length."""
    padding = -int(cu_seqlens[-1]) % multiple
    return (torch.cat([cu_seqlens, cu_seqlens[-1:] + padding]) if padding else cu_seqlens), padding


def length_multiple(config: TransformerConfig) -> int:
    """Return what the tokens of a pack must be a multiple of.

    Context parallelism cuts it twice per rank, sequence parallelism cuts a rank's part over its tensor ranks.
    """
    context, tensor = config.context_parallel_size, config.tensor_model_parallel_size
    per_rank = tensor if config.sequence_parallel else 1
    return per_rank if context == 1 else context * math.lcm(2, per_rank)


def _joined_over_context(values_T: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Return the values of the whole pack from the parts of its context-parallel ranks. Collective over them."""
    if micro_batch.places_T is None:
        return values_T
    joined_T = values_T.new_zeros(len(micro_batch.whole.loss_mask_T)).index_copy(0, micro_batch.places_T, values_T)
    dist.all_reduce(joined_T, group=context_group())
    return joined_T


def _on_positions(logprobs_N: Tensor, batch: PackedBatch) -> Tensor:
    """Return the head's [N] values as [T], zero elsewhere."""
    rows_N = batch.loss_mask_T.nonzero().squeeze(1)
    return logprobs_N.new_zeros(len(batch.loss_mask_T)).index_copy(0, rows_N, logprobs_N)
