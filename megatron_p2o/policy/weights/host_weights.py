"""Keeps the weights of the initial policy in host memory, and swaps them with the trained ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_p2o.policy.model.model import PolicyModel


class HostWeights:
    """A copy of this rank's part of the model, as it was when this was made; as large as the part in its dtype."""

    def __init__(self, models: Sequence[PolicyModel]) -> None:
        """`models`: this rank's parts, whose parameters are exchanged in place: what refers to them keeps doing so."""
        self._parameters = list(dict.fromkeys(each for model in models for each in model.parameters()))
        self._elsewhere = [
            torch.empty(each.shape, dtype=each.dtype, device="cpu", pin_memory=each.is_cuda)
            for each in self._parameters
        ]
        for kept, parameter in zip(self._elsewhere, self._parameters, strict=True):
            kept.copy_(parameter.detach())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model compute with the copy; afterwards its own weights are there again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # One tensor at a time: the model's device holds no second model. A GPU copies from and to pinned memory in the
        # order of its stream, and the host waits for none of it.
        for kept, parameter in zip(self._elsewhere, self._parameters, strict=True):
            leaving = parameter.detach().clone()
            parameter.copy_(kept, non_blocking=True)
            kept.copy_(leaving, non_blocking=True)
