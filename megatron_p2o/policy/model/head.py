"""The LM head of the policy: log-probs of the target tokens or the loss itself, never the logits.

T packed tokens, N response tokens among them, V vocabulary (Vp: this rank's share), D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_p2o.policy.model.parallel import context_group
from megatron_p2o.types import PackedBatch
from p2o_kernels import HeadOptions, LossRule, PolicyLoss, linear_logprob, linear_policy_loss
from p2o_kernels.lm_head import path_for


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadInput:
    """What the head is to compute of a pack. Travels through Megatron's model in the place of the labels."""

    batch: PackedBatch
    rule: LossRule | None = None
    """None: log-probs alone."""
    adds_to_main_grad: bool = False
    """Whether the weight's gradient may be added to Megatron's float32 buffer, past autograd. The gradient of the loss
    must be 1 then, and nothing may wait for the weight's autograd hook."""
    expected_dead_share: float = 0.0
    """Share of the tokens with an advantage that the context ratio dropped in the last update."""


class PolicyHead(ColumnParallelLinear):
    """Megatron's output layer with a second form of call: `head(hidden, weight, head_input=...)`.

    A subclass that is called as a module, so that parameter names, checkpoints, tensor-parallel attributes and the
    forward hooks of `overlap_param_gather` stay Megatron's. Without `head_input` it is the plain linear layer.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        head_input: HeadInput | None = None,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        options: HeadOptions | None = None,
    ) -> tuple[Tensor, Tensor | None] | PolicyLoss:
        """Return (logprobs_N, entropy_N) of the response tokens, or the loss under its rule; on all tensor ranks.

        Args:
            input_: [T, 1, D] hidden states, or this rank's [T / tensor ranks, 1, D] under sequence parallelism. There
                may be more than the pack has tokens: the rest is padding.
            weight: [Vp, D] when the head shares the embedding's weight; None for its own.
            temperature: the logits are divided by it.
            vocab_size: real tokens; rows of the weight beyond it are padding.
            options: how a GPU computes it.
        """
        if head_input is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        assert weight is not None and isinstance(self.tp_group, ProcessGroup)
        if self.sequence_parallel:
            # Its backward adds the hidden gradients of the vocabulary shards and scatters them.
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        hidden_TD = hidden.squeeze(1)[: len(head_input.batch.token_ids_T)]
        placed = {
            "temperature": temperature,
            "tp_group": self.tp_group,
            "vocab_start": self.tp_group.rank() * self.output_size_per_partition,
            "vocab_size": vocab_size,
            "path": path_for(hidden_TD, options),
        }
        return (
            _logprobs(hidden_TD, weight, head_input, placed)
            if head_input.rule is None
            else _loss(hidden_TD, weight, head_input, placed)
        )


def _logprobs(
    hidden_TD: Tensor, weight: Tensor, head_input: HeadInput, placed: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Return (logprobs_N, entropy_N); `placed` says how the weight is divided and computed with."""
    rows_N = head_input.batch.loss_mask_T.nonzero().squeeze(1)
    targets_N = head_input.batch.target_ids_T.index_select(0, rows_N)
    return linear_logprob(hidden_TD.index_select(0, rows_N), weight, targets_N, **placed)


def _loss(hidden_TD: Tensor, weight: Tensor, head_input: HeadInput, placed: Mapping[str, Any]) -> PolicyLoss:
    """Return the loss under `head_input.rule`; `placed` as above."""
    assert head_input.rule is not None
    batch, context = head_input.batch, context_group()
    return linear_policy_loss(
        hidden_TD,
        weight,
        batch.target_ids_T,
        advantages_T=batch.advantages_T,
        weights_T=batch.loss_weights_T * batch.loss_mask_T,
        rule=head_input.rule,
        old_logprobs_T=batch.old_logprobs_T,
        sampling_logprobs_T=batch.sampling_logprobs_T,
        is_templated_T=batch.is_templated_T,
        reference_logprobs_T=batch.reference_logprobs_T,
        sequence_T=batch.sample_index_T,
        num_sequences=len(batch.cu_seqlens) - 1,
        sequence_group=context if context.size() > 1 else None,
        weight_main_grad_VpD=_float32_main_grad(weight) if head_input.adds_to_main_grad else None,
        expected_dead_share=head_input.expected_dead_share,
        **placed,
    )


def _float32_main_grad(weight: Tensor) -> Tensor | None:
    """Return Megatron's gradient buffer; None without one, or where `megatron.grad_reduce_in_fp32` makes it coarser."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad if isinstance(main_grad, Tensor) and main_grad.dtype == torch.float32 else None
