"""The LM head of the policy: log-probs of the target tokens, never the logits.

N rows that reach the head, V vocabulary (Vp: this rank's share), D hidden size.
"""

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from p2o_kernels import linear_logprob


class LogprobHead(ColumnParallelLinear):
    """Megatron's output layer with a second form of call: `head(hidden, weight, targets_N=..., rows_N=...)`.

    A subclass that is called as a module, so that parameter names, checkpoints, tensor-parallel attributes and the
    forward hooks of `overlap_param_gather` stay Megatron's. Without `targets_N` it is the plain linear layer.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        targets_N: Tensor | None = None,
        rows_N: Tensor | None = None,
        temperature: float = 1.0,
        vocab_size: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (logprobs_N, entropy_N), float32, the same on all tensor ranks.

        Args:
            input_: [T, 1, D] hidden states, or this rank's [T / tensor ranks, 1, D] under sequence parallelism.
            weight: [Vp, D] when the head shares the embedding's weight; None for its own.
            targets_N: int64 token ids.
            rows_N: int64 positions of the pack to compute; prompt positions left out cost nothing.
            temperature: the logits are divided by it.
            vocab_size: real tokens; rows of the weight beyond it are padding.
        """
        if targets_N is None or rows_N is None:
            return super().forward(input_, weight, runtime_gather_output)
        if weight is None:
            weight = self.weight
        assert weight is not None and isinstance(self.tp_group, ProcessGroup)
        if self.sequence_parallel:
            # Its backward adds the hidden gradients of the vocabulary shards and scatters them.
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
            hidden_ND = hidden.squeeze(1).index_select(0, rows_N)
        else:
            hidden_ND = input_.squeeze(1).index_select(0, rows_N)
            hidden_ND = copy_to_tensor_model_parallel_region(hidden_ND, group=self.tp_group)
        return linear_logprob(
            hidden_ND,
            weight,
            targets_N,
            temperature=temperature,
            tp_group=self.tp_group,
            vocab_start=self.tp_group.rank() * self.output_size_per_partition,
            vocab_size=vocab_size,
        )
